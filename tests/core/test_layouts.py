"""Releases on disk: tiny trees in exactly their layout are read right, and a wrong one names the first thing missing."""

import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from scipy.spatial.transform import Rotation

from geomssl import data
from geomssl.cli import main
from geomssl.data import tdw
from geomssl.data.ade20k import ADE20K
from geomssl.data.files import Files
from geomssl.data.threedie import quaternion
from geomssl.errors import GeomsslError


@pytest.fixture(autouse=True)
def _nowhere_else(tmp_path, monkeypatch):
    """No data but what a test writes."""
    monkeypatch.setenv("GEOMSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEOMSSL_DATA", raising=False)


def encoded(value, kind="PNG", size=(4, 4)):
    """An image file whose pixels are all value, but for one corner."""
    pixels = np.full((size[1], size[0], 3), value % 256, np.uint8)
    pixels[0, 0] = 255 - value % 256
    room = io.BytesIO()
    Image.fromarray(pixels).save(room, kind)
    return room.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        path.write_bytes(content)


def refused(call):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def level(source):
    """The last pixel of every image: what `encoded` was given."""
    return source.images(torch.arange(len(source)))[:, 0, -1, -1].tolist()


@pytest.fixture(scope="module")
def core50(tmp_path_factory):
    root = tmp_path_factory.mktemp("core50")
    files = [encoded(10 * k) for k in range(5)]
    for s in range(1, 12):
        for o in range(1, 51):
            for k in range(5):
                put(root / "core50_128x128" / f"s{s}" / f"o{o}" / f"C_{s:02d}_{o:02d}_{k:03d}.png", files[k])
    return root


def test_core50_trains_on_two_sessions_and_tests_on_nine(core50):
    train, val, test = (data.load(f"core50:{core50}", split, val=0.2) for split in ("train", "val", "test"))
    assert [len(s) for s in (train, val, test)] == [2 * 50 * 4, 2 * 50, 9 * 50 * 5]
    assert set(train.factors["session"].tolist()) == set(val.factors["session"].tolist()) == {0, 1}
    assert set(test.factors["session"].tolist()) == set(range(2, 11))
    assert set(val.factors["frame"].tolist()) == {4}, "the last frames: neighbours of the others, yet after them"
    assert torch.equal(train.labels, (train.factors["object"] // 5).long())
    assert train.classes[8] == "cups"
    assert level(train)[:4] == [0, 10, 20, 30]


def test_core50_labels_sessions_and_other_splits(core50):
    chosen = {"train_sessions": (1, 2, 4, 5, 6, 8, 9, 11), "every": 2}
    assert set(data.load(f"core50:{core50}", "test", **chosen).factors["session"].tolist()) == {2, 6, 9}
    parts = [data.load(f"core50:{core50}", split, only="unseen", labels="session") for split in ("train", "val", "test")]
    assert [len(p) for p in parts] == [9 * 50 * k for k in (3, 1, 1)]
    assert all(set(p.labels.tolist()) == set(range(2, 11)) for p in parts), "a session classifier on sessions not trained on"
    assert [p.classes[-1] for p in parts] == ["s11"] * 3


def test_core50_names_what_is_missing(core50, tmp_path):
    assert "core50_128x128" in refused(lambda: data.load(f"core50:{tmp_path}", "train"))
    shutil.copytree(core50 / "core50_128x128" / "s1", tmp_path / "core50_128x128" / "s1")
    assert "s2" in refused(lambda: data.load(f"core50:{tmp_path}", "train"))
    for s in range(2, 12):
        (tmp_path / "core50_128x128" / f"s{s}").mkdir()
    shutil.rmtree(tmp_path / "core50_128x128" / "s1" / "o7")
    assert "s1/o7" in refused(lambda: data.load(f"core50:{tmp_path}", "train", train_sessions=(1,)))
    assert "[0]" in refused(lambda: data.load(f"core50:{core50}", "train", train_sessions=(0,)))


def test_unreadable_images_are_named_or_skipped_with_their_factors(core50, tmp_path):
    root = tmp_path / "again"
    shutil.copytree(core50, root)
    torn = root / "core50_128x128" / "s1" / "o3" / "C_01_03_001.png"
    torn.write_bytes(torn.read_bytes()[:20])
    assert "C_01_03_001.png" in refused(lambda: data.load(f"core50:{root}", "train"))
    whole, kept = data.load(f"core50:{core50}", "train"), data.load(f"core50:{root}", "train", unreadable="skip")
    assert len(kept) == len(whole) - 1 == len(kept.labels) == len(kept.factors["frame"])
    assert "1 of" in kept.notes[0]
    gone = (whole.factors["object"] == 2) & (whole.factors["session"] == 0) & (whole.factors["frame"] == 1)
    assert torch.equal(kept.factors["sequence"], whole.factors["sequence"][~gone])


def test_a_set_beyond_memory_is_the_same_on_disk(core50):
    resident, mapped = (data.load(f"core50:{core50}", "train", memory=m) for m in (2.0, 0))
    assert isinstance(mapped, Files)
    assert mapped.fingerprint == resident.fingerprint
    assert torch.equal(mapped.factors["session"], resident.factors["session"])
    assert mapped.parameters == resident.parameters


def test_without_a_val_share_train_is_whole_and_val_is_empty(core50):
    train, val = (data.load(f"core50:{core50}", split, val=0) for split in ("train", "val"))
    assert len(train) == 2 * 50 * 5
    assert (len(val), len(val.labels), val.size, val.channels) == (0, 0, train.size, train.channels)
    assert tuple(val.images(torch.arange(0)).shape) == (0, 3, 4, 4)


def test_tdw_reads_place_from_the_order_of_its_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tdw, "AZIMUTHS", range(0, 360, 120))
    monkeypatch.setattr(tdw, "ELEVATIONS", range(10, 50, 20))
    monkeypatch.setattr(tdw, "VIEWS", 4 * 2 * 3)
    for split in ("train", "test"):
        row = 0
        for _object in range(12):
            for r in range(4):
                for theta in range(2):
                    for phi in range(3):
                        content = encoded(60 * r + 20 * theta + phi)
                        put(tmp_path / "spherical_photoreal_64x64_DoF" / split / f"{row:05d}.png", content)
                        row += 1
    test = data.load(f"tdw:{tmp_path}", "test")
    assert len(test) == 288
    value = [round(600 * (d - 0.3) + 20 * (e - 10) / 20 + a / 120) for d, e, a in zip(
        *(test.factors[k].tolist() for k in ("distance", "elevation", "azimuth")), strict=True)]
    assert level(test) == value
    assert test.labels.tolist() == [k // 24 for k in range(288)]
    train, val = (data.load(f"tdw:{tmp_path}", split, val=0.25) for split in ("train", "val"))
    assert val.labels.bincount().tolist() == [6] * 12
    assert len(train) + len(val) == 288
    (tmp_path / "spherical_photoreal_64x64_DoF" / "test" / "00100.png").unlink()
    assert "287 images" in refused(lambda: data.load(f"tdw:{tmp_path}", "test"))
    shutil.rmtree(tmp_path / "spherical_photoreal_64x64_DoF" / "train")
    assert "train" in refused(lambda: data.load(f"tdw:{tmp_path}", "train"))


def bench(root, objects=5, views=3):
    for synset in ("02691156", "02747177"):
        for number in range(objects):
            for k in range(views):
                place = root / "3DIEBench" / synset / f"obj{number}"
                put(place / f"image_{k}.jpg", encoded(40 * k, "JPEG", (8, 8)))
                np.save(place / f"latent_{k}.npy", np.array([0.1 * k, -1.2, 1.5, 0.25, 0.5, 3.0, 0.75]))
    return root


def load_bench(root, split="train", **options):
    return data.load(f"3diebench:{root}", split, **{"views": 3, "size": 8, **options})


def test_3diebench_reads_latents_and_splits_by_object(tmp_path):
    bench(tmp_path)
    parts = {split: load_bench(tmp_path, split, val=0.25) for split in ("train", "val", "test")}
    assert {split: len(p) for split, p in parts.items()} == {"train": 2 * 3 * 3, "val": 2 * 3, "test": 2 * 3}
    assert len(set.union(*(set(p.factors["object"].tolist()) for p in parts.values()))) == 10
    source = parts["train"]
    known = [source.factors[name][1].item() for name in ("floor_hue", "light_theta", "light_phi", "light_hue")]
    assert known == [0.25, 0.5, 3.0, 0.75]
    found = [source.factors[f"quaternion_{axis}"][1].item() for axis in "xyzw"]
    angles = Rotation.from_quat(found).as_euler("xyz")
    assert angles.tolist() == pytest.approx([0.1, -1.2, 1.5], abs=1e-5)
    assert source.classes == ("02691156", "02747177")


def test_a_rotation_has_one_quaternion():
    draw = np.random.default_rng(0)
    for angles in draw.uniform(-np.pi, np.pi, (50, 3)):
        found = quaternion(angles.tolist())
        assert found[3] >= 0
        assert found == pytest.approx(quaternion((angles + 2 * np.pi).tolist()), abs=1e-9)
    assert quaternion([np.pi, 0, 0])[0] == pytest.approx(1)
    assert quaternion([-np.pi, 0, 0])[0] == pytest.approx(1)


def test_3diebench_follows_the_published_lists(tmp_path):
    bench(tmp_path)
    np.save(tmp_path / "train_images.npy", np.array(["/02691156/obj0", "/02691156/obj1"]))
    np.save(tmp_path / "val_images.npy", np.array(["/02747177/obj4"]))
    assert set(load_bench(tmp_path, val=0).factors["object"].tolist()) == {0, 1}
    assert set(load_bench(tmp_path, "test").factors["object"].tolist()) == {9}
    np.save(tmp_path / "val_images.npy", np.array(["/02747177/obj9"]))
    assert "obj9" in refused(lambda: load_bench(tmp_path, "test"))


def test_3diebench_names_what_is_missing(tmp_path):
    bench(tmp_path)
    place = tmp_path / "3DIEBench" / "02691156" / min(_train_objects(tmp_path)) / "latent_1.npy"
    assert "image_3.jpg" in refused(lambda: load_bench(tmp_path, val=0, views=4))
    np.save(place, np.zeros(9))
    assert "7 finite numbers" in refused(lambda: load_bench(tmp_path, val=0))
    place.unlink()
    assert "latent_1.npy" in refused(lambda: load_bench(tmp_path, val=0))


def _train_objects(root):
    numbers = load_bench(root, val=0).factors["object"]
    return {f"obj{int(n) % 5}" for n in numbers if n < 5}


def tiny(root):
    base = root / "tiny-imagenet-200"
    put(base / "wnids.txt", "n02\nn01\n")
    put(base / "words.txt", "n01\tgoldfish, Carassius auratus\nn02\tfire salamander\nn09\tother\n")
    for c, wnid in enumerate(("n01", "n02")):
        for k in range(5):
            put(base / "train" / wnid / "images" / f"{wnid}_{k}.JPEG", encoded(100 * c + 10, "JPEG", (8, 8)))
    rows = []
    for k in range(4):
        put(base / "val" / "images" / f"val_{k}.JPEG", encoded(100 * (k % 2) + 10, "JPEG", (8, 8)))
        rows.append(f"val_{k}.JPEG\tn0{k % 2 + 1}\t0\t0\t7\t7")
    put(base / "val" / "val_annotations.txt", "\n".join(rows) + "\n")
    return base


def test_tiny_imagenet_labels_its_val_by_the_annotations(tmp_path):
    base = tiny(tmp_path)
    parts = {split: data.load(f"tiny-imagenet:{tmp_path}", split, val=0.2) for split in ("train", "val", "test")}
    assert [len(data.load(f"tiny-imagenet:{tmp_path}", "val", val=v)) for v in (0, 0.2)] == [0, len(parts["val"])]
    assert {split: len(p) for split, p in parts.items()} == {"train": 8, "val": 2, "test": 4}
    assert parts["test"].classes == ("goldfish", "fire salamander")
    for part in parts.values():
        assert [v > 60 for v in level(part)] == [bool(label) for label in part.labels]
    (base / "val" / "images" / "val_2.JPEG").unlink()
    assert "val_2.JPEG" in refused(lambda: data.load(f"tiny-imagenet:{tmp_path}", "test"))
    (base / "words.txt").unlink()
    assert "words.txt" in refused(lambda: data.load(f"tiny-imagenet:{tmp_path}", "train"))


def imagenet(root):
    for c, wnid in enumerate(("n01", "n02")):
        for k in range(5):
            put(root / "train" / wnid / f"{wnid}_{k}.JPEG", encoded(100 * c + 10, "JPEG", (12, 8)))
    return root


@pytest.mark.parametrize("form", ["folders", "kaggle", "devkit"])
def test_imagenet_reads_the_three_forms_of_its_validation(tmp_path, form):
    root = imagenet(tmp_path / "ILSVRC2012")
    for k in range(4):
        name = f"ILSVRC2012_val_{k + 1:08d}.JPEG"
        inner = f"n0{k % 2 + 1}/{name}" if form == "folders" else name
        put(root / "val" / inner, encoded(100 * (k % 2) + 10, "JPEG", (12, 8)))
    if form == "kaggle":
        rows = [f"ILSVRC2012_val_{k + 1:08d},n0{k % 2 + 1} 1 2 3 4" for k in (2, 0, 3, 1)]
        put(tmp_path / "LOC_val_solution.csv", "\n".join(["ImageId,PredictionString", *rows]) + "\n")
    if form == "devkit":
        folder = tmp_path / "ILSVRC2012_devkit_t12" / "data"
        put(folder / "ILSVRC2012_validation_ground_truth.txt", "7\n3\n7\n3\n")
        kinds = np.array([(3, "n02"), (7, "n01")], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
        savemat(folder / "meta.mat", {"synsets": kinds})
    found = data.load(f"imagenet:{root}", "test", size=8)
    assert sorted(found.labels.tolist()) == [0, 0, 1, 1]
    assert [v > 60 for v in level(found)] == [bool(label) for label in found.labels]
    assert found.size == 8
    assert len(data.load(f"imagenet:{tmp_path}", "train", size=8, val=0.2)) == 8


def test_imagenet_names_what_is_missing(tmp_path):
    root = imagenet(tmp_path / "ILSVRC2012")
    assert "val" in refused(lambda: data.load(f"imagenet:{root}", "test"))
    put(root / "val" / "ILSVRC2012_val_00000001.JPEG", encoded(3, "JPEG"))
    assert "LOC_val_solution.csv" in refused(lambda: data.load(f"imagenet:{root}", "test"))


def ade(root):
    base = root / "ADEChallengeData2016"
    lines = []
    for folder, word, n in (("training", "train", 5), ("validation", "val", 2)):
        for k in range(1, n + 1):
            stem = f"ADE_{word}_{k:08d}"
            put(base / "images" / folder / f"{stem}.jpg", encoded(20 * k, "JPEG", (12, 8)))
            marks = np.full((8, 12), k, np.uint8)
            marks[:, :2], marks[0, 2] = 150, 0
            room = io.BytesIO()
            Image.fromarray(marks).save(room, "PNG")
            put(base / "annotations" / folder / f"{stem}.png", room.getvalue())
            lines.append(f"{stem} {'bedroom' if k % 2 else 'street'}")
    put(base / "sceneCategories.txt", "\n".join(lines) + "\n")
    return base


def test_ade20k_gives_scenes_and_a_name_for_every_pixel(tmp_path):
    base = ade(tmp_path)
    config = ADE20K.Config(root=str(tmp_path), size=8, val=0.2)
    source = ADE20K.load(config, "train")
    assert len(source) == 4
    assert len(ADE20K.load(config, "val")) == 1
    assert source.classes == ("bedroom", "street")
    numbers = source.factors["number"].long()
    assert source.labels.tolist() == [0 if n % 2 else 1 for n in numbers.tolist()]
    masks = source.masks(torch.tensor([2, 0]))
    assert masks.shape == (2, 8, 8)
    assert masks[:, 4, 4].tolist() == (numbers[[2, 0]] - 1).tolist()
    assert len(source.regions) == 150
    assert masks[0, 0, 0] == -1, "the centred crop starts at the third column, whose first pixel has no name"
    assert (masks != 149).all()
    (base / "annotations" / "training" / "ADE_train_00000002.png").unlink()
    assert "ADE_train_00000002.png" in refused(lambda: ADE20K.load(config, "train"))


@pytest.mark.parametrize("name", ["core50", "tdw", "3diebench", "tiny-imagenet", "imagenet", "ade20k"])
def test_what_is_not_here_is_said_in_one_line(name, tmp_path, capsys):
    said = refused(lambda: data.load(f"{name}:{tmp_path}", "train"))
    assert "http" in said
    assert str(tmp_path) in said
    assert not data.presence(name, str(tmp_path)).present


def test_the_list_of_data_sets_says_what_is_here(core50, capsys):
    assert main(["datasets", "--root", str(core50)]) == 0
    said = capsys.readouterr().out
    assert "core50_128x128" in said
    assert "views" in said
