"""The generator of one kind of augmentation in feature space: v = eps G h, fitted by regression and followed by exp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import checks

# ridge penalties that are tried, as shares of the largest squared singular value
PENALTIES = tuple(10.0**k for k in range(-12, 2))
# exp is followed in steps of at most one ||eps G||; past this many, the fit is no flow worth following
STEPS, TERMS = 64, 20


@dataclass(frozen=True)
class FittedGenerator:
    """v = eps G h by ridge regression. matrix: G (d, d), float64. constant: c (d,) of v = eps c, which asks nothing of h.

    penalty: the ridge, as a share of the largest squared singular value of the rows eps h. n: pairs that it was fitted on.
    """

    matrix: Tensor
    constant: Tensor
    penalty: float
    n: int

    def step(self, h: Tensor, eps: Tensor) -> Tensor:
        """eps_i G h_i, (n, d)."""
        return eps[:, None] * (h @ self.matrix.T)

    def flow(self, h: Tensor, eps: Tensor) -> Tensor | None:
        """exp(eps_i G) h_i - h_i, (n, d), by Taylor series in steps; None where eps G is too large to follow."""
        size = float(eps.abs().max()) * float(torch.linalg.matrix_norm(self.matrix, 2))
        steps = max(1, math.ceil(size))
        if steps > STEPS:
            return None
        at = h
        for _ in range(steps):
            term = at
            for k in range(1, TERMS + 1):
                term = self.step(term, eps / (steps * k))
                at = at + term
        return at - h


def fit_generator(h: Tensor, v: Tensor, eps: Tensor, penalties: Sequence[float] = PENALTIES) -> FittedGenerator:
    """The G that best gives v_i = eps_i G h_i, through the origin: no movement where eps is 0.

        G = argmin_G sum_i ||v_i - eps_i G h_i||^2 + lambda ||G||_F^2

    lambda by leave-one-out over `penalties` (shares of the largest squared singular value of the rows eps h), in closed form
    (PRESS); (0.0,) is plain least squares. h, v: (n, d); eps: (n,). The linearised exp(eps G) h of
    Cosentino et al. 2022, Sec. 4 and App. D.5. One G for all images is the hypothesis that the held-out R^2 tests.
    Raises GeomsslError for shapes that do not fit, fewer than 4 pairs, or eps that are all zero.
    """
    x, y = checks.matrix(h, "features h"), checks.matrix(v, "directions v")
    if x.shape != y.shape or eps.shape != (len(x),) or len(x) < 4:
        raise GeomsslError(
            f"h {tuple(h.shape)}, v {tuple(v.shape)} and eps {tuple(eps.shape)}", "(n, d), (n, d) and (n,) with n >= 4",
            reason="bad-shape",
        )
    e = eps.detach().to("cpu", torch.float64)
    if not (torch.isfinite(e).all() and e.square().sum() > 0 and x.square().sum() > 0):
        raise GeomsslError("eps or h that are all zero, or not finite", "some that are not", reason="degenerate")
    left, s, right = torch.linalg.svd(e[:, None] * x, full_matrices=False)
    kept = s > max(x.shape) * torch.finfo(torch.float64).eps * s[0]
    left, s, right = left[:, kept], s[kept], right[kept]
    seen = left.T @ y

    def press(penalty: float) -> float:
        shrunk = s.square() / (s.square() + penalty * s[0] ** 2)
        residual = y - left @ (shrunk[:, None] * seen)
        leverage = (left.square() * shrunk).sum(dim=1)
        return float((residual.square().sum(dim=1) / (1 - leverage).clamp(min=1e-9).square()).sum())

    best = min(penalties, key=press)
    matrix = (right.T @ ((s / (s.square() + best * s[0] ** 2))[:, None] * seen)).T
    constant = (e[:, None] * y).sum(dim=0) / e.square().sum()
    return FittedGenerator(matrix, constant, best, len(x))
