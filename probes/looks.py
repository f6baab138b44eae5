"""Planned looks: a budget of images spent in nested stages, and the error of the verdict spent over them beforehand.

Looking again with more images until a verdict comes is no test: each look has its own chance to err. Here the looks are
planned, at shares t of the budget, and the level is spent over them by the power family of Kim and DeMets

    spent(t) = alpha t^2,     look k: alpha_k = spent(t_k) - spent(t_(k-1)),     alpha = 1 - level

so that look k uses two-sided bounds at level 1 - alpha_k. By Bonferroni's inequality all looks together err at most alpha,
half of it on each side, whatever the dependence between them; a Lan-DeMets boundary would be a little narrower, and would
need their joint distribution. The images of a look are among those of the next.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geomssl.artifact import Artifact
from geomssl.errors import GeomsslError

# Shares of the budget; a look of fewer images than LEAST is left out, since bounds at its level would not hold.
FRACTIONS = (0.25, 0.5, 1.0)
LEAST = 32
# Resamples that each tail should hold, and the most that the probe takes.
TAIL, MOST = 20, 100_000


@dataclass(frozen=True)
class Look:
    """One planned look: its number (from 1) of so many, at `images` of the `budget`, with two-sided bounds at `level`."""

    number: int
    of: int
    images: int
    budget: int
    level: float

    def resamples(self, asked: int) -> int:
        """Bootstrap resamples: as asked, or as many as leave TAIL beyond each bound, but never more than MOST."""
        return min(MOST, max(asked, math.ceil(2 * TAIL / (1 - self.level) - 1e-9)))


def spent(share: float, alpha: float) -> float:
    """alpha t^2: the error spent once a share t of the budget has been looked at. Kim and DeMets, Biometrika 74 (1987)."""
    return alpha * share**2


def plan(
    budget: int, level: float = 0.95, fractions: Sequence[float] = FRACTIONS, least: int = LEAST
) -> tuple[Look, ...]:
    """The looks within a budget of images, the last at all of it. `level` is what all looks together keep, two-sided.

    fractions: rising shares of the budget, the last 1. GeomsslError for a budget under two images, a level outside (0, 1)
    or shares that do not rise to 1.
    """
    if budget < 2:
        raise GeomsslError(f"a budget of {budget} images", "at least 2", reason="too-few-images")
    if not 0 < level < 1:
        raise GeomsslError(f"level {level}", "a level between 0 and 1, such as 0.95")
    if not fractions or fractions[-1] != 1 or any(a >= b for a, b in zip((0, *fractions), fractions, strict=False)):
        raise GeomsslError(f"looks at {', '.join(map(str, fractions))} of the budget", "rising shares, the last 1")
    sizes = [n for n in dict.fromkeys(math.ceil(t * budget) for t in fractions) if n >= least or n == budget]
    done = [0.0, *(spent(n / budget, 1 - level) for n in sizes)]
    return tuple(
        Look(k, len(sizes), n, budget, 1 - (done[k] - done[k - 1])) for k, n in enumerate(sizes, 1)
    )


def marked(artifact: Artifact, look: Look, **asked: Any) -> Artifact:
    """The artifact with its look in the provenance; asked: the options that were asked for, such as the level of all looks."""
    return dataclasses.replace(
        artifact, provenance={**artifact.provenance, "look": {**dataclasses.asdict(look), "asked": asked}}
    )
