"""`folder:PATH`: images on disk, one sub-folder a class, optionally below train/, val/ and test/."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.data.base import Presence, Source, Split
from geomssl.data.layouts import Listing, OnDisk, read
from geomssl.data.splits import stratified
from geomssl.errors import GeomsslError, nearest

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Folder:
    """Images decoded into memory, or into a cache on disk where they would take more than `memory`; the same pixels.

    Without `size` all images must already be square and of one size.
    """

    # Where and how, not what: these settings may differ between two readings of one data set.
    machine: ClassVar[frozenset[str]] = frozenset({"memory", "cache"})

    class Config(OnDisk):
        name: Literal["folder"] = "folder"
        root: str = Field(description="the folder, with one sub-folder a class")
        channels: Literal[1, 3] | None = Field(None, description="convert to grey (1) or RGB (3)  [default: as the files are]")
        seed: int = Field(0, description="seed of the split, where the folder has no train/, val/, test/")

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
        return read(f"folder:{root.name}", split, Listing(files, labels.tolist(), {}, classes), root, config, config.channels)

    @staticmethod
    def presence(root: str | None = None) -> Presence:
        return Presence(False, "", "--dataset folder:PATH")


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
