"""What stands on the axes: lines with bands, bars with whiskers, points, each read from the rows of its series."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from geomssl.figure_series import Series, column_of, is_numeric, numbers
from geomssl.figure_style import DASHES, LIGHT, MARKERS, SHAPES, colour, short

if TYPE_CHECKING:
    from geomssl.artifact import Figure, Table

LABEL_LIMIT = 40
# How far from its median, in shares of the axes, a cloud's point counts as near.
NEAR = 0.12


def lines(axes: Any, figure: Figure, table: Table, series: Sequence[Series]) -> list[Any]:
    x = _positions(axes, figure, table, categorical=False)
    y, low, high = _heights(axes, figure, table)
    handles = []
    for one in series:
        rows, index = one.rows, one.style
        place, value, below, above = ([column[r] for r in rows] for column in (x, y, low, high))
        few = len(rows) <= 24
        (line,) = axes.plot(
            place, value, color=colour(index), linestyle=DASHES[index % len(DASHES)], linewidth=one.width,
            marker=MARKERS[index % len(MARKERS)] if few else None, markersize=5,
        )
        handles.append(line)
        if few:
            if any(math.isfinite(v) for v in (*below, *above)):
                axes.errorbar(place, value, _whiskers(value, below, above), fmt="none", ecolor=colour(index),
                              elinewidth=1.2, capsize=3)
        else:
            axes.fill_between(place, below, above, color=colour(index), alpha=0.16, linewidth=0)
    return handles


def bars(axes: Any, figure: Figure, table: Table, series: Sequence[Series]) -> list[Any]:
    x = _positions(axes, figure, table, categorical=True)
    y, low, high = _heights(axes, figure, table)
    given = numbers(column_of(table, str(figure.y)))
    room = 0.76 / len(series)
    handles: list[Any] = []
    for nth, one in enumerate(series):
        index = one.style
        place = [x[r] + (nth - (len(series) - 1) / 2) * room for r in one.rows]
        value, below, above = ([column[r] for r in one.rows] for column in (y, low, high))
        whiskers = _whiskers(value, below, above)
        if figure.log_y:
            handles.append(axes.errorbar(
                place, value, whiskers, fmt=MARKERS[index % len(MARKERS)], color=colour(index), markersize=6,
                elinewidth=1.4, capsize=3,
            ))
        else:
            handles.append(axes.bar(place, value, room * 0.9, color=colour(index), alpha=0.82, linewidth=1,
                                    edgecolor=colour(index)))
            if any(math.isfinite(v) for v in (*below, *above)):
                axes.errorbar(place, value, whiskers, fmt="none", ecolor=LIGHT["ink"], elinewidth=1.2, capsize=3)
        for row, at, height in zip(one.rows, place, value, strict=True):
            if figure.log_y and given[row] <= 0 and math.isfinite(height):
                axes.annotate("0", (at, height), (0, 6), textcoords="offset points", ha="center", fontsize=10)
    if any(x):
        axes.set_xlim(-0.6, max(x) + 0.6)
    return handles


def scatter(axes: Any, figure: Figure, table: Table, series: Sequence[Series]) -> list[Any]:
    """Axes, a placeholder for the points and the name of each cloud at its median; `points_of` writes the points.

    A cloud has a name where half of its points are near the median: elsewhere the name would stand among other points.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    x, y = numbers(column_of(table, str(figure.x))), numbers(column_of(table, str(figure.y)))
    axes.update_datalim([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    axes.autoscale_view()
    axes.margins(0.04)
    if figure.diagonal:
        axes.axline((0, 0), slope=1, color=LIGHT["muted"], linestyle="--", linewidth=1)
    holder = Rectangle((0, 0), 0, 0, transform=axes.transAxes, gid="points")
    holder.set_in_layout(False)
    axes.add_artist(holder)
    reach = [NEAR * _span(values) for values in (x, y)]
    for one in series if 1 < len(series) <= LABEL_LIMIT else ():
        inside = [r for r in one.rows if math.isfinite(x[r]) and math.isfinite(y[r])]
        middle = [_median([values[r] for r in inside]) for values in (x, y)] if inside else []
        near = [all(abs(v[r] - m) <= far for v, m, far in zip((x, y), middle, reach, strict=True)) for r in inside]
        if 2 * sum(near) > len(near):
            axes.text(*middle, short(one.label, 14), ha="center", va="center", fontsize=13, fontweight="bold",
                      gid="cloud-label", clip_on=True)
    return [
        Line2D([], [], linestyle="none", marker=MARKERS[s.style % len(SHAPES)], color=colour(s.style), markersize=6)
        for s in series
    ]


def points_of(axes: Any, figure: Figure, table: Table, series: Sequence[Series], height: int) -> str:
    """One <use> a row, grouped by series, at the places that the axes give them."""
    x, y = numbers(column_of(table, str(figure.x))), numbers(column_of(table, str(figure.y)))
    shapes = sorted({s.style % len(SHAPES) for s in series})
    out = ["<defs>", *(f'<path id="m{s}" d="{SHAPES[s]}"/>' for s in shapes), '</defs><g class="points">']
    for one in series:
        out.append(f'<g style="fill: {colour(one.style)}; stroke: {LIGHT["paper"]}; stroke-width: .6">')
        for row in one.rows:
            if math.isfinite(x[row]) and math.isfinite(y[row]):
                at, up = axes.transData.transform((x[row], y[row]))
                if math.isfinite(at) and math.isfinite(up):
                    out.append(f'<use href="#m{one.style % len(SHAPES)}" x="{at:.1f}" y="{height - up:.1f}" data-row="{row}"/>')
        out.append("</g>")
    return "".join([*out, "</g>"])


def _positions(axes: Any, figure: Figure, table: Table, categorical: bool) -> list[float]:
    """x of every row: its number, or the place of its label on an axis of labels."""
    column = column_of(table, str(figure.x))
    if not categorical and is_numeric(column):
        return numbers(column)
    labels = list(dict.fromkeys("none" if v is None else _tick(v) for v in column))
    longest = max((len(short(label, 16)) for label in labels), default=0)
    turn = 35 if longest * len(labels) > 72 else 0
    axes.set_xscale("linear")
    axes.set_xticks(range(len(labels)), [short(label, 16 if turn else 26) for label in labels])
    axes.tick_params(axis="x", length=0)
    if turn:
        for tick in axes.get_xticklabels():
            tick.set(rotation=turn, ha="right", rotation_mode="anchor")
    return [float(labels.index("none" if v is None else _tick(v))) for v in column]


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heights(axes: Any, figure: Figure, table: Table) -> tuple[list[float], list[float], list[float]]:
    """y, low and high of every row. On a logarithmic axis what is not positive is put on the lower edge."""
    y = numbers(column_of(table, str(figure.y)))
    low = numbers(column_of(table, figure.low)) if figure.low else [math.nan] * len(y)
    high = numbers(column_of(table, figure.high)) if figure.high else [math.nan] * len(y)
    if figure.log_y:
        positive = [v for v in (*y, *low, *high) if v > 0 and math.isfinite(v)]
        edge = 10.0 ** math.floor(math.log10(min(positive)) - 0.3) if positive else 1e-1
        if any(v <= 0 for v in (*y, *low)):
            axes.set_ylim(bottom=edge / 1.6)
            y, low, high = ([edge if v <= 0 else v for v in values] for values in (y, low, high))
    return y, low, high


def _whiskers(y: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Lengths below and above y; nothing where an interval is missing. An end on the wrong side of y is drawn at y."""
    return [
        [max(0.0, a - b) if math.isfinite(b) else 0.0 for a, b in zip(y, low, strict=True)],
        [max(0.0, b - a) if math.isfinite(b) else 0.0 for a, b in zip(y, high, strict=True)],
    ]


def _span(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return max(finite, default=0.0) - min(finite, default=0.0)


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
