"""The bootstrap itself: sums over resampled rows, and percentiles of what was drawn. What is done with them is its user's."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.seeding import generator

# Resamples in one block, and the bytes that its counts may take.
ROWS, BYTES = 256, 2**26


def resampled_sums(values: Tensor, seed: int, resamples: int) -> Tensor:
    """Sums of the rows of values (n, k) over bootstrap resamples, float64 (resamples, k).

    sum_b = sum_i counts_bi values_i with counts_b multinomial(n; 1/n, ..., 1/n): a matrix product, block by block. Each
    block draws from its own generator, so that the draws depend on n, the seed and the number of the block alone.
    """
    n = len(values)
    if n < 2:
        raise GeomsslError(f"a bootstrap over {n} images", "at least 2", reason="too-few-images")
    if resamples < 1:
        raise GeomsslError(f"{resamples} resamples", "at least 1")
    values = values.detach().to("cpu", torch.float64)
    block = max(1, min(ROWS, BYTES // (8 * n)))
    sums = []
    for number, start in enumerate(range(0, resamples, block)):
        size = min(block, resamples - start)
        drawn = torch.randint(n, (block, n), generator=generator(seed, "bootstrap", number))[:size]
        counts = torch.zeros(size, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn))
        sums.append(counts @ values)
    return torch.cat(sums)


def interval(drawn: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Percentiles (1 - level) / 2 and (1 + level) / 2 of each column of drawn (resamples, k). NaN where a draw is NaN."""
    if not 0 < level < 1:
        raise GeomsslError(f"level {level}", "a level between 0 and 1, such as 0.95")
    # Four order statistics do not need a whole sort: partitioning is some ten times faster than torch.quantile.
    draws = drawn.detach().to("cpu", torch.float64).T.contiguous().numpy()
    places = [(1 + side * level) / 2 * (draws.shape[1] - 1) for side in (-1, 1)]
    ends = [(math.floor(place), math.ceil(place)) for place in places]
    sorted_there = np.partition(draws, sorted({end for pair in ends for end in pair}), axis=1)
    with np.errstate(invalid="ignore"):
        found = [
            sorted_there[:, below] + (sorted_there[:, above] - sorted_there[:, below]) * (place - below)
            for place, (below, above) in zip(places, ends, strict=True)
        ]
    known = ~np.isnan(draws).any(axis=1)
    low, high = (torch.from_numpy(np.where(known, values, np.nan)).to(drawn.device) for values in found)
    return low, high
