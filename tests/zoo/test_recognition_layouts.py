"""The layouts of the transfer sets against torchvision's own readers, on the same tiny trees."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from geomssl import data

_spec = importlib.util.spec_from_file_location("trees", Path(__file__).parents[1] / "core" / "test_recognition.py")
trees = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(trees)

pytestmark = pytest.mark.zoo
READERS = {
    "food101": lambda root: datasets.Food101(root, split="test"),
    "dtd": lambda root: datasets.DTD(root, split="test"),
    "pets": lambda root: datasets.OxfordIIITPet(root, split="test"),
    "aircraft": lambda root: datasets.FGVCAircraft(root, split="test"),
}


@pytest.mark.parametrize("name", READERS)
def test_files_and_labels_are_torchvisions(name, tmp_path):
    # torchvision keeps the folder dtd of the archive in a folder dtd
    trees.TREES[name](tmp_path / "dtd" if name == "dtd" else tmp_path)
    theirs, ours = READERS[name](str(tmp_path)), data.load(f"{name}:{tmp_path}", "test", size=8)
    assert len(theirs) == len(ours)
    found = sorted((int(np.asarray(image)[4, 6].mean()), label) for image, label in theirs)
    own = sorted(
        (int(image[:, 4, 4].float().mean()), label)
        for image, label in zip(ours.images(torch.arange(len(ours))), ours.labels.tolist(), strict=True)
    )
    assert found == own


def test_sun_has_torchvisions_classes(tmp_path):
    trees.sun397(tmp_path)
    theirs, ours = datasets.SUN397(str(tmp_path)), data.load(f"sun397:{tmp_path}", "test", size=8)
    assert list(ours.classes) == theirs.classes
    assert len(theirs) == 12
