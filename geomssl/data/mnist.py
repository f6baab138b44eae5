"""`mnist` and `fashion-mnist`: 60,000 + 10,000 grey images of 28x28 in ten classes, as IDX files, packed or not.

Sources: Y. LeCun, C. Cortes and C. Burges, The MNIST database; H. Xiao, K. Rasul and R. Vollgraf, Fashion-MNIST, 2017.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from geomssl.data.base import Presence, Resident, Split
from geomssl.data.releases import Pinned, Released, confirm, fetch, find, unpacked
from geomssl.data.splits import held_out
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError


@dataclass(frozen=True)
class Release:
    """Images and labels of train and test, how many there are of each, their side, and the names of the classes."""

    train: tuple[Pinned, Pinned]
    test: tuple[Pinned, Pinned]
    counts: tuple[int, int]
    size: int
    classes: tuple[str, ...]

    def parts(self) -> list[tuple[Pinned, tuple[int, ...]]]:
        """Every file and its dimensions."""
        both = ((self.train, self.counts[0]), (self.test, self.counts[1]))
        return [item for (images, labels), n in both for item in ((images, (n, self.size, self.size)), (labels, (n,)))]


def _pinned(base: str, files: Sequence[tuple[str, int, str, str | None]]) -> list[Pinned]:
    return [Pinned(f"{base}/{name}-ubyte.gz", size, sha256, content) for name, size, sha256, content in files]


_MNIST = _pinned("https://storage.googleapis.com/cvdf-datasets/mnist", [
    ("train-images-idx3", 9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", None),
    ("train-labels-idx1", 28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", None),
    ("t10k-images-idx3", 1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", None),
    ("t10k-labels-idx1", 4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", None),
])
# Debian packs the same bytes without a file name and with another time: put back, they give the published SHA-256 of all
# four files, so that the hash of the content is known too.
_FASHION = _pinned("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com", [
    ("train-images-idx3", 26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
     "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    ("train-labels-idx1", 29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
     "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    ("t10k-images-idx3", 4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
     "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    ("t10k-labels-idx1", 5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
     "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
])
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class MNIST:
    """Handwritten digits. test is the released test; val is a share of each class of the released train."""

    class Config(Released):
        name: Literal["mnist"] = "mnist"

    machine: ClassVar[frozenset[str]] = frozenset({"root", "download"})
    release: ClassVar[Release] = Release(
        (_MNIST[0], _MNIST[1]), (_MNIST[2], _MNIST[3]), (60000, 10000), 28, tuple(str(digit) for digit in range(10))
    )

    @classmethod
    def load(cls, config: Config | FashionMNIST.Config, split: Split, release: Release | None = None) -> Resident:
        """release: other files in the same format, with hashes of their own."""
        release = release or cls.release
        (images, labels), n = (release.test, release.counts[1]) if split == "test" else (release.train, release.counts[0])
        paths = [_path(pinned, config) for pinned in (images, labels)]
        watch = Watch(paths)
        pixels = _idx(paths[0], images, (n, release.size, release.size))[:, None]
        named = _idx(paths[1], labels, (n,)).long()
        wrong = (named >= len(release.classes)).nonzero()
        if len(wrong):
            said = f"{paths[1]} has the label {int(named[wrong[0, 0]])} at image {int(wrong[0, 0])}"
            raise GeomsslError(said, f"0 to {len(release.classes) - 1}", reason="damaged")
        if split != "test":
            chosen = held_out(named, config.val, config.seed)[split == "val"]
            pixels, named = pixels[chosen], named[chosen]
        return Resident(config.name, split, pixels, named, release.classes, watch=watch)

    @classmethod
    def presence(cls, root: str | None = None) -> Presence:
        """Whether all four files are here, by their names and sizes."""
        name, release = cls.Config.model_fields["name"].default, cls.release
        found = [find(name, (pinned.name, pinned.name.removesuffix(".gz")), root) for pinned, _ in release.parts()]
        images = f"{sum(release.counts):,} ({release.counts[0]:,} + {release.counts[1]:,})"
        missing = [pinned for (pinned, _), path in zip(release.parts(), found, strict=True) if path is None]
        if missing:
            files = ", ".join(pinned.name for pinned in missing)
            return Presence(False, images, f"no {files}: {missing[0].url.rpartition('/')[0]}/")
        for path, (pinned, shape) in zip((path for path in found if path is not None), release.parts(), strict=True):
            whole = {pinned.size} if path.suffix == ".gz" else {prod(shape) + 4 + 4 * len(shape)}
            if path.stat().st_size not in whole and (pinned.content is None or path.suffix != ".gz"):
                return Presence(False, images, f"{path} has {path.stat().st_size:,} bytes, not {min(whole):,}")
        return Presence(True, images, ", ".join(sorted({str(path.parent) for path in found if path is not None})))


class FashionMNIST(MNIST):
    """Articles of clothing in MNIST's format; also read where Debian's package dataset-fashion-mnist puts it."""

    class Config(Released):
        name: Literal["fashion-mnist"] = "fashion-mnist"

    release = Release((_FASHION[0], _FASHION[1]), (_FASHION[2], _FASHION[3]), (60000, 10000), 28, CLOTHES)


def _path(pinned: Pinned, config: MNIST.Config | FashionMNIST.Config) -> Path:
    found = find(config.name, (pinned.name, pinned.name.removesuffix(".gz")), config.root)
    return found or fetch(config.name, pinned, config.root, config.download)


def _idx(path: Path, pinned: Pinned, shape: tuple[int, ...]) -> Tensor:
    """The array of a release's IDX file, once its hash is that which was published."""
    content, known = unpacked(path, pinned, prod(shape) + 4 + 4 * len(shape))
    array = parse_idx(content, str(path), shape)
    if not known:
        confirm(path, content, pinned)
    return array


def parse_idx(content: bytes, name: str, shape: tuple[int, ...]) -> Tensor:
    """uint8 of that shape from IDX: 0, 0, 8 (unsigned bytes), the number of dimensions, each as 32 bits big-endian, data.

    Raises GeomsslError (reason "damaged") with what was expected: the magic number, the dimensions or the count of bytes.
    """
    header = 4 + 4 * len(shape)
    magic = 0x0800 + len(shape)
    if len(content) < 4 or int.from_bytes(content[:4], "big") != magic:
        said = f"{name} starts with 0x{content[:4].hex() or '(nothing)'}"
        wanted = f"the magic number 0x{magic:08x}: IDX, unsigned bytes, {len(shape)} dimension{'s' * (len(shape) > 1)}"
        raise GeomsslError(said, wanted, reason="damaged")
    if len(content) < header:
        raise GeomsslError(f"{name} ends inside its header, at {len(content)} bytes", f"{header} bytes of it", reason="damaged")
    found = struct.unpack(f">{len(shape)}I", content[4:header])
    if found != shape:
        said = f"{name} says {' x '.join(map(str, found))}"
        raise GeomsslError(said, f"the dimensions {' x '.join(map(str, shape))}", reason="damaged")
    if len(content) - header != prod(shape):
        more = len(content) - header > prod(shape)
        said = f"{name} has {'more than ' if more else ''}{min(len(content) - header, prod(shape)):,} bytes after its header"
        raise GeomsslError(said, f"{prod(shape):,} for {' x '.join(map(str, shape))}", reason="damaged")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).copy()).view(shape)
