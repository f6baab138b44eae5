"""`3diebench`: 52,472 objects of 55 classes from 50 places each; rotation, light and the hues of light and floor are factors.

Layout: 3DIEBench/<synset>/<object>/image_<k>.jpg and latent_<k>.npy, which holds rotation x, y, z (radians, extrinsic), floor
hue, light theta, light phi and light hue: 7 numbers, as data/main.py of github.com/facebookresearch/SIE writes and
src/dataset.py there reads them (its data/README.md says 9 and lists these 7). Garrido, Najman and LeCun, Self-supervised
learning of split invariant equivariant representations, ICML 2023.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from geomssl.data.base import Source, Split
from geomssl.data.layouts import Layout, Listing, OnDisk, index, listed, need, read
from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter

LATENTS = 7
TURNS = (
    Parameter("floor_hue", "turns", "periodic", 0.0, 0.0, 1.0),
    Parameter("light_theta", "radians", "continuous", 0.0, 0.0, np.pi / 4),
    Parameter("light_phi", "radians", "periodic", 0.0, 0.0, 2 * np.pi),
    Parameter("light_hue", "turns", "periodic", 0.0, 0.0, 1.0),
)
QUATERNION = tuple(Parameter(f"quaternion_{axis}", "", "continuous", float(axis == "w"), -1.0, 1.0) for axis in "xyzw")
NAMES = [parameter.name for parameter in (*QUATERNION, *TURNS)]


class ThreeDIEBench(Layout):
    """Splits by object. test: the published val_images.npy, or a drawn fifth of each class; val: a share of the rest.

    Files train_images.npy and val_images.npy of the authors' repository (lists of "/<synset>/<object>") are used where they lie
    beside the synsets or beside the folder 3DIEBench.
    """

    name, inside, images = "3diebench", ("3DIEBench",), "2,623,600"
    url = "https://github.com/facebookresearch/SIE"

    class Config(OnDisk):
        name: Literal["3diebench"] = "3diebench"
        size: int | None = Field(128, ge=2, description="resize to this side; the release has 256")
        views: int = Field(50, ge=2, le=50, description="images of each object to use, the first ones")
        val: float = Field(0.1, ge=0, lt=1, description="share of the training objects of each class that is val")
        seed: int = Field(0, ge=0, description="seed of that share")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = ThreeDIEBench.folder(config.root)
        synsets = [p.name for p in sorted(base.iterdir()) if p.is_dir() and not p.name.startswith(".")]
        if not synsets:
            raise GeomsslError(f"no synset in {base}", "folders <synset>/<object>/image_0.jpg", reason="bad-layout")
        found = Listing(classes=synsets)
        numbers: dict[str, int] = {}
        for synset in synsets:
            if not any(p.is_dir() for p in (base / synset).iterdir()):
                raise GeomsslError(f"no object in {base / synset}", "folders <object>/image_0.jpg", reason="bad-layout")
        for name in (f"{s}/{p.name}" for s in synsets for p in sorted((base / s).iterdir()) if p.is_dir()):
            numbers[name] = len(numbers)
        found.like = base / next(iter(numbers)) / "image_0.jpg"
        for name in _objects(base, list(numbers), split, config):
            folder = base / name
            listed(folder, "image_*.jpg", "image_0.jpg and latent_0.npy to image_49.jpg and latent_49.npy of an object")
            for k in range(config.views):
                picture = need(folder / f"image_{k}.jpg", f"{config.views} images of each object, image_0.jpg and on")
                values = _latent(folder / f"latent_{k}.npy")
                known = dict(zip(NAMES, (*quaternion(values[:3]), *values[3:]), strict=True))
                found.add(picture, synsets.index(name.partition("/")[0]), **known, object=numbers[name])
        found.parameters = (*QUATERNION, *TURNS, index("object", found.factors.get("object", [])))
        return read("3diebench", split, found, base, config)


def quaternion(angles: list[float]) -> list[float]:
    """The unit quaternion (x, y, z, w) of extrinsic rotations about x, y and z (radians), its sign made canonical.

    q and -q are one rotation: w >= 0 here, and where w is 0 the first of x, y, z that is not 0 is positive.
    """
    from scipy.spatial.transform import Rotation

    found = [float(v) for v in Rotation.from_euler("xyz", angles).as_quat()]
    # what rounding left of a zero has no sign to speak of
    leading = next(v for v in (found[3], *found[:3]) if abs(v) > 1e-12)
    return found if leading > 0 else [-v for v in found]


def _latent(path: Path) -> list[float]:
    try:
        values = np.load(need(path, "the latents of every image"), allow_pickle=False)
    except (OSError, ValueError) as error:
        raise GeomsslError(f"cannot read {path}: {error}", f"{LATENTS} numbers", reason="bad-layout") from None
    if values.shape != (LATENTS,) or not np.isfinite(values).all():
        raise GeomsslError(f"{path} of shape {values.shape}", f"{LATENTS} finite numbers", reason="bad-layout")
    return [float(v) for v in values]


def _objects(base: Path, present: list[str], split: Split, config: ThreeDIEBench.Config) -> list[str]:
    lists = next((p for p in (base, base.parent) if (p / "val_images.npy").is_file()), None)
    if lists is not None:
        rest, test = (_list(need(lists / f"{key}_images.npy", "both published lists")) for key in ("train", "val"))
        for name in rest + test:
            need(base / name, "every object that the lists name")
    else:
        test, rest = _share(present, 0.2, config.seed, "test")
    if split == "test":
        return test
    val, train = _share(rest, config.val, config.seed, "val")
    return val if split == "val" else train


def _share(names: list[str], share: float, seed: int, purpose: str) -> tuple[list[str], list[str]]:
    """A drawn share of each class's objects, and the others, both in order."""
    drawn: set[str] = set()
    synsets = sorted({name.partition("/")[0] for name in names})
    for number, synset in enumerate(synsets):
        own = sorted(name for name in names if name.partition("/")[0] == synset)
        order = torch.randperm(len(own), generator=generator(seed, f"3diebench-{purpose}", number)).tolist()
        drawn |= {own[i] for i in order[: round(share * len(own))]}
    return [n for n in names if n in drawn], [n for n in names if n not in drawn]


def _list(path: Path) -> list[str]:
    try:
        return [str(name).strip("/") for name in np.load(path, allow_pickle=False)]
    except (OSError, ValueError) as error:
        raise GeomsslError(f"cannot read {path}: {error}", "a list of /<synset>/<object>", reason="bad-layout") from None
