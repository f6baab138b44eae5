"""How sure a figure is: bootstrap over images, of a mean and of the root of a ratio of sums."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl.bootstrap import interval, resampled_sums
from geomssl.errors import GeomsslError

__all__ = ["COLUMNS", "METHOD", "bootstrap_mean", "bootstrap_ratio", "interval", "resampled_sums", "summed"]

# What bootstrap_ratio does, for the intervals that carry its name.
METHOD = "bootstrap over images (the wider of percentile and studentised)"
# The figures whose resamples are held at once.
COLUMNS = 64


def summed(values: Tensor, unit: Tensor) -> Tensor:
    """Sums of the rows of values (n, k) within each unit, float64 (units, k); unit int64 (n,), numbered from 0."""
    return torch.zeros(int(unit.max()) + 1, values.shape[1], dtype=torch.float64).index_add(0, unit, values.double())


def bootstrap_ratio(
    numerators: Tensor, denominators: Tensor, seed: int, level: float = 0.95, resamples: int = 2000
) -> tuple[Tensor, Tensor]:
    """Interval of sqrt(sum_i numerator_i / sum_i denominator_i), images resampled with replacement.

    The wider, at each end, of two intervals of R = sum numerator / sum denominator, then the root of both ends:
        percentile    the percentiles of the resampled R_b
        studentised   R - S q, with q the percentiles of (R_b - R) / S_b and S^2 = sum (numerator - R denominator)^2 /
                      (sum denominator)^2, the same sums resampled in S_b
    Errors of images are skewed to the right, so a percentile's upper end lies too low (it misses twice as often as it says
    at 64 images); the studentised one is right to one order more. It is left out where it is not finite (a handful of images).

    numerators, denominators (n, E), not negative: one row an image, one column a figure; the columns share their
    resamples. Returns (low, high), float64 (E,). Numerators that are all zero give [0, 0]; a column in which some
    resample has a zero denominator has no interval and gives NaN.
    Raises GeomsslError for fewer than two images, a level outside (0, 1) or no resamples. Efron and Tibshirani (1993),
    ch. 12 and 13; Hall, The Bootstrap and Edgeworth Expansion (1992), ch. 3.
    """
    if numerators.shape != denominators.shape or numerators.dim() != 2:
        raise GeomsslError(f"{tuple(numerators.shape)} over {tuple(denominators.shape)}", "two tensors (n, E)")
    above, below = (t.detach().to("cpu", torch.float64) for t in (numerators, denominators))
    found = [
        _ratio(*part, seed, level, resamples) for part in zip(above.split(COLUMNS, 1), below.split(COLUMNS, 1), strict=True)
    ]
    return torch.cat([low for low, _ in found]), torch.cat([high for _, high in found])


def _ratio(above: Tensor, below: Tensor, seed: int, level: float, resamples: int) -> tuple[Tensor, Tensor]:
    whole = below.sum(dim=0)
    ratio = above.sum(dim=0) / whole
    rest = above - ratio * below
    values = torch.cat([above, below, rest**2, rest * below, below**2], dim=1)
    top, bottom, squares, crossed, weights = resampled_sums(values, seed, resamples).split(above.shape[1], dim=1)
    drawn = torch.where(bottom > 0, (top / bottom).clamp_(min=0), torch.nan)
    low, high = interval(drawn, level)
    moved = drawn - ratio
    spread = (squares - 2 * moved * crossed + moved**2 * weights).clamp_(min=0).sqrt_() / bottom
    studentised = torch.where(moved == 0, moved, moved / spread)
    behind, ahead = interval(studentised, level)
    scale = (rest**2).sum(dim=0).sqrt() / whole
    under, over = ratio - scale * ahead, ratio - scale * behind
    low = torch.where(under.isfinite(), torch.minimum(low, under.clamp(min=0)), low)
    high = torch.where(over.isfinite(), torch.maximum(high, over), high)
    return low.sqrt(), high.sqrt()


def bootstrap_mean(values: Tensor, seed: int, level: float = 0.95, resamples: int = 2000) -> tuple[Tensor, Tensor]:
    """Percentile interval of the mean of values (n,) or (n, k) over rows: (low, high), float64 scalars or (k,).

    Raises GeomsslError for fewer than two rows, a level outside (0, 1) or no resamples.
    """
    columns = values.reshape(len(values), -1)
    drawn = resampled_sums(columns, seed, resamples) / len(columns)
    low, high = interval(drawn, level)
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])
