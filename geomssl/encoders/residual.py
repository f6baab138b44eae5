"""Residual networks: ONE definition whose convolution is a parameter (a Family), so that twins differ in nothing else."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from geomssl.encoders.base import Encoder, InputSettings, Normalise
from geomssl.encoders.cnn import admit, coordinate_channels, halve
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.errors import GeomsslError, GeomsslNote
from geomssl.transforms.base import Group
from geomssl.transforms.groups import CyclicRotations

# stem -> (kernel, stride, padding, whether a 3x3 max-pool of stride 2 follows)
STEMS = {"small": (3, 1, 1, False), "small-pad2": (3, 1, 2, False), "imagenet": (7, 2, 3, True)}


class Family(Protocol):
    """What the residual definition asks of a kind of convolution. Maps are (N, C, ..., H, W): what stands between the
    channels and the plane belongs to the family.
    """

    group: Group | None

    def conv(self, before: int, after: int, kernel: int, stride: int = 1, padding: int = 0, lifting: bool = False) -> nn.Module:
        """A convolution without bias from `before` to `after` fields; lifting: from images instead of maps."""

    def norm(self, width: int) -> nn.Module:
        """A normalisation of `width` fields that commutes with the group."""

    def fibres(self, maps: Tensor) -> Tensor:
        """The maps as fibres (N, C, G, H, W)."""

    def pool(self, fibres: Tensor) -> Tensor:
        """h (N, C) from the fibres."""


class Plain:
    """Ordinary convolution and BatchNorm; maps (N, C, H, W); h is the mean over space."""

    group: Group | None = None

    def conv(self, before: int, after: int, kernel: int, stride: int = 1, padding: int = 0, lifting: bool = False) -> nn.Module:
        conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        return conv

    def norm(self, width: int) -> nn.Module:
        return nn.BatchNorm2d(width)

    def fibres(self, maps: Tensor) -> Tensor:
        return maps.unsqueeze(2)

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))


class Turning:
    """Group convolution over quarter turns; maps (N, C, |G|, H, W); h is the maximum over G, then the mean over space.

    BatchNorm3d has one mean and one variance a field, over orientations and space, so it commutes also after training.
    """

    def __init__(self, group: Group) -> None:
        self.turns = group
        self.group: Group | None = group

    def conv(self, before: int, after: int, kernel: int, stride: int = 1, padding: int = 0, lifting: bool = False) -> nn.Module:
        return GroupConv2d(before, after, kernel, self.turns, lifting, stride, padding, bias=False)

    def norm(self, width: int) -> nn.Module:
        return nn.BatchNorm3d(width)

    def fibres(self, maps: Tensor) -> Tensor:
        return maps

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.amax(dim=2).mean(dim=(2, 3))


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut x), 3x3 convolutions (He et al. 2016, post-activation).

    A block of stride 2 strides in conv1 and in its 1x1 shortcut; with `halving` its input is averaged to half the size
    first and nothing strides.
    """

    def __init__(self, family: Family, before: int, after: int, stride: int, halving: bool) -> None:
        super().__init__()
        self.halves = halving and stride > 1
        step = 1 if halving else stride
        self.conv1, self.bn1 = family.conv(before, after, 3, step, 1), family.norm(after)
        self.conv2, self.bn2 = family.conv(after, after, 3, 1, 1), family.norm(after)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = nn.Sequential(family.conv(before, after, 1, step), family.norm(after))

    def forward(self, maps: Tensor) -> Tensor:
        if self.halves:
            maps = halve(maps)
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = self.bn1(self.conv1(maps)).relu()
        return (self.bn2(self.conv2(maps)) + shortcut).relu()


class PreactivationBlock(nn.Module):
    """conv2(relu(bn2(conv1 a))) + shortcut, a = relu(bn1(x)), 3x3 convolutions (He et al. 2016, as wide residual networks).

    The shortcut is x itself; where the number of fields or the stride changes it is a 1x1 convolution of a.
    """

    def __init__(self, family: Family, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1, self.conv1 = family.norm(before), family.conv(before, after, 3, stride, 1)
        self.bn2, self.conv2 = family.norm(after), family.conv(after, after, 3, 1, 1)
        self.downsample: nn.Module | None = None
        if stride > 1 or before != after:
            self.downsample = family.conv(before, after, 1, stride)

    def forward(self, maps: Tensor) -> Tensor:
        active = self.bn1(maps).relu()
        shortcut = maps if self.downsample is None else self.downsample(active)
        return self.conv2(self.bn2(self.conv1(active)).relu()) + shortcut


class ResidualSettings(InputSettings):
    """What the plain network and its twins have in common."""

    width: PositiveInt = Field(64, description="channels of the first stage of the plain network; they double every stage")
    blocks: tuple[PositiveInt, ...] = Field((2, 2, 2, 2), min_length=1, description="blocks of each stage")
    stem: Literal["small", "small-pad2", "imagenet"] = Field(
        "small", description="3x3; 3x3 with padding 2 (solo-learn's for CIFAR); or 7x7 of stride 2 and a max-pool"
    )
    zero_init_gamma: bool = Field(False, description="start each block as its shortcut (last BatchNorm weight zero)")


class ResNet(Encoder):
    """Stem, stages of basic blocks, no head. Stage k > 0 halves the maps; fibres (N, C, G, H', W'), C = widths[-1].

    Names of the weights are torchvision's (conv1, bn1, layer1.0.conv1, ..., layer2.0.downsample.0), for every family.
    """

    def __init__(
        self,
        in_channels: int,
        config: ResidualSettings,
        family: Family,
        widths: tuple[int, ...],
        downsample: Literal["stride", "halve"],
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        self.in_channels, self.dim, self.group = in_channels, widths[-1], family.group
        self.family, self.coordinates, self.downsampling = family, coordinates, downsample
        self._named, self._said = str(type(config).model_fields["name"].default), False
        self.normalise = Normalise.of(config, in_channels)
        self.kernel, self.stride, self.padding, self.max_pools = STEMS[config.stem]
        halving = downsample == "halve"
        step = 1 if halving else self.stride
        channels = in_channels + 2 * coordinates
        self.conv1 = family.conv(channels, widths[0], self.kernel, step, self.padding, lifting=True)
        self.bn1 = family.norm(widths[0])
        before = widths[0]
        for stage, (blocks, width) in enumerate(zip(config.blocks, widths, strict=True)):
            layers: list[nn.Module] = []
            for block in range(blocks):
                layers.append(BasicBlock(family, before, width, 2 if stage and not block else 1, halving))
                before = width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.stages = len(widths)
        if config.zero_init_gamma:
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    nn.init.zeros_(module.bn2.weight)  # type: ignore[arg-type]

    def fibres(self, images: Tensor) -> Tensor:
        maps = self.normalise(admit(images, self.in_channels))
        if self.group is not None and not self._said:
            remedy = "or downsample = halve, exact at every size"
            self._said = note_inexact(self._named, min(images.shape[2:]), self.grids_turn, remedy)
        if self.coordinates:
            maps = torch.cat([maps, coordinate_channels(maps)], dim=1)
        halving = self.downsampling == "halve"
        if halving and self.stride > 1:
            maps = halve(maps)
        maps = self.bn1(self.conv1(maps)).relu()
        if self.max_pools:
            maps = halve(max_pool(maps, 1)) if halving else max_pool(maps, 2)
        for stage in range(self.stages):
            maps = self.get_submodule(f"layer{stage + 1}")(maps)
        return self.family.fibres(maps)

    def pool(self, fibres: Tensor) -> Tensor:
        return self.family.pool(fibres)

    def grids_turn(self, size: int) -> bool:
        """Whether a quarter turn of size x size images takes the grid of every map to itself.

        True at every size with "halve". With "stride": where s divides H + 2p - k at every window of stride s, that is,
        H + 2 (p - (k - 1) / 2) = 1 modulo the total stride for every stem here.
        """
        if self.downsampling == "halve":
            return True
        return windows_turn(size, [(self.kernel, self.stride, self.padding)] + [(3, 2, 1)] * (self.max_pools + self.stages - 1))


class ResNet18(ResNet):
    """resnet18: (2, 2, 2, 2) basic blocks of 64, 128, 256, 512 channels; 11,168,832 weights on RGB with the 3x3 stem.

    The residual network of He et al. (2016) in its form for small images: 3x3 stem, no max-pool. Fibres
    (N, 512, 1, H/8, W/8); with stem "imagenet" H/32, and equal to torchvision's resnet18 without its fc.
    """

    class Config(ResidualSettings):
        name: Literal["resnet18"] = "resnet18"
        downsample: Literal["stride", "halve"] = Field("stride", description="by strided convolution, or by averaging first")
        coordinates: bool = Field(False, description="append two channels with the coordinates of each pixel, in [-1, 1]")

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        config = config or self.Config.model_validate({})
        widths = tuple(config.width * 2**stage for stage in range(len(config.blocks)))
        super().__init__(in_channels, config, Plain(), widths, config.downsample, config.coordinates)


class C4ResNet18(ResNet):
    """c4-resnet18: resnet18 with GroupConv2d over quarter turns.

    f(T_g x) = Γ_g f(x), Γ the regular action, for turns by 90 degrees, to rounding, also after training: with
    downsample "halve" of square images of every size, with "stride" where `grids_turn` (H = 1 mod 8 with the 3x3 stem, 1 mod
    32 with the 7x7). Each stage has width / 2 fields at four orientations where it matches resnet18 in the weights of every
    convolution after the stem (and spends 4 times its multiply-adds), width / 4 where it matches in multiply-adds (and
    has 1/4 of those weights). Fibres (N, C, 4, H/8, W/8); h is the maximum over orientations, then the mean over space.
    """

    class Config(ResidualSettings):
        name: Literal["c4-resnet18"] = "c4-resnet18"
        match: Literal["parameters", "multiply-adds"] = Field(
            "parameters", description="what equals that of resnet18 of the same width"
        )
        downsample: Literal["halve", "stride"] = Field(
            "halve", description="by averaging (exact at every size), or by strided convolution (exact at some)"
        )

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        config = config or self.Config.model_validate({})
        group = CyclicRotations(4)
        share = 2 if config.match == "parameters" else group.order
        if config.width % share:
            raise GeomsslError(
                f"encoder c4-resnet18: width = {config.width}", f"a multiple of {share}, to match {config.match}",
                str(max(share, round(config.width / share) * share)), reason="bad-value",
            )
        widths = tuple(config.width // share * 2**stage for stage in range(len(config.blocks)))
        super().__init__(in_channels, config, Turning(group), widths, config.downsample)


def max_pool(maps: Tensor, stride: int) -> Tensor:
    """Maximum over 3x3 windows of (N, ..., H, W), padded by one pixel."""
    return F.max_pool2d(maps.flatten(1, -3), 3, stride, 1).unflatten(1, maps.shape[1:-2])


def note_inexact(called: str, size: int, turns: Callable[[int], bool], remedy: str) -> bool:
    """Note that images of this side break quarter turns, with the nearest side that does not. Whether it was said."""
    if turns(size):
        return False
    good = min((s for s in range(2, 2 * size + 32) if turns(s)), key=lambda s: (abs(s - size), s))
    warnings.warn(
        f"encoder {called} at {size}x{size} is not exact under quarter turns: strides do not divide its maps; "
        f"the nearest exact size is {good} ({remedy.format(good=good)})", GeomsslNote, stacklevel=3,
    )
    return True


def windows_turn(size: int, windows: Sequence[tuple[int, int, int]]) -> bool:
    """Whether windows (kernel, stride, padding), one after the other, lie alike from both ends of `size` pixels."""
    for kernel, stride, padding in windows:
        if (size + 2 * padding - kernel) % stride:
            return False
        size = (size + 2 * padding - kernel) // stride + 1
    return True
