"""Homomorphic SSL (rows H1, H2, H6-H10, H12, H13): positives are fibres of one pass, or of two augmented ones, or both."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from geomssl import modes
from geomssl.config import Settings
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.heads import mlp
from geomssl.losses import Denominator
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec
from geomssl.objectives.critics import BYOL, Contrast, SimSiam, bare
from geomssl.objectives.fibres import Invariance, Metric, Space, draw_one, draw_pair, finite, line, p4, patch, pick, plane
from geomssl.transforms import Compose, CyclicRotations, Translations, policy
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.groups import PointGroup

__all__ = ["HSSL", "HSSLConfig", "pick"]

Acting = Literal["rotation", "translation", "scale", "p4"]
AUGMENTATION = {
    "rotation": ("rotations",), "translation": ("translations20",), "scale": ("scales",), "p4": ("rotations", "translations20"),
}  # fmt: skip
FACTORS = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)


class HSSLConfig(Settings):
    """What tells A-SSL, H-SSL, DIM(L), GIM and their hybrid apart."""

    name: Literal["hssl"] = "hssl"
    group: Acting = Field("rotation", description="the transformation; p4: turns and shifts together")
    positives: Literal["fibres", "inputs", "both"] = Field(
        "fibres", description="H-SSL (fibres of one pass), A-SSL (inputs, augmented), or the weighted sum of both losses"
    )
    fibres_weight: float = Field(1.0, gt=0, description="weight of H-SSL's loss where positives = both")
    inputs_weight: float = Field(1.0, gt=0, description="weight of A-SSL's loss where positives = both")
    draws: Literal["paper", "matched"] = Field(
        "paper", description="matched: both losses take the same g0, g1, g2 of the group, and an exact backbone makes them one"
    )
    base: int = Field(1, ge=1, description="size of the base space g0, 1 to |G|-1 fibres; the head's input widens with it")
    base_counts: Literal["total", "side"] = Field("total", description="base counts all fibres, or those of a square's side")
    wrap: bool = Field(True, description="translation: patches and distances go over the edges (a torus), or stay inside")
    distance: float | None = Field(None, description="largest distance of g1 and g2 of a positive pair  [default: no bound]")
    metric: Metric = Field("euclidean", description="squared norm of g1 - g2, which the paper plots, or distance of the group")
    invariance: Invariance = Field("left", description="of the group's distance, where the group does not commute")
    method: Literal["infonce", "byol", "simsiam"] = Field("infonce", description="what is made of a pair of positives")
    critic: Literal["cosine", "bilinear"] = Field("cosine", description="InfoNCE's similarity; bilinear is a' W b, local-local")
    beta: float = Field(10.0, ge=0, description="inverse temperature")
    denominator: Denominator = Field("pooled", description="which terms stand in InfoNCE's denominator")
    momentum: float = Field(0.99, ge=0, le=1, description="byol: share of its old weights that the target keeps in a step")
    predictor: int = Field(512, ge=1, description="byol, simsiam: hidden width of the predictor")
    projector: tuple[int, ...] = Field((128, 128, 128), min_length=1, description="widths of the head")
    input_norm: bool = Field(False, description="BatchNorm of the bundle before the head, as on the paper's residual networks")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        refuse = {
            "distance = 0, or less: positives would be identical": self.distance is not None and self.distance <= 0,
            "a distance bound with draws = paper and positives = inputs: the policy draws the augmentation":
                self.distance is not None and self.draws == "paper" and self.positives == "inputs",
            f"critic = bilinear with method = {self.method}": self.critic == "bilinear" and self.method != "infonce",
            "draws = matched for scale, which has no exact form": self.draws == "matched" and self.group == "scale",
            "draws = matched with wrap = false": self.draws == "matched" and self.group == "translation" and not self.wrap,
            "wrap = false for p4, whose places are a group on the torus alone": self.group == "p4" and not self.wrap,
            f"base_counts = side for {self.group}": self.base_counts == "side" and self.group != "translation",
        }
        expected = ("a distance above 0", "draws = matched, or no bound", "critic = cosine, or method = infonce",
                    "draws = paper, or another group", "wrap = true", "wrap = true", "base_counts = total")  # fmt: skip
        for (given, wrong), wanted in zip(refuse.items(), expected, strict=True):
            if wrong:
                raise GeomsslError(f"objective hssl: {given}", wanted, reason="bad-value")
        return self

    @property
    def fibres(self) -> int:
        """|g0|: how many fibres a bundle holds."""
        return self.base**2 if self.base_counts == "side" else self.base


class HSSL(Objective):
    """One loss over bundles of fibres of z = f(x), z of shape (N, C, G, H, W) (Keller et al., Eq. 2, 3, 5, 6).

        fibres  L_H: z(g1^-1 g0) against z(g2^-1 g0) of ONE un-augmented pass
        inputs  L_A: f(T_g1 x)(g0) against f(T_g2 x)(g0), both in one joint pass, the SAME g0 in both
        both    fibres_weight L_H + inputs_weight L_A, all images in one joint pass, one head

    A fibre is C numbers at one place of the axis that the group moves: of G for rotation and scale, after averaging over
    space; of (H, W) for translation, with G pooled by its maximum; of (G, H, W) for p4. A bundle is the |g0| C
    numbers of a base space, which lies contiguous on a circle (rotation), a line (scale), a torus or a plane (translation), or
    is all turns of a patch (p4), without padding.
    draws "paper": fibres draws each place by itself, inputs an augmentation of the policy and one place for both views.
    "matched": both take g0, g1, g2 uniformly from the group, shifts in whole steps of the map, so that L_A = L_H for an exact
    backbone (see the probe equivalence). distance: pairs (g1, g2) within it, all alike likely, g1 = g2 among them.
    method and critic: see objectives.critics. Feature-space InfoMax (DIM(L); GIM and CPC without the autoregressor) is group
    translation, positives fibres, base 1, critic bilinear; it is local-local, DIM proper is global-local.
    """

    Config = HSSLConfig
    reaches_h = False
    projector_note = "The projector was trained on single fibres; here it is fed with h, which pools them."

    def __init__(self, config: HSSLConfig, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        width = encoder.dim * config.fibres
        head = mlp((width, *config.projector))
        if config.input_norm:
            head = nn.Sequential(nn.BatchNorm1d(width), *head)
        # a head of another width takes no h: probes that would feed it h find no projector
        self.head: nn.Module | None = None
        if config.fibres == 1:
            self.projector = head
        else:
            self.head = head
        drawn = self.policy
        plain, augmented = (ViewSpec("plain", policy("none")),), (ViewSpec("1", drawn), ViewSpec("2", drawn))
        self.views, self.draws = {
            "fibres": (plain, 2), "inputs": (augmented, 1), "both": ((*plain, *augmented), 3),
        }[config.positives]
        if config.draws == "matched":
            self.views, self.draws = plain, 3
        width = config.projector[-1]
        self.critic: nn.Module
        if config.method == "infonce":
            self.critic = Contrast(config.beta, config.denominator, width if config.critic == "bilinear" else None)
        elif config.method == "simsiam":
            self.critic = SimSiam(width, config.predictor)
        else:
            self.critic = BYOL(width, config.predictor, config.momentum, encoder, head)
        self._spaces: dict[Any, Space] = {}

    @property
    def over_bundles(self) -> nn.Module:
        """The head, from bundles (N, |g0| C) to z: the projector where a bundle is one fibre."""
        head = self.projector or self.head
        assert head is not None
        return head

    @property
    def policy(self) -> Transform:
        """The augmentation that corresponds to the group, also where training drew none."""
        first, *rest = (policy(name) for name in AUGMENTATION[self.config.group])
        return Compose([first, *rest], name="-".join(AUGMENTATION[self.config.group]))

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        byol = self.critic if isinstance(self.critic, BYOL) else None
        if byol and self.training and torch.is_grad_enabled():
            byol.follow(encoder, self.over_bundles)
        images = self.images(encoder, batch)
        maps = encoder.fibres(images)
        fibres, followed = self.line(maps), self.line(byol.fibres(encoder, images)) if byol else None
        space = self.space(encoder, tuple(maps.shape), maps.device)
        losses = {}
        for name, views in self.starts(space, batch.draw, len(batch.indices)).items():
            pair, target = (
                None if line is None else tuple(gather(space.take(line[rows], start)) for rows, start in views)
                for line in (fibres, followed)
            )
            losses[name] = self.critic(self.over_bundles, pair, target)
        weights = {"fibres": self.config.fibres_weight, "inputs": self.config.inputs_weight}
        total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
        if len(losses) == 1:
            total = next(iter(losses.values()))
            losses = {"info_nce" if self.config.method == "infonce" else self.config.method: total}
        return Losses(total, {k: v.detach() for k, v in losses.items()}, encoder.pool(maps.detach())[: len(batch.indices)])

    def line(self, maps: Tensor) -> Tensor:
        """The fibres (N, C, places) of the group that is contrasted."""
        if self.config.group == "p4":
            return maps.flatten(2)
        line = maps.amax(dim=2).flatten(2) if self.config.group == "translation" else maps.mean(dim=(3, 4))
        if line.shape[2] == 1 and self.config.positives != "inputs":
            raise self._no_group(maps.shape)
        return line

    def _no_group(self, shape: torch.Size | tuple[int, ...]) -> GeomsslError:
        example = {"rotation": "encoder c4-cnn for rotation", "translation": "maps larger than 1x1", "scale": "a scale encoder",
                   "p4": "encoder c4-cnn, whose maps have turns and places"}  # fmt: skip
        return GeomsslError(
            f"hssl over {self.config.group} on an encoder with fibres of shape {tuple(shape[1:])} (C, G, H, W)",
            f"more than one fibre along the group, such as {example[self.config.group]}", reason="no-group",
        )

    def images(self, encoder: Encoder, batch: Batch) -> Tensor:
        """What the encoder sees in one pass: the un-augmented images, the two views, or all three."""
        if self.config.draws == "paper":
            return torch.cat([batch.views[spec.name].images for spec in self.views])
        plain = batch.views["plain"].images
        if self.config.positives == "fibres":
            return plain
        space = self.ahead(encoder, plain)
        views = [self.moved(encoder, plain, space, place) for place in self.pair(space, batch.draw[:, 1:])]
        return torch.cat([*([plain] if self.config.positives == "both" else []), *views])

    def starts(self, space: Space, draw: Tensor, n: int) -> dict[str, tuple[tuple[slice, Tensor], tuple[slice, Tensor]]]:
        """For each loss and each of its two views: which rows of the pass, and at which places their bundles start."""
        whole, found = self.config.positives, {}
        matched = self.config.draws == "matched"
        if whole != "inputs":
            places = self.pair(space, draw[:, 1:] if matched else draw[:, :2])
            if matched:
                home = draw_one(draw[:, 0], len(space))
                places = space.after(places[0], home), space.after(places[1], home)
            found["fibres"] = ((slice(0, n), places[0]), (slice(0, n), places[1]))
        if whole != "fibres":
            home = draw_one(draw[:, 0 if matched or whole == "inputs" else 2], len(space))
            first = 0 if whole == "inputs" else n
            found["inputs"] = ((slice(first, first + n), home), (slice(first + n, first + 2 * n), home))
        return found

    def pair(self, space: Space, draw: Tensor) -> tuple[Tensor, Tensor]:
        """Two places (N,) from two uniform numbers (N, 2): independent, or a pair within the distance."""
        if space.allowed is None:
            return draw_one(draw[:, 0], len(space)), draw_one(draw[:, 1], len(space))
        return draw_pair(draw, space.allowed)

    def space(self, encoder: Encoder, shape: tuple[int, ...], device: torch.device) -> Space:
        """The places that maps of this shape (N, C, G, H, W) have for bundles; GeomsslError where they do not fit."""
        key = (shape[1:], device)
        if key not in self._spaces:
            self._spaces[key] = self._space(encoder, shape).to(device)
        return self._spaces[key]

    def _space(self, encoder: Encoder, shape: tuple[int, ...]) -> Space:
        config, (channels, orientations, height, width) = self.config, shape[1:]
        of = getattr(encoder, "group", None)
        factors = getattr(getattr(encoder, "scales", None), "factors", None)
        if channels != encoder.dim:
            raise GeomsslError(
                f"hssl on an encoder whose fibres have {channels} numbers and whose h has {encoder.dim}",
                "one width for both, since one head stands on both", reason="bad-features",
            )
        turning = config.group in ("rotation", "p4")
        places = {"translation": height * width, "p4": orientations * height * width}.get(config.group, orientations)
        strange = factors is not None if turning else of is not None and config.group == "scale"
        if strange and config.positives != "inputs":
            carried = "scale" if of is None else "rotation" if isinstance(of, PointGroup) else of.name
            raise GeomsslError(
                f"hssl over {config.group} on an encoder whose fibres stand for {carried}",
                f"objective.group = {carried}, or an encoder over {config.group}", reason="no-group",
            )
        if (places == 1 and config.positives != "inputs") or (config.group == "p4" and orientations == 1):
            raise self._no_group(shape)
        largest = places - 1 if config.positives != "inputs" else places
        if config.fibres > largest:
            raise GeomsslError(
                f"base = {config.base} ({config.base_counts}), {config.fibres} fibres, on a group of {places} places",
                f"1 to {largest} fibres", reason="bad-value",
            )
        if config.group == "translation":
            found = plane((height, width), patch(config.base, config.base_counts, (height, width)), config.wrap)
        elif config.group == "scale":
            found = line(places, config.fibres, factors or FACTORS)
        else:
            point = _turns(encoder, orientations)
            if config.group == "rotation":
                found = finite(point, config.fibres, config.invariance)
            elif height != width or not bool(point.is_exact(point.elements(), (height, width)).all()):
                raise GeomsslError(
                    f"hssl over p4 on maps {height}x{width} with {orientations} turns", "square maps and quarter turns",
                    reason="no-group",
                )
            else:
                found = p4(point, height, config.fibres, config.invariance)
        if len(found) < (1 if config.positives == "inputs" else 2):
            raise GeomsslError(
                f"base = {config.base}, which fits in {len(found)} places of {places}", "a smaller base, or wrap = true",
                reason="bad-value",
            )
        return found if config.distance is None else found.bounded(config.distance, config.metric)

    def ahead(self, encoder: Encoder, images: Tensor) -> Space:
        """The places before the pass: found by one image in eval mode, once a size of images."""
        key = (tuple(images.shape[1:]), images.device)
        if key not in self._spaces:
            network = bare(encoder)
            with modes.evaluating(network), torch.no_grad():
                shape = tuple(network.fibres(images[:1]).shape)
            self._spaces[key] = self.space(encoder, shape, images.device)
        return self._spaces[key]

    def moved(self, encoder: Encoder, images: Tensor, space: Space, place: Tensor) -> Tensor:
        """T_g x for the g = p^-1 of places p (N,): a turn, or a shift by whole steps of the map on the torus."""
        transform, params = self.elements(encoder, (images.shape[2], images.shape[3]), space, place)
        return transform(images, params.to(images.dtype))

    def elements(self, encoder: Encoder, size: Size, space: Space, place: Tensor) -> tuple[Transform, Tensor]:
        """What acts on images of that size, and its parameters (N, P) of g = p^-1 for places p (N,)."""
        if space.turns is not None and space.inverse is not None and space.grid is not None:
            turn, down, across = space.turns[space.inverse[place]].unbind(dim=1)
            steps = self._steps(size, space.grid)
            both = Compose([_turns(encoder, len(space) // math.prod(space.grid)), Translations()])
            return both, torch.stack([turn, down * steps[0], across * steps[1]], dim=1)
        if space.inverse is not None:
            return _turns(encoder, len(space)), space.inverse[place].unsqueeze(1)
        if space.grid is None or not space.torus:
            raise GeomsslError(
                f"matched draws of {self.config.group}", "rotation, or wrapped translation: for scale there is no exact form",
                reason="no-exact-form",
            )
        steps = self._steps(size, space.grid)
        rows, columns = place // space.grid[1], place % space.grid[1]
        return Translations(), -torch.stack([rows * steps[0], columns * steps[1]], dim=1)

    @staticmethod
    def _steps(size: Size, grid: Size) -> Size:
        """How many pixels of the image one step of the map is, down and to the right."""
        if size[0] % grid[0] or size[1] % grid[1]:
            raise GeomsslError(
                f"shifts that match on images of {size[0]}x{size[1]} pixels and maps of {grid[0]}x{grid[1]}",
                "images whose sides are multiples of the maps'", reason="no-exact-form",
            )
        return size[0] // grid[0], size[1] // grid[1]


def _turns(encoder: Encoder, order: int) -> PointGroup:
    """The encoder's own group of turns, or, of a control that is read as fibres, that of so many turns."""
    of = getattr(encoder, "group", None)
    return of if isinstance(of, PointGroup) and of.fibre == order else CyclicRotations(order)
