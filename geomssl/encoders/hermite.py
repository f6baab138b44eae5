"""HermiteConv2d: convolution at several scales or turns, with filters that are sums of fixed Hermite-Gaussian functions."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.encoders.expanded import Expanded
from geomssl.errors import GeomsslError


def hermite(order: int, x: Tensor) -> Tensor:
    """Probabilists' Hermite polynomial He_n(x): He_0 = 1, He_1 = x, He_(n+1) = x He_n - n He_(n-1)."""
    before, now = torch.zeros_like(x), torch.ones_like(x)
    for n in range(order):
        before, now = now, x * now - n * before
    return now


def hermite_basis(size: int, orders: int, scales: tuple[float, ...] = (1.0,), turns: int = 1) -> Tensor:
    """The multi-scale basis "type A" of Sosnovik et al. (2020), float64 (F, G, size, size), F = orders^2, G = scales or turns.

        psi_nm(s; y, x) = phi_n(y, s) phi_m(x, s),   phi_n(t, s) = He_n(t / s) exp(-t^2 / 2 s^2) / s,   0 <= n, m < orders

    t in pixels from the centre. F runs over n, then m. Scale s stands on the largest odd window of at most size s / max(s)
    pixels, rounded up to odd, and on zeros outside. Every function is divided, at all scales, by its norm at the smallest
    scale. With `turns` = 4 the second axis holds the functions of the one scale turned by 0, 90, 180, 270 degrees
    anticlockwise. A filter of one pixel is the number 1 everywhere. Raises GeomsslError for an even size, for one that leaves
    the smallest scale a single pixel, and for turns with scales.
    """
    if size < 1 or size % 2 == 0:
        raise GeomsslError(f"a Hermite basis on {size} pixels", "an odd number of pixels", str(size + 1), reason="bad-value")
    if turns not in (1, 4) or (turns > 1 and len(scales) > 1):
        raise GeomsslError(
            f"a Hermite basis of {len(scales)} scales and {turns} turns", "several scales, or one scale at 1 or 4 turns",
            reason="bad-value",
        )
    if size == 1:
        return torch.ones(orders**2, max(turns, len(scales)), 1, 1, dtype=torch.float64, device="cpu")
    basis = torch.stack([_at_one_scale(size, orders, scale, max(scales)) for scale in scales], dim=1)
    norm = basis[:, [scales.index(min(scales))]].square().sum(dim=(2, 3), keepdim=True).sqrt()
    if not bool((norm > 0).all()):
        ratio = max(scales) / min(scales)
        raise GeomsslError(
            f"filters of {size} pixels for scales up to {ratio:.3g} times the smallest, which gets a single pixel",
            "larger filters", str(2 * math.ceil(ratio) + 1), reason="bad-value",
        )
    basis = basis / norm
    return torch.cat([basis.rot90(k, (2, 3)) for k in range(turns)], dim=1)


def _at_one_scale(size: int, orders: int, scale: float, largest: float) -> Tensor:
    window = int(size * scale / largest) // 2 * 2 + 1
    t = torch.arange(window, dtype=torch.float64, device="cpu") - window // 2
    bell = torch.exp(-t.square() / (2 * scale**2)) / scale
    axis = torch.stack([hermite(n, t / scale) * bell for n in range(orders)])
    functions = (axis[:, None, :, None] * axis[None, :, None, :]).flatten(0, 1)
    return F.pad(functions, [(size - window) // 2] * 4)


class HermiteConv2d(Expanded):
    """Convolution without bias whose filters are w = sum_b a_b psi_b, one copy for each of G scales or quarter turns.

        lifting:        y(o, g, u) = sum_{c, v} x(c, u + v) w_g(o, c, v),               w_g = sum_b a(o, c, b) psi_b(g, v)
        mixing "none":  y(o, g, u) = sum_{c, v} x(c, g, u + v) w_g(o, c, v)             no sum over scales or turns
        mixing "full":  y(o, g, u) = sum_{c, h, v} x(c, h, u + v) w_g(o, c, g^-1 h, v)  a group convolution

    group "translation": one scale, G = 1; "rotation": G = 4, element k turns by 90 k degrees anticlockwise, g^-1 h = h - g
    mod 4; "scale": G factors in the order of `scales`, g^-1 h = h - g places up the list, and what lies above the largest
    scale counts as zero (interscale interaction of SESN). Only "translation" has nothing to mix.
    Input (N, C, H, W) with lifting, else (N, C, G, H, W); output (N, C', G, H', W'). In memory G stands before C: all filters
    meet the input in ONE conv2d, of groups = G without mixing, and nothing is copied between such layers. weight (C', C, F),
    or (C', C, G, F) with full mixing, F = orders^2; how long the filters are kept, see Expanded. Sources: SESN of
    Sosnovik et al. (2020); Keller et al. (2022) for turns.
    """

    basis: Tensor
    relative: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        orders: int,
        group: Literal["translation", "rotation", "scale"] = "translation",
        scales: tuple[float, ...] = (1.0,),
        lifting: bool = False,
        stride: int = 1,
        padding: int = 0,
        mixing: Literal["none", "full"] = "none",
    ) -> None:
        super().__init__()
        scales = tuple(scales) if group == "scale" else (1.0,)
        basis = hermite_basis(kernel_size, orders, scales, 4 if group == "rotation" else 1)
        self.in_channels, self.out_channels, self.kernel_size, self.orders = in_channels, out_channels, kernel_size, orders
        self.group, self.scales, self.places = group, scales, basis.shape[1]
        self.lifting, self.stride, self.padding = lifting, stride, padding
        self.mixing = "none" if lifting or self.places == 1 else mixing
        shape: tuple[int, ...] = (out_channels, in_channels, orders**2)
        if self.mixing == "full":
            shape = (out_channels, in_channels, self.places, orders**2)
            self.register_buffer("relative", _relative(self.places, group == "rotation"), persistent=False)
        self.weight = nn.Parameter(torch.empty(shape))
        # (G, F, k k): one product with the weight gives the filters in the order in which conv2d wants them.
        self.register_buffer("basis", basis.flatten(2).transpose(0, 1).contiguous().to(self.weight), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """He's initialisation of the coefficients: N(0, 2 / fan_in), fan_in = C F, and times G with full mixing."""
        nn.init.normal_(self.weight, std=math.sqrt(2 / self.weight[0].numel()))

    def expand(self, weight: Tensor) -> Tensor:
        """The filters (G C', C, k, k), or (G C', G C, k, k) with full mixing."""
        side = (self.kernel_size, self.kernel_size)
        flat = weight.flatten(0, -2)
        # (G, C' C [G], k k). Not matmul, which takes a way eight times slower for a weight that requires a gradient.
        filters = torch.bmm(flat.expand(self.places, *flat.shape), self.basis)
        if self.mixing == "full":
            filters = filters.view(self.places, self.out_channels, self.in_channels, self.places, -1)
            filters = torch.einsum("gocrk,ghr->gohck", filters, self.relative)
        return filters.reshape(self.places * self.out_channels, -1, *side)

    def collect(self, filters: Tensor) -> Tensor:
        if self.mixing == "full":
            shape = (self.places, self.out_channels, self.places, self.in_channels, self.kernel_size**2)
            filters = torch.einsum("gohck,ghr->gocrk", filters.reshape(shape), self.relative)
        filters = filters.reshape(self.places, -1, self.kernel_size**2)
        found = torch.mm(self.basis[0], filters[0].T)
        for place in range(1, self.places):
            found = torch.addmm(found, self.basis[place], filters[place].T)
        return found.T.reshape(self.weight.shape)

    def forward(self, features: Tensor) -> Tensor:
        expected = (self.in_channels,) if self.lifting else (self.in_channels, self.places)
        if features.dim() != len(expected) + 3 or tuple(features.shape[1:-2]) != expected:
            raise GeomsslError(
                f"features {tuple(features.shape)} for HermiteConv2d over {self.group}",
                f"(N, {', '.join(map(str, expected))}, H, W)", reason="bad-features",
            )
        flat = features if self.lifting else fibres_first(features)
        groups = 1 if self.lifting or self.mixing == "full" else self.places
        out = F.conv2d(flat, self.filters(), None, self.stride, self.padding, groups=groups)
        return channels_first(out, self.places)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, orders={self.orders}, "
            f"group={self.group}, lifting={self.lifting}, stride={self.stride}, padding={self.padding}, mixing={self.mixing}"
        )


def fibres_first(maps: Tensor) -> Tensor:
    """(N, C, G, H, W) as (N, G C, H, W): no copy where G stands before C in memory."""
    return maps.movedim(2, 1).flatten(1, 2)


def channels_first(maps: Tensor, places: int) -> Tensor:
    """(N, G C, H, W) as (N, C, G, H, W), without a copy."""
    return maps.unflatten(1, (places, -1)).movedim(1, 2)


def _relative(places: int, wraps: bool) -> Tensor:
    """One where g^-1 h = r, (g, h, r): h - g around the circle, or up the list and nothing beyond its ends."""
    found = torch.zeros(places, places, places)
    for g in range(places):
        for h in range(places):
            if wraps or h >= g:
                found[g, h, (h - g) % places] = 1
    return found
