"""Digits and folders of images: splits, decoding, and refusals by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from geomssl import data
from geomssl.config import Settings
from geomssl.data.base import Resident
from geomssl.data.splits import stratified
from geomssl.errors import GeomsslError


def paint(path, value=0, size=(4, 4), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = (np.arange(size[0] * size[1] * bands) * 7 + value) % 256
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    Image.fromarray(pixels.reshape(shape).astype(np.uint8), mode=None).save(path)
    return path


@pytest.fixture
def tree(tmp_path):
    for name in ("cat", "dog"):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.png", value=i + 30 * (name == "dog"))
    return tmp_path / "pets"


def load(root, split="train", **options):
    return data.load(f"folder:{root}", split, **options)


def whole_of(root):
    return [load(root, split) for split in ("train", "val", "test")]


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    found = load_digits()
    parts = [data.load("digits", split) for split in ("train", "val", "test")]
    assert sum(len(p) for p in parts) == 1797
    images = torch.cat([p.images(torch.arange(len(p))) for p in parts]).float()
    assert images.shape[1:] == (1, 8, 8)
    assert images.sum().item() == pytest.approx(found.images.sum() * 255 / 16, rel=1e-3)
    counts = sum(p.labels.bincount(minlength=10) for p in parts)
    assert counts.tolist() == np.bincount(found.target).tolist()


def test_splits_are_disjoint_whole_and_seeded():
    labels = torch.arange(100) % 3
    parts = stratified(labels, seed=1)
    assert torch.cat(list(parts.values())).sort().values.tolist() == list(range(100))
    assert [len(parts[s]) for s in ("train", "val", "test")] == [60, 21, 19]
    assert all(torch.equal(a, b) for a, b in zip(parts.values(), stratified(labels, seed=1).values(), strict=True))
    assert not torch.equal(parts["train"], stratified(labels, seed=2)["train"])


def test_folder_reads_pixels_labels_and_classes(tree):
    parts = whole_of(tree)
    assert [len(p) for p in parts] == [12, 4, 4]
    assert parts[0].classes == ("cat", "dog")
    assert parts[0].labels.bincount().tolist() == [6, 6]
    first = torch.cat([p.images(torch.arange(len(p))) for p in parts])
    assert sorted(int(i[0, 0, 0]) for i in first) == sorted([*range(10), *range(30, 40)])
    assert parts[0].fingerprint != parts[1].fingerprint


def test_folder_with_its_own_splits(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        for name in ("a", "b"):
            for i in range(n):
                paint(tmp_path / split / name / f"{i}.png", value=i)
    assert len(load(tmp_path, "train")) == 6
    assert len(load(tmp_path, "test")) == 4
    with pytest.raises(GeomsslError, match="has no val/"):
        load(tmp_path, "val")
    paint(tmp_path / "test" / "c" / "0.png")
    with pytest.raises(GeomsslError, match="class 'c'"):
        load(tmp_path, "test")


def test_folder_resizes_and_converts_when_told(tmp_path):
    paint(tmp_path / "a" / "0.png", size=(9, 5), mode="RGB")
    paint(tmp_path / "a" / "1.png", size=(6, 6), mode="L")
    paint(tmp_path / "b" / "2.png", size=(7, 8), mode="RGB")
    source = load(tmp_path, "train", size=6, channels=3)
    assert source.images(torch.arange(len(source))).shape[1:] == (3, 6, 6)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: paint(t / "cat" / "00.png", size=(1, 1)), "1x1 pixels; expected at least 2x2"),
        (lambda t: paint(t / "cat" / "00.png", size=(5, 4)), "4x5; expected square"),
        (lambda t: paint(t / "cat" / "00.png", size=(8, 8)), "is 4x4 with 1 channels; expected 8x8"),
        (lambda t: paint(t / "cat" / "00.png", mode="RGB"), "is 4x4 with 1 channels; expected 4x4 with 3"),
        (lambda t: paint(t / "cat" / "00.png", mode="RGBA"), "has 4 channels"),
        (lambda t: (t / "cat" / "00.png").write_bytes(b"\x89PNG not really"), "cannot read .*00.png"),
        (lambda t: Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(t / "cat" / "00.tiff"), "00.tiff has NaN"),
        (lambda t: Image.fromarray(np.zeros((4, 4), np.float32)).save(t / "cat" / "00.tiff"), "floating-point"),
    ],
)
def test_bad_images_are_refused_by_name(tree, spoil, said):
    spoil(tree)
    with pytest.raises(GeomsslError, match=said):
        whole_of(tree)


def test_truncated_image(tree):
    whole = (tree / "dog" / "3.png").read_bytes()
    (tree / "dog" / "3.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(GeomsslError, match="3.png"):
        whole_of(tree)


def test_images_all_equal(tmp_path):
    for i in range(5):
        Image.new("L", (4, 4), 9).save((tmp_path / "a").mkdir(exist_ok=True) or tmp_path / "a" / f"{i}.png")
    with pytest.raises(GeomsslError, match="one equal colour"):
        load(tmp_path)


def test_absent_and_empty_folders(tmp_path):
    (tmp_path / "pets").mkdir()
    with pytest.raises(GeomsslError, match="no such folder: .*pest; .*did you mean 'pets'"):
        load(tmp_path / "pest")
    with pytest.raises(GeomsslError, match="no image below"):
        load(tmp_path / "pets")
    with pytest.raises(GeomsslError, match="folder:PATH"):
        data.load("folder:", "train")
    with pytest.raises(GeomsslError, match="did you mean 'digits'"):
        data.load("digit", "train")
    with pytest.raises(GeomsslError, match="train, val or test"):
        data.load("digits", "valid")


def test_a_limit_draws_some_images_of_each_split(monkeypatch):
    """The same ones each time, with their own labels and factors; a limit beyond the split changes nothing."""
    pixels = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 1, 2, 2).contiguous()

    class Config(Settings):
        name: str = "digits"
        seed: int = 0
        limit: int | None = None

    class Counted:
        @staticmethod
        def load(config, split):
            return Resident("counted", split, pixels, torch.arange(50), factors={"twice": 2.0 * torch.arange(50)})

    monkeypatch.setattr(data, "resolve", lambda *_: Counted)
    some = data.load_config(Config(limit=20), "train")
    chosen = some.images(torch.arange(20))[:, 0, 0, 0].long()
    assert len(some) == len(chosen.unique()) == 20
    assert torch.equal(some.labels, chosen)
    assert torch.equal(some.factors["twice"], 2.0 * chosen)
    again, other = data.load_config(Config(limit=20), "train"), data.load_config(Config(limit=20, seed=1), "train")
    assert some.fingerprint == again.fingerprint != other.fingerprint
    assert len(data.load_config(Config(limit=99), "train")) == len(data.load_config(Config(), "train")) == 50
