"""Critics: what makes a number of two bundles of fibres: InfoNCE (cosine or log-bilinear), BYOL, SimSiam (rows H9, H13)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from geomssl.caching import Cache, Through
from geomssl.encoders.base import Encoder
from geomssl.heads import predictor
from geomssl.losses import Denominator, bilinear_info_nce, cosine_regression, info_nce
from geomssl.objectives.base import joint

Pair = tuple[Tensor, Tensor]


class Contrast(nn.Module):
    """InfoNCE of the projections of a pair. weight: W of a log-bilinear critic, or None for the cosine.

    W starts as 1/p: of rows of norm sqrt(p), which the projector's last BatchNorm leaves on average, a' W b is then the cosine.
    """

    weight: nn.Parameter | None

    def __init__(self, beta: float, denominator: Denominator, width: int | None = None) -> None:
        super().__init__()
        self.beta, self.denominator = beta, denominator
        self.weight = None if width is None else nn.Parameter(torch.eye(width) / width)

    def forward(self, projector: nn.Module, pair: Pair, target: Pair | None = None) -> Tensor:
        z1, z2 = joint(projector, *pair)
        if self.weight is None:
            return info_nce(z1, z2, self.beta, self.denominator)
        return bilinear_info_nce(z1, z2, self.weight, self.beta, self.denominator)


class SimSiam(nn.Module):
    """L = -[cos(q(z1), z2) + cos(q(z2), z1)] / 2, the second argument without gradient, q the predictor (Chen and He 2021)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.predictor = predictor(width, hidden)

    def forward(self, projector: nn.Module, pair: Pair, target: Pair | None = None) -> Tensor:
        z1, z2 = joint(projector, *pair)
        p1, p2 = joint(self.predictor, z1, z2)
        return (cosine_regression(p1, z2) + cosine_regression(p2, z1)) / 2


class BYOL(nn.Module):
    """L = 2 - [cos(q(z1), z2') + cos(q(z2), z1')]: z' by a target network that follows without gradients (Grill et al. 2020).

    target: a copy of encoder and projector, w' <- m w' + (1 - m) w. It moves at the start of a train-mode step, by the weights
    that the last step left; m is constant. Its BatchNorm runs in the mode of the encoder's, with running statistics of its
    own, in each process by itself. All of it lies in the checkpoint. L is the mean of both directions' ||q - z'||^2 of unit
    rows.
    """

    def __init__(self, width: int, hidden: int, momentum: float, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.predictor, self.momentum = predictor(width, hidden), momentum
        self.target = nn.ModuleDict({"encoder": copy.deepcopy(encoder), "projector": copy.deepcopy(projector)})
        self.target.requires_grad_(False)

    @torch.no_grad()
    def follow(self, encoder: Encoder, projector: nn.Module) -> None:
        """Move the target's weights towards these."""
        followers: list[Tensor] = list(self.target.parameters())
        leaders: list[Tensor] = [p for module in (bare(encoder), projector) for p in module.parameters()]
        torch._foreach_lerp_(followers, leaders, 1 - self.momentum)

    @torch.no_grad()
    def fibres(self, encoder: Encoder, images: Tensor) -> Tensor:
        """The target's fibres, in the micro-batches of a cached step."""
        target: Any = self.target["encoder"]
        target.train(bare(encoder).training)
        parts = -(-len(images) // encoder.micro_batch) if isinstance(encoder, Cache) else 1
        if parts == 1:
            return target.fibres(images)
        chunks = [target.fibres(images[i::parts]) for i in range(parts)]
        maps = chunks[0].new_empty(len(images), *chunks[0].shape[1:])
        for i, chunk in enumerate(chunks):
            maps[i::parts] = chunk
        return maps

    def forward(self, projector: nn.Module, pair: Pair, target: Pair | None = None) -> Tensor:
        assert target is not None
        p1, p2 = joint(self.predictor, *joint(projector, *pair))
        with torch.no_grad():
            t1, t2 = joint(self.target["projector"], *target)
        return 2 + cosine_regression(p1, t2) + cosine_regression(p2, t1)


def bare(encoder: Encoder) -> Encoder:
    """The encoder itself, where another stands before it for a step."""
    return encoder.encoder if isinstance(encoder, Through) else encoder
