"""Inputs of an equivariance measurement: natural images, which T_g resamples, or rendered pictures, where T_g is exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geomssl.data.rendered import Fields, Phantoms, Rendered
from geomssl.errors import GeomsslError
from geomssl.seeding import derive
from geomssl.transforms.base import Size, Transform

# Natural images of which the spectrum of their reference pictures is taken.
SPECTRUM = 256
# Bandwidths of a sweep, in cycles per pixel.
BANDWIDTHS = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.49)


@dataclass(frozen=True)
class Inputs:
    """of: a slice of the n images, (b, C, H, W).  moved: T_g of a slice, elements (e, P) first, where it is rendered.

    reference: pictures on which r is measured (the inputs themselves where they are rendered), or None.
    fitted: whether the reference has the spectrum of the images, as against being the images.
    """

    of: Callable[[slice], Tensor]
    n: int
    moved: Callable[[slice, Tensor], Tensor] | None
    reference: Rendered | None
    name: str

    @property
    def size(self) -> Size:
        first = self.of(slice(0, 1))
        return first.shape[2], first.shape[3]


def natural(of: Callable[[slice], Tensor], n: int, reference: Rendered | None) -> Inputs:
    """Images as they are; T_g resamples them."""
    return Inputs(of, n, None, reference, "data")


def rendered(
    pictures: Rendered, transform: Transform, dtype: torch.dtype, device: torch.device | str, rows: Tensor | None = None
) -> Inputs:
    """Rendered pictures (rows of them, all unless given); T_g is evaluated, not resampled."""
    rows = torch.arange(len(pictures)) if rows is None else rows

    def of(part: slice) -> Tensor:
        return pictures.images(rows[part], dtype=dtype, device=device)

    def moved(part: slice, params: Tensor) -> Tensor:
        chosen = rows[part]
        each = params.cpu().repeat_interleave(len(chosen), dim=0)
        return pictures.images(chosen.repeat(len(params)), transform, each, dtype=dtype, device=device)

    return Inputs(of, len(rows), moved, pictures, pictures.name)


def pictures(
    kind: Literal["fields", "phantoms"], n: int, channels: int, size: int, bandwidth: float, periodic: bool, seed: int
) -> Rendered:
    """Rendered pictures of that kind; periodic ones for wrapped shifts."""
    seed = derive(seed, f"equivariance-{kind}")
    if kind == "fields":
        return Fields(n, channels, size, bandwidth, periodic=periodic, seed=seed)
    return Phantoms(n, channels, size, bandwidth, seed=seed)


def like(images: Tensor, n: int, periodic: bool, seed: int) -> Rendered | None:
    """Fields with the spectrum of the first images, or None where these have none (all constant, or too small)."""
    try:
        return Fields.like(images[:SPECTRUM].float().cpu(), n, periodic=periodic, seed=derive(seed, "equivariance-reference"))
    except GeomsslError:
        return None
