"""Where the pixels of a feature map sit on the image and how far they see, read off the layers that a pass goes through."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from geomssl.transforms.base import Size

Axis = tuple[float, float]
Axes = tuple[int, int]
LAST: Axes = (-2, -1)
CHANNELS_LAST: Axes = (-3, -2)


@dataclass(frozen=True)
class Geometry:
    """Feature pixel i sits at image coordinate offset + stride i, in pixels, along (y, x).

    source: "layers" where strides, paddings and dilations gave it; "sizes" where only the ratio of sizes was to be had
    (the fallback: 33 -> 17 is then .515, though a layer of stride 2 is 1/2).
    reach: half the receptive field: feature pixel i depends on pixels within `reach` of its place and on no others.
    Infinite where a statistic of the whole map enters (attention, group normalisation, a global mean), or where unknown.
    """

    stride: Axis
    offset: Axis
    source: Literal["layers", "sizes"] = "layers"
    reach: Axis = field(default=(math.inf, math.inf), compare=False)

    @classmethod
    def from_sizes(cls, image_size: Size, feature_size: Size) -> Geometry:
        """The fallback: a grid that covers the image evenly. stride = H / h, offset = (stride - 1) / 2."""
        stride = (image_size[0] / feature_size[0], image_size[1] / feature_size[1])
        return cls(stride, ((stride[0] - 1) / 2, (stride[1] - 1) / 2), "sizes")

    def then(self, stride: Axis, offset: Axis, half: Axis) -> Geometry:
        """The map after a layer whose output i reads its input within `half` of offset + stride i."""
        return Geometry(
            (self.stride[0] * stride[0], self.stride[1] * stride[1]),
            (self.offset[0] + self.stride[0] * offset[0], self.offset[1] + self.stride[1] * offset[1]),
            self.source,
            (self.reach[0] + self.stride[0] * half[0], self.reach[1] + self.stride[1] * half[1]),
        )

    def clean(self, length: int, image_length: int, axis: int) -> tuple[int, int]:
        """First and last feature pixel along an axis whose receptive field stays on the image; first > last where none does."""
        near = self.reach[axis] - self.offset[axis]
        far = image_length - 1 - self.reach[axis] - self.offset[axis]
        if not math.isfinite(near):
            return 0, -1
        first, last = math.ceil(near / self.stride[axis] - 1e-9), math.floor(far / self.stride[axis] + 1e-9)
        return max(0, first), min(length - 1, last)


@torch.no_grad()
def geometry(features: Callable[[Tensor], Tensor], images: Tensor) -> Geometry:
    """The geometry of features (..., h, w) = features(images), images (n, C, H, W), by following one pass.

    Convolutions, pools, padding and adaptive pools whose sizes divide are followed, and axes that change their order; whatever
    leaves the places as they are passes its input's geometry on. Where another operation changes them, or two paths
    disagree, the ratio of sizes stands in. Put a model in eval mode before: the pass runs it as it is.
    """
    output, follower = follow(features, images)
    found = follower.known(output)
    if found is not None:
        return found
    return Geometry.from_sizes((images.shape[2], images.shape[3]), (output.shape[-2], output.shape[-1]))


@torch.no_grad()
def follow(run: Callable[[Tensor], Any], images: Tensor) -> tuple[Any, Follower]:
    """What run(images) gives, and the follower, which knows the geometry of every tensor of that pass."""
    follower = Follower(images)
    with follower:
        output = run(images)
    return output, follower


class Follower(TorchFunctionMode):
    """Watches every torch call of a pass and keeps the geometry of the tensors that have one."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        # Tensors are kept so that no address is used twice. Those without geometry depend on the image all the same.
        self.tensors: dict[int, tuple[Tensor, Geometry | None]] = {}
        # Where (y, x) lie, counted from the last axis, if not at the last two.
        self.axes: dict[int, Axes] = {}
        self.grids: list[tuple[Size, Geometry]] = []
        self.remember(images, Geometry((1.0, 1.0), (0.0, 0.0), reach=(0.0, 0.0)))

    def known(self, tensor: Any, axes: Axes = LAST) -> Geometry | None:
        """The geometry of a tensor whose (y, x) lie on these axes; None where it has none, or on others."""
        return self.tensors.get(id(tensor), (None, None))[1] if self.lie(tensor) == axes else None

    def lie(self, tensor: Tensor) -> Axes:
        return self.axes.get(id(tensor), LAST)

    def remember(self, tensor: Tensor, found: Geometry | None) -> None:
        self.tensors[id(tensor)] = (tensor, found)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        before = [t for t in tensors((args, kwargs)) if id(t) in self.tensors]
        given = [(self.tensors[id(t)][1], self.lie(t), tuple(t.shape)) for t in before]
        output = func(*args, **kwargs)
        name = (resolve_name(func) or getattr(func, "__name__", "")).rsplit(".", 1)[-1]
        for tensor in tensors(output) if before else ():
            found, axes = self.after(name, args, kwargs, given, tensor)
            self.remember(tensor, found)
            if axes != LAST:
                self.axes[id(tensor)] = axes
            else:
                self.axes.pop(id(tensor), None)
        return output

    def after(
        self, name: str, args: Any, kwargs: Any, before: list[tuple[Geometry | None, Axes, tuple[int, ...]]], output: Tensor
    ) -> tuple[Geometry | None, Axes]:
        """The geometry of one output of one call on tensors that depend on the image, and the axes on which (y, x) lie."""
        given = [(found, axes, shape) for found, axes, shape in before if found is not None]
        if not given or output.dim() < 3:
            return None, LAST
        found, axes, shape = given[0]
        if name in LAYERS:
            step = LAYERS[name](shape[-2:], tuple(output.shape[-2:]), *args[1:], **kwargs) if axes == LAST else None
            moved = None if step is None else found.then(*step)
            if moved is not None and name == "conv2d":
                self.grids.append(((output.shape[-2], output.shape[-1]), moved))
            return moved, LAST
        if name in ORDERS:
            order = ordered(name, args, kwargs, len(shape))
            return (None, LAST) if order is None else (found, (order.index(axes[0] % len(shape)) - len(shape),
                                                               order.index(axes[1] % len(shape)) - len(shape)))
        # The last axis alone is mixed: channels, where (y, x) lie before it.
        normal = _listed(kwargs.get("normalized_shape", args[1:2])) if name == "layer_norm" else [1]
        mixes = name in LAST_ONLY and -1 not in axes and len(normal) == 1
        # Attributes such as T and mT turn a map round; the others that matter are no tensors.
        if (name in MOVES and not mixes) or name == "__get__":
            return None, LAST

        def size(shape: tuple[int, ...], axes: Axes) -> tuple[int, ...]:
            return tuple(shape[a] if -a <= len(shape) else 1 for a in axes)

        placed = [(found, axes) for found, axes, shape in given if size(shape, axes) == size(tuple(output.shape), axes)]
        # One number for a whole map, spread over it, is a statistic of the image and no place.
        spread = [size(shape, axes) for _, axes, shape in given if size(shape, axes) != size(tuple(output.shape), axes)]
        if not placed or any(set(left) != {1} for left in spread) or any(other != placed[0] for other in placed):
            return None, LAST
        found, axes = placed[0]
        if axes != LAST and any(len(shape) != output.dim() for _, _, shape in given):
            return None, LAST
        if (name in GLOBAL and not mixes) or spread or len(given) < len(before):
            return replace(found, reach=(math.inf, math.inf)), axes
        reaches = [g.reach for g, _ in placed]
        return replace(found, reach=(max(r[0] for r in reaches), max(r[1] for r in reaches))), axes


def ordered(name: str, args: Any, kwargs: Any, dims: int) -> list[int] | None:
    """The order of the axes that a call gives: output axis i is input axis order[i]; None where that is not read."""
    order = list(range(dims))
    if name in ("permute", "movedim", "moveaxis") and not kwargs:
        first, *rest = args[1:]
        if name == "permute":
            return [d % dims for d in (_listed(first) if not rest else [first, *rest])]
        sources, targets = ([d % dims for d in _listed(v)] for v in (first, rest[0]))
        kept = [d for d in order if d not in sources]
        for target, source in sorted(zip(targets, sources, strict=True)):
            kept.insert(target, source)
        return kept
    if name in ("transpose", "swapaxes", "swapdims") and not kwargs:
        a, b = (d % dims for d in args[1:3])
        order[a], order[b] = order[b], order[a]
        return order
    return None


def _listed(value: Any) -> list[int]:
    """One number, or several that may lie in a tuple of their own."""
    while isinstance(value, tuple) and len(value) == 1 and isinstance(value[0], (tuple, list)):
        value = value[0]
    return [int(v) for v in value] if isinstance(value, (tuple, list)) else [int(value)]


def tensors(values: Any) -> Iterator[Tensor]:
    """Every tensor inside nested tuples, lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors(value)


# Calls that may keep the size of a map and yet move its pixels.
MOVES = {
    "roll", "flip", "fliplr", "flipud", "rot90", "t", "T", "mT", "grid_sample", "matmul",
    "bmm", "einsum", "linear", "gather", "scaled_dot_product_attention", "reshape_as", "fft2", "ifft2", "sort", "cumsum",
    "pixel_shuffle", "pixel_unshuffle", "index_select", "take_along_dim",
}

# Calls that change the order of the axes.
ORDERS = {"permute", "movedim", "moveaxis", "transpose", "swapaxes", "swapdims"}

# Calls that mix the last axis alone.
LAST_ONLY = {"linear", "layer_norm"}

# Calls in which every pixel of a map sees all of it.
GLOBAL = {"instance_norm", "group_norm", "layer_norm", "softmax", "log_softmax", "softmin"}

Step = tuple[Axis, Axis, Axis]


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _window(kernel: Any, stride: Any, padding: Any, dilation: Any = 1) -> Step:
    """Output i of a window layer reads within half = dilation (kernel - 1) / 2 of stride i - padding + half."""
    (kernel, stride, padding, dilation) = (_pair(v) for v in (kernel, stride, padding, dilation))
    half = [d * (k - 1) / 2 for k, d in zip(kernel, dilation, strict=True)]
    return (float(stride[0]), float(stride[1])), (half[0] - padding[0], half[1] - padding[1]), (half[0], half[1])


def _conv(before: Size, after: Size, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0,
          dilation: Any = 1, groups: int = 1) -> Step:  # fmt: skip
    kernel = (weight.shape[2], weight.shape[3])
    if padding == "same":
        # PyTorch puts the odd pixel at the end.
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, _pair(dilation), strict=True))
    return _window(kernel, stride, 0 if padding == "valid" else padding, dilation)


def _max_pool(before: Size, after: Size, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
              **_: Any) -> Step:  # fmt: skip
    return _window(kernel_size, stride or kernel_size, padding, dilation)


def _avg_pool(before: Size, after: Size, kernel_size: Any, stride: Any = None, padding: Any = 0, *_: Any, **__: Any) -> Step:
    return _window(kernel_size, stride or kernel_size, padding)


def _adaptive(before: Size, after: Size, *_: Any, **__: Any) -> Step | None:
    if before[0] % after[0] or before[1] % after[1]:
        return None
    ratio = (before[0] // after[0], before[1] // after[1])
    return _window(ratio, ratio, 0)


def _pad(before: Size, after: Size, pad: Any, *_: Any, **__: Any) -> Step:
    left, _, top = (*pad, 0, 0, 0)[:3]
    return (1.0, 1.0), (-float(top), -float(left)), (0.0, 0.0)


LAYERS: dict[str, Callable[..., Step | None]] = {
    "conv2d": _conv,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "avg_pool2d": _avg_pool,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_max_pool2d": _adaptive,
    "adaptive_max_pool2d_with_indices": _adaptive,
    "pad": _pad,
}
