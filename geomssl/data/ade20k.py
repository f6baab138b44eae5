"""`ade20k`: 20,210 + 2,000 photographs of scenes, every pixel named as one of 150 things; the released validation is test here.

Layout: ADEChallengeData2016/{images,annotations}/{training,validation}/ADE_{train,val}_<8 digits>.{jpg,png} and
sceneCategories.txt; objectInfo150.txt names the things. Annotations hold 0 to 150, 0 being "other objects", which count nowhere
(README.md of github.com/CSAILVision/sceneparsing). Zhou et al., Scene parsing through ADE20K dataset, CVPR 2017.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from geomssl.data.base import Source, Split
from geomssl.data.layouts import Layout, Listing, OnDisk, index, lines, listed, need, read, rows
from geomssl.data.masks import UNNAMED
from geomssl.errors import GeomsslError
from geomssl.seeding import generator

THINGS = 150
FOLDERS: dict[Split, tuple[str, str]] = {
    "train": ("training", "train"), "val": ("training", "train"), "test": ("validation", "val"),
}


class ADE20K(Layout):
    """Labels are scene categories; the regions of its masks are the 150 things. val is a share of the training images."""

    name, inside, images = "ade20k", ("ADEChallengeData2016",), "20,210 + 2,000"
    url = "http://sceneparsing.csail.mit.edu"

    class Config(OnDisk):
        name: Literal["ade20k"] = "ade20k"
        size: int | None = Field(224, ge=2, description="crop each image to a centred square and resize it to this side")
        val: float = Field(0.05, ge=0, lt=1, description="share of the training images that is val")
        seed: int = Field(0, ge=0, description="seed of that share")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = ADE20K.folder(config.root)
        scenes = {row[0]: row[1] for row in rows(base / "sceneCategories.txt", "the scene of every image", "image scene")}
        kinds = sorted(set(scenes.values()))
        known = {name: label for label, name in enumerate(kinds)}
        folder, word = FOLDERS[split]
        named = {level: level - 1 for level in range(1, THINGS + 1)}
        found = Listing(classes=kinds, regions=_things(base), levels={0: UNNAMED, **named})
        for path in listed(base / "images" / folder, f"ADE_{word}_*.jpg", "the images of the release"):
            mask = need(base / "annotations" / folder / f"{path.stem}.png", "an annotation for every image")
            if path.stem not in scenes:
                said = f"{path.stem} is not in sceneCategories.txt"
                raise GeomsslError(said, "the scene of every image", reason="bad-layout")
            found.add(path, known[scenes[path.stem]], number=_number(path))
            found.masks.append(mask)
        found.parameters = (index("number", found.factors["number"]),)
        if split != "test":
            order = torch.randperm(len(found.paths), generator=generator(config.seed, "ade20k-val")).tolist()
            cut = round(config.val * len(order))
            found = found.some(sorted(order[:cut] if split == "val" else order[cut:]))
        return read("ade20k", split, found, base, config)


def _number(path: Path) -> int:
    digits = path.stem.rpartition("_")[2]
    if not digits.isdigit():
        raise GeomsslError(f"{path}", "ADE_<split>_<8 digits>.jpg, as the release names it", reason="bad-layout")
    return int(digits)


def _things(base: Path) -> list[str]:
    """The names of the 150 things: the last column of objectInfo150.txt, or their numbers where that is absent."""
    table = base / "objectInfo150.txt"
    if not table.is_file():
        return [f"thing {k}" for k in range(1, THINGS + 1)]
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines(table, "a line for every thing")[1:]]
    if len(names) != THINGS:
        raise GeomsslError(f"{len(names)} things in {table}", f"{THINGS}", reason="bad-layout")
    return names
