"""The report: artifacts and verdicts in, one HTML file out that opens offline, prints, and reads without a script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from typing import Any

from geomssl import figures
from geomssl.artifact import Artifact, Table
from geomssl.errors import GeomsslError
from geomssl.reports import compare, timeline
from geomssl.reports.gate import Verdict
from geomssl.reports.numbers import bounds, number

LIMIT = 2_000_000
ROWS = 200
POINT_COLUMNS = 6
_OUTCOMES = ("fail", "inconclusive", "pass")
_SIGN = {"fail": "✕", "inconclusive": "?", "pass": "✓"}


@dataclass
class _Page:
    """What accumulates while the page is put together: anchors, so that none is used twice, and tiles, each kept once."""

    images: set[str]
    """Hashes of the PNGs that may be embedded; the rest is left out to keep the page small."""
    anchors: set[str] = field(default_factory=set)
    tiles: dict[str, bytes] = field(default_factory=dict)

    def anchor(self, *parts: str) -> str:
        base = re.sub(r"[^a-z0-9]+", "-", "-".join(p for p in parts if p).lower()).strip("-") or "part"
        name, count = base, 1
        while name in self.anchors:
            count += 1
            name = f"{base}-{count}"
        self.anchors.add(name)
        return name


def render(artifacts: Sequence[Artifact], verdicts: Sequence[Verdict] = (), title: str = "Geometry of the encoders") -> str:
    """One page: verdicts (failures first), the runs compared, then probe by probe; rebuilt from the artifacts alone.

    Artifacts of several runs that answer the same question (probe and options) are laid over each other. The page stays
    under 2 MB: where it would not, the largest images are left out and the page says so. GeomsslError without artifacts.
    """
    if not artifacts:
        raise GeomsslError("no artifacts to report", "at least one measured artifact", reason="no-artifact")
    courses, artifacts = timeline.courses(artifacts), timeline.shown(artifacts)
    pictures = {_hash(data): data for a in artifacts for data in _pictures(a)}
    kept = set(pictures)
    page = _render(artifacts, courses, verdicts, title, kept, ROWS)
    over = len(page.encode()) - LIMIT
    while over > 0 and kept:
        largest = max(kept, key=lambda h: len(pictures[h]))
        kept.remove(largest)
        # a picture may be shown more than once, so what it frees is measured and not reckoned
        over -= len(pictures[largest])
        if over <= 0 or not kept:
            page = _render(artifacts, courses, verdicts, title, kept, ROWS)
            over = len(page.encode()) - LIMIT
    return page if over <= 0 else _render(artifacts, courses, verdicts, title, kept, ROWS // 10)


def _render(
    artifacts: Sequence[Artifact], courses: Sequence[Artifact], verdicts: Sequence[Verdict], title: str, images: set[str],
    most: int,
) -> str:
    import jinja2
    from markupsafe import Markup

    page = _Page(images)
    for reserved in ("main", "verdicts", "overview", "theme", "card", "contents", "provenance"):
        page.anchor(reserved)
    runs, questions = compare.questions(artifacts)
    sections = [
        _section(page, probe, [q for q in questions if q.probe == probe], runs, most)
        for probe in dict.fromkeys(q.probe for q in questions)
    ]
    where = {s["probe"]: s for s in sections}
    measured = list(sections)
    if courses:
        trained, asked = compare.questions(courses)
        sections.insert(0, _section(page, timeline.PROBE, asked, trained, most))
    ranked = sorted(verdicts, key=lambda v: _OUTCOMES.index(v.verdict))
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": number, "bounds": bounds}
    return environment.from_string(_read("report.html.j2")).render(
        title=title, runs=runs, named=list(dict.fromkeys(a.run for a in artifacts)), sections=sections,
        sections_of=where, sign=_SIGN,
        verdicts=[(page.anchor("verdict", v.rule, v.run), v) for v in ranked],
        counts=[(kind, n) for kind in _OUTCOMES if (n := sum(v.verdict == kind for v in verdicts))],
        overview=[(s, [(q["label"], row) for q in s["questions"] for row in q["key"]]) for s in measured],
        common=_common(artifacts), version=_version(),
        css=Markup(_colours() + _read("report.css") + _tiles(page)), js=Markup(_read("report.js")),
        dropped=len({_hash(d) for a in artifacts for d in _pictures(a)} - images),
    )


def _section(
    page: _Page, probe: str, questions: list[compare.Question], runs: list[str], most: int
) -> dict[str, Any]:
    titles = {a.title for q in questions for a in q.answers.values()}
    return {
        "probe": probe,
        "anchor": page.anchor(probe),
        "title": (titles.pop() if len(titles) == 1 else "") or probe.capitalize(),
        "questions": [_question(page, q, runs, most) for q in questions],
    }


def _question(page: _Page, question: compare.Question, runs: list[str], most: int) -> dict[str, Any]:
    answers = question.answers
    definitions = dict.fromkeys(a.definition for a in answers.values())
    notes: dict[str, list[str]] = {}
    for run, artifact in answers.items():
        for note in artifact.notes:
            notes.setdefault(note, []).append(run)
    here = [run for run in runs if run in answers]
    return {
        "label": question.label,
        "anchor": page.anchor(question.probe, question.label) if question.label else "",
        "definitions": [
            (d, "" if len(definitions) == 1 else ", ".join(r for r, a in answers.items() if a.definition == d))
            for d in definitions
        ],
        "headlines": [(run, a.headline) for run, a in answers.items()],
        "notes": [(note, "" if said == list(answers) else ", ".join(said)) for note, said in notes.items()],
        "runs": here,
        "rows": compare.rows(question, here),
        "key": compare.rows(question, runs, key_only=True),
        "methods": methods(question),
        "plates": [_plate(page, question, plate, most) for plate in compare.plates(question, runs)],
        "tables": [_table(t, sizes, most) for t, sizes in compare.spare_tables(question)],
        "provenance": provenance(answers),
    }


def _plate(
    page: _Page, question: compare.Question, plate: compare.Plate, most: int
) -> dict[str, Any]:
    anchor = page.anchor(question.probe, question.label, plate.name)
    count = len(plate.panels)
    across = 2 if count in (2, 4) else min(3, count)
    shown = [_panel(panel, f"{anchor}-{i}", page, across) for i, panel in enumerate(plate.panels)]
    captions = list(dict.fromkeys(
        f.caption for a in question.answers.values() for f in a.figures
        if f.name == plate.name and f.kind == plate.figure.kind and f.caption
    ))
    own = len(captions) > 1 and all(p.artifact for p in plate.panels)
    for panel, out in zip(plate.panels, shown, strict=True):
        out["caption"] = panel.figure.caption if own else ""
    return {
        "anchor": anchor,
        "title": plate.figure.title,
        "captions": [] if own else captions,
        "panels": shown,
        "across": across,
        "points": any(p["rows"] for p in shown),
        "table": None if plate.table is None else _table(plate.table, plate.rows_of, most),
    }


def _panel(panel: compare.Panel, prefix: str, page: _Page, across: int) -> dict[str, Any]:
    from markupsafe import Markup

    out: dict[str, Any] = {"title": panel.title, "svg": "", "image": "", "missing": "", "tile": "", "rows": "", "alt": ""}
    figure = panel.figure
    if figure.kind == "image":
        data = panel.artifact.files.get(str(figure.file)) if panel.artifact else None
        out["alt"] = f"{figure.title}. {panel.title}".strip()
        if data is None or _hash(data) not in page.images:
            said = "is not in the artifact" if data is None else "was left out to keep this page under 2 MB"
            out["missing"] = f"The image {figure.file} {said}."
        else:
            out["image"] = "data:image/png;base64," + base64.b64encode(data).decode()
        return out
    if panel.table is None:
        out["missing"] = f"The table {figure.table} is not in the artifact."
        return out
    scatter = figure.kind == "scatter"
    if across == 1:
        width, height = (620, 500) if scatter else (760, 360)
    elif across == 2:
        width, height = (470, 440) if scatter else (470, 330)
    else:
        width, height = (380, 380) if scatter else (380, 320)
    out["svg"] = Markup(figures.draw(
        figure, panel.table, width=width, height=height, limits=panel.limits, prefix=prefix, order=panel.order,
    ))
    if scatter and panel.artifact is not None:
        out["rows"] = Markup(_points(panel, page, out))
    return out


def _points(panel: compare.Panel, page: _Page, out: dict[str, Any]) -> str:
    """What the page knows of each point: its row, less the coordinates, and where its tile lies in the sprite."""
    figure, table = panel.figure, panel.table
    assert table is not None
    assert panel.artifact is not None
    sprite = panel.artifact.files.get(figure.sprite) if figure.sprite else None
    if sprite is not None and figure.sprite_columns > 0 and _hash(sprite) in page.images:
        out["tile"] = f"tile-{_hash(sprite)}"
        page.tiles[out["tile"]] = sprite
    names = [n for n in table.columns if n not in (figure.x, figure.y)][:POINT_COLUMNS]
    data = {
        "columns": names,
        "rows": [[number(v) for v in row] for row in zip(*(table.columns[n] for n in names), strict=True)],
        "across": figure.sprite_columns,
        "down": -(-len(table) // figure.sprite_columns) if figure.sprite_columns else 0,
    }
    # "</script>" in a class name must not end the script
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _table(table: Table, sizes: list[int], most: int) -> dict[str, Any]:
    """At most `most` rows, an equal share of each run, with a line that says so."""
    share = max(1, most // max(1, len(sizes)))
    chosen: list[int] = []
    start = 0
    for size in sizes:
        chosen += range(start, start + min(size, share))
        start += size
    cut = len(chosen) < len(table)
    each = " of each run" if len(sizes) > 1 else ""
    return {
        "title": table.title,
        "about": table.about,
        "columns": [(name, _is_number(column)) for name, column in table.columns.items()],
        "rows": [[number(table.columns[name][i]) for name in table.columns] for i in chosen],
        "cut": f"The first {share} rows{each}, of {len(table)} in all; the rest is in {table.name}.csv beside the artifact."
        if cut else "",
    }


def _is_number(column: list[Any]) -> bool:
    return all(v is None or (isinstance(v, int | float) and not isinstance(v, bool)) for v in column)


def provenance(answers: dict[str, Artifact]) -> list[tuple[str, list[str]]]:
    """Where each run's artifact comes from and how it was measured: (what, a value a run); one value where all agree."""
    told = [
        {**{f"option {k}": v for k, v in a.options.items()}, "step": a.step, **a.provenance, "artifact": _folder(a)}
        for a in answers.values()
    ]
    keys = [k for k in dict.fromkeys(key for one in told for key in one) if any(one.get(k) is not None for one in told)]
    found = []
    for key in keys:
        values = [_value(one.get(key)) for one in told]
        found.append((key, values[:1] if len(set(values)) == 1 else values))
    return found


def methods(question: compare.Question) -> list[tuple[str, str]]:
    """Each way in which an interval was found, and the metrics that it holds for."""
    found: dict[str, dict[str, None]] = {}
    for artifact in question.answers.values():
        for metric in artifact.metrics:
            if metric.interval:
                found.setdefault(metric.interval.method, {})[metric.name.replace("_", " ")] = None
    return [(method, ", ".join(names)) for method, names in found.items()]


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_value(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return "–" if value is None else str(value)


def _folder(artifact: Artifact) -> str:
    return f"{artifact.probe}/{artifact.options_hash}" + ("" if artifact.step is None else f"@{artifact.step}")


def _common(artifacts: Sequence[Artifact]) -> list[tuple[str, str]]:
    """What all runs share, for the head of the page: data set, split, device and the like."""
    wanted = ("dataset", "split", "n", "seed", "device", "dtype")
    found = []
    for key in wanted:
        values = list(dict.fromkeys(_value(a.provenance[key]) for a in artifacts if key in a.provenance))
        if len(values) == 1:
            found.append((key, values[0]))
    return found


def _pictures(artifact: Artifact) -> Iterable[bytes]:
    for figure in artifact.figures:
        for name in (figure.file, figure.sprite):
            if name and name in artifact.files:
                yield artifact.files[name]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def _tiles(page: _Page) -> str:
    return "".join(
        f'.{name}{{--tile:url("data:image/png;base64,{base64.b64encode(data).decode()}")}}\n'
        for name, data in page.tiles.items()
    )


def _colours() -> str:
    """The figures' colours as CSS variables: light, dark by the system's wish, and either by the reader's."""
    light, dark = ("".join(f"--{name}:{value};" for name, value in theme.items()) for theme in (figures.LIGHT, figures.DARK))
    return (
        f":root{{color-scheme:light;{light}}}\n"
        f"@media screen and (prefers-color-scheme:dark){{:root:not([data-theme=light]){{color-scheme:dark;{dark}}}}}\n"
        f"@media screen{{:root[data-theme=dark]{{color-scheme:dark;{dark}}}}}\n"
    )


def _read(name: str) -> str:
    return files("geomssl.reports").joinpath(name).read_text(encoding="utf-8")


def _version() -> str:
    try:
        return version("geomssl")
    except PackageNotFoundError:
        return "of an unknown version"
