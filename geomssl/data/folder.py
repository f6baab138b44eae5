"""`folder:PATH`: images on disk, one sub-folder a class, optionally below train/, val/ and test/."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Presence, Resident, Source, Split
from geomssl.data.images import UNREADABLE, Decoding, Pixels
from geomssl.data.splits import stratified
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError, nearest

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Folder:
    """Images decoded into memory, or into a cache on disk where they would take more than `memory`; the same pixels.

    Without `size` all images must already be square and of one size.
    """

    # Where and how, not what: these settings may differ between two readings of one data set.
    machine: ClassVar[frozenset[str]] = frozenset({"memory", "cache"})

    class Config(Settings):
        name: Literal["folder"] = "folder"
        root: str = Field(description="the folder, with one sub-folder a class")
        size: int | None = Field(None, ge=2, description="crop each image to a centred square and resize it to this side")
        channels: Literal[1, 3] | None = Field(None, description="convert to grey (1) or RGB (3)  [default: as the files are]")
        seed: int = Field(0, description="seed of the split, where the folder has no train/, val/, test/")
        memory: float = Field(2.0, ge=0, description="GB of pixels of a split kept in memory, else on disk")
        cache: str | None = Field(None, description="folder for what is kept on disk  [default: $GEOMSSL_CACHE or the user's]")
        unreadable: Literal["refuse", "skip"] = Field("refuse", description="what to do with a file that is no whole image")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        root = Path(config.root)
        if not root.is_dir():
            beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise GeomsslError(
                f"no such folder: {root}", "a folder of images, one sub-folder a class", nearest(root.name, beside),
                reason="no-file",
            )
        given = [name for name in SPLITS if (root / name).is_dir()]
        if given and split not in given:
            raise GeomsslError(f"{root} has no {split}/", f"{', '.join(SPLITS)} (found {', '.join(given)})", reason="no-split")
        base = root / split if given else root
        classes, files, labels = _listing(base, _classes(root / given[0]) if given else None)
        if not given:
            chosen = stratified(labels, config.seed)[split]
            files, labels = [files[i] for i in chosen.tolist()], labels[chosen]
        if not files:
            raise GeomsslError(f"no image in the {split} split of {root}", "at least one image", reason="too-few-images")
        return _read(root, split, files, labels, classes, config)

    @staticmethod
    def presence(root: str | None = None) -> Presence:
        return Presence(False, "", "--dataset folder:PATH")


def _read(
    root: Path, split: Split, files: list[Path], labels: Tensor, classes: list[str], config: Folder.Config
) -> Source:
    """The source of those files, in memory or on disk."""
    name, watch = f"folder:{root.name}", Watch(files)
    pixels = Pixels(files, Decoding(config.size, config.channels), root)
    if len(files) * prod(pixels.shape) > config.memory * 2**30:
        from geomssl.data.files import Files, cached
        from geomssl.data.places import cache_folder

        cache = cached(pixels, watch, cache_folder(config.cache) / "images")
        labels, notes = _without(cache.unreadable, pixels, labels, config)
        return Files(name, split, cache, labels, classes, watch=watch, notes=notes)
    room = torch.empty((len(files), *pixels.shape), dtype=torch.uint8)
    n = 0
    for chunk in pixels:
        room[n : n + len(chunk)] = torch.from_numpy(chunk)
        n += len(chunk)
    watch.check()
    labels, notes = _without(pixels.unreadable, pixels, labels, config)
    return Resident(name, split, room[:n], labels, classes, watch=watch, notes=notes)


def _without(
    unreadable: list[tuple[int, str]], pixels: Pixels, labels: Tensor, config: Folder.Config
) -> tuple[Tensor, list[str]]:
    """The labels of what could be read and a sentence on what could not, where that is to be skipped; else an error."""
    if not unreadable:
        return labels, []
    count, total, first = len(unreadable), len(pixels.paths), unreadable[0][1]
    if config.unreadable == "refuse":
        given = first + (f", and {count - 1} more of {total} files" if count > 1 else "")
        raise GeomsslError(given, "whole image files, or --set dataset.unreadable=skip", reason=UNREADABLE)
    kept = torch.ones(total, dtype=torch.bool)
    kept[[row for row, _ in unreadable]] = False
    return labels[kept], [f"{count} of {total} files below {pixels.where} were left out; the first: {first}"]


def _classes(base: Path) -> list[str]:
    return sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listing(base: Path, known: list[str] | None) -> tuple[list[str], list[Path], Tensor]:
    """Classes, files and labels below `base`, sorted by name. `known` fixes the classes across splits."""
    classes = known or _classes(base)
    strangers = sorted(set(_classes(base)) - set(classes))
    if strangers:
        raise GeomsslError(f"{base} has a class {strangers[0]!r}", f"the classes of train/: {', '.join(classes)}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = base / name
        found = sorted(p for p in inside.rglob("*") if p.suffix.lower() in SUFFIXES) if inside.is_dir() else []
        files += found
        labels += [label] * len(found)
    if not files:
        raise GeomsslError(
            f"no image below {base}", f"files ending in {', '.join(sorted(SUFFIXES))}, one sub-folder a class",
            reason="too-few-images",
        )
    return classes, files, torch.tensor(labels)
