"""The gate: rules and artifacts in, verdicts out. Nothing is measured here, and no verdict rests on a point estimate.

    pass           the whole interval lies on the good side of the limit
    fail           the whole interval lies on the bad side
    inconclusive   anything else, and wherever there is nothing to judge by
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from geomssl.artifact import Artifact, Interval, Metric
from geomssl.errors import GeomsslError, nearest
from geomssl.reports import baseline, elements, pairing
from geomssl.reports.numbers import bounds, number
from geomssl.reports.rules import CHANCE, Rule, Rules, read_rules
from geomssl.reports.verdict import (
    NEVER_PASS,
    OUTCOMES,
    Judgement,
    Outcome,
    Reason,
    Verdict,
    describe,
    exit_code,
    records,
)

__all__ = [
    "CHANCE", "NEVER_PASS", "Outcome", "Reason", "Rule", "Rules", "Verdict", "check", "describe", "evaluate", "exit_code",
    "read_rules", "records",
]


def evaluate(artifacts: Sequence[Artifact], rules: Rules, baselines: Sequence[Artifact] = ()) -> list[Verdict]:
    """One verdict for every rule and every run that it applies to, in the rules' order.

    Of several snapshots of a run, the last is judged. baselines: what rules with max_increase or max_ratio compare with.
    GeomsslError where there is no artifact at all, where a metric does not exist, where a rule asks the wrong side (a limit
    for a figure that is better when higher), where a rule compares and no baseline of its probe is there, and where
    baselines are given that no rule uses.
    """
    if not artifacts:
        raise GeomsslError("no artifacts to judge", "at least one measured artifact", reason="no-artifact")
    verdicts = []
    for rule, before in zip(rules.rule, check(rules, baselines), strict=True):
        matching = _latest(a for a in artifacts if not _mismatch(rule, a))
        if not matching:
            verdicts.append(_absent(rule, artifacts))
        verdicts += [_elements(rule, a, before) if rule.per_element else _figure(rule, a, before) for a in matching]
    return verdicts


def check(rules: Rules, baselines: Sequence[Artifact]) -> list[list[Artifact]]:
    """The baselines of each rule. GeomsslError where a rule compares and has none, or where none is ever compared with."""
    if baselines and not any(rule.compares for rule in rules.rule):
        raise GeomsslError("a baseline, and no rule that compares", "max_increase or max_ratio in a rule", reason="bad-usage")
    return [baseline.candidates(rule, baselines) for rule in rules.rule]


def _mismatch(rule: Rule, artifact: Artifact) -> str:
    """In what an artifact is not the one that the rule means; empty where it is."""
    if artifact.probe != rule.probe:
        return f"probe {artifact.probe}"
    if rule.run is not None and artifact.run != rule.run:
        return f"run {artifact.run}"
    # A planned look was measured at a level of its own; the one that was asked for is beside it.
    options = artifact.options | artifact.provenance.get("look", {}).get("asked", {})
    for key, value in rule.options.items():
        if key not in options or not _same(value, options[key]):
            return f"{key} = {options.get(key, 'not an option')!r}"
    return ""


def _same(wanted: Any, found: Any) -> bool:
    """Equal as settings: 1 is 1.0, but true is not 1; a list is equal to a tuple, and a name to a list of that name."""
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
    if isinstance(wanted, str) and isinstance(found, list | tuple):
        wanted = [wanted]
    if isinstance(wanted, list | tuple) and isinstance(found, list | tuple):
        return len(wanted) == len(found) and all(map(_same, wanted, found))
    if isinstance(wanted, Mapping) and isinstance(found, Mapping):
        return wanted.keys() == found.keys() and all(_same(wanted[k], found[k]) for k in wanted)
    return bool(wanted == found)


def _latest(artifacts: Iterable[Artifact]) -> list[Artifact]:
    """Every final artifact (no step); of a run and way of measuring that has none, that of the highest step. Of equals, one."""
    given: list[Artifact] = []
    for a in artifacts:
        if a not in given:
            given.append(a)
    final = {(a.run, a.options_hash) for a in given if a.step is None}
    last: dict[tuple[str, str], int] = {}
    for a in given:
        if a.step is not None:
            last[a.run, a.options_hash] = max(a.step, last.get((a.run, a.options_hash), a.step))
    return [
        a for a in given
        if a.step is None or ((a.run, a.options_hash) not in final and a.step == last[a.run, a.options_hash])
    ]


def _absent(rule: Rule, artifacts: Sequence[Artifact]) -> Verdict:
    """No artifact: the sentence says which came nearest, and in what it differs."""
    probes = sorted({a.probe for a in artifacts})
    if rule.probe not in probes:
        near = nearest(rule.probe, probes)
        why = f"There is no artifact of {rule.probe!r} among {', '.join(probes)}"
        why += f"; did you mean {near!r}?" if near else "."
    else:
        seen = dict.fromkeys(_mismatch(rule, a) for a in artifacts if a.probe == rule.probe)
        keys = sorted({key for a in artifacts if a.probe == rule.probe for key in a.options})
        strange = [key for key in rule.options if key not in keys]
        if strange:
            near = nearest(strange[0], keys)
            why = f"{rule.probe} has no option {strange[0]!r}" + (f"; did you mean {near!r}?" if near else ".")
        else:
            why = f"The artifacts of {rule.probe} differ from what the rule asks: {'; '.join(seen)}."
    return _verdict(rule, None, [Judgement("inconclusive", "no-artifact", [why])])


def _elements(rule: Rule, artifact: Artifact, baselines: Sequence[Artifact]) -> Verdict:
    """Total error, element by element, against the limit and against the baseline."""
    rows = elements.read(artifact)
    if isinstance(rows, str):
        return _verdict(rule, artifact, [Judgement("inconclusive", "no-elements", [rows])])
    said = [elements.judge(rows, rule.limit)] if rule.limit is not None else []
    if not rule.compares:
        return _verdict(rule, artifact, said)
    before, differing = baseline.choose(artifact, baselines)
    then = elements.read(before)
    pairs = then if isinstance(then, str) else baseline.pair_elements(rows, then)
    if isinstance(pairs, str):
        differing = [*differing, pairs]
    if rule.limit is None and any(r.degenerate for r in rows):
        said.append(elements.judge(rows, CHANCE))
    together = "" if differing else pairing.pair(artifact, before)
    return _verdict(rule, artifact, said + _compared(rule, before, differing, pairs, together), before.run)


def _figure(rule: Rule, artifact: Artifact, baselines: Sequence[Artifact]) -> Verdict:
    """Any other metric: its interval against the limit and against the baseline's."""
    metric = artifact.metric(str(rule.metric))
    wrong = rule.at_least is not None if metric.better == "lower" else metric.better == "higher" and rule.at_least is None
    if wrong:
        right = "limit" if metric.better == "lower" else "at_least"
        raise GeomsslError(
            f"rule {rule.name!r}: {metric.name} is better when {metric.better}", f"{right} = ...", reason="wrong-side"
        )
    if not _bounded(metric):
        why = [f"{metric.name} has no interval: {metric.reason or 'none was measured'}."]
        return _verdict(rule, artifact, [Judgement("inconclusive", "no-interval", why, metric.value)], n=metric.n)
    assert metric.interval is not None
    assert metric.value is not None
    said = []
    if not (rule.limit is None and rule.at_least is None):
        outcome, reason = _side(rule, metric.interval)
        text = f"{number(metric.value)} {bounds(metric.interval)}"
        demand = f"below {rule.limit:g}" if rule.limit is not None else f"at least {rule.at_least:g}"
        why = {
            "pass": [f"The whole interval {text} is {demand}."],
            "fail": [f"No part of the interval {text} is {demand}."],
            "inconclusive": [f"The interval {text} holds the limit. More images may narrow it."],
        }[outcome]
        said.append(Judgement(
            outcome, reason, [*why, f"Interval: {metric.interval.method}."], metric.value, metric.interval
        ))
    if not rule.compares:
        return _verdict(rule, artifact, said, n=metric.n)
    before, differing = baseline.choose(artifact, baselines)
    then = next((m for m in before.metrics if m.name == metric.name), None)
    pairs: list[baseline.Pair] = []
    if then is None or not _bounded(then):
        differing = [*differing, f"{metric.name} has no interval in the baseline"]
    else:
        assert then.interval is not None
        assert then.value is not None
        pairs = [baseline.pair_figures(metric.interval, metric.value, then.interval, then.value)]
    return _verdict(rule, artifact, said + _compared(rule, before, differing, pairs), before.run, metric.n)


def _compared(
    rule: Rule, before: Artifact, differing: Sequence[str], pairs: Sequence[baseline.Pair] | str,
    together: pairing.Together | str = "",
) -> list[Judgement]:
    if differing or isinstance(pairs, str):
        why = f"The baseline ({before.run}) was not measured in the same way: {'; '.join(differing)}."
        return [Judgement("inconclusive", "baseline-differs", [why, "Measure the baseline again as this was."])]
    return baseline.judge(rule, pairs, before.run, together)


def _side(rule: Rule, interval: Interval) -> tuple[Outcome, Reason]:
    if rule.limit is not None:
        if interval.high < rule.limit:
            return "pass", "ok"
        return ("fail", "above-limit") if interval.low > rule.limit else ("inconclusive", "interval-straddles-limit")
    assert rule.at_least is not None
    if interval.low >= rule.at_least:
        return "pass", "ok"
    return ("fail", "below-limit") if interval.high < rule.at_least else ("inconclusive", "interval-straddles-limit")


def _verdict(
    rule: Rule, artifact: Artifact | None, said: Sequence[Judgement], before: str | None = None, n: int | None = None
) -> Verdict:
    """One verdict of all demands of a rule: it fails where any fails, and passes where all pass."""
    deciding = min(said, key=lambda j: OUTCOMES.index(j.outcome))
    look = artifact.provenance.get("look") if artifact is not None else None
    power = _power(artifact)
    why = [sentence for j in (deciding, *(j for j in said if j is not deciding)) for sentence in j.why]
    if look is not None:
        why.append(_look(look))
    if power:
        why.append(_power_said(power))
    return Verdict(
        rule.name, (rule.run or "–") if artifact is None else artifact.run, deciding.outcome, _expected(rule, artifact),
        deciding.reason, why, rule.probe, rule.metric or "total",
        rule.limit if rule.limit is not None else rule.at_least, deciding.found, deciding.interval,
        n if n is not None or artifact is None or deciding.found is None else baseline.sample(artifact), deciding.where,
        dict(artifact.options) if artifact is not None else {}, rule.max_increase, rule.max_ratio, before, look, power,
    )


def _expected(rule: Rule, artifact: Artifact | None) -> str:
    metric = rule.metric or "total"
    demands = []
    if rule.limit is not None:
        demands.append(f"{metric} < {rule.limit:g}")
    if rule.at_least is not None:
        demands.append(f"{metric} ≥ {rule.at_least:g}")
    if rule.max_increase is not None:
        demands.append(f"{metric} < baseline + {rule.max_increase:g}")
    if rule.max_ratio is not None:
        demands.append(f"{metric} < {rule.max_ratio:g} × baseline")
    text = " and ".join(demands)
    if not rule.per_element:
        return f"{rule.probe} {text}"
    options = artifact.options if artifact is not None else {}
    group = options.get("transform") or options.get("group") or rule.options.get("transform") or "the group"
    return f"{text} for every element of {group}"


def _look(look: Mapping[str, Any]) -> str:
    return (
        f"Look {look['number']} of {look['of']}, at {look['images']} of {look['budget']} images: its bounds are at level "
        f"{look['level']:.2%}, so that all looks together err no more often than one at {look['asked']['level']:.0%} would."
    )


def _power(artifact: Artifact | None) -> list[dict[str, Any]]:
    table = next((t for t in artifact.tables if t.name == "power"), None) if artifact is not None else None
    if table is None:
        return []
    return [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


def _power_said(rows: Sequence[Mapping[str, Any]]) -> str:
    said = [
        f"{row['injected']} {row['demand']} in {row['rate']:.1%} [{row['low']:.1%}, {row['high']:.1%}] of {row['trials']} "
        f"trials ({row['wanted']})"
        for row in rows if row["rate"] is not None
    ]
    if not said:
        return ("Power: not told, since no defect could be injected at this limit (the model's own error is above it, or what "
                "resampling does was not measured).")
    weak = [row["injected"] for row in rows if row["holds"] is False]
    end = f" This gate does not do what it should at {', '.join(weak)}: give it more images." if weak else ""
    return f"Power, by injected defects: {'; '.join(said)}.{end}"


def _bounded(metric: Metric) -> bool:
    found = metric.interval
    return metric.value is not None and found is not None and not (math.isnan(found.low) or math.isnan(found.high))

