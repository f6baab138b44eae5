"""`tdw`: 12 objects rendered in ThreeDWorld from 1,008 places each; azimuth, elevation and distance are factors.

Layout: spherical_photoreal_64x64_DoF/{train,test}/, whose sorted file names run over object, distance (0.3 to 0.6 by 0.1),
elevation (10 to 70 degrees by 10) and azimuth (0 to 350 degrees by 10), the last one fastest. Schneider, Xu, Ernst, Yu and
Triesch, Contrastive learning through time, SVRHM 2021; the order is that of its published loader (github.com/trieschlab/CLTT,
utils/datasets.py, TDWDataset).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from geomssl.data.base import Source, Split
from geomssl.data.folder import SUFFIXES
from geomssl.data.layouts import Layout, Listing, OnDisk, index, need, read
from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter

CLASSES = (
    "cup", "comb", "scissor", "hammer", "book", "calculator", "goblet", "candle", "headphones", "screwdriver", "cassette",
    "bottle",
)
DISTANCES = (0.3, 0.4, 0.5, 0.6)
ELEVATIONS, AZIMUTHS = range(10, 80, 10), range(0, 360, 10)
VIEWS = len(DISTANCES) * len(ELEVATIONS) * len(AZIMUTHS)


class TDW(Layout):
    """Train and test as released; val is a share of the released train, drawn by `seed` from every object's views."""

    name, inside, images = "tdw", ("spherical_photoreal_64x64_DoF",), "12,096 + 12,096"
    url = "https://github.com/trieschlab/CLTT"

    class Config(OnDisk):
        name: Literal["tdw"] = "tdw"
        val: float = Field(0.1, ge=0, lt=1, description="share of each object's views in the released train that is val")
        seed: int = Field(0, ge=0, description="seed of that share")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = TDW.folder(config.root)
        for name in ("train", "test"):
            need(base / name, "the folders train/ and test/ of the release")
        folder = base / ("test" if split == "test" else "train")
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)
        if len(paths) != VIEWS * len(CLASSES):
            expected = f"{VIEWS * len(CLASSES):,}: {len(CLASSES)} objects from {VIEWS:,} places each"
            raise GeomsslError(f"{len(paths):,} images in {folder}", expected, reason="bad-layout")
        found = Listing(classes=CLASSES)
        for row, path in enumerate(paths):
            number, place = divmod(row, VIEWS)
            rest, azimuth = divmod(place, len(AZIMUTHS))
            distance, elevation = divmod(rest, len(ELEVATIONS))
            found.add(
                path, number, azimuth=AZIMUTHS[azimuth], elevation=ELEVATIONS[elevation], distance=DISTANCES[distance],
                object=number,
            )
        found.parameters = (
            Parameter("azimuth", "degrees", "periodic", 0.0, 0.0, 360.0),
            Parameter("elevation", "degrees", "continuous", 0.0, 10.0, 70.0),
            Parameter("distance", "m", "continuous", 0.0, DISTANCES[0], DISTANCES[-1]),
            index("object", found.factors["object"]),
        )
        if split != "test":
            held = set()
            for number in range(len(CLASSES)):
                drawn = torch.randperm(VIEWS, generator=generator(config.seed, "tdw-val", number))[: round(config.val * VIEWS)]
                held |= {number * VIEWS + place for place in drawn.tolist()}
            found = found.some(row for row in range(len(paths)) if (row in held) == (split == "val"))
        return read("tdw", split, found, base, config)
