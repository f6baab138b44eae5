"""What each command does: settings from flags, then one call into the core, the probes or the reports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from geomssl import artifact, files
from geomssl.artifact import Artifact
from geomssl.config import assignments, merge, parse
from geomssl.errors import GeomsslError
from geomssl.options import flags, given
from geomssl.progress import shown
from geomssl.registry import names, resolve

SKIPPED = {"no-projector", "no-labels", "no-split"}


def _option(*words: str, **how: Any) -> click.Option:
    return click.Option(list(words), **how)


def _model_options() -> list[click.Option]:
    """What every command that measures a model can be told of the model and of the machine."""
    return [
        _option("--checkpoint", metavar="RUN.pt", help="a checkpoint of geomssl train"),
        _option("--model", metavar="PACKAGE.MODULE:FACTORY", help="your own: a module, or (encoder, projector)"),
        _option("--weights", metavar="F.safetensors", help="weights for --model"),
        _option("--projector", metavar="LAYER", help="the layer of --model that is its projector; h is what enters it"),
        _option("--dataset", metavar="NAME", help="digits, folder:PATH, ...  [default: the run's own, else digits]"),
        _option("--set", "assigned", multiple=True, metavar="KEY=VALUE", help="a key of the data set, such as dataset.size=32"),
        _option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True, help="measured"),
        _option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps"),
        _option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True, help="numbers"),
        _option("--batch-size", type=click.IntRange(min=2), default=256, show_default=True, help="images a pass"),
        _option("--memory", type=float, default=2.0, show_default=True, help="GB of features kept in memory, then on disk"),
        _option("--objective", metavar="NAME", help="repeat a run's objective where it is your own code"),
        _option("--encoder", metavar="NAME", help="repeat a run's encoder where it is your own code"),
        _option("--quiet", is_flag=True, help="no progress"),
    ]


def _subject(values: dict[str, Any]) -> tuple[Any, Path]:
    """The subject that the flags name, and the folder that its artifacts go to."""
    from geomssl import checkpoint, data, device

    files.check(Path(values["out"] or ".") / "artifact")
    how: dict[str, Any] = {
        "device": device.device(values["device"]),
        "dtype": device.dtype(values["dtype"]),
        "batch_size": values["batch_size"],
        "memory": int(values["memory"] * 2**30),
    }
    if bool(values["checkpoint"]) == bool(values["model"]):
        raise GeomsslError(
            "both --checkpoint and --model" if values["model"] else "no model", "one of --checkpoint RUN.pt and --model "
            "package.module:factory", reason="bad-usage",
        )
    from geomssl.probes import load

    assigned = assignments(values["assigned"])
    if assigned.keys() - {"dataset"}:
        given_key = next(iter(assigned.keys() - {"dataset"}))
        raise GeomsslError(f"--set {given_key}", "keys of the data set, such as dataset.size=32", reason="unknown-key")
    section = merge(data.section(values["dataset"]) if values["dataset"] else {}, assigned.get("dataset", {}))
    if values["checkpoint"]:
        repeated = [_named(values)]
        subject = load.from_checkpoint(values["checkpoint"], section, values["split"], repeated, **how)
        folder = checkpoint.folder(checkpoint.located(values["checkpoint"]))
    else:
        section = merge(data.section("digits"), section)
        subject = load.from_factory(
            values["model"], section, values["split"], values["weights"], values["projector"], **how
        )
        folder = Path("geomssl-artifacts")
    subject.provenance["command"] = " ".join(["geomssl", *sys.argv[1:]])
    return subject, Path(values["out"] or folder)


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names given by flags as sections of a recipe."""
    sections = {"objective": "objective", "encoder": "encoder", "optimizer": "optim"}
    return {section: {"name": values[flag]} for flag, section in sections.items() if values.get(flag)}


def measure(name: str, subject: Any, options: Mapping[str, Any], folder: Path | str) -> tuple[Artifact, Path]:
    """Run one probe by its name and save what it found."""
    module = resolve("probe", name)
    found = module.probe(subject, parse(module.Options, options, f"options of {name}"))
    return found, found.save(folder)


def probe_command(name: str) -> click.Command:
    """`geomssl NAME`, its flags made from the probe's own options."""
    module = resolve("probe", name)

    def run(**values: Any) -> None:
        with shown(not values["quiet"]):
            subject, folder = _subject(values)
            found, where = measure(name, subject, given(module.Options, values), folder)
        click.echo(json.dumps(found.to_json(), indent=1) if values["json"] else describe(found, where))

    output = [
        _option("--out", metavar="DIR", help="folder for the artifact  [default: the run's own]"),
        _option("--json", "json", is_flag=True, help="print the artifact as JSON"),
    ]
    about = (module.__doc__ or "").strip()
    example = f"\b\nExample:\n  geomssl {name} --checkpoint run.pt --split test"
    return click.Command(
        name, params=[*flags(module.Options), *_model_options(), *output], callback=run, help=f"{about}\n\n{example}",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    )


def describe(found: Artifact, where: Path | str) -> str:
    """An artifact in words: headline, metrics with interval and n, notes, and its folder."""
    lines = [f"{found.probe} of {found.run}: {found.headline}"]
    for metric in found.metrics:
        value = "not given" if metric.value is None else f"{metric.value:.4g}{f' {metric.unit}' if metric.unit else ''}"
        if metric.interval is not None:
            value += f"  [{metric.interval.low:.4g}, {metric.interval.high:.4g}]"
        n = "" if metric.n is None else f"  n = {metric.n}"
        why = f"  ({metric.reason})" if metric.interval is None and metric.value is None else ""
        lines.append(f"  {metric.name:<32} {value}{n}{why}")
    lines += [f"  note: {note}" for note in found.notes]
    return "\n".join([*lines, f"  artifact: {where}"])


def measure_all(
    subject: Any, folder: Path | str, options: Mapping[str, Mapping[str, Any]] | None = None
) -> Iterator[tuple[Artifact, Path]]:
    """Every installed probe on one subject, one after the other. What cannot apply (no projector, no labels) is told on
    stderr and left out.
    """
    for name in names("probe"):
        try:
            found = measure(name, subject, (options or {}).get(name, {}), folder)
        except GeomsslError as error:
            if error.reason not in SKIPPED:
                raise
            click.echo(f"{name}: left out: {error} [{error.reason}]", err=True)
            continue
        yield found


def _probe_all(**values: Any) -> None:
    if values["which"] != "all":
        raise GeomsslError(f"geomssl probe {values['which']}", "all, or a probe's own command", reason="unknown-name")
    with shown(not values["quiet"]):
        subject, folder = _subject(values)
        common = {key: values[key] for key in ("n", "seed") if values[key] is not None}
        for found, where in measure_all(subject, folder, dict.fromkeys(names("probe"), common)):
            click.echo(describe(found, where))


probe = click.Command(
    "probe", callback=_probe_all,
    params=[
        click.Argument(["which"], metavar="all"),
        _option("--n", type=click.IntRange(min=2), help="images to use  [default: all of the split]"),
        _option("--seed", type=int, help="seed of every draw  [default: 0]"),
        *_model_options(),
        _option("--out", metavar="DIR", help="folder for the artifacts  [default: the run's own]"),
    ],
    help="Run every probe on one model, its features computed once.\n\n\b\nExample:\n  geomssl probe all --checkpoint run.pt",
)


def _train_options() -> list[click.Option]:
    from geomssl.recipe import Recipe

    own = ("seed", "epochs", "batch_size")
    skip = tuple(field for field in Recipe.model_fields if field not in own)
    return [
        *flags(Recipe, skip),
        _option("--objective", metavar="NAME", help=", ".join(names("objective")) + "  [default: simclr]"),
        _option("--encoder", metavar="NAME", help=", ".join(names("encoder")) + "  [default: cnn]"),
        _option("--dataset", metavar="NAME", help="digits, folder:PATH  [default: digits]"),
        _option("--optimizer", metavar="NAME", help=", ".join(names("optimizer")) + "  [default: sgd]"),
        _option("--set", "assigned", multiple=True, metavar="KEY=VALUE", help="any key of the recipe, such as optim.lr=0.1"),
        _option("--out", metavar="RUN.pt", help="the checkpoint; it owns the folder RUN/  [default: run.pt]"),
        _option("--resume", metavar="RUN.pt", help="continue that run to its last epoch"),
        _option("--overwrite", is_flag=True, help="replace an existing --out"),
        _option("--stop-after", type=click.IntRange(min=1), help="stop after this many epochs, to resume later"),
        _option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps"),
        _option("--quiet", is_flag=True, help="no progress"),
    ]


def _train(recipe_file: str | None, **values: Any) -> None:
    from geomssl import checkpoint, data, device, training
    from geomssl.recipe import Recipe, build, read

    flagged = given(Recipe, {key: values[key] for key in ("seed", "epochs", "batch_size")}) | _named(values)
    if values["dataset"]:
        flagged["dataset"] = data.section(values["dataset"])
    layers = [flagged, assignments(values["assigned"])]
    if recipe_file is not None:
        layers.insert(0, read(recipe_file))
    where = device.device(values["device"])
    if values["resume"]:
        if values["out"] or values["overwrite"]:
            expected = "--resume RUN.pt alone: it writes to RUN.pt"
            raise GeomsslError("--resume with --out or --overwrite", expected, reason="bad-usage")
        trainer = training.resume(values["resume"], where, layers)
    else:
        recipe = build(layers, recipe_file or "command line")
        trainer = training.start(recipe, values["out"] or "run.pt", where, values["overwrite"])
    with shown(not values["quiet"]):
        history = trainer.run(values["stop_after"])
    last = history[-1] if history else {}
    figures = "  ".join(f"{k} {v:.4g}" for k, v in last.items() if isinstance(v, float) and k not in ("lr", "seconds"))
    click.echo(f"epoch {last.get('epoch', 0)} of {trainer.recipe.epochs}  {figures}")
    click.echo(f"checkpoint: {trainer.out}\nmetrics: {checkpoint.folder(trainer.out) / 'metrics.jsonl'}")


train = click.Command(
    "train", callback=_train, params=[click.Argument(["recipe_file"], required=False, metavar="[RECIPE]"), *_train_options()],
    help="Train an encoder by a recipe: a TOML file, an installed recipe's name, or flags alone.\n\n"
    "Precedence: defaults < recipe < flags < --set. Ctrl-C keeps the last whole checkpoint.\n\n\b\nExamples:\n"
    "  geomssl train digits-simclr --out run.pt\n"
    "  geomssl train --objective hssl --encoder c4-cnn --dataset digits --set optim.lr=0.1 --out hssl.pt\n"
    "  geomssl train --resume run.pt",
)


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
            subject, folder = _subject(values)
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
        _option("--rules", required=True, metavar="GATE.toml", help="what to measure, and the limits"),
        _option("--junit", metavar="OUT.xml", help="verdicts as JUnit XML"),
        _option(
            "--inconclusive", type=click.Choice(["error", "fail", "pass"]), default="error", show_default=True,
            help="exit code of a verdict that cannot be given: 2, 1 or 0",
        ),
        *_model_options(),
        _option("--out", metavar="DIR", help="folder for the artifacts  [default: the run's own]"),
    ],
    help="Judge a model by rules. Measures what the rules name, or judges the artifacts of measured runs.\n\n"
    "Exit codes: 0 every rule passes; 1 a rule fails; 2 a rule cannot be judged.\n\n\b\nExamples:\n"
    "  geomssl gate --checkpoint run.pt --rules gate.toml --junit verdicts.xml\n"
    "  geomssl gate run.pt other.pt --rules gate.toml",
)


@click.command()
def datasets() -> None:
    """List the data sets.

    \b
    Example:
      geomssl datasets
    """
    for name, line in names("dataset").items():
        click.echo(f"{name:<16} {line}")


@click.command()
def recipes() -> None:
    """List the installed recipes.

    \b
    Example:
      geomssl recipes
    """
    from importlib.resources import files as resources

    for path in sorted(resources("geomssl.recipes").iterdir(), key=lambda p: p.name):
        if path.name.endswith(".toml"):
            first = path.read_text().splitlines()[0].lstrip("# ")
            click.echo(f"{path.name.removesuffix('.toml'):<20} {first}")
