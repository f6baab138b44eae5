"""Generators: how images and feature maps move at first order under a transform, without a sampler that has kinks."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from geomssl.data.rendered import Rendered
from geomssl.encoders.geometry import Geometry
from geomssl.errors import GeomsslError, unknown
from geomssl.probes.affine import norm_gain
from geomssl.transforms import Brightness, Contrast, Hue, Rotate, Saturation, Shear, Translate, Zoom
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.geometric import Geometric
from geomssl.transforms.sampling import frame

Difference = Literal["central", "spectral"]
# Half width of the central stencil: exact to order 6.
RADIUS = 3


@dataclass(frozen=True)
class Generator:
    """One way to move: params(t) = identity + t direction of a transform, t in `unit`.

    shown, per: the unit of a table, and how much of `unit` it is (a degree is pi / 180 radian).
    """

    name: str
    transform: Transform
    direction: tuple[float, ...]
    unit: str
    shown: str
    per: float = 1.0

    @property
    def moves(self) -> bool:
        """Does it move pixels, as against changing their values?"""
        return isinstance(self.transform, Geometric)

    def params(self, t: Tensor, n: int) -> Tensor:
        """identity + t direction, (n, P)."""
        return self.transform.identity(n).to(t) + t * torch.tensor(self.direction, dtype=torch.float64).to(t)

    def velocity(self, points: Tensor, size: Size) -> Tensor:
        """v(u) = d/dt g_t u at points (..., h, w, 2) as (y, x), pixels per unit: minus the slope of g_t^-1 u."""
        assert isinstance(self.transform, Geometric)
        whole, transform = points.double().reshape(1, *points.shape[-3:]), self.transform
        with forward_mode():
            slope: Tensor = jvp(lambda t: transform.pull(whole, self.params(t, 1), size), *_start(points.device))[1]
        return -slope[0]


_DEGREE = 180 / math.pi
GENERATORS = {
    g.name: g
    for g in (
        Generator("translate-x", Translate(), (0.0, 1.0), "pixel", "pixel"),
        Generator("translate-y", Translate(), (1.0, 0.0), "pixel", "pixel"),
        Generator("rotate", Rotate(), (_DEGREE,), "radian", "degree", 1 / _DEGREE),
        Generator("zoom", Zoom(), (1.0,), "unit of log zoom", "1 % of zoom", 0.01),
        Generator("shear", Shear(), (_DEGREE,), "radian", "degree", 1 / _DEGREE),
        Generator("hue", Hue(), (1.0,), "turn", "1 % of a turn", 0.01),
        Generator("brightness", Brightness(), (1.0,), "unit of factor", "1 % of brightness", 0.01),
        Generator("contrast", Contrast(), (1.0,), "unit of factor", "1 % of contrast", 0.01),
        Generator("saturation", Saturation(), (1.0,), "unit of factor", "1 % of saturation", 0.01),
    )
}


def generator(name: str | Generator) -> Generator:
    """The generator of that name; GeomsslError naming the nearest where there is none."""
    if isinstance(name, Generator):
        return name
    if name not in GENERATORS:
        raise unknown("generator", name, GENERATORS)
    return GENERATORS[name]


def _start(device: torch.device) -> tuple[Tensor, Tensor]:
    """t = 0 and its tangent 1."""
    zero = torch.zeros((), dtype=torch.float64, device=device)
    return zero, torch.ones_like(zero)


def jvp(function: Callable[[Tensor], Any], at: Tensor, way: Tensor) -> tuple[Any, Any]:
    """(function(at), its derivative there along `way`), in forward mode."""
    found = torch.func.jvp(function, (at,), (way,))
    return found[0], found[1]


def tangent(images: Tensor, chosen: Generator, difference: Difference = "central") -> Tensor:
    """d/dt T_{g_t} x at t = 0 of images (n, C, H, W), per unit of t: -v . grad x where pixels move, forward mode elsewhere.

    The gradient is a difference of pixels (see `differences`), so that no reading between pixels is differentiated. At the
    border it is one-sided, as if the picture went on as it goes there.
    """
    if chosen.moves:
        size: Size = (images.shape[2], images.shape[3])
        return flow(images, chosen, Geometry((1.0, 1.0), (0.0, 0.0)), size, difference)
    with forward_mode():
        slope: Tensor = jvp(
            lambda t: chosen.transform(images, chosen.params(t.to(images.dtype), len(images))), *_start(images.device)
        )[1]
    return slope


def rendered_tangent(pictures: Rendered, rows: Tensor, chosen: Generator, dtype: torch.dtype, device: Any) -> Tensor:
    """d/dt T_{g_t} x of rendered pictures: the slope of their formula, exact up to the border and beyond."""
    with forward_mode():
        slope: Tensor = jvp(
            lambda t: pictures.images(rows, chosen.transform, chosen.params(t, len(rows)), dtype, device),
            *_start(torch.device("cpu")),
        )[1]
    return slope


def flow(maps: Tensor, chosen: Generator, placed: Geometry, image_size: Size, difference: Difference) -> Tensor:
    """d/dt of the spatial action on maps (..., h, w): -v(u) . grad f(u), u where the map's pixels stand on the image."""
    size: Size = (maps.shape[-2], maps.shape[-1])
    y, x = frame(size, torch.empty((), dtype=torch.float64, device=maps.device))
    y, x = placed.offset[0] + placed.stride[0] * y, placed.offset[1] + placed.stride[1] * x
    velocity = chosen.velocity(torch.stack(torch.broadcast_tensors(y, x), dim=-1)[0], image_size).to(maps.device)
    down, across = (differences(length, difference).to(maps.device) for length in size)
    rise = torch.matmul((down / placed.stride[0]).to(maps.dtype), maps)
    run = torch.matmul(maps, (across.T / placed.stride[1]).to(maps.dtype))
    return -(velocity[..., 0].to(maps.dtype) * rise + velocity[..., 1].to(maps.dtype) * run)


def differences(length: int, difference: Difference = "central") -> Tensor:
    """D (length, length), float64: D f is the derivative of f at its samples.

    central: the symmetric stencil of up to 7 samples that fits (exact for polynomials of degree 6, less near the ends), and at
    both ends the one-sided one of 3 (degree 2). spectral: exact for what is periodic and has nothing at the Nyquist frequency.
    """
    place = torch.arange(length, dtype=torch.float64)
    if difference == "spectral":
        k = torch.fft.fftfreq(length, dtype=torch.float64)
        k[k.abs() == 0.5] = 0
        basis = torch.fft.fft(torch.eye(length, dtype=torch.float64), dim=0)
        return torch.fft.ifft(2j * math.pi * k[:, None] * basis, dim=0).real
    matrix = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        half = min(RADIUS, i, length - 1 - i)
        first, last = (i - half, i + half) if half else (max(0, min(i, length - 3)), min(length - 1, max(i, 2)))
        offsets = place[first : last + 1] - i
        powers = offsets ** torch.arange(len(offsets), dtype=torch.float64)[:, None]
        wanted = torch.zeros(len(offsets), dtype=torch.float64)
        if length > 1:
            wanted[1] = 1
        matrix[i, first : last + 1] = torch.linalg.solve(powers, wanted)
    return matrix


@contextmanager
def forward_mode() -> Iterator[None]:
    """Inside, attention runs by the ways that know tangents, and torch's own first-use deprecation notice is not shown."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Linear(TorchFunctionMode):
    """Linear layers of a dual tensor with plain weights: one pass for values and one for tangents, where torch runs more.

    Of a convolution torch runs three, and of a BatchNorm in eval some twelve: its tangent is gamma / sqrt(var + eps) times
    the input's.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        slope = _slope(args[0]) if args else None
        if slope is not None and not any(_slope(a) is not None for a in (*args[1:], *kwargs.values())):
            plain = forward_ad.unpack_dual(args[0]).primal
            if func is torch.conv2d and len(args) > 1 and "bias" not in kwargs:
                return forward_ad.make_dual(func(plain, *args[1:], **kwargs), func(slope, args[1], None, *args[3:], **kwargs))
            if func is functional.batch_norm:
                gain = norm_gain(*args[1:], **kwargs)
                if gain is not None:
                    gain = gain.to(slope.dtype).view(-1, *(1,) * (slope.dim() - 2))
                    return forward_ad.make_dual(func(plain, *args[1:], **kwargs), slope * gain)
        return func(*args, **kwargs)


def _slope(value: Any) -> Tensor | None:
    found: Tensor | None = forward_ad.unpack_dual(value).tangent if isinstance(value, Tensor) else None
    return found


def push(run: Callable[[Tensor], Sequence[Tensor]], images: Tensor, tangents: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of run(x) and J run(x) tangents, in one forward pass."""
    with forward_mode(), forward_ad.dual_level(), _Linear():
        # A model may overwrite its input.
        pairs = [forward_ad.unpack_dual(out) for out in run(forward_ad.make_dual(images.clone(), tangents.clone()))]
    return [p.primal for p in pairs], [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]


def pushed(
    run: Callable[[Tensor], Sequence[Tensor]], module: torch.nn.Module, images: Tensor, tangents: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """push, and a GeomsslError naming the layer and the operation that has no forward mode."""
    try:
        return push(run, images, tangents)
    except (NotImplementedError, RuntimeError) as error:
        said = " ".join(str(error).split())
        if not any(word in said for word in ("forward AD", "forward-mode", "forward mode", "jvp")):
            raise
        where = _stopped(run, module, images, tangents)
        operation = said.split(" that does not support")[0].removeprefix("Trying to use forward AD with ")
        operation = "an autograd.Function without jvp" if "Function" in said else operation[:80]
        raise GeomsslError(
            f"{where} without a forward mode: {operation}", "operations that torch can differentiate forward",
            reason="no-forward-mode",
        ) from None


def _stopped(run: Any, module: torch.nn.Module, images: Tensor, tangents: Tensor) -> str:
    """The last layer that a failing pass entered."""
    entered = [type(module).__name__]
    handles = [
        inner.register_forward_pre_hook(functools.partial(_enter, entered, name)) for name, inner in module.named_modules()
    ]
    try:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            push(run, images, tangents)
    finally:
        for handle in handles:
            handle.remove()
    return entered[-1]


def _enter(entered: list[str], name: str, module: torch.nn.Module, given: Any) -> None:
    entered.append(f"layer {name!r} ({type(module).__name__})" if name else type(module).__name__)
