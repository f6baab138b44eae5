"""Masks on disk: what is at every pixel of an image, cropped and resized as the image is, by a table from grey levels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geomssl.data.images import UNREADABLE
from geomssl.errors import GeomsslError

UNNAMED = -1
_UNKNOWN = -2


@dataclass(frozen=True)
class MaskFiles:
    """One grey image a picture, whose levels stand for regions.

    table: int16 (256,): the region of each level, -1 where a pixel has no name, -2 where the release has no such level.
    """

    paths: tuple[Path, ...]
    size: int
    table: Tensor

    @classmethod
    def of(cls, paths: Sequence[Path], size: int, levels: Mapping[int, int]) -> MaskFiles:
        """levels: grey level -> region, -1 for pixels that have no name."""
        table = torch.full((256,), _UNKNOWN, dtype=torch.int16)
        for level, region in levels.items():
            table[level] = region
        return cls(tuple(paths), size, table)

    def some(self, rows: Tensor) -> MaskFiles:
        """The masks of those pictures alone, in that order."""
        return replace(self, paths=tuple(self.paths[i] for i in rows.tolist()))

    def read(self, indices: Tensor) -> Tensor:
        """int64 (n, size, size), decoded by threads. Raises GeomsslError that names a file which is no whole mask."""
        workers = min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            found = list(pool.map(self._one, [self.paths[i] for i in indices.cpu().tolist()]))
        return torch.stack(found) if found else torch.empty(0, self.size, self.size, dtype=torch.long)

    def _one(self, path: Path) -> Tensor:
        from PIL import Image

        try:
            with Image.open(path) as opened:
                opened.load()
                # a palette's numbers are the levels: converting would look its colours up
                image = opened.copy() if opened.mode in ("L", "P") else opened.convert("L")
        except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
            raise GeomsslError(f"cannot read {path}: {error}", "a whole mask", reason=UNREADABLE) from None
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        # without interpolation: a region has no half
        cut = image.resize((self.size,) * 2, Image.Resampling.NEAREST, box=(left, top, left + side, top + side))
        levels = torch.from_numpy(np.asarray(cut).astype(np.int64))
        regions = self.table[levels].long()
        if bool((regions == _UNKNOWN).any()):
            known = (self.table != _UNKNOWN).nonzero()[:, 0]
            worst = int(levels[regions == _UNKNOWN].max())
            raise GeomsslError(
                f"{path} with the value {worst}", f"values from {int(known[0])} to {int(known[-1])}", reason="bad-layout"
            )
        return regions
