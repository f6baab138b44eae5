"""Counterfactual repairs: one layer of a pass replaced by its better-behaved twin, every weight kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes.aliasing import at_stride_one
from geomssl.probes.breaks import Break, breaks
from geomssl.probes.static import Call, Move, Watch, named_arguments

# What a call gives at every pixel is made for some images at a time: so many numbers are held.
HELD = 2**25

Run = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Repair:
    """Calls of a pass replaced by others that give outputs of the same shape.

    calls: one, several that skip pixels side by side (the branches of a residual block must keep one grid), or those of many
    layers. what: in words ("circular padding"). cause: what it takes away ("padding", "stride", "pooling", "places" or "all").
    runs: number of a watched call -> its name, and run(func, args, kwargs) in its place.
    """

    calls: tuple[Call, ...]
    what: str
    cause: str
    runs: Mapping[int, tuple[str, Run]]


def repaired(features: Callable[[Tensor], Any], repair: Repair) -> Callable[[Tensor], Any]:
    """The same function with those calls replaced, in every pass. The module is not touched: a call is met on its way.

    Raises GeomsslError where a pass does not come by them all (its way depends on the values).
    """

    def f(images: Tensor) -> Any:
        swap = _Swap(repair)
        with swap:
            output = features(images)
        if swap.left:
            raise GeomsslError(
                f"a pass that does not come by {repair.calls[0].layer or repair.calls[0].what} again",
                "a module whose calls do not depend on the values", reason="not-static",
            )
        return output

    return f


class _Swap(Watch):
    def __init__(self, repair: Repair) -> None:
        super().__init__()
        self.runs, self.left = repair.runs, set(repair.runs)

    def call(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        wanted, run = self.runs.get(self.number, ("", None))
        if run is None or name != wanted:
            return func(*args, **kwargs)
        self.left.discard(self.number)
        return run(func, args, kwargs)


def together(found: Sequence[Repair]) -> list[Repair]:
    """The same repairs, those of a stride that lie side by side (same sizes, same place in the pass) made one."""
    kept: dict[Any, Repair] = {}
    for number, one in enumerate(found):
        call = one.calls[0]
        beside = one.cause == "stride" and call.name == "conv2d"
        key = (call.size_in, call.size_out, call.reach) if beside else number
        before = kept.get(key)
        kept[key] = one if before is None else Repair(
            before.calls + one.calls, one.what, one.cause, {**before.runs, **one.runs}
        )
    return list(kept.values())


def joint(found: Sequence[Repair], what: str, cause: str) -> Repair:
    """Many repairs at once, the first of each cause where a call has several: its padding is swapped before its stride."""
    runs: dict[int, tuple[str, Run]] = {}
    taken: set[tuple[int, str]] = set()
    kept: dict[int, Call] = {}
    for one in sorted(found, key=lambda r: r.cause == "padding"):
        wanted = {number: run for number, run in one.runs.items() if (number, one.cause) not in taken}
        taken |= {(number, one.cause) for number in wanted}
        kept |= {call.number: call for call in one.calls if wanted}
        for number, (name, run) in wanted.items():
            runs[number] = (name, run if number not in runs else _inside(run, runs[number][1]))
    return Repair(tuple(kept[number] for number in sorted(kept)), what, cause, runs)


def _inside(outer: Run, inner: Run) -> Run:
    """A padding that is swapped, and then another call than the module's on what was padded."""
    return lambda func, args, kwargs: outer(lambda **given: inner(func, (), given), args, kwargs)


def repairs(call: Call, asked: Sequence[Move]) -> tuple[list[Repair], str]:
    """The repairs of one call that could take a cause away under those moves, and why there is none (or not this one).

    No moves stands for transforms that resample: then padding at the border and aliasing before a stride are the causes.
    """
    found = [b for move in asked for b in breaks(call, move)]
    if call.what == "position":
        return [_of(call, "the same at all places (its mean)", "places", lambda *a: _level(call, *a))], ""
    if not call.grid:
        return [], "no repair of padding, stride or pooling touches it" if found else ""
    made: list[Repair] = []
    why = [_because(call, b) for b in found if b.cause not in ("padding", "stride", "grid")]
    shift = "shift" in asked
    padded = max(*call.before, *call.after) > 0 and call.mode in ("zeros", "lowest", "constant")
    if padded and (shift or not asked):
        made += _padding(call, "circular" if shift else "reflect")
    if any(b.cause == "padding" for b in found) and not made:
        why.append("no padding to swap: " + next(b.words for b in found if b.cause == "padding"))
    skips = max(call.down) > 1
    off_grid = any(b.cause == "grid" for b in found) and not shift
    if (off_grid or skips) and (shift or not asked or off_grid):
        some, said = _strides(call, off_grid, "circular" if shift else "reflect", turns="90°" in asked)
        made += some
        why += [said] if said else []
    return made, "; ".join(dict.fromkeys(why))


def _because(call: Call, found: Break) -> str:
    if found.cause == "filters":
        return "other filters would be other weights"
    return found.words


def _of(call: Call, what: str, cause: str, run: Run, at_pad: bool = False) -> Repair:
    if at_pad and call.padded_by is not None:
        return Repair((call,), what, cause, {call.padded_by: ("pad", run)})
    return Repair((call,), what, cause, {call.number: (call.name, run)})


def _padding(call: Call, mode: str) -> list[Repair]:
    if max(*call.before, *call.after) > min(call.size_in) - (mode == "reflect"):
        return []
    pads = (call.before[1], call.after[1], call.before[0], call.after[0])

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        if call.padded_by is not None:
            return F.pad(named_arguments("pad", args, kwargs)["input"], pads, mode=mode)
        given = named_arguments(call.name, args, kwargs)
        given["input"] = F.pad(given["input"], pads, mode=mode)
        return func(**{**given, "padding": 0})

    return [_of(call, f"{mode} padding", "padding", run, at_pad=True)] if call.name != "conv_transpose2d" else []


def _strides(call: Call, off_grid: bool, mode: str, turns: bool) -> tuple[list[Repair], str]:
    if call.name in ("conv_transpose2d", "interpolate"):
        return [], "an enlargement is not repaired"
    if call.adaptive:
        return [], "an adaptive pool is an average already" if "avg" in call.name else "an adaptive max-pool is not repaired"
    pool = "pool" in call.name
    cause = "pooling" if pool else "stride"
    named = {"conv2d": "", "avg_pool2d": "average "}.get(call.name, "max ")
    uneven = call.before != call.after
    if call.name.endswith("with_indices"):
        return [], "a max-pool whose indices are used is not repaired"
    if off_grid and turns and _lopsided(call):
        return [], "a window or an image that is not the same along both axes stays so"
    if off_grid and uneven and call.mode not in ("", "zeros"):
        return [], f"{call.mode} padding of uneven width is not swapped"

    def pooled(func: Any, args: Any, kwargs: Any) -> Any:
        size = call_size(call, args, kwargs)
        args, kwargs = ((), _evenly(call, args, kwargs)) if uneven else (args, kwargs)
        return _thinned(call, func, args, kwargs, lambda dense: F.adaptive_avg_pool2d(dense, size))

    def blurred(func: Any, args: Any, kwargs: Any) -> Any:
        rows, columns = call_size(call, args, kwargs)
        return _thinned(
            call, func, args, kwargs,
            lambda dense: blur(dense, call.down, mode)[..., :: call.down[0], :: call.down[1]][..., :rows, :columns],
        )

    def before(func: Any, args: Any, kwargs: Any) -> Any:
        call_size(call, args, kwargs)
        given = named_arguments(call.name, args, kwargs)
        return func(**{**given, "input": blur(given["input"], call.down, mode)})

    def averaged(func: Any, args: Any, kwargs: Any) -> Any:
        given = named_arguments(call.name, args, kwargs)
        kernel, stride = given["kernel_size"], given["stride"] or given["kernel_size"]
        return F.avg_pool2d(given["input"], kernel, stride, given["padding"], given["ceil_mode"])

    if off_grid:
        padded = "padded alike at both ends, " if uneven else ""
        return [_of(call, f"{named}{padded}at stride 1, then pooled evenly", cause, pooled)], ""
    if call.name == "conv2d" and max(*call.before, *call.after) == 0 and max(call.kernel) > 1:
        # Without padding the map at stride 1 is shorter than the image and has no seam. A blur and a convolution commute.
        return [_of(call, "blurred, then at its stride", cause, before)], ""
    made = [_of(call, f"{named}at stride 1, then blurred", cause, blurred)]
    if call.name.startswith("max") and call.dilation == (1, 1):
        made.append(_of(call, "average instead of max", cause, averaged))
    return made, ""


def _lopsided(call: Call) -> bool:
    """Windows that differ between the axes: pooling evenly would not make them alike."""
    return any(a != b for a, b in (call.kernel, call.stride, call.dilation, call.size_in))


def _evenly(call: Call, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments with the wider padding of both ends at both."""
    given = named_arguments(call.name, args, kwargs)
    wide = [max(a, b) for a, b in zip(call.before, call.after, strict=True)]
    (top, left), (bottom, right) = (
        (wide[0] - have[0], wide[1] - have[1]) if call.padded_by is not None else (wide[0], wide[1])
        for have in (call.before, call.after)
    )
    return {**given, "input": F.pad(given["input"], (left, right, top, bottom)), "padding": 0}


def call_size(call: Call, args: Any, kwargs: Any) -> tuple[int, int]:
    """The size that the call gives, once it is sure that maps of the size that was read come by, padded or not."""
    n = tuple(named_arguments(call.name, args, kwargs)["input"].shape[-2:])
    padded = tuple(a + b + c for a, b, c in zip(call.size_in, call.before, call.after, strict=True))
    if n not in (call.size_in, padded):
        raise GeomsslError(f"a {call.what} on {n}", f"{call.size_in}, as when it was read", reason="not-static")
    return call.size_out


def _thinned(call: Call, func: Any, args: Any, kwargs: Any, thin: Callable[[Tensor], Tensor]) -> Tensor:
    """What the call gives at every pixel, thinned out; in pieces, since at stride 1 it has stride² times as many numbers."""
    given = named_arguments(call.name, args, kwargs)
    x = given.pop("input")
    channels = len(given["weight"]) if "weight" in given else x.shape[1]
    each = max(1, HELD // (channels * x.shape[-2] * x.shape[-1]))
    found = []
    for piece in x.split(each):
        dense = at_stride_one(call.name, func, (piece,), given)
        assert dense is not None, call
        found.append(thin(dense))
    return torch.cat(found)


def blur(maps: Tensor, down: Sequence[int], mode: str) -> Tensor:
    """Maps low-passed by triangular filters of 2 s - 1 taps along each axis of stride s: [1, 2, 1] / 4 for 2 (Zhang 2019).

    The filter is a mean over s pixels, taken twice: nothing is left at the multiples of the new sampling rate 1 / s, and
    (s sin(pi / (2 s)))^-2, between .41 and .5, at its Nyquist frequency.
    """
    for axis, s in ((-2, down[0]), (-1, down[1])):
        if s == 1:
            continue
        taps = torch.tensor([s - abs(k) for k in range(1 - s, s)], dtype=torch.float64) / s**2
        room = s - 1
        pads = (0, 0, room, room) if axis == -2 else (room, room, 0, 0)
        wrapped = F.pad(maps, pads, mode=mode if room < maps.shape[axis] else "replicate")
        kernel = (taps.view(1, 1, -1, 1) if axis == -2 else taps.view(1, 1, 1, -1)).to(maps)
        maps = F.conv2d(wrapped, kernel.expand(maps.shape[1], 1, *kernel.shape[2:]), groups=maps.shape[1])
    return maps


def _level(call: Call, func: Any, args: Any, kwargs: Any) -> Any:
    """The mixing call with the operand that knows places replaced by its mean over them."""
    listed = call.name.startswith(("cat", "conc"))
    operands = list(args[0]) if listed else list(args)
    which = call.operand or 0
    operands[which] = _mean_over_places(operands[which], maps=next(a for i, a in enumerate(operands) if i != which).dim() >= 4)
    return func(operands, *args[1:], **kwargs) if listed else func(*operands, **kwargs)


def _mean_over_places(marks: Tensor, maps: bool) -> Tensor:
    if maps:
        return marks.mean(dim=(-2, -1), keepdim=True).expand_as(marks).contiguous()
    tokens = marks.shape[-2]
    side = int(tokens**0.5)
    apart = tokens - side * side
    level = marks[..., apart:, :].mean(dim=-2, keepdim=True).expand(*marks.shape[:-2], side * side, marks.shape[-1])
    return torch.cat([marks[..., :apart, :], level], dim=-2)
