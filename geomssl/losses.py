"""Losses on pairs of representations, contrastive and not, and the bound that explains the first."""

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
    _check(z1, z2, beta, denominator)
    with torch.autocast(z1.device.type, enabled=False):
        a, b = F.normalize(wide(z1), dim=1), F.normalize(wide(z2), dim=1)
        return _info_nce(_Scores(beta * (a * b).sum(dim=1), beta * a, a, beta * b, b), denominator, symmetric)


def bilinear_info_nce(
    z1: Tensor, z2: Tensor, weight: Tensor, beta: float = 10.0, denominator: Denominator = "pooled", symmetric: bool = False
) -> Tensor:
    """InfoNCE with the log-bilinear critic s(a, b) = a' W b in place of the cosine; rows are not normalised.

    Denominators, shapes and errors as info_nce; weight W (p, p). s(a, b) is not s(b, a): pooled sums all four blocks
    s(zj_i, zl_k), and the positive is s(z1_i, z2_i); symmetric averages over s(z1_i, z2_i) and s(z2_i, z1_i).
    exp(beta a' W b) is how the printed exp(exp(a' W b)) / tau is read, beta = 1 / tau. Both a and b are local features of
    one pass (local-local), where Deep InfoMax proper sets a local one against a global one.
    Sources: Keller et al., Eq. 5; van den Oord et al. 2018; Hjelm et al. 2019.
    """
    _check(z1, z2, beta, denominator)
    if weight.shape != (z1.shape[1], z1.shape[1]):
        wanted = f"({z1.shape[1]}, {z1.shape[1]}), as z"
        raise GeomsslError(f"a critic's weight of shape {tuple(weight.shape)}", wanted, reason="bad-shape")
    with torch.autocast(z1.device.type, enabled=False):
        a, b, w = wide(z1), wide(z2), beta * wide(weight)
        aw, bw = a @ w, b @ w
        return _info_nce(_Scores((aw * b).sum(dim=1), aw, a, bw, b, (bw * a).sum(dim=1)), denominator, symmetric)


@dataclass(frozen=True)
class _Scores:
    """beta s as products: s(a_i, x_k) = left_a_i . x_k. backward: the positives s(b_i, a_i), where they are not s(a_i, b_i)."""

    positive: Tensor
    left_a: Tensor
    a: Tensor
    left_b: Tensor
    b: Tensor
    backward: Tensor | None = None


def _info_nce(of: _Scores, denominator: Denominator, symmetric: bool) -> Tensor:
    own = torch.eye(len(of.a), dtype=torch.bool, device=of.a.device)
    across = (of.left_a @ of.b.T).masked_fill(own, -math.inf)
    within1 = (of.left_a @ of.a.T).masked_fill(own, -math.inf)
    if denominator != "pooled" and not symmetric:
        return (_log_denominator([across, within1], of.positive, denominator) - of.positive).mean()
    within2 = (of.left_b @ of.b.T).masked_fill(own, -math.inf)
    back = across.T if of.backward is None else (of.left_b @ of.a.T).masked_fill(own, -math.inf)
    returned = of.positive if of.backward is None else of.backward
    positive = (of.positive + returned) / 2 if symmetric else of.positive
    if denominator == "pooled":
        return (_log_denominator([across, back, within1, within2], positive, denominator) - positive).mean()
    forward = _log_denominator([across, within1], of.positive, denominator)
    backward = _log_denominator([back, within2], returned, denominator)
    return ((forward + backward) / 2 - positive).mean()


def cosine_regression(predicted: Tensor, target: Tensor) -> Tensor:
    """-mean_i cos(p_i, t_i) of rows (N, p), t without gradient: SimSiam's loss of one direction; BYOL's is 2 + 2 times it.

    Half precision is computed and returned in float32, also under autocast. Chen and He 2021; Grill et al. 2020.
    """
    if predicted.shape != target.shape or predicted.dim() != 2:
        given = f"predictions and targets of shapes {tuple(predicted.shape)} and {tuple(target.shape)}"
        raise GeomsslError(given, "two matrices (N, p)", reason="bad-shape")
    with torch.autocast(predicted.device.type, enabled=False):
        unit, aim = F.normalize(wide(predicted), dim=1), F.normalize(wide(target.detach()), dim=1)
        return -(unit * aim).sum(dim=1).mean()


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


Form = Literal["released", "printed"]


@dataclass(frozen=True)
class VICRegTerms:
    """The three terms of VICReg, before they are weighted."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor

    def total(self, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0) -> Tensor:
        """Their weighted sum; the weights are the paper's."""
        return invariance * self.invariance + variance * self.variance + covariance * self.covariance


def vicreg(z1: Tensor, z2: Tensor, form: Form = "released") -> VICRegTerms:
    """Variance, invariance and covariance of N pairs of embeddings, each a scalar.

        invariance   mean_i |z1_i - z2_i|^2, in "released" divided by p
        variance     v(z1) + v(z2), in "released" halved;  v(z) = mean_j max(0, 1 - sqrt(var_j + 1e-4))
        covariance   c(z1) + c(z2);  c(z) = 1/p sum over j != k of cov_jk^2

    z1, z2: (N, p), N >= 2; var and cov over the N rows, divided by N - 1. The paper's equations ("printed") and the code of
    its authors ("released") differ by these two factors; the printed weights 25, 25, 1 were used with the code. Half
    precision is computed and returned in float32, also under autocast. Raises GeomsslError for fewer than two pairs or
    unequal shapes. Source: Bardes, Ponce and LeCun, VICReg, 2022, Eq. 1 to 6.
    """
    if form not in get_args(Form):
        raise unknown("form", form, get_args(Form))
    _check(z1, z2, 0.0)
    with torch.autocast(z1.device.type, enabled=False):
        a, b = wide(z1), wide(z2)
        distance = (a - b).square()
        halved = 2 if form == "released" else 1
        return VICRegTerms(
            distance.mean() if form == "released" else distance.sum(dim=1).mean(),
            (hinged_deviation(a) + hinged_deviation(b)) / halved,
            _covariance(a) + _covariance(b),
        )


def hinged_deviation(z: Tensor) -> Tensor:
    """mean_j max(0, 1 - sqrt(var_j + 1e-4)) of the columns of z (N, p): how far they are from a deviation of 1."""
    return F.relu(1 - (wide(z).var(dim=0) + 1e-4).sqrt()).mean()


def _covariance(z: Tensor) -> Tensor:
    """1/p of the sum of squares off the diagonal of the covariance of z (N, p)."""
    centred = z - z.mean(dim=0)
    squares = (centred.T @ centred / (len(z) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]


def _log_denominator(similarities: list[Tensor], positive: Tensor, denominator: Denominator) -> Tensor:
    terms = [*similarities, positive[:, None]] if denominator == "nt-xent" else similarities
    return torch.cat(terms, dim=1).logsumexp(dim=1)


def _check(z1: Tensor, z2: Tensor, beta: float, denominator: str = "decoupled") -> None:
    if denominator not in get_args(Denominator):
        raise unknown("denominator", denominator, get_args(Denominator))
    if z1.shape != z2.shape or z1.dim() != 2:
        given = f"pairs of shapes {tuple(z1.shape)} and {tuple(z2.shape)}"
        raise GeomsslError(given, "two matrices (N, p)", reason="bad-shape")
    if len(z1) < 2:
        raise GeomsslError(f"a batch of {len(z1)}", "at least 2 pairs: one pair has no negatives", reason="batch-too-small")
    if not beta >= 0:
        raise GeomsslError(f"beta = {beta}", "an inverse temperature >= 0", reason="bad-value")
