"""The table of a sweep: mean, std and t interval over seeds beside published figures, and the comparisons, as an artifact."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import geomssl
from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.paired import Comparison, compare, mean
from geomssl.sweep import Pair, Plan, named

DEFINITION = (
    "Mean and standard deviation (n - 1) over seeds, with the interval of Student's t: it covers the mean over all seeds of "
    "this recipe on these images, and no other spread. A comparison pairs equal seeds: d = a - b. Equivalent: both one-sided t "
    "tests reject a difference as large as the margin. Else different: the interval of d leaves out 0. Else undecided. Each "
    "pair is judged by itself: nothing is corrected for their number."
)


@dataclass(frozen=True)
class Value:
    """A figure of one run, with what its probe says of it."""

    value: float
    unit: str = ""
    better: Literal["lower", "higher"] | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of a unit: its values by metric, or the line that says why there are none."""

    values: Mapping[str, Value]
    failed: str | None = None
    epochs: int = 0


Outcomes = Mapping[tuple[str, int], Outcome]


def collect(plan: Plan, outcomes: Outcomes, cell: str, metric: str) -> dict[int, Value]:
    """The values of a metric of a cell, by seed."""
    found = {}
    for seed in plan.sweep.seeds:
        outcome = outcomes.get((cell, seed))
        if outcome is not None and metric in outcome.values:
            found[seed] = outcome.values[metric]
    return found


def compared(plan: Plan, outcomes: Outcomes, pair: Pair) -> tuple[list[int], Comparison] | None:
    """The seeds that both cells have, and the comparison over them; None where there are none."""
    a = collect(plan, outcomes, pair.a, pair.metric)
    b = collect(plan, outcomes, pair.b, pair.against or pair.metric)
    seeds = [seed for seed in a if seed in b]
    if not seeds:
        return None
    return seeds, compare([a[s].value for s in seeds], [b[s].value for s in seeds], pair.margin, plan.sweep.level)


def tabulate(plan: Plan, outcomes: Outcomes, name: str, provenance: Mapping[str, Any]) -> Artifact:
    """The artifact `sweep` of those outcomes. name: the sweep's own, which tells it from others in one folder.

    Cells without any outcome (none was asked for, and none is there) are left out.
    """
    sweep = plan.sweep
    cells = [cell for cell in plan.cells if any((cell, seed) in outcomes for seed in sweep.seeds)]
    level = f"{sweep.level:.0%}"
    metrics: list[Metric] = []
    tables, figures = [], []
    for metric in sweep.metrics:
        rows: list[dict[str, Any]] = []
        unit = ""
        for cell in cells:
            values = collect(plan, outcomes, cell, metric)
            row: dict[str, Any] = dict.fromkeys(("cell", "mean", "std", "low", "high", "n", "paper", "paper_std"))
            row["cell"], row["n"] = cell, len(values)
            row["paper"], row["paper_std"] = plan.paper.get(cell, {}).get(metric, (None, None))
            if values:
                found = mean([v.value for v in values.values()], sweep.level)
                row |= {"mean": found.value, "std": found.std, "low": found.low, "high": found.high}
                unit = next(iter(values.values())).unit
                interval = None
                if found.low is not None and found.high is not None:
                    interval = Interval(found.low, found.high, f"Student's t over seeds, {level}")
                metrics.append(Metric(
                    f"{metric} of {cell}", found.value, found.n, interval, None if interval else "one seed has no spread",
                    unit, next(iter(values.values())).better, about=f"mean over {found.n} seeds",
                ))
            rows.append(row)
        table = _plain(metric)
        tables.append(Table(
            table, f"{metric}, mean and std over seeds", {key: [row[key] for row in rows] for key in rows[0]},
            f"low and high: {level} interval of Student's t over the seeds. n: seeds. paper: the published figure.",
        ))
        figures.append(Figure(
            f"{table}_bars", "bar", f"{metric} by cell", f"Bars: {level} interval of Student's t over seeds.", table, "cell",
            "mean", low="low", high="high", x_label="cell", y_label=f"{metric} ({unit})" if unit else metric,
        ))
    for course, figure in _courses(plan, outcomes, cells):
        tables.append(course)
        figures.append(figure)
    pairs = _pairs(plan, outcomes, cells, metrics)
    if pairs:
        tables.append(pairs)
    tables.append(_runs(plan, outcomes))
    failed = [f"{cell}, seed {seed}: {o.failed}" for (cell, seed), o in outcomes.items() if o.failed]
    return Artifact(
        "sweep", sweep.title or "Cells over seeds", _headline(cells, outcomes, pairs), DEFINITION, metrics, tables, figures,
        notes=[f"failed: {line}" for line in failed],
        options={"name": name},
        provenance={
            **provenance, "seeds": list(sweep.seeds), "split": sweep.split,
            "versions": {"geomssl": geomssl.__version__, "python": platform.python_version()},
        },
    )


def _plain(metric: str) -> str:
    """A metric's name as that of a file."""
    return metric.replace(".", "_").replace("@", "_at_")


def _courses(plan: Plan, outcomes: Outcomes, cells: Sequence[str]) -> Iterator[tuple[Table, Figure]]:
    """Metrics that were asked for at several epochs: mean and standard deviation over seeds, along training, by cell."""
    recipes = {unit.cell: unit.recipe for unit in plan.units}
    moments: dict[str, list[str]] = {}
    for metric in plan.sweep.metrics:
        if named(metric).when:
            moments.setdefault(metric.partition("@")[0], []).append(metric)
    for base, metrics in moments.items():
        if len(metrics) < 2:
            continue
        columns: dict[str, list[Any]] = {key: [] for key in ("cell", "epoch", "mean", "std", "low", "high", "n")}
        for cell in cells:
            # "last" may be an epoch that is named by its number too
            for epoch, metric in sorted({named(m).epoch(recipes[cell]): m for m in metrics}.items()):
                values = [v.value for v in collect(plan, outcomes, cell, metric).values()]
                row: dict[str, Any] = {"cell": cell, "epoch": epoch, "n": len(values)}
                if values:
                    found = mean(values, plan.sweep.level)
                    row |= {"mean": found.value, "std": found.std}
                    if found.std is not None:
                        row |= {"low": found.value - found.std, "high": found.value + found.std}
                for key, column in columns.items():
                    column.append(row.get(key))
        name = f"{_plain(base)}_course"
        title, about = f"{base} over training", "low and high: mean - std and mean + std over the seeds, std with n - 1."
        caption = "Mean over seeds; bands: one standard deviation. Epoch 0 is the initialisation."
        yield Table(name, title, columns, about), Figure(
            name, "line", title, caption, name, "epoch", "mean", "cell", "low", "high", x_label="epoch", y_label=base
        )


def _pairs(plan: Plan, outcomes: Outcomes, cells: Sequence[str], metrics: list[Metric]) -> Table | None:
    """The comparisons as a table; each also becomes a metric."""
    columns: dict[str, list[Any]] = {}
    for pair in plan.sweep.compare:
        if pair.a not in cells or pair.b not in cells:
            continue
        there = compared(plan, outcomes, pair)
        found = there[1] if there else None
        d = found.difference if found else None
        row = {
            "a": pair.a, "b": pair.b, "metric": pair.metric, "against": pair.against or pair.metric,
            "difference": d.value if d else None, "std": d.std if d else None, "low": d.low if d else None,
            "high": d.high if d else None, "n": d.n if d else 0, "p": found.p if found else None,
            "margin": pair.margin, "p_lower": found.p_lower if found else None, "p_upper": found.p_upper if found else None,
            "verdict": found.verdict if found else "undecided",
        }
        for key, value in row.items():
            columns.setdefault(key, []).append(value)
        if d is not None:
            interval = None
            if d.low is not None and d.high is not None:
                interval = Interval(d.low, d.high, f"Student's t over paired seeds, {plan.sweep.level:.0%}")
            metrics.append(Metric(
                f"{pair.metric} of {pair.a} - {f'{pair.against} of ' if pair.against else ''}{pair.b}", d.value, d.n, interval,
                None if interval else "one pair has no spread", about=f"paired difference: {row['verdict']}",
            ))
    if not columns:
        return None
    alpha = 1 - plan.sweep.level
    return Table(
        "compare", "Pairs of cells over the same seeds", columns,
        f"p: two-sided t test of no difference. p_lower, p_upper: one-sided, of a difference at or beyond -margin, +margin. "
        f"equivalent: both < {alpha:.2g}; else different: p < {alpha:.2g}; else undecided.",
    )


def _runs(plan: Plan, outcomes: Outcomes) -> Table:
    """Every run with its values, so that other statistics can be taken."""
    order = [key for unit in plan.units if (key := (unit.cell, unit.seed)) in outcomes]
    there = {key: outcomes[key] for key in order}
    columns: dict[str, list[Any]] = {
        "cell": [cell for cell, _ in order],
        "seed": [seed for _, seed in order],
        "epochs": [there[key].epochs for key in order],
    }
    for metric in plan.sweep.metrics:
        columns[metric] = [there[key].values[metric].value if metric in there[key].values else None for key in order]
    columns["failed"] = [there[key].failed for key in order]
    return Table("runs", "Every run", columns)


def _headline(cells: Sequence[str], outcomes: Outcomes, pairs: Table | None) -> str:
    whole = sum(outcome.failed is None for outcome in outcomes.values())
    seeds = len({seed for _, seed in outcomes})
    plural = ["" if n == 1 else "s" for n in (len(cells), seeds)]
    said = f"{len(cells)} cell{plural[0]}, {seeds} seed{plural[1]}: {whole} of {len(outcomes)} runs are whole."
    if pairs is None:
        return said
    verdicts: Sequence[str] = pairs.columns["verdict"]
    counts = ", ".join(f"{verdicts.count(kind)} {kind}" for kind in ("equivalent", "different", "undecided"))
    return f"{said} Pairs: {counts}."
