"""SIE: one half of h is invariant, and a known transformation acts on the other half by a linear map (row X3)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geomssl.data.base import Source
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.losses import hinged_deviation, vicreg, wide
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, encoded
from geomssl.objectives.halves import Halves, HalvesSettings, InvariantProjector, head
from geomssl.objectives.hypernetwork import Code, HyperNetwork
from geomssl.objectives.pairs import change, changed, factors_of, partners
from geomssl.objectives.vicreg import named
from geomssl.transforms import policy
from geomssl.transforms.base import Parameter, Size, Transform
from geomssl.transforms.compose import Compose

Known = Literal["rotation", "colour", "blur", "translation", "crop", "flip"]
# which transform a word stands for, by its name in transforms
PARTS: dict[Known, tuple[str, ...]] = {
    "rotation": ("rotate",),
    "colour": ("jitter", "brightness", "contrast", "saturation", "hue", "grayscale"),
    "blur": ("gaussian-blur",),
    "translation": ("translate",),
    "crop": ("resized-crop",),
    "flip": ("horizontal-flip",),
}


class SIE(Objective):
    """L = VICReg of [z_inv, z_equi], with M(g) z_equi1 in place of z_equi1 where z_equi2 is compared with it.

        L = a |z_inv1 - z_inv2|² + equivariance |M(g) z_equi1 - z_equi2|²
            + b (v(z1) + v(z2) + v(M(g) z_equi1)) / 2 + c (c(z1) + c(z2))

    z = [z_inv, z_equi] of the two halves of h through a head each; |.|² the mean over entries; v and c the variance and
    covariance terms of VICReg, on the joined vector, so that the halves do not say the same. View 1 is the image as it
    is and view 2 = T_g(view 1), so that g is the transformation between them; M(g) comes from a hypernetwork that sees
    those parameters of g that `known` names. Everything in the policy is drawn in every variant.

    known: ("rotation",), ..., ("rotation", "colour") or all six. single = true draws ONE of the known transformations for
    each step and leaves the others of the policy at their identity. changes: where view 2 is another image of the same
    object, the factors whose difference the hypernetwork sees as well (objects that turn: policy none, known empty);
    "quaternion" is the turn between two rotations.
    Source: Garrido et al. 2023, and the code of its authors.
    """

    class Config(HalvesSettings):
        name: Literal["sie"] = "sie"
        known: tuple[Known, ...] = Field(tuple(PARTS), description="transformations whose parameters are seen")
        changes: tuple[str, ...] = Field((), description="factors whose change from image to image is seen")
        single: bool = Field(False, description="draw one of the known transformations each step, not all of them")
        equivariance: float = Field(25.0, ge=0, description="weight of the equivariance term")
        hidden: int = Field(32, ge=0, description="hidden width of the hypernetwork; 0 makes it linear")

    seen: Tensor

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        drawn = policy(config.policy)
        _check(config)
        wanted = {name for word in config.known for name in PARTS[word]}
        acting, said = drawn.active(channels), f"{channels} channel{'s' if channels > 1 else ''}"
        for word in config.known:
            if not any(acting[i] for i in _columns(drawn, set(PARTS[word]))):
                reach = "" if any(part.name in PARTS[word] for part in drawn.parts) else ", which has none"
                raise GeomsslError(
                    f"sie: known {word} under policy {config.policy!r} on {said}{reach}",
                    "a transformation of the policy that acts on the images", reason="bad-value",
                )
        seen = torch.tensor([i for i in _columns(drawn, wanted) if acting[i]], dtype=torch.long)
        self.register_buffer("seen", seen, persistent=False)
        self.factors = factors_of(config.changes)
        self.parameters_seen: tuple[Parameter, ...] = tuple(drawn.parameters[i] for i in self.seen.tolist())
        halves = Halves(encoder.dim, config.half)
        self.projector = InvariantProjector(halves, head(config.half, config.projector))
        self.equivariant = head(config.half, config.projector)
        shown: Transform = OneOf(drawn, wanted) if config.single else drawn
        self.views = (ViewSpec("1", policy("none")), ViewSpec("2", shown))

    def complete(self, encoder: Encoder, size: int, source: Source | None) -> None:
        # the pair is the image and its partner, whichever of the two draws of partners that is
        partner = next((found for found in partners(self.config, source)[::-1] if found is not None), None)
        self.views = (self.views[0], self.views[1]._replace(partner=partner))
        self.changes = tuple(change(source, name) for name in self.config.changes)
        code = Code((*self.parameters_seen, *(parameter for by in self.changes for parameter in by)), size)
        self.predictor = HyperNetwork(code, self.config.projector[-1], self.config.hidden)

    @property
    def policy(self) -> Transform:
        """The whole policy, also where training draws one part of it at a time."""
        return policy(self.config.policy)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        config = self.config
        assert isinstance(self.projector, InvariantProjector)
        (h1, h2), own = encoded(encoder, batch.views["1"].images, batch.views["2"].images)
        invariant, equivariant = self.projector.halves(torch.cat([h1, h2]))
        i1, i2 = self.projector.head(invariant).chunk(2)
        e1, e2 = self.equivariant(equivariant).chunk(2)
        moved = self.predictor(e1, gather(self.given(batch)))
        terms = vicreg(torch.cat([i1, e1], dim=1), torch.cat([i2, e2], dim=1), config.form)
        kept, followed = _distance(i1, i2, config.form), _distance(moved, e2, config.form)
        spread = hinged_deviation(moved) / (2 if config.form == "released" else 1)
        terms = type(terms)(kept, terms.variance + spread, terms.covariance)
        total = config.total(terms) + config.equivariance * followed
        return Losses(total, {**named(terms), "equivariance": followed.detach()}, own)


    def given(self, batch: Batch) -> Tensor:
        """What the hypernetwork is told of g, (N, P): known parameters, then changes of factors, in their own units."""
        before, after = batch.factors, batch.views["2"].factors
        params = batch.views["2"].params[:, self.seen]
        moved = [changed(before, after, by).to(params) for by in self.changes]
        return torch.cat([params, *moved], dim=1)


def _check(config: SIE.Config) -> None:
    if not (config.known or config.changes):
        raise GeomsslError("sie that sees no parameter", "known transformations, or changes of factors", reason="bad-value")
    if config.changes and config.positives == "image":
        raise GeomsslError(
            "sie: changes of factors between views of one image, where none changes", "positives = object or next",
            reason="bad-value",
        )
    if config.single and not config.known:
        raise GeomsslError("sie: single without a known transformation", "at least one in known", reason="bad-value")


def _distance(a: Tensor, b: Tensor, form: str) -> Tensor:
    error = F.mse_loss(wide(a), wide(b))
    return error if form == "released" else error * a.shape[1]


def _columns(drawn: Compose, names: set[str]) -> list[int]:
    """The columns of the policy's parameters that belong to the parts of those names."""
    pairs = zip(drawn.parts, drawn.slices, strict=True)
    return [i for part, columns in pairs if part.name in names for i in range(columns.start, columns.stop)]


class OneOf(Compose):
    """One of the named parts, drawn for the whole batch, each as likely as another; every other part at its identity."""

    def __init__(self, whole: Compose, names: set[str]) -> None:
        super().__init__(whole.parts, name=f"one-of-{whole.name}", antialias=whole.antialias)
        self.choices = [i for i, part in enumerate(self.parts) if part.name in names]

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        place = torch.randint(len(self.choices), (1,), generator=generator, device=generator.device)
        chosen = self.choices[int(place)]
        params = self.identity(n).to(generator.device)
        params[:, self.slices[chosen]] = self.parts[chosen].sample(n, generator, size)
        return params
