"""The measurement behind `equivariance`: f(T_g x) against Γ_g f(x), element by element, with sums kept image by image."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.progress import track
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Size, Transform

CHANCE = math.sqrt(2)
# Resamples that the tail of a simultaneous bound should hold, and the most that are drawn for it.
TAIL, MOST = 10, 20_000


class Bounds(NamedTuple):
    """Lower and upper bounds, (E,)."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class EquivarianceError:
    """What equivariance_error found; a tensor has one entry an element, (E,), float64 on the CPU.

    total:       sqrt(sum |f(T_g x) - Γ_g f(x)|^2 / sum |Γ_g f(x) - mean|^2); NaN where the features do not vary at all.
    floor:       what resampling does to f here; NaN where T_g has no inverse. Never the basis of a verdict, nor is excess.
    excess:      sqrt(max(0, total^2 - floor^2)).
    action_size: sqrt(sum |Γ_g f(x) - f(x)|^2 / the same denominator): how much was asked.
    interval:    pointwise bounds of total.  low_any: lower bounds that hold for all elements at once.
    variance_share: sum |Γ_g f(x) - mean|^2 / sum |Γ_g f(x)|^2; degenerate where it is under the stated share.
    exact:       the pair (T_g, Γ_g) only permutes, so that total is the model's own defect.
    chance:      sqrt(2), what unrelated features score.  n: images.
    numerators, denominators: the sums of total, image by image, (n, E).
    """

    total: Tensor
    floor: Tensor
    excess: Tensor
    action_size: Tensor
    interval: Bounds
    low_any: Tensor
    variance_share: Tensor
    degenerate: Tensor
    exact: Tensor
    n: int
    numerators: Tensor
    denominators: Tensor
    chance: float = CHANCE


@dataclass
class Task:
    """One measurement: the model f, its images and clean features by slices, T, Γ and the elements."""

    f: Callable[[Tensor], Tensor]
    images: Callable[[slice], Tensor]
    features: Callable[[slice], Tensor]
    n: int
    transform: Transform
    action: Action
    params: Tensor
    batch_size: int = 256


@torch.no_grad()
def measure(task: Task, level: float, resamples: int, seed: int, share: float) -> EquivarianceError:
    """Run the task: f(T_g x) and f(T_g^-1 T_g x) once for every image and element, batched over both; sums in float64."""
    slices = [slice(a, min(a + task.batch_size, task.n)) for a in range(0, task.n, task.batch_size)]
    mean, square = _moments(task, slices)
    sums = {key: torch.zeros(len(task.params), task.n, dtype=torch.float64) for key in ("error", "spread", "trip", "moved")}
    trips = _has_inverse(task)
    size, exact = _sizes(task)
    for images in track(slices, "equivariance"):
        x, fx = task.images(images), task.features(images)
        per_pass = max(1, task.batch_size // len(x))
        for start in range(0, len(task.params), per_pass):
            elements = slice(start, start + per_pass)
            for key, values in _compare(task, x, fx, mean, task.params[elements], exact[elements], size, trips).items():
                sums[key][elements, images] = values.view(-1, len(x)).cpu()
    return _figures(sums, square, exact, trips, task.n, level, resamples, seed, share)


def _moments(task: Task, slices: list[slice]) -> tuple[Tensor, float]:
    """The mean of f(x), float64 (1, ...), and the sum of its squares. GeomsslError for images or features to refuse."""
    total: Any = 0.0
    square = 0.0
    first = task.images(slice(0, 1))
    equal = True
    for images in slices:
        x, fx = task.images(images), task.features(images)
        if not bool(x.isfinite().all()):
            raise GeomsslError(f"images with NaN or infinity among {task.n}", "finite images", reason="not-finite")
        if len(fx) != len(x) or not bool(fx.isfinite().all()):
            raise GeomsslError(
                f"features {tuple(fx.shape)} of {len(x)} images" + (", with NaN or infinity" if len(fx) == len(x) else ""),
                "finite features, one row an image", reason="not-finite" if len(fx) == len(x) else "bad-features",
            )
        equal = equal and bool((x == first).all())
        total = total + _double(fx).sum(dim=0, keepdim=True)
        square += float(_squares(fx, 1).sum())
    if equal:
        raise GeomsslError(f"{task.n} images, all equal", "images that differ", reason="degenerate")
    return total / task.n, square


def _sizes(task: Task) -> tuple[Size, Tensor]:
    """The size of the images, and for which elements the pair of actions only permutes."""
    x, fx = task.images(slice(0, 1)), task.features(slice(0, 1))
    size = (x.shape[2], x.shape[3])
    places = (fx.shape[-2], fx.shape[-1]) if fx.dim() >= 4 else (1, 1)
    return size, task.action.is_exact(task.params, places, size)


def _has_inverse(task: Task) -> bool:
    try:
        task.transform.inverse(task.params)
    except GeomsslError as error:
        if error.reason != "no-inverse":
            raise
        return False
    return True


def _compare(
    task: Task, x: Tensor, fx: Tensor, mean: Tensor, params: Tensor, exact: Tensor, size: Size, trips: bool
) -> dict[str, Tensor]:
    """Squared distances of e elements and b images, (e b,), element by element."""
    e, b = len(params), len(x)
    rows = params.to(x.device).repeat_interleave(b, dim=0)
    clean = fx.repeat(e, *[1] * (fx.dim() - 1))
    turned = task.transform(x.repeat(e, 1, 1, 1), rows)
    found = task.f(turned)
    declared = task.action(clean, rows, size)
    if declared.shape != found.shape:
        raise GeomsslError(
            f"the action {task.action.name} gives features {tuple(declared.shape[1:])}",
            f"{tuple(found.shape[1:])}, as the model does", reason="bad-features",
        )
    # Γ_g is affine, so the mean of what it gives is what it gives of the mean.
    centre = task.action(mean.to(fx).expand(e, *mean.shape[1:]), params.to(x.device), size)
    values = {
        "error": _squares(_precise(found) - _precise(declared), 1),
        "spread": _squares(_precise(declared) - _precise(centre).repeat_interleave(b, dim=0), 1),
        "moved": _squares(_precise(declared) - _precise(clean), 1),
    }
    if not trips:
        return values
    back = task.transform.inverse(rows)
    trip = _squares(_precise(task.f(task.transform(turned, back))) - _precise(clean), 1) / 2
    if not bool(exact.all()):
        trip = trip + _squares(_precise(task.action(declared, back, size)) - _precise(clean), 1)
    return {**values, "trip": trip}


def _figures(
    sums: dict[str, Tensor], square: float, exact: Tensor, trips: bool, n: int, level: float, resamples: int, seed: int,
    share: float,
) -> EquivarianceError:
    """Figures and bounds from the sums (E, n)."""
    error, spread = sums["error"].T.contiguous(), sums["spread"].T.contiguous()
    below = spread.sum(dim=0)
    if not bool(error.isfinite().all() and spread.isfinite().all()):
        raise GeomsslError("features of transformed images with NaN or infinity", "finite features", reason="not-finite")

    def root(values: Tensor) -> Tensor:
        return torch.where(below > 0, values / below, torch.nan).sqrt()

    total = root(error.sum(dim=0))
    floor = root(sums["trip"].sum(dim=1)) if trips else torch.full_like(total, torch.nan)
    low, high = bootstrap_ratio(error, spread, seed, level, resamples)
    tail = (1 - level) / (2 * len(total))
    several = bootstrap_ratio(error, spread, seed, 1 - 2 * tail, min(max(resamples, math.ceil(TAIL / tail)), MOST))
    variance = below / square if square > 0 else torch.zeros_like(below)
    return EquivarianceError(
        total=total, floor=floor, excess=(total**2 - floor**2).clamp(min=0).sqrt(),
        action_size=root(sums["moved"].sum(dim=1)), interval=Bounds(low, high), low_any=torch.minimum(low, several[0]),
        variance_share=variance, degenerate=~(variance >= share), exact=exact.cpu(), n=n, numerators=error,
        denominators=spread,
    )


def _squares(values: Tensor, start: int) -> Tensor:
    """|row|^2 in float64."""
    return torch.linalg.vector_norm(_on_cpu_if_needed(values).reshape(len(values), -1), dim=start, dtype=torch.float64) ** 2


def _double(values: Tensor) -> Tensor:
    return _on_cpu_if_needed(values).double()


def _on_cpu_if_needed(values: Tensor) -> Tensor:
    return values.cpu() if values.device.type == "mps" else values


def _precise(values: Tensor) -> Tensor:
    """At least float32, so that a difference is not rounded to half precision."""
    return values if values.dtype == torch.float64 else values.float()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for every module that a model is, belongs to or closes over; each one's own mode comes back after."""
    modes = {m: m.training for root in _modules(model) for m in root.modules()}
    for root in _modules(model):
        root.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _modules(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, functools.partial):
        return [m for part in (model.func, *model.args, *model.keywords.values()) for m in _modules(part)]
    owner = getattr(model, "__self__", None)
    cells = [cell.cell_contents for cell in getattr(model, "__closure__", None) or ()]
    return [held for held in (owner, *cells) if isinstance(held, nn.Module)]
