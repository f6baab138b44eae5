"""GroupConv2d over C4 against one plain conv2d of the same multiply-adds, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import Row, device, duel
from torch import nn

FIELDS = 16


def main() -> list[Row]:
    from geomssl.encoders import GroupConv2d
    from geomssl.transforms import CyclicRotations

    rows = []
    where = device()
    for size, batch, target in ((32, 32, "≥ 0.95"), (32, 128, "≥ 0.95"), (8, 8, "≥ 0.6")):
        layer = GroupConv2d(FIELDS, FIELDS, 3, CyclicRotations(4), padding=1, bias=False).to(where)
        plain = nn.Conv2d(4 * FIELDS, 4 * FIELDS, 3, padding=1, bias=False).to(where)
        x = torch.randn(batch, FIELDS, 4, size, size, device=where)
        flat = x.flatten(1, 2).clone()
        # the same training step for both: gradients to the weight and to the input
        rows.append(duel(
            f"C4 GroupConv2d, {FIELDS} fields, 3×3, {size}×{size}, batch {batch}", _step(layer, x, layer.weight),
            "conv2d of equal multiply-adds", _step(plain, flat, plain.weight),
            rounds=41 if size == 32 else 201, target=target, warm=5,
        ))
    return rows


def _step(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, weight: torch.Tensor) -> Callable[[], None]:
    x = x.requires_grad_(True)
    cotangent = torch.randn_like(layer(x))

    def step() -> None:
        torch.autograd.grad(layer(x), (x, weight), cotangent)

    return step
