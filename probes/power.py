"""The gate's own power: a defect of known size is put into the model, and the gate's verdicts on it are counted.

    L/2   the gate must pass          L   it must not pass (at most (1 - level) / 2)          2L   it must fail

The defect is a stray map, f_eps = f + eps * stray, where stray adds features of other images with weights that change with
every pixel (random cosines of the image), so it follows no group. Image by image the sums of the total error are quadratic
in eps: three measurements (eps = 0, 1, -1) give them for every eps, and eps is solved for the worst element to be at the
target. Then whole trials are drawn: images with replacement from those measured, whose pool is the population, so that its
error is known; bounds and looks as the gate takes them; a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from geomssl.artifact import Table
from geomssl.errors import GeomsslError
from geomssl.probes import equivariance, judge
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.defect import CHANCE, EquivarianceError, evaluating, simultaneous
from geomssl.probes.layers import Reader
from geomssl.probes.looks import Look
from geomssl.probes.subject import Subject
from geomssl.seeding import generator

# How often L/2 must pass and 2L must fail for the gate to count as able.
ENOUGH = 0.9
TARGETS = (("L/2", 0.5, "passes"), ("L", 1.0, "passes"), ("2L", 2.0, "fails"))
# Other images whose features the stray map adds, and the spread of its phases over a typical distance between images.
STRAYS, TURN = 16, 3.0
# Images among which these are chosen, and by which distances are judged.
POOL = 64
# Trials of each target; times figures (elements of all layers) they stay under FIGURES, so that this takes minutes at most.
TRIALS, FEWEST, FIGURES = 200, 60, 3200

Outcome = Literal["passes", "fails", "inconclusive"]


@dataclass(frozen=True)
class Injected:
    """Per-image sums of f + eps * stray for every eps: a + b eps + c eps^2, each (n, E), float64."""

    numerators: tuple[Tensor, Tensor, Tensor]
    denominators: tuple[Tensor, Tensor, Tensor]

    def sums(self, eps: float) -> tuple[Tensor, Tensor]:
        above, below = ((a + eps * b + eps**2 * c).clamp(min=0) for a, b, c in (self.numerators, self.denominators))
        return above, below

    def worst(self, eps: float) -> float:
        """The total error at the worst element, over all images."""
        above, below = self.sums(eps)
        return float((above.sum(dim=0) / below.sum(dim=0)).max().sqrt())

    def calibrate(self, target: float) -> float | None:
        """eps >= 0 with worst(eps) = target; None where the model's own error is above it, or no eps reaches it."""
        if not self.worst(0.0) < target:
            return None
        high = 1e-9
        while self.worst(high) < target:
            high *= 2
            if high > 1e6:
                return None
        low = 0.0 if high == 1e-9 else high / 2
        for _ in range(80):
            middle = (low + high) / 2
            low, high = (middle, high) if self.worst(middle) < target else (low, middle)
        return high


Features = Callable[[Tensor], list[Tensor]]


@torch.no_grad()
def stray(features: Features, images: Tensor, seed: int = 0, count: int = STRAYS) -> Features:
    """x -> sum_k cos(<w_k, x> + b_k) (f(x_k) - mean) sqrt(2 / count), for every layer f: fixed maps that follow no group.

    features: images (n, C, H, W) to the features of every layer.  x_k: `count` of the images.  w_k: random, so that the
    phase of two images differs by TURN on average: another image, and the same one moved, get other weights. The spread of
    the map over images is about that of f.
    """
    draw = generator(seed, "stray")
    count = min(count, len(images))
    chosen = torch.randperm(len(images), generator=draw)[:count].to(images.device)
    others = [f - f.mean(dim=0, keepdim=True) for f in features(images[chosen])]
    flat = images.flatten(1)
    apart = (flat - flat.mean(dim=0)).square().sum(dim=1).mean().mul(2).sqrt().clamp(min=torch.finfo(flat.dtype).tiny)
    weights = torch.randn(flat.shape[1], count, generator=draw).to(flat) * (TURN / apart)
    phases = (torch.rand(count, generator=draw) * 2 * math.pi).to(flat)

    def wander(x: Tensor) -> list[Tensor]:
        cosines = torch.cos(x.flatten(1) @ weights + phases) * math.sqrt(2 / count)
        return [torch.tensordot(cosines.to(other), other, dims=1) for other in others]

    return wander


def inject(run: Callable[[float], list[EquivarianceError]]) -> Injected:
    """The per-image sums of f + eps * stray, all layers side by side, from three measurements of it.

    run: from eps to what is measured of f + eps * stray, one entry a layer. The actions must be linear, as the built-in
    ones are. GeomsslError where the features hardly vary.
    """
    found = [run(eps) for eps in (0.0, 1.0, -1.0)]
    if any(bool(one.degenerate.any()) or not bool(one.total.isfinite().all()) for one in found[0]):
        raise GeomsslError("a power test of features that hardly vary", "features that differ", reason="degenerate")

    def quadratic(key: str) -> tuple[Tensor, Tensor, Tensor]:
        zero, plus, minus = (torch.cat([getattr(one, key) for one in layers], dim=1) for layers in found)
        return zero, (plus - minus) / 2, (plus + minus) / 2 - zero

    return Injected(quadratic("numerators"), quadratic("denominators"))


def blend(numerators: Tensor, denominators: Tensor, seed: int = 0) -> Injected:
    """The same from the sums alone (n, E), without the model: the defect of image i is another image's spread.

    For where the model cannot be run again. Assumes that the injected defect is orthogonal to the model's own.
    """
    other = denominators[torch.randperm(len(denominators), generator=generator(seed, "stray"))]
    none = torch.zeros_like(numerators)
    return Injected((numerators, none, other), (denominators, none, other))


def outcomes(
    above: Tensor, below: Tensor, limit: float, looks: Sequence[Look], seed: int = 0, trials: int = TRIALS,
    resamples: int = 2000, widen: Tensor | float = 0.0,
) -> list[Outcome]:
    """The verdict of each trial on a population of per-image sums (n, E), look after look until one decides.

    above, below: what the bootstrap resamples, images or clusters of them, of which a trial draws as many as the looks say,
    with replacement. It takes the bounds of `equivariance`: pointwise ones of every element, the lower
    ones again for all elements at once, widened by the resampling distance r (E,).
    """
    size = looks[-1].images
    drawn = torch.randint(len(above), (trials, size), generator=generator(seed, "power"))
    found: list[Outcome] = ["inconclusive"] * trials
    left = list(range(trials))
    elements = above.shape[1]
    r = torch.as_tensor(widen, dtype=torch.float64).expand(elements)
    widened = bool((r > 0).any())
    for look in looks:
        if not left:
            break
        rows = drawn[left, : look.images]
        top, bottom = (_columns(values, rows) for values in (above, below))
        enough = look.resamples(resamples)
        # Where r is added, it and the interval have half of the tail each.
        level = (1 + look.level) / 2 if widened else look.level
        total = (top.sum(dim=0) / bottom.sum(dim=0)).sqrt().view(len(left), elements)
        # A total lies within its bounds: only trials below the limit everywhere can pass, only figures above it can fail.
        may_pass, may_fail = (total + r < limit).all(dim=1), total - r > limit
        passes, fails = torch.zeros(len(left), dtype=torch.bool), torch.zeros(len(left), dtype=torch.bool)
        if bool(may_pass.any()):
            some = may_pass[:, None].expand_as(total).flatten()
            high = bootstrap_ratio(top[:, some], bottom[:, some], seed, level, enough)[1].view(-1, elements)
            passes[may_pass] = (high + r < limit).all(dim=1)
        if bool(may_fail.any()):
            some = may_fail.flatten()
            surely = torch.full_like(total, -math.inf)
            surely[may_fail] = simultaneous(top[:, some], bottom[:, some], seed, level, enough, elements)
            fails = (surely - r > limit).any(dim=1)
        for row, trial in enumerate(left):
            found[trial] = "passes" if passes[row] else "fails" if fails[row] else "inconclusive"
        left = [trial for trial in left if found[trial] == "inconclusive"]
    return found


def _columns(values: Tensor, rows: Tensor) -> Tensor:
    """values (n, E) at rows (trials, m) as (m, trials * E)."""
    return values[rows].permute(1, 0, 2).flatten(1)


def table(
    injected: Injected, limit: float, looks: Sequence[Look], *, level: float = 0.95, seed: int = 0, trials: int = TRIALS,
    resamples: int = 2000, widen: Tensor | float = 0.0,
) -> Table:
    """The table `power`: for a defect of L/2, L and 2L how often the gate does what it must, with Wilson's 95 % interval.

    level: what all looks together keep, two-sided; half of 1 - level is what passing at L may take. A target that cannot be
    injected (the model's own error is above it, or chance is below it) has no rate.
    """
    from geomssl.probes.linear import wilson

    rows: list[dict[str, Any]] = []
    for name, factor, demand in TARGETS:
        target = factor * limit
        eps = injected.calibrate(target) if target < CHANCE else None
        row: dict[str, Any] = {"injected": name, "defect": target, "demand": demand}
        row["wanted"] = f"at most {(1 - level) / 2:.1%}" if name == "L" else f"at least {ENOUGH:.0%}"
        if eps is None or not bool(torch.as_tensor(widen).isfinite().all()):
            row |= dict.fromkeys(("rate", "low", "high", "passed", "failed", "holds")) | {"trials": 0}
        else:
            found = outcomes(*injected.sums(eps), limit, looks, seed, trials, resamples, widen)
            count = found.count(demand)  # type: ignore[arg-type]
            low, high = wilson(count, trials)
            row |= {
                "rate": count / trials, "low": low, "high": high, "passed": found.count("passes"),
                "failed": found.count("fails"), "trials": trials,
                "holds": low <= (1 - level) / 2 if name == "L" else count / trials >= ENOUGH,
            }
        rows.append(row)
    return Table(
        "power", "Power of the gate", {key: [row[key] for row in rows] for key in rows[0]},
        f"Verdicts on a defect put into this model, at limit L = {limit:g}; images drawn with replacement from those measured. "
        "L/2 must pass, L must not, 2L must fail. [low, high] is Wilson's 95 % interval of the rate.",
    )


def measure(
    subject: Subject, options: equivariance.Options, limit: float, looks: Sequence[Look], level: float,
    trials: int | None = None,
) -> Table:
    """The table `power` of a subject measured with these options, whose n is the pool from which trials are drawn.

    trials: None stands for TRIALS, and fewer where there are very many figures, but never under FEWEST.
    r, what resampling does, is taken as it is for the model without the injected defect. Where it was not measured the gate
    cannot decide, and no rate is given.
    """
    with evaluating(subject.encoder), torch.no_grad():
        ready = equivariance.prepare(subject, options)
        plain = ready.reader
        wander = stray(plain.features, ready.inputs.of(slice(0, POOL)), options.seed)

        own = ready.run(resamples=500)[0]
        # What the gate does not judge gets no defect either.
        left_out = judge.unmixed(plain, ready.inputs.of(slice(0, 1)), own)

        def run(eps: float) -> list[EquivarianceError]:
            def features(images: Tensor) -> list[Tensor]:
                return [f + eps * added for f, added in zip(plain.features(images), wander(images), strict=True)]

            # Of these only the sums count, so their intervals may be cheap.
            found = ready.run(Reader(features, plain.layers), level=0.5, resamples=100, references=0)[0] if eps else own
            return [one for one, no in zip(found, left_out, strict=True) if not no]

        injected = inject(run)
        widen = torch.cat([one.resampling for one, no in zip(own, left_out, strict=True) if not no])
    units = len(injected.numerators[0])
    scaled = [replace(look, images=max(2, round(look.images * units / ready.inputs.n))) for look in looks]
    some = trials or max(FEWEST, min(TRIALS, FIGURES // len(widen)))
    return table(injected, limit, scaled, level=level, seed=options.seed, trials=some, widen=widen)

