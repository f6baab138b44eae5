"""GroupConv2d: convolution over a finite group of turns and mirrors, as one ordinary convolution with expanded filters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.encoders.expanded import Expanded
from geomssl.errors import GeomsslError
from geomssl.transforms.base import Group
from geomssl.transforms.groups import CyclicRotations, Dihedral


class GroupConv2d(Expanded):
    """Convolution on the plane's quarter turns (p4) and, with Dihedral(4), mirrors (p4m), Cohen and Welling (2016).

    [f * w](o, g, u) = b(o) + sum_{c, k, v} f(c, k, u + v) [Γ_g w](o, c, k, v), Γ_g w the regular action on the filter, so
    that (Γ_h f) * w = Γ_h (f * w). With `lifting` the input has no orientation axis and Γ_g w turns the filter alone.

    Input (N, C, H, W) with lifting, else (N, C, |G|, H, W); output (N, C', |G|, H', W'). weight (C', C, 1 or |G|, k, k),
    bias (C',), the same at every orientation. The filters of all orientations are one gather from the weight and meet
    the input in one conv2d; how long they are kept, see Expanded.

    Exact where u + v and the grid turn into themselves: stride 1 at every size; stride s where (H + 2 padding - k) is a
    multiple of s. padding: pixels on each side, or "same" for odd kernels. padding_mode "zeros" or "circular".
    Raises GeomsslError for another group, an even kernel with "same", and inputs of another shape.
    """

    bias: nn.Parameter | None
    index: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        group: Group,
        lifting: bool = False,
        stride: int = 1,
        padding: int | Literal["same"] = 0,
        bias: bool = True,
        padding_mode: Literal["zeros", "circular"] = "zeros",
    ) -> None:
        super().__init__()
        if group not in (CyclicRotations(4), Dihedral(4)):
            raise GeomsslError(
                f"GroupConv2d over {getattr(group, 'name', group)}", "CyclicRotations(4) or Dihedral(4)",
                reason="bad-group",
            )
        if padding == "same" and kernel_size % 2 == 0:
            raise GeomsslError(
                f'GroupConv2d with kernel_size {kernel_size} and padding "same"',
                "an odd kernel, or a number of pixels: an even one cannot be padded alike on both sides",
            )
        if padding_mode not in ("zeros", "circular"):
            raise GeomsslError(f"padding_mode {padding_mode!r}", 'one of "zeros", "circular"')
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel_size
        self.group, self.order, self.lifting, self.stride = group, int(group.fibre), lifting, stride
        self.padding = (kernel_size - 1) // 2 if padding == "same" else int(padding)
        self.padding_mode = padding_mode
        depth = 1 if lifting else self.order
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, depth, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.register_buffer("index", filter_index(group, kernel_size, lifting), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation: weights N(0, 2 / fan_in), fan_in = C k k and times |G| after lifting; bias zero."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / math.prod(self.weight.shape[1:])))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def expand(self, weight: Tensor) -> Tensor:
        """The filters of all orientations, (C' |G|, C, k, k) with lifting, else (C' |G|, C |G|, k, k)."""
        turned = weight.flatten(2).index_select(2, self.index.flatten())  # for every g in turn: Γ_g w
        turned = turned.unflatten(2, self.index.shape)
        size = (self.kernel_size, self.kernel_size)
        return turned.transpose(1, 2).reshape(self.out_channels * self.order, -1, *size)

    def collect(self, filters: Tensor) -> Tensor:
        # Each orientation permutes the numbers of the weight, so the transpose turns each filter back.
        back = self.index.argsort(dim=1)
        turned = filters.reshape(self.out_channels, self.order, self.in_channels, -1)
        found = turned.gather(3, back.view(1, self.order, 1, -1).expand_as(turned)).sum(dim=1)
        return found.reshape(self.weight.shape)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GroupConv2d:
        """Moves and casts of the weight as a 4-D tensor: PyTorch's channels-last format knows no other."""
        return super()._apply(lambda t: fn(t.flatten(1, 2)).unflatten(1, t.shape[1:3]) if t.dim() == 5 else fn(t), recurse)

    def forward(self, features: Tensor) -> Tensor:
        expected = (self.in_channels,) if self.lifting else (self.in_channels, self.order)
        if features.dim() != len(expected) + 3 or tuple(features.shape[1:-2]) != expected:
            raise GeomsslError(
                f"features {tuple(features.shape)} for GroupConv2d", f"(N, {', '.join(map(str, expected))}, H, W)",
                reason="bad-features",
            )
        flat = features.flatten(1, -3)
        padding = self.padding
        if self.padding_mode == "circular" and padding:
            flat, padding = F.pad(flat, (padding,) * 4, mode="circular"), 0
        bias = None if self.bias is None else self.bias.repeat_interleave(self.order)
        out = F.conv2d(flat, self.filters(), bias, self.stride, padding)
        return out.unflatten(1, (self.out_channels, self.order))

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, group={self.group.name}, "
            f"lifting={self.lifting}, stride={self.stride}, padding={self.padding}, padding_mode={self.padding_mode}"
        )


def filter_index(group: Group, kernel_size: int, lifting: bool) -> Tensor:
    """Where each entry of Γ_g w comes from in w: (|G|, (1 or |G|) k k), from the group's own action on an array of indices."""
    depth = 1 if lifting else int(group.fibre)
    places = torch.arange(depth * kernel_size**2, dtype=torch.float64).view(1, 1, depth, kernel_size, kernel_size)
    places = places.expand(int(group.fibre), -1, -1, -1, -1)
    turned = group(places[:, :, 0], group.elements()) if lifting else group.act(places, group.elements())
    return turned.reshape(int(group.fibre), -1).round().long()
