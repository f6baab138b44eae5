"""`ade20k`: 20,210 + 2,000 photographs of scenes, every pixel named as one of 150 things; the released validation is test here.

Layout: ADEChallengeData2016/{images,annotations}/{training,validation}/ADE_{train,val}_<8 digits>.{jpg,png} and
sceneCategories.txt. Zhou et al., Scene parsing through ADE20K dataset, CVPR 2017.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from geomssl.data.base import Source, Split
from geomssl.data.images import UNREADABLE
from geomssl.data.layouts import Layout, Listing, OnDisk, index, lines, listed, need, read
from geomssl.errors import GeomsslError
from geomssl.seeding import generator

THINGS, UNNAMED = 150, -1
FOLDERS: dict[Split, tuple[str, str]] = {
    "train": ("training", "train"), "val": ("training", "train"), "test": ("validation", "val"),
}


class ADE20K(Layout):
    """Labels are scene categories; `masks` gives the thing at every pixel. val is a share of the training images."""

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
        scenes = dict(line.split()[:2] for line in lines(base / "sceneCategories.txt", "the scene of every image"))
        kinds = sorted(set(scenes.values()))
        known = {name: label for label, name in enumerate(kinds)}
        folder, word = FOLDERS[split]
        found = Listing(classes=kinds)
        for path in listed(base / "images" / folder, f"ADE_{word}_*.jpg", "the images of the release"):
            need(base / "annotations" / folder / f"{path.stem}.png", "an annotation for every image")
            if path.stem not in scenes:
                said = f"{path.stem} is not in sceneCategories.txt"
                raise GeomsslError(said, "the scene of every image", reason="bad-layout")
            found.add(path, known[scenes[path.stem]], number=int(path.stem.rpartition("_")[2]))
        found.parameters = (index("number", found.factors["number"]),)
        if split != "test":
            order = torch.randperm(len(found.paths), generator=generator(config.seed, "ade20k-val")).tolist()
            cut = round(config.val * len(order))
            found = found.some(sorted(order[:cut] if split == "val" else order[cut:]))
        return read("ade20k", split, found, base, config)

    @staticmethod
    def masks(config: Config, source: Source, indices: Tensor) -> Tensor:
        """int64 (n, H, W): 0 to 149 what is at each pixel of those images, -1 where it has no name; cropped as the images are.

        Resized without interpolation: a class has no half. Raises GeomsslError that names an annotation that is not whole.
        """
        from PIL import Image

        folder, word = FOLDERS[source.split]
        base, found = ADE20K.folder(config.root) / "annotations" / folder, []
        for number in source.factors["number"][indices.cpu()].long().tolist():
            path = base / f"ADE_{word}_{number:08d}.png"
            try:
                with Image.open(path) as opened:
                    opened.load()
                    image = opened.convert("L") if opened.mode != "L" else opened.copy()
            except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
                raise GeomsslError(f"cannot read {path}: {error}", "a whole annotation", reason=UNREADABLE) from None
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            box = (left, top, left + side, top + side)
            array = np.asarray(image.resize((source.size,) * 2, Image.Resampling.NEAREST, box=box)).astype(np.int64)
            if array.max() > THINGS:
                raise GeomsslError(f"{path} with the value {array.max()}", f"0 to {THINGS}", reason="bad-layout")
            found.append(torch.from_numpy(array - 1))
        return torch.stack(found)
