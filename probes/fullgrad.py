"""FullGrad: a network's output split exactly into the input's part and one part for every bias, explicit or implicit."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from geomssl import modes
from geomssl.errors import GeomsslError
from geomssl.probes import known_bias

# modules that read their children's weights without calling them
WHOLE = (nn.MultiheadAttention,)


@dataclass(frozen=True)
class FullGradient:
    """The parts of f(x) for n images, and the map that they make.

    saliency:   (n, H, W), not negative.       value: f(x), (n,), float64.
    input_term: <df/dx, x>, (n,), float64.     bias_terms: <df/dy_l, b_l>, (n, L), float64, in order of execution.
    residual:   |f - input_term - sum bias_terms| / (|input_term| + sum |bias_terms|), (n,): rounding, if nothing is left out.
    layers:     the module, or module and function, behind every column of bias_terms.
    """

    saliency: Tensor
    input_term: Tensor
    bias_terms: Tensor
    residual: Tensor
    value: Tensor
    layers: tuple[str, ...]


def fullgrad(model: nn.Module, images: Tensor, targets: Tensor | None = None) -> FullGradient:
    """Full-gradient decomposition of f = model(images)[i, targets[i]] in eval mode, and its saliency map.

        f(x) = <df/dx, x> + sum_l <df/dy_l, b_l>,      b_l = y_l - J_l(x_l) x_l

    Every call l of a module without children, and of a torch function between modules, has the implicit bias b_l, by one
    forward-mode derivative J_l x_l, whatever it computes: the bias of a convolution, beta - mu gamma / sqrt(var + eps) of a
    BatchNorm, a constant that is added or appended, what GELU, GroupNorm or softmax leave over; zero for ReLU, pooling,
    maxima and sums. So the sum is exact whatever the order, the reuse and the kind of the modules. What is not seen (a
    constant inside a torch.autograd.Function between modules, or where images do not lie along the first axis) shows in the
    residual, image by image.

    saliency = psi(df/dx * x) + sum_l upsample(psi(df/dy_l * b_l)),   psi(v) = sum over channels of (|v| - min) / (max - min),
    minimum and maximum over the channels and places of one image; bilinear (align_corners False), once per resolution.
    Terms of features without two spatial axes count in bias_terms and have no place on the map.

    images (n, C, H, W); targets int64 (n,) columns of the output, or None where the output is (n,) or (n, 1).
    Raises GeomsslError for images that are not finite, and for targets that do not fit. Source: Srinivas and Fleuret 2019.
    """
    if images.dim() != 4 or not torch.isfinite(images).all():
        raise GeomsslError(f"images of shape {tuple(images.shape)}", "finite images (n, C, H, W)", reason="bad-images")
    _warm_up()
    with _frozen(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        x = images.detach().clone().requires_grad_(True)
        # a copy, so that a model may write into what it is given
        entered, recorder = x.clone(), _Recorder(model, len(x))
        try:
            with recorder:
                output = model(entered)
        finally:
            recorder.remove()
        calls = recorder.calls
        value = _chosen(output, targets)
        roots = [x, *(call.added for call in calls)]
        gradients: tuple[Tensor | None, ...] = (None,) * len(roots)
        if value.requires_grad:
            gradients = torch.autograd.grad(value.sum(), roots, allow_unused=True)
    products = [
        torch.zeros_like(part) if gradient is None else gradient * part
        for gradient, part in zip(gradients, [x.detach(), *(call.bias for call in calls)], strict=True)
    ]
    input_term = _sums(products[0])
    bias_terms = torch.stack([_sums(p) for p in products[1:]], dim=1) if calls else input_term.new_zeros(len(x), 0)
    value = value.detach().double()
    terms = input_term.abs() + bias_terms.abs().sum(dim=1)
    missing = (value - input_term - bias_terms.sum(dim=1)).abs()
    residual = torch.where(terms > 0, missing / terms.clamp_min(1e-300), (missing > 0).double())
    return FullGradient(
        _saliency(products, images.shape[-2:]), input_term, bias_terms, residual, value, tuple(call.name for call in calls)
    )


@dataclass
class _Call:
    """One output of one call: its implicit bias, and the zeros added to it, whose gradient is df/dy."""

    name: str
    bias: Tensor
    added: Tensor


class _Recorder(TorchFunctionMode):
    """Keeps the implicit bias of every module without children, as one function, and of every function called between them."""

    def __init__(self, model: nn.Module, n: int) -> None:
        super().__init__()
        self.n = n
        self.calls: list[_Call] = []
        self.counts: dict[str, int] = {}
        self.inside = [""]
        self.waiting: list[Iterator[Tensor | None]] = []
        self.paused = False
        self.handles: list[Any] = []
        whole = {part for m in model.modules() if isinstance(m, WHOLE) for part in m.modules() if part is not m}
        for name, module in model.named_modules():
            if module in whole:
                continue
            atom = isinstance(module, WHOLE) or not any(True for _ in module.children())
            # last before the call, to see what it is given; first after it, so that other hooks see what flows on
            before, after = (self._before, self._after) if atom else (self._enter, self._leave)
            handles = (
                module.register_forward_pre_hook(partial(before, name), with_kwargs=True),
                module.register_forward_hook(partial(after, name), with_kwargs=True, prepend=True),
            )
            self.handles.extend(handles)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.inside.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.inside.pop()

    def _before(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        # before the call, since it may overwrite its input
        self.paused = True
        known = known_bias.of_module(module, args, kwargs)
        biases = known or _implicit_biases(module.forward, args, kwargs, name or type(module).__name__)[0]
        self.waiting.append(iter(biases))

    def _after(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        biases = self.waiting.pop()
        found = _mapped(output, lambda v: self._opened(v, next(biases), name or type(module).__name__))
        self.paused = bool(self.waiting)
        return found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        moving = not self.paused and torch.is_grad_enabled() and any(known_bias.flows(v) for v in _leaves((args, kwargs)))
        if not moving or func.__name__ in ("__get__", "__set__", "register_hook"):
            return func(*args, **kwargs)
        if known_bias.of_function(func, list(_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        name = f"{self.inside[-1]} {func.__name__.strip('_')}".strip()
        biases, written = _implicit_biases(func, args, kwargs, name)
        if written is None:
            left = iter(biases)
            return _mapped(func(*args, **kwargs), lambda v: self._opened(v, next(left), name))
        # the result belongs into the tensor that was written to; adding to it there would spoil what func keeps of it
        target = list(_leaves((args, kwargs)))[written]
        output = func(*_mapped(args, _copied), **_mapped(kwargs, _copied))
        return target.copy_(self._opened(output, biases[0], name))

    def _opened(self, value: Any, bias: Tensor | None, name: str) -> Any:
        """The output with zeros added to it, where it has an implicit bias, one image a row."""
        if bias is not None and isinstance(value, Tensor) and bias.dim() == 1 and value.dim() > 1:
            # a known bias, one number a channel
            bias = bias.detach().view(-1, *[1] * (value.dim() - 2)).expand_as(value)
        # parts that do not lie image by image cannot be told apart, and stay in the residual
        if bias is None or not isinstance(value, Tensor) or len(bias.shape) == 0 or len(bias) != self.n:
            return value
        # what is left of y - Jx by rounding alone is no bias; scaling its map would make it one
        if bias.abs().amax() <= 8 * torch.finfo(bias.dtype).eps * value.detach().abs().amax():
            return value
        self.counts[name] = self.counts.get(name, 0) + 1
        called = name if self.counts[name] == 1 else f"{name} ({self.counts[name]})"
        added = torch.zeros_like(value).requires_grad_(True)
        self.calls.append(_Call(called, bias, added))
        return value + added


def _implicit_biases(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str
) -> tuple[list[Tensor | None], int | None]:
    """b = func(x) - J(x) x for every leaf of the output, None for one that is no floating tensor; and which input it wrote to.

    Dual numbers, and not torch.func: what a model keeps for its next call would keep torch.func's wrappers.
    """
    try:
        with torch.no_grad(), forward_ad.dual_level():
            given = _mapped((args, kwargs), _dual)
            output = func(*given[0], **given[1])
            written = next((i for i, v in enumerate(_leaves(given)) if v is output and _changed(args, kwargs, i, v)), None)
            return [_remainder(v) for v in _leaves(output)], written
    except NotImplementedError:
        raise GeomsslError(f"{name}, which has no forward derivative", "operations that torch can push forward",
                           reason="no-derivative") from None


def _remainder(value: Any) -> Tensor | None:
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return None
    primal, tangent = forward_ad.unpack_dual(value)
    return primal.clone() if tangent is None else primal - tangent


def _changed(args: tuple[Any, ...], kwargs: dict[str, Any], i: int, value: Any) -> bool:
    """Is the i-th input, which came back as the output, another than it was? `contiguous` gives its input back as it is."""
    before = list(_leaves((args, kwargs)))[i]
    return isinstance(value, Tensor) and not torch.equal(before, forward_ad.unpack_dual(value).primal)


def _copied(value: Any) -> Any:
    return value.clone() if known_bias.flows(value) else value


def _dual(value: Any) -> Any:
    """x with itself as its tangent, in memory of its own, where it depends on the image; else as it is."""
    return forward_ad.make_dual(value.detach().clone(), value.detach().clone()) if known_bias.flows(value) else value


def _leaves(value: Any) -> Iterator[Any]:
    """Everything inside nested tuples, lists and dictionaries."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested tuples, lists and dictionaries with every leaf changed."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(part, change) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)([_mapped(part, change) for part in value])
    if isinstance(value, dict):
        return {key: _mapped(part, change) for key, part in value.items()}
    return change(value)


def _chosen(output: Tensor, targets: Tensor | None) -> Tensor:
    """f (n,) from the model's output."""
    if targets is None:
        if (output.dim() == 2 and output.shape[1] != 1) or output.dim() not in (1, 2):
            given = f"an output of shape {tuple(output.shape)} without targets"
            raise GeomsslError(given, "one number an image", reason="bad-shape")
        return output.reshape(len(output))
    if output.dim() != 2 or targets.shape != output.shape[:1]:
        raise GeomsslError(
            f"targets {tuple(targets.shape)} for an output {tuple(output.shape)}", "targets (n,) of an output (n, K)",
            reason="bad-shape",
        )
    targets = targets.to(output.device)
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < output.shape[1]:
        raise GeomsslError(f"a target outside 0..{output.shape[1] - 1}", "a column of the output", reason="bad-value")
    return output.gather(1, targets[:, None])[:, 0]


def _sums(product: Tensor) -> Tensor:
    return product.detach().double().flatten(1).sum(dim=1)


def _saliency(products: list[Tensor], size: tuple[int, ...]) -> Tensor:
    """The sum of psi over all parts that have two spatial axes."""
    by_size: dict[tuple[int, ...], Tensor] = {}
    for product in products:
        if product.dim() >= 4:
            placed = _psi(product.detach())
            key = tuple(placed.shape[-2:])
            by_size[key] = by_size[key] + placed if key in by_size else placed
    resized = [
        m if key == tuple(size) else F.interpolate(m[:, None], size=list(size), mode="bilinear", align_corners=False)[:, 0]
        for key, m in by_size.items()
    ]
    return torch.stack(resized).sum(dim=0)


def _psi(product: Tensor) -> Tensor:
    """|v| between its minimum and maximum over one image's channels and places, summed over channels: (n, H, W)."""
    size = product.abs().flatten(1, -3)
    low, high = size.amin(dim=(1, 2, 3), keepdim=True), size.amax(dim=(1, 2, 3), keepdim=True)
    low, high = low.squeeze(1), high.squeeze(1)
    above = size.sum(dim=1) - size.shape[1] * low
    return torch.where(high > low, above / (high - low).clamp_min(torch.finfo(size.dtype).tiny), 0).clamp_min(0)


@cache
def _warm_up() -> None:
    """The first dual number of a process makes torch load parts of itself, which it deprecates as it does so."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters inside the block, and everything as it was after it."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with modes.evaluating(model):
        try:
            for parameter in learning:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)
