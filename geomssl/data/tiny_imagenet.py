"""`tiny-imagenet`: 100,000 + 10,000 photographs of 64x64 in 200 classes; the release's labelled val is test here.

Layout: tiny-imagenet-200/ with wnids.txt, words.txt, train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt.
Its own test/ has no labels and is not read. Le and Yang, Tiny ImageNet Visual Recognition Challenge, CS 231N, 2015.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from geomssl.data.base import Source, Split
from geomssl.data.layouts import Layout, Listing, OnDisk, lines, listed, need, read, rows
from geomssl.data.splits import held_out
from geomssl.errors import GeomsslError


class TinyImageNet(Layout):
    """Test is the released val; val is a share of each class of the released train, drawn by `seed`."""

    name, inside, images = "tiny-imagenet", ("tiny-imagenet-200",), "100,000 + 10,000"
    url = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"

    class Config(OnDisk):
        name: Literal["tiny-imagenet"] = "tiny-imagenet"
        val: float = Field(0.1, ge=0, lt=1, description="share of each class of the released train that is val")
        seed: int = Field(0, ge=0, description="seed of that share")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = TinyImageNet.folder(config.root)
        wnids = sorted(lines(base / "wnids.txt", "the list of its 200 classes"))
        words = words_of(base / "words.txt")
        found = Listing(classes=[words.get(w, w) for w in wnids])
        if split == "test":
            table = rows(base / "val" / "val_annotations.txt", "the labels of the val images", "image class")
            labelled(found, [(base / "val" / "images" / row[0], row[1]) for row in table], wnids)
            return read("tiny-imagenet", split, found, base, config)
        for label, wnid in enumerate(wnids):
            for path in listed(base / "train" / wnid / "images", "*.JPEG", "the images of every class of wnids.txt"):
                found.add(path, label)
        return read("tiny-imagenet", split, part_of(found, split, config.val, config.seed), base, config)


def part_of(found: Listing, split: Split, val: float, seed: int) -> Listing:
    """Train or val of a released train."""
    train, held = held_out(torch.tensor(found.labels), val, seed)
    return found.some((held if split == "val" else train).tolist())


def words_of(path: Path) -> dict[str, str]:
    """wnid -> words, from lines of "n01443537<tab>goldfish, Carassius auratus"."""
    pairs = (line.split("\t", 1) for line in lines(path, "the names of the classes"))
    return {pair[0]: pair[1].split(",")[0] for pair in pairs if len(pair) == 2}


def labelled(found: Listing, pairs: list[tuple[Path, str]], classes: list[str]) -> None:
    """Add images by (file, class), sorted by file; an error names the first whose class or file is not there."""
    known = {name: label for label, name in enumerate(classes)}
    for path, name in sorted(pairs):
        if name not in known:
            raise GeomsslError(
                f"{path.name} of class {name!r}", f"one of the {len(classes)} classes of the set", reason="bad-layout"
            )
        found.add(need(path, "every image that has a label"), known[name])
