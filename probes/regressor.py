"""A three-layer perceptron that regresses what was done from features of both views, its weight decay chosen on pairs apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import checks
from geomssl.probes.fitting import standard, undone
from geomssl.progress import track
from geomssl.seeding import generator

DECAYS = (0.1, 3.0, 30.0)
BATCH, RATE = 128, 3e-3
# Wider features of one view are projected onto this many random directions: else the first layer would be most of the work.
WIDEST = 1024
# standard deviations; a Gaussian feature never gets there
FAR = 10.0


@dataclass(frozen=True)
class Fitted:
    """predicted (m, P): targets of the test pairs, float64, in their own unit. decay: the weight decay that was chosen.
    losses: of each decay on the pairs held out, the mean over targets of squared error / variance."""

    predicted: Tensor
    decay: float
    losses: tuple[float, ...]


def fit(
    train: Tensor, targets: Tensor, held: Tensor, held_targets: Tensor, test: Tensor, seed: int = 0, hidden: int = 128,
    steps: int = 300, decays: Sequence[float] = DECAYS,
) -> Fitted:
    """Regress targets (n, P) on features (n, D) of pairs and predict those of `test` (m, D).

        minimise  mean_i |W3 relu(W2 relu(W1 x_i + b1) + b2) + b3 - y_i|^2,   x and y standardised by the training pairs

    Adam with decoupled weight decay, batches of at most 128 pairs, a rate that falls to 0 by a cosine, `steps` steps; the last
    one counts. One network for each decay, trained side by side on the same batches; the one with the least loss on the pairs
    held out is used (ties to the strongest). Training in float32 on the CPU, standardisation and losses in float64.
    Features and targets that do not vary in the training pairs weigh nothing. What lies more than 10 standard deviations from
    its mean counts as 10: else a pixel that is dark in nearly all training images sends the perceptron far from all it knows.
    Deterministic by seed.
    Raises GeomsslError for values that are not finite and for fewer than two pairs in a part.
    """
    if min(len(train), len(held), len(test)) < 2:
        raise GeomsslError(
            f"{len(train)}, {len(held)} and {len(test)} pairs to train, choose and test on", "at least 2 of each",
            reason="too-few-images",
        )
    exact = [checks.matrix(values, "features") for values in (train, held, test)]
    wanted, aside = (checks.matrix(values, "targets") for values in (targets, held_targets))
    mean, scale = standard(exact[0])
    rows, others, asked = (((values - mean) * scale).clamp(-FAR, FAR).float() for values in exact)
    centre, shrink = standard(wanted)
    layers = _initial(len(decays), (rows.shape[1], hidden, hidden, wanted.shape[1]), seed)
    _train(layers, rows, ((wanted - centre) * shrink).float(), seed, steps, decays)
    with torch.no_grad():
        errors = (_apply(layers, others).double() - (aside - centre) * shrink).square().mean(dim=(1, 2)).tolist()
        best = max(range(len(decays)), key=lambda k: (-errors[k], decays[k]))
        found = _apply(layers, asked)[best].double()
    spread = undone(shrink)
    return Fitted(found * spread + centre, decays[best], tuple(errors))


def projected(features: Tensor, seed: int) -> Tensor:
    """Features (n, d) as they are, or where d > 1024 on 1024 random directions, which keep distances to a few per cent."""
    if features.shape[1] <= WIDEST:
        return features
    draw = generator(seed, "regress-project", features.shape[1])
    directions = torch.randn(features.shape[1], WIDEST, generator=draw) / math.sqrt(WIDEST)
    return torch.cat([chunk.float() @ directions for chunk in features.split(4096)])


def _initial(count: int, widths: Sequence[int], seed: int) -> list[Tensor]:
    """Weights (count, in, out) and biases (count, 1, out) of every layer; He's variance, the same for each network."""
    draw, layers = generator(seed, "regress-initialise"), []
    for before, after in pairwise(widths):
        weight = torch.randn(before, after, generator=draw) * math.sqrt(2 / before)
        layers += [weight.repeat(count, 1, 1), torch.zeros(count, 1, after)]
    return [layer.requires_grad_() for layer in layers]


def _apply(layers: Sequence[Tensor], rows: Tensor) -> Tensor:
    """What every network says of rows (n, D): (count, n, P)."""
    found = rows.expand(len(layers[0]), -1, -1)
    for weight, bias in zip(layers[:-2:2], layers[1:-2:2], strict=True):
        found = torch.baddbmm(bias, found, weight).relu()
    return torch.baddbmm(layers[-1], found, layers[-2])


def _train(
    layers: list[Tensor], rows: Tensor, targets: Tensor, seed: int, steps: int, decays: Sequence[float]
) -> None:
    optimizer = torch.optim.Adam(layers, lr=RATE, fused=True)
    strength = torch.tensor(decays).view(-1, 1, 1)
    draw = generator(seed, "regress-batches")
    size = min(BATCH, len(rows))
    for step in track(range(steps), "fit regressor", steps):
        rate = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = rate
        chosen = torch.randint(len(rows), (size,), generator=draw)
        # the sum over networks: each one's gradient is its own
        loss = (_apply(layers, rows[chosen]) - targets[chosen]).square().mean(dim=(1, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for weight in layers[::2]:
                weight.mul_(1 - rate * strength)
