"""Artifact: what a probe found, as plain data, and its folder on disk.

    <folder>/<probe>/<options-hash>[@step]/   tables as CSV, figures as SVG or PNG, artifact.json written last

A folder without artifact.json is not an artifact. Metrics carry an interval or the reason why there is none.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from geomssl import files
from geomssl.config import canonical
from geomssl.errors import GeomsslError, unknown

SCHEMA = 1
PLAIN = ("probe", "title", "headline", "definition", "notes", "options", "provenance", "step")


@dataclass(frozen=True)
class Interval:
    """Bounds of a figure; `method` says how, of what and at which level ("percentile bootstrap over images, 95 %")."""

    low: float
    high: float
    method: str


@dataclass(frozen=True)
class Metric:
    """One figure. `interval` is None only with a `reason`; `value` is None only with a `reason` too."""

    name: str
    value: float | None
    n: int | None = None
    interval: Interval | None = None
    reason: str | None = None
    unit: str = ""
    better: Literal["lower", "higher"] | None = None
    about: str = ""

    def __post_init__(self) -> None:
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"metric {self.name} is {self.value}: use None with a reason")
        if self.interval is None and not self.reason:
            raise ValueError(f"metric {self.name} has neither an interval nor a reason for having none")


@dataclass(frozen=True)
class Table:
    """Columns of equal length: str, int, float, bool or None."""

    name: str
    title: str
    columns: dict[str, list[Any]]
    about: str = ""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in self.columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"table {self.name} has columns of lengths {sorted(lengths)}")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))


@dataclass(frozen=True)
class Figure:
    """A picture as data: what to draw from which table. geomssl.figures draws it; a report may lay several over each other.

    kind: "line" | "bar" | "scatter" draw columns x, y of `table`, one mark or line for every value of `series`, with
    bars from `low` to `high`. "image" shows the PNG `file`. A scatter may name a `sprite`: a PNG of square tiles,
    `sprite_columns` in a row, tile i belonging to row i of the table; with `diagonal` the line y = x is drawn under it.
    """

    name: str
    kind: Literal["line", "bar", "scatter", "image"]
    title: str
    caption: str = ""
    table: str | None = None
    x: str | None = None
    y: str | None = None
    series: str | None = None
    low: str | None = None
    high: str | None = None
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    file: str | None = None
    sprite: str | None = None
    sprite_columns: int = 0
    diagonal: bool = False


@dataclass(frozen=True)
class Artifact:
    """What one probe found about one subject.

    headline: one sentence in words that states the main figure. notes: further plain sentences (warnings, cut-offs).
    definition: the equation and the reading of the main figure. files: bytes by name, PNG of figures and sums of images.
    provenance: checkpoint hash, dataset, split, seed, versions, dtype, device, command, run name.
    """

    probe: str
    title: str
    headline: str
    definition: str
    metrics: list[Metric]
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)

    @property
    def run(self) -> str:
        return str(self.provenance.get("run", "run"))

    @property
    def options_hash(self) -> str:
        return options_hash(self.probe, self.options)

    def metric(self, name: str) -> Metric:
        """The metric of that name; GeomsslError naming the nearest where there is none."""
        for metric in self.metrics:
            if metric.name == name:
                return metric
        raise unknown(f"metric of {self.probe}", name, [m.name for m in self.metrics])

    def table(self, name: str) -> Table:
        return next(t for t in self.tables if t.name == name)

    def to_json(self) -> dict[str, Any]:
        """Everything but table contents and file bytes, which lie beside it."""
        return {
            "schema": SCHEMA,
            **{key: getattr(self, key) for key in PLAIN},
            "metrics": [asdict(m) for m in self.metrics],
            "tables": [
                {"name": t.name, "title": t.title, "about": t.about, "file": f"{t.name}.csv", "types": _types(t)}
                for t in self.tables
            ],
            "figures": [asdict(f) for f in self.figures],
            "files": sorted(self.files),
        }

    def save(self, folder: Path | str, drawn: bool = True) -> Path:
        """Write `<folder>/<probe>/<hash>[@step]/` whole or not at all, and return it. An older one there is replaced.

        drawn: write every figure as SVG too. Without them nothing is lost: a report draws figures from their tables.
        """
        from geomssl import figures

        target = place(folder, self.probe, self.options, self.step)
        part = files.writable(target).with_name(f".{target.name}.{os.getpid()}.part")
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        try:
            files.writable(part / "artifact.json")
            for table in self.tables:
                files.write(part / f"{table.name}.csv", _to_csv(table))
            for name, data in self.files.items():
                files.write(part / name, data)
            for figure in self.figures:
                if drawn and figure.kind != "image":
                    text = figures.draw(figure, self.table(str(figure.table)), "file")
                    files.write(part / f"{figure.name}.svg", text)
            files.write(part / "artifact.json", json.dumps(self.to_json(), indent=1, allow_nan=False))
            if target.exists():
                os.rename(target, old)
            os.rename(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        files.sync_folder(target.parent)
        return target


def options_hash(probe: str, options: Mapping[str, Any]) -> str:
    """The first 10 hexadecimal digits of a SHA-256 of a probe's name and options."""
    return hashlib.sha256(canonical({"probe": probe, **options}).encode()).hexdigest()[:10]


def place(folder: Path | str, probe: str, options: Mapping[str, Any], step: int | None = None) -> Path:
    """Where an artifact of that probe with those options lies: `<folder>/<probe>/<hash>[@step]`."""
    suffix = "" if step is None else f"@{step}"
    return Path(folder) / probe / f"{options_hash(probe, options)}{suffix}"


def forget_steps(folder: Path | str) -> None:
    """Remove what an earlier training of the same name measured on its way: every `<probe>/<hash>@<step>`."""
    for found in _walk(Path(folder)):
        if "@" in found.name:
            # first what makes it an artifact: one that is half removed must not look whole
            (found / "artifact.json").unlink()
            shutil.rmtree(found)


def load(folder: Path | str) -> Artifact:
    """Read one artifact folder back. GeomsslError where it is none, is damaged, or is of a newer schema."""
    folder = Path(folder)
    try:
        data = json.loads((folder / "artifact.json").read_text())
        if data["schema"] > SCHEMA:
            raise GeomsslError(
                f"{folder} has artifact schema {data['schema']}", f"at most {SCHEMA}: a newer geomssl wrote it",
                reason="newer-format",
            )
        tables = [
            Table(t["name"], t["title"], _from_csv((folder / t["file"]).read_text(), t["types"]), t["about"])
            for t in data["tables"]
        ]
        metrics = [
            Metric(**{**m, "interval": Interval(**m["interval"]) if m["interval"] else None}) for m in data["metrics"]
        ]
        return Artifact(
            **{key: data[key] for key in PLAIN},
            metrics=metrics,
            tables=tables,
            figures=[Figure(**f) for f in data["figures"]],
            files={name: (folder / name).read_bytes() for name in data["files"]},
        )
    except GeomsslError:
        raise
    except FileNotFoundError as error:
        raise GeomsslError(f"{folder}: no {Path(error.filename).name}", "an artifact folder", reason="no-file") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise GeomsslError(f"{folder} is damaged: {error}", "a whole artifact folder", reason="damaged") from None


def find(path: Path | str) -> list[Path]:
    """Artifact folders of a run: `path` is run.pt, its folder, or one artifact folder. Sorted; half-written ones ignored."""
    path = Path(path)
    if path.suffix == ".pt":
        path = path.with_suffix("")
    if (path / "artifact.json").is_file():
        return [path]
    return sorted(_walk(path))


def _walk(folder: Path) -> Iterator[Path]:
    for probe in folder.iterdir() if folder.is_dir() else ():
        if probe.is_dir() and not probe.name.startswith("."):
            for found in probe.iterdir():
                if not found.name.startswith(".") and (found / "artifact.json").is_file():
                    yield found


_PARSE: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str, "bool": lambda text: text == "True"}


def _types(table: Table) -> dict[str, str]:
    """The type of every column; a column of ints and floats is float, of anything else mixed is str."""
    types = {}
    for name, column in table.columns.items():
        found = {type(value).__name__ for value in column if value is not None}
        if found == {"int", "float"}:
            found = {"float"}
        types[name] = found.pop() if len(found) == 1 and found <= set(_PARSE) else "str"
    return types


def _to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    for row in zip(*table.columns.values(), strict=True):
        writer.writerow(["" if value is None else value for value in row])
    return text.getvalue()


def _from_csv(text: str, types: Mapping[str, str]) -> dict[str, list[Any]]:
    rows = list(csv.DictReader(io.StringIO(text)))
    return {
        name: [None if row[name] == "" else _PARSE[kind](row[name]) for row in rows] for name, kind in types.items()
    }
