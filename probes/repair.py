"""Counterfactual repairs: one layer of a pass replaced by its better-behaved twin, every weight kept."""

from __future__ import annotations

import math
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

# The largest stride that is repaired: at stride 1 a call costs its square.
LARGEST = 4


Run = Callable[[Any, Any, Any], Any]


@dataclass(frozen=True)
class Repair:
    """Calls of a pass replaced by others that give outputs of the same shape.

    calls: one, or several that skip pixels side by side (the branches of a residual block must keep one grid). what: in words
    ("circular padding"). cause: what it takes away ("padding", "stride", "pooling" or "places"). runs: number of a watched
    call -> its name, and run(func, args, kwargs) in its place.
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
        key = (one.what, call.size_in, call.size_out, call.reach) if beside else number
        before = kept.get(key)
        kept[key] = one if before is None else Repair(
            before.calls + one.calls, one.what, one.cause, {**before.runs, **one.runs}
        )
    return list(kept.values())


def repairs(call: Call, asked: Sequence[Move]) -> tuple[list[Repair], str]:
    """The repairs of one call that could take a cause away under those moves, and why there is none (or not this one).

    No moves stands for transforms that resample: then padding at the border and aliasing before a stride are the causes.
    """
    found = [b for move in asked for b in breaks(call, move)]
    if call.what == "position":
        return [_of(call, "the same at all places (its mean)", "places", lambda *a: _level(call, *a))], ""
    if not call.grid:
        return [], found[0].words + ": no repair of padding, stride or pooling touches it" if found else ""
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
    if skips and (shift or not asked or off_grid):
        some, said = _strides(call, off_grid, "circular" if shift else "reflect")
        made += some
        why += [said] if said else []
    elif off_grid:
        why.append("its stride is 1: uneven padding or a window of two shapes is not swapped")
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


def _strides(call: Call, off_grid: bool, mode: str) -> tuple[list[Repair], str]:
    if call.name in ("conv_transpose2d", "interpolate"):
        return [], "an enlargement is not repaired"
    if max(call.down) > LARGEST:
        return [], f"stride {max(call.down)}: at stride 1 it would cost {max(call.down) ** 2} times as much"
    if call.adaptive:
        return [], "an adaptive pool is an average already" if "avg" in call.name else "an adaptive max-pool is not repaired"
    pool = "pool" in call.name
    cause = "pooling" if pool else "stride"
    named = {"conv2d": "", "avg_pool2d": "average "}.get(call.name, "max ")

    def pooled(func: Any, args: Any, kwargs: Any) -> Any:
        return F.adaptive_avg_pool2d(_dense(call, func, args, kwargs), call_size(call, args, kwargs))

    def blurred(func: Any, args: Any, kwargs: Any) -> Any:
        rows, columns = call_size(call, args, kwargs)
        thin = blur(_dense(call, func, args, kwargs), call.down, mode)[..., :: call.down[0], :: call.down[1]]
        return thin[..., :rows, :columns]

    def averaged(func: Any, args: Any, kwargs: Any) -> Any:
        given = named_arguments(call.name, args, kwargs)
        kernel, stride = given["kernel_size"], given["stride"] or given["kernel_size"]
        return F.avg_pool2d(given["input"], kernel, stride, given["padding"], given["ceil_mode"])

    if off_grid:
        return [_of(call, f"{named}at stride 1, then pooled evenly", cause, pooled)], ""
    made = [_of(call, f"{named}at stride 1, then blurred", cause, blurred)]
    if call.name.startswith("max") and call.dilation == (1, 1):
        made.append(_of(call, "average instead of max", cause, averaged))
    return made, ""


def call_size(call: Call, args: Any, kwargs: Any) -> tuple[int, int]:
    """The size that the call gives, once it is sure that maps of the size that was read come by."""
    n = named_arguments(call.name, args, kwargs)["input"].shape[-2:]
    if tuple(n) != _entered(call):
        raise GeomsslError(f"a {call.what} on {tuple(n)}", f"{_entered(call)}, as when it was read", reason="not-static")
    return call.size_out


def _entered(call: Call) -> tuple[int, int]:
    """The size that enters the call itself, which a separate padding has enlarged."""
    if call.padded_by is None:
        return call.size_in
    return call.size_in[0] + call.before[0] + call.after[0], call.size_in[1] + call.before[1] + call.after[1]


def _dense(call: Call, func: Any, args: Any, kwargs: Any) -> Tensor:
    found = at_stride_one(call.name, func, args, kwargs)
    assert found is not None, call
    return found


def blur(maps: Tensor, down: Sequence[int], mode: str) -> Tensor:
    """Maps low-passed by binomial filters of 2 s - 1 taps along each axis of stride s, as [1, 2, 1] / 4 for 2 (Zhang 2019)."""
    for axis, s in ((-2, down[0]), (-1, down[1])):
        if s == 1:
            continue
        taps = torch.tensor([math.comb(2 * s - 2, k) for k in range(2 * s - 1)], dtype=torch.float64) / 4 ** (s - 1)
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
