"""Two convolutional twins of three stages: plain convolutions, and the same with group convolutions over quarter turns."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from geomssl.config import Settings
from geomssl.encoders.base import Encoder, Normalise
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.errors import GeomsslError
from geomssl.transforms.groups import CyclicRotations


class CNN(Encoder):
    """Convolution 3x3 (padding 1, no bias), BatchNorm, ReLU, three times; between them the maps halve, rounding up.

    Fibres (N, C, 1, H/4, W/4), C = widths[-1]; h is their mean over space. It commutes with no turn, and with shifts by
    multiples of 4 pixels away from the border.
    """

    class Config(Settings):
        name: Literal["cnn"] = "cnn"
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = Field((32, 64, 128), description="channels of the stages")
        coordinates: bool = Field(False, description="append two channels with the coordinates of each pixel, in [-1, 1]")

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        super().__init__()
        config = config or self.Config.model_validate({})
        self.in_channels, self.dim, self.coordinates = in_channels, config.widths[-1], config.coordinates
        self.normalise = Normalise()
        widths = (in_channels + 2 * config.coordinates, *config.widths)
        convs = [nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in config.widths)

    def fibres(self, images: Tensor) -> Tensor:
        maps = self.normalise(admit(images, self.in_channels))
        if self.coordinates:
            maps = torch.cat([maps, coordinate_channels(maps)], dim=1)
        for stage, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            maps = norm(conv(halve(maps) if stage else maps)).relu()
        return maps.unsqueeze(2)

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))


class C4CNN(Encoder):
    """The twin of CNN with GroupConv2d over CyclicRotations(4): lifting first, then group to group.

    f(T_g x) = Γ_g f(x), Γ the regular action, for turns by 90 degrees of square images of every size, to rounding; also
    after training, since BatchNorm shares its statistics and its weights over the four orientations. Fibres
    (N, C, 4, H/4, W/4), C = widths[-1]; h is the maximum over orientations, then the mean over space, so it does not move.
    """

    class Config(Settings):
        name: Literal["c4-cnn"] = "c4-cnn"
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
            (16, 32, 128), description="channels of the stages, each at four orientations"
        )

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        super().__init__()
        config = config or self.Config.model_validate({})
        self.in_channels, self.dim, self.group = in_channels, config.widths[-1], CyclicRotations(4)
        self.normalise = Normalise()
        widths = (in_channels, *config.widths)
        self.convs = nn.ModuleList(
            GroupConv2d(a, b, 3, self.group, lifting=stage == 0, padding=1, bias=False)
            for stage, (a, b) in enumerate(pairwise(widths))
        )
        # BatchNorm3d reads (N, C, G, H, W): one mean and one variance a channel, over orientations and space.
        self.norms = nn.ModuleList(nn.BatchNorm3d(width) for width in config.widths)

    def fibres(self, images: Tensor) -> Tensor:
        maps = self.normalise(admit(images, self.in_channels))
        for stage, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            maps = norm(conv(halve(maps) if stage else maps)).relu()
        return maps

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.amax(dim=2).mean(dim=(2, 3))


def admit(images: Tensor, channels: int) -> Tensor:
    """The images, or a GeomsslError where they are not float (N, channels, H, W) of at least 2 by 2 pixels."""
    if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise GeomsslError(
            f"images {images.dtype} {tuple(images.shape)}", f"float (N, {channels}, H, W)", reason="bad-images"
        )
    if min(images.shape[2:]) < 2:
        raise GeomsslError(
            f"images of {images.shape[2]}x{images.shape[3]} pixels", "at least 2x2 pixels", reason="bad-images"
        )
    return images


def halve(maps: Tensor) -> Tensor:
    """Average pooling of (..., H, W) to ceil(H / 2), ceil(W / 2). Its windows lie alike from both ends, so it commutes with
    quarter turns and mirrors at every size, where stride 2 does so at odd sizes only.
    """
    lead, (height, width) = maps.shape[:-2], maps.shape[-2:]
    return F.adaptive_avg_pool2d(maps.flatten(1, -3), (-(-height // 2), -(-width // 2))).unflatten(1, lead[1:])


def coordinate_channels(images: Tensor) -> Tensor:
    """Two channels (N, 2, H, W): y from -1 (top) to 1 (bottom), x from -1 (left) to 1 (right)."""
    height, width = images.shape[2:]
    y = torch.linspace(-1, 1, height, dtype=images.dtype, device=images.device).view(1, -1, 1)
    x = torch.linspace(-1, 1, width, dtype=images.dtype, device=images.device).view(1, 1, -1)
    return torch.cat([y.expand(1, -1, width), x.expand(1, height, -1)]).expand(len(images), -1, -1, -1)
