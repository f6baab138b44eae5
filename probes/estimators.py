"""Estimators of rank: what one number says of a spectrum. Pure functions of a matrix or of its singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from geomssl.errors import GeomsslError, unknown
from geomssl.probes import checks
from geomssl.probes.streaming import Triangle

# Images in one block of LiDAR.
IMAGES = 1024


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix (n, d): min(n, d) numbers, largest first, float64 on the CPU.

    By an SVD in float64: the root of a float32 Gram matrix is 39 % off at a condition number of 1e4. Where the matrix is too
    tall to hold in float64: streaming.triangle(matrix).singular_values(centre=False).
    Raises GeomsslError where the matrix is empty or not finite.
    """
    return torch.linalg.svdvals(checks.matrix(matrix, "a matrix"))


def rank(matrix: Tensor, tau: float, relative: bool = False) -> int:
    """Rank at a threshold: the number of singular values sigma_j >= tau.

    tau: > 0; with relative=True the threshold is tau sigma_1, and a zero matrix has rank 0.
    Raises GeomsslError where tau is not positive. Source: Cosentino et al. 2022, Eq. 2 (the absolute form).
    """
    return count(singular_values(matrix), tau, relative)


def effective_rank(
    matrix: Tensor, eps: float = 0.0, centre: bool = False, of: Literal["singular", "variance"] = "singular"
) -> float:
    """Effective rank: exp of the entropy of the normalised spectrum, between 1 and min(n, d); 0 for a zero matrix.

        p_k = s_k / sum_j s_j + eps,     erank = exp(-sum_k p_k log p_k),     0 log 0 = 0

    of:     "singular" takes s_k = sigma_k (Roy and Vetterli 2007), "variance" s_k = sigma_k^2.
    centre: remove the mean row first. A common mean left in place turns an exact 32 into 1.4.
    eps:    added to every p_k and not renormalised, as RankMe does (Garrido et al. 2023). It inflates wide matrices: 1e-5
            turns an exact 32 into 40.4 at d = 2048, so that it is 0 unless asked for.
    """
    if of not in ("singular", "variance"):
        raise unknown("spectrum", of, ("singular", "variance"))
    if not (eps >= 0 and math.isfinite(eps)):
        raise GeomsslError(f"eps = {eps}", "a number >= 0", reason="bad-value")
    values = checks.matrix(matrix, "a matrix")
    return effective(torch.linalg.svdvals(values - values.mean(dim=0) if centre else values), eps, of)


def stable_rank(matrix: Tensor) -> float:
    """Stable rank ||A||_F^2 / sigma_1^2 = sum_k sigma_k^2 / sigma_1^2 of the matrix as it is; 0 for a zero matrix."""
    return stable(singular_values(matrix))


def participation_ratio(matrix: Tensor) -> float:
    """Participation ratio (sum_k lambda_k)^2 / sum_k lambda_k^2 with lambda_k = sigma_k^2, of the matrix as it is.

    Of centred features this is the participation ratio of their covariance. 0 for a zero matrix.
    """
    return participation(singular_values(matrix))


def count(sigma: Tensor, tau: float, relative: bool) -> int:
    """`rank` of singular values, largest first."""
    if not (tau > 0 and math.isfinite(tau)):
        raise GeomsslError(f"tau = {tau}", "a threshold > 0", reason="bad-value")
    return int(((sigma >= tau * (sigma[0] if relative else 1.0)) & (sigma > 0)).sum())


def effective(sigma: Tensor, eps: float = 0.0, of: str = "singular") -> float:
    """`effective_rank` of singular values, largest first."""
    if sigma[0] == 0:
        return 0.0
    # dividing by the largest first keeps the squares of tiny matrices from underflowing
    spectrum = (sigma / sigma[0]) ** (2 if of == "variance" else 1)
    p = spectrum / spectrum.sum() + eps
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def stable(sigma: Tensor) -> float:
    """`stable_rank` of singular values, largest first."""
    return 0.0 if sigma[0] == 0 else float(((sigma / sigma[0]) ** 2).sum())


def participation(sigma: Tensor) -> float:
    """`participation_ratio` of singular values, largest first."""
    if sigma[0] == 0:
        return 0.0
    variance = (sigma / sigma[0]) ** 2
    return float(variance.sum() ** 2 / (variance**2).sum())


@dataclass(frozen=True)
class PowerLaw:
    """lambda_k = c k^-alpha fitted between two indices (1-based, both included), with the share of variance explained."""

    alpha: float
    r2: float
    low: int
    high: int


def power_law(sigma: Tensor, low: int = 3, high: int | None = None) -> PowerLaw | None:
    """The exponent of the eigenvalues lambda_k = sigma_k^2 by least squares of log lambda_k on log k, low <= k <= high.

    high: half of the positive singular values when not given, and never more than there are: a finite sample bends the tail.
    None where fewer than three values are in range. Source: Agrawal et al. 2022 (alpha-ReQ); alpha near 1 is scale-free.
    """
    positive = int((sigma > 0).sum())
    last = min(positive, high if high is not None else max(low + 2, positive // 2))
    if last - low < 2:
        return None
    k = torch.arange(low, last + 1, dtype=torch.float64).log()
    y = 2 * sigma[low - 1 : last].double().log()
    x, centred = k - k.mean(), y - y.mean()
    slope = float((x * centred).sum() / x.square().sum())
    total = float(centred.square().sum())
    r2 = 1 - float((centred - slope * x).square().sum()) / total if total > 0 else 1.0
    return PowerLaw(-slope, r2, low, last)


@dataclass(frozen=True)
class Lidar:
    """value: LiDAR, in dimensions.  eigenvalues: of between- over within-image scatter, largest first, float64.
    within: mean variance within images along a direction, tr(S_w) / d without the ridge."""

    value: float
    eigenvalues: Tensor
    within: float


def lidar(views: Sequence[Tensor] | Tensor, delta: float = 1e-4, eps: float = 1e-7, rows: Tensor | None = None) -> Lidar:
    """LiDAR: the effective rank of a linear discriminant analysis in which every image is a class and its views the members.

        S_b = 1/n sum_i (m_i - m)(m_i - m)',   S_w = 1/(n q) sum_i sum_k (e_ik - m_i)(e_ik - m_i)' + delta I
        lambda = eigenvalues of S_w^-1/2 S_b S_w^-1/2,   p = lambda / sum lambda + eps,   LiDAR = exp(-sum p log p)

    m_i: mean of the q views of image i; m: mean of the m_i. At most min(n - 1, d) where eps = 0; 0 where all m_i are equal.
    views: (q, n, d), or q matrices (n, d), q >= 2: with one view nothing is known within an image. rows: only these images.
    delta: ridge, in squared units of the features, so that LiDAR depends on their scale where delta is not small against
    `within`. No scatter is formed: S_w = R'R by a streaming QR, and lambda are squared singular values of (m_i - m)' R^-1.
    Raises GeomsslError for one view, shapes that differ, numbers not finite, or delta = 0 where S_w is singular.
    Source: Thilak et al. 2023 (arXiv 2312.04000), with its names delta and eps; neither stands for a threshold here.
    """
    if len(views) < 2:
        raise GeomsslError(f"LiDAR of {len(views)} view", "at least 2 views of every image", reason="too-few-views")
    if any(v.shape != views[0].shape or v.dim() != 2 for v in views):
        given = f"views of shapes {[tuple(v.shape) for v in views]}"
        raise GeomsslError(given, "matrices (n, d) of one shape", reason="bad-shape")
    if not (delta >= 0 and eps >= 0 and math.isfinite(delta) and math.isfinite(eps)):
        raise GeomsslError(f"delta = {delta}, eps = {eps}", "numbers >= 0", reason="bad-value")
    where = torch.arange(len(views[0])) if rows is None else rows
    if len(where) < 2:
        raise GeomsslError(f"LiDAR of {len(where)} image", "at least 2", reason="too-few-images")
    inner, means = Triangle(), []
    for part in where.split(IMAGES):
        block = torch.stack([checks.matrix(view[part], "views") for view in views])
        means.append(block.mean(dim=0))
        inner.add((block - means[-1]).flatten(0, 1))
    centres = torch.cat(means)
    d = centres.shape[1]
    factor = inner.factor(centre=False) / math.sqrt(inner.count)
    ridge = math.sqrt(delta) * torch.eye(d, dtype=torch.float64)
    root = torch.linalg.qr(torch.cat([factor, ridge]), mode="r").R
    size = root.diagonal().abs()
    if not float(size.min()) > d * torch.finfo(torch.float64).eps * float(size.max()):
        reach = f"that do not vary in every direction, and by {float(size.max()):.1e} in one"
        given = f"LiDAR with delta = {delta:g} on views {reach}"
        raise GeomsslError(given, "delta > 0" if delta == 0 else "a larger delta", reason="degenerate")
    between = (centres - centres.mean(dim=0)) / math.sqrt(len(centres))
    values = torch.linalg.svdvals(torch.linalg.solve_triangular(root, between, upper=True, left=False)) ** 2
    within = float(factor.square().sum()) / d
    if not float(values.sum()) > 0:
        return Lidar(0.0, values, within)
    p = values / values.sum() + eps
    return Lidar(float(torch.exp(-torch.xlogy(p, p).sum())), values, within)
