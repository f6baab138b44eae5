"""Supervised: cross-entropy of a linear classifier through the encoder, the upper baseline (row H5)."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import nn

from geomssl.config import Settings
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec
from geomssl.transforms import policy


class Supervised(Objective):
    """L = cross-entropy(W h + b, label), of one view.

    It has no `positives`, unlike its kin: nothing is compared with anything. A partner of image i would only be another image
    with a label of its own, that is another order of the epoch.
    """

    class Config(Settings):
        name: Literal["supervised"] = "supervised"
        policy: str = Field("none", description="augmentation policy of the images")

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        if classes < 2:
            raise GeomsslError(f"supervised training on {classes} classes", "at least 2", reason="no-labels")
        self.classifier = nn.Linear(encoder.dim, classes)
        self.views = (ViewSpec("1", policy(config.policy)),)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        if batch.labels is None:
            raise GeomsslError("supervised training without labels", "a labelled data set", reason="no-labels")
        h = encoder(batch.views["1"].images)
        loss = F.cross_entropy(self.classifier(h), batch.labels)
        return Losses(loss, {"cross_entropy": loss.detach()}, h)
