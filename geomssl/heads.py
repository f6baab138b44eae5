"""Heads that stand on an encoder during training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], last_norm: bool = True) -> nn.Sequential:
    """Linear layers of those widths (input first), BatchNorm after each, ReLU between: row H6's head, C1's projector.

    No layer has a bias: a norm would remove it, and the linear projector W of Cosentino et al. (two widths,
    last_norm False) has none.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (inward, outward) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inward, outward, bias=False))
        if i < last or last_norm:
            layers.append(nn.BatchNorm1d(outward))
        if i < last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)
