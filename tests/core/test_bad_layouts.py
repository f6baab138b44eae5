"""Damaged lists and files of the releases: each is one line that names what is wrong first."""

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from geomssl import data
from geomssl.errors import GeomsslError


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(path, "JPEG")


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def said(name, root, split="train", **options):
    with pytest.raises(GeomsslError) as caught:
        data.load(f"{name}:{root}", split, **options)
    assert "\n" not in str(caught.value)
    assert caught.value.reason == "bad-layout"
    return str(caught.value)


def test_tiny_imagenet(tmp_path):
    base = tmp_path / "tiny-imagenet-200"
    text(base / "wnids.txt", "\n")
    assert "wnids.txt is empty" in said("tiny-imagenet", tmp_path)
    text(base / "wnids.txt", "n01\n")
    text(base / "words.txt", "n01\tfish\n")
    picture(base / "train" / "n01" / "images" / "n01_0.JPEG")
    text(base / "val" / "val_annotations.txt", "val_0.JPEG\n")
    assert "'val_0.JPEG'" in said("tiny-imagenet", tmp_path, "test")
    text(base / "val" / "val_annotations.txt", "val_0.JPEG\tn07\t0\t0\t1\t1\n")
    assert "'n07'" in said("tiny-imagenet", tmp_path, "test")


def test_imagenet(tmp_path):
    base = tmp_path / "ILSVRC2012"
    picture(base / "train" / "n01" / "n01_0.JPEG")
    picture(base / "val" / "ILSVRC2012_val_00000001.JPEG")
    text(tmp_path / "LOC_val_solution.csv", "ImageId,PredictionString\nILSVRC2012_val_00000001\n")
    assert "'ILSVRC2012_val_00000001'" in said("imagenet", tmp_path, "test")
    (tmp_path / "LOC_val_solution.csv").unlink()
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    text(kit / "ILSVRC2012_validation_ground_truth.txt", "12\n")
    kinds = np.array([(3, "n01")], dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O")])
    savemat(kit / "meta.mat", {"synsets": kinds})
    assert "'12'" in said("imagenet", tmp_path, "test")
    text(kit / "ILSVRC2012_validation_ground_truth.txt", "three\n")
    assert "'three'" in said("imagenet", tmp_path, "test")


def test_ade20k(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    text(base / "sceneCategories.txt", "ADE_train_00000001 street\nbroken\n")
    assert "'broken'" in said("ade20k", tmp_path)
    text(base / "sceneCategories.txt", "ADE_train_one street\n")
    picture(base / "images" / "training" / "ADE_train_one.jpg")
    picture(base / "annotations" / "training" / "ADE_train_one.png")
    assert "8 digits" in said("ade20k", tmp_path)
    text(base / "objectInfo150.txt", "Idx\tName\n1\twall\n")
    assert "1 things" in said("ade20k", tmp_path)


def test_3diebench(tmp_path):
    (tmp_path / "3DIEBench" / "02691156").mkdir(parents=True)
    assert "02691156" in said("3diebench", tmp_path)


def test_pets(tmp_path):
    text(tmp_path / "oxford-iiit-pet" / "annotations" / "trainval.txt", "#Image CLASS-ID SPECIES BREED\n")
    assert "#Image" in said("pets", tmp_path)
    text(tmp_path / "oxford-iiit-pet" / "annotations" / "trainval.txt", "Abyssinian_1 1\n")
    assert "'Abyssinian_1 1'" in said("pets", tmp_path)


def test_dtd_aircraft_food_and_sun(tmp_path):
    text(tmp_path / "dtd" / "labels" / "train1.txt", "banded/banded_0001.jpg\n")
    assert "banded_0001.jpg" in said("dtd", tmp_path)
    text(tmp_path / "fgvc-aircraft-2013b" / "data" / "variants.txt", "707-320\n")
    text(tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_train.txt", "0000001 747\n")
    assert "'747'" in said("aircraft", tmp_path)
    text(tmp_path / "food-101" / "meta" / "classes.txt", "waffles\n")
    text(tmp_path / "food-101" / "meta" / "train.txt", "waffle/1\n")
    assert "'waffle'" in said("food101", tmp_path)
    text(tmp_path / "SUN397" / "ClassName.txt", "/a/abbey\n")
    text(tmp_path / "SUN397" / "Training_01.txt", "/z/zoo/sun_1.jpg\n")
    assert "'zoo'" in said("sun397", tmp_path)
