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
from geomssl.registry import library_of


def option(*words: str, **how: Any) -> click.Option:
    return click.Option(list(words), **how)


def model_options() -> list[click.Option]:
    """What every command that measures a model can be told of the model and of the machine."""
    return [
        option("--checkpoint", metavar="RUN.pt", help="a checkpoint of geomssl train"),
        option("--model", metavar="MODULE:FACTORY", help="your own module, or (encoder, projector), from package.module or "
               "FILE.py; or timm:NAME, torchvision:NAME (extra zoo)"),
        option("--encoder", metavar="NAME", help="without --checkpoint: a built-in encoder, for --weights of others, else "
               "random; with it: repeat a run's encoder where it is your own code"),
        option("--weights", metavar="F", help="for --model or --encoder: .safetensors, or a .pt, .pth or .ckpt of tensors"),
        option("--prefix", default="auto", show_default=True, metavar="auto|none|TEXT", help="what stands before the encoder's "
               "names in --weights, such as backbone"),
        option("--projector", metavar="LAYER", help="the layer of --model that is its projector; h is what enters it"),
        option("--dataset", metavar="NAME", help="NAME or NAME:PATH, see geomssl datasets  [default: the run's own, else "
               "digits; of --model with rendered --images: these, 32x32, with the model's channels]"),
        option("--set", "assigned", multiple=True, metavar="KEY=VALUE", help="a key of the data set, such as dataset.size=32, "
               "or of --encoder, such as encoder.stem=imagenet"),
        option("--split", type=click.Choice(["train", "val", "test"]), default="test", show_default=True, help="measured"),
        option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps"),
        option("--dtype", type=click.Choice(["float32", "float64"]), default="float32", show_default=True, help="numbers"),
        option("--batch-size", type=click.IntRange(min=2), default=256, show_default=True, help="images a pass"),
        option("--memory", type=float, default=2.0, show_default=True, help="GB of features kept in memory, then on disk"),
        option("--objective", metavar="NAME", help="repeat a run's objective where it is your own code"),
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
    _one_model(values)
    from geomssl.probes import load

    encoder = None if values["checkpoint"] else values["encoder"] or _library_model(values["model"])
    assigned = assignments(values["assigned"])
    strange = next((key for key in assigned if key != "dataset" and not (key == "encoder" and encoder)), None)
    if strange is not None:
        expected = "keys of the data set, such as dataset.size=32" + (", or of the encoder" if encoder else "")
        raise GeomsslError(f"--set {strange}", expected, reason="unknown-key")
    section = merge(data.section(values["dataset"]) if values["dataset"] else {}, assigned.get("dataset", {}))
    if values["checkpoint"]:
        repeated = [named(values)]
        subject = load.from_checkpoint(values["checkpoint"], section, values["split"], repeated, **how)
        folder = checkpoint.folder(checkpoint.located(values["checkpoint"]))
    else:
        # rendered pictures of a model of one's own need no data set: theirs are 32x32, with the model's channels
        alone = values["model"] and not encoder and values.get("images") in load.RENDERED
        section = merge(data.section(values["images"] if alone else "digits"), section)
        folder = Path("geomssl-artifacts")
        how |= {"weights": values["weights"], "prefix": values["prefix"]}
        if encoder:
            subject = load.from_encoder(encoder, assigned.get("encoder", {}), section, values["split"], **how)
        else:
            subject = load.from_factory(values["model"], section, values["split"], projector=values["projector"], **how)
        if values["weights"] and not values["quiet"]:
            click.echo(f"{values['weights']}: {subject.provenance['weights_loaded']}", err=True)
    subject.provenance["command"] = " ".join(["geomssl", *sys.argv[1:]])
    return subject, Path(values["out"] or folder)


def _one_model(values: Mapping[str, Any]) -> None:
    """Raise unless the flags name one model, and only flags that go with it."""
    ways = "one of --checkpoint RUN.pt, --model package.module:factory and --encoder NAME --weights F"
    if values["checkpoint"] and values["model"]:
        raise GeomsslError("both --checkpoint and --model", ways, reason="bad-usage")
    if not (values["checkpoint"] or values["model"] or values["encoder"]):
        raise GeomsslError("no model", ways, reason="bad-usage")
    if values["model"] and values["encoder"]:
        raise GeomsslError("both --model and --encoder", ways, reason="bad-usage")
    for flag in ("weights", "projector"):
        if values[flag] and values["checkpoint"]:
            raise GeomsslError(f"--{flag} with --checkpoint", f"--{flag} with --model", reason="bad-usage")
    if values["projector"] and (values["encoder"] or _library_model(values["model"])):
        raise GeomsslError(
            f"--projector with {values['encoder'] or values['model']}, an encoder without one",
            "--projector with a --model of your own", reason="bad-usage",
        )
    if values["prefix"] != "auto" and not values["weights"]:
        raise GeomsslError(f"--prefix {values['prefix']} without --weights", "--weights F", reason="bad-usage")


def _library_model(name: str | None) -> str | None:
    """The name where it is a library's, such as timm:resnet18: such a --model is an encoder."""
    return name if name and library_of("encoder", name) else None


def named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Names given by flags as sections of a recipe."""
    sections = {"objective": "objective", "encoder": "encoder", "optimizer": "optim"}
    return {section: {"name": values[flag]} for flag, section in sections.items() if values.get(flag)}
