"""geomssl report and geomssl gate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from geomssl import artifact, files
from geomssl.artifact import Artifact
from geomssl.commands.model import model_options, option, subject_of
from geomssl.commands.probing import measure
from geomssl.errors import GeomsslError
from geomssl.progress import shown


def collect(runs: Sequence[str]) -> list[Artifact]:
    """The artifacts of every named run: run.pt, its folder, or one artifact folder."""
    found: list[Artifact] = []
    for run in runs:
        folders = artifact.find(run)
        if not folders:
            said = "no such run" if not Path(run).exists() else "no artifact in"
            raise GeomsslError(f"{said} {run}", "a measured run.pt, its folder, or an artifact folder", reason="no-artifact")
        found += [artifact.load(folder) for folder in folders]
    return found


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--out", default="report.html", show_default=True, metavar="FILE", help="the HTML file")
@click.option("--rules", metavar="GATE.toml", help="show verdicts by these rules first")
@click.option("--title", default=None, help="heading of the report")
def report(runs: tuple[str, ...], out: str, rules: str | None, title: str | None) -> None:
    """One HTML file from the artifacts of one run or more: it opens offline and compares the runs.

    \b
    Example:
      geomssl report simclr.pt hssl.pt ciper.pt -o report.html
    """
    from geomssl.reports import gate as judge
    from geomssl.reports.html import render

    artifacts = collect(runs)
    verdicts = judge.evaluate(artifacts, judge.read_rules(rules)) if rules else []
    files.write(out, render(artifacts, verdicts, **({"title": title} if title else {})))
    click.echo(f"report: {out}")


def _gate(runs: tuple[str, ...], rules: str, junit: str | None, inconclusive: str, **values: Any) -> int:
    from geomssl.reports import gate as judge
    from geomssl.reports.junit import junit as to_junit
    from geomssl.reports.markdown import append_step_summary, summary

    read = judge.read_rules(rules)
    if values["checkpoint"] or values["model"]:
        if runs:
            given_both = "runs beside --checkpoint or --model"
            raise GeomsslError(given_both, "measured runs, or a model to measure", reason="bad-usage")
        with shown(not values["quiet"]):
            subject, folder = subject_of(values)
            artifacts = [
                measure(rule.probe, subject, rule.options, folder)[0]
                for rule in read.rule
                if rule.run in (None, subject.provenance["run"])
            ]
    else:
        artifacts = collect(runs)
    verdicts = judge.evaluate(artifacts, read)
    for verdict in verdicts:
        click.echo(judge.describe(verdict))
    if junit:
        files.write(junit, to_junit(verdicts))
    append_step_summary(summary(verdicts, artifacts))
    return judge.exit_code(verdicts, inconclusive)  # type: ignore[arg-type]


gate = click.Command(
    "gate", callback=_gate,
    params=[
        click.Argument(["runs"], nargs=-1, metavar="[RUN]..."),
        option("--rules", required=True, metavar="GATE.toml", help="what to measure, and the limits"),
        option("--junit", metavar="OUT.xml", help="verdicts as JUnit XML"),
        option(
            "--inconclusive", type=click.Choice(["error", "fail", "pass"]), default="error", show_default=True,
            help="exit code of a verdict that cannot be given: 2, 1 or 0",
        ),
        *model_options(),
        option("--out", metavar="DIR", help="folder for the artifacts  [default: the run's own]"),
    ],
    help="Judge a model by rules. Measures what the rules name, or judges the artifacts of measured runs.\n\n"
    "Exit codes: 0 every rule passes; 1 a rule fails; 2 a rule cannot be judged.\n\n\b\nExamples:\n"
    "  geomssl gate --checkpoint run.pt --rules gate.toml --junit verdicts.xml\n"
    "  geomssl gate run.pt other.pt --rules gate.toml",
)
