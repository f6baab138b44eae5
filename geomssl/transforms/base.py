"""The contracts of what acts on images: Transform (T_g with parameters) and Group (elements that compose and act on fibres)."""

from __future__ import annotations

import copy
import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, Self

import torch
from torch import Tensor

from geomssl.errors import GeomsslError

Size = tuple[int, int]


@dataclass(frozen=True)
class Parameter:
    """One column of a parameter tensor. kind "binary" is 0 or 1, "index" an element's index, "periodic" wraps at `high`."""

    name: str
    unit: str
    kind: Literal["continuous", "binary", "index", "periodic"]
    identity: float
    low: float
    high: float


class Transform(ABC):
    """T_g: images (n, C, H, W) and parameters (n, P) to images of the same shape, dtype and device.

    Rows are independent: image i moves by params[i]. Every draw takes an explicit generator; nothing is random otherwise.
    Pixels count (dy, dx), down and right positive; degrees turn anticlockwise as displayed; zoom > 1 enlarges.
    """

    name: str
    parameters: tuple[Parameter, ...]

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        """Draw n rows of parameters, float32 (n, P) on the generator's device, for images of `size` (H, W)."""

    @abstractmethod
    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        """Transform image i by params[i]."""

    def inverse(self, params: Tensor) -> Tensor:
        """Parameters of T_g^-1, where one exists."""
        raise GeomsslError(f"{self.name} has no inverse", "a transform with an inverse", reason="no-inverse")

    def on(self, grid: Tensor) -> Self:
        """The same transform, whose draws are rows of grid (E, P), each as likely as another."""
        listed = copy.copy(self)
        listed.sample = functools.partial(_pick, grid)  # type: ignore[method-assign]
        return listed

    def identity(self, n: int = 1) -> Tensor:
        """Parameters (n, P) that leave an image as it is."""
        return torch.tensor([[p.identity for p in self.parameters]]).expand(n, -1).clone()

    def active(self, channels: int) -> tuple[bool, ...]:
        """Per parameter: does it act on images of this many channels? (hue does not on one)."""
        return (True,) * len(self.parameters)

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        """bool (n,): True only where T_g merely permutes the pixels of an image of `size`."""
        return (params == self.identity().to(params)).all(dim=1)


def _pick(grid: Tensor, n: int, generator: torch.Generator, size: Size) -> Tensor:
    rows = torch.randint(len(grid), (n,), generator=generator, device=generator.device)
    return grid.to(generator.device)[rows]


class Group(Transform):
    """A Transform whose parameters form a group G: g h means first h, then g, so T_{gh} = T_g T_h.

    params of a finite group are element indices (n, 1), index 0 the identity.
    """

    order: int | None
    """Number of elements; None where the group is not finite."""

    fibre: int
    """Length of the orientation axis of its regular representation; 1 where it acts on space alone."""

    @abstractmethod
    def elements(self, size: Size | None = None) -> Tensor:
        """Every element as parameters (|G|, P); `size` is needed where the group depends on it (wrapped translations)."""

    @abstractmethod
    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        """Parameters of gh: first h, then g."""

    @abstractmethod
    def act(self, fibres: Tensor, params: Tensor) -> Tensor:
        """The regular action on features (n, C, G, H, W): [Γ_g f](k, u) = f(g^-1 k, g^-1 u). Γ_{gh} = Γ_g Γ_h."""
