"""Writing so that a reader sees the old file or the new one, never a half: sibling, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from geomssl.errors import GeomsslError


def check(path: Path | str) -> Path:
    """The path, if it could be written, found out without writing; a GeomsslError where a file stands in the way."""
    path = Path(path)
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if nearest != path and not nearest.is_dir():
        raise GeomsslError(
            f"cannot write {path}: {nearest} is a file", "a path whose parents are folders", reason="unwritable"
        )
    if not os.access(nearest, os.W_OK):
        raise GeomsslError(f"cannot write {path}: no permission in {nearest}", "a writable path", reason="unwritable")
    return path


def writable(path: Path | str) -> Path:
    """The path, once its folder exists."""
    path = check(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GeomsslError(f"cannot write {path}: {error.strerror}", "a writable path", reason="unwritable") from None
    return path


def write(path: Path | str, content: bytes | str) -> Path:
    """Replace `path` by bytes or text; all of it or nothing."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return Path(path)


@contextmanager
def replacing(path: Path | str) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `path` at the end of the block; where the block fails, nothing changes."""
    path = writable(path)
    sibling = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(sibling, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, path)
    except OSError as error:
        raise GeomsslError(
            f"cannot write {path}: {error.strerror}", "room and permission to write", reason="unwritable"
        ) from error
    finally:
        sibling.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
