"""A representation split in an invariant and an equivariant half (row X1), and what both halves' objectives set."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

from geomssl.heads import mlp
from geomssl.objectives.pairs import PairSettings
from geomssl.objectives.vicreg import VICRegSettings


class HalvesSettings(VICRegSettings, PairSettings):
    """The split and its heads."""

    policy: str = Field("equivariant", description="augmentation policy")
    half: int = Field(256, ge=1, description="width of each half")
    projector: tuple[int, ...] = Field((512, 192), min_length=1, description="widths of the head of each half")


class Halves(nn.Module):
    """y = W h, (N, ..., 2 half): the first half is the invariant one, the second the equivariant one.

    W is a linear map without a bias where h is not 2 half wide (ViT-Small's 384 to 512), and the identity where it is
    (ResNet-18's 512): then the halves are those of the representation itself.
    """

    def __init__(self, dim: int, half: int) -> None:
        super().__init__()
        self.each = half
        self.map: nn.Module = nn.Identity() if dim == 2 * half else nn.Linear(dim, 2 * half, bias=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        y = self.map(h)
        return y[..., : self.each], y[..., self.each :]


class InvariantProjector(nn.Module):
    """From h to the embedding of its invariant half: split and head as one projector, for the probes."""

    def __init__(self, halves: Halves, head: nn.Module) -> None:
        super().__init__()
        self.halves, self.head = halves, head

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.halves(h)[0])


def head(half: int, widths: tuple[int, ...]) -> nn.Sequential:
    """The head of one half: as VICReg's, without a norm after its last layer."""
    return mlp((half, *widths), last_norm=False)
