"""The probes as commands: one each, and all of them on one subject."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from geomssl.artifact import Artifact
from geomssl.commands.model import model_options, option, subject_of
from geomssl.config import parse
from geomssl.errors import GeomsslError
from geomssl.options import flags, given
from geomssl.progress import shown
from geomssl.registry import names, resolve

SKIPPED = {
    "no-projector", "no-labels", "no-split", "no-forward-mode", "no-group", "no-exact-form", "too-wide", "too-few-images",
    "no-target", "no-masks", "no-decoder", "unseen-class", "degenerate",
}


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
            subject, folder = subject_of(values)
            found, where = measure(name, subject, given(module.Options, values), folder)
        click.echo(json.dumps(found.to_json(), indent=1) if values["json"] else describe(found, where))

    output = [
        option("--out", metavar="DIR", help="folder for the artifact  [default: the run's own]"),
        option("--json", "json", is_flag=True, help="print the artifact as JSON"),
    ]
    about = (module.__doc__ or "").strip()
    example = f"\b\nExample:\n  geomssl {name} --checkpoint run.pt --split test"
    return click.Command(
        name, params=[*flags(module.Options), *model_options(), *output], callback=run, help=f"{about}\n\n{example}",
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
        subject, folder = subject_of(values)
        common = {key: values[key] for key in ("n", "seed") if values[key] is not None}
        for found, where in measure_all(subject, folder, dict.fromkeys(names("probe"), common)):
            click.echo(describe(found, where))


probe = click.Command(
    "probe", callback=_probe_all,
    params=[
        click.Argument(["which"], metavar="all"),
        option("--n", type=click.IntRange(min=2), help="images to use  [default: all of the split]"),
        option("--seed", type=int, help="seed of every draw  [default: 0]"),
        *model_options(),
        option("--out", metavar="DIR", help="folder for the artifacts  [default: the run's own]"),
    ],
    help="Run every probe on one model, its features computed once.\n\n\b\nExample:\n  geomssl probe all --checkpoint run.pt",
)
