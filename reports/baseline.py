"""An artifact against a baseline: only where both were measured in the same way, else the field that differs is named.

Where both keep the sums of the same images, the increase of each total is bounded image by image (pairing.py), widened by
what resampling may do in either. Elsewhere conservatively, from the two intervals: [low − baseline's high, high −
baseline's low], of which each end is wrong only where one of two bounds is: at level 95 % at most 5 % of the time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from geomssl.artifact import Artifact, Interval
from geomssl.config import canonical
from geomssl.errors import GeomsslError, nearest
from geomssl.reports import pairing
from geomssl.reports.elements import Element, finite
from geomssl.reports.numbers import bounds, number
from geomssl.reports.rules import Rule
from geomssl.reports.verdict import Judgement, Outcome, Reason

# What was measured; how sure of it one is (level, resamples, ...) may differ, since each has its own interval.
MEASURED = ("images_sha256", "dataset", "split", "dtype", "action", "boundary")
SURENESS = ("level", "resamples", "share", "references", "sweep", "n")


@dataclass(frozen=True)
class Pair:
    """A figure and the baseline's, with their bounds; low_any and then_high_any hold for all elements at once.

    resampling: r of both together.  row, then_row: where the two stand in their tables.
    """

    name: str
    now: float
    low: float
    high: float
    low_any: float
    then: float
    then_low: float
    then_high: float
    then_high_any: float
    resampling: float = 0.0
    row: int = 0
    then_row: int = 0


def candidates(rule: Rule, baselines: Sequence[Artifact]) -> list[Artifact]:
    """The baselines of the rule's probe. GeomsslError where the rule compares and there is none."""
    if not rule.compares:
        return []
    key = "max_increase" if rule.max_increase is not None else "max_ratio"
    if not baselines:
        raise GeomsslError(f"rule {rule.name!r} has {key} and no baseline", "--baseline artifact.json", reason="no-baseline")
    found = [b for b in baselines if b.probe == rule.probe]
    if not found:
        probes = sorted({b.probe for b in baselines})
        raise GeomsslError(
            f"a baseline of {', '.join(probes)} for rule {rule.name!r}", f"an artifact of {rule.probe}",
            nearest(rule.probe, probes), reason="no-baseline",
        )
    return found


def choose(artifact: Artifact, baselines: Sequence[Artifact]) -> tuple[Artifact, list[str]]:
    """The baseline to compare with, and in what it differs: of those that do not, one of the same run; else the nearest."""
    ranked = sorted(baselines, key=lambda b: (len(differences(artifact, b)), b.run != artifact.run))
    return ranked[0], differences(artifact, ranked[0])


def differences(now: Artifact, then: Artifact) -> list[str]:
    """Every field in which two artifacts were not measured alike, in words; empty where they can be compared."""
    found = []
    rendered = now.options.get("images") not in (None, "data")
    for key in MEASURED:
        here, there = now.provenance.get(key), then.provenance.get(key)
        if key == "images_sha256" and here is None and there is None and not rendered:
            found.append("images_sha256, the fingerprint of the data set, is stated by neither")
        elif here != there:
            found.append(_said(key, here, there))
    for key in sorted((now.options.keys() | then.options.keys()) - set(SURENESS)):
        if key not in now.options or key not in then.options:
            found.append(f"{key} is stated {'by the baseline' if key in then.options else 'here'} only")
        elif canonical(now.options[key]) != canonical(then.options[key]):
            found.append(_said(key, now.options[key], then.options[key]))
    if sample(now) != sample(then):
        found.append(_said("n", sample(now), sample(then)))
    return found


def sample(artifact: Artifact) -> int | None:
    """How many images the artifact rests on: the n of its metrics, of `total` before any other."""
    ranked = sorted(artifact.metrics, key=lambda m: not m.name.startswith("total"))
    return next((m.n for m in ranked if m.n is not None), None)


def judge(
    rule: Rule, pairs: Sequence[Pair], run: str, together: pairing.Together | str = ""
) -> list[Judgement]:
    """The rule's max_increase and max_ratio, each over all pairs: pass where all are below, fail where one is above.

    together: the sums of both over the same images, or why there are none.
    """
    found = []
    if rule.max_increase is not None:
        found.append(_judge(pairs, rule.max_increase, "increase", run, together))
    if rule.max_ratio is not None:
        found.append(_judge(pairs, rule.max_ratio, "ratio", run, together))
    return found


def pair_elements(now: Sequence[Element], then: Sequence[Element]) -> list[Pair] | str:
    """Elements beside those of the baseline; a sentence where they are not the same ones, or one has no bounds."""
    before = {(e.layer, e.name): (row, e) for row, e in enumerate(then)}
    strange = [e.name for e in now if (e.layer, e.name) not in before]
    if strange or len(now) != len(then):
        return f"elements: {', '.join(strange[:3]) or 'some of the baseline'} on one side only"
    pairs = []
    for row, e in enumerate(now):
        then_row, b = before[e.layer, e.name]
        for side, of in ((e, "here"), (b, "in the baseline")):
            if side.degenerate or side.interval is None:
                return f"{side.name} {'is degenerate' if side.degenerate else 'has no bounds'} {of}"
        # The baseline's own simultaneous upper bound is not in its table: its lower one, mirrored, stands for it.
        above = max(b.bound_high, 2 * b.total - b.bound_low_any)
        pairs.append(Pair(
            e.name, e.total, e.bound_low, e.bound_high, e.bound_low_any, b.total, b.bound_low, b.bound_high, above,
            e.resampling + b.resampling, row, then_row,
        ))
    return pairs


def pair_figures(now: Interval, value: float, then: Interval, before: float) -> Pair:
    return Pair("", value, now.low, now.high, now.low, before, then.low, then.high, then.high)


def _judge(
    pairs: Sequence[Pair], limit: float, kind: pairing.Kind, run: str, together: pairing.Together | str
) -> Judgement:
    combine = _minus if kind == "increase" else _over
    apart = [(combine(p.low, p.then_high), combine(p.high, p.then_low), combine(p.low_any, p.then_high_any)) for p in pairs]
    spans, how = _paired(pairs, apart, limit, kind, together)
    over = [i for i, (_, _, surely) in enumerate(spans) if surely > limit]
    worst = max(over, key=lambda i: spans[i][2]) if over else max(range(len(pairs)), key=lambda i: spans[i][1])
    outcome: Outcome = "fail" if over else "pass" if spans[worst][1] < limit else "inconclusive"
    reasons: dict[Outcome, Reason] = {
        "fail": "above-baseline", "pass": "ok", "inconclusive": "interval-straddles-limit"
    }
    pair, span = pairs[worst], Interval(spans[worst][0], spans[worst][1], how)
    at = f"At {pair.name} the" if pair.name else "The"
    why = [f"{at} figure is {number(pair.now)} and the baseline's ({run}) {number(pair.then)}: the {kind} lies within "
           f"{bounds(span)}, {'below' if outcome == 'pass' else 'above' if over else 'across'} {limit:g}. "
           f"Bounds: {how}."]
    if outcome == "inconclusive":
        why.append("More images, here and in the baseline, narrow the interval.")
    return Judgement(outcome, reasons[outcome], why, finite(combine(pair.now, pair.then)), span, pair.name)


def _paired(
    pairs: Sequence[Pair], apart: list[tuple[float, float, float]], limit: float, kind: pairing.Kind,
    together: pairing.Together | str,
) -> tuple[list[tuple[float, float, float]], str]:
    """Spans of the increase or the ratio, and how they were had: paired where that is possible, else `apart`.

    What resampling may do to either side (r) is added to a paired increase, whose bound of all elements at once is then that
    of the two intervals, as is a ratio where something is resampled.
    """
    slack = [p.resampling for p in pairs]
    found = None
    if not isinstance(together, str) and not (kind == "ratio" and any(slack)):
        columns, before = [p.row for p in pairs], [p.then_row for p in pairs]
        found = pairing.spans(together, columns, before, kind, slack, limit)
    if found is None or isinstance(together, str):
        why = f", since {together}" if together and isinstance(together, str) else ""
        return apart, f"from the two intervals, not paired{why}: conservative"
    spans = [
        (low - r, high + r, surely if r == 0 else alone[2])
        for (low, high, surely), r, alone in zip(found, slack, apart, strict=True)
    ]
    widened = ", widened by what resampling may do in either" if any(slack) else ""
    return spans, f"paired, {together.units} the same in both{widened}"


def _minus(a: float, b: float) -> float:
    return a - b


def _over(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf if a > 0 else 1.0


def _said(key: str, here: object, there: object) -> str:
    return f"{key} = {here!r} here, {there!r} in the baseline"
