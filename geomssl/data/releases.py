"""Published files: found where they lie, fetched by their address, and never believed before their hash is checked.

Addresses, sizes and SHA-256 are those of tensorflow_datasets 4.9.10, `url_checksums/*.txt`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from geomssl.config import Settings
from geomssl.data.places import cache_folder, locked, searched
from geomssl.errors import GeomsslError
from geomssl.progress import track


class Released(Settings):
    """What every released data set can be told."""

    root: str | None = Field(None, description="folder with its files  [default: $GEOMSSL_DATA, then the cache]")
    val: float = Field(0.1, ge=0, lt=1, description="share of each class of the released train that is val")
    seed: int = Field(0, ge=0, description="seed of that share, and of limit")
    limit: int | None = Field(None, ge=2, description="images to use of each split, a seeded draw  [default: all]")
    download: bool = Field(True, description="fetch what is not here")


CHUNK = 2**16


@dataclass(frozen=True)
class Pinned:
    """One published file. url: where from. size: bytes. sha256: of the file.

    content: SHA-256 of what a .gz holds, where that is known: then the unpacked file and other packings of the same
    bytes are checked too. Without it an unpacked file is checked by its own header, counts and length only.
    """

    url: str
    size: int
    sha256: str
    content: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


def find(dataset: str, names: Sequence[str], root: str | None) -> Path | None:
    """The first of those files that lies in one of the folders of `places.searched`."""
    return next((path for place in searched(dataset, root) for name in names if (path := place / name).is_file()), None)


def fetch(dataset: str, pinned: Pinned, root: str | None, download: bool) -> Path:
    """Download to a sibling, check the hash, rename: a part of a file never has the file's name.

    It goes to ROOT/<dataset> where a root is given, else to the cache. Raises GeomsslError (reason "no-data") that says
    which file is missing, where it was looked for and where to put it.
    """
    where = " or ".join(str(place) for place in searched(dataset, root))
    put = f"{pinned.name} ({pinned.size:,} bytes, {pinned.url}) in a folder given by --set dataset.root=DIR or GEOMSSL_DATA=DIR"
    if not download:
        raise GeomsslError(f"no {pinned.name} of {dataset} in {where}", put, reason="no-data")
    import pooch

    target = Path(root).expanduser() / dataset if root is not None else cache_folder() / dataset
    pooch.get_logger().setLevel("ERROR")
    with locked(target, pinned.name):
        try:
            loader = pooch.HTTPDownloader(progressbar=_Bar(pinned), chunk_size=CHUNK)
            found = pooch.retrieve(pinned.url, f"sha256:{pinned.sha256}", pinned.name, target, downloader=loader)
        except OSError as error:  # those of requests are OSErrors too
            why = error.strerror or type(error).__name__
            said = f"no {pinned.name} of {dataset} in {where}, and it cannot be fetched ({why})"
            raise GeomsslError(said, put, reason="no-data") from None
        except ValueError:
            said = f"what {pinned.url} sent is not {pinned.name} of {dataset}, and was thrown away"
            raise GeomsslError(said, f"{pinned.size:,} bytes with SHA-256 {pinned.sha256}", reason="damaged") from None
    return Path(found)


class _Bar:
    """What pooch calls while it downloads, as a bar of ours. Raises ValueError once more bytes came than were published."""

    total = 0

    def __init__(self, pinned: Pinned) -> None:
        self.left, self.complete = -(-pinned.size // CHUNK) + 1, False
        self.steps = track(range(self.left), f"fetching {pinned.name}")

    def update(self, size: int) -> None:
        next(self.steps, None)
        self.left -= 1
        if self.left < 0 and not self.complete:
            raise ValueError("too long")

    def reset(self) -> None:
        self.complete = True

    def close(self) -> None:
        del self.steps


def read(path: Path, limit: int) -> bytes:
    """At most limit + 1 bytes of a file: one too many tells that it is too long."""
    try:
        with open(path, "rb") as file:
            return file.read(limit + 1)
    except OSError as error:
        raise GeomsslError(f"cannot read {path}: {error.strerror}", "a readable file", reason="no-file") from None


def published(path: Path, pinned: Pinned) -> bytes:
    """The bytes of a file, once its size and its hash are those that were published."""
    data = read(path, pinned.size)
    _compare(path, data, pinned)
    return data


def unpacked(path: Path, pinned: Pinned, size: int) -> tuple[bytes, bool]:
    """What a .gz or its unpacked twin holds, at most size + 1 bytes of it, and whether its hash is known to be right."""
    if path.suffix != ".gz":
        return read(path, size), False
    data = read(path, max(pinned.size, size + 2**16))
    known = len(data) == pinned.size and _sha256(data) == pinned.sha256
    if not known and pinned.content is None:
        _compare(path, data, pinned)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            return stream.read(size + 1), known
    except (EOFError, OSError, zlib.error) as error:
        cut = isinstance(error, EOFError)
        said = f"{path} is {'cut off' if cut else 'damaged'} ({len(data):,} bytes{'' if cut else f': {error}'})"
        raise GeomsslError(said, f"a whole gzip file; {pinned.size:,} bytes were published", reason="damaged") from None


def confirm(path: Path, content: bytes, pinned: Pinned) -> None:
    """Raise unless unpacked content has the hash that is known of it, where one is."""
    if pinned.content is not None and _sha256(content) != pinned.content:
        said = f"{path} holds bytes with SHA-256 {_sha256(content)[:16]}..."
        raise GeomsslError(said, f"{pinned.content[:16]}..., as {pinned.name} holds", reason="damaged")


def _compare(path: Path, data: bytes, pinned: Pinned) -> None:
    if len(data) != pinned.size:
        said = f"{path} has {path.stat().st_size:,} bytes"
        raise GeomsslError(said, f"{pinned.size:,} bytes, as published: it is cut off or another file", reason="damaged")
    if _sha256(data) != pinned.sha256:
        said = f"{path} has SHA-256 {_sha256(data)[:16]}..."
        raise GeomsslError(said, f"{pinned.sha256[:16]}..., as published: it is damaged or another file", reason="damaged")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
