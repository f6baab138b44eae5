"""SimCLR: two augmented views of an image attract, views of other images repel (rows C1, G1, G11)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from geomssl.data.base import Source
from geomssl.encoders.base import Encoder
from geomssl.heads import mlp
from geomssl.losses import Denominator, info_nce
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, encoded, joint
from geomssl.objectives.pairs import PairSettings, paired
from geomssl.transforms import policy


class SimCLR(Objective):
    """L = InfoNCE(z1, z2), both directions averaged, z = projector(h(view)).

    positives "next" and "object" with policy "none" are the time-based and the data set's own positives of row C7.
    """

    class Config(PairSettings):
        name: Literal["simclr"] = "simclr"
        policy: str = Field("simclr", description="augmentation policy of both views")
        beta: float = Field(2.0, ge=0, description="inverse temperature")
        denominator: Denominator = Field("nt-xent", description="which terms stand in InfoNCE's denominator")
        projector: tuple[int, ...] = Field((128,), min_length=1, description="widths of the projector; one is a linear map W")

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp((encoder.dim, *config.projector), last_norm=len(config.projector) > 1)
        drawn = policy(config.policy)
        self.views = (ViewSpec("1", drawn), ViewSpec("2", drawn))

    def complete(self, encoder: Encoder, size: int, source: Source | None) -> None:
        self.views = paired(self.views, self.config, source)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        (h1, h2), own = encoded(encoder, batch.views["1"].images, batch.views["2"].images)
        z1, z2 = joint(self.projector, h1, h2)
        loss = info_nce(z1, z2, self.config.beta, self.config.denominator, symmetric=True)
        return Losses(loss, {"info_nce": loss.detach()}, own)
