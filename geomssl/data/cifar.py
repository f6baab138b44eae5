"""`cifar10` and `cifar100`: 50,000 + 10,000 photographs of 32x32, from the BINARY releases; the pickled ones are never read.

A record is its label bytes (cifar10: one; cifar100: coarse, then fine) and 3,072 bytes: red, green and blue planes, row by row.
Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import Tensor

from geomssl.data.base import Presence, Resident, Split
from geomssl.data.places import searched
from geomssl.data.releases import Pinned, Released, fetch, find, published, read
from geomssl.data.splits import held_out
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError

SIZE = 32
PLANES = 3 * SIZE * SIZE
NAMES = 2**16


@dataclass(frozen=True)
class Release:
    """The archive, its folder, the members of train and test, the records of a member, and a label byte's name and classes.

    labels: in the order of a record's label bytes, (name, number of classes, member with the names of the classes).
    pickled: the archive and the folder of the same images that hold pickles.
    """

    archive: Pinned
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    counts: tuple[int, int]
    labels: tuple[tuple[str, int, str], ...]
    pickled: tuple[str, str]

    @property
    def record(self) -> int:
        return len(self.labels) + PLANES


class CIFAR10:
    """test is the released test; val is a share of each class of the released train."""

    class Config(Released):
        name: Literal["cifar10"] = "cifar10"

    machine: ClassVar[frozenset[str]] = frozenset({"root", "download"})
    release: ClassVar[Release] = Release(
        Pinned("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz", 170052171,
               "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"),
        "cifar-10-batches-bin", tuple(f"data_batch_{k}.bin" for k in range(1, 6)), ("test_batch.bin",), (10000, 10000),
        (("class", 10, "batches.meta.txt"),), ("cifar-10-python.tar.gz", "cifar-10-batches-py"),
    )

    @classmethod
    def load(cls, config: Config | CIFAR100.Config, split: Split, release: Release | None = None) -> Resident:
        """release: another archive in the same format, with a hash of its own."""
        release = release or cls.release
        wanted, n = (release.test, release.counts[1]) if split == "test" else (release.train, release.counts[0])
        texts = [name for *_, name in release.labels]
        sizes = dict.fromkeys(wanted, n * release.record) | dict.fromkeys(texts, -NAMES)
        found, files = _members(config, release, sizes)
        records = np.concatenate([np.frombuffer(found[name], np.uint8).reshape(-1, release.record) for name in wanted])
        labels, classes = _labels(records, release, wanted, n, found)
        pixels = torch.from_numpy(records[:, len(release.labels) :].reshape(-1, 3, SIZE, SIZE).copy())
        finest = release.labels[-1][0]
        chosen = getattr(config, "labels", finest)
        rows = torch.arange(len(pixels))
        if split != "test":
            rows = held_out(labels[finest], config.val, config.seed)[split == "val"]
        factors = {name: values[rows].float() for name, values in labels.items() if name != chosen}
        return Resident(config.name, split, pixels[rows], labels[chosen][rows], classes[chosen], factors, files)

    @classmethod
    def presence(cls, root: str | None = None) -> Presence:
        """Whether the archive, or what was unpacked from it, is here, by names and sizes."""
        name, release = cls.Config.model_fields["name"].default, cls.release
        each, total = release.counts, [release.counts[0] * len(release.train), release.counts[1] * len(release.test)]
        images = f"{sum(total):,} ({total[0]:,} + {total[1]:,})"
        archive = find(name, [release.archive.name], root)
        if archive is not None:
            size = archive.stat().st_size
            if size == release.archive.size:
                return Presence(True, images, str(archive))
            return Presence(False, images, f"{archive} has {size:,} bytes, not {release.archive.size:,}")
        folder = _unpacked(name, release, root)
        if folder is None:
            return Presence(False, images, f"no {release.archive.name}: {release.archive.url}")
        for members, n in ((release.train, each[0]), (release.test, each[1])):
            for member in members:
                path = folder / member
                if not path.is_file() or path.stat().st_size != n * release.record:
                    return Presence(False, images, f"{path} has not {n * release.record:,} bytes")
        return Presence(True, images, str(folder))


class CIFAR100(CIFAR10):
    """labels are the 100 fine classes, or the 20 coarse ones; the other is a factor."""

    class Config(Released):
        name: Literal["cifar100"] = "cifar100"
        labels: Literal["fine", "coarse"] = Field("fine", description="which labels; the other is a factor")

    release = Release(
        Pinned("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz", 168513733,
               "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"),
        "cifar-100-binary", ("train.bin",), ("test.bin",), (50000, 10000),
        (("coarse", 20, "coarse_label_names.txt"), ("fine", 100, "fine_label_names.txt")),
        ("cifar-100-python.tar.gz", "cifar-100-python"),
    )


def _unpacked(name: str, release: Release, root: str | None) -> Path | None:
    places = [folder for place in searched(name, root) for folder in (place / release.folder, place)]
    return next((folder for folder in places if (folder / release.train[0]).is_file()), None)


def _members(
    config: CIFAR10.Config | CIFAR100.Config, release: Release, sizes: dict[str, int]
) -> tuple[dict[str, bytes], Watch]:
    """The bytes of those members, each of its size (or, where that is negative, of at most so many), and their files."""
    archive = find(config.name, [release.archive.name], config.root)
    folder = _unpacked(config.name, release, config.root) if archive is None else None
    if folder is not None:
        files = Watch([folder / name for name in sizes])
        found = {}
        for path, (name, size) in zip(files.paths, sizes.items(), strict=True):
            if not path.is_file():
                raise GeomsslError(f"no {path}", "the binary release, whole", reason="no-data")
            found[name] = _sized(str(path), path.stat().st_size, size, partial(read, path))
        return found, files
    if archive is None:
        _refuse_pickles(config, release)
        archive = fetch(config.name, release.archive, config.root, config.download)
    files = Watch([archive])
    return _from_archive(archive, published(archive, release.archive), release.folder, sizes), files


def _from_archive(path: Path, data: bytes, folder: str, sizes: dict[str, int]) -> dict[str, bytes]:
    """Members by name out of a tar.gz in memory: nothing is extracted, so a name in it is never a path."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r|gz") as archive:
            for member in archive:
                inside, _, name = member.name.removeprefix("./").rpartition("/")
                if inside != folder or name not in sizes:
                    continue
                if not member.isreg():
                    raise GeomsslError(f"{member.name} in {path} is no plain file", "a plain file", reason="damaged")
                stream = archive.extractfile(member)
                assert stream is not None
                found[name] = _sized(f"{member.name} in {path}", member.size, sizes[name], stream.read)
                if len(found) == len(sizes):
                    break
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise GeomsslError(f"{path} is damaged: {error}", "a whole tar.gz", reason="damaged") from None
    for name in sizes:
        if name not in found:
            raise GeomsslError(f"{path} has no member {folder}/{name}", "the binary release", reason="damaged")
    return found


def _sized(name: str, size: int, wanted: int, read: Callable[[int], bytes]) -> bytes:
    """The bytes of a file or member once its size is right; wanted < 0: at most so many."""
    good = size == wanted if wanted >= 0 else size <= -wanted
    if not good:
        said = f"{wanted:,} bytes" if wanted >= 0 else f"at most {-wanted:,} bytes"
        expected = f"{said}, as released: it is cut off or another file"
        raise GeomsslError(f"{name} has {size:,} bytes", expected, reason="damaged")
    data = read(size)
    if len(data) != size:
        raise GeomsslError(f"{name} ends after {len(data):,} bytes", f"{size:,} bytes", reason="damaged")
    return data


def _labels(
    records: npt.NDArray[np.uint8], release: Release, members: tuple[str, ...], n: int, found: dict[str, bytes]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Labels and names of classes by the name of the label. Raises for a label that is no class."""
    labels: dict[str, Tensor] = {}
    classes: dict[str, tuple[str, ...]] = {}
    for column, (name, number, member) in enumerate(release.labels):
        classes[name] = tuple(line.strip() for line in found[member].decode("utf-8", "replace").splitlines() if line.strip())
        if len(classes[name]) != number:
            said = f"{release.folder}/{member} names {len(classes[name])} classes"
            raise GeomsslError(said, f"{number}", reason="damaged")
        labels[name] = torch.from_numpy(records[:, column].astype(np.int64))
        wrong = (labels[name] >= number).nonzero()
        if len(wrong):
            row = int(wrong[0, 0])
            said = f"record {row % n} of {release.folder}/{members[row // n]} has the {name} label {int(labels[name][row])}"
            raise GeomsslError(said, f"0 to {number - 1}", reason="damaged")
    return labels, classes


def _refuse_pickles(config: CIFAR10.Config | CIFAR100.Config, release: Release) -> None:
    """Say so where only the pickled release is here: reading a pickle can run code."""
    for place in searched(config.name, config.root):
        for name in release.pickled:
            if (place / name).exists():
                said = f"{place / name} holds pickles, which can run code and are not read"
                raise GeomsslError(said, f"the binary release, {release.archive.url}", reason="no-data")
