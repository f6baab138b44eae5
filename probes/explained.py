"""How much of the span of delta-h the projector's map explains: by energy (least squares) and by principal angles."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes import affine, checks
from geomssl.probes.streaming import triangle
from geomssl.progress import track
from geomssl.seeding import generator

# Gaussian W that tell how far the share of a W that knows nothing moves.
DRAWS = 200


def unexplained_variance(delta_h: Tensor, weight: Tensor, cutoff: float | None = None) -> float:
    """The share of the variance of span{delta_h} that the columns of W do not explain, between 0 and 1: the energy form.

        sum_i min over t_i of ||delta_h_i - W t_i||^2 / sum_i ||delta_h_i||^2

    delta_h: (N, d). weight: W (d, p), that is `Linear.weight.T`: torch stores the transpose of the papers' W.
    cutoff: singular values of W up to cutoff sigma_1 count as zero; max(d, p) eps of the dtype of `weight` when not given,
    since smaller ones are rounding. Least squares by a float64 SVD. Where W has rank d the result is 0 by construction;
    for a W that knows nothing of delta_h it is 1 - rank / d on average. Raises GeomsslError for shapes that do not fit and
    for delta_h all zero. Source: Cosentino et al. 2022, Eq. 10.
    """
    left, total = residual_energy(delta_h, affine.column_space(weight, cutoff))
    return float(left.sum() / total.sum())


def unexplained_subspace(delta_h: Tensor, weight: Tensor, directions: int, cutoff: float | None = None) -> float:
    """The same of the k leading directions of span{delta_h}, each counted once: the subspace form.

        1 - 1/k sum_j cos^2 theta_j = mean of sin^2 theta_j,   theta_j the k principal angles between the two subspaces

    (k - rank W of them 90 degrees where W has fewer directions). directions: k, 1 to the rank of delta_h; leading by
    singular value, nothing centred. Where k = d, or W has rank d, it is 1 - rank / d whatever they are.
    delta_h, weight, cutoff as in `unexplained_variance`. Raises as that does, and for k out of range.
    """
    basis = affine.column_space(weight, cutoff)
    _fits(delta_h, basis)
    own, _ = leading(triangle(delta_h).factor(centre=False))
    if not 1 <= directions <= own.shape[1]:
        raise GeomsslError(f"{directions} directions of delta-h", f"1 to its rank, {own.shape[1]}", reason="bad-value")
    return float(by_directions(own, basis)[directions - 1])


def principal_angles(a: Tensor, b: Tensor) -> Tensor:
    """Principal angles between two subspaces, in radians, smallest first: min(r, p) of them, float64.

        cos theta_j = singular values of A'B,   sin theta_j = those of the smaller one's part outside the larger

    a: (d, r), b: (d, p), orthonormal columns. Both are used, since the cosine cannot tell angles under 1e-8 from 0.
    Source: Bjorck and Golub 1973.
    """
    small, large = (a, b) if a.shape[1] <= b.shape[1] else (b, a)
    inside = large.T @ small
    outside = torch.linalg.svdvals(small - large @ inside).flip(0)
    cosine = torch.linalg.svdvals(inside)
    return torch.atan2(outside[: len(cosine)], cosine)


def leading(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Right singular vectors (d, r) of a matrix with d columns, leading first, and their energies sigma^2 (r,).

    Those at or below max(shape) eps sigma_1 are left out.
    """
    _, sigma, right = torch.linalg.svd(factor, full_matrices=False)
    kept = (sigma > max(factor.shape) * torch.finfo(torch.float64).eps * sigma[0]) & (sigma > 0)
    return right[kept].T, sigma[kept].square()


def by_directions(own: Tensor, basis: Tensor) -> Tensor:
    """`unexplained_subspace` for every k: (r,). own: (d, r) leading directions of delta-h; basis (d, p) of W."""
    captured = (basis.T @ own).square().sum(dim=0)
    return (1 - captured.cumsum(0) / torch.arange(1, len(captured) + 1)).clamp(0, 1)


def holding(energies: Tensor, share: float) -> int:
    """How many leading directions hold that share of the energy."""
    return int((energies.cumsum(0) / energies.sum() < share - 1e-12).sum()) + 1


def residual_energy(delta_h: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Per image (N,), float64: the energy of delta_h outside the basis, and the whole energy."""
    exact = checks.matrix(delta_h, "delta-h")
    _fits(exact, basis)
    total = energy(exact)
    return (exact - (exact @ basis) @ basis.T).square().sum(dim=1), total


def _fits(delta_h: Tensor, basis: Tensor) -> None:
    if delta_h.dim() != 2 or delta_h.shape[1] != basis.shape[0]:
        raise GeomsslError(
            f"delta-h of shape {tuple(delta_h.shape)} and a weight of {basis.shape[0]} rows",
            "a weight (d, p) with d the width of delta-h: Linear.weight.T", reason="bad-shape",
        )


def energy(delta_h: Tensor) -> Tensor:
    """||delta_h_i||^2 per image (N,); GeomsslError where all of it is zero."""
    total = delta_h.square().sum(dim=1)
    if not total.sum() > 0:
        raise GeomsslError("delta-h of zero for every image", "views that differ from their negatives", reason="degenerate")
    return total


@dataclass(frozen=True)
class Explained:
    """What one map of the projector leaves unexplained of delta-h, in the energy form.

    left, total: energies per image (n,). curve[k]: the unexplained share after its k leading directions.
    null: the expected share for directions that know nothing of delta-h. ranks: of the map, per image or one.
    basis: the column space of one W for every image (d, r), or None where every image has its own.
    """

    name: str
    left: Tensor
    total: Tensor
    curve: list[float]
    null: float
    ranks: Tensor
    shape: tuple[int, int]
    basis: Tensor | None = None

    @property
    def share(self) -> float:
        return float(self.left.sum() / self.total.sum())


def chance(delta_h: Tensor, found: Explained, seed: int) -> tuple[float, float]:
    """The central 95 % of the energy form over 200 Gaussian W of the shape and (mean) rank of a map.

    A random subspace has no preferred direction, so that only the energies of delta_h along its own directions matter.
    """
    d = found.shape[0]
    width = round(float(found.ranks.mean()))
    if width in (0, d):
        return 1 - width / d, 1 - width / d
    energies = leading(triangle(delta_h).factor(centre=False))[1]
    shares = []
    for number in range(DRAWS):
        drawn = torch.randn(d, width, generator=generator(seed, "tangent-random", number), dtype=torch.float64)
        captured = torch.linalg.qr(drawn).Q[: len(energies)].square().sum(dim=1)
        shares.append(1 - float((captured * energies).sum() / energies.sum()))
    low, high = torch.tensor(shares, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def maps(
    projector: nn.Module, h1: Tensor, deltas: list[Tensor], cutoff: float | None, local: int, seed: int, notes: list[str]
) -> tuple[list[list[Explained]], bool]:
    """For each of the deltas (n, d): the projector's affine map (one, or at each sample) first, then the gate before a
    non-linear one, where it has one. Also whether the projector is affine. local: samples at which Jacobians are taken.
    """
    # in double: whether a map is affine, and its rank, are decided on differences
    exact = copy.deepcopy(projector).cpu().double().eval()
    h = h1.double()
    if affine.is_affine(exact, h):
        weight = affine.jacobians(exact, h[:1])[0].T
        kept = threshold(projector, (weight.shape[0], weight.shape[1]), cutoff)
        return [[_global("projector", weight, delta, kept)] for delta in deltas], True
    chosen = torch.randperm(len(h), generator=generator(seed, "tangent-local"))[:local].sort().values
    if len(chosen) < len(h):
        notes.append(f"The local affine map is taken at {len(chosen)} of {len(h)} images.")
    found = [[one] for one in _local(projector, exact, h[chosen], [delta[chosen] for delta in deltas], cutoff)]
    first = affine.gate(exact, h)
    if first is None:
        notes.append("No first linear layer through which all of h must pass: only the local map is measured.")
    else:
        kept = threshold(projector, (first.shape[0], first.shape[1]), cutoff)
        for one, delta in zip(found, deltas, strict=True):
            one.append(_global("first layer", first, delta, kept))
    return found, False


def threshold(projector: nn.Module, shape: tuple[int, int], cutoff: float | None) -> float:
    """The share of sigma_1 up to which singular values of the projector's map count as zero."""
    stored = next((p.dtype for p in projector.parameters() if p.is_floating_point()), torch.float32)
    return cutoff if cutoff is not None else max(shape) * torch.finfo(stored).eps


def _global(name: str, weight: Tensor, delta_h: Tensor, cutoff: float) -> Explained:
    """One W for every image."""
    basis = affine.column_space(weight, cutoff)
    left, total = residual_energy(delta_h, basis)
    d, r = basis.shape
    captured = ((delta_h @ basis).square().sum(dim=0) / total.sum()).cumsum(0)
    curve = [1.0, *(1 - captured).clamp(0, 1).tolist()]
    return Explained(name, left, total, curve, 1 - r / d, torch.tensor([float(r)]), (d, weight.shape[1]), basis)


def _local(
    projector: nn.Module, exact: nn.Module, h: Tensor, deltas: list[Tensor], cutoff: float | None
) -> list[Explained]:
    """The transposed Jacobian at each h(1)_i in the place of W; energies summed, so that long delta-h weigh more."""
    lefts: list[list[Tensor]] = [[] for _ in deltas]
    captured: list[list[Tensor]] = [[] for _ in deltas]
    ranks: list[Tensor] = []
    shape = (0, 0)
    for rows in track(torch.arange(len(h)).split(32), "local maps", total=-(-len(h) // 32)):
        jacobians = affine.jacobians(exact, h[rows])
        shape = (jacobians.shape[2], jacobians.shape[1])
        _, sigma, right = torch.linalg.svd(jacobians, full_matrices=False)
        kept = (sigma > threshold(projector, shape, cutoff) * sigma[:, :1]) & (sigma > 0)
        ranks.append(kept.sum(dim=1).double())
        for delta, left, seen in zip(deltas, lefts, captured, strict=True):
            coordinates = torch.where(kept, torch.einsum("nrd,nd->nr", right, delta[rows]), 0.0)
            left.append((delta[rows] - torch.einsum("nrd,nr->nd", right, coordinates)).square().sum(dim=1))
            seen.append(coordinates.square().sum(dim=0))
    rank = torch.cat(ranks)
    found = []
    for delta, left, seen in zip(deltas, lefts, captured, strict=True):
        total = energy(delta)
        curve = [1.0, *(1 - (torch.stack(seen).sum(dim=0) / total.sum()).cumsum(0)).clamp(0, 1).tolist()]
        null = 1 - float((rank * total).sum() / total.sum()) / shape[0]
        found.append(Explained("local affine map", torch.cat(left), total, curve[: int(rank.max()) + 1], null, rank, shape))
    return found
