"""The contract of an objective: which views it needs, and the loss it makes of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from geomssl.data.base import Source
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.transforms.base import Transform


class ViewSpec(NamedTuple):
    """A view the trainer must make: its name in the batch, and the transform that draws it.

    partner: which image of the training split is shown in place of image i, from indices (N,) and a generator to indices
    (N,) on the CPU; None shows image i itself.
    """

    name: str
    policy: Transform
    partner: Callable[[Tensor, torch.Generator], Tensor] | None = None


class View(NamedTuple):
    """Images (N, C, H, W) in [0, 1], the parameters (N, P) that made them, and the transform that was applied.

    factors: of the images that are shown, (N,) each; those that the objective names.
    """

    images: Tensor
    params: Tensor
    transform: Transform
    factors: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Batch:
    """What one process sees of a step, on the device: its rows of the batch that all processes share.

    draw: uniform numbers in [0, 1) (N, objective.draws) of this step.
    factors: of the images that `indices` name, (N,) each; those that the objective names.
    """

    views: dict[str, View]
    labels: Tensor | None
    indices: Tensor
    draw: Tensor
    factors: dict[str, Tensor] = field(default_factory=dict)


class Losses(NamedTuple):
    """total: what backward() is called on. terms: detached, by name. h: (N, D) of one view, for the online classifier.

    The classifier's gradient stops at h. Where `Objective.reaches_h` is False and the encoder has a `readout`, a module inside
    pool() with weights of its own, it goes on into h, which then hangs on detached fibres.
    """

    total: Tensor
    terms: dict[str, Tensor]
    h: Tensor


class Objective(nn.Module):
    """A loss with its heads, built as Class(config, encoder, classes, channels); Class.Config is its schema.

    A loss whose examples meet gathers what enters its heads (distributed.gather), so that it is the loss of the joined batch
    on every process; a mean over examples needs no gathering. It computes on losses.wide numbers, or by functions that
    autocast keeps in float32 (cross_entropy, mse_loss).

    views:          what the trainer draws for every batch.
    draws:          how many uniform numbers an example needs beside its views (fibre locations).
    factors:        the data set's factors that a step needs, by name.
    projector:      from h to z, or None.
    projector_note: a sentence for probes that feed it h, where it was trained on something else; or None.
    trains_encoder: False keeps the encoder in eval mode without gradients.
    reaches_h:      False where the loss does not depend on h: an encoder's readout then learns from the online classifier.
    policy:         the transform whose views a probe should use, or None.
    """

    views: tuple[ViewSpec, ...] = ()
    draws: int = 0
    factors: tuple[str, ...] = ()
    projector: nn.Module | None
    projector_note: str | None = None
    trains_encoder: bool = True
    reaches_h: bool = True

    def __init__(self) -> None:
        super().__init__()
        # not a class attribute, which would hide the registered submodule
        self.projector = None

    @property
    def policy(self) -> Transform | None:
        return self.views[-1].policy if self.views else None

    def complete(self, encoder: Encoder, size: int, source: Source | None) -> None:
        """Make what depends on the side of the images or on the training split: heads, pairs. Called once, after __init__.

        source is None where no data set is at hand. Raises GeomsslError where the data set lacks what the objective needs.
        """

    @abstractmethod
    def forward(self, encoder: Encoder, batch: Batch) -> Losses: ...


def encoded(encoder: Encoder, *images: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """h of several views in one pass: of the joined batch of all processes, and this process's own of the first view."""
    own = joint(encoder, *images)
    return tuple(gather(h) for h in own), own[0]


def joint(encode: nn.Module, *images: Tensor) -> tuple[Tensor, ...]:
    """Several views through one pass, so that BatchNorm sees them all at once; split again."""
    return encode(torch.cat(images)).split([len(i) for i in images])
