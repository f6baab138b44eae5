"""Where data lie: the folders that are searched, the cache, and a lock for who writes there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from geomssl.errors import GeomsslError, nearest

DEBIAN = Path("/usr/share/datasets")


def cache_folder(given: str | None = None) -> Path:
    """The folder for what can be made or fetched again: `given`, else $GEOMSSL_CACHE, else the user's cache folder."""
    if given or os.environ.get("GEOMSSL_CACHE"):
        return Path(given or os.environ["GEOMSSL_CACHE"]).expanduser()
    import pooch

    return Path(pooch.os_cache("geomssl"))


def searched(dataset: str, root: str | None) -> list[Path]:
    """The folders where files of a named data set are looked for, in order; a root that is given is the only one.

    ROOT/<dataset> and ROOT, else the same below $GEOMSSL_DATA, then where Debian's package puts it, then the cache.
    """
    if root is not None:
        below = _folder(Path(root).expanduser(), f"dataset.root = {root}")
        return [below / dataset, below]
    found = []
    if os.environ.get("GEOMSSL_DATA"):
        below = _folder(Path(os.environ["GEOMSSL_DATA"]).expanduser(), f"GEOMSSL_DATA={os.environ['GEOMSSL_DATA']}")
        found = [below / dataset, below]
    return [*found, DEBIAN / dataset, cache_folder() / dataset]


def _folder(path: Path, given: str) -> Path:
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise GeomsslError(f"{given}: no such folder", "a folder that exists", nearest(path.name, beside), reason="no-file")
    return path


@contextmanager
def locked(folder: Path, name: str) -> Iterator[bool]:
    """Make `folder`, and hold an exclusive lock of that name in it; the system drops it when its holder dies.

    Yields whether the lock is held: some network file systems have none.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        said = f"cannot write to {folder}: {error.strerror}"
        raise GeomsslError(said, "a folder that can be written", reason="unwritable") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
