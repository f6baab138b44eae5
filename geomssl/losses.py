"""Contrastive losses on pairs of representations, and the bound that explains them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.errors import GeomsslError, unknown

Denominator = Literal["decoupled", "nt-xent", "pooled"]


def info_nce(
    z1: Tensor, z2: Tensor, beta: float = 10.0, denominator: Denominator = "decoupled", symmetric: bool = False
) -> Tensor:
    """InfoNCE of N pairs, rows normalised inside; the anchors are the rows of z1.

        L = -1/N sum_i [ beta s(z1_i, z2_i) - log D_i ],     s = cosine similarity

        decoupled  D_i = sum over l in B_i of exp(beta s(z1_i, z_l)),  B_i = both views of every k != i: 2(N-1) terms
        nt-xent    D_i = the same plus exp(beta s(z1_i, z2_i))
        pooled     D_i = sum over k != i and j, l in {1, 2} of exp(beta s(zj_i, zl_k)): 4(N-1) terms

    z1, z2: (N, p), N >= 2. beta: inverse temperature, >= 0. symmetric: the mean over both directions, as SimCLR trains
    (pooled is symmetric by itself). Returns a scalar in the dtype of z1, sums of exponentials by log-sum-exp; half
    precision is computed and returned in float32, also under autocast.
    Raises GeomsslError for fewer than two pairs, unequal shapes or an unknown denominator.
    Sources: decoupled, Cosentino et al., Eq. 1; pooled, Keller et al., Eq. 2 and 3; nt-xent, Chen et al. 2020.
    """
    _check(z1, z2, beta)
    if denominator not in get_args(Denominator):
        raise unknown("denominator", denominator, get_args(Denominator))
    with torch.autocast(z1.device.type, enabled=False):
        a, b = F.normalize(wide(z1), dim=1), F.normalize(wide(z2), dim=1)
        return _info_nce(a, b, beta, denominator, symmetric)


def _info_nce(a: Tensor, b: Tensor, beta: float, denominator: Denominator, symmetric: bool) -> Tensor:
    """The same of unit rows."""
    positive = beta * (a * b).sum(dim=1)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    across = (beta * a @ b.T).masked_fill(own, -math.inf)
    within1 = (beta * a @ a.T).masked_fill(own, -math.inf)
    if denominator != "pooled" and not symmetric:
        return (_log_denominator([across, within1], positive, denominator) - positive).mean()
    within2 = (beta * b @ b.T).masked_fill(own, -math.inf)
    if denominator == "pooled":
        return (_log_denominator([across, across.T, within1, within2], positive, denominator) - positive).mean()
    forward = _log_denominator([across, within1], positive, denominator)
    backward = _log_denominator([across.T, within2], positive, denominator)
    return ((forward + backward) / 2 - positive).mean()


def wide(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are. Losses are computed on this."""
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True)
class Bound:
    """total = beta invariance + beta repulsion + constant, an upper bound of the decoupled InfoNCE of the same batch."""

    total: Tensor
    invariance: Tensor
    repulsion: Tensor
    constant: float


def info_nce_upper_bound(z1: Tensor, z2: Tensor, beta: float) -> Bound:
    """The upper bound of the decoupled InfoNCE with anchors z1 (Cosentino et al., Eq. 3).

        invariance = -mean_i s(z1_i, z2_i),  repulsion = mean_i max over l in B_i of s(z1_i, z_l),  constant = log 2(N-1)

    It holds for every batch: log sum_l exp(beta s_l) <= beta max_l s_l + log 2(N-1). Equality when all s_l are equal.
    """
    _check(z1, z2, beta)
    a, b = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    own = torch.eye(len(a), dtype=torch.bool, device=a.device)
    hardest = torch.maximum(
        (a @ a.T).masked_fill(own, -math.inf).amax(dim=1), (a @ b.T).masked_fill(own, -math.inf).amax(dim=1)
    )
    invariance, repulsion = -(a * b).sum(dim=1).mean(), hardest.mean()
    constant = math.log(2 * (len(a) - 1))
    return Bound(beta * invariance + beta * repulsion + constant, invariance, repulsion, constant)


def _log_denominator(similarities: list[Tensor], positive: Tensor, denominator: Denominator) -> Tensor:
    terms = [*similarities, positive[:, None]] if denominator == "nt-xent" else similarities
    return torch.cat(terms, dim=1).logsumexp(dim=1)


def _check(z1: Tensor, z2: Tensor, beta: float) -> None:
    if z1.shape != z2.shape or z1.dim() != 2:
        given = f"pairs of shapes {tuple(z1.shape)} and {tuple(z2.shape)}"
        raise GeomsslError(given, "two matrices (N, p)", reason="bad-shape")
    if len(z1) < 2:
        raise GeomsslError(f"a batch of {len(z1)}", "at least 2 pairs: one pair has no negatives", reason="batch-too-small")
    if not beta >= 0:
        raise GeomsslError(f"beta = {beta}", "an inverse temperature >= 0", reason="bad-value")
