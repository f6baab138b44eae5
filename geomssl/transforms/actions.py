"""Actions (Γ): how features are declared to move when an image is transformed. f(T_g x) = Γ_g f(x)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from geomssl.encoders.geometry import Geometry
from geomssl.errors import GeomsslError, unknown
from geomssl.transforms.base import Group, Size, Transform
from geomssl.transforms.compose import Compose
from geomssl.transforms.geometric import Geometric, HorizontalFlip
from geomssl.transforms.groups import Translations
from geomssl.transforms.photometric import Photometric
from geomssl.transforms.sampling import bilinear, frame, working_dtype
from geomssl.transforms.sinc import Window, windowed_sinc

Places = tuple[Tensor, Tensor]
ActionFunction = Callable[[Tensor, Tensor, Size], Tensor]


class Action(ABC):
    """Γ: features (n, ...), parameters (n, P) of the transform and the image's size to moved features of the same shape."""

    name: str
    transform: Transform
    geometry: Geometry | None = None

    @abstractmethod
    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor: ...

    @abstractmethod
    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        """bool (n,): True only where T_g permutes pixels AND Γ_g permutes entries of features (..., h, w).

        Only there is a difference between f(T_g x) and Γ_g f(x) all the model's.
        """

    def precise(self, features: Tensor, params: Tensor, image_size: Size, window: Window | None = None) -> Tensor:
        """The same declaration with a finer reading where it resamples: windowed sinc instead of bilinear.

        How far the two are apart says what Γ's own interpolation does. Where nothing is resampled they are equal.
        window: the feature pixels (first and last row, first and last column) that may be read; None: all.
        """
        return self(features, params, image_size)

    def guesses(self, feature_size: Size, image_size: Size) -> bool:
        """Does the declaration rest on a guessed place of the features, the ratio of sizes?"""
        return False

    def places(self, params: Tensor, feature_size: Size, image_size: Size) -> Places | None:
        """Feature coordinates (y, x), each broadcasting to (n, h, w), that Γ_g reads for every feature pixel; None: unknown."""
        return None

    def judged(self, params: Tensor, feature_size: Size, clean: Tensor | None) -> Tensor | None:
        """Of the feature pixels bool (n, h, w) to judge, or None for all, those of which Γ_g says where they come from."""
        return clean


def action(
    declared: Literal["regular", "spatial", "trivial"] | str | ActionFunction | Action,
    transform: Transform,
    geometry: Geometry | None = None,
) -> Action:
    """The action of that name for a transform.

    "regular": [Γ_g f](k, u) = f(g^-1 k, g^-1 u) on fibres (n, C, G, H, W), by Group.act. "spatial": the transform on the
    last two axes alone. "trivial": the identity, any shape. A callable (features, params, image_size) -> features is a
    declaration of your own: see FunctionAction.
    geometry: where the features' pixels sit on the image, for what is counted in pixels; None stands for the ratio of
    sizes, under which no whole shift counts as exact. Raises GeomsslError where the transform has no such action.
    """
    if isinstance(declared, Action):
        return declared
    if callable(declared):
        return FunctionAction(declared, transform, bool(getattr(declared, "permutes", False)))
    if declared not in ACTIONS:
        raise unknown("action", declared, ACTIONS)
    if declared == "regular" and isinstance(transform, Translations):
        # Fibre 1: the regular representation moves in space alone, in pixels of the features.
        declared = "spatial"
    return ACTIONS[declared](transform, geometry)


class RegularAction(Action):
    """Group.act on (n, C, |G|, H, W): turns the maps and permutes the orientations."""

    name = "regular"

    def __init__(self, transform: Transform, geometry: Geometry | None = None) -> None:
        if not isinstance(transform, Group):
            raise GeomsslError(
                f"the regular action of {transform.name}", "a group, such as c4, d4 or translations", reason="no-action"
            )
        self.group, self.transform, self.geometry = transform, transform, geometry

    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor:
        return self.group.act(features, params)

    def precise(self, features: Tensor, params: Tensor, image_size: Size, window: Window | None = None) -> Tensor:
        moved = self(features, params, image_size)
        resampled = ~self.group.is_exact(params, _size(features))
        if not bool(resampled.any()) or not isinstance(self.group, Geometric):
            return moved
        # Where act reads bilinearly, orientations are permuted first and the maps are read finely after.
        rows, row_params = features[resampled], params[resampled]
        numbered = features.new_tensor(range(self.group.fibre)).view(1, 1, -1, 1, 1).expand(len(rows), -1, -1, 3, 3)
        centre = self.group.act(numbered, row_params)[:, :, :, 1:2, 1:2]
        origin = centre.round().long().expand(-1, features.shape[1], -1, *_size(features))
        maps = rows.gather(2, origin).flatten(1, 2)
        moved[resampled] = SpatialAction(self.group, self.geometry).finely(maps, row_params, image_size, window).view_as(rows)
        return moved

    def places(self, params: Tensor, feature_size: Size, image_size: Size) -> Places | None:
        return SpatialAction(self.group, self.geometry).places(params, feature_size, image_size)

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        return self.group.is_exact(params, image_size) & self.group.is_exact(params, feature_size)


class SpatialAction(Action):
    """The transform on the last two axes of (n, C, H, W) or (n, C, G, H, W); axis G is left alone.

    A finite group and a mirror act on the grid of features as on an image. What is counted in pixels is carried to the
    grid: feature pixel i stands at offset + stride i, and reads where the transform says that this point comes from
    (wrapped shifts are divided by the stride). What is not a whole feature pixel is read bilinearly. Colour leaves
    features where they are, and a Compose acts part by part.
    """

    name = "spatial"

    def __init__(self, transform: Transform, geometry: Geometry | None = None) -> None:
        if not isinstance(transform, (Geometric, Group, Photometric, Compose)):
            raise GeomsslError(
                f"the spatial action of {transform.name}", "a transform that says how it moves pixels, or your own action",
                reason="no-action",
            )
        self.transform, self.geometry = transform, geometry
        self.parts = [SpatialAction(part, geometry) for part in getattr(transform, "parts", ())]

    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor:
        if features.dim() not in (4, 5):
            raise GeomsslError(
                f"features {tuple(features.shape)} under a spatial action", "(n, C, H, W) or (n, C, G, H, W)",
                reason="bad-features",
            )
        return self._move(features.flatten(1, -3), params, image_size).view_as(features)

    def precise(self, features: Tensor, params: Tensor, image_size: Size, window: Window | None = None) -> Tensor:
        return self.finely(features.flatten(1, -3), params, image_size, window).view_as(features)

    def guesses(self, feature_size: Size, image_size: Size) -> bool:
        transform = self.transform
        if isinstance(transform, Compose):
            return any(part.guesses(feature_size, image_size) for part in self.parts)
        if feature_size == image_size or not isinstance(transform, Geometric) or _on_the_grid(transform):
            return False
        return self.geometry is None or self.geometry.source != "layers"

    def finely(self, maps: Tensor, params: Tensor, image_size: Size, window: Window | None = None) -> Tensor:
        """The move of maps (n, C, h, w), read by windowed sinc where it is no permutation."""
        if isinstance(self.transform, Compose):
            for part, columns in zip(self.parts, self.transform.slices, strict=True):
                maps = part.finely(maps, params[:, columns], image_size, window)
            return maps
        if not isinstance(self.transform, Geometric):
            return maps
        params = self.transform.admit(maps, params)
        y, x, share = self._read(maps.to(working_dtype(maps.dtype)), params, _size(maps), image_size)
        wrap = isinstance(self.transform, Translations) and self.transform.wrap
        moved = windowed_sinc(maps.to(y.dtype), y, x, wrap=wrap, window=window)
        return (moved if share is None else moved * share.unsqueeze(1)).to(maps.dtype)

    def places(self, params: Tensor, feature_size: Size, image_size: Size) -> Places | None:
        params = params.double()
        like = torch.empty((), dtype=torch.float64, device=params.device)
        transform = self.transform
        if isinstance(transform, Compose):
            moving = [i for i, part in enumerate(transform.parts) if not isinstance(part, Photometric)]
            if len(moving) == 1:
                (i,) = moving
                return self.parts[i].places(params[:, transform.slices[i]], feature_size, image_size)
            return None if moving else frame(feature_size, like)
        if not isinstance(transform, Geometric):
            return frame(feature_size, like)
        return self._read(like, params, feature_size, image_size, hold=False)[:2]

    def _read(
        self, like: Tensor, params: Tensor, feature_size: Size, image_size: Size, hold: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Feature coordinates that arrive at each feature pixel and the share that counts. hold: keep them on the grid."""
        transform = self.transform
        assert isinstance(transform, Geometric)
        if isinstance(transform, Translations) and transform.wrap:
            shift = self._shift(params, feature_size, image_size)
            y, x = frame(feature_size, like)
            y, x = y - shift[:, :1, None], x - shift[:, 1:, None]
            return y.remainder(feature_size[0]), x.remainder(feature_size[1]), None
        if not _on_the_grid(transform):
            return self._source(transform, like, params, feature_size, image_size, hold)
        y, x = transform.source(*frame(feature_size, like), params, feature_size)
        return transform.border(y, x, params, feature_size) if hold else (y, x, None)

    def _move(self, maps: Tensor, params: Tensor, image_size: Size) -> Tensor:
        transform = self.transform
        if isinstance(transform, Compose):
            for part, columns in zip(self.parts, transform.slices, strict=True):
                maps = part._move(maps, params[:, columns], image_size)
            return maps
        if isinstance(transform, Translations) and transform.wrap:
            return transform(maps, self._shift(params, _size(maps), image_size))
        if _on_the_grid(transform):
            return transform(maps, params)
        if not isinstance(transform, Geometric):
            return maps
        params = transform.admit(maps, params)
        pixels = maps.to(working_dtype(maps.dtype))
        y, x, share = self._source(transform, pixels, params, _size(maps), image_size)
        moved = bilinear(pixels, y, x)
        return (moved if share is None else moved * share.unsqueeze(1)).to(maps.dtype)

    def _placed(self, feature_size: Size, image_size: Size) -> Geometry:
        return self.geometry or Geometry.from_sizes(image_size, feature_size)

    def _shift(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        return params / params.new_tensor(self._placed(feature_size, image_size).stride)

    def _source(
        self, transform: Geometric, like: Tensor, params: Tensor, feature_size: Size, image_size: Size, hold: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Feature coordinates that arrive at each feature pixel, held on the grid, and the share of each that counts."""
        placed = self._placed(feature_size, image_size)
        y, x = frame(feature_size, like)
        y, x = placed.offset[0] + placed.stride[0] * y, placed.offset[1] + placed.stride[1] * x
        y, x = transform.source(y, x, params, image_size)
        share: Tensor | None = None
        if hold:
            y, x, share = transform.border(y, x, params, image_size)
        y, x = (y - placed.offset[0]) / placed.stride[0], (x - placed.offset[1]) / placed.stride[1]
        return (y.clamp(0, feature_size[0] - 1), x.clamp(0, feature_size[1] - 1), share) if hold else (y, x, None)

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        transform = self.transform
        exact = transform.is_exact(params, image_size)
        if isinstance(transform, Compose):
            for part, columns in zip(self.parts, transform.slices, strict=True):
                exact = exact & part.is_exact(params[:, columns], feature_size, image_size)
            return exact
        if isinstance(transform, Translations) and transform.wrap:
            shift = self._shift(params, feature_size, image_size)
            whole = (shift == shift.round()).all(dim=1)
            guessed = self.geometry is None or self.geometry.source != "layers"
            return exact & whole & ((params == 0).all(dim=1) if guessed and feature_size != image_size else True)
        if _on_the_grid(transform):
            return exact & transform.is_exact(params, feature_size)
        if not isinstance(transform, Geometric):
            return exact
        params64 = params.double()
        like = torch.empty((), dtype=torch.float64, device=params.device)
        y, x, share = self._source(transform, like, params64, feature_size, image_size)
        y, x = (c.expand(len(params), *feature_size).flatten(1) for c in (y, x))
        whole = ((y - y.round()).abs().amax(1) < 1e-6) & ((x - x.round()).abs().amax(1) < 1e-6)
        reached = (y.round() * feature_size[1] + x.round()).sort(dim=1).values
        permutes = (reached == torch.arange(reached.shape[1], device=params.device)).all(dim=1)
        if share is not None:
            permutes &= (share == 1).expand(len(params), *feature_size).flatten(1).all(dim=1)
        return exact & whole & permutes


class TrivialAction(Action):
    """The identity on features of any shape: the declaration of an invariant model."""

    name = "trivial"

    def __init__(self, transform: Transform, geometry: Geometry | None = None) -> None:
        self.transform, self.geometry = transform, geometry

    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor:
        return features

    def places(self, params: Tensor, feature_size: Size, image_size: Size) -> Places | None:
        return frame(feature_size, torch.empty((), dtype=torch.float64, device=params.device))

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        return self.transform.is_exact(params, image_size)


class FunctionAction(Action):
    """An action of your own: function (features, params, image_size) -> features.

    permutes: say True where Γ_g only permutes (or changes the sign of) entries of the features whenever T_g permutes
    pixels; then a difference counts as the model's and a verdict may rest on it. Otherwise only the identity is exact.
    (`action` reads it from the function's own attribute `permutes`.)
    """

    def __init__(self, function: ActionFunction, transform: Transform, permutes: bool = False) -> None:
        self.function, self.transform, self.permutes = function, transform, permutes
        self.name = getattr(function, "__name__", type(function).__name__)

    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor:
        return self.function(features, params, image_size)

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        exact = self.transform.is_exact(params, image_size)
        if self.permutes:
            return exact
        return exact & (params == self.transform.identity().to(params)).all(dim=1)


def _size(maps: Tensor) -> Size:
    return maps.shape[-2], maps.shape[-1]


def _on_the_grid(transform: Transform) -> bool:
    """Does it act on a grid of any size as on an image, with nothing counted in pixels?"""
    finite = isinstance(transform, Group) and all(p.kind in ("index", "binary") for p in transform.parameters)
    return finite or isinstance(transform, HorizontalFlip)


ACTIONS: dict[str, Callable[[Transform, Geometry | None], Action]] = {
    "regular": RegularAction,
    "spatial": SpatialAction,
    "trivial": TrivialAction,
}
