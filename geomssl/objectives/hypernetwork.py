"""From the parameters of a transformation to the linear map that it is on a representation, for SIE (row X3)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from geomssl.heads import regressor
from geomssl.transforms.base import Parameter


class Code(nn.Module):
    """Parameters (N, P) in their own units as numbers (N, Q) of the order of one, 0 where a parameter is its identity.

    continuous  (value - identity) / largest distance from the identity within its range
    pixels      without a range: value / side of the image; a height or width of 0 stands for the whole side, and the
                code of a height or width is value / side - 1
    periodic    cos - 1 and sin of the turn from its identity, so that the two ends of the range have one code
    binary      0 or 1
    """

    def __init__(self, parameters: tuple[Parameter, ...], size: int) -> None:
        super().__init__()
        self.described, self.size = parameters, size
        self.width = sum(2 if p.kind == "periodic" else 1 for p in parameters)

    def forward(self, params: Tensor) -> Tensor:
        columns = []
        for parameter, value in zip(self.described, params.unbind(dim=1), strict=True):
            columns += self._columns(parameter, value)
        return torch.stack(columns, dim=1)

    def _columns(self, parameter: Parameter, value: Tensor) -> list[Tensor]:
        moved = value - parameter.identity
        if parameter.kind == "periodic":
            turn = 2 * math.pi * moved / (parameter.high - parameter.low)
            return [turn.cos() - 1, turn.sin()]
        reach = max(parameter.high - parameter.identity, parameter.identity - parameter.low)
        if math.isfinite(reach):
            return [moved / reach if reach > 0 else moved]
        if parameter.low == 0:
            return [torch.where(value == 0, 0.0, value / self.size - 1)]
        return [moved / self.size]


class HyperNetwork(nn.Module):
    """z -> M(g) z, M(g) (N, width, width) = I + net(code(g)), one linear map for each example.

    net: Linear to `hidden`, LayerNorm, ReLU, Linear to width² numbers, or one Linear with hidden 0. Its last layer starts
    near zero, so that an untrained map is close to the identity. The map sees g alone, never the image, and is linear in
    z without an offset: what g does to the equivariant half must be the same for every image.
    Source: Garrido et al., Self-supervised learning of Split Invariant Equivariant representations, 2023.
    """

    def __init__(self, code: Code, width: int, hidden: int) -> None:
        super().__init__()
        self.code, self.width = code, width
        self.net = regressor((code.width, *((hidden,) if hidden else ()), width**2))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.1 / math.sqrt(width * last.in_features))
        nn.init.zeros_(last.bias)

    def maps(self, params: Tensor) -> Tensor:
        """M(g), (N, width, width)."""
        change = self.net(self.code(params)).unflatten(1, (self.width, self.width))
        return change + torch.eye(self.width, dtype=change.dtype, device=change.device)

    def forward(self, z: Tensor, params: Tensor) -> Tensor:
        """M(g_i) z_i, (N, width)."""
        return (self.maps(params) @ z.unsqueeze(2)).squeeze(2)
