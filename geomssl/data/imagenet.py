"""`imagenet`: ILSVRC 2012, 1,281,167 + 50,000 photographs in 1,000 classes; the release's labelled val is test here.

Layout: train/<wnid>/*.JPEG and val/, which holds <wnid>/*.JPEG, or else the release's flat ILSVRC2012_val_*.JPEG with their
labels in LOC_val_solution.csv (Kaggle's form) or in ILSVRC2012_devkit_t12/data/. Russakovsky et al., IJCV 115 (2015).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from geomssl.data.base import Source, Split
from geomssl.data.layouts import Layout, Listing, OnDisk, lines, listed, need, read, rows
from geomssl.data.tiny_imagenet import labelled, part_of
from geomssl.errors import GeomsslError

DEVKIT = Path("ILSVRC2012_devkit_t12") / "data"
TRUTH, META, CSV = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "LOC_val_solution.csv"


class ImageNet(Layout):
    """Test is the released val; val is a share of each class of the released train, drawn by `seed`."""

    name, inside, images = "imagenet", ("ILSVRC/Data/CLS-LOC", "ILSVRC2012", "imagenet"), "1,281,167 + 50,000"
    url = "https://www.image-net.org/challenges/LSVRC/2012"

    class Config(OnDisk):
        name: Literal["imagenet"] = "imagenet"
        size: int | None = Field(224, ge=2, description="crop each image to a centred square and resize it to this side")
        val: float = Field(0.01, ge=0, lt=1, description="share of each class of the released train that is val")
        seed: int = Field(0, ge=0, description="seed of that share")

    @classmethod
    def folder(cls, root: str | None) -> Path:
        given = None if root is None else Path(root).expanduser()
        return given if given is not None and (given / "train").is_dir() else super().folder(root)

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = ImageNet.folder(config.root)
        wnids = [p.name for p in listed(base / "train", "n*", "train/<wnid>/, a folder for each class") if p.is_dir()]
        found = Listing(classes=wnids)
        if split == "test":
            labelled(found, _validation(base, wnids), wnids)
            return read("imagenet", split, found, base, config)
        for label, wnid in enumerate(wnids):
            for path in listed(base / "train" / wnid, "*.JPEG", "the images of every class"):
                found.add(path, label)
        return read("imagenet", split, part_of(found, split, config.val, config.seed), base, config)


def _validation(base: Path, wnids: list[str]) -> list[tuple[Path, str]]:
    """The validation images with their classes, from whichever of the three forms is there."""
    folder = need(base / "val", "the folder val/ beside train/")
    if any(p.is_dir() for p in folder.iterdir()):
        for wnid in wnids:
            need(folder / wnid, "val/<wnid>/ for every class of train/")
        return [(path, path.parent.name) for path in sorted(folder.glob("*/*.JPEG"))]
    images = listed(folder, "ILSVRC2012_val_*.JPEG", "val/<wnid>/*.JPEG, or the flat images of the release")
    # Kaggle puts its file beside ILSVRC/, three folders up
    csv = next((p / CSV for p in (base, *list(base.parents)[:3]) if (p / CSV).is_file()), None)
    if csv is not None:
        named = rows(csv, "the classes of the validation images", "ImageId PredictionString")[1:]
        return [(folder / f"{row[0]}.JPEG", row[1]) for row in named]
    data = next((p / DEVKIT for p in (base, base.parent) if (p / DEVKIT).is_dir()), None)
    if data is None:
        raise GeomsslError(
            f"val/ of {base} without classes", f"val/<wnid>/, or {CSV}, or {DEVKIT.parts[0]}/ beside it", reason="bad-layout"
        )
    names = _synsets(need(data / META, "the classes of the development kit"))
    truth = [line.strip() for line in lines(data / TRUTH, "a class number for each image")]
    strange = next((number for number in truth if number not in names), None)
    if strange is not None:
        raise GeomsslError(f"class {strange!r} in {data / TRUTH}", f"a class number of {META}", reason="bad-layout")
    if len(truth) != len(images):
        said = f"{len(truth)} classes in {TRUTH} for {len(images)} images in {folder}"
        raise GeomsslError(said, "as many", reason="bad-layout")
    return [(path, names[number]) for path, number in zip(images, truth, strict=True)]


def _synsets(path: Path) -> dict[str, str]:
    """Class number, as text -> wnid."""
    from scipy.io import loadmat

    try:
        found = loadmat(str(path), squeeze_me=True)["synsets"]
        return {str(int(row["ILSVRC2012_ID"])): str(row["WNID"]) for row in found.reshape(-1)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GeomsslError(f"cannot read {path}: {error}", "the meta.mat of the development kit", reason="bad-layout") from None
