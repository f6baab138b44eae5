"""A verdict: what a rule says of a run, in words, as a record for machines, and as an exit code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from geomssl.artifact import Interval
from geomssl.reports.numbers import bounds, number

Outcome = Literal["pass", "fail", "inconclusive"]
Reason = Literal[
    "ok", "above-limit", "below-limit", "above-baseline", "degenerate", "inexact-pair", "interval-straddles-limit",
    "resampling-straddles-limit", "no-artifact", "no-interval", "no-elements", "baseline-differs",
]
OUTCOMES: tuple[Outcome, ...] = ("fail", "inconclusive", "pass")
# Where nothing was shown at all, no setting turns the verdict into a pass.
NEVER_PASS: frozenset[Reason] = frozenset({"degenerate", "no-artifact", "no-elements", "baseline-differs"})
SCHEMA = 1


@dataclass(frozen=True)
class Judgement:
    """One demand held against one figure: the outcome, and the figure that decided it."""

    outcome: Outcome
    reason: Reason
    why: list[str]
    found: float | None = None
    interval: Interval | None = None
    where: str = ""


@dataclass(frozen=True)
class Verdict:
    """What a rule says of a run.

    expected: the demand in words.  found, interval: the figure that decided it; of an equivariance rule, the element
    nearest to failing.  why: sentences.  reason: one word for machines.  run: the run, or "–" where none was found.
    limit: the rule's limit or at_least, None where it only compares.  baseline: the run that it was compared with.
    look: which of the planned looks decided, at how many images and which level; None where there was one measurement.
    power: the rows of the power test, where one was made.
    """

    rule: str
    run: str
    verdict: Outcome
    expected: str
    reason: Reason
    why: list[str]
    probe: str
    metric: str
    limit: float | None
    found: float | None = None
    interval: Interval | None = None
    n: int | None = None
    where: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    max_increase: float | None = None
    max_ratio: float | None = None
    baseline: str | None = None
    look: dict[str, Any] | None = None
    power: list[dict[str, Any]] = field(default_factory=list)

    @property
    def found_text(self) -> str:
        """The figure, its interval, the element and n: "0.913 [0.880, 0.941] at 90°, n=360"."""
        if self.found is None:
            return "nothing to judge"
        text = f"{number(self.found)} {bounds(self.interval) or '(no interval)'}"
        text += f" at {self.where}" if self.where else ""
        return text if self.n is None else f"{text}, n={self.n}"


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


def records(verdicts: Sequence[Verdict], inconclusive: Literal["error", "fail", "pass"] = "error") -> dict[str, Any]:
    """The verdicts as plain data for JSON: schema, exit_code, counts, and one record each; what is not finite is null."""
    return {
        "schema": SCHEMA,
        "exit_code": exit_code(verdicts, inconclusive),
        "counts": {kind: sum(v.verdict == kind for v in verdicts) for kind in OUTCOMES},
        "verdicts": [_plain(asdict(v)) for v in verdicts],
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
