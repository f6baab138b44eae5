"""Food-101, SUN397, DTD, Pets and Aircraft: tiny trees in exactly the releases' layouts, and what is said of wrong ones."""

from __future__ import annotations

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from geomssl import data
from geomssl.errors import GeomsslError


@pytest.fixture(autouse=True)
def _nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("GEOMSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEOMSSL_DATA", raising=False)


def encoded(value, kind="JPEG", size=(12, 8)):
    """An image file whose pixels are all `value`, but for one corner, which the centred square leaves out."""
    pixels = np.full((size[1], size[0], 3), value, np.uint8)
    pixels[0, 0] = 255 - value
    room = io.BytesIO()
    Image.fromarray(pixels).save(room, kind)
    return room.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def food101(root):
    base, rows = root / "food-101", {"train": [], "test": []}
    for c, name in enumerate(("apple_pie", "waffles")):
        for k in range(6):
            put(base / "images" / name / f"{c}{k}.jpg", encoded(60 + 100 * c))
            rows["test" if k > 3 else "train"].append(f"{name}/{c}{k}")
    put(base / "meta" / "classes.txt", "apple_pie\nwaffles\n")
    for split, names in rows.items():
        put(base / "meta" / f"{split}.txt", "\n".join(names) + "\n")
        each = {kind: [name for name in names if name.startswith(kind)] for kind in ("apple_pie", "waffles")}
        put(base / "meta" / f"{split}.json", str(each).replace("'", '"'))
    return base


def sun397(root):
    base, rows = root / "SUN397", {"Training": [], "Testing": []}
    for c, name in enumerate(("/a/abbey", "/o/outhouse/outdoor")):
        for k in range(6):
            put(base / name[1:] / f"sun_{c}{k}.jpg", encoded(60 + 100 * c))
            rows["Testing" if k > 3 else "Training"].append(f"{name}/sun_{c}{k}.jpg")
    put(base / "ClassName.txt", "/a/abbey\n/o/outhouse/outdoor\n")
    for split, names in rows.items():
        put(root / "Partitions" / f"{split}_01.txt", "\n".join(names) + "\n")
    return base


def dtd(root):
    base = root / "dtd"
    for c, name in enumerate(("banded", "zigzagged")):
        for k in range(6):
            put(base / "images" / name / f"{name}_{k:04d}.jpg", encoded(60 + 100 * c))
    for split, ks in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
        rows = [f"{name}/{name}_{k:04d}.jpg" for name in ("banded", "zigzagged") for k in ks]
        put(base / "labels" / f"{split}1.txt", "\n".join(rows) + "\n")
    return base


def pets(root, trimaps=True):
    base, rows = root / "oxford-iiit-pet", {"trainval": [], "test": []}
    for c, name in enumerate(("Abyssinian", "yorkshire_terrier")):
        for k in range(6):
            put(base / "images" / f"{name}_{k}.jpg", encoded(60 + 100 * c))
            rows["test" if k > 3 else "trainval"].append(f"{name}_{k} {c + 1} {c + 1} 1")
            if trimaps:
                marks = np.full((8, 12), 2, np.uint8)
                marks[2:6, 4:8], marks[2:6, 3] = 1, 3
                room = io.BytesIO()
                Image.fromarray(marks).save(room, "PNG")
                put(base / "annotations" / "trimaps" / f"{name}_{k}.png", room.getvalue())
    for split, names in rows.items():
        put(base / "annotations" / f"{split}.txt", "\n".join(names) + "\n")
    return base


def aircraft(root):
    base = root / "fgvc-aircraft-2013b" / "data"
    kinds = {"variant": ("707-320", "A340-200"), "family": ("Boeing 707", "A340"), "manufacturer": ("Boeing", "Airbus")}
    for level, names in kinds.items():
        plural = "families" if level == "family" else f"{level}s"
        put(base / f"{plural}.txt", "\n".join(names) + "\n")
        for split, ks in (("train", (0, 1)), ("val", (2, 3)), ("test", (4, 5))):
            rows = [f"{c}00000{k} {name}" for c, name in enumerate(names) for k in ks]
            put(base / f"images_{level}_{split}.txt", "\n".join(rows) + "\n")
    for c in range(2):
        for k in range(6):
            put(base / "images" / f"{c}00000{k}.jpg", encoded(60 + 100 * c))
    return base


TREES = {"food101": food101, "sun397": sun397, "dtd": dtd, "pets": pets, "aircraft": aircraft}
# a file that the layout needs, what else a line about it must say
NEEDED = {
    "food101": "meta/classes.txt", "sun397": "ClassName.txt", "dtd": "labels/train1.txt", "pets": "annotations/trainval.txt",
    "aircraft": "variants.txt",
}
CLASSES = {
    "food101": ("apple_pie", "waffles"), "sun397": ("abbey", "outhouse/outdoor"), "dtd": ("banded", "zigzagged"),
    "pets": ("Abyssinian", "yorkshire_terrier"), "aircraft": ("707-320", "A340-200"),
}


@pytest.mark.parametrize("name", TREES)
def test_splits_labels_and_pixels_are_those_of_the_release(name, tmp_path):
    TREES[name](tmp_path)
    own = {"val": 0.5} if name in ("food101", "sun397", "pets") else {}
    parts = {split: data.load(f"{name}:{tmp_path}", split, size=8, **own) for split in ("train", "val", "test")}
    assert {split: len(p) for split, p in parts.items()} == {"train": 4, "val": 4, "test": 4}
    for part in parts.values():
        assert tuple(part.classes) == CLASSES[name]
        assert part.size == 8
        bright = part.images(torch.arange(4))[:, 0].float().mean(dim=(1, 2)) > 110
        assert bright.long().tolist() == part.labels.tolist()
        assert part.labels.bincount().tolist() == [2, 2]
    assert data.presence(name, str(tmp_path)).present


@pytest.mark.parametrize("name", TREES)
def test_a_wrong_layout_names_the_first_thing_missing(name, tmp_path):
    with pytest.raises(GeomsslError, match="http"):
        data.load(f"{name}:{tmp_path}", "train")
    base = TREES[name](tmp_path)
    image = sorted(base.rglob("*.jpg"))[0]
    image.unlink()
    with pytest.raises(GeomsslError, match=image.name):
        data.load(f"{name}:{tmp_path}", "train", size=8)
    (base / NEEDED[name]).unlink()
    with pytest.raises(GeomsslError, match=NEEDED[name].rpartition("/")[2]):
        data.load(f"{name}:{tmp_path}", "train", size=8)


def test_partitions_of_sun_may_lie_beside_it_or_in_it_or_be_missing(tmp_path):
    base = sun397(tmp_path)
    beside = data.load(f"sun397:{tmp_path}", "test", size=8)
    shutil.move(tmp_path / "Partitions", base / "Partitions")
    assert data.load(f"sun397:{tmp_path}", "test", size=8).fingerprint == beside.fingerprint
    with pytest.raises(GeomsslError, match="Testing_02"):
        data.load(f"sun397:{tmp_path}", "test", partition=2)


def test_torchvisions_folder_in_a_folder_is_read_for_dtd(tmp_path):
    dtd(tmp_path / "dtd")
    assert len(data.load(f"dtd:{tmp_path}", "train", size=8)) == 4


def test_trimaps_are_the_masks_of_pets(tmp_path):
    """Cropped as the image is: the centred square of 12x8 starts at the third column."""
    pets(tmp_path)
    source = data.load(f"pets:{tmp_path}", "test", size=8)
    assert source.regions == ("pet", "background")
    masks = source.masks(torch.tensor([3, 0]))
    wanted = torch.ones(8, 8, dtype=torch.long)
    wanted[2:6, 2:6], wanted[2:6, 1] = 0, -1
    assert torch.equal(masks, wanted.expand(2, -1, -1))


def test_pets_without_trimaps_has_no_masks_and_says_so(tmp_path):
    pets(tmp_path, trimaps=False)
    source = data.load(f"pets:{tmp_path}", "test", size=8)
    with pytest.raises(GeomsslError, match="no masks|has none") as caught:
        source.masks(torch.arange(1))
    assert caught.value.reason == "no-masks"


def test_masks_follow_the_images_that_are_kept(tmp_path):
    """An unreadable image takes its mask with it, in memory and on disk; a mask of another level or a torn one is named."""
    base = pets(tmp_path)
    torn = base / "images" / "Abyssinian_4.jpg"
    torn.write_bytes(torn.read_bytes()[:30])
    marks = np.full((8, 12), 1, np.uint8)
    Image.fromarray(marks).save(base / "annotations" / "trimaps" / "Abyssinian_5.png")
    for memory in (2.0, 0):
        source = data.load(f"pets:{tmp_path}", "test", size=8, unreadable="skip", memory=memory)
        assert len(source) == 3
        assert (source.masks(torch.tensor([0])) == 0).all(), "the first image left is Abyssinian_5"
        assert (source.masks(torch.tensor([1])) == 1).any()
    Image.fromarray(marks * 7).save(base / "annotations" / "trimaps" / "Abyssinian_5.png")
    with pytest.raises(GeomsslError, match=r"Abyssinian_5.png with the value 7; expected values from 1 to 3"):
        source.masks(torch.tensor([0]))
    (base / "annotations" / "trimaps" / "Abyssinian_5.png").write_bytes(b"torn")
    with pytest.raises(GeomsslError, match=r"Abyssinian_5.png"):
        source.masks(torch.tensor([0]))


@pytest.mark.parametrize("level", ["variant", "family", "manufacturer"])
def test_aircraft_have_three_levels_of_labels(level, tmp_path):
    aircraft(tmp_path)
    source = data.load(f"aircraft:{tmp_path}", "train", size=8, labels=level)
    wanted = {"variant": "A340-200", "family": "A340", "manufacturer": "Airbus"}[level]
    assert source.classes[source.labels[-1]] == wanted
