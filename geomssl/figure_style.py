"""How figures look: colours by name, dashes, markers, the texts of ticks, and the last touch on an SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from geomssl.artifact import Figure
    from geomssl.figure_series import Series

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
_NAMES = {colour: name for name, colour in LIGHT.items()}


def colour(index: int) -> str:
    return LIGHT[f"series-{index % COLOURS}"]


def short(text: str, most: int = 26) -> str:
    """Text for a tick or a legend: no control characters, at most `most` letters."""
    text = re.sub(r"[^\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]+", " ", str(text)).strip() or "–"
    return text if len(text) <= most else text[: most - 1] + "…"


def power(value: float, _position: object = None) -> str:
    """A tick of a logarithmic axis: 10⁻³, or the number itself where it is no power of ten or near one."""
    if value <= 0:
        return ""
    exponent = math.log10(value)
    if abs(exponent - round(exponent)) > 1e-9 or -2 < exponent < 3:
        return f"{value:g}"
    return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def settings(salt: str) -> Any:
    return {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 12, "font.family": "DejaVu Sans",
        "axes.edgecolor": LIGHT["muted"], "axes.labelcolor": LIGHT["ink"], "axes.linewidth": 0.8, "axes.labelsize": 12,
        "axes.titlesize": 13, "axes.titlecolor": LIGHT["ink"], "axes.titlelocation": "left", "text.color": LIGHT["ink"],
        "xtick.color": LIGHT["muted"], "ytick.color": LIGHT["muted"], "xtick.labelsize": 11, "ytick.labelsize": 11,
        "grid.color": LIGHT["grid"], "grid.linewidth": 0.8, "lines.linewidth": 1.8,
        "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "auto", "path.simplify": True,
    }


def finish(svg: str, figure: Figure, series: Sequence[Series], points: str, theme: Theme, prefix: str) -> str:
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
        f'<title id="{prefix}-title">{escape(short(figure.title, 200))}</title>'
        f'<desc id="{prefix}-desc">{escape(short(said, 600))}</desc>'
    )
    return opening + body[head.end() :].rstrip()
