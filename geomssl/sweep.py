"""Sweep: a file that names cells (recipes with overrides) and seeds becomes a list of units, each one training."""

from __future__ import annotations

import fcntl
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from geomssl import checkpoint, recipe
from geomssl.config import Settings, merge, parse, read_toml
from geomssl.errors import GeomsslError, nearest, unknown
from geomssl.files import writable
from geomssl.recipe import Recipe
from geomssl.registry import names, resolve

# metrics of the training itself: the last row of a run's history
TRAIN = "train"
# an epoch of PROBE.METRIC@EPOCH: the last one of the cell's recipe
LAST = "last"
CELL_NAME = re.compile(r"[\w.+=,-]+")
Figures = dict[str, float | tuple[float, float]]


class Cell(Settings):
    """One column or row of a table: a recipe and what is changed in it."""

    name: str = Field(description="its name, also of its files: letters, digits and . + = , - _")
    recipe: str | None = Field(None, description="its recipe, in place of the sweep's")
    set: dict[str, Any] = Field(default_factory=dict, description="settings laid over the recipe")
    paper: Figures = Field(default_factory=dict, description="published figures by metric: mean, or [mean, std]")


class Pair(Settings):
    """Two cells to compare over the same seeds."""

    a: str
    b: str
    metric: str
    against: str | None = Field(None, description="the metric of b, where it is another, such as that of an earlier epoch")
    margin: float | None = Field(None, gt=0, description="differences below it do not matter; in the metric's unit")


class Sweep(Settings):
    """A sweep file: cells x seeds, and what is collected from each run."""

    title: str = Field("", description="heading of the table")
    recipe: str | None = Field(None, description="the recipe of the cells that name none: a path beside this file, or a name")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1, description="seeds of every cell")
    metrics: tuple[str, ...] = Field(
        ("train.online_val_accuracy",), min_length=1, description="what to collect: train.KEY of metrics.jsonl, "
        "PROBE.METRIC, or PROBE.METRIC@EPOCH of what [probes] of the recipe measured while training",
    )
    split: Literal["train", "val", "test"] = Field("test", description="what the probes measure after training")
    level: float = Field(0.95, gt=0, lt=1, description="level of intervals; 1 - level is alpha of the comparisons")
    set: dict[str, Any] = Field(default_factory=dict, description="settings laid over every recipe")
    grid: dict[str, Any] = Field(default_factory=dict, description="lists of values: every combination makes a cell")
    cell: tuple[Cell, ...] = Field((), description="the cells; each is multiplied by the grid")
    probes: dict[str, dict[str, Any]] = Field(default_factory=dict, description="options of the probes")
    compare: tuple[Pair, ...] = Field((), description="pairs of cells")


@dataclass(frozen=True)
class Probe:
    """A probe that the metrics ask for. label: as the metrics name it; name: as it is installed."""

    label: str
    name: str
    options: dict[str, Any]


@dataclass(frozen=True)
class Named:
    """A metric by its parts: PROBE (or its label, or "train"), NAME, and an epoch (a number, "last"), or "" after training."""

    label: str
    name: str
    when: str = ""

    def epoch(self, recipe: Recipe) -> int:
        """The epoch of a metric of a moment."""
        return recipe.epochs if self.when == LAST else int(self.when)


def named(metric: str) -> Named:
    """The parts of PROBE.METRIC[@EPOCH]. Raises GeomsslError for anything else."""
    label, dot, rest = metric.partition(".")
    name, at, when = rest.partition("@")
    if not (dot and name) or (at and (label == TRAIN or not (when == LAST or when.isdecimal()))):
        expected = f"train.KEY, PROBE.METRIC or PROBE.METRIC@EPOCH (a number or {LAST})"
        raise GeomsslError(f"metric {metric!r}", expected, reason="bad-value")
    return Named(label, name, when)


@dataclass(frozen=True)
class Unit:
    """One training of a sweep: a cell and a seed, its whole recipe, and the layers that it was built from."""

    cell: str
    seed: int
    path: Path
    recipe: Recipe
    layers: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked. chosen: the cells to run. paper: published figures by cell and metric, (mean, std or None)."""

    sweep: Sweep
    units: list[Unit]
    chosen: list[str]
    probes: list[Probe]
    paper: dict[str, dict[str, tuple[float, float | None]]]

    @property
    def cells(self) -> list[str]:
        return list(dict.fromkeys(unit.cell for unit in self.units))


def plan(path: Path, out: Path, only: Sequence[str] = ()) -> Plan:
    """The sweep of a file, every recipe built and every name checked, nothing run.

    only: names of cells to run, all when empty. Raises GeomsslError for an unknown key, cell, recipe, probe or setting.
    """
    where = str(path)
    given = read_toml(path)
    sweep = _parsed(given, where)
    probes = _probes(sweep, where)
    units: list[Unit] = []
    paper: dict[str, dict[str, tuple[float, float | None]]] = {}
    read: dict[str, dict[str, Any]] = {}
    for cell in _cells(sweep, where):
        chosen = cell.recipe or sweep.recipe
        if chosen is None:
            raise GeomsslError(f"{where}: cell {cell.name} without a recipe", "recipe = ...", reason="bad-value")
        if chosen not in read:
            beside = path.parent / chosen
            read[chosen] = recipe.read(beside if beside.is_file() else chosen)
        layers = (read[chosen], sweep.set, cell.set)
        built = _built(layers, f"{where}: cell {cell.name}")
        for seed in sweep.seeds:
            own = built.model_copy(update={"seed": seed})
            units.append(Unit(cell.name, seed, out / f"{cell.name}-s{seed}.pt", own, (*layers, {"seed": seed})))
        for metric in sweep.metrics:
            _due(metric, built, f"{where}: cell {cell.name}")
        paper[cell.name] = {
            metric: (value[0], value[1]) if isinstance(value, tuple) else (value, None) for metric, value in cell.paper.items()
        }
        for metric in cell.paper:
            if metric not in sweep.metrics:
                raise unknown(f"metric of cell {cell.name}'s paper in {where}", metric, sweep.metrics)
    found = list(paper)
    for name in only:
        if name not in found:
            raise unknown(f"cell of {where}", name, found)
    for pair in sweep.compare:
        for name in (pair.a, pair.b):
            if name not in found:
                raise unknown(f"cell in compare of {where}", name, found)
        for metric in filter(None, (pair.metric, pair.against)):
            if metric not in sweep.metrics:
                raise unknown(f"metric in compare of {where}", metric, sweep.metrics)
    return Plan(sweep, units, [name for name in found if not only or name in only], probes, paper)


def _built(layers: Sequence[Mapping[str, Any]], where: str) -> Recipe:
    """The recipe of a cell; what is wrong with it says which cell it is, also where a setting's own check found it."""
    try:
        return recipe.build(layers, where)
    except GeomsslError as error:
        if where in error.given:
            raise
        raise GeomsslError(f"{where}: {error.given}", error.expected, error.nearest, reason=error.reason) from None


def _due(metric: str, built: Recipe, where: str) -> None:
    """Raise GeomsslError unless a recipe's [probes] measure that metric's probe after its epoch, where it names one."""
    wanted = named(metric)
    if not wanted.when:
        return
    schedule, epoch = built.probes, wanted.epoch(built)
    if wanted.label not in schedule.run:
        expected = f"{wanted.label} in probes.run of its recipe, now {list(schedule.run)}"
    elif epoch > built.epochs or not schedule.due(epoch, built.epochs):
        looks = [e for e in range(built.epochs + 1) if schedule.due(e, built.epochs)]
        expected = f"an epoch at which its recipe looks: {', '.join(map(str, looks))}"
    else:
        return
    raise GeomsslError(f"{where}: metric {metric}", expected, reason="bad-value")


def _parsed(given: Mapping[str, Any], where: str) -> Sweep:
    """Table by table, so that a wrong key is named with the keys of its own table."""
    data = dict(given)
    for key, schema in (("cell", Cell), ("compare", Pair)):
        listed = data.get(key, [])
        if not isinstance(listed, list) or not all(isinstance(one, Mapping) for one in listed):
            raise GeomsslError(f"{where}: {key} = {listed!r}", f"tables [[{key}]]", reason="bad-value")
        # as plain data again, since the whole is validated once more
        data[key] = [parse(schema, one, f"{where}: {key} {_called(one, i)}").model_dump() for i, one in enumerate(listed)]
    sweep = parse(Sweep, data, where)
    if len(set(sweep.seeds)) < len(sweep.seeds) or min(sweep.seeds) < 0:
        raise GeomsslError(f"{where}: seeds = {list(sweep.seeds)}", "different numbers from 0 on", reason="bad-value")
    return sweep


def _called(table: Mapping[str, Any], index: int) -> str:
    return str(table.get("name", index + 1))


def _cells(sweep: Sweep, where: str) -> list[Cell]:
    """The named cells times the grid; without named cells, the grid; without both, the recipe as it is."""
    combinations = list(_combinations(sweep.grid, where))
    found = []
    for cell in sweep.cell or (None,):
        for label, settings in combinations:
            parts = [cell.name if cell else "", label]
            name = ",".join(part for part in parts if part) or Path(sweep.recipe or "run").stem
            found.append(Cell(
                name=name, recipe=cell.recipe if cell else None, set=merge(cell.set if cell else {}, settings),
                paper=cell.paper if cell else {},
            ))
    called = [cell.name for cell in found]
    for name in called:
        if not CELL_NAME.fullmatch(name):
            raise GeomsslError(
                f"{where}: a cell named {name!r}", "letters, digits and . + = , - _, since it names files", reason="bad-value"
            )
        if called.count(name) > 1:
            raise GeomsslError(f"{where}: two cells named {name!r}", "a name for each", reason="bad-value")
    return found


def _combinations(grid: Mapping[str, Any], where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(label, settings) of every combination of the grid's values; one empty combination where there is no grid."""
    axes = list(_leaves(grid))
    for path, values in axes:
        if not isinstance(values, list) or not values:
            raise GeomsslError(f"{where}: grid.{'.'.join(path)} = {values!r}", "a list of values", reason="bad-value")
    for chosen in itertools.product(*(values for _, values in axes)):
        settings: dict[str, Any] = {}
        for (path, _), value in zip(axes, chosen, strict=True):
            nested: Any = value
            for key in reversed(path):
                nested = {key: nested}
            settings = merge(settings, nested)
        yield ",".join(f"{path[-1]}={_short(v)}" for (path, _), v in zip(axes, chosen, strict=True)), settings


def _leaves(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def _short(value: Any) -> str:
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "_", text)


def _probes(sweep: Sweep, where: str) -> list[Probe]:
    """The probes that the metrics need, their options checked; every table of options must serve one of them."""
    valid = names("probe")
    try:
        wanted = [named(metric) for metric in sweep.metrics]
    except GeomsslError as error:
        raise GeomsslError(f"{where}: {error.given}", error.expected, reason=error.reason) from None
    labels = list(dict.fromkeys(one.label for one in wanted if one.label != TRAIN and not one.when))
    for label in sweep.probes:
        if label not in labels:
            raise GeomsslError(
                f"{where}: [probes.{label}] without a metric of it", f"a metric {label}.NAME, or one of {', '.join(labels)}",
                nearest(label, labels), reason="bad-value",
            )
    found = []
    for label in labels:
        options = dict(sweep.probes.get(label, {}))
        name = str(options.pop("probe", label))
        if name not in valid:
            raise unknown(f"probe in {where}", name, [*valid, TRAIN])
        checked = parse(resolve("probe", name).Options, options, f"{where}: probes.{label}")
        found.append(Probe(label, name, checked.model_dump(mode="json")))
    return found


@dataclass(frozen=True)
class State:
    """How far a unit is: whole epochs, or None where it is not begun; its checkpoint; what its recipe differs in."""

    epoch: int | None
    checkpoint: dict[str, Any] | None = None
    changed: tuple[str, ...] = ()

    def said(self, unit: Unit) -> str:
        if self.epoch is None:
            return "new"
        if self.changed:
            return f"cannot go on, another recipe began it: {', '.join(self.changed)}"
        return "trained" if self.epoch >= unit.recipe.epochs else f"resumes at epoch {self.epoch}"


def look(unit: Unit) -> State:
    """How far a unit is, by its run.pt. Raises GeomsslError where that is damaged."""
    if not unit.path.exists():
        return State(None)
    state = checkpoint.load(unit.path)
    recipe.refuse_strangers(state["config"], unit.layers, str(unit.path))
    changed = recipe.differing(recipe.build([state["config"]], str(unit.path)).plain(), unit.recipe.plain())
    return State(state["epoch"], state, tuple(changed))


def refuse_changes(units: Sequence[Unit], out: Path) -> None:
    """Raise GeomsslError (reason "changed-recipe") where runs were begun with another recipe, key by key, cells together."""
    cells: dict[str, list[str]] = {}
    for unit in units:
        try:
            state = look(unit)
        except GeomsslError:
            # damaged: told when its turn comes, so that the others can run
            continue
        for change in state.changed:
            called = cells.setdefault(change, [])
            called += [] if unit.cell in called else [unit.cell]
    if cells:
        said = "; ".join(f"{change} in {', '.join(called)}" for change, called in cells.items())
        expected = "the recipes that its runs were begun with, another --out, or those runs removed"
        raise GeomsslError(f"{out} with {said}", expected, reason="changed-recipe")


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other sweeps out of a folder; the kernel lets go when this process ends, however it ends.

    Raises GeomsslError (reason "locked") where another one is at work.
    """
    path = writable(out / ".lock")
    # a+: the one that holds it wrote its process id, which must survive our opening it
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise GeomsslError(
                f"another sweep (process {file.read().strip() or 'unknown'}) works in {out}", "another --out, or to wait",
                reason="locked",
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
