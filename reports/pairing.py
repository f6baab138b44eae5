"""The increase of a total error over a baseline's, image by image: where both artifacts keep the sums of the same images.

    R = sum_i numerator_i / sum_i denominator_i now, S that of the baseline;  increase sqrt(R) - sqrt(S), ratio sqrt(R / S)

What makes an image hard makes it hard in both, so the increase varies far less than two totals measured apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Literal

from geomssl.artifact import Artifact

if TYPE_CHECKING:
    from torch import Tensor

    from geomssl.sums import Sums

Kind = Literal["increase", "ratio"]
# Draws that a tail of all elements at once should hold, the most that are taken for it, and figures drawn at a time.
TAIL, MOST, COLUMNS = 10, 20_000, 16


@dataclass(frozen=True)
class Together:
    """Two artifacts' sums over the same rows, and how the newer one wants its intervals taken."""

    now: Sums
    then: Sums
    level: float
    resamples: int
    seed: int

    @property
    def units(self) -> str:
        """What is resampled in both together: "360 images", or "1024 blocks of images"."""
        return f"{len(self.now.numerators)} {self.now.word}"


def pair(now: Artifact, then: Artifact) -> Together | str:
    """The sums of both, or why there is nothing to pair."""
    # Judging without a baseline needs no torch.
    from geomssl.sums import FILE, unpack

    for artifact, whose in ((now, "this artifact"), (then, "the baseline")):
        if FILE not in artifact.files:
            return f"{whose} keeps no sums of single images"
    here, there = unpack(now.files[FILE]), unpack(then.files[FILE])
    if here.key != there.key or here.numerators.shape[0] != there.numerators.shape[0]:
        return "their sums are of other images, or of other blocks of them"
    options = now.options
    return Together(here, there, float(options["level"]), int(options["resamples"]), int(options["seed"]))


def spans(
    together: Together, columns: list[int], then_columns: list[int], kind: Kind, slack: list[float], limit: float
) -> list[tuple[float, float, float]] | None:
    """(low, high, low_any) of the increase or the ratio of each pair of columns; None where a resample has no spread.

    The wider, at each end, of a percentile and a studentised interval, images resampled in both together; of the ratio on
    the scale of its logarithm. slack: where it is above 0, the interval leaves half of the tail to it. low_any: a lower
    bound that holds for all columns at once (Bonferroni); it is taken where the increase is above `limit`, since only there
    can it matter, and is -inf elsewhere.
    """
    import torch

    above, below = together.now.numerators[:, columns], together.now.denominators[:, columns]
    other, base = together.then.numerators[:, then_columns], together.then.denominators[:, then_columns]
    found: list[tuple[float, float, float]] = []
    wide = torch.tensor([s > 0 for s in slack])
    half = (1 + together.level) / 2
    for start in range(0, len(columns), COLUMNS):
        part = slice(start, start + COLUMNS)
        four = (above[:, part], below[:, part], other[:, part], base[:, part])
        plain = _bounds(*four, kind, together.level, together.resamples, together.seed)
        halved = _bounds(*four, kind, half, together.resamples, together.seed) if bool(wide[part].any()) else plain
        low, high = (torch.where(wide[part], h, p) for h, p in zip(halved, plain, strict=True))
        a, b, c, d = (f.sum(dim=0) for f in four)
        point = _statistic(a, b, c, d, kind)
        if not bool((low.isfinite() & high.isfinite() & point.isfinite()).all()):
            return None
        surely = torch.full_like(point, -math.inf)
        over = point > (limit if kind == "increase" else math.log(limit))
        if bool(over.any()):
            a, b, c, d = (f[:, over] for f in four)
            surely[over] = _lowest(a, b, c, d, kind, together, len(columns))
        found += zip(low.tolist(), high.tolist(), torch.minimum(surely, low).tolist(), strict=True)
    return found


def _statistic(above: Tensor, below: Tensor, other: Tensor, base: Tensor, kind: Kind) -> Tensor:
    """The increase, or the logarithm of the ratio, from sums."""
    now, then = above / below, other / base
    return now.sqrt() - then.sqrt() if kind == "increase" else (now / then).log() / 2


def _bounds(
    above: Tensor, below: Tensor, other: Tensor, base: Tensor, kind: Kind, level: float, resamples: int, seed: int
) -> tuple[Tensor, Tensor]:
    import torch

    from geomssl.bootstrap import interval

    point, spread, drawn, studentised = _drawn(above, below, other, base, kind, resamples, seed)
    low, high = interval(drawn, level)
    behind, ahead = interval(studentised, level)
    under, over = point - spread * ahead, point - spread * behind
    low = torch.where(under.isfinite(), torch.minimum(low, under), low)
    high = torch.where(over.isfinite(), torch.maximum(high, over), high)
    return (low.exp(), high.exp()) if kind == "ratio" else (low, high)


def _drawn(
    above: Tensor, below: Tensor, other: Tensor, base: Tensor, kind: Kind, resamples: int, seed: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The statistic, its standard error by linearisation, and of every resample the statistic and its studentised distance.

    The influence of image i is u (a_i - R b_i) - v (c_i - S d_i), with u = 1 / (2 sqrt(R) B), v = 1 / (2 sqrt(S) D) for the
    increase, and 1 / (2 R B), 1 / (2 S D) for half the logarithm of R / S; B and D are the sums of b and d.
    """
    import torch

    from geomssl.bootstrap import resampled_sums

    ratio, share = above.sum(dim=0) / below.sum(dim=0), other.sum(dim=0) / base.sum(dim=0)
    e, f = above - ratio * below, other - share * base
    products = [e * e, e * below, below * below, f * f, f * base, base * base, e * f, e * base, below * f, below * base]
    values = torch.cat([above, below, other, base, *products], dim=1)
    columns = resampled_sums(values, seed, resamples).split(above.shape[1], dim=1)
    a, b, c, d, ee, eb, bb, ff, fd, dd, ef, ed, bf, bd = columns
    point = _statistic(above.sum(dim=0), below.sum(dim=0), other.sum(dim=0), base.sum(dim=0), kind)
    drawn = _statistic(a.clamp(min=0), b, c.clamp(min=0), d, kind)

    def error(r: Tensor, s: Tensor, b: Tensor, d: Tensor, *sums: Tensor) -> Tensor:
        ee, ff, ef = sums
        u, v = (1 / (2 * (x.sqrt() if kind == "increase" else x) * y) for x, y in ((r, b), (s, d)))
        # an error that is nought everywhere has no spread
        u, v = (torch.where(x > 0, w, 0.0) for x, w in ((r, u), (s, v)))
        return (u * u * ee - 2 * u * v * ef + v * v * ff).clamp(min=0).sqrt()

    spread = error(
        ratio, share, below.sum(dim=0), base.sum(dim=0), *(p.sum(dim=0) for p in (products[0], products[3], products[6]))
    )
    now, then = a.clamp(min=0) / b, c.clamp(min=0) / d
    m, k = now - ratio, then - share
    spreads = error(
        now, then, b, d, ee - 2 * m * eb + m * m * bb, ff - 2 * k * fd + k * k * dd, ef - k * ed - m * bf + m * k * bd
    )
    moved = drawn - point
    return point, spread, drawn, torch.where(moved == 0, moved, moved / spreads)


def _lowest(
    above: Tensor, below: Tensor, other: Tensor, base: Tensor, kind: Kind, together: Together, columns: int
) -> Tensor:
    """Lower bounds that hold for all `columns` at once; where the draws do not reach so far, no higher than the normal one."""
    import torch

    tail = (1 - together.level) / (2 * columns)
    draws = min(max(together.resamples, math.ceil(TAIL / tail)), MOST)
    low = _bounds(above, below, other, base, kind, 1 - 2 * tail, draws, together.seed)[0]
    if tail * draws >= TAIL:
        return low
    point, spread, *_ = _drawn(above, below, other, base, kind, 2, together.seed)
    normal = point + NormalDist().inv_cdf(tail) * spread
    return torch.minimum(low, normal.exp() if kind == "ratio" else normal)
