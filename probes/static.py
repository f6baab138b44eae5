"""A static reader: what one pass through a module does to the grid of its maps, and where equivariance must break for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from geomssl.encoders.geometry import tensors
from geomssl.probes.filters import asymmetry
from geomssl.transforms.base import Size

Move = Literal["90°", "180°", "mirror", "shift"]
Pair = tuple[int, int]

# Calls that read a neighbourhood or change the grid, by what they are called in words.
GRIDS = {
    "conv2d": "convolution", "conv_transpose2d": "transposed convolution", "max_pool2d": "max-pool",
    "max_pool2d_with_indices": "max-pool", "avg_pool2d": "average pool", "adaptive_avg_pool2d": "adaptive average pool",
    "adaptive_max_pool2d": "adaptive max-pool", "adaptive_max_pool2d_with_indices": "adaptive max-pool",
    "interpolate": "interpolation",
}
NONLINEAR = {
    "relu", "relu_", "gelu", "silu", "leaky_relu", "elu", "selu", "celu", "tanh", "sigmoid", "hardtanh", "relu6", "hardswish",
    "hardsigmoid", "softplus", "mish", "softsign", "logsigmoid",
}
# Where a tensor that does not come from the image can enter and mark places.
MIXING = {"add", "add_", "sub", "mul", "mul_", "cat", "concat", "concatenate"}
# Calls that lay a map out anew and lose nothing.
LAYOUT = {
    "flatten", "view", "reshape", "unflatten", "permute", "transpose", "unsqueeze", "squeeze", "mean", "sum", "amax", "amin",
    "movedim", "contiguous", "expand", "repeat_interleave", "chunk", "split", "unbind", "stack", "swapaxes", "view_as",
    "__get__",
}
PERMUTING = {"permute", "transpose", "swapaxes", "movedim"}
# Those that may also cut a map into pieces.
CUTTING = {"view", "reshape"}
UPRIGHT = (0, 1, 2, 3)
CHANNELS_LAST = (0, 2, 3, 1)
WATCHED = {*GRIDS, *NONLINEAR, *MIXING, "pad", "linear"}


@dataclass(frozen=True)
class Call:
    """One call of a pass, numbered among the calls that are watched.

    layer: the module that makes it, or the parameter that brings the place in.
    what: in words ("convolution", "max-pool", "relu", "position", "linear over places", "unread").
    kernel, stride, dilation, before, after: along (y, x); before and after are the padding at the two ends. mode: what is
    padded with ("zeros", "circular", "reflect", "replicate", "lowest" in a max-pool), "" without padding.
    asymmetry: move -> |moved filters - filters| / (sqrt(2) |filters|), about 1 for filters that have nothing to do with
    their moved selves; of a group convolution, with the channels moved along.
    source: the number of the grid call that made its input, or None for the image. reach: image pixels between two
    neighbouring pixels of its input. padded_by: number of the separate call that padded its input.
    operand: which argument carries the places, for "position".
    """

    number: int
    layer: str
    name: str
    what: str
    size_in: Size
    size_out: Size
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    dilation: Pair = (1, 1)
    before: Pair = (0, 0)
    after: Pair = (0, 0)
    mode: str = ""
    asymmetry: dict[str, float] = field(default_factory=dict)
    source: int | None = None
    reach: tuple[float, float] = (1.0, 1.0)
    padded_by: int | None = None
    operand: int | None = None

    @property
    def grid(self) -> bool:
        return self.name in GRIDS

    @property
    def adaptive(self) -> bool:
        return self.name.startswith("adaptive")

    @property
    def whole(self) -> bool:
        """A pool over the whole map: places are gone after it."""
        by_window = "pool" in self.name and self.kernel == self.size_in and max(*self.before, *self.after) == 0
        return (self.adaptive or by_window) and self.size_out == (1, 1)

    @property
    def down(self) -> Pair:
        """How many pixels of the input one step of the output is, along (y, x); an adaptive pool's ratio, rounded up."""
        if self.whole:
            return (1, 1)
        if self.adaptive:
            return (-(-self.size_in[0] // self.size_out[0]), -(-self.size_in[1] // self.size_out[1]))
        return (1, 1) if self.name in ("conv_transpose2d", "interpolate") else self.stride


class Watch(TorchFunctionMode):
    """Counts the watched calls of a pass; what a call gives is `call`'s to say. One object serves one pass."""

    def __init__(self) -> None:
        super().__init__()
        self.number = -1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = (resolve_name(func) or getattr(func, "__name__", "")).rsplit(".", 1)[-1]
        if name in WATCHED:
            self.number += 1
            return self.call(name, func, args, kwargs or {})
        return self.other(name, func, args, kwargs or {})

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)

    def other(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        return func(*args, **kwargs)


@torch.no_grad()
def read(features: Callable[[Tensor], Any], images: Tensor, module: nn.Module) -> list[Call]:
    """Follow one pass features(images) of a module, in eval mode: its grid calls, nonlinearities, positions and unread calls.

    images (n, C, H, W); two will do. Only calls that the features come from are given. Pure data comes back: nothing of the
    module is kept or changed.
    """
    with _where(module) as places:
        held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        reader = _Reader(images, places, {t.untyped_storage().data_ptr(): name for name, t in held.items()})
        with reader:
            output = features(images)
    came = reader.family(tensors(output))
    return [call for call in reader.calls if call.number in came]


@contextmanager
def _where(module: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """The stack of the modules that are running, outermost first."""
    stack: list[tuple[str, nn.Module]] = [("", module)]
    handles = []
    for name, part in module.named_modules():
        if name:
            handles.append(part.register_forward_pre_hook(lambda m, _, name=name: stack.append((name, m))))
            handles.append(part.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


class _Reader(Watch):
    """Records calls. A tensor that comes from the image is known by its address: its grid call, its reach, all its calls."""

    def __init__(self, images: Tensor, places: list[tuple[str, nn.Module]], held: dict[int, str]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.places, self.held = places, held
        # Tensors are kept so that no address is used twice.
        self.known: dict[int, tuple[Tensor, int | None, tuple[float, float]]] = {id(images): (images, None, (1.0, 1.0))}
        self.families: dict[int, frozenset[int]] = {}
        self.padded: dict[int, Call] = {}
        self.flat: dict[int, Size] = {}
        # Which axis of (N, C, H, W) each axis is, where a map was permuted.
        self.axes: dict[int, tuple[int, ...]] = {}

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        given = [t for t in tensors((args, kwargs)) if id(t) in self.known]
        if not given:
            return func(*args, **kwargs)
        if name in MIXING:
            given = _widest_first(given)
        sizes = [tuple(t.shape[-2:]) for t in given]
        found = self._position(name, args) if name in MIXING else None
        output = func(*args, **kwargs)
        _, source, reach = self.known[id(given[0])]
        made = Call(
            self.number, self.places[-1][0], name, GRIDS.get(name, name), _size(sizes[0]),
            _size(next(tensors(output)).shape[-2:]), source=source, reach=reach, operand=found,
        )
        if name in GRIDS and given[0].dim() in (3, 4):
            made = self._read_grid(made, given[0], args, kwargs)
            self.calls.append(made)
            step = _step(made)
            self._remember(output, made.number, (reach[0] * step[0], reach[1] * step[1]), self.family(given) | {made.number})
            return output
        if name == "pad" and given[0].dim() == 4:
            made = _read_pad(made, args, kwargs)
            self._remember(output, source, reach, self.family(given))
            self.padded[id(output)] = made
            return output
        if found is not None:
            marks = _operands(name, args)[found]
            self.calls.append(replace(
                made, what="position", layer=self.held.get(marks.untyped_storage().data_ptr(), made.layer)
            ))
        elif name == "linear" and id(given[0]) in self.flat:
            self.calls.append(replace(made, what="linear over places", size_in=self.flat[id(given[0])], size_out=(1, 1)))
        elif name in NONLINEAR and given[0].dim() >= 4 and min(sizes[0]) >= 4 and self._upright(given[0]):
            self.calls.append(made)
        self._pass_on(given, output, source, reach, made.number)
        return output

    def family(self, tensors: Iterable[Tensor]) -> frozenset[int]:
        """The numbers of all calls that those tensors come from."""
        return frozenset[int]().union(*(self.families.get(id(t), frozenset()) for t in tensors))

    def other(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        given = _widest_first([t for t in tensors((args, kwargs)) if id(t) in self.known])
        before = [tuple(t.shape) for t in given]
        output = func(*args, **kwargs)
        if not given:
            return output
        _, source, reach = self.known[id(given[0])]
        unread = None
        for tensor in tensors(output):
            maps = given[0].dim() >= 4 and tensor.dim() >= 4
            if name in PERMUTING and maps:
                self.axes[id(tensor)] = _permuted(name, args, kwargs, self.axes.get(id(given[0]), UPRIGHT))
            if maps and name not in LAYOUT - CUTTING and tuple(tensor.shape[-2:]) != before[0][-2:]:
                unread = -1 - len(self.calls)  # not counted among the watched ones
                self.calls.append(Call(
                    unread, self.places[-1][0], name, "unread", _size(before[0][-2:]), _size(tensor.shape[-2:]),
                    source=source, reach=reach,
                ))
            rows = given[0].dim() >= 4 and tensor.dim() == 2 and tensor.shape[1] == math.prod(before[0][1:])
            if name in LAYOUT and rows and math.prod(before[0][-2:]) > 1:
                self.flat[id(tensor)] = _size(before[0][-2:])
        self._pass_on(given, output, source, reach, unread)
        return output

    def _pass_on(
        self, given: list[Tensor], output: Any, source: int | None, reach: tuple[float, float], number: int | None
    ) -> None:
        family = self.family(given) | (frozenset() if number is None else {number})
        for tensor in tensors(output):
            if id(tensor) not in self.known:
                self._remember(tensor, source, reach, family)
            if id(given[0]) in self.axes and id(tensor) not in self.axes and tensor.dim() == given[0].dim():
                self.axes[id(tensor)] = self.axes[id(given[0])]
            self.families[id(tensor)] = family | self.families.get(id(tensor), frozenset())
            if id(given[0]) in self.flat and tensor.shape == given[0].shape:
                self.flat[id(tensor)] = self.flat[id(given[0])]

    def _remember(
        self, output: Any, source: int | None, reach: tuple[float, float], family: frozenset[int]
    ) -> None:
        for tensor in tensors(output):
            self.known[id(tensor)] = (tensor, source, reach)
            self.families[id(tensor)] = family

    def _upright(self, maps: Tensor) -> bool:
        return self.axes.get(id(maps), UPRIGHT) == UPRIGHT

    def _read_grid(self, made: Call, entered: Tensor, args: Any, kwargs: Any) -> Call:
        pad = self.padded.get(id(entered))
        made = _geometry(made, named_arguments(made.name, args, kwargs))
        if pad is not None and made.mode == "":
            made = replace(
                made, before=pad.before, after=pad.after, mode=pad.mode, size_in=pad.size_in, padded_by=pad.number
            )
        if made.name in ("conv2d", "conv_transpose2d"):
            named = named_arguments(made.name, args, kwargs)
            made = replace(made, asymmetry=asymmetry(named["weight"], int(named.get("groups") or 1)))
        return made

    def _position(self, name: str, args: Any) -> int | None:
        """Which operand does not come from the image and is not the same at all places of the maps or tokens it meets."""
        operands = _operands(name, args)
        inside = [t for t in operands if isinstance(t, Tensor) and id(t) in self.known]
        for number, operand in enumerate(operands):
            if isinstance(operand, Tensor) and id(operand) not in self.known and inside:
                axes = self.axes.get(id(inside[0]), UPRIGHT)
                if _marks(operand, inside[0], name, axes):
                    return number
        return None


def _widest_first(given: list[Tensor]) -> list[Tensor]:
    """The map before what is spread over it, such as the weights of its channels: it is the map that goes on."""
    return sorted(given, key=lambda t: -t.shape[-1] * t.shape[-2] if t.dim() >= 4 else 0)


def _operands(name: str, args: Any) -> list[Any]:
    return list(args[0]) if name.startswith(("cat", "conc")) else list(args[:2])


def _marks(operand: Tensor, beside: Tensor, name: str, axes: tuple[int, ...]) -> bool:
    """Does it differ from place to place? Tokens before a square grid of them (a class token) are no places."""
    values = operand.detach()
    if axes == CHANNELS_LAST:
        values = values.movedim(-1, -3) if values.dim() >= 3 else values.reshape(-1, 1, 1)
    if beside.dim() >= 4 and values.dim() >= 2:
        return bool((values - values[..., :1, :1]).abs().amax() > 0) if values.shape[-1] * values.shape[-2] > 1 else False
    if beside.dim() == 3 and values.dim() >= 2 and values.shape[-2] > 1 and not name.startswith(("cat", "conc")):
        tokens = values[..., values.shape[-2] - math.isqrt(values.shape[-2]) ** 2 :, :]
        return bool((tokens - tokens[..., :1, :]).abs().amax() > 0)
    return False


def _permuted(name: str, args: Any, kwargs: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The axes after a permutation of a 4-axis map; () where it is another one."""
    if len(axes) != 4 or kwargs or args[0].dim() != 4:
        return ()
    if name == "permute":
        dims = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return tuple(axes[d] for d in dims)
    if name in ("transpose", "swapaxes"):
        order = list(axes)
        order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
        return tuple(order)
    return ()


def _size(shape: Any) -> Size:
    values = tuple(int(v) for v in shape)
    return (values[-2], values[-1]) if len(values) > 1 else (1, 1)


def pair(value: Any) -> Pair:
    """(y, x) of an argument that may be one number."""
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[-1]))


ARGUMENTS = {
    "conv2d": (("input", "weight", "bias", "stride", "padding", "dilation", "groups"), (None, 1, 0, 1, 1)),
    "conv_transpose2d": (
        ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"), (None, 1, 0, 0, 1, 1)
    ),
    "max_pool2d": (
        ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"), (None, 0, 1, False, False)
    ),
    "avg_pool2d": (
        ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
        (None, 0, False, True, None),
    ),
    "adaptive": (("input", "output_size", "return_indices"), (False,)),
    "interpolate": (
        ("input", "size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias"),
        (None, None, "nearest", None, None, False),
    ),
    "pad": (("input", "pad", "mode", "value"), ("constant", None)),
}


def named_arguments(name: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a grid call by their names, defaults filled in."""
    key = "adaptive" if name.startswith("adaptive") else name.removesuffix("_with_indices")
    names, defaults = ARGUMENTS[key]
    values = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    values.update(zip(names, args, strict=False))
    return {**values, **kwargs}


def _geometry(made: Call, given: dict[str, Any]) -> Call:
    if made.adaptive:
        return made
    if made.name == "interpolate":
        return replace(made, mode=str(given["mode"]))
    transposed = made.name == "conv_transpose2d"
    kernel = pair(given["weight"].shape[2:]) if "weight" in given else pair(given["kernel_size"])
    stride = pair(given["stride"] if given["stride"] not in (None, [], ()) else kernel)
    dilation = pair(given.get("dilation", 1))
    padding = given["padding"]
    if padding in ("same", "valid"):
        whole = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        # PyTorch puts the odd pixel at the end.
        before, after = (whole[0] // 2, whole[1] // 2), (whole[0] - whole[0] // 2, whole[1] - whole[1] // 2)
    else:
        before = after = pair(padding)
    if transposed:
        extra = pair(given["output_padding"])
        return replace(made, kernel=kernel, stride=stride, dilation=dilation, before=before,
                       after=(before[0] - extra[0], before[1] - extra[1]))
    kind = "lowest" if made.name.startswith("max") else "zeros"
    return replace(made, kernel=kernel, stride=stride, dilation=dilation, before=before, after=after,
                   mode=kind if max(*before, *after) > 0 else "")


def _read_pad(made: Call, args: Any, kwargs: Any) -> Call:
    given = named_arguments("pad", args, kwargs)
    left, right, top, bottom = (*given["pad"], 0, 0, 0, 0)[:4]
    mode = "zeros" if given["mode"] == "constant" and not given["value"] else str(given["mode"])
    return replace(made, before=(top, left), after=(bottom, right), mode=mode)


def _step(made: Call) -> tuple[float, float]:
    """Pixels of the input between neighbouring pixels of the output."""
    if made.name == "conv_transpose2d":
        return 1 / made.stride[0], 1 / made.stride[1]
    if made.adaptive or made.name == "interpolate":
        return made.size_in[0] / made.size_out[0], made.size_in[1] / made.size_out[1]
    return float(made.stride[0]), float(made.stride[1])
