"""Ridge regression on frozen features: what a linear map reads of a number, its penalty chosen on rows apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import checks
from geomssl.probes.fitting import DECAY, STRENGTHS, Solver, descend, standard, undone
from geomssl.probes.fitting import held_out as drawn_units


@dataclass(frozen=True)
class Ridge:
    """predicted = features @ weight.T + bias, weight (k, d), float64. strength: the lambda that was used. losses: of every
    lambda on the part held out, the mean over targets of squared error / variance; empty where nothing was chosen."""

    weight: Tensor
    bias: Tensor
    strength: float
    losses: tuple[float, ...] = ()

    def predict(self, features: Tensor) -> Tensor:
        """Targets (n, k) of features (n, d), in their own unit."""
        return features.to(self.weight) @ self.weight.T + self.bias


def fit(
    features: Tensor, targets: Tensor, seed: int = 0, strengths: Sequence[float] = STRENGTHS, held_out: float = 0.2,
    unit: Tensor | None = None, solver: Solver = "lbfgs",
) -> Ridge:
    """Linear regression of targets (n, k) on frozen features (n, d).

        minimise over W, b   mean_i ||W x_i + b - y_i||^2 + lambda ||W||^2,    x and y standardised by the training set

    lbfgs (a quadratic needs no iteration): solved exactly by Cholesky in float64, for each lambda of `strengths` on a part
    of the rows; the one with the least loss on the rest (a share `held_out` of the units (n,), or of the rows; ties to the
    strongest) is solved again on all of them. sgd: the schedule of row C8 (`fitting.descend`) on x / sqrt(number of features
    that vary) and half the squared error, whose curvature the rate 1 can bear; lambda = 1e-6 times that number.
    Features and targets that do not vary weigh nothing. Deterministic. Raises GeomsslError for values that are not finite
    and for fewer than four rows.
    """
    exact, wanted = checks.matrix(features, "features"), checks.matrix(targets, "targets")
    if len(exact) < 4:
        raise GeomsslError(f"{len(exact)} images to fit on", "at least 4", reason="too-few-images")
    if solver == "sgd":
        return _scheduled(exact, wanted, seed)
    rows = torch.arange(len(exact)) if unit is None else unit.unique(return_inverse=True)[1]
    if len(strengths) == 1 or int(rows.max()) == 0:
        return _solved(exact, wanted, [max(strengths)])[0]
    aside = drawn_units(rows, held_out, seed)
    if int((~aside).sum()) < 2:
        aside = drawn_units(torch.arange(len(exact)), held_out, seed)
    _, shrink = standard(wanted)
    order = sorted(strengths, reverse=True)
    trials = _solved(exact[~aside], wanted[~aside], order)
    errors = [float(((t.predict(exact[aside]) - wanted[aside]) * shrink).square().mean()) for t in trials]
    best = errors.index(min(errors))
    found = _solved(exact, wanted, [order[best]])[0]
    return Ridge(found.weight, found.bias, order[best], tuple(errors))


def _solved(exact: Tensor, wanted: Tensor, strengths: Sequence[float]) -> list[Ridge]:
    """One solution for each lambda, from the smaller of X'X and XX'."""
    mean, scale = standard(exact)
    centre, shrink = standard(wanted)
    x, y = (exact - mean) * scale, (wanted - centre) * shrink
    n, d = x.shape
    wide = d > n
    gram = (x @ x.T if wide else x.T @ x) / n
    spread = undone(shrink)
    found = []
    for strength in strengths:
        factor = torch.linalg.cholesky(gram + strength * torch.eye(len(gram), dtype=gram.dtype))
        solution = x.T @ torch.cholesky_solve(y / n, factor) if wide else torch.cholesky_solve(x.T @ y / n, factor)
        weight = spread[:, None] * solution.T * scale
        found.append(Ridge(weight, centre - weight @ mean, strength))
    return found


def _scheduled(exact: Tensor, wanted: Tensor, seed: int) -> Ridge:
    mean, scale = standard(exact)
    centre, shrink = standard(wanted)
    varying = max(1, int((scale > 0).sum()))
    scale = scale / math.sqrt(varying)
    y = (wanted - centre) * shrink
    weight, bias = descend(
        (exact - mean) * scale, y.shape[1], lambda said, chosen: (said - y[chosen]).square().sum(dim=1).mean() / 2, seed
    )
    spread = undone(shrink)
    weight = spread[:, None] * weight * scale
    return Ridge(weight, spread * bias + centre - weight @ mean, DECAY * varying)
