"""scales: the equivariance error of fibres that stand for scales, over the pairs of scales that a factor matches."""

from __future__ import annotations

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
from geomssl.probes.units import units
from geomssl.transforms.actions import Action, SpatialAction
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
        maps = features.unflatten(2, (len(self.scales.factors), -1))
        moved = self.space.precise(maps, params, image_size, self.window)
        origin = self.matched(params).view(len(features), 1, -1, 1, 1).expand_as(moved)
        return (moved.gather(2, origin.clamp(min=0)) * (origin >= 0)).flatten(2, 3)

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        return self.transform.is_exact(params, image_size)

    def matched(self, params: Tensor) -> Tensor:
        """The i of every j, long (n, S), or -1."""
        return self.scales.matches().to(params.device)[params[:, 0].round().long()]


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
        mask = (action.matched(params) >= 0)[:, :, None, None].expand(-1, -1, *grid)
        if boundary == "crop":
            mask = mask & clean(action.space, place, params, grid, size, framed=False)[:, None]
            rows, columns = (place.clean(grid[axis], size[axis], axis) for axis in (0, 1))
            action.window = (*rows, *columns)
        mask = mask.flatten(1, 2)
        if not bool(mask.flatten(1).any(dim=1).all()):
            raise GeomsslError(
                f"no feature pixel of pictures of {pictures.size}x{pictures.size} that sees no padding under every factor",
                "larger pictures, or boundary none", reason="no-field",
            )

        def folded(images: Tensor) -> list[Tensor]:
            return [features(images).flatten(2, 3)]

        task = Task(
            folded, inputs.of, inputs.n, scales, params, [action], [mask], units(inputs.n, len(params)), inputs.moved,
            batch_size,
        )
        return measure(task, level, resamples, seed, DEGENERATE)[0]
