"""geomssl train."""

from __future__ import annotations

from typing import Any

import click

from geomssl.commands.model import named, option
from geomssl.commands.scheduled import Scheduled
from geomssl.config import assignments
from geomssl.errors import GeomsslError
from geomssl.options import flags, given
from geomssl.progress import shown
from geomssl.registry import names

# keys that a sweep file has and no recipe
SWEEP = {"cell", "grid", "seeds", "recipe", "metrics", "compare"}
OWN = ("seed", "epochs", "batch_size", "precision", "channels_last", "compile", "micro_batch")


def _train_options() -> list[click.Option]:
    from geomssl.recipe import Recipe

    skip = tuple(field for field in Recipe.model_fields if field not in OWN)
    return [
        *flags(Recipe, skip),
        option("--objective", metavar="NAME", help=", ".join(names("objective")) + "  [default: simclr]"),
        option("--encoder", metavar="NAME", help=", ".join(names("encoder")) + "  [default: cnn]"),
        option("--dataset", metavar="NAME", help="NAME or NAME:PATH, see geomssl datasets  [default: digits]"),
        option("--optimizer", metavar="NAME", help=", ".join(names("optimizer")) + "  [default: sgd]"),
        option("--set", "assigned", multiple=True, metavar="KEY=VALUE", help="any key of the recipe, such as optim.lr=0.1"),
        option("--out", metavar="RUN.pt", help="the checkpoint; it owns the folder RUN/  [default: run.pt]"),
        option("--resume", metavar="RUN.pt", help="continue that run to its last epoch"),
        option("--overwrite", is_flag=True, help="replace an existing --out"),
        option("--stop-after", type=click.IntRange(min=1), help="stop after this many epochs, to resume later"),
        option("--device", default="auto", show_default=True, help="auto, cpu, cuda[:N] or mps"),
        option("--quiet", is_flag=True, help="no progress"),
    ]


def _recipe(file: str) -> dict[str, Any]:
    """The recipe of that file or name; one line that says what to do where it is a sweep."""
    from geomssl.recipe import read

    found = read(file)
    if SWEEP & found.keys():
        raise GeomsslError(f"{file} is a sweep: cells and seeds", f"a recipe, or geomssl sweep {file}", reason="a-sweep")
    return found


def _train(recipe_file: str | None, **values: Any) -> None:
    from geomssl import checkpoint, data, distributed, training
    from geomssl.recipe import Recipe, build

    with distributed.session(values["device"]) as where:
        flagged = given(Recipe, {key: values[key] for key in OWN}) | named(values)
        if values["dataset"]:
            flagged["dataset"] = data.section(values["dataset"])
        layers = [flagged, assignments(values["assigned"])]
        if recipe_file is not None:
            layers.insert(0, _recipe(recipe_file))
        if values["resume"]:
            if values["out"] or values["overwrite"]:
                expected = "--resume RUN.pt alone: it writes to RUN.pt"
                raise GeomsslError("--resume with --out or --overwrite", expected, reason="bad-usage")
            trainer = training.resume(values["resume"], where, layers)
        else:
            recipe = build(layers, recipe_file or "command line")
            trainer = training.start(recipe, values["out"] or "run.pt", where, values["overwrite"])
        speaks = distributed.rank() == 0
        for note in trainer.notes if speaks else ():
            click.echo(f"geomssl: note: {note}", err=True)
        scheduled = Scheduled()
        with shown(speaks and not values["quiet"]):
            if values["resume"]:
                scheduled.catch_up(trainer)
            history = trainer.run(values["stop_after"], scheduled)
    if not speaks:
        return
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
    "  geomssl train --resume run.pt\n"
    "  torchrun --nproc-per-node 2 -m geomssl train digits-simclr --out run.pt",
)
