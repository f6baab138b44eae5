"""The linear map that stands in for a projector: one for all of h where it is affine, else its Jacobian at each h."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from geomssl.errors import GeomsslError
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
    """dg/dh at every row of h (n, d): (n, p, d), rows independent. GeomsslError where it is not finite."""
    # One pull-back of all rows at once, mapped over the outputs: half the time of mapping jacrev over rows, and PReLU takes it.
    # What enters it are the rows of a last linear layer, where there is one, and unit vectors elsewhere.
    layers = list(projector) if type(projector) is nn.Sequential else []
    last = layers[-1] if layers else None
    rows = last.weight if type(last) is nn.Linear else None
    body = projector if rows is None else nn.Sequential(*layers[:-1])
    with _FoldedNorm():
        # a copy, since a layer may work in place
        out, pull = torch.func.vjp(lambda x: body(x.clone()), h)[:2]
        start = torch.eye(out.shape[1], dtype=out.dtype, device=out.device) if rows is None else rows
        found = torch.func.vmap(lambda row: pull(row.expand_as(out))[0], out_dims=1)(start).detach()
    if not torch.isfinite(found).all():
        raise GeomsslError("a projector with a NaN or infinite derivative", "finite ones at every h", reason="not-finite")
    return found


def norm_gain(
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """gamma / sqrt(var + eps), the slope of functional.batch_norm with those arguments; None where the batch has a say."""
    if training or running_var is None:
        return None
    scale = torch.rsqrt(running_var + eps)
    return scale if weight is None else weight * scale


class _FoldedNorm(TorchFunctionMode):
    """BatchNorm in eval mode as a product and sums, so that a pull-back through it is one product and no sum over rows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        gain = norm_gain(*args[1:], **kwargs) if func is functional.batch_norm and args else None
        if gain is None:
            return func(*args, **kwargs)
        given = dict(zip(("running_mean", "running_var", "weight", "bias"), args[1:], strict=False)) | kwargs
        shape = (-1, *(1,) * (args[0].dim() - 2))
        out = (args[0] - given["running_mean"].view(shape)) * gain.view(shape)
        return out if given.get("bias") is None else out + given["bias"].view(shape)


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
