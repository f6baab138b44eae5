"""What trains, and what it trains on: encoder, objective and classifier as one module, and the batch of a step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl import distributed
from geomssl.caching import Passes, Through
from geomssl.data.base import Source, to_unit
from geomssl.encoders import for_images
from geomssl.encoders.base import Encoder
from geomssl.objectives.base import Batch, Losses, Objective, View
from geomssl.recipe import Recipe
from geomssl.registry import resolve
from geomssl.seeding import generator, seeded


class Learner(nn.Module):
    """The one module that trains: encoder, objective with its heads, and a linear classifier that is detached from both.

    lower:  the number type of autocast, or None.
    passes: the encoder's fibres and forward as a step calls them, compiled or not.
    """

    lower: torch.dtype | None = None

    def __init__(self, encoder: Encoder, objective: Objective, classifier: nn.Linear | None) -> None:
        super().__init__()
        self.encoder, self.objective, self.classifier = encoder, objective, classifier
        self.compiled: Passes | None = None
        if not objective.trains_encoder:
            encoder.requires_grad_(False)
        readout = getattr(encoder, "readout", None)
        self.reads_out = False
        if isinstance(readout, nn.Module) and not objective.reaches_h:
            readout.requires_grad_(True)
            self.reads_out = True

    def train(self, mode: bool = True) -> Learner:
        super().train(mode)
        if not self.objective.trains_encoder:
            self.encoder.eval()
        return self

    @property
    def passes(self) -> Passes:
        return self.compiled or {"fibres": self.encoder.fibres, "forward": self.encoder}

    def compile_encoder(self) -> None:
        """Let every later step run the encoder through torch.compile, made anew for each shape."""
        self.compiled = {
            "fibres": torch.compile(self.encoder.fibres, dynamic=False),
            "forward": torch.compile(self.encoder.forward, dynamic=False),
        }

    def autocast(self) -> torch.autocast:
        """The context in which encoder and heads run."""
        kind = next(self.parameters()).device.type
        return torch.autocast(kind, dtype=self.lower, enabled=self.lower is not None)

    def forward(self, batch: Batch, encoder: Encoder | None = None) -> tuple[Losses, Tensor, Tensor]:
        """The objective's losses, and the classifier's own loss and share of correct labels on h, which is detached, or
        hangs on detached fibres where the classifier trains the encoder's readout too.

        encoder: what the objective sees in its place (a caching.Cache).
        """
        if encoder is None:
            encoder = Through(self.encoder, self.compiled) if self.compiled else self.encoder
        with self.autocast():
            losses = self.objective(encoder, batch)
            h = losses.h if self.reads_out else losses.h.detach()
            losses = losses._replace(h=h.detach())
            if self.classifier is None or batch.labels is None:
                nothing = losses.total.new_zeros(())
                return losses, nothing, nothing
            logits = self.classifier(h)
            correct = (logits.argmax(dim=1) == batch.labels).float().mean()
            return losses, F.cross_entropy(logits, batch.labels), correct


def initialise(recipe: Recipe, channels: int, size: int, classes: int, source: Source | None = None) -> Learner:
    """Encoder, objective and classifier as the recipe's seed initialises them. The same on every device.

    source: the training split, which an objective needs that learns from factors or from pairs of images.
    """
    with seeded(recipe.seed, "initialise"):
        encoder = build_encoder(recipe, channels, size)
        objective = resolve("objective", recipe.objective.name)(recipe.objective, encoder, classes, channels)  # type: ignore[attr-defined]
        objective.complete(encoder, size, source)
        classifier = nn.Linear(encoder.dim, classes) if classes > 1 else None
    return Learner(encoder, objective, classifier)


def build_encoder(recipe: Recipe, channels: int, size: int) -> Encoder:
    """The recipe's encoder for images of that size; draws its weights from the global generator."""
    return for_images(recipe.encoder, channels, size)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The order (n,) in which an epoch visits the images."""
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def make_batch(
    source: Source,
    indices: Tensor,
    objective: Objective,
    device: torch.device,
    seed: int,
    *counters: int,
    rows: slice | None = None,
    layout: torch.memory_format = torch.contiguous_format,
) -> Batch:
    """The views of those images. Parameters are drawn for the whole batch on the CPU, so they are equal on every device.

    rows:   of the batch, those that this process makes; its own by distributed.shard when not given.
    layout: how the images lie in memory.
    """
    rows = distributed.shard(len(indices)) if rows is None else rows
    own = indices[rows]
    images = to_unit(source.images(own))

    def moved(drawn: Tensor) -> Tensor:
        return drawn[rows].to(device, non_blocking=True)

    def known(shown: Tensor) -> dict[str, Tensor]:
        return {name: source.factors[name][shown].to(device, non_blocking=True) for name in objective.factors}

    views = {}
    for spec in objective.views:
        params = moved(
            spec.policy.sample(len(indices), generator(seed, f"view-{spec.name}", *counters), (source.size,) * 2)
        )
        pixels, shown = images, own
        if spec.partner is not None:
            shown = spec.partner(indices, generator(seed, f"partner-{spec.name}", *counters))[rows]
            pixels = to_unit(source.images(shown))
        made = spec.policy(pixels, params).contiguous(memory_format=layout)
        views[spec.name] = View(made, params, spec.policy, known(shown))
    draw = torch.rand(len(indices), objective.draws, generator=generator(seed, "draw", *counters))
    labels = None if source.labels is None else source.labels[own].to(device, non_blocking=True)
    return Batch(views, labels, own, moved(draw), known(own))
