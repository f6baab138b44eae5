"""geomssl sweep: cells x seeds of a file, resumed where it stopped, and one table of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from geomssl.artifact import Artifact, Table
from geomssl.commands.model import option
from geomssl.errors import GeomsslError
from geomssl.progress import shown, track


def _sweep(file: str, **values: Any) -> int:
    from geomssl import device, sweep
    from geomssl.commands import units as work
    from geomssl.recipe import located
    from geomssl.sweep_table import Outcome, tabulate

    path = located(file)
    out = Path(values["out"] or path.stem)
    plan = sweep.plan(path, out, values["only"])
    chosen = [unit for unit in plan.units if unit.cell in plan.chosen]
    asked = work.Asked(plan.sweep.metrics, tuple(plan.probes), plan.sweep.split, values["device"])
    if values["dry_run"]:
        return _list(chosen, out)
    device.device(values["device"])
    outcomes: dict[tuple[str, int], Outcome] = {}
    with sweep.locked(out), shown(not values["quiet"]):
        sweep.refuse_changes(chosen, out)
        for unit in plan.units:
            if unit.cell not in plan.chosen and unit.path.exists():
                try:
                    state = sweep.look(unit)
                    if state.epoch == unit.recipe.epochs and not state.changed:
                        outcomes[unit.cell, unit.seed] = work.collect(unit, asked, state, measure=False)
                except GeomsslError:
                    continue
        jobs = min(values["jobs"], len(chosen))
        runs = work.side_by_side(chosen, asked, jobs) if jobs > 1 else work.one_by_one(chosen, asked)
        for unit, outcome in track(runs, f"sweep {path.stem}", total=len(chosen)):
            work.told(unit, outcome, out)
            outcomes[unit.cell, unit.seed] = outcome
        provenance = {
            "run": out.name or path.stem, "file": path.name, "device": values["device"],
            "command": " ".join(["geomssl", *sys.argv[1:]]),
        }
        found = tabulate(plan, outcomes, path.stem, provenance)
        where = found.save(out)
    click.echo(json.dumps(found.to_json(), indent=1) if values["json"] else describe(found, where))
    return 2 if any(outcome.failed for outcome in outcomes.values()) else 0


def _list(units: list[Any], out: Path) -> int:
    """Every unit and how far it is; 2 where one cannot go on."""
    from geomssl import sweep

    code = 0
    for unit in units:
        try:
            state = sweep.look(unit)
            said, code = state.said(unit), 2 if state.changed else code
        except GeomsslError as error:
            said, code = f"cannot go on: {error}", 2
        recipe = unit.recipe
        about = f"{recipe.objective.name} on {recipe.encoder.name}, {recipe.dataset.name}, {recipe.epochs} epochs"
        click.echo(f"{unit.cell}  seed {unit.seed}  {about}: {said}")
    click.echo(f"{len(units)} runs in {out}{'' if out.name == '' else '/'}; nothing was run")
    return code


def describe(found: Artifact, where: Path | str) -> str:
    """The tables of a sweep as text: a block for each metric, then the comparisons."""
    lines = [f"{found.title}: {found.headline}"]
    for table in found.tables:
        if table.name == "compare":
            lines += ["", table.title, *(_pair(dict(zip(table.columns, row, strict=True))) for row in _rows(table))]
        elif table.name != "runs" and not table.name.endswith("_course"):
            lines += ["", table.title, *_block(table)]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, "", f"artifact: {where}"])


def _rows(table: Table) -> list[tuple[Any, ...]]:
    return list(zip(*table.columns.values(), strict=True))


def _block(table: Table) -> list[str]:
    rows = [dict(zip(table.columns, row, strict=True)) for row in _rows(table)]
    published = any(row["paper"] is not None for row in rows)
    shown = [("cell", "mean ± std", "interval", "n", *(("paper",) if published else ()))]
    for row in rows:
        bounds = "" if row["low"] is None else f"[{_number(row['low'])}, {_number(row['high'])}]"
        cells = (row["cell"], _spread(row["mean"], row["std"]), bounds, str(row["n"]))
        shown.append((*cells, _spread(row["paper"], row["paper_std"])) if published else cells)
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return ["  " + "  ".join(f"{text:<{w}}" for text, w in zip(row, widths, strict=True)).rstrip() for row in shown]


def _pair(row: dict[str, Any]) -> str:
    said = f"  {row['a']} - {row['b']}, {row['metric']}: "
    if row["against"] != row["metric"]:
        said = f"  {row['a']} - {row['b']}, {row['metric']} - {row['against']}: "
    if row["difference"] is None:
        return f"{said}no seed that both have: {row['verdict']}"
    said += f"{_spread(row['difference'], row['std'])}, n = {row['n']}"
    if row["low"] is not None:
        said += f", [{_number(row['low'])}, {_number(row['high'])}], p = {row['p']:.2g}"
    if row["margin"] is not None:
        said += f", margin {row['margin']:g}"
        if row["p_lower"] is not None:
            said += f" (p = {row['p_lower']:.2g} and {row['p_upper']:.2g})"
    return f"{said}: {row['verdict']}"


def _spread(value: float | None, std: float | None) -> str:
    if value is None:
        return "-"
    return _number(value) if std is None else f"{_number(value)} ± {_number(std)}"


def _number(value: float) -> str:
    return f"{value:.4g}"


sweep = click.Command(
    "sweep", callback=_sweep,
    params=[
        click.Argument(["file"], metavar="FILE"),
        option("--out", metavar="DIR", help="folder for the runs and the table  [default: the file's name]"),
        option("--only", multiple=True, metavar="CELL", help="run this cell alone; the table keeps the others that are whole"),
        option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="runs side by side, a process each"),
        option("--dry-run", is_flag=True, help="list the runs and how far each is"),
        option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps"),
        option("--json", "json", is_flag=True, help="print the table's artifact as JSON"),
        option("--quiet", is_flag=True, help="no progress"),
    ],
    help="Train and measure cells x seeds, and write one table: mean, std and interval over seeds, pairs compared.\n\n"
    "FILE is a TOML file or an installed one's name. Runs that are whole are kept, half ones resumed. A run that fails is "
    "reported, and the others go on; the exit code is then 2.\n\n\b\nExamples:\n"
    "  geomssl sweep hssl/miniature --dry-run\n"
    "  geomssl sweep examples/hssl/table1-small.toml --jobs 2 --out table1\n"
    "  geomssl report table1 -o table1.html",
)
