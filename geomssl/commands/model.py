"""What every command that measures a model can be told of it, and the subject that those flags name."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from geomssl import files
from geomssl.config import assignments, merge
from geomssl.errors import GeomsslError


def option(*words: str, **how: Any) -> click.Option:
    return click.Option(list(words), **how)


def model_options() -> list[click.Option]:
    """What every command that measures a model can be told of the model and of the machine."""
    return [
        option("--checkpoint", metavar="RUN.pt", help="a checkpoint of geomssl train"),
        option("--model", metavar="PACKAGE.MODULE:FACTORY", help="your own: a module, or (encoder, projector)"),
        option("--weights", metavar="F.safetensors", help="weights for --model"),
        option("--projector", metavar="LAYER", help="the layer of --model that is its projector; h is what enters it"),
        option("--dataset", metavar="NAME", help="NAME or NAME:PATH, see geomssl datasets  [default: the run's own, else digits]"),
        option("--set", "assigned", multiple=True, metavar="KEY=VALUE", help="a key of the data set, such as dataset.size=32"),
        option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True, help="measured"),
        option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps"),
        option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True, help="numbers"),
        option("--batch-size", type=click.IntRange(min=2), default=256, show_default=True, help="images a pass"),
        option("--memory", type=float, default=2.0, show_default=True, help="GB of features kept in memory, then on disk"),
        option("--objective", metavar="NAME", help="repeat a run's objective where it is your own code"),
        option("--encoder", metavar="NAME", help="repeat a run's encoder where it is your own code"),
        option("--quiet", is_flag=True, help="no progress"),
    ]


def subject_of(values: dict[str, Any]) -> tuple[Any, Path]:
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
        repeated = [named(values)]
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


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names given by flags as sections of a recipe."""
    sections = {"objective": "objective", "encoder": "encoder", "optimizer": "optim"}
    return {section: {"name": values[flag]} for flag, section in sections.items() if values.get(flag)}
