"""CIPER: contrast two views, and predict from h(x) - h(view) the parameters of the augmentation (rows C2-C5)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from geomssl.config import Settings
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.heads import mlp
from geomssl.losses import Denominator, info_nce
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, encoded, joint
from geomssl.transforms import policy


class CIPER(Objective):
    """L = contrastive InfoNCE(z1, z2) + alpha MSE(p(h(x) - h(x_t)), r_t), the mean over both views (Xu and Triesch, Eq. 1, 2).

    r_t: the parameters of the augmentation in the policy's fixed order, each standardised over the joined batch; those that
    do not act on the images (hue on one channel) are left out. Eq. 1 is printed with a minus sign; the loss is the plain mean
    squared error. The un-augmented anchor is encoded too, in one pass with both views: three images a sample.
    contrastive = 0 is the predictive-only model (C2).
    """

    class Config(Settings):
        name: Literal["ciper"] = "ciper"
        policy: str = Field("ciper", description="augmentation policy of both views")
        alpha: float = Field(1.0, ge=0, description="weight of the prediction")
        contrastive: float = Field(1.0, ge=0, description="weight of InfoNCE; 0 is predictive only")
        beta: float = Field(2.0, ge=0, description="inverse temperature")
        denominator: Denominator = Field("nt-xent", description="which terms stand in InfoNCE's denominator")
        projector: tuple[int, ...] = Field((256, 256), min_length=1, description="widths of the projector")
        predictor: int = Field(512, ge=1, description="hidden width of the predictor")

    acting: Tensor

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        drawn = policy(config.policy)
        acting = [i for i, acts in enumerate(drawn.active(channels)) if acts]
        if not acting:
            given = f"ciper with policy {config.policy!r} on {channels} channels"
            raise GeomsslError(given, "a policy with parameters to predict", reason="bad-value")
        self.register_buffer("acting", torch.tensor(acting), persistent=False)
        self.projector = mlp((encoder.dim, *config.projector), last_norm=len(config.projector) > 1)
        self.predictor = nn.Sequential(
            nn.Linear(encoder.dim, config.predictor), nn.LayerNorm(config.predictor), nn.ReLU(),
            nn.Linear(config.predictor, len(acting)),
        )
        self.views = (ViewSpec("plain", policy("none")), ViewSpec("1", drawn), ViewSpec("2", drawn))

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        (h0, h1, h2), own = encoded(encoder, *(batch.views[name].images for name in ("plain", "1", "2")))
        z1, z2 = joint(self.projector, h1, h2)
        contrastive = info_nce(z1, z2, self.config.beta, self.config.denominator, symmetric=True)
        predicted = self.predictor(torch.cat([h0 - h1, h0 - h2]))
        wanted = torch.cat([standardise(gather(batch.views[name].params[:, self.acting])) for name in ("1", "2")])
        prediction = F.mse_loss(predicted, wanted.to(predicted))
        total = self.config.contrastive * contrastive + self.config.alpha * prediction
        return Losses(total, {"info_nce": contrastive.detach(), "prediction": prediction.detach()}, own)


def standardise(params: Tensor) -> Tensor:
    """(r - mean) / std of each column over the batch; a column without variance becomes zero."""
    centred = params - params.mean(dim=0)
    return centred / centred.square().mean(dim=0).sqrt().clamp(min=1e-6)
