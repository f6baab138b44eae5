"""How sure a figure is: percentile bootstrap over images, of a mean and of the root of a ratio of sums."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.seeding import generator

METHOD = "percentile bootstrap over images"
# Resamples in one block, and the bytes that its counts may take.
ROWS, BYTES = 256, 2**26


def bootstrap_ratio(
    numerators: Tensor, denominators: Tensor, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[Tensor, Tensor]:
    """Percentile interval of sqrt(sum_i numerator_i / sum_i denominator_i), images resampled with replacement.

    numerators, denominators (n, E), not negative: one row an image, one column a figure; the columns share their
    resamples. Returns (low, high), float64 (E,). Numerators that are all zero give [0, 0]; a column in which some
    resample has a zero denominator has no interval and gives NaN.
    Raises GeomsslError for fewer than two images, a level outside (0, 1) or no resamples. Efron and Tibshirani (1993), ch. 13.
    """
    if numerators.shape != denominators.shape or numerators.dim() != 2:
        raise GeomsslError(f"{tuple(numerators.shape)} over {tuple(denominators.shape)}", "two tensors (n, E)")
    values = torch.cat([numerators, denominators], dim=1)
    sums = resampled_sums(values, seed, resamples)
    above, below = sums.split(numerators.shape[1], dim=1)
    drawn = torch.where(below > 0, (above / below).clamp_(min=0), torch.nan).sqrt_()
    return interval(drawn, level)


def bootstrap_mean(values: Tensor, seed: int, level: float = 0.95, resamples: int = 2000) -> tuple[Tensor, Tensor]:
    """Percentile interval of the mean of values (n,) or (n, k) over rows: (low, high), float64 scalars or (k,).

    Raises GeomsslError for fewer than two rows, a level outside (0, 1) or no resamples.
    """
    columns = values.reshape(len(values), -1)
    drawn = resampled_sums(columns, seed, resamples) / len(columns)
    low, high = interval(drawn, level)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


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
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64, device=drawn.device)
    low, high = torch.quantile(drawn.double(), tails, dim=0)
    return low, high
