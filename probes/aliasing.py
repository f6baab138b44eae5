"""The aliasing meter: what share of the energy lies above the new Nyquist before a stride, and after a nonlinearity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.static import GRIDS, NONLINEAR, Call, Pair, Watch, named_arguments, pair

# The most channels that are looked at in one map, evenly spaced.
CHANNELS = 32


@dataclass(frozen=True)
class Aliasing:
    """Energies above the new Nyquist of one call, image by image, (n,) float64 on the CPU: radial, along y, along x; and all.

    radial: where (f_y s_y)^2 + (f_x s_x)^2 > 1/4, f in cycles a pixel; along one axis: where |f| s > 1/2.
    """

    radial: Tensor
    y: Tensor
    x: Tensor
    total: Tensor

    def share(self, which: str = "radial") -> float:
        """Energy above over all energy, of all images together; 0 where a map does not vary at all."""
        whole = float(self.total.sum())
        return float(getattr(self, which).sum()) / whole if whole > 0 else 0.0

    def interval(self, seed: int, level: float, resamples: int) -> tuple[float, float] | None:
        """Bounds of the radial share over images; None for fewer than two images or maps that do not vary."""
        if len(self.total) < 2 or not float(self.total.sum()) > 0:
            return None
        low, high = bootstrap_ratio(self.radial[:, None], self.total[:, None], seed, level, resamples)
        found = float(low) ** 2, float(high) ** 2
        return found if all(v == v for v in found) else None


def spectrum_above(maps: Tensor, down: Pair) -> Aliasing:
    """Energies of maps (n, c, h, w) above the Nyquist of a grid that keeps one pixel in down = (y, x), and all of it.

    In float64, over the channels: the mean under the window is taken off, a Hann window (its zeros outside the map) laid on
    both axes, and the square of the FFT summed. Frequencies on the new Nyquist itself count as below it.
    """
    x = maps.detach().to("cpu", torch.float64)
    h, w = x.shape[-2:]
    window = _hann(h)[:, None] * _hann(w)[None, :]
    x = (x - (x * window).sum(dim=(-2, -1), keepdim=True) / window.sum()) * window
    # Half of the spectrum stands for all of it: columns besides the first and the last of an even width count twice.
    energy = torch.fft.rfft2(x).abs().square_().sum(dim=1)
    twice = torch.full((energy.shape[-1],), 2.0, dtype=torch.float64)
    twice[0] = 1
    if w % 2 == 0:
        twice[-1] = 1
    energy = energy * twice
    fy = (torch.fft.fftfreq(h, dtype=torch.float64).abs() * down[0])[:, None]
    fx = (torch.fft.rfftfreq(w, dtype=torch.float64).abs() * down[1])[None, :]
    edge = 0.5 + 1e-9

    def above(where: Tensor) -> Tensor:
        return (energy * where).sum(dim=(-2, -1))

    return Aliasing(above((fy**2 + fx**2).sqrt() > edge), above((fy > edge).expand(h, len(twice))),
                    above((fx > edge).expand(h, len(twice))), energy.sum(dim=(-2, -1)))


def finer(maps: Tensor) -> Tensor:
    """Maps (n, c, h, w) on a grid twice as fine, by their periodic trigonometric interpolation, float64 on the CPU."""
    x = maps.detach().to("cpu", torch.float64)
    for axis in (-2, -1):
        n = x.shape[axis]
        spectrum = torch.fft.rfft(x, dim=axis)
        if n % 2 == 0:
            # The Nyquist term stood for itself; on the finer grid it has a twin of negative frequency.
            spectrum.narrow(axis, spectrum.shape[axis] - 1, 1).mul_(0.5)
        x = torch.fft.irfft(spectrum, n=2 * n, dim=axis) * 2
    return x


@torch.no_grad()
def meter(features: Callable[[Tensor], Any], batches: Sequence[Tensor], calls: Sequence[Call]) -> dict[int, Aliasing]:
    """The aliasing of every call that skips pixels and of every pointwise nonlinearity on maps: call number -> Aliasing.

    Before a stride: the same call is run at stride 1 and measured against the grid that it keeps; an adaptive pool counts
    as an average over its ratio, rounded up. After a nonlinearity: its input is interpolated to a grid twice as fine, the
    nonlinearity is run there, and what lies above the map's own Nyquist is what it would fold back. The wrap of that
    interpolation meets the edges, where the window is nearly zero. At most 32 channels of a map.
    """
    wanted = {c.number: c for c in calls if (c.name in GRIDS and max(c.down) > 1) or c.name in NONLINEAR}
    found: dict[int, list[Aliasing]] = {}
    for images in batches:
        reader = _Meter(wanted)
        with reader:
            features(images)
        for number, one in reader.found.items():
            found.setdefault(number, []).append(one)
    return {
        number: Aliasing(*(torch.cat([getattr(one, key) for one in parts]) for key in ("radial", "y", "x", "total")))
        for number, parts in found.items()
    }


class _Meter(Watch):
    """Measures the wanted calls as they come by; what they give is left as it is."""

    def __init__(self, wanted: dict[int, Call]) -> None:
        super().__init__()
        self.wanted, self.found = wanted, dict[int, Aliasing]()

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        made = self.wanted.get(self.number)
        if made is not None and made.name == name:
            if name in NONLINEAR:
                inner = _few(args[0].flatten(1, -3))
                self.found[self.number] = spectrum_above(_bend(func, finer(inner), args, kwargs), (2, 2))
            else:
                whole = at_stride_one(name, func, args, kwargs, CHANNELS)
                if whole is not None:
                    self.found[self.number] = spectrum_above(_few(whole), made.down)
        return func(*args, **kwargs)


def _few(maps: Tensor) -> Tensor:
    """At most CHANNELS channels, evenly spaced."""
    return maps if maps.shape[1] <= CHANNELS else maps[:, :: -(-maps.shape[1] // CHANNELS)]


def _bend(func: Any, inner: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The nonlinearity of other values, out of place, with the same settings."""
    return func(inner.clone(), *args[1:], **kwargs)


def at_stride_one(name: str, func: Any, args: Any, kwargs: Any, channels: int | None = None) -> Tensor | None:
    """What a convolution or pool gives at every pixel, before any is skipped; None where that cannot be said.

    channels: of a convolution, so many filters at most, evenly spaced, unless it works in groups.
    """
    given = named_arguments(name, args, kwargs)
    x = given["input"]
    if name.startswith("adaptive"):
        out = pair(given["output_size"]) if not isinstance(given["output_size"], (tuple, list)) else given["output_size"]
        ratio = [-(-n // (m or n)) for n, m in zip(x.shape[-2:], out, strict=True)]
        pool = F.max_pool2d if "max" in name else F.avg_pool2d
        return pool(x, ratio, 1) if max(ratio) > 1 else None
    if name == "conv2d":
        weight, bias = given["weight"], given["bias"]
        if channels is not None and given["groups"] == 1 and len(weight) > channels:
            every = -(-len(weight) // channels)
            weight, bias = weight[::every], None if bias is None else bias[::every]
        return F.conv2d(x, weight, bias, 1, given["padding"], given["dilation"], given["groups"])
    if name in ("max_pool2d", "max_pool2d_with_indices"):
        return F.max_pool2d(x, given["kernel_size"], 1, given["padding"], given["dilation"])
    if name == "avg_pool2d":
        return F.avg_pool2d(x, given["kernel_size"], 1, given["padding"], False, given["count_include_pad"])
    return None


def _hann(n: int) -> Tensor:
    """A Hann window whose zeros are the pixels next to the map."""
    return torch.hann_window(n + 2, periodic=False, dtype=torch.float64)[1:-1]
