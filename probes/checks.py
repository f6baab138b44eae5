"""What probes ask of numbers before they measure: finite, two-dimensional, not all equal."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl.errors import GeomsslError


def matrix(values: Tensor, what: str) -> Tensor:
    """`values` as a float64 matrix on the CPU. GeomsslError unless it is two-dimensional, not empty and finite."""
    if values.dim() != 2 or values.numel() == 0:
        raise GeomsslError(f"{what} of shape {tuple(values.shape)}", "a matrix with at least one entry", reason="bad-shape")
    exact = values.detach().to("cpu", torch.float64)
    if not torch.isfinite(exact).all():
        rows = int((~torch.isfinite(exact)).any(dim=1).sum())
        raise GeomsslError(f"{what} with NaN or infinity in {rows} of {len(exact)} rows", "finite numbers", reason="not-finite")
    return exact


def zeros(values: Tensor, what: str) -> list[str]:
    """A sentence for the notes where rows of a matrix (n, d) are zero."""
    count = int((values == 0).all(dim=1).sum())
    return [f"{what}: zero for {count} of {len(values)} images."] if count else []


def collapsed(values: Tensor) -> bool:
    """True where the rows of a matrix (n, d) are all equal up to rounding: ||X - mean|| <= 64 eps ||X|| in its own dtype."""
    exact = values.detach().to("cpu", torch.float64)
    spread = torch.linalg.norm(exact - exact.mean(dim=0))
    return bool(spread <= 64 * torch.finfo(values.dtype).eps * torch.linalg.norm(exact))


def varied(values: Tensor, what: str) -> Tensor:
    """The float64 matrix, once it is clear that its rows are not all equal."""
    exact = matrix(values, what)
    if collapsed(values):
        raise GeomsslError(f"{what} of {len(exact)} images, all equal", "features that differ", reason="degenerate")
    return exact
