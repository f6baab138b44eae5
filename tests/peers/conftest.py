"""The peers environment: e2cnn and escnn behind the names in which they differ, with what their versions need there."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geomssl.seeding import seeded

LIBRARIES = ("e2cnn", "escnn")

if any(importlib.util.find_spec(name) is None for name in (*LIBRARIES, "e3nn")):
    collect_ignore_glob = ["test_*.py"]
else:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (*LIBRARIES, "e3nn"):
            importlib.import_module(f"{name}.o3" if name == "e3nn" else f"{name}.nn")
    # scikit-learn's takes no np.matrix, which escnn gives it for groups with mirrors; without it escnn uses scipy's
    importlib.import_module("escnn.group._numerical").randomized_svd = None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What the libraries warn of is theirs; what this package warns of stays an error."""
    for item in items:
        if "peers" in item.keywords:
            for name in (*LIBRARIES, "e3nn", "lie_learn", "torch"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore:::{name}"))


@dataclass(frozen=True)
class Library:
    """e2cnn or escnn: spaces by the names that this package gives their groups."""

    name: str
    nn: ModuleType

    def space(self, group: str) -> Any:
        gspaces, order = importlib.import_module(f"{self.name}.gspaces"), int(group[1:])
        first = "r" if self.name == "escnn" else "R"
        kind = f"{first}ot2dOnR2" if group[0] == "c" else f"{'f' if first == 'r' else 'F'}lipRot2dOnR2"
        return getattr(gspaces, kind)(order)

    def regular(self, space: Any, fields: int) -> Any:
        return self.nn.FieldType(space, fields * [space.regular_repr])

    def trivial(self, space: Any, fields: int = 1) -> Any:
        return self.nn.FieldType(space, fields * [space.trivial_repr])

    def conv(self, before: Any, after: Any, **options: Any) -> Any:
        return self.nn.R2Conv(before, after, **{"kernel_size": 3, "padding": 1, **options})

    def moved(self, values: Tensor, kind: Any, element: Any, order: int = 2) -> Tensor:
        """Its own transform of values of a type, in float64 where it keeps that. order: of escnn's splines."""
        if self.name == "escnn":
            return kind.transform(values, element, order=order)
        return self.nn.GeometricTensor(values, kind).transform(element).tensor.to(values.dtype)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param, importlib.import_module(f"{request.param}.nn"))


class Steerable(nn.Module):
    """Images → regular fields → regular fields of a library, read as fibres (N, C, |G|, H, W). last: a module of its own."""

    def __init__(
        self, library: Library, group: str, fields: int = 3, stride: int = 1, mask: int | None = None, kernel: int = 3
    ) -> None:
        super().__init__()
        space = library.space(group)
        self.library, self.order, self.elements = library, space.fibergroup.order(), list(space.fibergroup.elements)
        self.before, self.after = library.trivial(space), library.regular(space, fields)
        sizes = {"kernel_size": kernel, "padding": kernel // 2}
        layers = [
            library.conv(self.before, self.after, bias=True, **sizes), library.nn.ReLU(self.after),
            library.conv(self.after, self.after, bias=True, stride=stride, **sizes),
        ]
        if mask is not None:
            layers.append(library.nn.MaskModule(self.after, mask, margin=25))
        self.body = library.nn.SequentialModule(*layers)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                if name.endswith("bias"):
                    weight.normal_(0, 0.1)

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.library.nn.GeometricTensor(images, self.before)).tensor.unflatten(1, (-1, self.order))

    def theirs(self, images: Tensor, element: Any, moved: Tensor | None = None, order: int = 2) -> float:
        """total by the library's own transforms of images (moved: rendered ones in their place) and features."""
        moved = self.library.moved(images, self.before, element) if moved is None else moved
        with torch.no_grad():
            features = self(images).flatten(1, 2)
            declared = self.library.moved(features, self.after, element, order).double()
            gap = self(moved).flatten(1, 2).double() - declared
        return float((gap.square().sum() / (declared - declared.mean(dim=0)).square().sum()).sqrt())


@pytest.fixture
def steerable(library: Library) -> Any:
    """A network of the library by its group's name, in float64, as the library initialises it but for its biases."""

    def make(group: str, **options: Any) -> Steerable:
        with seeded(0, "peers"):
            return Steerable(library, group, **options).double()

    return make
