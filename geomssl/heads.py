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


def predictor(width: int, hidden: int) -> nn.Sequential:
    """What predicts one view's projection (N, width) from the other's: Linear, BatchNorm, ReLU, Linear with a bias.

    BYOL's and SimSiam's; the last layer has no norm. Grill et al. 2020; Chen and He 2021.
    """
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )


def regressor(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers with biases of those widths (input first), LayerNorm and ReLU after each but the last: C3's predictor.

    No row meets another, so a regressor needs no rows of other processes.
    """
    layers: list[nn.Module] = []
    for inward, outward in pairwise(widths[:-1]):
        layers += [nn.Linear(inward, outward), nn.LayerNorm(outward), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))
