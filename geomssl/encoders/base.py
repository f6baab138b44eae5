"""The contract of an encoder: images in [0, 1] to fibres (N, C, G, H, W) and to a vector h (N, D)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.config import Settings
from geomssl.errors import GeomsslError
from geomssl.transforms.base import Group


class Encoder(nn.Module):
    """f: images (N, C, H, W) in [0, 1] to features.

    group:       the group that acts on axis G of the fibres, or None. G > 1 with group None is a control without structure.
    in_channels: channels of the images it takes.
    dim:         D, the width of h, and C, the width of one fibre: a head for the one fits the other.

    forward(x) is pool(fibres(x)), but for a class token: that h is no function of the patches, and pool gives their mean.
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


class InputSettings(Settings):
    """How images in [0, 1] are normalised first: (x - mean) / std, one number for all channels or one for each."""

    mean: tuple[float, ...] = Field((0.5,), min_length=1, description="subtracted: one number, or one a channel")
    std: tuple[float, ...] = Field((0.5,), min_length=1, description="divided by: one number, or one a channel")


class Normalise(nn.Module):
    """(x - mean) / std with constants that are the same at every pixel, so that it commutes with whatever moves pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Sequence[float] = 0.5, std: float | Sequence[float] = 0.5) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            given = torch.tensor(values, dtype=torch.get_default_dtype()).flatten()
            self.register_buffer(name, given.squeeze() if given.numel() == 1 else given.view(-1, 1, 1))

    @classmethod
    def of(cls, config: InputSettings, in_channels: int) -> Normalise:
        """The normalisation of those settings for images of that many channels."""
        for name, values in (("mean", config.mean), ("std", config.std)):
            if len(values) not in (1, in_channels):
                raise GeomsslError(
                    f"{name} = {list(values)} for images of {in_channels} channels",
                    f"1 {'number' if in_channels == 1 else f'or {in_channels} numbers'}", reason="bad-value",
                )
        if min(config.std) <= 0:
            raise GeomsslError(f"std = {list(config.std)}", "numbers above 0", reason="bad-value")
        return cls(config.mean, config.std)

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def in_transform() -> bool:
    """Inside torch.func (grad, jvp, vmap, ...) or forward-mode differentiation: tensors made there must not be kept."""
    from torch.autograd import forward_ad

    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
