"""Several runs side by side: which artifacts answer the same question, and their figures laid over each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from geomssl import figures
from geomssl.artifact import Artifact, Figure, Metric, Table
from geomssl.reports.numbers import number

# The order in which a reader asks; other probes follow in order of appearance.
ORDER = (
    "timeline", "sweep", "equivariance", "action", "lie", "consistency", "explain", "equivalence", "linear", "regress",
    "transfer", "segment", "reconstructions", "rank", "spectrum", "bound", "tangent", "local", "kernel", "embed", "saliency",
)
KEY_METRICS = 3
PANELS = 4
RUN = "run"
# the column of a figure whose series are different quantities, as over training
METRIC = "metric"


@dataclass(frozen=True)
class Question:
    """One probe with one set of options, answered by one run or more."""

    probe: str
    label: str
    """In what its options differ from the probe's other questions; empty where there is no other."""
    answers: dict[str, Artifact]

    @property
    def first(self) -> Artifact:
        return next(iter(self.answers.values()))


@dataclass(frozen=True)
class Panel:
    """One drawing: which figure of which table, and of which run or part it tells. order: the labels that fix colours."""

    title: str
    figure: Figure
    table: Table | None
    limits: figures.Limits | None = None
    artifact: Artifact | None = None
    order: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plate:
    """A figure of the report: its panels, and one table that holds all of their rows."""

    name: str
    figure: Figure
    panels: list[Panel]
    table: Table | None
    rows_of: list[int] = field(default_factory=list)
    """How many rows of the table each run has, in the order of the runs."""


@dataclass(frozen=True)
class Cell:
    """A metric of one run, or its absence."""

    metric: Metric | None
    mark: str = ""


@dataclass(frozen=True)
class Row:
    """One metric of all runs. n and reason are given here where all runs share them."""

    name: str
    metric: Metric
    question: Question
    cells: list[Cell]
    difference: str
    n: int | None
    reason: str | None


def labels(artifacts: Sequence[Artifact]) -> list[str]:
    """A name for every artifact's run: its own, with a hash where two runs share it, and its step.

    Two runs are told apart by their checkpoint; what was measured while training, by the recipe, since its weights move.
    """
    keys = ("checkpoint_sha256", "recipe_sha256", "checkpoint", "model")
    identity = [str(next((a.provenance[k] for k in keys if a.provenance.get(k)), "")) for a in artifacts]
    owners: dict[tuple[str, bool], list[str]] = {}
    for a, own in zip(artifacts, identity, strict=True):
        there = owners.setdefault((a.run, a.step is None), [])
        if own not in there:
            there.append(own)
    found = []
    for a, own in zip(artifacts, identity, strict=True):
        name, there = a.run, owners[a.run, a.step is None]
        if len(there) > 1:
            name += f" ({own[:7] or there.index(own) + 1})"
        found.append(name if a.step is None else f"{name} @{a.step}")
    return found


def questions(artifacts: Sequence[Artifact]) -> tuple[list[str], list[Question]]:
    """The runs in order of appearance, and what was asked of them, probe by probe."""
    named = labels(artifacts)
    runs = list(dict.fromkeys(named))
    grouped: dict[tuple[str, str], dict[str, Artifact]] = {}
    for name, artifact in zip(named, artifacts, strict=True):
        answers = grouped.setdefault((artifact.probe, artifact.options_hash), {})
        if name in answers and answers[name] != artifact:
            # the same question asked twice of one run, with two answers: both are shown
            more = next(f"{name} ({i})" for i in range(2, len(artifacts) + 2) if f"{name} ({i})" not in answers)
            runs += [] if more in runs else [more]
            name = more
        answers[name] = artifact
    probes = sorted({p for p, _ in grouped}, key=lambda p: ORDER.index(p) if p in ORDER else len(ORDER))
    found = []
    for probe in probes:
        asked = [answers for (p, _), answers in grouped.items() if p == probe]
        options = [next(iter(answers.values())).options for answers in asked]
        for mine, answers in zip(options, asked, strict=True):
            differing = [k for k in mine if any(other.get(k) != mine[k] for other in options)]
            label = ", ".join(f"{k} = {number(mine[k])}" for k in differing)
            found.append(Question(probe, label, {run: answers[run] for run in runs if run in answers}))
    return runs, found


def rows(question: Question, runs: Sequence[str], key_only: bool = False) -> list[Row]:
    """The metrics of a question as rows over all runs; only the main ones where `key_only`."""
    by_run = {run: {m.name: m for m in a.metrics} for run, a in question.answers.items()}
    names = list(dict.fromkeys(name for metrics in by_run.values() for name in metrics))
    every = {name: next(m[name] for m in by_run.values() if name in m) for name in names}
    if key_only:
        names = [n for n in names if every[n].better][:KEY_METRICS] or names[:1]
    return [_row(name, every[name], question, [by_run.get(run, {}).get(name) for run in runs]) for name in names]


def _row(name: str, metric: Metric, question: Question, found: list[Metric | None]) -> Row:
    there = [m for m in found if m is not None]
    sizes = {m.n for m in there}
    reasons = {m.reason for m in there if m.interval is None}
    difference = ""
    if len(found) == 2 and all(m is not None and m.value is not None for m in found):
        first, second = (m.value for m in found if m is not None and m.value is not None)
        difference = number(second - first) if second <= first else f"+{number(second - first)}"
    return Row(
        name, metric, question, _marked(found), difference,
        sizes.pop() if len(sizes) == 1 else None,
        reasons.pop() if len(reasons) == 1 and all(m.interval is None for m in there) else None,
    )


def _marked(found: list[Metric | None]) -> list[Cell]:
    """The best of several runs is marked where its interval is clear of the others', and called a lead where it is not.

    Without intervals nothing is marked: nothing tells a difference from chance.
    """
    there = [m for m in found if m is not None and m.value is not None and m.better]
    values = sorted({float(m.value) for m in there if m.value is not None}, reverse=bool(there and there[0].better == "higher"))
    if len(there) < 2 or sum(m.value == values[0] for m in there) != 1:
        return [Cell(m) for m in found]
    cells = []
    for m in found:
        if m is None or m.value != values[0]:
            cells.append(Cell(m))
            continue
        others = [o for o in there if o is not m]
        apart = all(
            m.interval and o.interval and (m.interval.high < o.interval.low or m.interval.low > o.interval.high) for o in others
        )
        bare = m.interval is None or any(o.interval is None for o in others)
        cells.append(Cell(m, "best" if apart else "" if bare else "leads, intervals overlap"))
    return cells


def plates(question: Question, runs: Sequence[str]) -> list[Plate]:
    """Every figure of a question. Lines and bars of several runs are laid over each other; maps and images stand in a row.

    A figure that has series of its own becomes a panel for each of them, with a line for each run; with more than
    PANELS series, a panel for each run. Panels share their axes (of different metrics, the horizontal one); `runs` fixes the
    runs' colours.
    """
    found: dict[tuple[str, str], dict[str, Figure]] = {}
    for run, artifact in question.answers.items():
        for figure in artifact.figures:
            found.setdefault((figure.name, figure.kind), {})[run] = figure
    return [_plate(name, kind, drawn, question, tuple(runs)) for (name, kind), drawn in found.items()]


def _plate(name: str, kind: str, drawn: Mapping[str, Figure], question: Question, runs: tuple[str, ...]) -> Plate:
    artifacts = {run: question.answers[run] for run in drawn}
    tables = {run: table(artifacts[run], table_of(artifacts[run], f)) for run, f in drawn.items()}
    figure = next(iter(drawn.values()))
    held = {run: t for run, t in tables.items() if t is not None}
    together = merged(held) if held else None
    sizes = [len(t) for t in held.values()]
    if kind in ("image", "scatter") or len(drawn) == 1 or len(held) < len(drawn):
        # the places of a map mean nothing beside another map's; predicted and true values do
        mapped = kind == "image" or figure.sprite is not None or len(held) < max(2, len(drawn))
        limits = None if mapped else figures.shared([(f, held[run]) for run, f in drawn.items()])
        panels = [
            Panel(run if len(runs) > 1 else "", f, tables[run], limits, artifacts[run]) for run, f in drawn.items()
        ]
        return Plate(name, figure, panels, together, sizes)
    assert together is not None
    column = next(iter(together.columns))
    series = list(dict.fromkeys(map(str, together.columns[figure.series]))) if figure.series else []
    parts: list[tuple[str, Figure, Table]]
    order = runs
    if len(series) <= 1:
        parts = [("", dataclasses.replace(figure, series=column), together)]
    elif len(series) <= PANELS:
        over = dataclasses.replace(figure, series=column)
        parts = [(one, over, _where(together, str(figure.series), one)) for one in series]
    else:
        parts, order = [(run, f, held[run]) for run, f in drawn.items()], tuple(series)
    limits = figures.shared([(f, t) for _, f, t in parts]) if len(parts) > 1 else None
    if limits is not None and figure.series == METRIC:
        # panels of different quantities: one height for all would flatten most of them
        limits = dataclasses.replace(limits, y=None)
    return Plate(name, figure, [Panel(title, f, t, limits, order=order) for title, f, t in parts], together, sizes)


def table_of(artifact: Artifact, figure: Figure) -> str | None:
    """The table that stands under a figure: its own; under an image that names none, the artifact's first."""
    if figure.table is None and figure.kind == "image" and artifact.tables:
        return artifact.tables[0].name
    return figure.table


def table(artifact: Artifact, name: str | None) -> Table | None:
    """The artifact's table of that name, or None."""
    return next((t for t in artifact.tables if t.name == name), None)


def spare_tables(question: Question) -> list[tuple[Table, list[int]]]:
    """Tables that no figure draws, merged over the runs, with how many rows each run has."""
    drawn = {table_of(a, f) for a in question.answers.values() for f in a.figures}
    names = dict.fromkeys(t.name for a in question.answers.values() for t in a.tables if t.name not in drawn)
    found = []
    for name in names:
        held = {run: t for run, a in question.answers.items() if (t := table(a, name)) is not None}
        found.append((merged(held), [len(t) for t in held.values()]))
    return found


def merged(tables: Mapping[str, Table]) -> Table:
    """Tables of several runs under each other, a first column naming the run; a single one as it is."""
    first = next(iter(tables.values()))
    if len(tables) == 1:
        return first
    columns = list(dict.fromkeys(c for t in tables.values() for c in t.columns))
    together: dict[str, list[Any]] = {_free(columns, RUN): [run for run, t in tables.items() for _ in range(len(t))]}
    for column in columns:
        together[column] = [v for t in tables.values() for v in t.columns.get(column, [None] * len(t))]
    return Table(first.name, first.title, together, first.about)


def _free(columns: Sequence[str], name: str) -> str:
    while name in columns:
        name += "_"
    return name


def _where(table: Table, column: str, value: str) -> Table:
    kept = [i for i, v in enumerate(table.columns[column]) if str(v) == value]
    return Table(table.name, table.title, {name: [v[i] for i in kept] for name, v in table.columns.items()}, table.about)
