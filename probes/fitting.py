"""What a readout of frozen features stands on: standardised columns, parts held out, and the schedule of row C8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from geomssl.seeding import generator

Solver = Literal["lbfgs", "sgd"]
STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
# Row C8: Xu and Triesch, CIPER, section 4.1. The batch they do not say.
EPOCHS, RATE, FALL, EVERY, MOMENTUM, DECAY, BATCH = 100, 1.0, 3.33, 10, 0.9, 1e-6, 256


def standard(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation of each column; 0 where it varies no more than float32 rounds.

    A spread at the level of rounding is no feature; dividing by it would make it one.
    """
    mean, std = values.mean(dim=0), values.std(dim=0, correction=0)
    return mean, torch.where(std > 1e-6 * mean.abs(), 1 / std.clamp(min=1e-300), 0.0)


def undone(scale: Tensor) -> Tensor:
    """The standard deviation that `standard` divided by; 0 where it found none."""
    return torch.where(scale > 0, 1 / scale.clamp(min=1e-300), 0.0)


def stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices kept and held out: round(share n_c) of every class, and always one of each kept."""
    kept, aside = [], []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator(seed, "linear-held-out", int(label)))]
        cut = min(round(share * len(members)), len(members) - 1)
        aside.append(members[:cut])
        kept.append(members[cut:])
    return torch.cat(kept).sort().values, torch.cat(aside).sort().values


def held_out(unit: Tensor, share: float, seed: int) -> Tensor:
    """bool (n,): the rows of a drawn share of the units 0, 1, ..., at least one and not all: no unit is on both sides."""
    count = int(unit.max()) + 1
    aside = max(1, min(count - 1, round(share * count)))
    drawn = torch.randperm(count, generator=generator(seed, "regress-held-out"))[:aside]
    return torch.isin(unit, drawn)


def descend(rows: Tensor, outputs: int, loss: Callable[[Tensor, Tensor], Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Weight (outputs, d) and bias (outputs,) of a linear map of rows (n, d), by the schedule of row C8, in float64.

        minimise  loss(W x_i + b, i) + 1e-6 / 2 ||W||^2

    SGD with Nesterov momentum .9, 100 epochs of drawn batches of at most 256 and nearly equal size, the rate from 1 divided by
    3.33 after every 10 epochs; starts at zero; the last step counts. loss(outputs (b, k), indices (b,)) -> scalar, a mean.
    The rate is stable for rows of mean square length 1. Deterministic by seed.
    """
    weight = torch.zeros(outputs, rows.shape[1], dtype=rows.dtype, requires_grad=True)
    bias = torch.zeros(outputs, dtype=rows.dtype, requires_grad=True)
    groups: list[dict[str, Any]] = [{"params": [weight], "weight_decay": DECAY}, {"params": [bias]}]
    optimizer = torch.optim.SGD(groups, lr=RATE, momentum=MOMENTUM, nesterov=True)
    draw = generator(seed, "linear-sgd")
    with torch.enable_grad():
        for epoch in range(EPOCHS):
            for group in optimizer.param_groups:
                group["lr"] = RATE / FALL ** (epoch // EVERY)
            for chosen in torch.randperm(len(rows), generator=draw).chunk(-(-len(rows) // BATCH)):
                optimizer.zero_grad()
                loss(torch.nn.functional.linear(rows[chosen], weight, bias), chosen).backward()
                optimizer.step()
    return weight.detach(), bias.detach()
