"""A small subject on real images: an encoder, its projector, and scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from geomssl.data import load
from geomssl.data.base import Resident, Source
from geomssl.encoders.base import Encoder, Normalise
from geomssl.probes.subject import Subject
from geomssl.seeding import seeded
from geomssl.transforms.base import Parameter, Transform


class Small(Encoder):
    """Two convolutions on 8x8 images; h is their spatial mean."""

    def __init__(self, dim: int = 12) -> None:
        super().__init__()
        self.in_channels, self.dim = 1, dim
        self.body = nn.Sequential(
            Normalise(), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, dim, 3, padding=1), nn.ReLU(inplace=True),
        )

    def fibres(self, images: Tensor) -> Tensor:
        return self.body(images)[:, :, None]

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))


class Brighten(Transform):
    """Adds a drawn constant to every pixel: a policy with one parameter, enough to make two views differ."""

    name = "brighten"
    parameters = (Parameter("by", "", "continuous", 0.0, -0.2, 0.2),)

    def sample(self, n: int, generator: torch.Generator, size: tuple[int, int]) -> Tensor:
        return torch.rand(n, 1, generator=generator) * 0.4 - 0.2

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return images + params.to(images)[:, :, None, None]


def encoder(seed: int = 0, dim: int = 12) -> Small:
    with seeded(seed, "test-encoder"):
        return Small(dim)


def few(source: Source, n: int) -> Resident:
    """The first n images of a split."""
    labels = source.labels
    return Resident(
        source.name, source.split, source.images(torch.arange(n)), None if labels is None else labels[:n], source.classes
    )


@pytest.fixture
def make_subject() -> Callable[..., Subject]:
    """A subject on the first images of digits; keywords replace its parts."""

    def make(n: int = 60, known: int = 200, **parts: Any) -> Subject:
        with seeded(0, "test-projector"):
            projector = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 6))
        given: dict[str, Any] = {
            "encoder": encoder(), "projector": projector, "source": few(load("digits", "test"), n),
            "train": few(load("digits", "train"), known), "policy": Brighten(), "untrained": lambda: encoder(1),
            "batch_size": 32, "provenance": {"run": "small"},
        }
        return Subject(**{**given, **parts})

    return make
