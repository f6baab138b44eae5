"""Real irreducible representations of the finite groups of turns and mirrors, and what fitted matrices hold of each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.transforms.base import Transform
from geomssl.transforms.groups import CyclicRotations, Dihedral, Flips


@dataclass(frozen=True)
class Irrep:
    """A real irreducible representation: its name, its dimension and its character at every element, in their order."""

    name: str
    dimension: int
    character: Tensor


def irreps(transform: Transform) -> list[Irrep]:
    """The real irreps of c<n>, d<n> and flips, in the order of the group's elements; none where the transform is another.

    c<n>: "trivial"; "sign" for even n; "frequency k" for 0 < k < n / 2, of dimension 2, character 2 cos(2 pi k j / n).
    d<n>: A1 (trivial) and A2 (changes sign under mirrors); B1 and B2 for even n (change sign under the smallest turn; B1 not
    under the mirror s, B2 not under r s); "E k" of dimension 2, character 2 cos(2 pi k j / n) at turns and 0 at mirrors.
    Serre (1977), 5.1 to 5.3.
    """
    if isinstance(transform, Flips):
        return [Irrep("trivial", 1, _row([1, 1])), Irrep("sign", 1, _row([1, -1]))]
    if isinstance(transform, CyclicRotations):
        n = transform.order
        found = [Irrep("trivial", 1, torch.ones(n, dtype=torch.float64))]
        if n % 2 == 0:
            found.append(Irrep("sign", 1, _alternating(n)))
        return found + [Irrep(f"frequency {k}", 2, _cosine(n, k)) for k in range(1, (n + 1) // 2)]
    if isinstance(transform, Dihedral):
        n = transform.order // 2
        ones = torch.ones(n, dtype=torch.float64)
        found = [Irrep("A1", 1, torch.cat([ones, ones])), Irrep("A2", 1, torch.cat([ones, -ones]))]
        if n % 2 == 0:
            turns = _alternating(n)
            found += [Irrep("B1", 1, torch.cat([turns, turns])), Irrep("B2", 1, torch.cat([turns, -turns]))]
        return found + [Irrep(f"E {k}", 2, torch.cat([_cosine(n, k), 0 * ones])) for k in range(1, (n + 1) // 2)]
    return []


def projector(matrices: Tensor, irrep: Irrep) -> Tensor:
    """P = d / sum_g chi(g)^2 sum_g chi(g) M_g, (d, d): for a representation M, the projector on all its copies of the irrep.

    matrices (|G|, d, d), the identity's among them. This is d / |G| sum chi(g)* M_g for irreps of real type; the two complex
    halves of a real irrep of complex type are taken together. Its trace over the irrep's dimension is the multiplicity.
    """
    chi = irrep.character
    return irrep.dimension / float(chi.square().sum()) * torch.einsum("g,gij->ij", chi, matrices)


@dataclass(frozen=True)
class Part:
    """What the matrices hold of one irrep.

    multiplicity: trace(P) / dimension.  residual: how far it is from a whole number.  idempotence: |P P - P| / |P|, 0 for a
    representation.  variance: sum |P x|^2 / sum |x|^2 over centred features.  error: root of the share of the moved
    features' variance in P that the fits do not explain; NaN where there is none.
    """

    irrep: Irrep
    multiplicity: float
    residual: float
    idempotence: float
    variance: float
    error: float


def decompose(matrices: Tensor, found: list[Irrep], features: Tensor, moved: Tensor, residuals: Tensor) -> list[Part]:
    """The parts of matrices (|G|, d, d), with centred features (n, d), and moved features and residuals (E, n, d) of fits."""
    parts = []
    total = float(features.square().sum())
    for irrep in found:
        onto = projector(matrices, irrep)
        size = float(torch.linalg.matrix_norm(onto))
        multiplicity = float(onto.trace()) / irrep.dimension
        inside, left = ((values @ onto.T).square().sum() for values in (moved, residuals))
        # Under the rounding of float32 features there is nothing in this irrep to explain.
        empty = float(inside) <= 1e-10 * float(moved.square().sum())
        parts.append(Part(
            irrep, multiplicity, abs(multiplicity - round(multiplicity)),
            float(torch.linalg.matrix_norm(onto @ onto - onto)) / size if size > 1e-9 else 0.0,
            float((features @ onto.T).square().sum()) / total,
            math.nan if empty else math.sqrt(float(left) / float(inside)),
        ))
    return parts


def _row(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _alternating(n: int) -> Tensor:
    return 1.0 - 2.0 * (torch.arange(n, dtype=torch.float64) % 2)


def _cosine(n: int, k: int) -> Tensor:
    return 2 * torch.cos(2 * math.pi * k * torch.arange(n, dtype=torch.float64) / n)
