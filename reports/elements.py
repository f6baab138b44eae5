"""The table `elements` of an equivariance artifact, read and held against a limit: pass needs every element, one fails it.

Every element has bounds of the true defect: [low, high] of its total error where image and features are only permuted,
widened by the resampling distance r where they are resampled. A table without bounds has them for its exact rows only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from geomssl.artifact import Artifact, Interval
from geomssl.reports.numbers import bounds, number
from geomssl.reports.rules import CHANCE
from geomssl.reports.verdict import Judgement, Outcome, Reason

COLUMNS = ("element", "total", "low", "high", "low_any", "action_size", "exact", "degenerate")


@dataclass(frozen=True)
class Element:
    """One row: the total error with its interval, r, and the bounds of the true defect; NaN where there is no figure."""

    name: str
    layer: str
    total: float
    low: float
    high: float
    low_any: float
    resampling: float
    bound_low: float
    bound_high: float
    bound_low_any: float
    action_size: float
    exact: bool
    degenerate: bool

    @property
    def interval(self) -> Interval | None:
        """The bounds of the true defect, or None."""
        if math.isnan(self.bound_low) or math.isnan(self.bound_high):
            return None
        widened = " of this element, widened by the resampling distance" if self.resampling > 0 else " of this element"
        return Interval(self.bound_low, self.bound_high, f"pointwise interval{widened}")

    @property
    def text(self) -> str:
        """0.939 [0.892, 0.986], and the bounds of the defect where resampling widens them."""
        own = None if math.isnan(self.low + self.high) else Interval(self.low, self.high, "")
        text = f"{number(finite(self.total))} {bounds(own)}".strip()
        return f"{text} (defect within {bounds(self.interval)})" if self.resampling > 0 and self.interval else text


def read(artifact: Artifact) -> list[Element] | str:
    """The elements of an artifact, or a sentence that says why there are none. Several layers are named in `name`."""
    table = next((t for t in artifact.tables if t.name == "elements"), None)
    if table is None or not len(table):
        return "The artifact has no table of elements."
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        return f"The artifact's table of elements lacks {', '.join(missing)}."
    rows = [dict(zip(table.columns, row, strict=True)) for row in zip(*table.columns.values(), strict=True)]
    several = len({row.get("layer") for row in rows}) > 1
    return [_element(row, several) for row in rows]


def _element(row: dict[str, Any], several: bool) -> Element:
    values = {key: _number(row[key]) for key in ("total", "low", "high", "low_any", "action_size")}
    exact, layer = bool(row["exact"]), str(row.get("layer") or "")
    for key in ("low", "high", "low_any"):
        # a table of an older version: the interval of an exact row is that of the defect, another row has no bounds
        values[f"bound_{key}"] = _number(row[f"bound_{key}"]) if f"bound_{key}" in row else values[key] if exact else math.nan
    resampling = _number(row["resampling"]) if "resampling" in row else 0.0 if exact else math.nan
    name = f"{row['element']} of {layer}" if several else str(row["element"])
    return Element(
        name=name, layer=layer, exact=exact, degenerate=bool(row["degenerate"]), resampling=resampling, **values
    )


def judge(rows: Sequence[Element], limit: float) -> Judgement:
    """All bounds below the limit: pass (intersection–union). One simultaneous lower bound above it: fail. Else inconclusive."""
    sound = [r for r in rows if not r.degenerate]
    over = [r for r in sound if r.bound_low_any > limit]
    degenerate = [r for r in rows if r.degenerate]
    unbounded = [r for r in sound if r.interval is None]
    inexact = [r for r in unbounded if not r.exact]
    straddling = [r for r in sound if not r.bound_high < limit]
    outcome: Outcome = "inconclusive"
    reason: Reason
    if over:
        outcome, reason, worst = "fail", "above-limit", max(over, key=lambda r: r.bound_low_any)
        why = [f"{count(over, rows)} above {limit:g}. At {worst.name} the total error is {worst.text}; its lower "
               f"bound, which holds for all elements at once, is {number(worst.bound_low_any)}."]
    elif degenerate:
        reason, worst = "degenerate", degenerate[0]
        why = [f"The features hardly vary from image to image at {worst.name}, so an error relative to their variance "
               "says nothing; a constant network would look equivariant."]
    elif inexact:
        reason, worst = "inexact-pair", highest(inexact, "total")
        why = [f"At {worst.name} the transformation or its action resamples ({count(inexact, rows)} without bounds), so "
               f"the total error {worst.text} mixes the defect with interpolation.",
               "Judge on rendered inputs (images = \"fields\" among the rule's options), or elements that only permute pixels."]
    elif unbounded:
        reason, worst = "no-interval", unbounded[0]
        why = [f"The total error at {worst.name} has no interval."]
    elif straddling:
        worst = highest(straddling, "bound_high")
        if worst.resampling > 0 and (worst.high < limit or worst.low_any > limit):
            reason = "resampling-straddles-limit"
            why = [f"At {worst.name} the total error is {worst.text}: the resampling distance {number(worst.resampling)}, and "
                   f"no lack of images, is what reaches across {limit:g}.",
                   "Judge on rendered inputs (images = \"fields\" among the rule's options), where nothing is resampled."]
        else:
            reason = "interval-straddles-limit"
            why = [f"At {worst.name} the interval {worst.text} reaches {limit:g}, and no element is above it for "
                   "certain. More images narrow the interval."]
    else:
        outcome, reason, worst = "pass", "ok", highest(rows, "bound_high")
        why = [f"Every upper bound is below {limit:g}; the worst element is {worst.name} with {worst.text}."]
    why += beside(rows, worst, limit, outcome)
    return Judgement(outcome, reason, why, finite(worst.total), worst.interval or _own(worst), worst.name)


def beside(rows: Sequence[Element], worst: Element, limit: float, outcome: Outcome) -> list[str]:
    """What a reader needs beside a total error: chance, how much the action moves, and what is exact."""
    largest = max((r.action_size for r in rows if not math.isnan(r.action_size)), default=math.nan)
    said = [f"Unrelated features score {number(CHANCE)} (chance)."]
    if largest == 0:
        said.append("The declared action leaves features as they are: this is a test of invariance.")
    elif outcome == "pass" and largest < limit:
        said.append(f"The action itself moves these features by {number(largest)} at most, less than the limit: an invariant "
                    "network passes too, so this pass says little.")
    elif not math.isnan(largest):
        said.append(f"The action itself moves these features by {number(finite(worst.action_size))} there"
                    + (", so the pass is not trivial." if outcome == "pass" and worst.action_size > limit else "."))
    exact = [r for r in rows if r.exact]
    share = "Every element is" if len(exact) == len(rows) else "No element is" if not exact else count(exact, rows)
    said.append(f"{share} exact: image and features are only permuted." if exact else
                f"{share} exact: bounds of the defect are those of the total, widened by what is resampled.")
    return said


def highest(rows: Sequence[Element], column: str) -> Element:
    """The row where a column is largest; what is NaN counts as least."""
    return max(rows, key=lambda row: -math.inf if math.isnan(getattr(row, column)) else getattr(row, column))


def count(some: Sequence[Element], rows: Sequence[Element]) -> str:
    return f"{len(some)} of {len(rows)} elements {'is' if len(some) == 1 else 'are'}"


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _own(row: Element) -> Interval | None:
    if math.isnan(row.low) or math.isnan(row.high):
        return None
    return Interval(row.low, row.high, "pointwise interval of this element's total, no bound of the defect")


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
