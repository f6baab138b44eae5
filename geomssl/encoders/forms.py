"""Forms of features: vectors, maps, maps with a group axis, channels last, and tokens with their patch grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from torch import Tensor

from geomssl.transforms.base import Size

# No more tokens than these come before the patches (class, distillation and register tokens).
PREFIX = 16


@dataclass(frozen=True)
class Form:
    """How one layer's output is read.

    kind:   "vector" (N, D), "map" (N, C, H, W), "fibres" (N, C, G, H, W), "channels-last" (N, H, W, C) or "tokens" (N, T, D).
    grid:   (H, W), None for a vector.  prefix: tokens before the patches, which have no place on the image.
    """

    kind: Literal["vector", "map", "fibres", "channels-last", "tokens"]
    grid: Size | None = None
    prefix: int = 0

    def placed(self, output: Tensor) -> Tensor:
        """The output with its places last: (N, D), (N, C, H, W) or (N, C, G, H, W). Tokens without those of the prefix."""
        if self.kind == "channels-last":
            return output.movedim(-1, 1)
        if self.kind == "tokens":
            return output[:, self.prefix :].transpose(1, 2).unflatten(2, self.grid)
        return output.flatten(1) if self.kind == "vector" else output

    def apart(self, output: Tensor) -> Tensor:
        """The tokens of the prefix as one vector (N, prefix D)."""
        return output[:, : self.prefix].flatten(1)


def form(output: Any, n: int, image_size: Size, grids: Sequence[Size] = ()) -> Form | None:
    """The form of what a layer gave for n images, or None where it is no feature of them.

    grids: sizes of the maps that convolutions of the same pass gave; a patch grid is one of them, else a square. A map of
    square images whose first two sides agree and whose last two do not has its channels last.
    """
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.dim() < 2 or len(output) != n:
        return None
    if output.numel() == 0 or output.dim() > 5:
        return None
    shape = tuple(output.shape[1:])
    if output.dim() == 2:
        return Form("vector")
    if output.dim() == 3:
        return _tokens(shape[0], grids)
    if output.dim() == 4 and image_size[0] == image_size[1] and shape[0] == shape[1] != shape[2]:
        return Form("channels-last", (shape[0], shape[1]))
    return Form("map" if output.dim() == 4 else "fibres", (shape[-2], shape[-1]))


def _tokens(count: int, grids: Sequence[Size]) -> Form | None:
    fitting = [(count - h * w, (h, w)) for h, w in grids if 0 <= count - h * w <= PREFIX and h * w > 1]
    side = isqrt(count)
    fitting = fitting or ([(count - side * side, (side, side))] if side > 1 and count - side * side <= PREFIX else [])
    if not fitting:
        return None
    prefix, grid = min(fitting, key=lambda found: found[0])
    return Form("tokens", grid, prefix)
