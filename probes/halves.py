"""The spread of an estimate where a bootstrap is wrong: its range over random halves of the images, none of them twice."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from geomssl.artifact import Interval
from geomssl.probes.streaming import Triangle, triangle
from geomssl.seeding import generator

# Many images are dealt to this many groups once, and a half is half of the groups: one pass over the rows serves all halves.
GROUPS = 16
FEWEST = 4


def halves(features: Tensor, draws: int, seed: int, purpose: str) -> Iterator[Triangle]:
    """`draws` random halves of the rows of features (n, d), without replacement, as factors. None for fewer than four rows.

    Where n is large against d, rows are dealt to 16 groups at random and a half is eight of them, so that all draws together
    read the features once more and no more.
    """
    n, d = features.shape
    if n < FEWEST or draws == 0:
        return
    if n + draws * GROUPS // 2 * d >= draws * (n // 2):
        for draw in range(draws):
            yield triangle(features, torch.randperm(n, generator=generator(seed, purpose, draw))[: n // 2])
        return
    dealt = torch.randperm(n, generator=generator(seed, purpose)).tensor_split(GROUPS)
    groups = [triangle(features, rows.sort().values) for rows in dealt]
    for draw in range(draws):
        half = Triangle()
        for k in torch.randperm(GROUPS, generator=generator(seed, purpose, draw))[: GROUPS // 2].tolist():
            half.merge(groups[k])
        yield half


def mean(draws: list[float]) -> float | None:
    return sum(draws) / len(draws) if draws else None


def around(value: float, draws: list[float], most: float) -> Interval | None:
    """The spread of the halves about their own mean, laid around the value, within [0, most].

    A half drawn without replacement differs from the whole about as much as the whole differs from the population, since
    var(half) - var(whole) = var(whole). A bootstrap would repeat rows, and repeated rows lower every rank.
    """
    centre = mean(draws)
    if centre is None:
        return None
    low, high = (max(0.0, min(float(most), value - d)) for d in (max(draws) - centre, min(draws) - centre))
    return Interval(
        min(low, value), max(high, value),
        f"range over {len(draws)} random halves of the images, without replacement, centred on the value",
    )
