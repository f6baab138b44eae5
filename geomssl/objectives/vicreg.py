"""VICReg: two views agree, each number varies over the batch, and no two numbers say the same (row X4)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Source
from geomssl.encoders.base import Encoder
from geomssl.heads import mlp
from geomssl.losses import Form, VICRegTerms, vicreg
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, encoded, joint
from geomssl.objectives.pairs import PairSettings, paired
from geomssl.transforms import policy


class VICRegSettings(Settings):
    """The weights of the three terms."""

    invariance: float = Field(25.0, ge=0, description="weight of the invariance term")
    variance: float = Field(25.0, ge=0, description="weight of the variance term")
    covariance: float = Field(1.0, ge=0, description="weight of the covariance term")
    form: Form = Field("released", description="the terms as the authors' code has them, or as they are printed")

    def total(self, terms: VICRegTerms) -> Tensor:
        """The weighted sum."""
        return terms.total(self.invariance, self.variance, self.covariance)


class VICReg(Objective):
    """L = 25 invariance + 25 variance + covariance of z1 and z2, z = projector(h(view)); losses.vicreg gives the terms.

    Statistics are those of the joined batch of all processes. The last layer of the projector has no norm: it would fix
    what the variance term is about.
    """

    class Config(VICRegSettings, PairSettings):
        name: Literal["vicreg"] = "vicreg"
        policy: str = Field("equivariant", description="augmentation policy of both views")
        projector: tuple[int, ...] = Field((512, 192), min_length=1, description="widths of the projector (the expander)")

    def __init__(self, config: Config, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        self.projector = mlp((encoder.dim, *config.projector), last_norm=False)
        drawn = policy(config.policy)
        self.views = (ViewSpec("1", drawn), ViewSpec("2", drawn))

    def complete(self, encoder: Encoder, size: int, source: Source | None) -> None:
        self.views = paired(self.views, self.config, source)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        assert self.projector is not None
        (h1, h2), own = encoded(encoder, batch.views["1"].images, batch.views["2"].images)
        z1, z2 = joint(self.projector, h1, h2)
        terms = vicreg(z1, z2, self.config.form)
        return Losses(self.config.total(terms), named(terms), own)


def named(terms: VICRegTerms) -> dict[str, Tensor]:
    """The terms by name, detached."""
    return {name: getattr(terms, name).detach() for name in ("invariance", "variance", "covariance")}
