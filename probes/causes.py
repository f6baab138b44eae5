"""Causes in words: of each layer what must break, for which sizes it would not, what aliases, and what its repair changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes.aliasing import Aliasing
from geomssl.probes.breaks import breaks, needed, sizes
from geomssl.probes.effect import Effect
from geomssl.probes.repair import Repair
from geomssl.probes.static import NONLINEAR, Call, Move, read
from geomssl.transforms.base import Size

# Layers that have a sentence of their own; the others are named together.
TOLD, NAMED = 8, 4


def names_of(calls: Sequence[Call]) -> dict[int, str]:
    """A name for every call: its module; what it is and the layer it comes after, where no module holds it. All differ."""
    found: dict[int, str] = {}
    last = ""
    for call in calls:
        name = call.layer or (f"{call.what} after {last}" if last else call.what)
        name = f"{call.what} in {call.layer}" if call.layer and call.name in NONLINEAR else name
        count = sum(other == name or other.startswith(f"{name} #") for other in found.values())
        found[call.number] = name if not count else f"{name} #{count + 1}"
        last = call.layer or last
    return found


def must_break(call: Call, asked: tuple[Move, ...]) -> str | None:
    """What must break, move by move; the same words of several moves once."""
    said: dict[str, list[str]] = {}
    for move in asked:
        for one in breaks(call, move):
            said.setdefault(one.words, []).append(move)
    if not said:
        return None
    return "; ".join(f"{' and '.join(which)}: {words}" if len(asked) > 1 else words for words, which in said.items())


def told(
    calls: Sequence[Call], names: Mapping[int, str], asked: tuple[Move, ...], metered: Mapping[int, Aliasing],
    effects: Sequence[Effect], waiting: Sequence[Repair], unbuilt: Mapping[int, str], bootstrap: tuple[int, float, int],
) -> list[str]:
    """A sentence a layer, the three readings beside each other, in the order of the pass; then the other layers by cause.

    Layers have one of their own where a repair was measured, or where more than filters or padding is at fault; TOLD at most,
    those first whose repair lowers the error most. bootstrap: seed, level and resamples of the aliasing's interval.
    """
    best: dict[int, Effect] = {}
    for one in sorted(effects, key=lambda e: e.change):
        for call in one.repair.calls:
            best.setdefault(call.number, one)
    later = {call.number: one for one in reversed(waiting) for call in one.calls}
    found = {c.number: [b for move in asked for b in needed(breaks(c, move))] for c in calls if c.name not in NONLINEAR}
    apart = [
        c for c in calls
        if c.number in best or any(b.cause not in ("filters", "padding") for b in found.get(c.number, []))
    ]
    chosen = sorted(apart, key=lambda c: best[c.number].change if c.number in best else 0.0)[:TOLD]
    said = [
        _sentence(c, calls, names, asked, metered.get(c.number), best.get(c.number), later.get(c.number),
                  unbuilt.get(c.number), bootstrap)
        for c in calls if c in chosen
    ]
    others: dict[str, list[str]] = {}
    for call in calls:
        causes = list(dict.fromkeys(b.cause for b in found.get(call.number, [])))
        if causes and call not in chosen:
            others.setdefault(" and ".join(causes), []).append(names[call.number])
    for which, where in others.items():
        some = ", ".join(where[:NAMED]) + (f" and {len(where) - NAMED} more" if len(where) > NAMED else "")
        count = f"{len(where)} {'other ' if said else ''}layer{'s' if len(where) > 1 else ''}"
        said.append(f"{count} must break it by {which}: {some}.")
    return said


def _sentence(
    call: Call, calls: Sequence[Call], names: Mapping[int, str], asked: tuple[Move, ...], share: Aliasing | None,
    effect: Effect | None, unmeasured: Repair | None, unbuilt: str | None, bootstrap: tuple[int, float, int],
) -> str:
    words, parts = must_break(call, asked), []
    if words:
        must = any(needed(breaks(call, move)) for move in asked)
        parts.append(f"must break, since {words}" if must else words)
    grid = any(b.cause in ("grid", "stride") for move in asked for b in breaks(call, move))
    if grid:
        fit, near = sizes(calls, asked[0], call)
        what = "shifts need" if asked[0] == "shift" else f"{asked[0]} needs"
        if near is not None and fit != "every size":
            here = next((c.size_in[1] for c in calls if c.grid and c.source is None), None)
            would = f"{near} does" if near == here else f"{near} would do"
            parts.append(f"up to here {what} {fit}, {would}")
        elif fit == "no size":
            parts.append(f"no size of the image would do for {asked[0]}")
    if share is not None:
        bounds = share.interval(*bootstrap)
        parts.append(f"{share.share():.2g}{_bounds(*bounds) if bounds else ''} of the energy aliases")
    if effect is not None:
        sure = {-1: "which shows a cause", 1: "so by itself it harms", 0: "so by itself nothing sure"}[effect.sure]
        with_others = f" (with {len(effect.repair.calls) - 1} beside it)" if len(effect.repair.calls) > 1 else ""
        parts.append(f"repair '{effect.repair.what}'{with_others}: change {change_of(effect)}, {sure}")
    elif unmeasured:
        parts.append(f"repair '{unmeasured.what}' was not measured")
    elif unbuilt:
        parts.append(f"not repaired: {unbuilt}")
    return f"{names[call.number]} ({_described(call)}): {'; '.join(parts)}."


def _described(call: Call) -> str:
    if not call.grid:
        return call.what
    kernel = f" {by(call.kernel)}" if not call.adaptive and call.name != "interpolate" else ""
    stride = f", stride {pair_words(call.down)}" if max(call.down) > 1 and not call.adaptive else ""
    return f"{call.what}{kernel}{stride}, {by(call.size_in)} to {by(call.size_out)}"


def change_of(effect: Effect) -> str:
    """The change of the total with its interval."""
    return f"{effect.change:+.2g}{_bounds(effect.low, effect.high)}"


def _bounds(low: float, high: float) -> str:
    return f" [{low:.2g}, {high:.2g}]"


def fits(
    f: Callable[[Tensor], Any], images: Tensor, module: Any, calls: Sequence[Call], asked: tuple[Move, ...]
) -> list[str]:
    return [_fitting(f, images, module, calls, asked[0])] if asked and any(call.grid for call in calls) else []


def _fitting(f: Callable[[Tensor], Any], images: Tensor, module: Any, calls: Sequence[Call], move: Move) -> str:
    """For which sizes every grid would do, tried at the nearest one."""
    fit, near = sizes(calls, move)
    here, what = images.shape[-1], "shifts" if move == "shift" else move
    if fit == "every size":
        return f"The grids of all layers fit {what} at every size."
    if near is None:
        return f"The grids of all layers fit {what} at {fit}." if fit == "no size" else (
            f"For which sizes the grids of all layers would fit {what} could not be worked out."
        )
    if near == here:
        return f"The grids of all layers fit {what} for {fit}; {here} does."
    said = f"The grids of all layers fit {what} for {fit}; {near} would do"
    try:
        there = read(f, images.new_zeros(2, images.shape[1], near, near), module)
    except (RuntimeError, ValueError, AssertionError, GeomsslError):
        return f"{said}, but the module does not take images of that size."
    held = not any(needed([b for b in breaks(c, move) if c.grid], grid_only=True) for c in there)
    if held or move == "shift":
        return f"{said} (read again at that size)."
    return f"{said} by the strides; read again at that size, it does not."


def readable(calls: Sequence[Call]) -> int:
    return sum(call.name not in NONLINEAR for call in calls)


def pair_words(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


def by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
