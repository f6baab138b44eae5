"""Units: what a bootstrap resamples as one. Images, whole clusters of them, or blocks where there are very many."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.seeding import generator

# Never fewer blocks than these, and never more units: thousands say as much about an interval as millions.
FEWEST, MOST = 1024, 8192
# Bytes that one unit takes for one figure: numerator and denominator in float64, and what a bootstrap makes of them.
BYTES = 64


@dataclass(frozen=True)
class Units:
    """of (n,): the unit of every image.  count: how many units.  word: what they are, for the method of an interval."""

    of: Tensor
    count: int
    word: str

    def add(self, into: Tensor, elements: Tensor, rows: slice, values: Tensor) -> None:
        """Add values (e, b) of elements (e,) and images `rows` to the units of those images in `into` (E, count)."""
        into.index_put_((elements[:, None], self.of[rows][None, :]), values, accumulate=True)


def units(n: int, figures: int = 1, memory: int = 2**31, clusters: Tensor | None = None, seed: int = 0) -> Units:
    """The units of n images, few enough that `figures` sums over them fit in `memory` bytes.

    Without clusters an image is a unit up to 8192 of them (fewer where memory is short, at least 1024), and beyond that a
    block: images are dealt to blocks of equal size at random, so that sums over blocks vary as sums over as many images
    would. clusters: any values (n,); images with equal values stay together, and what is resampled is whole clusters.
    """
    most = min(MOST, max(FEWEST, memory // max(1, BYTES * figures)))
    if clusters is None:
        of, count, word = torch.arange(n), n, "images"
    else:
        if len(clusters) != n or clusters.dim() != 1:
            raise GeomsslError(f"clusters {tuple(clusters.shape)} of {n} images", f"({n},), one value an image")
        values, of = clusters.cpu().unique(return_inverse=True)
        count, word = len(values), f"{len(values)} clusters of images"
        if count < 2:
            raise GeomsslError("one cluster", "at least 2, since clusters are what is resampled", reason="too-few-images")
    if count > most:
        dealt = torch.randperm(count, generator=generator(seed, "blocks")) % most
        of, count, word = dealt[of], most, f"{most} blocks of {'images' if clusters is None else 'clusters'}"
    return Units(of, count, word)
