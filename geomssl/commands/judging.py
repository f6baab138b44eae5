"""geomssl report and geomssl gate."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from geomssl import artifact, files
from geomssl.artifact import Artifact
from geomssl.commands.model import model_options, option, subject_of
from geomssl.config import parse
from geomssl.errors import GeomsslError
from geomssl.progress import shown
from geomssl.registry import resolve

if TYPE_CHECKING:
    from geomssl.reports.rules import Rule
    from geomssl.reports.verdict import Verdict

# More images cannot change these.
SETTLED = ("degenerate", "inexact-pair", "no-elements", "no-artifact")

Measure = Callable[[Mapping[str, Any]], Artifact]


def collect(runs: Sequence[str]) -> list[Artifact]:
    """The artifacts of every named run: run.pt, its folder, one artifact folder or its artifact.json."""
    found: list[Artifact] = []
    for run in runs:
        folders = artifact.find(Path(run).parent if Path(run).name == "artifact.json" else run)
        if not folders:
            said = "no such run" if not Path(run).exists() else "no artifact in"
            raise GeomsslError(f"{said} {run}", "a measured run.pt, its folder, or an artifact folder", reason="no-artifact")
        found += [artifact.load(folder) for folder in folders]
    return found


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("-o", "--out", default="report.html", show_default=True, metavar="FILE", help="the HTML file")
@click.option("--rules", metavar="GATE.toml", help="show verdicts by these rules first")
@click.option("--baseline", multiple=True, metavar="ARTIFACT", help="what rules with max_increase or max_ratio compare with")
@click.option("--title", default=None, help="heading of the report")
def report(runs: tuple[str, ...], out: str, rules: str | None, baseline: tuple[str, ...], title: str | None) -> None:
    """One HTML file from the artifacts of one run or more: it opens offline and compares the runs.

    \b
    Example:
      geomssl report simclr.pt hssl.pt ciper.pt -o report.html
    """
    from geomssl.reports import gate as judge
    from geomssl.reports.html import render

    artifacts = collect(runs)
    verdicts = judge.evaluate(artifacts, judge.read_rules(rules), collect(baseline)) if rules else []
    files.write(out, render(artifacts, verdicts, **({"title": title} if title else {})))
    click.echo(f"report: {out}")


def sequential(
    rule: Rule, measure: Measure, budget: int, baselines: Sequence[Artifact] = ()
) -> tuple[Artifact, list[Verdict]]:
    """Measure at planned looks within a budget of images until a look decides: the last artifact and its verdicts.

    measure: from options of the rule's probe to its artifact. A probe whose level cannot be set gets one look at all of the
    budget, and so does a rule that only compares: its baseline has one number of images.
    """
    from geomssl.probes import looks
    from geomssl.reports.gate import Rules, evaluate

    rules = Rules(rule=(rule,))
    if not rule.per_element:
        found = measure({**rule.options, "n": budget})
        return found, evaluate([found], rules, baselines)
    asked = {key: _asked(rule, key) for key in ("level", "resamples")}
    shares = (1.0,) if rule.compares and rule.limit is None else looks.FRACTIONS
    for look in looks.plan(budget, float(asked["level"]), shares):
        how = {"n": look.images, "level": look.level, "resamples": look.resamples(int(asked["resamples"]))}
        found = looks.marked(measure({**rule.options, **how}), look, **asked)
        verdicts = evaluate([found], rules, baselines)
        if verdicts[0].verdict != "inconclusive" or verdicts[0].reason in SETTLED:
            break
    return found, verdicts


def _asked(rule: Rule, key: str) -> Any:
    """An option of the rule's probe, as the rule has it or by default."""
    return rule.options.get(key, resolve("probe", rule.probe).Options.model_fields[key].default)


def _with_power(rule: Rule, subject: Any, found: Artifact, budget: int | None) -> Artifact:
    """The artifact with the table `power`, where the rule has a limit and the features can be judged at all."""
    from geomssl.probes import looks, power
    from geomssl.reports.baseline import sample

    n, level = budget or sample(found), float(_asked(rule, "level"))
    if not rule.per_element or rule.limit is None or n is None:
        return found
    planned = looks.plan(n, level) if budget else (looks.Look(1, 1, n, n, level),)
    options = parse(resolve("probe", rule.probe).Options, {**rule.options, "n": n}, f"options of {rule.probe}")
    try:
        table = power.measure(subject, options, rule.limit, planned, level)
    except GeomsslError as error:
        if error.reason != "degenerate":
            raise
        return found
    return dataclasses.replace(found, tables=[*found.tables, table])


def _measured(
    rules: Sequence[Rule], values: Mapping[str, Any], baselines: Sequence[Artifact]
) -> tuple[list[Artifact], list[Verdict]]:
    """Measure the model that the flags name, rule by rule, save the artifact of each, and judge it by its own rule."""
    from geomssl.reports.gate import Rules, evaluate

    budget = values["budget"]
    for rule in rules if budget is not None else ():
        if "n" in rule.options:
            given = f"rule {rule.name!r} fixes n = {rule.options['n']} beside --budget {budget}"
            raise GeomsslError(given, "one of them", reason="bad-usage")
    artifacts: list[Artifact] = []
    verdicts: list[Verdict] = []
    with shown(not values["quiet"]):
        subject, folder = subject_of(dict(values))
        for rule in rules:
            if rule.run not in (None, subject.provenance["run"]):
                continue
            module = resolve("probe", rule.probe)

            def measure(options: Mapping[str, Any], module: Any = module, rule: Rule = rule) -> Artifact:
                return module.probe(subject, parse(module.Options, options, f"options of {rule.probe}"))

            against = baselines if rule.compares else ()
            within = None
            if budget is None:
                found = measure(rule.options)
                said = evaluate([found], Rules(rule=(rule,)), against)
            else:
                rendered = rule.options.get("images", "data") != "data"
                within = budget if rendered else min(budget, len(subject.source))
                found, said = sequential(rule, measure, within, against)
            if values["power"]:
                found = _with_power(rule, subject, found, within)
                said = evaluate([found], Rules(rule=(rule,)), against)
            found.save(folder)
            artifacts.append(found)
            verdicts += said
    if not artifacts:
        names = ", ".join(sorted({str(rule.run) for rule in rules}))
        raise GeomsslError(f"rules for {names} only", f"a rule for run {subject.provenance['run']}", reason="no-artifact")
    return artifacts, verdicts


def _gate(runs: tuple[str, ...], rules: str, **values: Any) -> int:
    from geomssl.reports import gate as judge
    from geomssl.reports.junit import junit
    from geomssl.reports.markdown import append_step_summary, summary, workflow_commands

    read = judge.read_rules(rules)
    baselines = collect(values["baseline"])
    judge.check(read, baselines)
    if values["checkpoint"] or values["model"] or not runs:
        if runs:
            given_both = "runs beside --checkpoint or --model"
            raise GeomsslError(given_both, "measured runs, or a model to measure", reason="bad-usage")
        artifacts, verdicts = _measured(read.rule, values, baselines)
    else:
        for key in ("budget", "power"):
            if values[key]:
                raise GeomsslError(f"--{key} with measured runs", "--checkpoint or --model, to measure", reason="bad-usage")
        artifacts = collect(runs)
        verdicts = judge.evaluate(artifacts, read, baselines)
    record = json.dumps(judge.records(verdicts, values["inconclusive"]), indent=1, allow_nan=False)
    for verdict in () if values["json"] else verdicts:
        click.echo(judge.describe(verdict))
    if values["json"]:
        click.echo(record)
    if values["out_json"]:
        files.write(values["out_json"], record + "\n")
    if values["junit"]:
        files.write(values["junit"], junit(verdicts))
    append_step_summary(summary(verdicts, artifacts))
    if os.environ.get("GITHUB_ACTIONS") == "true":
        for line in workflow_commands(verdicts):
            click.echo(line, err=values["json"])
    return judge.exit_code(verdicts, values["inconclusive"])


gate = click.Command(
    "gate", callback=_gate,
    params=[
        click.Argument(["runs"], nargs=-1, metavar="[RUN]..."),
        option("--rules", required=True, metavar="GATE.toml", help="what to measure, and the limits"),
        option(
            "--budget", type=click.IntRange(min=2), metavar="N",
            help="measure at planned looks within N images, and stop at the first that decides",
        ),
        option("--power", is_flag=True, help="put defects of L/2, L and 2L into the model, and count the verdicts on them"),
        option(
            "--baseline", multiple=True, metavar="ARTIFACT",
            help="artifact.json, its folder or a run: what rules with max_increase or max_ratio compare with",
        ),
        option("--junit", metavar="OUT.xml", help="verdicts as JUnit XML"),
        option("--json", is_flag=True, help="print verdicts as JSON"),
        option("--out-json", metavar="OUT.json", help="write verdicts as JSON"),
        option(
            "--inconclusive", type=click.Choice(["error", "fail", "pass"]), default="error", show_default=True,
            help="exit code of a verdict that cannot be given: 2, 1 or 0",
        ),
        *model_options(),
        option("--out", metavar="DIR", help="folder for the artifacts  [default: the run's own]"),
    ],
    help="Judge a model by rules. Measures what the rules name, or judges the artifacts of measured runs.\n\n"
    "Exit codes: 0 every rule passes; 1 a rule fails; 2 a rule cannot be judged.\n\n\b\nExamples:\n"
    "  geomssl gate --checkpoint run.pt --rules gate.toml --budget 512 --junit verdicts.xml\n"
    "  geomssl gate run.pt other.pt --rules gate.toml\n"
    "  geomssl gate --model my_model:make --rules gate.toml --baseline main/equivariance/1a2b3c4d5e/artifact.json",
)
