"""explain: where equivariance must break in a module, where it aliases, and what changes when one layer is repaired."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.encoders.wrap import Wrapped
from geomssl.errors import GeomsslError
from geomssl.probes import subject
from geomssl.probes.aliasing import Aliasing, meter
from geomssl.probes.breaks import breaks, exact, moves, needed, sizes
from geomssl.probes.defect import CHANCE
from geomssl.probes.effect import Effect, effect, pooled, suspects, total
from geomssl.probes.elements import doing, elements, labels, spoken
from geomssl.probes.layers import declare
from geomssl.probes.layers import read as read_layers
from geomssl.probes.repair import Repair, repaired
from geomssl.probes.static import NONLINEAR, Call, Move, read
from geomssl.progress import track
from geomssl.transforms.base import Size, Transform

METHOD = "paired percentile bootstrap over images"


class Options(subject.Options):
    """Settings of the explain probe."""

    n: int | None = Field(64, description="images to use")
    transform: str = Field("c4", description='the transform: c4, d4, flips, translations, "rotate(±30)", a policy, ...')
    action: Literal["auto", "regular", "spatial", "trivial"] = Field("auto", description="how features are declared to move")
    layer: str = Field("fibres", description="the features that are explained: fibres, the vector h, or the name of a layer")
    draws: int = Field(4, ge=1, le=1024, description="elements to draw where there are more, or infinitely many")
    repairs: int = Field(6, ge=0, le=1000, description="repairs to measure, the strongest suspects first")
    metered: int = Field(32, ge=2, description="images for the aliasing meter")
    level: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Read the module, meter its aliasing, repair one layer at a time, and lay the three beside each other."""
    subject.need(2, "an explanation")
    size: Size = (subject.source.size,) * 2
    transform, grid = spoken(options.transform)
    params = elements(transform, size, options.draws, options.seed) if grid is None else grid
    indices = subject.choose(options)
    images = subject.images(indices)
    with torch.no_grad():
        reader, _ = read_layers(subject.encoder, [options.layer], images[:1])
        layer = reader.layers[0]
        group = getattr(subject.encoder, "group", None)
        declared, why = declare(options.action, transform, layer, group)

        def f(batch: Tensor) -> Tensor:
            return reader.features(batch)[0]

        module = subject.encoder.module if isinstance(subject.encoder, Wrapped) else subject.encoder
        calls = read(f, images[:2], module)
        names, asked = _names(calls), moves(transform)
        metered = meter(f, images[: options.metered].split(subject.batch_size), calls)
        base = total(f, images, transform, params, declared, subject.batch_size, options.seed)
        chosen, unbuilt, waiting = suspects(calls, asked, metered, options.repairs)
        effects = []
        for one in track(chosen, "repairs"):
            after = total(repaired(f, one), images, transform, params, declared, subject.batch_size, options.seed)
            where = " + ".join(names[call.number] for call in one.calls)
            effects.append(effect(base, after, one, where, len(chosen), options.seed, options.level, options.resamples))
    effects.sort(key=lambda e: e.change)
    error = pooled(base)
    return Artifact(
        probe="explain",
        title=f"Why equivariance under {transform.name} holds or breaks",
        headline=_headline(calls, names, asked, transform, effects, error),
        definition=(
            "Three readings of one module. Must break: rules on kernel, stride, padding and sizes of one pass. Aliasing: share "
            "of the energy above the new Nyquist before a stride, and above a map's own after a nonlinearity. Repair: padding, "
            "stride or pooling of one layer replaced, weights kept; change = total after − total before, total = "
            "√(Σ‖f(T_g x) − Γ_g f(x)‖² / Σ‖Γ_g f(x) − mean‖²) over images and elements together."
        ),
        metrics=_metrics(error, effects, calls, asked, metered, len(images), options),
        tables=[_layers(calls, names, asked, metered, effects, unbuilt, options), _repairs(effects)],
        figures=_figures(options, bool(effects), bool(metered)),
        notes=[why, *_notes(f, images, module, calls, names, asked, transform, params, effects, waiting, metered, options)],
        options=options.model_dump(mode="json"),
        provenance={**subject.provenance, "action": declared.name, "n": len(images)},
    )


def _names(calls: Sequence[Call]) -> dict[int, str]:
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


def _words(call: Call, asked: tuple[Move, ...]) -> str | None:
    """What must break, move by move; the same words of several moves once."""
    said: dict[str, list[str]] = {}
    for move in asked:
        for one in breaks(call, move):
            said.setdefault(one.words, []).append(move)
    if not said:
        return None
    return "; ".join(f"{' and '.join(which)}: {words}" if len(asked) > 1 else words for words, which in said.items())


def _layers(
    calls: Sequence[Call], names: dict[int, str], asked: tuple[Move, ...], metered: dict[int, Aliasing],
    effects: Sequence[Effect], unbuilt: dict[int, str], options: Options,
) -> Table:
    best = {call.number: e for e in reversed(effects) for call in e.repair.calls}
    rows = []
    for call in calls:
        fit, near = sizes(calls, asked[0], call) if asked and call.grid else (None, None)
        share, effect = metered.get(call.number), best.get(call.number)
        bounds = share.interval(options.seed, options.level, options.resamples) if share is not None else None
        rows.append({
            "layer": names[call.number], "what": call.what, "size_in": _by(call.size_in), "size_out": _by(call.size_out),
            "kernel": _one(call.kernel) if call.grid else None, "stride": _one(call.down) if call.grid else None,
            "padding": _padding(call), "must_break": _words(call, asked), "sizes": fit, "nearest_size": near,
            "aliasing": None if share is None else share.share(), "aliasing_low": bounds[0] if bounds else None,
            "aliasing_high": bounds[1] if bounds else None, "aliasing_y": None if share is None else share.share("y"),
            "aliasing_x": None if share is None else share.share("x"),
            "repair": effect.repair.what if effect else None,
            "change": _plain(effect.change) if effect else None, "change_low": _plain(effect.low) if effect else None,
            "change_high": _plain(effect.high) if effect else None, "not_repaired": unbuilt.get(call.number),
        })
    columns = list(rows[0]) if rows else ["layer"]
    return Table(
        "layers", "What must break, what aliases, and what a repair changes", {key: [r[key] for r in rows] for key in columns},
        "must_break: by the rules, for its own input. sizes: of the image, for which the grids up to here lie as the move "
        "asks. aliasing: share of the energy above the new Nyquist before a stride, or above the map's own after a "
        "nonlinearity. change: of the total by the best repair of this layer.",
    )


def _repairs(effects: Sequence[Effect]) -> Table:
    return Table(
        "repairs", "Repairs of one layer, best first",
        {
            "layer": [e.where for e in effects], "repair": [e.repair.what for e in effects],
            "cause": [e.repair.cause for e in effects],
            "total_before": [_plain(e.before) for e in effects], "total_after": [_plain(e.after) for e in effects],
            "change": [_plain(e.change) for e in effects], "low": [_plain(e.low) for e in effects],
            "high": [_plain(e.high) for e in effects],
        },
        "[low, high] holds for all repairs at once: images resampled in pairs, the level shared out over the repairs.",
    )


def _metrics(
    error: float | None, effects: Sequence[Effect], calls: Sequence[Call], asked: tuple[Move, ...],
    metered: dict[int, Aliasing], n: int, options: Options,
) -> list[Metric]:
    best = effects[0] if effects and math.isfinite(effects[0].change) else None
    bounds = None
    if best is not None and math.isfinite(best.low + best.high):
        said = f"{METHOD}, {options.level:.0%} over {len(effects)} repairs at once"
        bounds = Interval(best.low, best.high, said)
    skipping = [call.number for call in calls if call.grid and call.number in metered]
    most = max(skipping, key=lambda number: metered[number].share(), default=None)
    found = metered[most].interval(options.seed, options.level, options.resamples) if most is not None else None
    breaking = sum(any(needed(breaks(call, move)) for move in asked) for call in calls)
    return [
        Metric(
            "total", error, n=n, reason="judged with its interval by the probe equivariance; here the start of a comparison"
            if error is not None else "the features do not vary at all", about="total error over all elements together",
        ),
        Metric(
            "best_change", best.change if best else None, n=n, interval=bounds, better="lower",
            reason=None if bounds else "no repair was measured" if not effects else "the features do not vary in some resample",
            about=f"change of the total by {best.name}" if best else "change of the total by the best repair",
        ),
        Metric(
            "must_break", float(breaking), reason="read off the module, not estimated",
            about=f"of {_readable(calls)} layers, those that must break it by the rules",
        ),
        Metric(
            "aliasing", None if most is None else metered[most].share(),
            n=None if most is None else len(metered[most].total),
            interval=Interval(*found, f"bootstrap over images, {options.level:.0%}, of the layer where it is largest")
            if found else None,
            reason=None if found else "nothing skips pixels" if most is None else "maps that do not vary", better="lower",
            about="largest share of energy above the new Nyquist before a stride",
        ),
    ]


def _headline(
    calls: Sequence[Call], names: dict[int, str], asked: tuple[Move, ...], transform: Transform, effects: Sequence[Effect],
    error: float | None,
) -> str:
    broken = [c for c in calls if any(needed(breaks(c, move)) for move in asked)]
    causes = list(dict.fromkeys(b.cause for c in broken for move in asked for b in needed(breaks(c, move))))
    if not asked:
        read_as = "the rules of exactness do not speak of it, since it resamples"
    elif broken:
        where = ", ".join(names[c.number] for c in broken[:3]) + (", ..." if len(broken) > 3 else "")
        read_as = f"it must break at {len(broken)} of {_readable(calls)} layers, by {' and '.join(causes)} ({where})"
    elif "shift" in asked and not all(exact([c], "shift", (1, 1)) for c in calls):
        read_as = "only shifts by multiples of the stride can be exact"
    else:
        read_as = "nothing in the module has to break it"
    said = f"{doing(transform)}: {read_as}"
    if error is None:
        return f"{said}; the features do not vary."
    if not effects:
        return f"{said}; there was no padding, stride or pooling to repair (error {error:.3g}, chance {CHANCE:.3g})."
    best = effects[0]
    if not best.high < 0:
        none = f"of {len(effects)} repairs of one layer none is sure to lower the error"
        return f"{said}; {none} ({error:.3g}, chance {CHANCE:.3g})."
    return (
        f"{said}; of {len(effects)} repairs '{best.name}' lowers the error most, {best.before:.3g} to {best.after:.3g} "
        f"(change {best.change:.2g} [{best.low:.2g}, {best.high:.2g}])."
    )


def _notes(
    f: Callable[[Tensor], Any], images: Tensor, module: Any, calls: Sequence[Call], names: dict[int, str],
    asked: tuple[Move, ...], transform: Transform, params: Tensor, effects: Sequence[Effect], waiting: Sequence[Repair],
    metered: dict[int, Aliasing], options: Options,
) -> list[str]:
    notes = []
    if asked:
        notes.append(_fitting(f, images, module, calls, asked[0]))
    if asked and not bool(transform.is_exact(params, (images.shape[2], images.shape[3])).all()):
        some = labels(transform, params)[0]
        notes.append(f"{transform.name} resamples at some elements (such as {some}); the rules speak of {' and '.join(asked)}.")
    apart = [call for call in calls if call.what in ("position", "linear over places", "unread")]
    notes += [f"{names[call.number]}: {breaks(call, 'shift')[0].words}." for call in apart]
    if any(b.cause == "filters" for c in calls for move in asked for b in breaks(c, move)):
        notes.append(
            "Ordinary filters do not turn with the image; only filters that are their own turned selves, or that a GroupConv2d "
            "ties over the group, do. Ties made by other libraries are not seen here: trust the measured total over the rule."
        )
    if waiting:
        notes.append(
            f"Repairs that were not measured: {len(waiting)} (--repairs {options.repairs}). First come those with the largest "
            "share of energy that aliases, or of pixels that see the border."
        )
    if any(len(e.repair.calls) > 1 for e in effects):
        notes.append("Strides side by side are repaired together: the branches of a residual block must keep one grid.")
    if effects:
        notes.append(
            "A repair keeps every weight, so that its effect is a statement on the repaired copy, in which later layers meet "
            "features they were not trained on, and over whose own spread the total is taken. Effects do not add up."
        )
    if metered:
        n = max(len(one.total) for one in metered.values())
        notes.append(f"Aliasing: {n} images, at most 32 channels of a map, mean removed, Hann window, float64.")
    return notes


def _fitting(f: Callable[[Tensor], Any], images: Tensor, module: Any, calls: Sequence[Call], move: Move) -> str:
    """For which sizes every grid would do, tried at the nearest one."""
    fit, near = sizes(calls, move)
    here = images.shape[-1]
    if fit == "every size":
        return f"The grids of all layers fit {move} at every size."
    if near is None:
        return f"The grids of all layers fit {move} at {fit}."
    if near == here:
        return f"The grids of all layers fit {move} for {fit}; {here} does."
    said = f"The grids of all layers fit {move} for {fit}; {near} would do"
    try:
        there = read(f, images.new_zeros(2, images.shape[1], near, near), module)
    except (RuntimeError, ValueError, AssertionError, GeomsslError):
        return f"{said}, but the module does not take images of that size."
    held = not any(needed([b for b in breaks(c, move) if c.grid], grid_only=True) for c in there)
    if held or move == "shift":
        return f"{said} (read again at that size)."
    return f"{said} by the strides; read again at that size, it does not."


def _figures(options: Options, repaired_any: bool, metered: bool) -> list[Figure]:
    found = []
    if repaired_any:
        found.append(Figure(
            "repairs", "bar", "What repairing one layer changes",
            "Change of the total error, with an interval that holds for all repairs at once. Below zero the repair helps.",
            "repairs", "layer", "change", "repair", "low", "high", x_label="layer", y_label="change of the total error",
        ))
    if metered:
        found.append(Figure(
            "aliasing", "bar", "Aliasing",
            f"Share of energy above the new Nyquist, with its {options.level:.0%} interval.", "layers", "layer", "aliasing",
            None, "aliasing_low", "aliasing_high", x_label="layer", y_label="share above Nyquist",
        ))
    return found


def _readable(calls: Sequence[Call]) -> int:
    return sum(call.name not in NONLINEAR for call in calls)


def _padding(call: Call) -> str | None:
    if not call.grid or call.adaptive or call.name == "interpolate":
        return None
    pads = _one(call.before) if call.before == call.after else f"{_one(call.before)}|{_one(call.after)}"
    return f"{pads} {call.mode}".strip() if max(*call.before, *call.after) > 0 else "0"


def _one(values: tuple[int, int]) -> str:
    return str(values[0]) if values[0] == values[1] else f"{values[0]}x{values[1]}"


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
