"""Which rows of a table make a line, a set of bars or a cloud of a figure, and what tells one from another."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from geomssl.artifact import Figure, Table


@dataclass(frozen=True)
class Series:
    """One line, one set of bars or one cloud: its label, its rows, and the place of its colour, dash and marker.

    width: of a line; the usual one where None.
    """

    label: str
    rows: list[int]
    style: int
    width: float | None = None


def split(figure: Figure, table: Table, order: Sequence[str] = ()) -> list[Series]:
    """The rows of each series; one series when the figure names none.

    In order of first appearance, but sorted in a scatter, so that a class has the same colour on every map. Labels in
    `order` are styled by their place there; moments of one run ("NAME @STEP") alike, and the later the wider.
    """
    column_of(table, str(figure.x))
    column_of(table, str(figure.y))
    if figure.series is None:
        return [Series(figure.y_label or str(figure.y), list(range(len(table))), 0)]
    found: dict[str, list[int]] = {}
    for row, value in enumerate(column_of(table, figure.series)):
        found.setdefault("none" if value is None else str(value), []).append(row)
    labels = sorted(found, key=_natural) if figure.kind == "scatter" else list(found)
    places: dict[str, tuple[int, float | None]] = _moments(order) or {label: (place, None) for place, label in enumerate(order)}
    for label in labels:
        places.setdefault(label, (len(places), None))
    return [Series(label, found[label], *places[label]) for label in labels]


def _moments(order: Sequence[str]) -> dict[str, tuple[int, float | None]]:
    """Style and width of each label where some are moments of a run, "NAME @STEP": a style a run, and the later the wider.

    Empty where none is.
    """
    parts = {label: label.rpartition(" @") for label in order}
    steps = {label: int(step) for label, (name, at, step) in parts.items() if at and step.isdecimal()}
    if not steps:
        return {}
    names: list[str] = []
    found: dict[str, tuple[int, float | None]] = {}
    for label in order:
        run = parts[label][0] if label in steps else label
        names += [] if run in names else [run]
        last = max((step for other, step in steps.items() if parts[other][0] == run), default=0)
        width = 1.0 + 1.2 * steps[label] / last if label in steps and last else 1.0 if label in steps else 3.0
        found[label] = (names.index(run), width)
    return found


def _natural(label: str) -> list[tuple[int, float, str]]:
    """Sorts "9" before "10"."""
    parts = re.findall(r"[0-9]{1,15}|[^0-9]+", label)
    return [(0, float(p), "") if re.fullmatch("[0-9]+", p) else (1, 0.0, p) for p in parts]


def column_of(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise KeyError(f"table {table.name} has no column {name!r}; it has {', '.join(table.columns)}")
    return table.columns[name]


def is_numeric(column: Sequence[Any]) -> bool:
    return all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in column)


def numbers(column: Sequence[Any]) -> list[float]:
    """The column as floats; what is missing or no number becomes nan, which is not drawn."""
    return [float(v) if isinstance(v, int | float) else math.nan for v in column]
