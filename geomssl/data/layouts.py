"""Releases on disk: folders in exactly the form that their authors gave them, checked before an image is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Presence, Resident, Source, Split
from geomssl.data.images import UNREADABLE, Decoding, Pixels
from geomssl.data.masks import MaskFiles
from geomssl.data.places import searched
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError, nearest
from geomssl.transforms.base import Parameter


class OnDisk(Settings):
    """What every release on disk can be told."""

    root: str | None = Field(None, description="folder with its files  [default: $GEOMSSL_DATA]")
    size: int | None = Field(None, ge=2, description="crop each image to a centred square and resize it to this side")
    memory: float = Field(2.0, ge=0, description="GB of pixels of a split kept in memory, else on disk")
    cache: str | None = Field(None, description="folder for what is kept on disk  [default: $GEOMSSL_CACHE or the user's]")
    unreadable: Literal["refuse", "skip"] = Field("refuse", description="what to do with a file that is no whole image")


class Layout:
    """A release on disk. `name`: of the data set; `inside`: the folders that its archive unpacks to; `url`: where it is."""

    # Where and how, not what: these settings may differ between two readings of one data set.
    machine: ClassVar[frozenset[str]] = frozenset({"root", "memory", "cache"})
    name: ClassVar[str]
    inside: ClassVar[tuple[str, ...]]
    url: ClassVar[str]
    images: ClassVar[str]

    @classmethod
    def folder(cls, root: str | None) -> Path:
        """The release's own folder: ROOT/<name>/<inside>, ROOT/<inside> or ROOT itself where it holds what `inside` does."""
        places = searched(cls.name, root)
        for place in places:
            for inner in cls.inside:
                if (place / inner).is_dir():
                    return place / inner
        if root is not None and Path(root).expanduser().name in cls.inside:
            return Path(root).expanduser()
        where = " or ".join(str(place) for place in places)
        put = f"the folder {cls.inside[0]}/ of {cls.url} there, or --set dataset.root=DIR"
        raise GeomsslError(f"no {cls.inside[0]}/ of {cls.name} in {where}", put, reason="no-data")

    @classmethod
    def presence(cls, root: str | None = None) -> Presence:
        try:
            found = cls.folder(root)
        except GeomsslError:
            return Presence(False, cls.images, cls.url)
        return Presence(True, cls.images, str(found))


@dataclass
class Listing:
    """The files of one split with what is known of each; `parameters` say what the factors are.

    masks: a file a picture where the release names its pixels; levels: grey level -> index of `regions`, -1 for no name.
    like: a picture of another split, whose shape an empty val has (val = 0).
    """

    paths: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    factors: dict[str, list[float]] = field(default_factory=dict)
    classes: Sequence[str] = ()
    parameters: tuple[Parameter, ...] = ()
    masks: list[Path] = field(default_factory=list)
    regions: Sequence[str] = ()
    levels: Mapping[int, int] = field(default_factory=dict)
    like: Path | None = None

    def add(self, path: Path, label: int, **factors: float) -> None:
        self.paths.append(path)
        self.labels.append(label)
        for name, value in factors.items():
            self.factors.setdefault(name, []).append(float(value))

    def some(self, rows: Iterable[int]) -> Listing:
        """Those files alone, in that order."""
        rows = list(rows)
        return Listing(
            [self.paths[i] for i in rows], [self.labels[i] for i in rows],
            {name: [values[i] for i in rows] for name, values in self.factors.items()}, self.classes, self.parameters,
            [self.masks[i] for i in rows] if self.masks else [], self.regions, self.levels,
            self.paths[0] if self.paths else self.like,
        )


def read(name: str, split: Split, found: Listing, root: Path, config: OnDisk, channels: int | None = 3) -> Source:
    """The source of those files: in memory, or in a cache on disk where they would take more than `memory` GB.

    channels: 3 makes all of them RGB, 1 grey, None leaves them as they are.
    A file that is no whole image is refused by name or skipped and counted, as `config.unreadable` says.
    """
    if not found.paths:
        if split != "val" or found.like is None:
            raise GeomsslError(f"no image in the {split} split of {root}", "at least one image", reason="too-few-images")
        none = torch.empty((0, *Pixels([found.like], Decoding(config.size, channels), root).shape), dtype=torch.uint8)
        return Resident(name, split, none, torch.empty(0, dtype=torch.long), found.classes)
    watch, pixels = Watch(found.paths), Pixels(found.paths, Decoding(config.size, channels), root)
    labels = torch.tensor(found.labels)
    # ids of objects and sequences are whole numbers that float32 holds up to 2^24
    factors = {key: torch.tensor(values, dtype=torch.float64).float() for key, values in found.factors.items()}
    source: Source
    if len(found.paths) * prod(pixels.shape) > config.memory * 2**30:
        from geomssl.data.files import Files, cached
        from geomssl.data.places import cache_folder

        cache = cached(pixels, watch, cache_folder(config.cache) / "images")
        kept, notes = _whole(cache.unreadable, pixels, config)
        source = Files(name, split, cache, labels[kept], found.classes, _of(factors, kept), watch, notes)
    else:
        room = torch.empty((len(found.paths), *pixels.shape), dtype=torch.uint8)
        n = 0
        for chunk in pixels:
            room[n : n + len(chunk)] = torch.from_numpy(chunk)
            n += len(chunk)
        watch.check()
        kept, notes = _whole(pixels.unreadable, pixels, config)
        source = Resident(name, split, room[:n], labels[kept], found.classes, _of(factors, kept), watch, notes)
    source.parameters, source.regions = found.parameters, tuple(found.regions)
    if found.masks:
        source.mask_files = MaskFiles.of(found.masks, source.size, found.levels).some(kept.nonzero()[:, 0])
    return source


def _of(factors: Mapping[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    return {name: values[kept] for name, values in factors.items()}


def _whole(unreadable: list[tuple[int, str]], pixels: Pixels, config: OnDisk) -> tuple[Tensor, list[str]]:
    """bool (n,): which files could be read, and a sentence on the others where they are to be skipped; else an error."""
    count, total = len(unreadable), len(pixels.paths)
    kept = torch.ones(total, dtype=torch.bool)
    if not unreadable:
        return kept, []
    first = unreadable[0][1]
    if config.unreadable == "refuse":
        given = first + (f", and {count - 1} more of {total} files" if count > 1 else "")
        raise GeomsslError(given, "whole image files, or --set dataset.unreadable=skip", reason=UNREADABLE)
    kept[[row for row, _ in unreadable]] = False
    return kept, [f"{count} of {total} files below {pixels.where} were left out; the first: {first}"]


def need(path: Path, what: str) -> Path:
    """That file or folder; else an error that names it, says what it is and which name near it is there."""
    if path.exists():
        return path
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    raise GeomsslError(f"no {path}", what, nearest(path.name, beside), reason="bad-layout")


def listed(folder: Path, pattern: str, what: str) -> list[Path]:
    """The sorted files of a folder that match; at least one."""
    found = sorted(p for p in need(folder, what).glob(pattern) if not p.name.startswith("."))
    if not found:
        raise GeomsslError(f"nothing like {pattern} in {folder}", what, reason="bad-layout")
    return found


def lines(path: Path, what: str) -> list[str]:
    """The lines of a text file that are not empty, at least one."""
    try:
        found = [line for line in need(path, what).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise GeomsslError(f"cannot read {path}: {error}", what, reason="bad-layout") from None
    if not found:
        raise GeomsslError(f"{path} is empty", what, reason="bad-layout")
    return found


def rows(path: Path, what: str, form: str) -> list[list[str]]:
    """The words of each line, separated by space or comma; `form` names those that every line has, such as "image class"."""
    found = []
    for line in lines(path, what):
        words = line.replace(",", " ").split()
        if len(words) < len(form.split()):
            raise GeomsslError(f"the line {line.strip()!r} of {path}", form, reason="bad-layout")
        found.append(words)
    return found


def index(name: str, values: Sequence[float]) -> Parameter:
    """A factor whose values are categories."""
    return Parameter(name, "", "index", 0.0, 0.0, max(values, default=0.0))
