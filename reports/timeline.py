"""Over training: artifacts that were measured at several steps, as one question each, metric against step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from geomssl.artifact import Artifact, Figure, Metric, Table
from geomssl.reports.compare import METRIC, PANELS

PROBE = "timeline"
TITLE = "Over training"
# lines in one figure; the table holds every metric
LINES = 8
# drawn first, as the geometry paper does (Fig. 1, 6 and 7); the others follow in their probe's order
LEADING = {
    "rank": ("rank_projector_layer_0", "effective_rank_projector_layer_0", "effective_rank_h", "rank_h",
             "stable_rank_projector_layer_0"),
    "tangent": ("unexplained_batch", "label_match_batch", "label_match_coarse_batch", "unexplained", "label_match"),
}


def courses(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """One artifact for every run and question that was measured at two steps or more.

    Its table has a row for every metric and step; its figures draw the metrics of one unit against the step, the same for
    all runs: of several, so few that each metric has a panel in which the runs lie over each other.
    """
    groups = [group for group in _groups(artifacts) if len(group) > 1]
    asked: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        asked.setdefault(group[0].probe, []).append(group[0].options)
    found = []
    for group in groups:
        mine, others = group[0].options, asked[group[0].probe]
        differing = {k: v for k, v in mine.items() if any(other.get(k) != v for other in others)}
        same = [one for one in groups if (one[0].probe, one[0].options_hash) == (group[0].probe, group[0].options_hash)]
        found.append(_course(group, _moving(same), LINES if len(same) == 1 else PANELS, {"probe": group[0].probe, **differing}))
    return found


def shown(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """Those to show in full: all without a step, and of every course the first, the middle and the last."""
    left_out = set()
    for group in _groups(artifacts):
        kept = {0, (len(group) - 1) // 2, len(group) - 1}
        left_out |= {id(one) for place, one in enumerate(group) if place not in kept}
    return [one for one in artifacts if id(one) not in left_out]


def _groups(artifacts: Sequence[Artifact]) -> list[list[Artifact]]:
    """Artifacts with a step by run and question, in the order of their steps."""
    found: dict[tuple[str, str, str, str], list[Artifact]] = {}
    for one in artifacts:
        if one.step is not None:
            key = (one.run, str(one.provenance.get("recipe_sha256", "")), one.probe, one.options_hash)
            found.setdefault(key, []).append(one)
    return [sorted(group, key=lambda one: int(one.step or 0)) for group in found.values()]


def _course(group: Sequence[Artifact], drawn: dict[str, list[str]], most: int, options: dict[str, Any]) -> Artifact:
    last = group[-1]
    metrics = [m for m in last.metrics if any(_find(one, m.name) for one in group[:-1])]
    named = [m.name for m in metrics]
    rows = [
        (name, one.step, one.provenance.get("epoch"), found.value, found.interval, found.n)
        for name in named for one in group if (found := _find(one, name)) is not None
    ]
    table = Table(
        "course", "Every metric at every step",
        {
            "metric": [r[0] for r in rows],
            "step": [r[1] for r in rows],
            "epoch": [r[2] for r in rows],
            "value": [None if r[3] is None else float(r[3]) for r in rows],
            "low": [r[4].low if r[4] else None for r in rows],
            "high": [r[4].high if r[4] else None for r in rows],
            "n": [r[5] for r in rows],
        },
        "low, high: the interval of each figure by itself, where it has one. n: what it rests on.",
    )
    tables, figures = [table], []
    for number, (unit, some) in enumerate(drawn.items()):
        left = len(some) - len(some[:most])
        name = f"{last.probe}-{number + 1}"
        tables.append(Table(name, f"{last.title} over training", _rows(table, some[:most])))
        more = f" {left} further metric{' stands' if left == 1 else 's stand'} in the table of all." if left else ""
        sizes = {n for key, n in zip(table.columns["metric"], table.columns["n"], strict=True) if key in some[:most] and n}
        count = f", n = {sizes.pop()}" if len(sizes) == 1 else ""
        caption = f"At {len(group)} steps{count}; step 0 is the initialisation. Bars: intervals, where there are some.{more}"
        figures.append(Figure(
            name, "line", f"{last.title} over training", caption,
            name, "step", "value", METRIC, "low", "high", x_label="step", y_label=unit or "value",
        ))
    return dataclasses.replace(
        last, probe=PROBE, title=TITLE, headline=_headline(metrics, group), metrics=[], tables=tables, figures=figures,
        definition=f"{last.probe}, measured while training at steps {', '.join(str(one.step) for one in group)}.",
        notes=[], options=options, step=None, files={},
    )


def _find(one: Artifact, name: str) -> Metric | None:
    return next((m for m in one.metrics if m.name == name), None)


def _moving(groups: Sequence[Sequence[Artifact]]) -> dict[str, list[str]]:
    """Names of the metrics of each unit, the leading ones first; those that move in no run, or were never given, left out."""
    units: dict[str, str] = {}
    moving: set[str] = set()
    for group in groups:
        seen: dict[str, set[float]] = {}
        for one in group:
            for m in one.metrics:
                units.setdefault(m.name, m.unit)
                if m.value is not None:
                    seen.setdefault(m.name, set()).add(float(m.value))
        moving |= {name for name, values in seen.items() if len(values) > 1}
    leading = LEADING.get(groups[0][0].probe, ())
    found: dict[str, list[str]] = {}
    for name in (*leading, *(name for name in units if name not in leading)):
        if name in moving:
            found.setdefault(units[name], []).append(name)
    return found


def _rows(table: Table, some: Sequence[str]) -> dict[str, list[Any]]:
    kept = [i for name in some for i, own in enumerate(table.columns["metric"]) if own == name]
    return {key: [column[i] for i in kept] for key, column in table.columns.items()}


def _headline(metrics: Sequence[Metric], group: Sequence[Artifact]) -> str:
    """The main metric at the first and at the last step."""
    from geomssl.reports.numbers import number

    for m in sorted(metrics, key=lambda m: m.better is None):
        first, last = (_find(one, m.name) for one in (group[0], group[-1]))
        if first and last and first.value is not None and last.value is not None:
            return (
                f"{group[-1].probe}: {m.name.replace('_', ' ')} goes from {number(first.value)} at step {group[0].step} "
                f"to {number(last.value)} at step {group[-1].step}."
            )
    return f"{group[-1].probe}: measured at {len(group)} steps."
