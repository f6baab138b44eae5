"""Drawing: one figure and its table to one SVG, the same in the artifact's folder and in the report.

Theme "page" writes colours as CSS variables, so that an inlined figure follows a light or a dark page; theme "file"
writes light colours on white. Series differ by colour and by dash or marker, so that none is told by colour alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geomssl.figure_marks import bars, lines, points_of, scatter
from geomssl.figure_series import Series, column_of, is_numeric, numbers, split
from geomssl.figure_style import DARK, LEGEND_LIMIT, LIGHT, Theme, finish, power, settings, short

if TYPE_CHECKING:
    from geomssl.artifact import Figure, Table

__all__ = ["DARK", "LIGHT", "Limits", "Series", "Theme", "draw", "power", "shared", "split"]


@dataclass(frozen=True)
class Limits:
    """Axis limits that several panels share: (low, high), or None where the panel chooses."""

    x: tuple[float, float] | None = None
    y: tuple[float, float] | None = None


def draw(
    figure: Figure,
    table: Table,
    theme: Theme = "page",
    *,
    width: int = 640,
    height: int = 360,
    limits: Limits | None = None,
    prefix: str = "",
    order: Sequence[str] = (),
) -> str:
    """The figure as SVG text, `width` by `height` units, as wide as its container.

    limits: axis limits to share between panels.  prefix: put before every id; several SVGs inlined in one page need
    different ones (by default, it depends on the figure's data).  order: series that keep their colour even where some are
    missing, so that a run looks the same in every figure. A scatter's point of table row i carries data-row="i".
    On a logarithmic axis a bar is drawn as a point with whiskers (its length would mean nothing), and values that are
    not positive stand on the lower edge, marked 0. Raises ValueError for an image, which is a file already, and KeyError
    for a column that the table does not have.
    """
    if figure.kind == "image":
        raise ValueError(f"figure {figure.name} is an image: show its file")
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    digest = hashlib.sha256(repr((figure, table, theme, width, height, limits)).encode()).hexdigest()[:8]
    with matplotlib.rc_context(settings(digest)), warnings.catch_warnings():
        # Text stays text: a glyph that matplotlib's font lacks is the browser's to find.
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph.*")
        canvas = Canvas(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        series = split(figure, table, order)
        _axes(axes, figure, theme)
        points = ""
        if figure.kind == "scatter":
            handles = scatter(axes, figure, table, series)
        elif figure.kind == "line":
            handles = lines(axes, figure, table, series)
        else:
            handles = bars(axes, figure, table, series)
        _limits(axes, limits)
        if 1 < len(series) <= LEGEND_LIMIT or (series and figure.series and order):
            _legend(canvas, handles, series, width, figure.kind == "scatter")
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        if figure.kind == "scatter":
            points = points_of(axes, figure, table, series, height)
    return finish(text.getvalue(), figure, series, points, theme, prefix or f"f{digest}")


def shared(figures: Sequence[tuple[Figure, Table]]) -> Limits:
    """Limits that hold every figure's values and intervals, padded, so that panels side by side can be compared."""
    first = figures[0][0]

    def span(names: Sequence[str | None], log: bool) -> tuple[float, float] | None:
        values = [
            v for (_, table), columns in zip(figures, names_of(names), strict=True)
            for name in columns for v in numbers(column_of(table, name))
            if math.isfinite(v) and (v > 0 or not log)
        ]
        if not values:
            return None
        low, high = min(values), max(values)
        if log:
            pad = max((high / low) ** 0.05, 1.1)
            return low / pad, high * pad
        pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
        return (0.0 if first.kind == "bar" and low >= 0 else low - pad), high + pad

    def names_of(names: Sequence[str | None]) -> list[list[str]]:
        return [[str(getattr(f, n)) for n in names if n and getattr(f, n)] for f, _ in figures]

    numeric = first.kind != "bar" and all(is_numeric(column_of(t, str(f.x))) for f, t in figures)
    return Limits(span(["x"], first.log_x) if numeric else None, span(["y", "low", "high"], first.log_y))


def _legend(canvas: Any, handles: list[Any], series: Sequence[Series], width: int, tight: bool) -> None:
    """The legend above the axes, as many in a row as fit, read row by row (matplotlib fills column by column)."""
    handle, pad, gap = (0.8, 0.2, 0.7) if tight else (2.2, 0.6, 1.2)
    size = 11.5
    entry = size * (handle + pad + gap) + 7.2 * max(len(short(s.label)) for s in series)
    across = max(1, min(len(series), int((width - 12) / entry)))
    turned = [i for column in range(across) for i in range(column, len(series), across)]
    canvas.legend(
        [handles[i] for i in turned], [_legend_text(series[i].label) for i in turned], loc="outside upper left", ncols=across,
        frameon=False, handlelength=handle, handletextpad=pad, columnspacing=gap, borderpad=0.1, fontsize=size,
    )


def _legend_text(label: str) -> str:
    # matplotlib drops a legend entry that begins with an underscore
    text = short(label)
    return "\u200b" + text if text.startswith("_") else text


def _axes(axes: Any, figure: Figure, theme: Theme) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both" if figure.kind == "scatter" else "y")
    axes.set_axisbelow(True)
    axes.set_xlabel(short(figure.x_label or str(figure.x), 90))
    axes.set_ylabel(short(figure.y_label or str(figure.y), 48))
    if theme == "file":
        axes.figure.set_facecolor(LIGHT["paper"])
        axes.set_title(short(figure.title, 84))
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for log, axis, scale in ((figure.log_x, axes.xaxis, axes.set_xscale), (figure.log_y, axes.yaxis, axes.set_yscale)):
        if log:
            scale("log")
            axis.set_major_formatter(FuncFormatter(power))
            axis.set_minor_formatter(NullFormatter())


def _limits(axes: Any, limits: Limits | None) -> None:
    if limits and limits.x:
        axes.set_xlim(*limits.x)
    if limits and limits.y:
        axes.set_ylim(*limits.y)
