"""`food101`, `sun397`, `dtd`, `pets`, `aircraft`: the sets of photographs that features are carried over to (row X7), on disk.

Each is read where its archives unpack to, without torchvision; torchvision's downloads have the same layout. Splits are the
published ones; where there is no published val, it is a share of each class of the published train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from geomssl.data.base import Source, Split
from geomssl.data.layouts import Layout, Listing, OnDisk, lines, need, read, rows
from geomssl.data.masks import UNNAMED
from geomssl.data.tiny_imagenet import labelled, part_of
from geomssl.errors import GeomsslError

PETS_LEVELS = {1: 0, 2: 1, 3: UNNAMED}


class Photographs(OnDisk):
    """What these sets share."""

    size: int | None = Field(224, ge=2, description="crop each image to a centred square and resize it to this side")


class Drawn(Photographs):
    """Of the sets without a published val."""

    val: float = Field(0.1, ge=0, lt=1, description="share of each class of the published train that is val")
    seed: int = Field(0, ge=0, description="seed of that share")


def _listing(named: list[tuple[Path, str]], classes: list[str]) -> Listing:
    """Images by (file, class) of these classes."""
    found = Listing(classes=classes)
    labelled(found, named, classes)
    return found


def _whole(name: str, split: Split, found: Listing, base: Path, config: Drawn) -> Source:
    """The source of a published train or test, val taken out of train."""
    return read(name, split, found if split == "test" else part_of(found, split, config.val, config.seed), base, config)


class Food101(Layout):
    """food-101/images/<class>/<number>.jpg and meta/{classes,train,test}.txt. Bossard et al., ECCV 2014."""

    name, inside, images = "food101", ("food-101",), "75,750 + 25,250"
    url = "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101"

    class Config(Drawn):
        name: Literal["food101"] = "food101"

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = Food101.folder(config.root)
        classes = sorted(lines(base / "meta" / "classes.txt", "the list of its 101 classes"))
        table = base / "meta" / ("test.txt" if split == "test" else "train.txt")
        named = [(base / "images" / f"{row}.jpg", row.partition("/")[0]) for row in lines(table, "the images of the split")]
        found = _listing(named, classes)
        return _whole("food101", split, found, base, config)


class SUN397(Layout):
    """SUN397/<letter>/<class>[/<part>]/sun_*.jpg, ClassName.txt, and the published Partitions/{Training,Testing}_<01-10>.txt.

    The partitions are an archive of their own: Partitions/ in SUN397 or beside it, or their files in SUN397 itself. Each names
    50 images of every class to train on and 50 to test on. Xiao et al., CVPR 2010.
    """

    name, inside, images = "sun397", ("SUN397",), "19,850 + 19,850 in each of 10 partitions"
    url = "https://vision.princeton.edu/projects/2010/SUN"

    class Config(Drawn):
        name: Literal["sun397"] = "sun397"
        partition: int = Field(1, ge=1, le=10, description="which of the published partitions")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = SUN397.folder(config.root)
        classes = [_scene(line) for line in lines(base / "ClassName.txt", "the list of its 397 classes")]
        table = f"{'Testing' if split == 'test' else 'Training'}_{config.partition:02d}.txt"
        places = [base / "Partitions", base.parent / "Partitions", base]
        folder = next((place for place in places if (place / table).is_file()), places[0])
        listed = [line.strip() for line in lines(folder / table, f"a partition of {SUN397.url}, an archive of its own")]
        named = [(base / row.lstrip("/"), _scene(row.rpartition("/")[0])) for row in listed]
        found = _listing(named, classes)
        return _whole("sun397", split, found, base, config)


def _scene(line: str) -> str:
    """ "abbey" of "/a/abbey": classes lie in folders of their first letter."""
    return line.strip().lstrip("/").partition("/")[2]


class DTD(Layout):
    """dtd/images/<class>/<class>_<number>.jpg and labels/{train,val,test}<1-10>.txt. Cimpoi et al., CVPR 2014."""

    name, inside, images = "dtd", ("dtd",), "1,880 + 1,880 + 1,880 in each of 10 partitions"
    url = "https://www.robots.ox.ac.uk/~vgg/data/dtd"

    class Config(Photographs):
        name: Literal["dtd"] = "dtd"
        partition: int = Field(1, ge=1, le=10, description="which of the published partitions")

    @classmethod
    def folder(cls, root: str | None) -> Path:
        # torchvision unpacks the archive, which is a folder dtd, in a folder dtd
        found = super().folder(root)
        return found if (found / "labels").is_dir() or not (found / "dtd").is_dir() else found / "dtd"

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = DTD.folder(config.root)
        table = base / "labels" / f"{split}{config.partition}.txt"
        listed = [line.strip() for line in lines(table, "the images of the split")]
        classes = sorted({row.partition("/")[0] for row in listed})
        named = [(base / "images" / row, row.partition("/")[0]) for row in listed]
        found = _listing(named, classes)
        return read("dtd", split, found, base, config)


class Pets(Layout):
    """oxford-iiit-pet/images/<Breed>_<number>.jpg and annotations/{trainval,test}.txt, lines "image class species breed".

    annotations/trimaps/<image>.png are its masks where they are there: pet, background, and a border that counts as neither.
    Parkhi et al., CVPR 2012.
    """

    name, inside, images = "pets", ("oxford-iiit-pet",), "3,680 + 3,669"
    url = "https://www.robots.ox.ac.uk/~vgg/data/pets"

    class Config(Drawn):
        name: Literal["pets"] = "pets"

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = Pets.folder(config.root)
        table = base / "annotations" / ("test.txt" if split == "test" else "trainval.txt")
        named = rows(table, "the images of the split", "image class species breed")
        breeds: dict[int, str] = {}
        for row in named:
            if not row[1].isdigit():
                raise GeomsslError(f"the line {' '.join(row)!r} of {table}", "image class species breed", reason="bad-layout")
            breeds.setdefault(int(row[1]), row[0].rpartition("_")[0])
        known = {number: k for k, number in enumerate(sorted(breeds))}
        trimaps = base / "annotations" / "trimaps"
        masked = trimaps.is_dir()
        found = Listing(
            classes=[breeds[number] for number in sorted(breeds)], regions=("pet", "background") if masked else (),
            levels=PETS_LEVELS,
        )
        for image, number, *_ in named:
            found.add(need(base / "images" / f"{image}.jpg", "every image that the lists name"), known[int(number)])
            if masked:
                found.masks.append(need(trimaps / f"{image}.png", "a trimap for every image"))
        return _whole("pets", split, found, base, config)


class Aircraft(Layout):
    """fgvc-aircraft-2013b/data/: images/<7 digits>.jpg, variants.txt and images_variant_{train,val,test}.txt. Maji et al. 2013.

    The last 20 rows of every photograph are a line of credits; they are left as they are.
    """

    name, inside, images = "aircraft", ("fgvc-aircraft-2013b/data",), "3,334 + 3,333 + 3,333"
    url = "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft"

    class Config(Photographs):
        name: Literal["aircraft"] = "aircraft"
        labels: Literal["variant", "family", "manufacturer"] = Field("variant", description="what the labels are")

    @staticmethod
    def load(config: Config, split: Split) -> Source:
        base = Aircraft.folder(config.root)
        plural = {"variant": "variants", "family": "families", "manufacturer": "manufacturers"}[config.labels]
        classes = [line.strip() for line in lines(base / f"{plural}.txt", f"the list of its {plural}")]
        table = base / f"images_{config.labels}_{split}.txt"
        listed = [line.strip().partition(" ") for line in lines(table, "the images of the split")]
        named = [(base / "images" / f"{image}.jpg", kind) for image, _, kind in listed]
        found = _listing(named, classes)
        return read("aircraft", split, found, base, config)
