"""The contract of an encoder: images in [0, 1] to fibres (N, C, G, H, W) and to a vector h (N, D)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from geomssl.transforms.base import Group


class Encoder(nn.Module):
    """f: images (N, C, H, W) in [0, 1] to features.

    group:       the group that acts on axis G of the fibres, or None. G > 1 with group None is a control without structure.
    in_channels: channels of the images it takes.
    dim:         D, the width of h, and C, the width of one fibre: a head for the one fits the other.
    """

    group: Group | None = None
    in_channels: int
    dim: int

    @abstractmethod
    def fibres(self, images: Tensor) -> Tensor:
        """Features (N, C, G, H, W): C channels at every orientation and place, before any pooling."""

    @abstractmethod
    def pool(self, fibres: Tensor) -> Tensor:
        """h (N, D) from the fibres."""

    def forward(self, images: Tensor) -> Tensor:
        return self.pool(self.fibres(images))


class Normalise(nn.Module):
    """(x - mean) / std with one constant for all channels and pixels, so that it commutes with whatever moves pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float = 0.5, std: float = 0.5) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(float(mean)))
        self.register_buffer("std", torch.tensor(float(std)))

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std
