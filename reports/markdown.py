"""Verdicts and main figures as Markdown for the summary page of a CI step, and as its annotations."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from geomssl.artifact import Artifact
from geomssl.errors import GeomsslError
from geomssl.reports.numbers import figure
from geomssl.reports.verdict import OUTCOMES, Verdict

# GitHub refuses a step's summary above 1 MiB; what goes before ours in the same step counts too.
LIMIT = 2**20
ROOM = 256 * 1024
_SIGN = {"fail": "❌ fail", "inconclusive": "❔ inconclusive", "pass": "✅ pass"}
# GitHub shows ten errors and ten warnings of a step, and leaves the others out unsaid.
ANNOTATIONS = 10


def summary(verdicts: Sequence[Verdict], artifacts: Sequence[Artifact]) -> str:
    """Verdicts, failures first, then why those that did not pass did not, then the main figures of every run.

    At most a quarter of a MiB; a line says so where rows were left out.
    """
    blocks: list[str] = []
    if verdicts:
        ranked = sorted(verdicts, key=lambda v: OUTCOMES.index(v.verdict))
        counts = ", ".join(f"{n} {kind}" for kind in OUTCOMES if (n := sum(v.verdict == kind for v in verdicts)))
        blocks.append(f"## geomssl gate: {counts}\n\n")
        rows = [[_SIGN[v.verdict], v.rule, v.run, v.expected, v.found_text] for v in ranked]
        blocks += _table(["verdict", "rule", "run", "expected", "found"], rows)
        for v in ranked:
            if v.verdict != "pass":
                blocks.append(f"\n**{_text(v.rule)}** ({_text(v.run)}): " + " ".join(_text(s) for s in v.why) + "\n")
    if artifacts:
        blocks.append("\n## Figures\n\n")
        rows = [
            [a.run, a.probe, m.name, figure(m) if m.interval else f"{figure(m)} (no interval: {m.reason})"]
            for a in artifacts for m in [m for m in a.metrics if m.better] or a.metrics[:1]
        ]
        blocks += _table(["run", "probe", "figure", "value"], rows)
    return _fit(blocks, ROOM)


def append_step_summary(text: str) -> bool:
    """Append to the file that $GITHUB_STEP_SUMMARY names; False where it names none, or where there is no room left."""
    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        return False
    path = Path(name)
    try:
        there = path.stat().st_size if path.exists() else 0
        if there + len(text.encode()) + 1 > LIMIT:
            return False
        with path.open("a", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
    except OSError as error:
        raise GeomsslError(
            f"cannot write $GITHUB_STEP_SUMMARY {path}: {error.strerror}", "a writable file", reason="unwritable"
        ) from None
    return True


def workflow_commands(verdicts: Sequence[Verdict]) -> list[str]:
    """Workflow commands for what did not pass: ::error for a failure, ::warning for an inconclusive one, failures first.

    At most ANNOTATIONS lines; where there is more, the last line counts what is left out.
    """
    ranked = [v for kind in OUTCOMES[:-1] for v in verdicts if v.verdict == kind]
    shown = ranked if len(ranked) <= ANNOTATIONS else ranked[: ANNOTATIONS - 1]
    lines = [
        _command("error" if v.verdict == "fail" else "warning", f"geomssl gate: {v.rule} ({v.run})",
                 f"{v.verdict}: expected {v.expected}; found {v.found_text}. {' '.join(v.why[:1])}")
        for v in shown
    ]
    left = ranked[len(shown):]
    if left:
        kind = "error" if left[0].verdict == "fail" else "warning"
        lines.append(_command(kind, "geomssl gate", f"{len(left)} more rules did not pass: see the summary"))
    return lines


def _command(kind: str, title: str, message: str) -> str:
    """One workflow command on one line; its own signs in a title or a message are escaped."""

    def escaped(text: str) -> str:
        return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    short = escaped(title[:200]).replace(":", "%3A").replace(",", "%2C")
    return f"::{kind} title={short}::{escaped(message[:1000])}"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |\n", "|" + " --- |" * len(header) + "\n"]
    return lines + ["| " + " | ".join(_text(cell) for cell in row) + " |\n" for row in rows]


def _text(text: str) -> str:
    """Escaped for Markdown, in a table cell or outside: what a name holds is shown, never read as markup."""
    text = " ".join(str(text).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!@])", r"\\\1", text)


def _fit(blocks: list[str], room: int) -> str:
    kept: list[str] = []
    size = 0
    for index, block in enumerate(blocks):
        size += len(block.encode())
        if size > room:
            return "".join(kept) + f"\n{len(blocks) - index} lines left out: see the report.\n"
        kept.append(block)
    return "".join(kept)
