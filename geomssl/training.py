"""The training loop: views made on the device, no wait for the host in a step, a whole checkpoint after every epoch."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geomssl import checkpoint, data, device, distributed, files, modes
from geomssl.caching import Cache
from geomssl.data.base import to_unit
from geomssl.errors import GeomsslError
from geomssl.learner import Learner, build_encoder, epoch_order, initialise, make_batch
from geomssl.objectives.base import Batch, Losses
from geomssl.optim import learning_rate
from geomssl.progress import track
from geomssl.recipe import Recipe, build, differing, refuse_strangers, seen
from geomssl.registry import resolve
from geomssl.seeding import seeded

__all__ = ["Learner", "Trainer", "build_encoder", "epoch_order", "initialise", "make_batch", "resume", "start"]

FINITE_EVERY = 50


def start(recipe: Recipe, out: Path | str, where: torch.device, overwrite: bool = False) -> Trainer:
    """A new run. An existing checkpoint is kept unless `overwrite`."""
    out = Path(out)
    if out.suffix != ".pt":
        raise GeomsslError(f"--out {out}", "a file name ending in .pt", f"{out.name}.pt", reason="bad-value")
    if out.exists() and not overwrite:
        raise GeomsslError(f"{out} exists", "another --out, --resume to continue it, or --overwrite", reason="exists")
    _check(out)
    return Trainer(recipe, out, where)


def resume(path: Path | str, where: torch.device, layers: Sequence[Mapping[str, Any]] = ()) -> Trainer:
    """Continue a run where its checkpoint ends.

    `layers` may repeat its settings, and change none but recipe.MACHINE; the device and the number of processes may differ.
    """
    path = checkpoint.located(path)
    _check(path)
    state = checkpoint.load(path)
    refuse_strangers(state["config"], layers, str(path))
    recipe = build([state["config"], *layers], str(path))
    changed = differing(build([state["config"]], str(path)).plain(), recipe.plain())
    if changed:
        said = ", ".join(changed)
        raise GeomsslError(f"--resume {path} with {said}", "the settings of the run that is resumed", reason="changed-recipe")
    trainer = Trainer(recipe, path, where)
    trainer.restore(state)
    return trainer


def _check(out: Path) -> None:
    """Raise, before anything is trained, where run.pt, its sibling or its folder could not be written."""
    for path in (out, out.with_name(f".{out.name}.part"), checkpoint.folder(out) / "metrics.jsonl"):
        files.check(path)


class Trainer:
    """One run: a recipe, its data, the learner and its optimizers, and the file that holds its last whole epoch.

    whole: the training split; source: what the run sees of it (train_share).
    notes: sentences that a person should read once, about what this machine makes of the recipe.
    """

    def __init__(self, recipe: Recipe, out: Path | str, where: torch.device) -> None:
        self.recipe, self.out, self.device = recipe, Path(out), where
        self.notes: list[str] = []
        distributed.check_batch(recipe.batch_size)
        lower = device.precision(recipe.precision, where)
        self.whole = data.load_config(recipe.dataset, "train").to(where)
        self.source = seen(recipe, self.whole)
        self.val = data.load_config(recipe.dataset, "val").to(where)
        if recipe.batch_size > len(self.source):
            raise GeomsslError(
                f"batch_size = {recipe.batch_size} on {len(self.source)} training images", f"2 to {len(self.source)}",
                reason="too-few-images",
            )
        shape = (self.source.channels, self.source.size, len(self.source.classes))
        self.learner = initialise(recipe, *shape, self.source).to(where)
        self.learner.lower = lower
        self.layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.learner.encoder.to(memory_format=self.layout)  # type: ignore[call-overload]
        self._join_norms()
        self.scaler = torch.amp.GradScaler(where.type, enabled=lower is torch.float16)
        self.optimizers = self._optimizers()
        self.steps_per_epoch = len(self.source) // recipe.batch_size
        self.epoch, self.step, self.saved_epoch = 0, 0, 0
        self.history: list[dict[str, Any]] = []
        unused = self._try_one_batch()
        if recipe.compile:
            device.compiler(where)
            self.learner.compile_encoder()
        self.model: nn.Module = self.learner
        # with gradient caching there is no one backward pass to hang the exchange on: _cached_step does it
        if distributed.world() > 1 and recipe.micro_batch is None:
            self.model = distributed.parallel(self.learner, unused)

    def _join_norms(self) -> None:
        """BatchNorm inside the encoder sees all processes on cuda; on the CPU, where torch has no such norm, one of them."""
        norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.learner.encoder.modules())
        if distributed.world() == 1 or not norms or not self.learner.objective.trains_encoder:
            return
        if self.device.type == "cuda":
            self.learner.encoder = nn.SyncBatchNorm.convert_sync_batchnorm(self.learner.encoder)
        else:
            self.notes.append("BatchNorm in the encoder takes its statistics per process: SyncBatchNorm works on cuda alone")

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
        if not found:
            raise GeomsslError(
                f"objective {self.recipe.objective.name} on a data set without labels",  # type: ignore[attr-defined]
                "something to train: another objective, or labels for the online classifier", reason="no-labels",
            )
        self.peaks = {name: optimizer.param_groups[0]["lr"] for name, optimizer in found.items()}
        return found

    def _try_one_batch(self) -> bool:
        """A pass in eval mode over the first images, so that what does not fit is found before anything is written.

        Returns whether the loss misses a parameter, which DistributedDataParallel must know.
        """
        self.learner.eval()
        first = torch.arange(min(4, self.recipe.batch_size))
        batch = self._batch(first, 0, 0, rows=slice(None))
        several = distributed.world() > 1
        try:
            with torch.set_grad_enabled(several):
                losses, classifier_loss, _ = self.learner(batch)
        except RuntimeError as error:
            if not self.recipe.channels_last or isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            name = self.recipe.encoder.name  # type: ignore[attr-defined]
            raise GeomsslError(
                f"channels_last = true with encoder {name}: {str(error).splitlines()[0]}", "channels_last = false",
                reason="bad-value",
            ) from error
        if not several:
            return False
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        found = torch.autograd.grad(losses.total + classifier_loss, trained, allow_unused=True)
        return any(gradient is None for gradient in found)

    def _batch(self, indices: Tensor, *counters: int, rows: slice | None = None) -> Batch:
        return make_batch(
            self.source, indices, self.learner.objective, self.device, self.recipe.seed, *counters, rows=rows,
            layout=self.layout,
        )

    def fingerprints(self) -> dict[str, str]:
        """What tells the images of this run from all others."""
        return {source.split: source.fingerprint for source in (self.source, self.val)}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        was, now = state.get("data", {}), self.fingerprints()
        changed = [split for split in was if was[split] != now.get(split)]
        if changed:
            said = ", ".join(f"{split} has fingerprint {now.get(split)} (was {was[split]})" for split in changed)
            raise GeomsslError(
                f"--resume {self.out} on other images: {said}", "the images that the run was started on",
                reason="changed-data",
            )
        self.learner.load_state_dict(state["weights"])
        for name, optimizer in self.optimizers.items():
            # which kernels to use is this machine's affair
            kernels = [{key: group.get(key) for key in ("fused", "foreach")} for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"][name])
            for group, own in zip(optimizer.param_groups, kernels, strict=True):
                group.update(own)
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], list(state["history"])
        self.saved_epoch = self.epoch

    def save(self) -> None:
        """Replace run.pt, then the metrics beside it, by the state at the end of the last epoch. Rank 0 alone writes."""
        self.saved_epoch = self.epoch
        if distributed.rank():
            return
        checkpoint.save(self.out, {
            "weights": self.learner.state_dict(),
            "optimizer": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "schedule": {"kind": "warm-up, cosine", "step": self.step, "steps": self.recipe.epochs * self.steps_per_epoch},
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "epoch": self.epoch,
            "config": self.recipe.plain(),
            "data": self.fingerprints(),
            "history": self.history,
        })
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
        if after_epoch is None or distributed.rank():
            distributed.wait()
            return
        needed = [(parameter, parameter.requires_grad) for parameter in self.learner.parameters()]
        try:
            with modes.evaluating(self.learner), torch.no_grad(), seeded(self.recipe.seed, "after-epoch", self.epoch):
                after_epoch(self)
        finally:
            for parameter, flag in needed:
                parameter.requires_grad_(flag)
        distributed.wait()

    def _epoch(self) -> dict[str, Any]:
        """One pass over the training images in a seeded order; no host synchronisation inside a step."""
        for source in (self.source, self.val):
            source.check()
        self.learner.train()
        order = epoch_order(len(self.source), self.recipe.seed, self.epoch)
        rows: list[Tensor] = []
        names: list[str] = []
        rates: list[float] = []
        size = self.recipe.batch_size
        # dropout draws other masks on every rank; views do not depend on it
        ranked = (distributed.rank(),) if distributed.rank() else ()
        with seeded(self.recipe.seed, "epoch", self.epoch, *ranked):
            for k in range(self.steps_per_epoch):
                rates.append(self._set_rates())
                indices, following = order[k * size : (k + 1) * size], order[(k + 1) * size : (k + 2) * size]
                self.source.prefetch(following[distributed.shard(len(following))])
                losses, correct = self._step(self._batch(indices, self.epoch, k))
                names = ["loss", *losses.terms, "online_train_accuracy"]
                rows.append(torch.stack([losses.total.detach(), *losses.terms.values(), correct]))
                self.step += 1
                if len(rows) % FINITE_EVERY == 0 or k == self.steps_per_epoch - 1:
                    recent = slice((len(rows) - 1) // FINITE_EVERY * FINITE_EVERY, None)
                    self._check_finite(distributed.mean(torch.stack(rows[recent])), rates[recent])
        distributed.average_statistics(self.learner)
        means = distributed.mean(torch.stack(rows).double().mean(dim=0)).tolist()
        if self.learner.classifier is None:
            names, means = names[:-1], means[:-1]
        cached = {} if self.recipe.micro_batch is None else {"micro_batch": self.recipe.micro_batch}
        return {"lr": rates[-1], **cached, **dict(zip(names, means, strict=True))}

    def _step(self, batch: Batch) -> tuple[Losses, Tensor]:
        """Forward, backward, the mean of the gradients over the processes, and the optimizers."""
        cache = None
        if self.recipe.micro_batch is not None:
            cache = Cache(self.learner.encoder, self.learner.passes, self.recipe.micro_batch, self.learner.autocast)
        try:
            losses, classifier_loss, correct = self.model(batch, cache)
        except Exception as error:
            # told by name: importing the compiler to name its errors would cost every run seconds
            if self.recipe.compile and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise device.no_compile(error) from error
            raise
        self.scaler.scale(losses.total + classifier_loss).backward()
        if cache is not None:
            cache.replay()
            distributed.average_gradients(self.learner.parameters())
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return losses, correct

    def _set_rates(self) -> float:
        steps = self.recipe.epochs * self.steps_per_epoch
        warmup = round(self.recipe.optim.warmup_epochs * self.steps_per_epoch)  # type: ignore[attr-defined]
        rates = {name: learning_rate(peak, self.step, steps, warmup) for name, peak in self.peaks.items()}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name]
        return rates.get("model", 0.0)

    def _check_finite(self, rows: Tensor, rates: list[float]) -> None:
        """Stop at the first of the last steps' losses, or at weights, that are not finite; rows: one a step, loss first."""
        losses = rows[:, 0]
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
        """Accuracy of the online classifier on the validation split, weighted by sample over all processes."""
        if self.learner.classifier is None or self.val.labels is None or not len(self.val):
            return {}
        self.learner.eval()
        correct = torch.zeros((), dtype=torch.long, device=self.device)
        own = torch.arange(distributed.rank(), len(self.val), distributed.world())
        for chunk in own.split(self.recipe.batch_size) if len(own) else ():
            images = to_unit(self.val.images(chunk)).contiguous(memory_format=self.layout)
            with self.learner.autocast():
                logits = self.learner.classifier(self.learner.encoder(images))
            correct += (logits.argmax(dim=1) == self.val.labels[chunk].to(self.device)).sum()
        accuracy = distributed.total(correct).item() / len(self.val)
        assert math.isfinite(accuracy)
        return {"online_val_accuracy": accuracy}
