"""The implicit bias y - J(x) x of modules and functions whose form is known: read off, without a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_Affine = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_Norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# f(a x) = a f(x) for a > 0, so that J(x) x = f(x).
_Homogeneous = (
    nn.Identity, nn.Flatten, nn.ReLU, nn.LeakyReLU, nn.Dropout, nn.Dropout2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d,
    nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d,
)
_UNARY = {
    F.relu, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.max_pool2d, F.avg_pool2d,
    F.adaptive_avg_pool2d, torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape, Tensor.unflatten,
    Tensor.mean, torch.mean, Tensor.sum, torch.sum, Tensor.amax, torch.amax, Tensor.permute, Tensor.transpose,
    Tensor.squeeze, Tensor.unsqueeze, Tensor.contiguous,
}
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__}


def of_module(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Tensor | None] | None:
    """(b,) with b (C,) along the channels, (None,) for no bias; None where the form is not known.

    Only modules of exactly these classes, in eval mode, as they come: a subclass or a parametrisation may do anything.
    A convolution or linear layer: its bias. BatchNorm: beta - mu gamma / sqrt(var + eps).
    """
    if kwargs or len(args) != 1 or "forward" in module.__dict__ or not flows(args[0]):
        return None
    kind = type(module)
    if kind in _Affine:
        return (module.bias,)  # type: ignore[return-value]
    if kind in _Norm and module.running_mean is not None:
        norm: Any = module
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        bias = -norm.running_mean * scale
        return (bias if norm.bias is None else bias + norm.bias,)
    return (None,) if kind in _Homogeneous and not getattr(module, "return_indices", False) else None


def of_function(func: Any, leaves: Sequence[Any]) -> bool:
    """Is it known that this call has no implicit bias? leaves: everything in its arguments."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if func in _UNARY:
        return len(tensors) == 1 and flows(tensors[0])
    return func in _SUMS and len(leaves) == 2 and len(tensors) == 2 and all(map(flows, tensors))


def flows(value: Any) -> bool:
    """Does it depend on the image? With every parameter frozen, a tensor that requires a gradient does."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.requires_grad
