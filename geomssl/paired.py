"""Means over seeds with their t intervals; two cells over the same seeds: their difference, and is it negligible."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from geomssl.errors import GeomsslError

Verdict = Literal["equivalent", "different", "undecided"]


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds. std (n - 1 in the denominator), low and high are None for n = 1."""

    value: float
    n: int
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Comparison:
    """a - b over the same n seeds. p: two-sided, of no difference; p_lower, p_upper: one-sided, of a difference at or below
    -margin, at or above +margin. All but difference are None where they cannot be had (n = 1; no margin)."""

    difference: Mean
    p: float | None
    margin: float | None
    p_lower: float | None
    p_upper: float | None
    verdict: Verdict


def mean(values: Sequence[float], level: float = 0.95) -> Mean:
    """Mean of the values with the interval of Student's t.

        m = sum_i v_i / n,   s^2 = sum_i (v_i - m)^2 / (n - 1),   [low, high] = m -+ t_{n-1, (1 + level) / 2} s / sqrt(n)

    It covers the mean over all seeds with probability `level` where the values are normal; no other spread (images, data
    sets) is in it. Raises GeomsslError for no values, values that are not finite, or a level outside (0, 1).
    """
    _check(values, level)
    n = len(values)
    # one value repeated has exactly that mean, whatever a sum of it rounds to
    middle = values[0] if len(set(values)) == 1 else math.fsum(values) / n
    if n == 1:
        return Mean(middle, 1, None, None, None)
    from scipy.special import stdtrit

    std = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = float(stdtrit(n - 1, (1 + level) / 2)) * std / math.sqrt(n)
    return Mean(middle, n, std, middle - half, middle + half)


def compare(a: Sequence[float], b: Sequence[float], margin: float | None = None, level: float = 0.95) -> Comparison:
    """a - b, pair by pair (value i of both has the same seed), and two one-sided t tests against a margin (TOST).

        d_i = a_i - b_i,   t_lower = (mean d + margin) / (s / sqrt(n)),   p_lower = P(T_{n-1} >= t_lower)
                           t_upper = (mean d - margin) / (s / sqrt(n)),   p_upper = P(T_{n-1} <= t_upper)

    With alpha = 1 - level: "equivalent" where both p_lower and p_upper < alpha, that is where the 1 - 2 alpha interval lies
    within the margin; else "different" where the two-sided p < alpha, that is where the `level` interval leaves out 0;
    else "undecided". An equivalent pair may differ significantly too, by less than the margin: the interval tells.
    Without spread (s = 0) each p is 0 or 1, by the sign of its numerator (1 at 0).
    Raises GeomsslError for unequal lengths, a margin that is not positive, and what `mean` refuses.
    Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987).
    """
    if len(a) != len(b):
        raise GeomsslError(f"{len(a)} values against {len(b)}", "pairs: one value of each for every seed", reason="bad-value")
    if margin is not None and not (margin > 0 and math.isfinite(margin)):
        raise GeomsslError(f"margin = {margin}", "a positive number, in the unit of the metric", reason="bad-value")
    _check([*a, *b], level)
    found = mean([x - y for x, y in zip(a, b, strict=True)], level)
    if found.std is None:
        return Comparison(found, None, margin, None, None, "undecided")
    p = 2 * _upper_tail(abs(found.value), found)
    lower = upper = None
    if margin is not None:
        lower, upper = _upper_tail(found.value + margin, found), _upper_tail(margin - found.value, found)
    alpha = 1 - level
    verdict: Verdict = "undecided"
    if lower is not None and upper is not None and max(lower, upper) < alpha:
        verdict = "equivalent"
    elif p < alpha:
        verdict = "different"
    return Comparison(found, min(1.0, p), margin, lower, upper, verdict)


def _upper_tail(numerator: float, found: Mean) -> float:
    """P(T_{n-1} >= numerator / (s / sqrt(n)))."""
    from scipy.special import stdtr

    if not found.std:
        return float(numerator <= 0)
    return float(stdtr(found.n - 1, -numerator / (found.std / math.sqrt(found.n))))


def _check(values: Sequence[float], level: float) -> None:
    if not values:
        raise GeomsslError("a mean of no values", "at least one", reason="bad-value")
    if not all(math.isfinite(v) for v in values):
        raise GeomsslError(f"values {list(values)}", "finite numbers", reason="bad-value")
    if not 0 < level < 1:
        raise GeomsslError(f"level = {level}", "a level between 0 and 1, such as 0.95", reason="bad-value")
