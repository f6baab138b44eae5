"""Drawing: one figure and its table to one SVG, the same in the artifact's folder and in the report.

Theme "page" writes colours as CSS variables, so that an inlined figure follows a light or a dark page; theme "file"
writes light colours on white. Series differ by colour and by dash or marker, so that none is told by colour alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from geomssl.artifact import Figure, Table

Theme = Literal["page", "file"]

# Every light colour is a name in disguise: no two are equal, so that "page" can put its variable in its place.
LIGHT = {
    "ink": "#1b1f24", "muted": "#59636e", "grid": "#e3e6ea", "paper": "#ffffff",
    "series-0": "#0068b5", "series-1": "#c4501b", "series-2": "#00805e", "series-3": "#b03a8c", "series-4": "#8a6a00",
    "series-5": "#5a4fcf", "series-6": "#5f6b76", "series-7": "#0e8a9c", "series-8": "#8f1d2c", "series-9": "#5b7a1c",
}
DARK = {
    "ink": "#e8eaed", "muted": "#a3acb6", "grid": "#30363d", "paper": "#14171a",
    "series-0": "#5cb3f5", "series-1": "#f5915c", "series-2": "#3fc79c", "series-3": "#ea8fcb", "series-4": "#e3bd3b",
    "series-5": "#a9a2ff", "series-6": "#aab4be", "series-7": "#52cede", "series-8": "#f0737f", "series-9": "#b4d163",
}
COLOURS = 10
DASHES = ["-", (0, (6, 2)), (0, (2, 2)), (0, (8, 2, 2, 2)), (0, (1, 1))]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
# The same shapes as paths around the origin, for points that a page can point at.
SHAPES = [
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z", "M-2.6-2.6h5.2v5.2h-5.2z", "M0-3.5L3.3 2.6H-3.3z", "M0-3.7L3.1 0 0 3.7-3.1 0z",
    "M0 3.5L3.3-2.6H-3.3z", "M-1-3.2h2v2.2h2.2v2h-2.2v2.2h-2v-2.2h-2.2v-2h2.2z",
]
LEGEND_LIMIT = 12
LABEL_LIMIT = 40


@dataclass(frozen=True)
class Limits:
    """Axis limits that several panels share: (low, high), or None where the panel chooses."""

    x: tuple[float, float] | None = None
    y: tuple[float, float] | None = None


@dataclass(frozen=True)
class Series:
    """One line, one set of bars or one cloud: its label, its rows, and the place of its colour, dash and marker.

    width: of a line; the usual one where None.
    """

    label: str
    rows: list[int]
    style: int
    width: float | None = None


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
    with matplotlib.rc_context(_style(digest)), warnings.catch_warnings():
        # Text stays text: a glyph that matplotlib's font lacks is the browser's to find.
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph.*")
        canvas = Canvas(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        series = split(figure, table, order)
        _axes(axes, figure, theme)
        points = ""
        if figure.kind == "scatter":
            handles = _scatter(axes, figure, table, series)
        elif figure.kind == "line":
            handles = _lines(axes, figure, table, series)
        else:
            handles = _bars(axes, figure, table, series)
        _limits(axes, limits)
        if 1 < len(series) <= LEGEND_LIMIT or (series and figure.series and order):
            _legend(canvas, handles, series, width, figure.kind == "scatter")
        text = io.StringIO()
        canvas.savefig(text, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        if figure.kind == "scatter":
            points = _points(axes, figure, table, series, height)
    return _finish(text.getvalue(), figure, series, points, theme, prefix or f"f{digest}")


def split(figure: Figure, table: Table, order: Sequence[str] = ()) -> list[Series]:
    """The rows of each series; one series when the figure names none.

    In order of first appearance, but sorted in a scatter, so that a class has the same colour on every map. Labels in
    `order` are styled by their place there; moments of one run ("NAME @STEP") alike, and the later the wider.
    """
    _column(table, str(figure.x))
    _column(table, str(figure.y))
    if figure.series is None:
        return [Series(figure.y_label or str(figure.y), list(range(len(table))), 0)]
    found: dict[str, list[int]] = {}
    for row, value in enumerate(_column(table, figure.series)):
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


def shared(figures: Sequence[tuple[Figure, Table]]) -> Limits:
    """Limits that hold every figure's values and intervals, padded, so that panels side by side can be compared."""
    first = figures[0][0]

    def span(names: Sequence[str | None], log: bool) -> tuple[float, float] | None:
        values = [
            v for (_, table), columns in zip(figures, names_of(names), strict=True)
            for name in columns for v in _numbers(_column(table, name))
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

    numeric = first.kind != "bar" and all(_is_numeric(_column(t, str(f.x))) for f, t in figures)
    return Limits(span(["x"], first.log_x) if numeric else None, span(["y", "low", "high"], first.log_y))


def _column(table: Table, name: str) -> list[Any]:
    if name not in table.columns:
        raise KeyError(f"table {table.name} has no column {name!r}; it has {', '.join(table.columns)}")
    return table.columns[name]


def _is_numeric(column: Sequence[Any]) -> bool:
    return all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in column)


def _numbers(column: Sequence[Any]) -> list[float]:
    """The column as floats; what is missing or no number becomes nan, which is not drawn."""
    return [float(v) if isinstance(v, int | float) else math.nan for v in column]


def _short(text: str, most: int = 26) -> str:
    """Text for a tick or a legend: no control characters, at most `most` letters."""
    text = re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+", " ", str(text)).strip() or "–"
    return text if len(text) <= most else text[: most - 1] + "…"


def _legend(canvas: Any, handles: list[Any], series: Sequence[Series], width: int, tight: bool) -> None:
    """The legend above the axes, as many in a row as fit, read row by row (matplotlib fills column by column)."""
    handle, pad, gap = (0.8, 0.2, 0.7) if tight else (2.2, 0.6, 1.2)
    size = 11.5
    entry = size * (handle + pad + gap) + 7.2 * max(len(_short(s.label)) for s in series)
    across = max(1, min(len(series), int((width - 12) / entry)))
    turned = [i for column in range(across) for i in range(column, len(series), across)]
    canvas.legend(
        [handles[i] for i in turned], [_legend_text(series[i].label) for i in turned], loc="outside upper left", ncols=across,
        frameon=False, handlelength=handle, handletextpad=pad, columnspacing=gap, borderpad=0.1, fontsize=size,
    )


def _legend_text(label: str) -> str:
    # matplotlib drops a legend entry that begins with an underscore
    short = _short(label)
    return "\u200b" + short if short.startswith("_") else short


def power(value: float, _position: object = None) -> str:
    """A tick of a logarithmic axis: 10⁻³, or the number itself where it is no power of ten or near one."""
    if value <= 0:
        return ""
    exponent = math.log10(value)
    if abs(exponent - round(exponent)) > 1e-9 or -2 < exponent < 3:
        return f"{value:g}"
    return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _style(salt: str) -> Any:
    return {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 12, "font.family": "DejaVu Sans",
        "axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["ink"], "axes.linewidth": 0.8, "axes.labelsize": 12,
        "axes.titlesize": 13, "axes.titlecolor": LIGHT["ink"], "axes.titlelocation": "left", "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "xtick.labelsize": 11, "ytick.labelsize": 11,
        "grid.color": LIGHT["grid"], "grid.linewidth": 0.8, "lines.linewidth": 1.8,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "auto", "path.simplify": True,
    }


def _axes(axes: Any, figure: Figure, theme: Theme) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both" if figure.kind == "scatter" else "y")
    axes.set_axisbelow(True)
    axes.set_xlabel(_short(figure.x_label or str(figure.x), 90))
    axes.set_ylabel(_short(figure.y_label or str(figure.y), 48))
    if theme == "file":
        axes.figure.set_facecolor(LIGHT["paper"])
        axes.set_title(_short(figure.title, 84))
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


def _positions(axes: Any, figure: Figure, table: Table, categorical: bool) -> list[float]:
    """x of every row: its number, or the place of its label on an axis of labels."""
    column = _column(table, str(figure.x))
    if not categorical and _is_numeric(column):
        return _numbers(column)
    labels = list(dict.fromkeys("none" if v is None else _tick(v) for v in column))
    longest = max((len(_short(label, 16)) for label in labels), default=0)
    turn = 35 if longest * len(labels) > 72 else 0
    axes.set_xscale("linear")
    axes.set_xticks(range(len(labels)), [_short(label, 16 if turn else 26) for label in labels])
    axes.tick_params(axis="x", length=0)
    if turn:
        for tick in axes.get_xticklabels():
            tick.set(rotation=turn, ha="right", rotation_mode="anchor")
    return [float(labels.index("none" if v is None else _tick(v))) for v in column]


def _tick(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _heights(axes: Any, figure: Figure, table: Table) -> tuple[list[float], list[float], list[float]]:
    """y, low and high of every row. On a logarithmic axis what is not positive is put on the lower edge."""
    y = _numbers(_column(table, str(figure.y)))
    low = _numbers(_column(table, figure.low)) if figure.low else [math.nan] * len(y)
    high = _numbers(_column(table, figure.high)) if figure.high else [math.nan] * len(y)
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


def _colour(index: int) -> str:
    return LIGHT[f"series-{index % COLOURS}"]


def _lines(axes: Any, figure: Figure, table: Table, series: Sequence[Series]) -> list[Any]:
    x = _positions(axes, figure, table, categorical=False)
    y, low, high = _heights(axes, figure, table)
    handles = []
    for one in series:
        rows, index = one.rows, one.style
        place, value, below, above = ([column[r] for r in rows] for column in (x, y, low, high))
        few = len(rows) <= 24
        (line,) = axes.plot(
            place, value, color=_colour(index), linestyle=DASHES[index % len(DASHES)], linewidth=one.width,
            marker=MARKERS[index % len(MARKERS)] if few else None, markersize=5,
        )
        handles.append(line)
        if few:
            if any(math.isfinite(v) for v in (*below, *above)):
                axes.errorbar(place, value, _whiskers(value, below, above), fmt="none", ecolor=_colour(index),
                              elinewidth=1.2, capsize=3)
        else:
            axes.fill_between(place, below, above, color=_colour(index), alpha=0.16, linewidth=0)
    return handles


def _bars(axes: Any, figure: Figure, table: Table, series: Sequence[Series]) -> list[Any]:
    x = _positions(axes, figure, table, categorical=True)
    y, low, high = _heights(axes, figure, table)
    room = 0.76 / len(series)
    handles: list[Any] = []
    for nth, one in enumerate(series):
        index = one.style
        place = [x[r] + (nth - (len(series) - 1) / 2) * room for r in one.rows]
        value, below, above = ([column[r] for r in one.rows] for column in (y, low, high))
        whiskers = _whiskers(value, below, above)
        if figure.log_y:
            handles.append(axes.errorbar(
                place, value, whiskers, fmt=MARKERS[index % len(MARKERS)], color=_colour(index), markersize=6,
                elinewidth=1.4, capsize=3,
            ))
        else:
            handles.append(axes.bar(place, value, room * 0.9, color=_colour(index), alpha=0.82, linewidth=1,
                                    edgecolor=_colour(index)))
            if any(math.isfinite(v) for v in (*below, *above)):
                axes.errorbar(place, value, whiskers, fmt="none", ecolor=LIGHT["ink"], elinewidth=1.2, capsize=3)
        for row, at, height in zip(one.rows, place, value, strict=True):
            given = _numbers(_column(table, str(figure.y)))[row]
            if figure.log_y and given <= 0 and math.isfinite(height):
                axes.annotate("0", (at, height), (0, 6), textcoords="offset points", ha="center", fontsize=10)
    if any(x):
        axes.set_xlim(-0.6, max(x) + 0.6)
    return handles


def _scatter(axes: Any, figure: Figure, table: Table, series: Sequence[Series]) -> list[Any]:
    """Axes, a placeholder for the points and the name of each cloud at its median; `_points` writes the points."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    x, y = _numbers(_column(table, str(figure.x))), _numbers(_column(table, str(figure.y)))
    axes.update_datalim([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)])
    axes.autoscale_view()
    axes.margins(0.04)
    holder = Rectangle((0, 0), 0, 0, transform=axes.transAxes, gid="points")
    holder.set_in_layout(False)
    axes.add_artist(holder)
    for one in series if 1 < len(series) <= LABEL_LIMIT else ():
        inside = [r for r in one.rows if math.isfinite(x[r]) and math.isfinite(y[r])]
        if inside:
            axes.text(_median([x[r] for r in inside]), _median([y[r] for r in inside]), _short(one.label, 14),
                      ha="center", va="center", fontsize=13, fontweight="bold", gid="cloud-label", clip_on=True)
    return [
        Line2D([], [], linestyle="none", marker=MARKERS[s.style % len(SHAPES)], color=_colour(s.style), markersize=6)
        for s in series
    ]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _points(axes: Any, figure: Figure, table: Table, series: Sequence[Series], height: int) -> str:
    """One <use> a row, grouped by series, at the places that the axes give them."""
    x, y = _numbers(_column(table, str(figure.x))), _numbers(_column(table, str(figure.y)))
    shapes = sorted({s.style % len(SHAPES) for s in series})
    out = ["<defs>", *(f'<path id="m{s}" d="{SHAPES[s]}"/>' for s in shapes), '</defs><g class="points">']
    for one in series:
        out.append(f'<g style="fill: {_colour(one.style)}; stroke: {LIGHT["paper"]}; stroke-width: .6">')
        for row in one.rows:
            if math.isfinite(x[row]) and math.isfinite(y[row]):
                at, up = axes.transData.transform((x[row], y[row]))
                if math.isfinite(at) and math.isfinite(up):
                    out.append(f'<use href="#m{one.style % len(SHAPES)}" x="{at:.1f}" y="{height - up:.1f}" data-row="{row}"/>')
        out.append("</g>")
    return "".join([*out, "</g>"])


def _finish(svg: str, figure: Figure, series: Sequence[Series], points: str, theme: Theme, prefix: str) -> str:
    """Strip what a page does not need, put the points in, make ids this figure's own, and colours the theme's."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", "", body, flags=re.S)
    body = re.sub(r'<g id="points">.*?</g>', lambda _: points, body, count=1, flags=re.S)
    tags = "".join(re.findall(r"<[^>]+>", body))
    kept = {name for pair in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', tags) for name in pair if name}

    def tidy(match: re.Match[str]) -> str:
        # only inside tags: a label may well read id="x" or #ffffff
        tag = match[0].replace('id="cloud-label"', 'class="cloud-label"').replace("xlink:href", "href")
        tag = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in kept else "", tag)
        tag = tag.replace('href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
        tag = re.sub(r"(\.\d\d)\d+", r"\1", re.sub(r"\s*\n\s*", " ", tag))
        tag = re.sub(r' transform="rotate\(-0 [^"]*"', "", tag)
        # generic families follow the reader's system; widths were laid out in DejaVu, which is wider than most
        tag = re.sub(r"'?DejaVu Sans'?[^;\"]*", "system-ui, sans-serif", tag)
        if "cloud-label" in tag:
            halo = f'style="paint-order: stroke; stroke: {LIGHT["paper"]}; stroke-width: 4px"'
            tag = tag.replace('class="cloud-label"', halo)
        if theme == "page":
            tag = re.sub(r"#[0-9a-f]{6}\b", lambda m: f"var(--{_NAMES[m[0]]})" if m[0] in _NAMES else m[0], tag)
        return tag

    body = re.sub(r"<[^>]+>", tidy, re.sub(r">\s*\n\s*<", "><", body))
    names = [s.label for s in series] if len(series) > 1 else []
    said = f"{figure.y_label or figure.y} against {figure.x_label or figure.x}"
    said += f"; series: {', '.join(names[:LEGEND_LIMIT])}{'…' if len(names) > LEGEND_LIMIT else ''}" if names else ""
    head = re.match(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', body)
    assert head is not None
    opening = (
        f'<svg xmlns="http://www.w3.org/2000/svg" {head[1]} width="100%" role="img" stroke-linejoin="round" '
        f'aria-labelledby="{prefix}-title {prefix}-desc">'
        f'<title id="{prefix}-title">{escape(_short(figure.title, 200))}</title>'
        f'<desc id="{prefix}-desc">{escape(_short(said, 600))}</desc>'
    )
    return opening + body[head.end() :].rstrip()


_NAMES = {colour: name for name, colour in LIGHT.items()}
