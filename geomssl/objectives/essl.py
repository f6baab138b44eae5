"""E-SSL: contrast two views, and tell by which quarter turn a third one was turned: six images a sample (row C6)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from geomssl.config import Settings
from geomssl.encoders.base import Encoder
from geomssl.heads import mlp, regressor
from geomssl.losses import Denominator, info_nce
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, encoded, joint
from geomssl.transforms import policy
from geomssl.transforms.groups import CyclicRotations


class ESSL(Objective):
    """L = InfoNCE(z1, z2) + weight CE(q(h(T_k view3)), k), the mean over k = 0, 90, 180, 270 degrees (Dangovski et al. 2021).

    view3 is a third draw of the policy, shown at all four turns: six images a sample in one pass. The head q has two hidden
    layers with LayerNorm, so that its rows do not meet. In the authors' code view3 is a crop of half the side; here it has
    the side of the others, since an encoder may be made for one size.
    """

    class Config(Settings):
        name: Literal["essl"] = "essl"
        policy: str = Field("ciper", description="augmentation policy of all three views")
        beta: float = Field(2.0, ge=0, description="inverse temperature")
        denominator: Denominator = Field("nt-xent", description="which terms stand in InfoNCE's denominator")
        projector: tuple[int, ...] = Field((256, 256), min_length=1, description="widths of the projector")
        weight: float = Field(0.4, ge=0, description="weight of the prediction of the turn")
        predictor: tuple[int, ...] = Field((2048, 2048), min_length=1, description="hidden widths of the head for the turn")

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config, self.turns = config, CyclicRotations(4)
        self.projector = mlp((encoder.dim, *config.projector), last_norm=len(config.projector) > 1)
        self.predictor = regressor((encoder.dim, *config.predictor, 4))
        drawn = policy(config.policy)
        self.views = tuple(ViewSpec(name, drawn) for name in ("1", "2", "turned"))

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        third = batch.views["turned"].images
        elements = self.turns.elements().to(third)
        turned = [self.turns(third, element.expand(len(third), 1)) for element in elements]
        (h1, h2, *others), own = encoded(encoder, batch.views["1"].images, batch.views["2"].images, *turned)
        z1, z2 = joint(self.projector, h1, h2)
        contrastive = info_nce(z1, z2, self.config.beta, self.config.denominator, symmetric=True)
        labels = torch.arange(4, device=third.device).repeat_interleave(len(h1))
        rotation = F.cross_entropy(self.predictor(torch.cat(others)), labels)
        total = contrastive + self.config.weight * rotation
        return Losses(total, {"info_nce": contrastive.detach(), "rotation": rotation.detach()}, own)
