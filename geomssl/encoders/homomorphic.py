"""The backbones of Homomorphic SSL: the same networks over shifts, quarter turns or scales, and a control without structure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from geomssl.encoders.base import Encoder, InputSettings, Normalise
from geomssl.encoders.cnn import admit
from geomssl.encoders.hermite import HermiteConv2d, channels_first, fibres_first
from geomssl.encoders.residual import Family, PreactivationBlock, note_inexact, windows_turn
from geomssl.errors import GeomsslError
from geomssl.transforms.base import Group
from geomssl.transforms.groups import CyclicRotations, Scales

SCALES = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)

Structure = Literal["translation", "rotation", "scale", "none"]
Mixing = Literal["none", "full"]


class FibreNorm(nn.BatchNorm2d):
    """BatchNorm of (N, C, G, H, W) with one mean and one variance a field, over G and space; in memory G stands before C."""

    def forward(self, maps: Tensor) -> Tensor:
        first = maps.movedim(2, 1)
        return super().forward(first.flatten(0, 1)).view(first.shape).movedim(1, 2)


class Steered:
    """HermiteConv2d over shifts (G = 1), quarter turns (4) or scales; maps (N, C, G, H, W), G before C in memory.

    What asks for a k x k filter gets k orders a direction on max(k, kernel_size) pixels, padded to the same size of map.
    """

    def __init__(
        self,
        structure: Literal["translation", "rotation", "scale"],
        mixing: Mixing,
        scales: tuple[float, ...],
        kernel_size: int,
    ) -> None:
        self.group: Group | None = CyclicRotations(4) if structure == "rotation" else None
        self.structure, self.mixing, self.scales, self.kernel_size = structure, mixing, scales, kernel_size

    def conv(self, before: int, after: int, kernel: int, stride: int = 1, padding: int = 0, lifting: bool = False) -> nn.Module:
        size = support(kernel, self.kernel_size)
        return HermiteConv2d(
            before, after, size, kernel, self.structure, self.scales, lifting, stride, padding + (size - kernel) // 2,
            self.mixing,
        )

    def norm(self, width: int) -> nn.Module:
        return FibreNorm(width)

    def fibres(self, maps: Tensor) -> Tensor:
        return maps

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.amax(dim=2).mean(dim=(2, 3))


class FreeConv2d(nn.Conv2d):
    """An ordinary convolution of G C fields read as (N, C, G, H, W); from images with lifting."""

    def __init__(
        self, before: int, after: int, kernel: int, places: int, stride: int, padding: int, lifting: bool, mixing: Mixing
    ) -> None:
        groups = 1 if lifting or mixing == "full" else places
        fields = before if lifting else places * before
        super().__init__(fields, places * after, kernel, stride, padding, groups=groups, bias=False)
        self.places, self.lifting = places, lifting
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, maps: Tensor) -> Tensor:
        return channels_first(super().forward(maps if self.lifting else fibres_first(maps)), self.places)


class FreeNorm(nn.BatchNorm2d):
    """BatchNorm of each of the G C fields of (N, C, G, H, W) for itself."""

    def __init__(self, width: int, places: int) -> None:
        super().__init__(places * width)
        self.places = places

    def forward(self, maps: Tensor) -> Tensor:
        return channels_first(super().forward(fibres_first(maps)), self.places)


class Free:
    """The control of Table 2: filters with every weight of their own, G times the fields, nothing shared between fibres.

    mixing "none": G networks side by side, as the steered one keeps its fibres apart; "full": one network of G C fields.
    """

    group: Group | None = None

    def __init__(self, places: int, mixing: Mixing, kernel_size: int) -> None:
        self.places, self.mixing, self.kernel_size = places, mixing, kernel_size

    def conv(self, before: int, after: int, kernel: int, stride: int = 1, padding: int = 0, lifting: bool = False) -> nn.Module:
        size = support(kernel, self.kernel_size)
        return FreeConv2d(before, after, size, self.places, stride, padding + (size - kernel) // 2, lifting, self.mixing)

    def norm(self, width: int) -> nn.Module:
        return FreeNorm(width, self.places)

    def fibres(self, maps: Tensor) -> Tensor:
        return maps

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.amax(dim=2).mean(dim=(2, 3))


def support(kernel: int, kernel_size: int) -> int:
    """Pixels of a filter of effective size `kernel`: at least kernel_size, but for one of a single pixel."""
    return 1 if kernel == 1 else max(kernel, kernel_size)


class HomomorphicSettings(InputSettings):
    """What the three backbones have in common."""

    group: Structure = Field("rotation", description="what acts on the fibres; none: the control")
    mixing: Mixing = Field("none", description="full: layers after the first sum over turns or scales too; none: the reference")
    scales: tuple[float, ...] = Field(SCALES, min_length=2, description="factors of group scale, the smallest filters first")
    fibres: PositiveInt = Field(6, description="fibres as which the control (group none) reads its channels")
    kernel_size: PositiveInt = Field(7, description="pixels of the filters, odd; their effective size stays")

    @field_validator("scales")
    @classmethod
    def _scales(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or value[0] <= 0 or 1.0 not in value:
            raise GeomsslError(
                f"scales = {list(value)}", "growing positive factors with 1.0 among them, such as 1.0, 1.25, 1.5",
                reason="bad-value",
            )
        return value

    @field_validator("kernel_size")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise GeomsslError(f"kernel_size = {value}", "an odd number", str(value + 1), reason="bad-value")
        return value


class Homomorphic(Encoder):
    """Images, resampled to `size` x `size`, to fibres z (N, C, G, H', W') and h (N, C).

    structure: "translation" (G = 1, the fibres are the places), "rotation" (G = 4, element k turned by 90 k degrees),
            "scale" (one fibre a factor, in the order of `scales`), or "none" (G = `fibres`, no structure).
    scales: the Scales whose factors stand on axis G, or None. It acts in part, by matched factors, and is no group.
    exact:  f(T_g x) = Γ_g f(x) for every quarter turn, to rounding, at this size: rotation on a grid that turns into itself.
            Said once, with the nearest size that is exact, where it is not. Resampling square images to `size` commutes
            with quarter turns, so exactness is a matter of `size`, not of the images.
    """

    windows: Sequence[tuple[int, int, int]]

    def __init__(self, in_channels: int, config: HomomorphicSettings, size: int | None, width: int) -> None:
        super().__init__()
        self.in_channels, self.dim, self.size, self.structure = in_channels, width, size, config.group
        self._named = str(type(config).model_fields["name"].default)
        self.family: Family = (
            Free(config.fibres, config.mixing, config.kernel_size)
            if config.group == "none"
            else Steered(config.group, config.mixing, config.scales, config.kernel_size)
        )
        self.group = self.family.group
        self.scales = Scales(config.scales) if config.group == "scale" else None
        self.normalise = Normalise.of(config, in_channels)
        self._said = False

    def grids_turn(self, size: int) -> bool:
        """Whether a quarter turn of size x size images takes the grid of every map to itself."""
        return windows_turn(size, self.windows)

    @property
    def exact(self) -> bool:
        return self.structure == "rotation" and self.size is not None and self.grids_turn(self.size)

    def sized(self, images: Tensor) -> Tensor:
        """Normalised images of size x size; smoothed first where they shrink. A size left open leaves them as they are."""
        images = self.normalise(admit(images, self.in_channels))
        size = self.size or min(images.shape[2:])
        self._say(size)
        if self.size is None or images.shape[2:] == (size, size):
            return images
        shrinks = max(images.shape[2:]) > size
        return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False, antialias=shrinks)

    def _say(self, size: int) -> None:
        if not self._said and self.structure == "rotation":
            self._said = note_inexact(self._named, size, self.grids_turn, "encoder.size={good}")


class HSSLMNIST(Homomorphic):
    """hssl-mnist: three convolutions of effective sizes 11, 3, 3 on 11, 7, 7 pixels, strides 1, 2, 2; BatchNorm, ReLU.

    z (N, 128, G, 8, 8) at sizes 29 to 32, of which 29 is exact under quarter turns (H = 1 mod 4). h is the maximum over G,
    then the mean over space (readout "mean"); or, "conv", the paper's classifier: one more convolution of effective size 3
    on 7 pixels, stride 2, no padding, to 1x1, then the maximum. It learns from a loss on h, or, where the objective has
    none (hssl, frozen), from the online classifier: h has then seen labels. Source: Keller et al. (2022), App. B.
    """

    class Config(HomomorphicSettings):
        name: Literal["hssl-mnist"] = "hssl-mnist"
        widths: tuple[PositiveInt, PositiveInt, PositiveInt] = Field((32, 64, 128), description="fields of the layers")
        size: PositiveInt | None = Field(29, description="side to which images are resampled first")
        readout: Literal["mean", "conv"] = Field("mean", description="h from z: pooled; or a convolution first, then pooled")

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        config = config or self.Config.model_validate({})
        super().__init__(in_channels, config, config.size, config.widths[-1])
        family = self.family
        layers = ((11, 1, 5), (3, 2, 1), (3, 2, 1))
        self.windows = layers
        self.convs = nn.ModuleList(
            family.conv(before, after, *layer, lifting=stage == 0)
            for stage, ((before, after), layer) in enumerate(zip(pairwise((in_channels, *config.widths)), layers, strict=True))
        )
        self.norms = nn.ModuleList(family.norm(width) for width in config.widths)
        # No padding: what the wider support adds on each side is taken off again.
        outside = -((support(3, config.kernel_size) - 3) // 2)
        self.readout = family.conv(self.dim, self.dim, 3, 2, outside) if config.readout == "conv" else None

    def fibres(self, images: Tensor) -> Tensor:
        maps = self.sized(images)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps = norm(conv(maps)).relu()
        return self.family.fibres(maps)

    def pool(self, fibres: Tensor) -> Tensor:
        return self.family.pool(fibres if self.readout is None else self.readout(fibres))


class ResidualSettings(HomomorphicSettings):
    """What the two residual backbones have in common."""

    stem: tuple[PositiveInt, PositiveInt] = Field((9, 64), description="fields of the lifting layer and of the one after it")


class HomomorphicResNet(Homomorphic):
    """Lifting layer of effective size 7, one of 3, BatchNorm, ReLU, then stages of pre-activation blocks; stage k > 0 strides.

    All filters stand on 7 pixels. z is the sum that the last block leaves, with no norm and no ReLU after it; h is the mean
    over space of relu(BatchNorm(max over G of z)), as the paper's classifier reads it. BatchNorm pools its statistics over G.
    """

    def __init__(
        self, in_channels: int, config: ResidualSettings, widths: Sequence[int], blocks: Sequence[int], size: int | None
    ) -> None:
        if len(blocks) != len(widths):
            raise GeomsslError(
                f"blocks = {list(blocks)} for {len(widths)} stages", f"{len(widths)} numbers of blocks", reason="bad-value"
            )
        super().__init__(in_channels, config, size, widths[-1])
        family = self.family
        self.windows = [(7, 1, 3), (3, 1, 1)] + [(3, 1 if stage == 0 else 2, 1) for stage in range(len(widths))]
        first, before = config.stem
        self.lift = family.conv(in_channels, first, 7, 1, 3, lifting=True)
        self.conv1, self.bn1 = family.conv(first, before, 3, 1, 1), family.norm(before)
        stages = []
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            layers = []
            for block in range(count):
                layers.append(PreactivationBlock(family, before, width, 2 if stage and not block else 1))
                before = width
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(self.dim)

    def fibres(self, images: Tensor) -> Tensor:
        maps = self.bn1(self.conv1(self.lift(self.sized(images)))).relu()
        return self.family.fibres(self.stages(maps))

    def pool(self, fibres: Tensor) -> Tensor:
        return self.norm(fibres.amax(dim=2)).relu().mean(dim=(2, 3))


class HSSLCIFAR10(HomomorphicResNet):
    """hssl-cifar10: three stages of 128, 256, 512 fields, three blocks each, strides 1, 2, 2.

    z (N, 512, G, 7, 7) at sizes 25 to 28, of which 25 is exact under quarter turns (H = 1 mod 4). Source: Keller et al. (2022).
    """

    class Config(ResidualSettings):
        name: Literal["hssl-cifar10"] = "hssl-cifar10"
        widths: tuple[PositiveInt, ...] = Field((128, 256, 512), min_length=1, description="fields of the stages")
        blocks: tuple[PositiveInt, ...] = Field((3, 3, 3), min_length=1, description="blocks of each stage")
        size: PositiveInt | None = Field(25, description="side to which images are resampled first")

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        config = config or self.Config.model_validate({})
        super().__init__(in_channels, config, config.widths, config.blocks, config.size)


class HSSLTiny(HomomorphicResNet):
    """hssl-tiny: four stages of 64, 128, 256, 512 fields, two blocks each, strides 1, 2, 2, 2.

    z (N, 512, G, 4, 4) at sizes 25 to 32, of which 25 is exact under quarter turns (H = 1 mod 8). Source: Keller et al. (2022).
    """

    class Config(ResidualSettings):
        name: Literal["hssl-tiny"] = "hssl-tiny"
        widths: tuple[PositiveInt, ...] = Field((64, 128, 256, 512), min_length=1, description="fields of the stages")
        blocks: tuple[PositiveInt, ...] = Field((2, 2, 2, 2), min_length=1, description="blocks of each stage")
        size: PositiveInt | None = Field(25, description="side to which images are resampled first")

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        config = config or self.Config.model_validate({})
        super().__init__(in_channels, config, config.widths, config.blocks, config.size)
