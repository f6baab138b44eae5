"""Reconstruction: an invariant half by VICReg, an equivariant half by painting view 2 from view 1 (rows X1, X2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from geomssl.data.base import Source
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.heads import regressor
from geomssl.losses import vicreg, wide
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, joint
from geomssl.objectives.decoder import Decoder, token_grid, tokens
from geomssl.objectives.halves import Halves, HalvesSettings, InvariantProjector, head
from geomssl.objectives.pairs import paired
from geomssl.objectives.vicreg import named
from geomssl.transforms import policy


class Reconstruction(Objective):
    """L = ssl VICReg(z_inv1, z_inv2) + reconstruction MSE(decoder(e1, e2), view 2), with no parameter of any transformation.

    z_inv is a head on the invariant half of h; e are the equivariant halves of the tokens (N, G H W, half) through a head of
    their own to `width`. Tokens are the places of the encoder's fibres: a vision transformer's patches, or the map of any
    other backbone, every orientation a token of its own. h is the pooled map, so an encoder with a class token is refused.
    See Decoder for how view 2 enters. The pixels are those of the images in [0, 1], and the mean is over all of them.
    """

    class Config(HalvesSettings):
        name: Literal["reconstruction"] = "reconstruction"
        ssl: float = Field(1.0, ge=0, description="weight of VICReg on the invariant half")
        reconstruction: float = Field(25.0, ge=0, description="weight of the reconstruction")
        width: PositiveInt = Field(192, description="width of the decoder")
        depth: PositiveInt = Field(6, description="blocks of the decoder, the first of which is the cross-attention")
        heads: PositiveInt = Field(3, description="attention heads of each block")

    decoder: Decoder

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config, self.channels = config, channels
        self.projector = InvariantProjector(Halves(encoder.dim, config.half), head(config.half, config.projector))
        self.equivariant = regressor((config.half, config.width, config.width))
        drawn = policy(config.policy)
        self.views = (ViewSpec("1", drawn), ViewSpec("2", drawn))

    def complete(self, encoder: Encoder, size: int, source: Source | None) -> None:
        config = self.config
        self.views = paired(self.views, config, source)
        orientations, side = token_grid(encoder, self.channels, size)
        self.decoder = Decoder(config.width, config.depth, config.heads, self.channels, size, orientations, side)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        seen = batch.views["2"].images
        maps = encoder.fibres(torch.cat([batch.views["1"].images, seen]))
        h1, h2 = encoder.pool(maps).chunk(2)
        z1, z2 = joint(self.projector, gather(h1), gather(h2))
        terms = vicreg(z1, z2, self.config.form)
        # a mean over this process's own images: their pixels meet no one else's
        error = F.mse_loss(wide(self.painted(maps)), seen)
        total = self.config.ssl * self.config.total(terms) + self.config.reconstruction * error
        return Losses(total, {**named(terms), "reconstruction": error.detach()}, h1)

    def painted(self, maps: Tensor) -> Tensor:
        """View 2 (N, C, size, size), made of the fibres of both views, (2N, C, G, H, W), view 1 first."""
        assert isinstance(self.projector, InvariantProjector)
        e1, e2 = self.equivariant(self.projector.halves(tokens(maps))[1]).chunk(2)
        return self.decoder(e1, e2)
