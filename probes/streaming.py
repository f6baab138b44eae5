"""Singular values of matrices too tall to hold: a QR factor that grows block by block, in float64, and nothing is squared."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import checks

# Bytes of one float64 block of rows. Together with the factor (d + 1)^2 and what a QR copies, this is what is held.
BYTES = 2**26


class Triangle:
    """The factor R of [1, X - 1 x_0'] = Q R over the rows of X (n, d) seen so far, x_0 the first of them.

        R <- qr([R; block]),     R = [r  m'; 0  C]:  C'C = (X - mean)'(X - mean),  and  X'X from R + (first column) x_0'

    so that one pass gives the singular values of X centred and as it is, with the accuracy of an SVD: relative to sigma_1
    they err by some eps = 2e-16, where the root of a float64 Gram matrix loses what lies under 1e-8 sigma_1 and that of a
    float32 one what lies under 3e-4. Memory: (d + 1)^2 numbers and a block, whatever n is. Two factors of disjoint rows
    merge into that of their union (TSQR). Source: Demmel et al. 2012, Communication-optimal parallel and sequential QR.
    """

    def __init__(self) -> None:
        self.count = 0
        self.offset = torch.zeros(0, dtype=torch.float64)
        self._rows = torch.zeros(0, 0, dtype=torch.float64)
        self._upper = False

    def add(self, rows: Tensor, what: str = "features") -> None:
        """Take in rows (m, d), of any dtype. GeomsslError where they are not finite or of another width.

        what: their name in that error.
        """
        if rows.dim() != 2 or rows.numel() == 0:
            checks.matrix(rows, what)
        width = rows.shape[1]
        if self.count == 0:
            # about the first row, so that a large common offset costs no digits
            self.offset = rows[0].detach().to("cpu", torch.float64, copy=True)
            self._rows = self.offset.new_zeros(0, width + 1)
        if width != len(self.offset):
            given = f"rows of width {width} after rows of width {len(self.offset)}"
            raise GeomsslError(given, "equal widths", reason="bad-shape")
        held = len(self._rows)
        stacked = self.offset.new_empty(held + len(rows), width + 1)
        stacked[:held] = self._rows
        stacked[held:, 0] = 1
        stacked[held:, 1:] = rows.detach()
        stacked[held:, 1:] -= self.offset
        self._fold(stacked)
        # what is not finite spreads to the factor, which is smaller to look at
        if not torch.isfinite(self._rows).all():
            checks.matrix(rows, what)
            raise GeomsslError(f"{what} too large for float64", "numbers under 1e300", reason="not-finite")
        self.count += len(rows)

    def merge(self, other: Triangle) -> None:
        """Take in all rows of another one."""
        if self.count == 0:
            self.offset, self._rows, self.count, self._upper = other.offset, other._rows, other.count, other._upper
        elif other.count:
            moved = other._rows.clone()
            moved[:, 1:] += moved[:, :1] * (other.offset - self.offset)
            self._fold(torch.cat([self._rows, moved]))
            self.count += other.count

    def _fold(self, stacked: Tensor) -> None:
        self._upper = len(stacked) > stacked.shape[1]
        self._rows = torch.linalg.qr(stacked, mode="r").R if self._upper else stacked

    def factor(self, centre: bool = True) -> Tensor:
        """A matrix of at most d + 1 rows with the singular values and right singular vectors of X, centred or as it is."""
        if self.count == 0:
            raise GeomsslError("no rows", "at least one", reason="too-few-images")
        if not centre:
            return self._rows[:, 1:] + self._rows[:, :1] * self.offset
        upper = self._rows if self._upper else torch.linalg.qr(self._rows, mode="r").R
        return upper[1:, 1:]

    def singular_values(self, centre: bool = True) -> Tensor:
        """Singular values of X - 1 mean', or of X: min(n, d) numbers, largest first, float64."""
        factor = self.factor(centre)
        found = torch.linalg.svdvals(factor) if len(factor) else factor.new_zeros(0)
        room = torch.zeros(min(self.count, factor.shape[1]), dtype=torch.float64)
        kept = found[: len(room)]
        room[: len(kept)] = kept
        return room

    def norm(self, centre: bool = True) -> float:
        """The Frobenius norm of X - 1 mean', or of X."""
        return float(torch.linalg.norm(self.factor(centre)))


@dataclass(frozen=True)
class Spectrum:
    """Standard deviations of features along their principal directions, and what rounding leaves of them.

    sigma: singular values over sqrt(n), those at or below `floor` written 0.  floor: eps of the features' dtype times their
    root mean square length.  collapsed: all rows equal up to rounding (||X - mean|| <= 64 eps ||X||); sigma is then 0.
    """

    sigma: Tensor
    floor: float
    collapsed: bool


def spectrum(rows: Triangle, dtype: torch.dtype, centre: bool = True) -> Spectrum:
    """The spectrum of features that were stored as `dtype`."""
    root, eps = math.sqrt(rows.count), torch.finfo(dtype).eps
    length = rows.norm(centre=False)
    floor = eps * length / root
    collapsed = rows.norm() <= 64 * eps * length
    sigma = rows.singular_values(centre) / root
    keep = torch.zeros_like(sigma, dtype=torch.bool) if collapsed and centre else sigma > floor
    return Spectrum(torch.where(keep, sigma, 0.0), floor, collapsed)


def triangle(features: Tensor, rows: Tensor | None = None, what: str = "features") -> Triangle:
    """The factor of features (n, d), or of those rows, read block by block. Raises as Triangle.add does, or for no matrix."""
    if features.dim() != 2 or features.numel() == 0:
        raise GeomsslError(f"{what} of shape {tuple(features.shape)}", "a matrix with at least one entry", reason="bad-shape")
    found = Triangle()
    d = features.shape[1]
    size = max(2 * (d + 1), BYTES // (8 * (d + 1)))
    if rows is None:
        for block in features.split(size):
            found.add(block, what)
    else:
        for part in rows.split(size):
            found.add(features[part], what)
    return found


def repeated(features: Tensor) -> int:
    """How many rows of features (n, d) are equal, bit for bit, to an earlier row. By an exact 64-bit hash of each row."""
    odd = torch.randint(2**62, (features.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    # adding zero makes -0 and 0 one
    codes = [(part.double() + 0.0).view(torch.int64).mul_(odd).sum(dim=1) for part in features.split(4096)]
    return len(features) - len(torch.cat(codes).unique())

