"""scales: the equivariance error of fibres that stand for scales, over the pairs of scales that a factor matches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from geomssl.data.rendered import Rendered
from geomssl.encoders.geometry import Geometry
from geomssl.encoders.geometry import geometry as located
from geomssl.errors import GeomsslError
from geomssl.probes.boundary import clean
from geomssl.probes.defect import EquivarianceError, Task, evaluating, measure
from geomssl.probes.inputs import rendered
from geomssl.probes.judge import DEGENERATE
from geomssl.probes.layers import Layer, Reader
from geomssl.probes.units import units
from geomssl.transforms.actions import Action, Places, SpatialAction
from geomssl.transforms.base import Size
from geomssl.transforms.groups import Scales
from geomssl.transforms.sinc import Window


class MatchedScales(Action):
    """[Γ_s f](j, u) = f(i, u / s), u from the image's centre, where factors[j] = s factors[i]; zero where there is no such i.

    `Scales.act` with the maps' true place on the image, read by windowed sinc within `window`, so that reading between
    feature pixels adds as little as it can. Features (n, C, S h, w): the maps (n, C, S, h, w) of the S factors below each
    other, so that a mask of feature pixels may leave factors out.
    """

    name = "matched scales"

    def __init__(self, scales: Scales, geometry: Geometry | None, window: Window | None = None) -> None:
        self.transform, self.geometry, self.window = scales, geometry, window
        self.scales, self.space = scales, SpatialAction(scales, geometry)

    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor:
        maps = folded_back(features, self.scales)
        moved = self.space.precise(maps, params, image_size, self.window)
        origin = self.matched(params).view(len(features), 1, -1, 1, 1).expand_as(moved)
        return (moved.gather(2, origin.clamp(min=0)) * (origin >= 0)).flatten(2, 3)

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        return self.transform.is_exact(params, image_size)

    def guesses(self, feature_size: Size, image_size: Size) -> bool:
        return self.space.guesses(feature_size, image_size)

    def places(self, params: Tensor, feature_size: Size, image_size: Size) -> Places | None:
        return self.space.places(params, feature_size, image_size)

    def matched(self, params: Tensor) -> Tensor:
        """The i of every j, long (n, S), or -1."""
        return self.scales.matches().to(params.device)[params[:, 0].round().long()]

    def judged(self, params: Tensor, feature_size: Size, clean: Tensor | None) -> Tensor:
        """bool (n, S h, w): the matched factors alone."""
        found = (self.matched(params) >= 0)[:, :, None, None].expand(-1, -1, *feature_size)
        return (found if clean is None else found & clean[:, None]).flatten(1, 2)


def folded(features: Tensor) -> Tensor:
    """Maps (n, C, S, h, w) below each other, (n, C, S h, w)."""
    return features.flatten(2, 3)


def folded_back(features: Tensor, scales: Scales) -> Tensor:
    """The maps (n, C, S, h, w) again."""
    return features.unflatten(2, (len(scales.factors), -1))


def by_factors(
    reader: Reader, declared: Sequence[tuple[Action, str]], scales: Scales, image_size: Size, boundary: str
) -> tuple[Reader, list[tuple[Action, str]]]:
    """The same layers, those of one map a factor folded and declared to move as MatchedScales; the others as they were.

    declared: of each layer its action and a sentence that says why. Fibres are read at their pixels that see no padding
    where the boundary is "crop".
    """
    many = len(scales.factors)
    are = [layer.geometry is not None and len(layer.shape) == 4 and layer.shape[1] == many for layer in reader.layers]
    factors = ", ".join(f"{factor:g}" for factor in scales.factors)
    why = (
        f"The encoder's fibres stand for the factors {factors}: under each enlargement those are judged that match another "
        "(the action of matched scales), the rest are not."
    )

    def action(layer: Layer) -> Action:
        place = layer.geometry
        if place is None or boundary != "crop":
            return MatchedScales(scales, place)
        rows, columns = (place.clean(layer.size[axis], image_size[axis], axis) for axis in (0, 1))
        return MatchedScales(scales, place, (*rows, *columns))

    def features(images: Tensor) -> list[Tensor]:
        return [folded(f) if fits else f for f, fits in zip(reader.features(images), are, strict=True)]

    found = [(action(layer), why) if fits else old for layer, fits, old in zip(reader.layers, are, declared, strict=True)]
    return Reader(features, reader.layers), found


@torch.no_grad()
def scale_error(
    model: nn.Module,
    pictures: Rendered,
    scales: Scales,
    params: Tensor | None = None,
    *,
    boundary: str = "crop",
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int = 16,
) -> EquivarianceError:
    """The error of features (n, C, S, h, w) whose axis S stands for the factors of `scales`, for each factor s:

        total_s^2 = sum |f(T_s x)(j) - [Γ_s f(x)](j)|^2 / sum |[Γ_s f(x)](j) - mean|^2,   over images and the matched j alone

    T_s is rendered, so nothing of it is resampled; Γ_s reads the maps between their pixels by windowed sinc. model: an
    Encoder, read at its fibres, or a module that gives such features. params: (E, 1), indices of factors; all but the
    identity unless given. boundary: "crop" judges the feature pixels that see no padding, "none" all of them. Raises
    GeomsslError for features of another shape and where no feature pixel is left.
    """
    features = getattr(model, "fibres", model)
    size = (pictures.size, pictures.size)
    identity = scales.identity()
    params = scales.elements() if params is None else params
    params = params[(params != identity).any(dim=1)]
    weight = next(model.parameters())
    inputs = rendered(pictures, scales, weight.dtype, weight.device)
    with evaluating(model):
        first = inputs.of(slice(0, 1))
        shape = tuple(features(first).shape[1:])
        if len(shape) != 4 or shape[1] != len(scales.factors):
            raise GeomsslError(
                f"features {shape} of {len(scales.factors)} scales", f"(C, {len(scales.factors)}, h, w), one map a scale",
                reason="bad-features",
            )
        place, grid = located(features, first), (shape[2], shape[3])
        action = MatchedScales(scales, place)
        seen = None
        if boundary == "crop":
            seen = clean(action, place, params, grid, size, framed=False)
            rows, columns = (place.clean(grid[axis], size[axis], axis) for axis in (0, 1))
            action.window = (*rows, *columns)
        mask = action.judged(params, grid, seen)
        if not bool(mask.flatten(1).any(dim=1).all()):
            raise GeomsslError(
                f"no feature pixel of pictures of {pictures.size}x{pictures.size} that sees no padding under every factor",
                "larger pictures, or boundary none", reason="no-field",
            )

        task = Task(
            lambda images: [folded(features(images))], inputs.of, inputs.n, scales, params, [action], [mask],
            units(inputs.n, len(params)), inputs.moved, batch_size,
        )
        return measure(task, level, resamples, seed, DEGENERATE)[0]
