"""What a map lets through: shares of directions inside the columns of W, along and across what it gives for h itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import checks
from geomssl.probes.local import singular_parts
from geomssl.seeding import generator


@dataclass(frozen=True)
class Seen:
    """What the projector sees of directions in h: W' = U S V' of one map, or of one an image, without its small parts.

    sigma (m, r), right (m, r, d): singular values and right singular vectors; m = 1 or one an image. kept (m, r): 1 or 0.
    """

    sigma: Tensor
    right: Tensor
    kept: Tensor

    @property
    def rank(self) -> float:
        """Rank of the map, a mean over images where there are several."""
        return float(self.kept.sum(dim=1).mean())

    @property
    def gain(self) -> Tensor:
        """sigma^2 / sigma_1^2, (m, r)."""
        return (self.sigma / self.sigma[:, :1].clamp(min=1e-300)).square()

    def energies(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """||P v||^2 and ||W'v||^2 / sigma_1^2 of every row of v (n, d): float64 (n,) each. P projects on the columns of W."""
        v = v.double()
        inside = v @ self.right[0].T if len(self.right) == 1 else torch.einsum("nrd,nd->nr", self.right, v)
        squares = inside.square() * self.kept
        return squares.sum(dim=1), (squares * self.gain).sum(dim=1)

    def columns(self, matrix: Tensor) -> tuple[float, float]:
        """||P M||_F^2 / ||M||_F^2 and ||W'M||_F^2 / (sigma_1^2 ||M||_F^2) of a matrix (d, k), averaged over the maps."""
        spread = matrix @ matrix.T
        shares = []
        for weights in (self.kept, self.kept * self.gain):
            rows = (self.right * weights[:, :, None]).flatten(0, 1)
            shares.append(float(((rows.T @ self.right.flatten(0, 1)) * spread).sum() / (len(self.right) * spread.trace())))
        return shares[0], shares[1]


def seen(maps: Tensor, cutoff: float) -> Seen:
    """Of maps W' (m, p, d). Singular values up to cutoff times each map's largest count as zero."""
    sigma, right = singular_parts(maps.double())
    return Seen(sigma, right, ((sigma > cutoff * sigma[:, :1]) & (sigma > 0)).double())


def let_through(v: Tensor, weight: Tensor, cutoff: float | None = None) -> tuple[float, float]:
    """The share of directions that W lets through, and the same with W's own amplification:

        sum ||P_col(W) v||^2 / sum ||v||^2,        sum ||W'v||^2 / (sigma_1^2 sum ||v||^2) <= the first

    v: (n, d). weight: W (d, p), `Linear.weight.T`. Ker(W') is where both are 0; a random W of rank r gives r / d for the
    first. Raises GeomsslError for shapes that do not fit and for v all zero. Source: Cosentino et al. 2022, Prop. 4.1.
    """
    exact, columns = checks.matrix(v, "directions v"), checks.matrix(weight, "a weight")
    if exact.shape[1] != len(columns):
        raise GeomsslError(
            f"directions of width {exact.shape[1]} and a weight of {len(columns)} rows", "a weight (d, p): Linear.weight.T",
            reason="bad-shape",
        )
    total = float(exact.square().sum())
    if not total > 0:
        raise GeomsslError("directions v that are all zero", "views that differ", reason="degenerate")
    cutoff = max(columns.shape) * torch.finfo(weight.dtype).eps if cutoff is None else cutoff
    passed, amplified = seen(columns.T[None], cutoff).energies(exact)
    return float(passed.sum()) / total, float(amplified.sum()) / total


def along_across(moved: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """Energy of each row of `moved` = W'v (n, p) along z = W'h(1), and across it: float64 (n,) each; their sum is ||W'v||^2.

    The cosine of z and z + moved is 1 where nothing lies across and z + moved does not turn back: invariance sees only the
    part across. Of a z of zero everything is across.
    """
    moved, z = moved.double(), z.double()
    along = (moved * F.normalize(z, dim=1)).sum(dim=1)
    return along.square(), (moved.square().sum(dim=1) - along.square()).clamp(min=0)


def least_share(v: Tensor, rank: int) -> float:
    """The least share of directions v (n, d) that any W of that rank can let through: its columns where v has least energy."""
    exact = checks.matrix(v, "directions v")
    energy = torch.linalg.svdvals(exact).square()
    hidden = max(0, exact.shape[1] - rank)
    return float(energy[hidden:].sum() / energy.sum())


def random_shares(moments: Tensor, rank: int, draws: int, seed: int) -> Tensor:
    """Shares that uniformly random subspaces of that dimension let through: float64 (draws, k); their mean is rank / d.

    moments: (k, d, d), V'V of each set of directions. All sets meet the same subspaces.
    """
    d = moments.shape[1]
    total = moments.diagonal(dim1=1, dim2=2).sum(dim=1)
    found = []
    for number in range(draws):
        drawn = torch.randn(d, rank, generator=generator(seed, "kernel-random", number), dtype=torch.float64)
        basis = torch.linalg.qr(drawn).Q
        found.append(((moments @ basis) * basis).sum(dim=(1, 2)) / total)
    return torch.stack(found)
