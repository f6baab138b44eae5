"""Watch: the files behind a source as they were when they were read, so that a data set which changes under way is noticed."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from geomssl.errors import GeomsslError


class Watch:
    """Sizes in bytes and times of the last write, in nanoseconds, of some files at the moment this is made.

    Make it BEFORE the files are read: what is written while they are read is then noticed too.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = tuple(paths)
        self.stats = np.array([_stat(path) for path in self.paths], dtype=np.int64).reshape(-1, 2)

    def check(self) -> None:
        """Stat every file again. Raises GeomsslError (reason "changed-data") that names the first one that differs."""
        for path, (size, written) in zip(self.paths, self.stats.tolist(), strict=True):
            now, when = _stat(path)
            if (now, when) == (size, written):
                continue
            if now < 0:
                said = f"{path} is gone since it was read"
            elif now != size:
                said = f"{path} has {now:,} bytes and had {size:,} when it was read"
            else:
                said = f"{path} was written again since it was read"
            raise GeomsslError(said, "images that stay as they were; put them back, or start a new run", reason="changed-data")


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns
