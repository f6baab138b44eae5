"""The measurement behind `equivariance`: f(T_g x) against Γ_g f(x) per element, all layers in one pass, sums kept by unit."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from geomssl import modes
from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.units import Units
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


class DefectBounds(NamedTuple):
    """Pointwise lower and upper bounds, and lower bounds of all elements and layers at once, (E,)."""

    low: Tensor
    high: Tensor
    low_any: Tensor


class Distance(NamedTuple):
    """How far resampling alone moves features, over their spread: r (E,), its upper limit, and that of all at once."""

    r: Tensor
    high: Tensor
    high_any: Tensor


@dataclass(frozen=True)
class EquivarianceError:
    """What was found for one layer; a tensor has one entry an element, (E,), float64 on the CPU.

    total:       sqrt(sum |f(T_g x) - Γ_g f(x)|^2 / sum |Γ_g f(x) - mean|^2); NaN where the features do not vary at all.
    floor:       what resampling does to f here; NaN where T_g has no inverse. Never the basis of a verdict, nor is excess.
    excess:      sqrt(max(0, total^2 - floor^2)).
    action_size: sqrt(sum |Γ_g f(x) - f(x)|^2 / the same denominator): how much was asked.
    interval:    pointwise bounds of total.  low_any: lower bounds that hold for all elements of all layers at once.
    resampling:  r, the upper limit of how far resampling alone moves total from the true defect; 0 where nothing is
                 resampled, NaN where it was not measured.
    bounds:      pointwise bounds of the true defect: total ± r, both at half of the tail. bounds.low_any: of all at once.
    variance_share: sum |Γ_g f(x) - mean|^2 / sum |Γ_g f(x)|^2; degenerate where it is under the stated share.
    exact:       the pair (T_g, Γ_g) only permutes, so that total is the model's own defect.
    kept:        share of the feature pixels that are judged (see --boundary).
    chance:      sqrt(2), what unrelated features score.  n: images.  units: what the intervals resample.
    numerators, denominators: the sums of total, unit by unit, (units, E).
    """

    total: Tensor
    floor: Tensor
    excess: Tensor
    action_size: Tensor
    interval: Bounds
    low_any: Tensor
    resampling: Tensor
    bounds: DefectBounds
    variance_share: Tensor
    degenerate: Tensor
    exact: Tensor
    kept: Tensor
    n: int
    units: str
    numerators: Tensor
    denominators: Tensor
    chance: float = CHANCE


@dataclass
class Task:
    """One measurement of all layers.

    features: images to the features of every layer, in one pass.  images: T_identity of a slice of the images.
    moved:    the rows of a slice under elements (e, P), element by element, (e b, C, H, W), where T_g is rendered; None
              where the transform is applied to the images.
    actions, masks: Γ of each layer, and its judged feature pixels, bool (E, h, w), or None for all of them.
    units:    what is resampled.  keep: bytes of clean features kept between the two reads of the images.
    """

    features: Callable[[Tensor], list[Tensor]]
    images: Callable[[slice], Tensor]
    n: int
    transform: Transform
    params: Tensor
    actions: Sequence[Action]
    masks: Sequence[Tensor | None]
    units: Units
    moved: Callable[[slice, Tensor], Tensor] | None = None
    batch_size: int = 256
    keep: int = 2**28


@dataclass
class _Sums:
    """Of one layer: error and spread by unit (E, units); the others by element (E,)."""

    error: Tensor
    spread: Tensor
    moved: Tensor
    trip: Tensor
    square: Tensor

    @classmethod
    def zeros(cls, elements: int, units: int) -> _Sums:
        wide = [torch.zeros(elements, units, dtype=torch.float64) for _ in range(2)]
        return cls(*wide, *(torch.zeros(elements, dtype=torch.float64) for _ in range(3)))


@torch.no_grad()
def measure(
    task: Task, level: float, resamples: int, seed: int, share: float, distances: Sequence[Distance] | None = None
) -> list[EquivarianceError]:
    """Run the task: every image and element passes once (and once more where T_g resamples and has an inverse), batched over
    both; sums in float64. distances: of each layer, how far resampling alone moves its features; None: not measured.
    """
    slices = [slice(a, min(a + task.batch_size, task.n)) for a in range(0, task.n, task.batch_size)]
    means, clean = _moments(task, slices)
    size = _size(task.images(slice(0, 1)))
    shapes = [_places(mean) for mean in means]
    exact = [act.is_exact(task.params, places, size) for act, places in zip(task.actions, shapes, strict=True)]
    permutes, trips = task.transform.is_exact(task.params, size).cpu(), _has_inverse(task)
    sums = [_Sums.zeros(len(task.params), task.units.count) for _ in means]
    for index, rows in enumerate(track(slices, "equivariance")):
        x = task.images(rows)
        fx = clean[index] or task.features(x)
        for chunk in _chunks(permutes, max(1, task.batch_size // len(x))):
            _pass(task, rows, x, fx, means, chunk, size, exact, trips, not bool(permutes[chunk[0]]), sums)
    return _figures(task, sums, exact, trips, level, resamples, seed, share, distances)


def _chunks(permutes: Tensor, length: int) -> list[Tensor]:
    """Elements to pass together: at most `length`, all of them permuting pixels or none."""
    return [part for same in (permutes, ~permutes) for part in same.nonzero().squeeze(1).split(length) if len(part)]


def _moments(task: Task, slices: list[slice]) -> tuple[list[Tensor], list[list[Tensor] | None]]:
    """Of every layer the mean of f(x), float64 (1, ...); and its features by slice, as far as they may be kept.

    GeomsslError for images or features to refuse.
    """
    totals: list[Any] = []
    kept: list[list[Tensor] | None] = []
    room, equal, first = task.keep, True, task.images(slice(0, 1))
    for rows in slices:
        x = task.images(rows)
        if not bool(x.isfinite().all()):
            raise GeomsslError(f"images with NaN or infinity among {task.n}", "finite images", reason="not-finite")
        features = task.features(x)
        for fx in features:
            if len(fx) != len(x) or not bool(fx.isfinite().all()):
                raise GeomsslError(
                    f"features {tuple(fx.shape)} of {len(x)} images" + (", with NaN or infinity" if len(fx) == len(x) else ""),
                    "finite features, one row an image", reason="not-finite" if len(fx) == len(x) else "bad-features",
                )
        equal = equal and bool((x == first).all())
        sums = [_on_cpu_if_needed(fx).sum(dim=0, keepdim=True, dtype=torch.float64) for fx in features]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
        room -= sum(fx.numel() * fx.element_size() for fx in features)
        kept.append(features if room >= 0 else None)
    if equal:
        raise GeomsslError(f"{task.n} images, all equal", "images that differ", reason="degenerate")
    return [total / task.n for total in totals], kept


def _size(x: Tensor) -> Size:
    return x.shape[2], x.shape[3]


def _places(mean: Tensor) -> Size:
    return (mean.shape[-2], mean.shape[-1]) if mean.dim() >= 4 else (1, 1)


def _has_inverse(task: Task) -> bool:
    try:
        task.transform.inverse(task.params)
    except GeomsslError as error:
        if error.reason != "no-inverse":
            raise
        return False
    return True


def _pass(
    task: Task, rows: slice, x: Tensor, fx: list[Tensor], means: list[Tensor], chunk: Tensor, size: Size,
    exact: list[Tensor], trips: bool, resamples: bool, sums: list[_Sums],
) -> None:
    """One chunk of elements on one batch of images: the model runs once, or twice where T_g resamples; sums are added to."""
    e, b = len(chunk), len(x)
    params = task.params[chunk].to(x.device)
    each = params.repeat_interleave(b, dim=0)
    turned = task.transform(x.repeat(e, 1, 1, 1), each) if task.moved is None else task.moved(rows, params)
    found, returned = task.features(turned), None
    if trips and resamples and task.moved is None:
        returned = task.features(task.transform(turned, task.transform.inverse(each)))
    for layer, (action, f, clean, mean, mask, into) in enumerate(
        zip(task.actions, found, fx, means, task.masks, sums, strict=True)
    ):
        kept = None if mask is None else mask[chunk].to(x.device)
        spread = compare(action, clean, mean, params, size, kept)
        declared = spread.declared
        if declared.shape != f.shape:
            raise GeomsslError(
                f"the action {action.name} gives features {tuple(declared.shape[1:])}",
                f"{tuple(f.shape[1:])}, as the model does", reason="bad-features",
            )
        original = spread.clean
        error = squares(spread.kept(precise(f) - declared)).view(e, b)
        task.units.add(into.error, chunk, rows, error.cpu())
        task.units.add(into.spread, chunk, rows, spread.values.view(e, b).cpu())
        into.moved[chunk] += squares(spread.kept(declared - original)).view(e, b).sum(1).cpu()
        into.square[chunk] += squares(spread.kept(declared)).view(e, b).sum(1).cpu()
        if not trips:
            continue
        trip = torch.zeros(e, dtype=torch.float64)
        if returned is not None:
            trip += squares(spread.kept(precise(returned[layer]) - original)).view(e, b).sum(1).cpu() / 2
        if not bool(exact[layer][chunk].all()):
            back = precise(action(declared.to(clean.dtype), task.transform.inverse(each), size))
            trip += squares(spread.kept(back - original)).view(e, b).sum(1).cpu()
        into.trip[chunk] += trip


@dataclass
class Declared:
    """Γ_g f(x) of e elements and b images, (e b, ...), f(x) alike, |Γ_g f(x) - mean|^2 (e b,), and the judged pixels."""

    declared: Tensor
    clean: Tensor
    values: Tensor
    mask: Tensor | None

    def kept(self, values: Tensor) -> Tensor:
        return values if self.mask is None else values * self.mask


def compare(action: Action, fx: Tensor, mean: Tensor, params: Tensor, size: Size, kept: Tensor | None) -> Declared:
    """What is declared for features fx (b, ...) under elements params (e, P), and its spread about the mean (1, ...)."""
    e, b = len(params), len(fx)
    clean = fx.repeat(e, *[1] * (fx.dim() - 1))
    declared = precise(action(clean, params.repeat_interleave(b, dim=0), size))
    mask = None
    if kept is not None:
        # (e, h, w) to (e b, 1, ..., h, w)
        mask = kept.repeat_interleave(b, dim=0).view(e * b, *[1] * (fx.dim() - 3), *kept.shape[1:]).to(declared.dtype)
    # Γ_g is affine, so the mean of what it gives is what it gives of the mean.
    centre = precise(action(mean.to(fx).expand(e, *mean.shape[1:]), params, size)).repeat_interleave(b, dim=0)
    if centre.shape != declared.shape:
        raise GeomsslError(f"the action {action.name}", "features of the same shape for every image", reason="bad-features")
    found = Declared(declared, precise(clean), declared.new_empty(0), mask)
    found.values = squares(found.kept(declared - centre))
    return found


def _figures(
    task: Task, sums: list[_Sums], exact: list[Tensor], trips: bool, level: float, resamples: int, seed: int, share: float,
    distances: Sequence[Distance] | None,
) -> list[EquivarianceError]:
    """Figures and bounds of every layer; what holds for all at once holds over elements and layers."""
    errors, spreads = torch.cat([s.error for s in sums]).T.contiguous(), torch.cat([s.spread for s in sums]).T.contiguous()
    if not bool(errors.isfinite().all() and spreads.isfinite().all()):
        raise GeomsslError("features of transformed images with NaN or infinity", "finite features", reason="not-finite")
    count, columns = len(task.params), errors.shape[1]
    point = bootstrap_ratio(errors, spreads, seed, level, resamples)
    # Where r is added, total and r have half of the tail each.
    half = bootstrap_ratio(errors, spreads, seed, (1 + level) / 2, resamples) if distances else point
    low_any = simultaneous(errors, spreads, seed, level, resamples, columns)
    half_any = simultaneous(errors, spreads, seed, (1 + level) / 2, resamples, columns) if distances else low_any
    found = []
    for layer, own in enumerate(sums):
        here = slice(layer * count, (layer + 1) * count)
        below = own.spread.sum(dim=1)

        def root(values: Tensor, below: Tensor = below) -> Tensor:
            return torch.where(below > 0, values / below, torch.nan).sqrt()

        total = root(own.error.sum(dim=1))
        floor = root(own.trip) if trips else torch.full_like(total, torch.nan)
        low, high, least = point[0][here], point[1][here], torch.minimum(low_any[here], point[0][here])
        nothing = exact[layer].cpu()
        if distances is None:
            r = r_any = torch.full_like(total, torch.nan)
        else:
            r, r_any = distances[layer].high, distances[layer].high_any
        r, r_any = r.masked_fill(nothing, 0.0), r_any.masked_fill(nothing, 0.0)
        free, free_any = r == 0, r_any == 0
        bounds = DefectBounds(
            torch.where(free, low, (half[0][here] - r).clamp(min=0)),
            torch.where(free, high, half[1][here] + r),
            torch.where(free_any, least, (half_any[here] - r_any).clamp(min=0)),
        )
        variance = torch.where(own.square > 0, below / own.square, 0.0)
        mask = task.masks[layer]
        kept = torch.ones_like(total) if mask is None else mask.double().mean(dim=(1, 2)).cpu()
        found.append(
            EquivarianceError(
                total=total, floor=floor, excess=(total**2 - floor**2).clamp(min=0).sqrt(), action_size=root(own.moved),
                interval=Bounds(low, high), low_any=least, resampling=r, bounds=bounds, variance_share=variance,
                degenerate=~(variance >= share), exact=nothing, kept=kept, n=task.n, units=task.units.word,
                numerators=own.error.T.contiguous(), denominators=own.spread.T.contiguous(),
            )
        )
    return found


def simultaneous(errors: Tensor, spreads: Tensor, seed: int, level: float, resamples: int, columns: int) -> Tensor:
    """Lower bounds of sqrt(ratio) that hold for all columns at once at (1 + level) / 2: Bonferroni over `columns`.

    The tail of each is (1 - level) / 2 / columns; more resamples are drawn to reach it, and where even these hold fewer
    than TAIL of its draws the bound is no higher than the normal one.
    """
    tail = (1 - level) / (2 * columns)
    draws = min(max(resamples, math.ceil(TAIL / tail)), MOST)
    low = bootstrap_ratio(errors, spreads, seed, 1 - 2 * tail, draws)[0]
    if tail * draws >= TAIL:
        return low
    ratio = errors.sum(dim=0) / spreads.sum(dim=0)
    scale = ((errors - ratio * spreads) ** 2).sum(dim=0).sqrt() / spreads.sum(dim=0)
    normal = (ratio + NormalDist().inv_cdf(tail) * scale).clamp(min=0).sqrt()
    return torch.minimum(low, normal)


def squares(values: Tensor) -> Tensor:
    """|row|^2 in float64."""
    # Converting first is five times faster than asking the norm for another dtype.
    return torch.linalg.vector_norm(_on_cpu_if_needed(values).flatten(1).double(), dim=1) ** 2


def _on_cpu_if_needed(values: Tensor) -> Tensor:
    return values.cpu() if values.device.type == "mps" else values


def precise(values: Tensor) -> Tensor:
    """At least float32, so that a difference is not rounded to half precision."""
    return values if values.dtype == torch.float64 else values.float()


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for every module that a model is, belongs to or closes over; each one's own mode comes back after."""
    with modes.evaluating(*modules_of(model)):
        yield


def modules_of(model: Any) -> list[nn.Module]:
    if isinstance(model, nn.Module):
        return [model]
    if isinstance(model, functools.partial):
        return [m for part in (model.func, *model.args, *model.keywords.values()) for m in modules_of(part)]
    owner = getattr(model, "__self__", None)
    cells = [cell.cell_contents for cell in getattr(model, "__closure__", None) or ()]
    return [held for held in (owner, *cells) if isinstance(held, nn.Module)]
