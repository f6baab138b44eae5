"""Homomorphic SSL (rows H1, H2, H6): positives are two fibres of one pass, or one fibre of two augmented passes."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.heads import mlp
from geomssl.losses import Denominator, info_nce
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, joint
from geomssl.transforms import policy
from geomssl.transforms.base import Transform

AUGMENTATION = {"rotation": "rotations", "translation": "translations20", "scale": "scales"}


class HSSL(Objective):
    """InfoNCE between fibres of z = f(x), z of shape (N, C, G, H, W) (Keller et al., Eq. 2 and 3).

    fibres: z1 = z(g1^-1 g0), z2 = z(g2^-1 g0) of ONE un-augmented pass; g1, g2 uniform, independent per example and branch.
    inputs: z1 = f(T_g1 x)(g0), z2 = f(T_g2 x)(g0), both in one joint pass; g0 uniform per example, the SAME in both branches.
    A fibre is C numbers at one place of the axis that the group moves: of G for rotation and scale, after averaging over
    space; of (H, W) for translation, with G pooled by its maximum.
    """

    class Config(Settings):
        name: Literal["hssl"] = "hssl"
        group: Literal["rotation", "translation", "scale"] = Field("rotation", description="the transformation")
        positives: Literal["fibres", "inputs"] = Field("fibres", description="H-SSL (fibres) or A-SSL (inputs)")
        beta: float = Field(10.0, ge=0, description="inverse temperature")
        denominator: Denominator = Field("pooled", description="which terms stand in InfoNCE's denominator")
        projector: tuple[int, ...] = Field((128, 128, 128), min_length=1, description="widths of the head")

    projector_note = "The projector was trained on single fibres; here it is fed with h, which pools them."

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp((encoder.dim, *config.projector))
        if config.positives == "fibres":
            self.views, self.draws = (ViewSpec("plain", policy("none")),), 2
        else:
            drawn = policy(AUGMENTATION[config.group])
            self.views, self.draws = (ViewSpec("1", drawn), ViewSpec("2", drawn)), 1

    @property
    def policy(self) -> Transform:
        """The augmentation that corresponds to the group, also where training drew none."""
        return policy(AUGMENTATION[self.config.group])

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        images = torch.cat([batch.views[spec.name].images for spec in self.views])
        maps = encoder.fibres(images)
        fibres = self.line(maps)
        if self.config.positives == "fibres":
            first, second = pick(fibres, batch.draw[:, 0]), pick(fibres, batch.draw[:, 1])
        else:
            first, second = pick(fibres, batch.draw[:, 0].repeat(2)).chunk(2)
        z1, z2 = joint(self.projector, gather(first), gather(second))
        loss = info_nce(z1, z2, self.config.beta, self.config.denominator)
        return Losses(loss, {"info_nce": loss.detach()}, encoder.pool(maps)[: len(batch.indices)])

    def line(self, maps: Tensor) -> Tensor:
        """The fibres (N, C, places) of the group that is contrasted."""
        if self.config.group == "translation":
            line = maps.amax(dim=2).flatten(2)
        else:
            line = maps.mean(dim=(3, 4))
        if line.shape[2] == 1 and self.config.positives == "fibres":
            raise GeomsslError(
                f"hssl over {self.config.group} on an encoder with fibres of shape {tuple(maps.shape[1:])} (C, G, H, W)",
                "more than one fibre along the group, such as encoder c4-cnn for rotation", reason="no-group",
            )
        return line


def pick(fibres: Tensor, draw: Tensor) -> Tensor:
    """The fibre (N, C) at place floor(draw · places) of each example; fibres (N, C, places), draw uniform in [0, 1)."""
    place = (draw * fibres.shape[2]).long().clamp_(max=fibres.shape[2] - 1)
    return fibres.gather(2, place[:, None, None].expand(-1, fibres.shape[1], 1))[:, :, 0]
