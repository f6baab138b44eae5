"""The training loop: views made on the device, one backward a step, a whole checkpoint after every epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl import checkpoint, data, files
from geomssl.data.base import Source, to_unit
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.objectives.base import Batch, Losses, Objective, View
from geomssl.optim import learning_rate
from geomssl.progress import track
from geomssl.recipe import Recipe, build, flat, refuse_strangers
from geomssl.registry import resolve
from geomssl.seeding import generator, seeded

FINITE_EVERY = 50


class Learner(nn.Module):
    """The one module that trains: encoder, objective with its heads, and a linear classifier that is detached from both."""

    def __init__(self, encoder: Encoder, objective: Objective, classifier: nn.Linear | None) -> None:
        super().__init__()
        self.encoder, self.objective, self.classifier = encoder, objective, classifier
        if not objective.trains_encoder:
            encoder.requires_grad_(False)

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if not self.objective.trains_encoder:
            self.encoder.eval()
        return self

    def forward(self, batch: Batch) -> tuple[Losses, Tensor, Tensor]:
        """The objective's losses, and the classifier's own loss and share of correct labels on the detached h."""
        losses = self.objective(self.encoder, batch)
        if self.classifier is None or batch.labels is None:
            nothing = losses.total.new_zeros(())
            return losses, nothing, nothing
        logits = self.classifier(losses.h.detach())
        correct = (logits.argmax(dim=1) == batch.labels).float().mean()
        return losses, F.cross_entropy(logits, batch.labels), correct


def initialise(recipe: Recipe, channels: int, size: int, classes: int) -> Learner:
    """Encoder, objective and classifier as the recipe's seed initialises them. The same on every device."""
    with seeded(recipe.seed, "initialise"):
        encoder = build_encoder(recipe, channels, size)
        objective = resolve("objective", recipe.objective.name)(recipe.objective, encoder, classes, channels)  # type: ignore[attr-defined]
        classifier = nn.Linear(encoder.dim, classes) if classes > 1 else None
    return Learner(encoder, objective, classifier)


def build_encoder(recipe: Recipe, channels: int, size: int) -> Encoder:
    """The recipe's encoder for images of that size; draws its weights from the global generator."""
    config = recipe.encoder
    if "size" in type(config).model_fields and config.size is None:  # type: ignore[attr-defined]
        config = config.model_copy(update={"size": size})
    return resolve("encoder", config.name)(channels, config)  # type: ignore[attr-defined]


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) in which an epoch visits the images."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def make_batch(
    source: Source, indices: Tensor, objective: Objective, device: torch.device, seed: int, *counters: int
) -> Batch:
    """The views of those images. Parameters are drawn for the whole batch on the CPU, so they are equal on every device."""
    images = to_unit(source.images(indices))
    views = {}
    for spec in objective.views:
        drawn = spec.policy.sample(len(indices), generator(seed, f"view-{spec.name}", *counters), (source.size,) * 2)
        params = drawn.to(device, non_blocking=True)
        views[spec.name] = View(spec.policy(images, params), params, spec.policy)
    draw = torch.rand(len(indices), objective.draws, generator=generator(seed, "draw", *counters))
    labels = None if source.labels is None else source.labels[indices].to(device, non_blocking=True)
    return Batch(views, labels, indices, draw.to(device, non_blocking=True))


def start(recipe: Recipe, out: Path | str, device: torch.device, overwrite: bool = False) -> Trainer:
    """A new run. An existing checkpoint is kept unless `overwrite`."""
    out = Path(out)
    if out.suffix != ".pt":
        raise GeomsslError(f"--out {out}", "a file name ending in .pt", f"{out.name}.pt", reason="bad-value")
    if out.exists() and not overwrite:
        raise GeomsslError(f"{out} exists", "another --out, --resume to continue it, or --overwrite", reason="exists")
    files.check(checkpoint.folder(out) / "metrics.jsonl")
    return Trainer(recipe, out, device)


def resume(path: Path | str, device: torch.device, layers: Sequence[Mapping[str, Any]] = ()) -> Trainer:
    """Continue a run where its checkpoint ends. `layers` may repeat its settings, not change them."""
    path = checkpoint.located(path)
    state = checkpoint.load(path)
    refuse_strangers(state["config"], layers, str(path))
    recipe = build([state["config"]], str(path))
    was, wanted = flat(recipe.plain()), flat(build([state["config"], *layers]).plain())
    differing = sorted(key for key in was.keys() | wanted.keys() if was.get(key) != wanted.get(key))
    if differing:
        said = ", ".join(f"{key} = {wanted.get(key)} (was {was.get(key)})" for key in differing)
        raise GeomsslError(f"--resume {path} with {said}", "the settings of the run that is resumed", reason="changed-recipe")
    trainer = Trainer(recipe, path, device)
    trainer.restore(state)
    return trainer


class Trainer:
    """One run: a recipe, its data, the learner and its optimizers, and the file that holds its last whole epoch."""

    def __init__(self, recipe: Recipe, out: Path | str, device: torch.device) -> None:
        self.recipe, self.out, self.device = recipe, Path(out), device
        self.source = data.load_config(recipe.dataset, "train").to(device)
        self.val = data.load_config(recipe.dataset, "val").to(device)
        if recipe.batch_size > len(self.source):
            raise GeomsslError(
                f"batch_size = {recipe.batch_size} on {len(self.source)} training images", f"2 to {len(self.source)}",
                reason="too-few-images",
            )
        self.learner = initialise(recipe, self.source.channels, self.source.size, len(self.source.classes)).to(device)
        self.optimizers = self._optimizers()
        self.steps_per_epoch = len(self.source) // recipe.batch_size
        self.epoch, self.step, self.saved_epoch = 0, 0, 0
        self.history: list[dict[str, Any]] = []
        self._try_one_batch()

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """One for the encoder and the heads by the recipe, one for the detached classifier."""
        found = {}
        trained = [p for m in (self.learner.encoder, self.learner.objective) for p in m.parameters() if p.requires_grad]
        if trained:
            found["model"] = resolve("optimizer", self.recipe.optim.name).build(self.recipe.optim, trained)  # type: ignore[attr-defined]
        if self.learner.classifier is not None:
            found["classifier"] = torch.optim.SGD(
                self.learner.classifier.parameters(), lr=self.recipe.classifier_lr, momentum=0.9
            )
        self.peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in found.items()}
        return found

    @torch.no_grad()
    def _try_one_batch(self) -> None:
        """A pass in eval mode over the first images, so that what does not fit is found before anything is written."""
        self.learner.eval()
        first = torch.arange(min(4, self.recipe.batch_size))
        self.learner(make_batch(self.source, first, self.learner.objective, self.device, self.recipe.seed, 0, 0))

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.learner.load_state_dict(state["weights"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizer"][name])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        self.saved_epoch = self.epoch

    def save(self) -> None:
        """Replace run.pt, then the metrics beside it, by the state at the end of the last epoch."""
        checkpoint.save(self.out, {
            "weights": self.learner.state_dict(),
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedule": {"kind": "warm-up, cosine", "step": self.step, "steps": self.recipe.epochs * self.steps_per_epoch},
            "scaler": {},
            "step": self.step,
            "epoch": self.epoch,
            "config": self.recipe.plain(),
            "history": self.history,
        })
        self.saved_epoch = self.epoch
        lines = "".join(json.dumps(row) + "\n" for row in self.history)
        files.write(checkpoint.folder(self.out) / "metrics.jsonl", lines)

    def run(
        self, stop_after: int | None = None, after_epoch: Callable[[Trainer], None] | None = None
    ) -> list[dict[str, Any]]:
        """Train to the recipe's last epoch, or for `stop_after` epochs, and return the history.

        after_epoch: called with this trainer before the first step (epoch 0) and after every epoch, once its row is in the
        history and what is due is saved; in eval mode, without gradients, and without an effect on the training.
        """
        last = self.recipe.epochs if stop_after is None else min(self.recipe.epochs, self.epoch + stop_after)
        if self.epoch == 0:
            self.save()
            self._tell(after_epoch)
        what = f"training {self.recipe.objective.name} on {self.recipe.encoder.name}"  # type: ignore[attr-defined]
        for _ in track(range(self.epoch, last), what):
            started = time.monotonic()
            row = self._epoch()
            row |= self._validate()
            self.epoch += 1
            row = {"epoch": self.epoch, "step": self.step, **row, "seconds": round(time.monotonic() - started, 3)}
            self.history.append(row)
            if self.epoch == last or self.epoch % self.recipe.checkpoint_every == 0:
                self.save()
            self._tell(after_epoch)
        return self.history

    def _tell(self, after_epoch: Callable[[Trainer], None] | None) -> None:
        """Call `after_epoch`, and restore the modes, the gradients' flags and the global generators that it may have moved."""
        if after_epoch is None:
            return
        modes = [(module, module.training) for module in self.learner.modules()]
        needed = [(parameter, parameter.requires_grad) for parameter in self.learner.parameters()]
        self.learner.eval()
        try:
            with torch.no_grad(), seeded(self.recipe.seed, "after-epoch", self.epoch):
                after_epoch(self)
        finally:
            for module, mode in modes:
                module.training = mode
            for parameter, flag in needed:
                parameter.requires_grad_(flag)

    def _epoch(self) -> dict[str, Any]:
        """One pass over the training images in a seeded order; no host synchronisation inside a step."""
        self.learner.train()
        order = epoch_order(len(self.source), self.recipe.seed, self.epoch)
        rows: list[Tensor] = []
        names: list[str] = []
        rates: list[float] = []
        with seeded(self.recipe.seed, "epoch", self.epoch):
            for k in range(self.steps_per_epoch):
                rates.append(self._set_rates())
                indices = order[k * self.recipe.batch_size : (k + 1) * self.recipe.batch_size]
                batch = make_batch(
                    self.source, indices, self.learner.objective, self.device, self.recipe.seed, self.epoch, k
                )
                losses, classifier_loss, correct = self.learner(batch)
                (losses.total + classifier_loss).backward()
                for optimizer in self.optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                names = ["loss", *losses.terms, "online_train_accuracy"]
                rows.append(torch.stack([losses.total.detach(), *losses.terms.values(), correct]))
                self.step += 1
                if len(rows) % FINITE_EVERY == 0 or k == self.steps_per_epoch - 1:
                    self._check_finite(rows, rates)
        means = torch.stack(rows).double().mean(dim=0).tolist()
        if self.learner.classifier is None:
            names, means = names[:-1], means[:-1]
        return {"lr": rates[-1], **dict(zip(names, means, strict=True))}

    def _set_rates(self) -> float:
        steps = self.recipe.epochs * self.steps_per_epoch
        warmup = round(self.recipe.optim.warmup_epochs * self.steps_per_epoch)  # type: ignore[attr-defined]
        rates = {name: learning_rate(peak, self.step, steps, warmup) for name, peak in self.peaks.items()}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        return rates.get("model", 0.0)

    def _check_finite(self, rows: list[Tensor], rates: list[float]) -> None:
        """Stop at the first loss, or the first weights, that are not finite."""
        losses = torch.stack(rows)[:, 0]
        healthy = torch.stack([p.detach().isfinite().all() for p in self.learner.parameters()]).all()
        if bool(losses.isfinite().all()) and bool(healthy):
            return
        bad = (~losses.isfinite()).nonzero()[:, 0].tolist()
        k = bad[0] if bad else len(rows) - 1
        said = f"the loss is {float(losses[k])}" if bad else "a weight is not finite"
        step = self.step - len(rows) + k + 1
        good = f"the last good checkpoint is {self.out} (epoch {self.saved_epoch})"
        raise GeomsslError(
            f"{said} at step {step}, epoch {self.epoch + 1}, learning rate {rates[k]:.4g}",
            f"a finite loss: try a smaller learning rate; {good}", reason="diverged",
        )

    @torch.no_grad()
    def _validate(self) -> dict[str, Any]:
        """Accuracy of the online classifier on the validation split, weighted by sample."""
        if self.learner.classifier is None or self.val.labels is None or not len(self.val):
            return {}
        self.learner.eval()
        correct = torch.zeros((), dtype=torch.long, device=self.device)
        for chunk in torch.arange(len(self.val)).split(self.recipe.batch_size):
            h = self.learner.encoder(to_unit(self.val.images(chunk)))
            correct += (self.learner.classifier(h).argmax(dim=1) == self.val.labels[chunk].to(self.device)).sum()
        accuracy = correct.item() / len(self.val)
        assert math.isfinite(accuracy)
        return {"online_val_accuracy": accuracy}
