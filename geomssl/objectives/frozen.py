"""Frozen: the encoder stays as it was initialised; only the online classifier learns. The lower baseline (row H5)."""

from __future__ import annotations

from typing import Literal

from geomssl.config import Settings
from geomssl.encoders.base import Encoder
from geomssl.losses import wide
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec
from geomssl.transforms import policy


class Frozen(Objective):
    """L = 0."""

    class Config(Settings):
        name: Literal["frozen"] = "frozen"

    trains_encoder = False
    reaches_h = False

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.views = (ViewSpec("plain", policy("none")),)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        h = encoder(batch.views["plain"].images)
        return Losses(wide(h).new_zeros(()), {}, h)
