"""The gate: rules and artifacts in, verdicts out. Nothing is measured here, and no verdict rests on a point estimate.

    pass           the whole interval lies on the good side of the limit
    fail           the whole interval lies on the bad side
    inconclusive   anything else, and wherever there is nothing to judge by
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from geomssl.artifact import Artifact, Interval, Metric, Table
from geomssl.config import Settings, parse, read_toml
from geomssl.errors import GeomsslError, nearest
from geomssl.reports.numbers import bounds, number

Outcome = Literal["pass", "fail", "inconclusive"]
Reason = Literal[
    "ok", "above-limit", "below-limit", "degenerate", "inexact-pair", "interval-straddles-limit", "no-artifact", "no-interval",
    "no-elements",
]
# Where nothing was shown at all, no setting turns the verdict into a pass.
NEVER_PASS: frozenset[Reason] = frozenset({"degenerate", "no-artifact", "no-elements"})
CHANCE = math.sqrt(2)
_COLUMNS = ("element", "total", "low", "high", "low_any", "action_size", "exact", "degenerate")


class Rule(Settings):
    """One demand on one figure: `limit` (pass below it) or `at_least`."""

    name: str = Field(min_length=1, description="what the rule is called in every output")
    probe: str = Field(min_length=1, description="the probe whose artifact is judged")
    metric: str | None = Field(None, description="the figure; total, over all elements, when the probe is equivariance")
    limit: float | None = Field(None, allow_inf_nan=False, description="pass when the figure is below this")
    at_least: float | None = Field(None, allow_inf_nan=False, description="pass when the figure is at least this")
    run: str | None = Field(None, description="the run to judge; every run when not given")
    options: dict[str, Any] = Field(default_factory=dict, description="how it must have been measured")

    @model_validator(mode="after")
    def _complete(self) -> Rule:
        here = f"rule {self.name!r}"
        if (self.limit is None) == (self.at_least is None):
            both = "both limit and at_least" if self.limit is not None else "neither limit nor at_least"
            raise GeomsslError(f"{here} has {both}", "one of them", reason="bad-value")
        if self.per_element:
            if self.limit is None or not 0 < self.limit < CHANCE:
                given = f"limit = {self.limit}" if self.limit is not None else f"at_least = {self.at_least}"
                raise GeomsslError(
                    f"{here}: {given}", "a limit between 0 and √2, which is what unrelated features score",
                    reason="bad-value",
                )
        elif self.metric is None:
            raise GeomsslError(f"{here} names no metric of {self.probe}", "metric = \"...\"", reason="bad-value")
        elif self.probe == "equivariance" and self.metric in ("excess", "floor"):
            raise GeomsslError(
                f"{here}: metric = {self.metric!r}", "total: floor and excess describe resampling and judge nothing",
                reason="bad-value",
            )
        return self

    @property
    def per_element(self) -> bool:
        """Is this judged element by element, from the table `elements`?"""
        return self.probe == "equivariance" and self.metric in (None, "total")


class Rules(Settings):
    """A rules file: one [[rule]] or more, and nothing else."""

    rule: tuple[Rule, ...] = Field(description="the rules, in the order in which they are reported")

    @model_validator(mode="after")
    def _distinct(self) -> Rules:
        if not self.rule:
            raise GeomsslError("rules without a single [[rule]]", "at least one", reason="no-rules")
        names = [rule.name for rule in self.rule]
        for name in names:
            if names.count(name) > 1:
                raise GeomsslError(f"two rules called {name!r}", "a name of its own for each", reason="bad-value")
        return self


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a run.

    expected: the demand in words.  found, interval: the figure that decided it; of an equivariance rule, the element
    nearest to failing.  why: sentences.  reason: one word for machines.  run: the run, or "–" where none was found.
    """

    rule: str
    run: str
    verdict: Outcome
    expected: str
    reason: Reason
    why: list[str]
    probe: str
    metric: str
    limit: float
    found: float | None = None
    interval: Interval | None = None
    n: int | None = None
    where: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def found_text(self) -> str:
        """The figure, its interval, the element and n: "0.913 [0.880, 0.941] at 90°, n=360"."""
        if self.found is None:
            return "nothing to judge"
        text = f"{number(self.found)} {bounds(self.interval) or '(no interval)'}"
        text += f" at {self.where}" if self.where else ""
        return text if self.n is None else f"{text}, n={self.n}"


def read_rules(path: Path | str) -> Rules:
    """The rules in a TOML file. GeomsslError names the file and the first bad key, value or rule."""
    data = read_toml(path)
    for key in data.keys() - {"rule"}:
        raise GeomsslError(f"{path}: unknown key {key!r}", "[[rule]] only", nearest(key, ["rule"]), reason="unknown-key")
    if not data.get("rule"):
        raise GeomsslError(f"{path} has no rule", "at least one [[rule]]", reason="no-rules")
    tables = data.get("rule")
    if isinstance(tables, list):
        # one by one, so that a complaint names the rule
        for index, table in enumerate(tables, 1):
            if isinstance(table, dict):
                parse(Rule, table, f"{path}: rule {table.get('name', index)}")
    return parse(Rules, data, str(path))


def evaluate(artifacts: Sequence[Artifact], rules: Rules) -> list[Verdict]:
    """One verdict for every rule and every run that it applies to, in the rules' order.

    Of several snapshots of a run, the last is judged. GeomsslError where there is no artifact at all, where a metric
    does not exist, and where a rule asks the wrong side (a limit for a figure that is better when higher).
    """
    if not artifacts:
        raise GeomsslError("no artifacts to judge", "at least one measured artifact", reason="no-artifact")
    verdicts = []
    for rule in rules.rule:
        matching = _latest(a for a in artifacts if not _mismatch(rule, a))
        if not matching:
            verdicts.append(_absent(rule, artifacts))
        verdicts += [_elements(rule, a) if rule.per_element else _figure(rule, a) for a in matching]
    return verdicts


def exit_code(verdicts: Sequence[Verdict], inconclusive: Literal["error", "fail", "pass"] = "error") -> int:
    """0 when every verdict is a pass, 1 when any is a failure, 2 when any is inconclusive or there is none.

    inconclusive: "fail" counts those as failures; "pass" as passes, but for those that showed nothing (NEVER_PASS).
    """
    if any(v.verdict == "fail" for v in verdicts):
        return 1
    open_ones = [v for v in verdicts if v.verdict == "inconclusive"]
    if open_ones and inconclusive == "fail":
        return 1
    if inconclusive == "pass":
        open_ones = [v for v in open_ones if v.reason in NEVER_PASS]
    return 2 if open_ones or not verdicts else 0


def describe(verdict: Verdict) -> str:
    """The verdict for a terminal: one line, then expected, found with its interval, and why."""
    lines = [
        f"{verdict.verdict.upper():<13} {verdict.rule}  ({verdict.run})",
        f"    expected  {verdict.expected}",
        f"    found     {verdict.found_text}",
    ]
    lines += [f"    {'why' if i == 0 else '':<8}  {sentence}" for i, sentence in enumerate(verdict.why)]
    return "\n".join(lines)


def _mismatch(rule: Rule, artifact: Artifact) -> str:
    """In what an artifact is not the one that the rule means; empty where it is."""
    if artifact.probe != rule.probe:
        return f"probe {artifact.probe}"
    if rule.run is not None and artifact.run != rule.run:
        return f"run {artifact.run}"
    for key, value in rule.options.items():
        if key not in artifact.options or not _same(value, artifact.options[key]):
            return f"{key} = {artifact.options.get(key, 'not an option')!r}"
    return ""


def _same(wanted: Any, found: Any) -> bool:
    """Equal as settings: 1 is 1.0, but true is not 1; a list is equal to a tuple."""
    if isinstance(wanted, bool) or isinstance(found, bool):
        return wanted is found
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
    return _verdict(rule, rule.run or "–", "inconclusive", "no-artifact", [why])


def _elements(rule: Rule, artifact: Artifact) -> Verdict:
    """Total error, element by element: all must be below (intersection–union), any that is above fails (`low_any`)."""
    limit = rule.limit
    assert limit is not None
    table = next((t for t in artifact.tables if t.name == "elements"), None)
    if table is None or not len(table) or any(c not in table.columns for c in _COLUMNS):
        missing = "" if table is None else ", ".join(c for c in _COLUMNS if c not in table.columns)
        said = f"The artifact's table of elements lacks {missing}." if missing else "The artifact has no table of elements."
        return _verdict(rule, artifact.run, "inconclusive", "no-elements", [said])
    rows = _rows(table)
    group = artifact.options.get("transform") or artifact.options.get("group")
    judged = [r for r in rows if r["exact"] and not r["degenerate"]]
    over = [r for r in judged if _number(r["low_any"]) > limit]
    degenerate = [r for r in rows if r["degenerate"]]
    inexact = [r for r in rows if not r["exact"] and not r["degenerate"]]
    unbounded = [r for r in judged if math.isnan(_number(r["low"])) or math.isnan(_number(r["high"]))]
    straddling = [r for r in judged if not _number(r["high"]) < limit]
    outcome: Outcome = "inconclusive"
    reason: Reason
    why: list[str]
    if over:
        outcome, reason, worst = "fail", "above-limit", _worst(over, "low_any")
        why = [f"{_count(over, rows)} above {limit:g}. At {worst['element']} the total error is {_total(worst)}; its lower "
               f"bound, which holds for all elements at once, is {number(worst['low_any'])}."]
    elif degenerate:
        reason, worst = "degenerate", degenerate[0]
        why = [f"The features hardly vary from image to image at {worst['element']}, so an error relative to their variance "
               "says nothing; a constant network would look equivariant."]
    elif inexact:
        reason, worst = "inexact-pair", _worst(inexact, "total")
        why = [f"At {worst['element']} the transformation or its action resamples ({_count(inexact, rows)} not exact), so "
               f"the total error {_total(worst)} mixes the defect with interpolation.",
               "Judge elements that only permute pixels."]
    elif unbounded:
        reason, worst = "no-interval", unbounded[0]
        why = [f"The total error at {worst['element']} has no interval."]
    elif straddling:
        reason, worst = "interval-straddles-limit", _worst(straddling, "high")
        why = [f"At {worst['element']} the interval {_total(worst)} reaches {limit:g}, and no element is above it for "
               "certain. More images narrow the interval."]
    else:
        outcome, reason, worst = "pass", "ok", _worst(rows, "high")
        why = [f"Every upper bound is below {limit:g}; the worst element is {worst['element']} with {_total(worst)}."]
    why += _beside(rows, worst, limit, outcome)
    return _verdict(
        rule, artifact.run, outcome, reason, why, _finite(worst["total"]), _interval(worst), _sample(artifact),
        str(worst["element"]), group, artifact.options,
    )


def _beside(rows: list[dict[str, Any]], worst: dict[str, Any], limit: float, outcome: Outcome) -> list[str]:
    """What a reader needs beside a total error: chance, how much the action moves, and what is exact."""
    moving = [_number(r["action_size"]) for r in rows]
    largest = max((m for m in moving if not math.isnan(m)), default=math.nan)
    said = [f"Unrelated features score {number(CHANCE)} (chance)."]
    if largest == 0:
        said.append("The declared action leaves features as they are: this is a test of invariance.")
    elif outcome == "pass" and largest < limit:
        said.append(f"The action itself moves these features by {number(largest)} at most, less than the limit: an invariant "
                    "network passes too, so this pass says little.")
    elif not math.isnan(largest):
        said.append(f"The action itself moves these features by {number(_finite(worst['action_size']))} there"
                    + (", so the pass is not trivial." if outcome == "pass" and _number(worst["action_size"]) > limit else "."))
    exact = [r for r in rows if r["exact"]]
    share = "Every element is" if len(exact) == len(rows) else _count(exact, rows)
    said.append(f"{share} exact: image and features are only permuted.")
    return said


def _figure(rule: Rule, artifact: Artifact) -> Verdict:
    """Any other metric: its interval against the limit."""
    metric = artifact.metric(str(rule.metric))
    wrong = {"lower": rule.at_least, "higher": rule.limit}.get(metric.better or "")
    if wrong is not None:
        right = "limit" if metric.better == "lower" else "at_least"
        raise GeomsslError(
            f"rule {rule.name!r}: {metric.name} is better when {metric.better}", f"{right} = ...", reason="wrong-side"
        )
    outcome: Outcome
    reason: Reason
    if metric.value is None or metric.interval is None or not _is_bounded(metric.interval):
        outcome, reason = "inconclusive", "no-interval"
        why = [f"{metric.name} has no interval: {metric.reason or 'none was measured'}."]
    else:
        outcome, reason = _side(rule, metric.interval)
        text = f"{number(metric.value)} {bounds(metric.interval)}"
        demand = f"below {rule.limit:g}" if rule.limit is not None else f"at least {rule.at_least:g}"
        why = {
            "pass": [f"The whole interval {text} is {demand}."],
            "fail": [f"No part of the interval {text} is {demand}."],
            "inconclusive": [f"The interval {text} holds the limit. More images may narrow it."],
        }[outcome]
        why.append(f"Interval: {metric.interval.method}.")
    return _verdict(
        rule, artifact.run, outcome, reason, why, metric.value, metric.interval, metric.n, options=artifact.options
    )


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
    rule: Rule, run: str, outcome: Outcome, reason: Reason, why: list[str], found: float | None = None,
    interval: Interval | None = None, n: int | None = None, where: str = "", group: Any = None,
    options: Mapping[str, Any] | None = None,
) -> Verdict:
    metric = rule.metric or "total"
    if rule.limit is not None:
        limit, demand = rule.limit, f"{metric} < {rule.limit:g}"
    else:
        assert rule.at_least is not None
        limit, demand = rule.at_least, f"{metric} ≥ {rule.at_least:g}"
    if rule.per_element:
        demand += f" for every element of {group or rule.options.get('transform') or 'the group'}"
    else:
        demand = f"{rule.probe} {demand}"
    return Verdict(
        rule.name, run, outcome, demand, reason, why, rule.probe, metric, limit, found, interval, n, where, dict(options or {})
    )


def _rows(table: Table) -> list[dict[str, Any]]:
    return [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _finite(value: Any) -> float | None:
    return float(value) if math.isfinite(_number(value)) else None


def _is_bounded(interval: Interval) -> bool:
    return not (math.isnan(interval.low) or math.isnan(interval.high))


def _worst(rows: list[dict[str, Any]], column: str) -> dict[str, Any]:
    return max(rows, key=lambda row: -math.inf if math.isnan(_number(row[column])) else _number(row[column]))


def _interval(row: dict[str, Any]) -> Interval | None:
    low, high = _number(row["low"]), _number(row["high"])
    if math.isnan(low) or math.isnan(high):
        return None
    return Interval(low, high, "pointwise interval of this element")


def _total(row: dict[str, Any]) -> str:
    return f"{number(_finite(row['total']))} {bounds(_interval(row))}".strip()


def _count(some: list[dict[str, Any]], rows: list[dict[str, Any]]) -> str:
    return f"{len(some)} of {len(rows)} elements {'is' if len(some) == 1 else 'are'}"


def _sample(artifact: Artifact) -> int | None:
    """How many images the artifact rests on: the n of its metrics."""
    return next((m.n for m in _totals_first(artifact.metrics) if m.n is not None), None)


def _totals_first(metrics: list[Metric]) -> list[Metric]:
    return sorted(metrics, key=lambda m: not m.name.startswith("total"))
