"""The linear map that stands in for a projector: one for all of h where it is affine, else its Jacobian at each h."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from geomssl.probes import checks


def column_space(weight: Tensor, cutoff: float | None = None) -> Tensor:
    """An orthonormal basis (d, r) of the columns of W (d, p), leading directions first. float64 on the CPU.

    Directions with singular values up to cutoff sigma_1 are left out; cutoff as in `unexplained_variance`.
    """
    exact = checks.matrix(weight, "a weight")
    if cutoff is None:
        cutoff = max(exact.shape) * torch.finfo(weight.dtype).eps
    left, sigma, _ = torch.linalg.svd(exact, full_matrices=False)
    return left[:, (sigma > cutoff * sigma[0]) & (sigma > 0)]


@torch.no_grad()
def is_affine(projector: nn.Module, h: Tensor) -> bool:
    """g(a + b) - g(a) - g(b) + g(0) = 0 on the data, relative to the size of its terms."""
    a, b = h, h.roll(1, dims=0)
    terms = [projector(a + b), -projector(a), -projector(b), projector(torch.zeros_like(a))]
    size = sum(float(t.square().sum()) for t in terms)
    return float(sum(terms).square().sum()) <= 1e-18 * size


def jacobians(projector: nn.Module, h: Tensor) -> Tensor:
    """dg/dh at every row of h (n, d): (n, p, d), rows independent."""
    # one pull-back of all rows at once, mapped over the outputs: half the time of mapping jacrev over rows, and PReLU takes it
    # a copy, since a layer may work in place
    out, pull = torch.func.vjp(lambda rows: projector(rows.clone()), h)[:2]
    unit = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
    return torch.func.vmap(lambda row: pull(row.expand_as(out))[0], out_dims=1)(unit).detach()


@torch.no_grad()
def gate(projector: nn.Module, h: Tensor) -> Tensor | None:
    """W (d, p) of the first linear layer, where nothing outside its column space changes the projector's output."""
    layer = next((m for m in projector.modules() if isinstance(m, nn.Linear) and m.in_features == h.shape[1]), None)
    if layer is None:
        return None
    basis = column_space(layer.weight.T)
    whole, passed = projector(h), projector(h @ basis @ basis.T)
    same = (whole - passed).square().sum() <= 1e-18 * whole.square().sum()
    # a first layer of full width passes everything, whether it is the only way in or not
    return layer.weight.T if bool(same) and _is_input(projector, layer, h) else None


def _is_input(projector: nn.Module, layer: nn.Linear, h: Tensor) -> bool:
    """True where that layer is called once, and on h itself."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        projector(h)
    finally:
        handle.remove()
    return len(seen) == 1 and torch.equal(seen[0], h)
