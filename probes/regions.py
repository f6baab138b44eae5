"""Regions of a piecewise affine projector: on which side of every kink each sample lies, and how many regions are hit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from geomssl import modes
from geomssl.errors import GeomsslError
from geomssl.probes import checks

Arguments = tuple[Sequence[Any], Mapping[str, Any]]


def _at(arguments: Arguments, place: int, name: str, default: float | None = None) -> Any:
    given, named = arguments
    return given[place] if len(given) > place else named.get(name, default)


def _sides(x: Tensor, *kinks: Any) -> list[Tensor]:
    return [x > kink for kink in kinks if kink is not None]


# operator -> which side of each of its kinks every number lies on
KINKS: dict[str, Callable[[Arguments], list[Tensor]]] = {
    **dict.fromkeys(
        ("relu", "leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise", "abs"), lambda a: _sides(a[0][0], 0)
    ),
    "threshold": lambda a: _sides(a[0][0], _at(a, 1, "threshold")),
    "hardtanh": lambda a: _sides(a[0][0], _at(a, 1, "min_val", -1.0), _at(a, 2, "max_val", 1.0)),
    "relu6": lambda a: _sides(a[0][0], 0, 6),
    "clamp": lambda a: _sides(a[0][0], _at(a, 1, "min"), _at(a, 2, "max")),
    "clamp_min": lambda a: _sides(a[0][0], _at(a, 1, "min")),
    "clamp_max": lambda a: _sides(a[0][0], _at(a, 1, "max")),
    "maximum": lambda a: _sides(a[0][0], a[0][1]),
    "minimum": lambda a: _sides(a[0][0], a[0][1]),
}


class _Watch(TorchDispatchMode):
    """Writes down, operator by operator, on which side of a kink every number lies: modules and functions alike."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows = rows
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kinks = KINKS.get(func._schema.name.partition("::")[2].rstrip("_"))
        if kinks is not None:
            # numbers that do not belong to a sample, such as the rectified weights of a layer, are the same for all
            self.seen += [side.flatten(1) for side in kinks((args, kwargs)) if side.dim() > 1 and len(side) == self.rows]
        return func(*args, **kwargs)


@torch.no_grad()
def patterns(projector: nn.Module, h: Tensor, rows: int = 1024) -> Tensor:
    """The activation pattern of every row of h (n, d): one bit a kink, packed, uint8 (n, ceil(bits / 8)).

    A bit says whether a number that enters (leaky) ReLU, PReLU, ReLU6, hardtanh, threshold, clamp, abs, maximum or minimum
    lies above its kink. Two samples with one pattern lie in one region of a projector made of these and of affine layers,
    and have one affine map. The projector is run in its own dtype, in eval mode; `rows` samples a pass.
    """
    finite = checks.matrix(h, "features h")
    weight = next((w for w in projector.parameters() if w.is_floating_point()), h)
    found = []
    with modes.evaluating(projector):
        for part in finite.split(rows):
            with _Watch(len(part)) as watch:
                projector(part.to(weight.device, weight.dtype, copy=True))
            none = torch.zeros(len(part), 0, dtype=torch.bool)
            bits = torch.cat([none, *(side.cpu() for side in watch.seen)], dim=1)
            found.append(torch.from_numpy(np.packbits(bits.numpy(), axis=1)))
    return torch.cat(found)


def regions(packed: Tensor) -> Tensor:
    """The number of each sample's region, int64 (n,), from 0 in the order of first appearance. packed: of `patterns`."""
    if not packed.shape[1]:
        return torch.zeros(len(packed), dtype=torch.long)
    # whole rows as keys: equal only where every bit is
    _, first, which = np.unique(packed.numpy(), axis=0, return_index=True, return_inverse=True)
    return torch.from_numpy(np.argsort(np.argsort(first))[which.reshape(-1)])


def expected_regions(counts: Tensor, m: int) -> float:
    """Distinct regions that m of the n samples hit, on average over all choices of m: exact, no draws.

        E[K_m] = sum_omega 1 - C(n - c_omega, m) / C(n, m)

    counts: samples in each region, sum n. Raises GeomsslError for m outside 0..n.
    Hurlbert, Ecology 52 (1971), 577: the rarefaction curve.
    """
    c, n = counts.double(), int(counts.sum())
    if not 0 <= m <= n:
        raise GeomsslError(f"m = {m}", f"0 to {n}", reason="bad-value")

    def logarithm(top: Tensor) -> Tensor:
        return torch.lgamma(top + 1) - torch.lgamma((top - m).clamp(min=0) + 1)

    rest = n - c
    missed = torch.where(rest >= m, (logarithm(rest) - logarithm(torch.tensor(float(n), dtype=torch.float64))).exp(), 0.0)
    return float((1 - missed).sum())


def new_region_share(counts: Tensor) -> float:
    """The chance that one more sample falls into a region not yet hit: regions hit once / samples (Good 1953)."""
    return float((counts == 1).sum()) / int(counts.sum())


@torch.no_grad()
def piecewise_affine(projector: nn.Module, h: Tensor, maps: Tensor, step: float = 1e-5) -> bool:
    """Whether g(h + s u) - g(h) = s J u up to float64 rounding, for more than half of the rows of h (n, d).

    u: towards another row, of the length of h; s = step. A bend leaves about s of s J u, and a kink is crossed by few rows.
    projector: in float64; maps: its Jacobians (n, p, d) at h.
    """
    towards = h.roll(1, dims=0) - h
    length = h.norm(dim=1, keepdim=True).clamp(min=1e-300)
    u = step * length * towards / towards.norm(dim=1, keepdim=True).clamp(min=1e-300)
    plain, moved = projector(h.clone()), projector(h + u)
    ahead = torch.einsum("npd,nd->np", maps, u)
    left = (moved - plain - ahead).norm(dim=1)
    allowed = 1e-3 * step * maps.flatten(1).norm(dim=1) * u.norm(dim=1) + 1e-13 * plain.norm(dim=1)
    return bool((left <= allowed).double().mean() > 0.5)
