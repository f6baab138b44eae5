"""Nearest negatives: candidates by one float32 product, the decision in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import checks

# Similarities closer than this are a tie: products of equal rows may round differently in different places of a matrix.
TIE = 1e-12
COLUMNS = 512
ROWS = 1024
# More candidates a row than this, as where many rows are equal, and the whole block of rows is done in float64.
CANDIDATES = 16


def silent(z: Tensor, what: str) -> list[str]:
    """A sentence for the notes where rows of projector outputs (n, p) are zero."""
    return [f"{line[:-1]}, similar to nothing: their cosines count as 0." for line in checks.zeros(z, what)]


def nearest_negatives(z1: Tensor, z2: Tensor) -> Tensor:
    """The most cosine-similar negative of every anchor z1_i, as an index into cat([z1, z2]).

        l*_i = argmax over l not in {i, N + i} of  <z1_i, z_l> / (||z1_i|| ||z_l||)

    z1, z2: (N, p), N >= 2, the projector's outputs of two views. Returns int64 (N,) on the CPU. Ties (closer than 1e-12)
    go to the smallest index; a row of length zero is similar to nothing (0). Exact in float64: a float32 product errs by
    at most e = (p + 4) 2^-23 on unit rows, so the argmax is among the columns within 2 e of the float32 maximum, and only
    these are compared in float64. Raises GeomsslError for unequal shapes, fewer than two pairs or NaN.
    Source: Cosentino et al. 2022, Table 1; cosine, since the unnormalised argmax would break the bound of Eq. 3.
    """
    if z1.shape != z2.shape or z1.dim() != 2:
        given = f"views of shapes {tuple(z1.shape)} and {tuple(z2.shape)}"
        raise GeomsslError(given, "two matrices (N, p)", reason="bad-shape")
    if len(z1) < 2:
        raise GeomsslError(f"{len(z1)} pair of views", "at least 2: one pair has no negatives", reason="batch-too-small")
    anchors = F.normalize(checks.matrix(z1, "outputs z"), dim=1)
    others = torch.cat([anchors, F.normalize(checks.matrix(z2, "outputs z"), dim=1)])
    padded = -(-len(others) // COLUMNS) * COLUMNS
    coarse = F.pad(others.float(), (0, 0, 0, padded - len(others)))
    similar = torch.empty(min(ROWS, len(anchors)), padded)
    found = torch.empty(len(anchors), dtype=torch.long)
    for start in range(0, len(anchors), ROWS):
        rows = slice(start, min(start + ROWS, len(anchors)))
        found[rows] = _block(anchors, others, coarse, rows, similar[: rows.stop - start])
    return found


def _block(anchors: Tensor, others: Tensor, coarse: Tensor, rows: slice, similar: Tensor) -> Tensor:
    """The answer for one slice of anchors. similar: room for its float32 similarities."""
    count, columns = rows.stop - rows.start, len(others)
    torch.mm(coarse[rows], coarse.T, out=similar)
    _hide(similar, rows, len(anchors), columns)
    # values only: many times faster than a maximum that also returns where it is
    by_block = similar.view(count, -1, COLUMNS)
    best = by_block.amax(dim=2)
    margin = 2 * (anchors.shape[1] + 4) * torch.finfo(torch.float32).eps
    least = best.amax(dim=1) - margin
    row, block = (best >= least[:, None]).nonzero(as_tuple=True)
    if len(row) <= CANDIDATES * count:
        entry, column = (by_block[row, block] >= least[row, None]).nonzero(as_tuple=True)
        row, column = row[entry], column + COLUMNS * block[entry]
        if len(row) <= CANDIDATES * count:
            return _decide(anchors[rows][row], others[column], row, column, count)
    exact = anchors[rows] @ others.T
    _hide(exact, rows, len(anchors), columns)
    return (exact >= exact.amax(dim=1, keepdim=True) - TIE).int().argmax(dim=1)


def _decide(anchor: Tensor, other: Tensor, row: Tensor, column: Tensor, count: int) -> Tensor:
    """The smallest column within a tie of the best one, for each row, among candidate pairs in float64."""
    exact = torch.linalg.vecdot(anchor, other)
    best = torch.full((count,), -math.inf, dtype=torch.float64).scatter_reduce(0, row, exact, "amax")
    tied = exact >= best[row] - TIE
    none = torch.full((count,), torch.iinfo(torch.long).max)
    return none.scatter_reduce(0, row[tied], column[tied], "amin")


def _hide(similar: Tensor, rows: slice, n: int, columns: int) -> None:
    """Rule out both views of each anchor itself, and the columns that only pad."""
    own = torch.arange(rows.start, rows.stop)
    here = torch.arange(len(own))
    similar[here, own] = similar[here, n + own] = -math.inf
    similar[:, columns:] = -math.inf
