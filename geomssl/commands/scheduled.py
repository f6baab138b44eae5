"""Scheduled probes: what `[probes]` asks for, measured while a training runs and without an effect on it."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from geomssl import artifact, checkpoint
from geomssl.config import canonical, parse
from geomssl.errors import GeomsslError
from geomssl.registry import resolve

if TYPE_CHECKING:
    from geomssl.recipe import Recipe
    from geomssl.training import Trainer

# what no probe can help: a disk that is full stays full
FATAL = {"unwritable"}


class Scheduled:
    """Hangs on `Trainer.run(after_epoch=...)`: measures when the recipe's schedule is due, else costs nothing.

    Artifacts go to `run/<probe>/<hash>@<step>/`. Measured is the validation split (the training split where there is none),
    on modules made anew from the weights, so that the training's own are never touched; the probes of one moment share
    their features. A probe that cannot apply says why once, and the training goes on.
    """

    def __init__(self) -> None:
        self._told: set[tuple[str, str]] = set()

    def __call__(self, trainer: Trainer) -> None:
        if trainer.epoch == 0:
            # an earlier training of this name is not a part of this one's course
            artifact.forget_steps(checkpoint.folder(trainer.out))
        if trainer.recipe.probes.due(trainer.epoch, trainer.recipe.epochs):
            self._measure(trainer, list(trainer.recipe.probes.run))

    def catch_up(self, trainer: Trainer) -> None:
        """After a resume: measure what was due at the checkpoint's epoch and not finished when the run ended."""
        from geomssl import distributed
        from geomssl.seeding import seeded

        # the first epoch is measured as the training starts
        if trainer.epoch == 0 or distributed.rank() > 0:
            return
        if trainer.recipe.probes.due(trainer.epoch, trainer.recipe.epochs):
            missing = [name for name in trainer.recipe.probes.run if not self._done(trainer, name)]
            with seeded(trainer.recipe.seed, "catch-up", trainer.epoch):
                self._measure(trainer, missing)

    def _done(self, trainer: Trainer, name: str) -> bool:
        return (place(trainer.recipe, trainer.out, name, trainer.step) / "artifact.json").is_file()

    def _measure(self, trainer: Trainer, names: list[str]) -> None:
        import torch

        if not names:
            return
        subject = _subject(trainer)
        for name in names:
            try:
                with torch.enable_grad():
                    found = resolve("probe", name).probe(subject, _options(trainer.recipe, name))
                # the report draws the figures: drawing them here would take half as long as the passes themselves
                dataclasses.replace(found, step=trainer.step).save(checkpoint.folder(trainer.out), drawn=False)
            except GeomsslError as error:
                if error.reason in FATAL:
                    raise
                if (name, error.reason) not in self._told:
                    self._told.add((name, error.reason))
                    where = f"after epoch {trainer.epoch}"
                    click.echo(f"{name} {where}: left out, the training goes on: {error} [{error.reason}]", err=True)


def place(recipe: Recipe, out: Path | str, name: str, step: int) -> Path:
    """Where the artifact of that scheduled probe lies, of the run `out`, after that step."""
    return artifact.place(checkpoint.folder(Path(out)), name, _options(recipe, name).model_dump(mode="json"), step)


def _options(recipe: Recipe, name: str) -> Any:
    return parse(resolve("probe", name).Options, recipe.probes.options.get(name, {}), f"probes.{name}")


def _subject(trainer: Trainer) -> Any:
    """The trainer's weights of this moment, as a subject on the validation split."""
    from geomssl.probes import load

    path = Path(trainer.out)
    return load.of_run(
        trainer.recipe, trainer.learner.state_dict(), trained_on=trainer.whole,
        source=trainer.val if len(trainer.val) else trainer.whole, train=trainer.whole,
        provenance={
            "run": path.stem, "checkpoint": path.name, "epoch": trainer.epoch,
            "recipe_sha256": hashlib.sha256(canonical(trainer.recipe.plain()).encode()).hexdigest()[:12],
            "command": " ".join(["geomssl", *sys.argv[1:]]),
        },
        device=trainer.device,
    )
