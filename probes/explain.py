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
from geomssl.probes.causes import by, change_of, fits, must_break, names_of, pair_words, readable, told
from geomssl.probes.defect import CHANCE, EquivarianceError
from geomssl.probes.effect import Effect, effect, joints, pooled, suspects, total
from geomssl.probes.elements import doing, elements, labels, spoken
from geomssl.probes.inputs import Inputs, natural, pictures, rendered
from geomssl.probes.layers import declare
from geomssl.probes.layers import read as read_layers
from geomssl.probes.repair import Repair, repaired
from geomssl.probes.static import Call, Move, read
from geomssl.progress import track
from geomssl.transforms.base import Transform
from geomssl.transforms.groups import Translations
from geomssl.transforms.photometric import Photometric

METHOD = "paired percentile bootstrap over images"
# A total above which something is left to explain.
LARGE = 0.05


class Options(subject.Options):
    """Settings of the explain probe."""

    n: int | None = Field(64, description="images to use")
    transform: str = Field("c4", description='the transform: c4, d4, flips, translations, "rotate(±30)", a policy, ...')
    action: Literal["auto", "regular", "spatial", "trivial"] = Field("auto", description="how features are declared to move")
    layer: str = Field("fibres", description="the features that are explained: fibres, the vector h, or the name of a layer")
    images: Literal["data", "fields", "phantoms"] = Field(
        "data", description="images of the data set, or rendered pictures, on which every T_g is exact"
    )
    bandwidth: float = Field(0.25, gt=0, lt=0.5, description="highest frequency of rendered pictures, cycles per pixel")
    draws: int = Field(4, ge=1, le=1024, description="elements to draw where there are more, or infinitely many")
    repairs: int = Field(6, ge=0, le=1000, description="repairs to measure, the strongest suspects first")
    metered: int = Field(32, ge=2, description="images for the aliasing meter")
    level: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Read the module, meter its aliasing, repair one layer at a time, and lay the three beside each other."""
    transform, grid = spoken(options.transform)
    inputs = _inputs(subject, options, transform)
    params = elements(transform, inputs.size, options.draws, options.seed) if grid is None else grid
    images = inputs.of(slice(0, min(inputs.n, options.metered)))
    with torch.no_grad():
        reader, _ = read_layers(subject.encoder, [options.layer], images[:1])
        layer = reader.layers[0]
        group = getattr(subject.encoder, "group", None)
        declared, why = declare(options.action, transform, layer, group)

        def f(batch: Tensor) -> Tensor:
            return reader.features(batch)[0]

        def measured(one: Callable[[Tensor], Any]) -> EquivarianceError:
            return total(one, inputs, transform, params, declared, subject.batch_size, options.seed)

        module = subject.encoder.module if isinstance(subject.encoder, Wrapped) else subject.encoder
        calls = read(f, images[:2], module)
        names, asked = names_of(calls), moves(transform)
        metered = meter(f, images.split(subject.batch_size), calls)
        base = measured(f)
        colours = isinstance(transform, Photometric)
        chosen, unbuilt, waiting = ([], {}, []) if colours else suspects(calls, asked, metered, options.repairs)
        several = joints([*chosen, *waiting]) if chosen else []
        effects: list[Effect] = []
        joined: list[Effect] = []
        for number, one in enumerate(track([*chosen, *several], "repairs")):
            alone = number < len(chosen)
            where = " + ".join(names[call.number] for call in one.calls) if alone else f"{len(one.calls)} layers at once"
            (effects if alone else joined).append(effect(
                base, measured(repaired(f, one)), one, where, len(chosen) + len(several), options.seed, options.level,
                options.resamples,
            ))
    effects.sort(key=lambda e: e.change)
    error = pooled(base)
    return Artifact(
        probe="explain",
        title=f"Why equivariance under {transform.name} holds or breaks",
        headline=_headline(calls, names, asked, transform, effects, joined, bool(waiting), error),
        definition=(
            "Three readings of one module. Must break: rules on kernel, stride, padding and sizes of one pass. Aliasing: share "
            "of the energy above the new Nyquist before a stride, and above a map's own after a nonlinearity. Repair: padding, "
            "stride or pooling of one layer replaced, weights kept; change = total after − total before, total = "
            "√(Σ‖f(T_g x) − Γ_g f(x)‖² / Σ‖Γ_g f(x) − mean‖²) over images and elements together."
        ),
        metrics=_metrics(error, effects, joined, calls, asked, metered, inputs.n, options),
        tables=[_layers(calls, names, asked, metered, effects, unbuilt, options), _repairs(effects, joined)],
        figures=_figures(options, bool(effects), bool(metered)),
        notes=[
            why, *fits(f, images, module, calls, asked),
            *told(
                calls, names, asked, metered, effects, waiting, unbuilt, (options.seed, options.level, options.resamples)
            ),
            *_notes(calls, asked, transform, params, error, effects, joined, waiting, metered, inputs, options),
        ],
        options=options.model_dump(mode="json"),
        provenance={
            **subject.provenance, "action": declared.name, "n": inputs.n, "images": inputs.name,
            **({} if options.images == "data" else {"images_sha256": None}),
        },
    )


def _inputs(subject: subject.Subject, options: Options, transform: Transform) -> Inputs:
    """Images of the data set, as formulas where it has them, or rendered pictures."""
    if options.images != "data":
        wraps = isinstance(transform, Translations) and transform.wrap
        n = options.n or len(subject.source)
        if n < 2:
            raise GeomsslError(f"--n {n}", "at least 2 pictures", reason="too-few-images")
        made = pictures(
            options.images, n, subject.channels, subject.source.size, options.bandwidth, wraps, options.seed
        )
        return rendered(made, transform, subject.dtype, subject.device)
    subject.need(2, "an explanation")
    indices = subject.choose(options)
    drawn = getattr(subject.source, "rendered", None)
    if drawn is not None:
        return rendered(drawn, transform, subject.dtype, subject.device, indices)
    return natural(lambda rows: subject.images(indices[rows]), len(indices), None)


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
            "layer": names[call.number], "what": call.what, "size_in": by(call.size_in), "size_out": by(call.size_out),
            "kernel": pair_words(call.kernel) if call.grid else None, "stride": pair_words(call.down) if call.grid else None,
            "padding": _padding(call), "must_break": must_break(call, asked), "sizes": fit, "nearest_size": near,
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


def _repairs(alone: Sequence[Effect], joined: Sequence[Effect]) -> Table:
    effects = [*alone, *joined]
    return Table(
        "repairs", "Repairs of one layer, best first, and of many at once",
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
    error: float | None, effects: Sequence[Effect], joined: Sequence[Effect], calls: Sequence[Call],
    asked: tuple[Move, ...], metered: dict[int, Aliasing], n: int, options: Options,
) -> list[Metric]:
    def change(name: str, one: Effect | None, none: str, about: str) -> Metric:
        one = one if one is not None and math.isfinite(one.change) else None
        bounds = None
        if one is not None and math.isfinite(one.low + one.high):
            said = f"{METHOD}, {options.level:.0%} over {len(effects) + len(joined)} repairs at once"
            bounds = Interval(one.low, one.high, said)
        reason = None if bounds else none if not effects else "the features do not vary in some resample"
        return Metric(name, one.change if one else None, n=n, interval=bounds, better="lower", reason=reason, about=about)

    best, every = (effects[0], joined[-1] if joined else effects[0]) if effects else (None, None)
    skipping = [call.number for call in calls if call.grid and call.number in metered]
    most = max(skipping, key=lambda number: metered[number].share(), default=None)
    found = metered[most].interval(options.seed, options.level, options.resamples) if most is not None else None
    breaking = sum(any(needed(breaks(call, move)) for move in asked) for call in calls)
    return [
        Metric(
            "total", error, n=n, reason="judged with its interval by the probe equivariance; here the start of a comparison"
            if error is not None else "the features do not vary at all", about="total error over all elements together",
        ),
        change(
            "best_change", best, "no repair was measured",
            f"change of the total by {best.name}" if best else "change of the total by the best repair",
        ),
        change(
            "all_change", every, "no repair was measured",
            "change of the total by all repairs at once; what is left no padding, stride, pooling or place explains",
        ),
        Metric(
            "must_break", float(breaking), reason="read off the module, not estimated",
            about=f"of {readable(calls)} layers, those that must break it by the rules",
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
    joined: Sequence[Effect], waiting: bool, error: float | None,
) -> str:
    broken = [c for c in calls if any(needed(breaks(c, move)) for move in asked)]
    causes = list(dict.fromkeys(b.cause for c in broken for move in asked for b in needed(breaks(c, move))))
    if isinstance(transform, Photometric):
        read_as = "it moves no pixels, so that no grid has to break it"
    elif not asked:
        read_as = "the rules of exactness do not speak of it, since it resamples"
    elif broken:
        where = ", ".join(names[c.number] for c in broken[:3]) + (", ..." if len(broken) > 3 else "")
        read_as = f"it must break at {len(broken)} of {readable(calls)} layers, by {' and '.join(causes)} ({where})"
    elif "shift" in asked and not all(exact([c], "shift", (1, 1)) for c in calls):
        read_as = "only shifts by multiples of the stride can be exact"
    else:
        read_as = "nothing in the module has to break it"
    said = f"{doing(transform)}: {read_as}"
    if error is None:
        return f"{said}; the features do not vary."
    if not effects:
        none = "no repair was measured" if waiting else "there was no padding, stride or pooling to repair"
        return f"{said}; {none} (error {error:.3g}, chance {CHANCE:.3g})."
    best = effects[0]
    together = ""
    if joined:
        last = joined[-1]
        how = {-1: "lower", 1: "raise", 0: "do not surely change"}[last.sure]
        together = f"; all repairs at once {how} it, {last.before:.3g} to {last.after:.3g}"
    if best.sure >= 0:
        none = f"of {len(effects)} repairs of one layer none is"
        which = none if len(effects) > 1 else f"the one repair ('{best.name}') is not"
        return f"{said}; {which} sure to lower the error ({error:.3g}, chance {CHANCE:.3g}){together}."
    which = f"of {len(effects)} repairs '{best.name}' lowers the error most" if len(effects) > 1 else (
        f"the one repair, '{best.name}', lowers the error"
    )
    return (
        f"{said}; {which}, {best.before:.3g} to {best.after:.3g} (change {best.change:.2g} [{best.low:.2g}, "
        f"{best.high:.2g}]){together}."
    )


def _notes(
    calls: Sequence[Call], asked: tuple[Move, ...], transform: Transform, params: Tensor, error: float | None,
    effects: Sequence[Effect], joined: Sequence[Effect], waiting: Sequence[Repair], metered: dict[int, Aliasing],
    inputs: Inputs, options: Options,
) -> list[str]:
    notes = []
    exactly = bool(transform.is_exact(params, inputs.size).all()) or inputs.moved is not None
    if asked and not bool(transform.is_exact(params, inputs.size).all()):
        some = labels(transform, params)[0]
        notes.append(f"{transform.name} resamples at some elements (such as {some}); the rules speak of {' and '.join(asked)}.")
    if inputs.moved is None and not exactly:
        notes.append("T_g resamples these images, which is in the total before and after; --images fields takes that away.")
    if any(b.cause == "filters" for c in calls for move in asked for b in breaks(c, move)):
        notes.append(
            "Ordinary filters do not turn with the image; only filters that are their own turned selves, or that are tied "
            "between the channels of regular fields, do. Ties between other fields are not seen: trust the measured total "
            "over the rule."
        )
    unbroken = asked and "shift" not in asked and not any(needed(breaks(c, move)) for c in calls for move in asked)
    if unbroken and exactly and error is not None and error > LARGE:
        notes.append(
            "Nothing has to break it and yet the error is large: the declared action may be another than the model's (geomssl "
            "action fits one), or the model looks at places in a way that the rules do not know."
        )
    if waiting:
        notes.append(
            f"Repairs that were not measured by themselves: {len(waiting)} (--repairs {options.repairs}). First come those "
            "with the largest share of energy that aliases, or of pixels that see the border."
        )
    left = "what the blurs let through, or another cause" if not asked or "shift" in asked else "another cause"
    if any(b.cause == "filters" for c in calls for move in asked for b in breaks(c, move)):
        left = "that filters do not turn along, or another cause"
    for one in joined:
        what = "All repairs at once" if one.repair.cause == "all" else f"{one.repair.what.capitalize()} at once"
        notes.append(
            f"{what} ({len(one.repair.calls)} layers): {one.before:.3g} to {one.after:.3g}, change {change_of(one)}."
            + (f" What is left is {left}." if one.repair.cause == "all" and one.after > LARGE else "")
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
        turns = bool(asked) and "shift" not in asked
        harmless = " Under exact turns and mirrors it does no harm where the grid fits." if turns else ""
        notes.append(
            f"Aliasing: {n} images, at most 32 channels of a map, mean removed, Hann window, float64.{harmless}"
        )
    return notes


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


def _padding(call: Call) -> str | None:
    if not call.grid or call.adaptive or call.name == "interpolate":
        return None
    pads = pair_words(call.before) if call.before == call.after else f"{pair_words(call.before)}|{pair_words(call.after)}"
    return f"{pads} {call.mode}".strip() if max(*call.before, *call.after) > 0 else "0"


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
