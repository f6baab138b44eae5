"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from geomssl.config import Settings


class _Config(Settings):
    lr: float = Field(0.03, gt=0, description="peak learning rate")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay")
    warmup_epochs: float = Field(0, ge=0, description="epochs of linear warm-up from 0")


class SGD:
    """Momentum SGD, v <- m v + (grad + wd w), w <- w - lr v."""

    class Config(_Config):
        name: Literal["sgd"] = "sgd"
        momentum: float = Field(0.9, ge=0, lt=1, description="momentum")
        nesterov: bool = Field(False, description="Nesterov momentum")

    @staticmethod
    def build(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov,
            fused=_fused(parameters),
        )


class AdamW:
    """Adam with decoupled weight decay."""

    class Config(_Config):
        name: Literal["adamw"] = "adamw"
        lr: float = Field(1e-3, gt=0, description="peak learning rate")
        betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")

    @staticmethod
    def build(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = list(parameters)
        return torch.optim.AdamW(
            parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, fused=_fused(parameters)
        )


class LARS:
    """Layer-wise adaptive rates, with the trust ratio of You et al. 2017 and the momentum of torch.optim.SGD.

        r = eta |w| / (|g| + wd |w|)         r = 1 where w = 0 or the denominator is 0
        v <- m v + r (g + wd w)              w <- w - lr v

    Biases and the parameters of norms, which are the vectors and scalars of a model, take v <- m v + g: neither adaptation
    nor decay, as in SimCLR (Chen et al. 2020). Variants differ. SimCLR's own code divides by |g + wd w|; the paper of You et
    al. has lr inside v, which is another method where the rate changes. This is pytorch_optimizer's (4.1 or later).
    """

    class Config(_Config):
        name: Literal["lars"] = "lars"
        lr: float = Field(0.3, gt=0, description="peak learning rate")
        weight_decay: float = Field(1e-4, ge=0, description="weight decay of matrices and filters")
        momentum: float = Field(0.9, ge=0, lt=1, description="momentum")
        trust: float = Field(1e-3, gt=0, description="eta, the trust coefficient")

    @staticmethod
    def build(config: Config, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        from pytorch_optimizer import LARS as Layerwise

        return Layerwise(
            list(parameters), lr=config.lr, weight_decay=config.weight_decay, momentum=config.momentum,
            trust_coefficient=config.trust,
        )


def _fused(parameters: list[nn.Parameter]) -> bool | None:
    """On cuda True: one kernel, which also reads the gradient scaler's verdict there, where others ask the host each step."""
    return True if parameters and all(p.is_cuda for p in parameters) else None


def learning_rate(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then a cosine to zero: lr(t) = peak t/w for t < w, else peak (1 + cos(pi (t-w)/(T-w))) / 2.

    t counts from 1 in the warm-up, so that the first step moves; T = steps of the whole training.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
