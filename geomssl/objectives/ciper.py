"""CIPER: contrast two views, and predict from h(x) - h(view) what made the view (rows C3-C5, C7)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from geomssl.encoders.base import Encoder
from geomssl.heads import mlp
from geomssl.losses import Denominator, info_nce
from geomssl.objectives.base import Batch, Losses, encoded, joint
from geomssl.objectives.predictive import PredictionSettings, Predictive, standardise, terms

__all__ = ["CIPER", "standardise"]


class CIPER(Predictive):
    """L = contrastive InfoNCE(z1, z2) + alpha prediction (Xu and Triesch, Eq. 2); the prediction is that of Predictive (Eq. 1).

    positives, categories and continuous make the data set's own transformations of it (C7): the two views are other
    images of the same object, or the next frame, and what is predicted is how they differ from the image. contrastive = 0
    leaves the prediction, with a projector that learns nothing; "predictive" is the same without it.
    """

    class Config(PredictionSettings):
        name: Literal["ciper"] = "ciper"
        alpha: float = Field(1.0, ge=0, description="weight of the prediction")
        contrastive: float = Field(1.0, ge=0, description="weight of InfoNCE; 0 is predictive only")
        beta: float = Field(2.0, ge=0, description="inverse temperature")
        denominator: Denominator = Field("nt-xent", description="which terms stand in InfoNCE's denominator")
        projector: tuple[int, ...] = Field((256, 256), min_length=1, description="widths of the projector")

    config: Config

    def _make_heads(self, encoder: Encoder) -> None:
        self.projector = mlp((encoder.dim, *self.config.projector), last_norm=len(self.config.projector) > 1)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        (h0, h1, h2), own = encoded(encoder, *(batch.views[name].images for name in ("plain", "1", "2")))
        z1, z2 = joint(self.projector, h1, h2)
        contrastive = info_nce(z1, z2, self.config.beta, self.config.denominator, symmetric=True)
        found = self.prediction(h0, h1, h2, batch)
        total = self.config.contrastive * contrastive + self.config.alpha * found.total
        return Losses(total, {"info_nce": contrastive.detach(), **terms(found)}, own)
