"""lie: how features change at first order as the image moves, beside how they are declared to, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.data.rendered import Rendered
from geomssl.encoders.base import Encoder
from geomssl.encoders.geometry import geometry
from geomssl.encoders.wrap import Wrapped
from geomssl.errors import GeomsslError
from geomssl.probes import subject
from geomssl.probes.assurance import METHOD, bootstrap_ratio
from geomssl.probes.defect import evaluating
from geomssl.probes.derivative import Declared, Edge, Found, Task, declared_flow, measure
from geomssl.probes.generators import GENERATORS, Difference, Generator, pushed, rendered_tangent, tangent
from geomssl.probes.generators import generator as named_generator
from geomssl.probes.inputs import pictures
from geomssl.probes.layers import read, single
from geomssl.probes.shares import shares
from geomssl.progress import track
from geomssl.transforms.base import Size

DEFAULT = ("translate-x", "translate-y", "rotate", "zoom", "shear", "hue", "brightness")


def lie_derivative(
    model: Callable[[Tensor], Tensor],
    images: Tensor | Rendered,
    generator: str | Generator,
    action: Declared = "auto",
    difference: Difference = "central",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """L f = d/dt [Γ_{g_t}^-1 f(T_{g_t} x)] at t = 0, per image, of the shape of f(x).

        L f(x) = J_f(x) (d/dt T_{g_t} x) - d/dt Γ_{g_t} f(x),      0 where f is equivariant to first order

    generator: "translate-x", "translate-y" (per pixel), "rotate", "shear" (per radian; anticlockwise as displayed), "zoom"
    (per unit of log factor), "hue" (per turn), "brightness", "contrast", "saturation" (per unit of factor).
    images: (n, C, H, W) floats, whose tangent is -v . grad x by differences of pixels, or Rendered pictures, whose tangent
    is exact (in `dtype`, that of the model's weights unless given). model: images to features (n, ...); an Encoder is taken
    at its fibres. Γ: "trivial" leaves features as they are (vectors, and whatever only changes colour); "spatial" moves a
    map as the image, at its own stride and offset; auto: spatial for maps. The tangent is pushed in forward mode.
    Frame: x right, y down, the centre the image's.
    Raises GeomsslError for an operation without a forward mode, named with its layer. Gruver et al., The Lie
    Derivative for Measuring Learned Equivariance (2023), there by two backward passes through a bilinear sampler.
    """
    chosen = named_generator(generator)
    owner = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    module = owner if isinstance(owner, nn.Module) else nn.Module()
    f = model.fibres if isinstance(model, Encoder) else model
    with evaluating(model), torch.no_grad():
        x, moving = _moving(images, module, chosen, difference, dtype)
        (features,), (slope,) = pushed(lambda images: [f(images)], module, x, moving)
        placed = geometry(f, x[:1]) if features.dim() >= 4 else None
        layer = single(f, features, placed).layers[0]
        group, size = getattr(model, "group", None), (x.shape[2], x.shape[3])
        declared, why = declared_flow(features, layer, chosen, group, size, action, difference)
        if declared is None:
            raise GeomsslError(
                f"{chosen.name} on these features: {why}", "action trivial, or another layer", reason="no-action"
            )
        return slope - declared


def _moving(
    images: Tensor | Rendered, module: nn.Module, chosen: Generator, difference: Difference, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """Images and their tangents; rendered ones on the device of the model's weights."""
    if not isinstance(images, Rendered):
        return images, tangent(images, chosen, difference)
    rows, weight = torch.arange(len(images)), next(module.parameters(), torch.empty(0))
    dtype = dtype or weight.dtype
    return (
        images.images(rows, dtype=dtype, device=weight.device),
        rendered_tangent(images, rows, chosen, dtype, weight.device),
    )


class Options(subject.Options):
    """Settings of the Lie derivative probe."""

    n: int | None = Field(128, ge=2, description="images to use")
    generator: tuple[str, ...] = Field(DEFAULT, description=f"what moves: {', '.join(GENERATORS)}")
    layer: tuple[str, ...] = Field(
        ("fibres", "h"), description="which features: fibres, h, names of modules, wild cards (layer*), or all; in one pass"
    )
    action: Declared = Field(
        "auto", description="how features are declared to move; auto: maps as the image, vectors not at all"
    )
    images: Literal["data", "fields", "phantoms"] = Field(
        "data", description="images of the data set (tangent by differences of pixels), or rendered ones (tangent exact)"
    )
    bandwidth: float = Field(0.25, gt=0, lt=0.5, description="highest frequency of rendered pictures, cycles per pixel")
    difference: Difference = Field("central", description="gradients: central differences, or spectral for what is periodic")
    boundary: Edge = Field(
        "interior", description="interior: maps without their edge; crop: feature pixels that see the image alone"
    )
    shares: bool = Field(False, description="also each layer's share of the last layer's derivative; shares add up to one")
    level: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """The Lie derivative of an encoder's layers along translations, rotation, zoom, shear, hue and brightness."""
    encoder, device, dtype = subject.encoder, subject.device, subject.dtype
    size: Size = (subject.source.size,) * 2
    chosen, notes = _active([named_generator(name) for name in dict.fromkeys(options.generator)], subject.channels)
    if options.images == "data":
        subject.need(2, "a Lie derivative")
        rows = subject.choose(options)
        drawn: Rendered | None = getattr(subject.source, "rendered", None)
    else:
        rows = torch.arange(options.n or len(subject.source))
        drawn = pictures(
            options.images, len(rows), subject.channels, size[0], options.bandwidth,
            options.difference == "spectral", options.seed,
        )

    def batches(generators: Sequence[Generator]) -> Any:
        what = "Lie derivative" if generators else "means"
        for part in track(rows.split(subject.batch_size), what, total=-(-len(rows) // subject.batch_size)):
            x = subject.images(part) if drawn is None else drawn.images(part, dtype=dtype, device=device)
            if drawn is None:
                yield x, [tangent(x, g, options.difference) for g in generators]
            else:
                yield x, [rendered_tangent(drawn, part, g, dtype, device) for g in generators]

    module = encoder.module if isinstance(encoder, Wrapped) else encoder
    with evaluating(encoder):
        reader, remarks = read(encoder, options.layer, next(iter(batches([])))[0][:1])
        task = Task(
            reader, module, getattr(encoder, "group", None), batches, chosen, len(rows), size, options.action,
            options.difference, options.boundary,
        )
        found, left = measure(task)
        if not found:
            where = f"layers {', '.join(options.layer)}: {left[0]}"
            raise GeomsslError(where, "another generator or layer", reason="no-action")
        parts = shares(encoder, task, options.seed, options.level, options.resamples) if options.shares else None
    figures = _figures(found, options)
    table = _table(found, figures)
    return Artifact(
        probe="lie",
        title="Lie derivative of the features",
        headline=_headline(found, figures),
        definition=(
            "L f = J_f (d/dt T_{g_t} x) − d/dt Γ_{g_t} f(x) at t = 0: what the features do as the image moves, minus what "
            "they are declared to do; 0 where f is equivariant to first order. The figure is √(Σ‖L f‖² / Σ‖f − mean‖²) over "
            "images: the share of the features' own spread by which they miss what is declared, for one unit of movement. "
            "Vectors are declared to stay (Γ trivial), maps to move as the image (at their own stride and offset). relative = "
            "√(Σ‖L f‖² / (Σ‖J T x‖² + Σ‖dΓ f‖²)): 0 equivariant, 1 where the two are unrelated; it is 1 for every vector."
        ),
        metrics=_metrics(found, figures, len(rows), options),
        tables=[table, *(parts.tables if parts else [])],
        figures=[
            Figure(
                "lie", "bar", "Lie derivative by layer",
                f"Share of the features' spread for one unit of movement, {options.level:.0%} intervals, {len(rows)} images.",
                "lie", "layer", "value", "movement", "low", "high", x_label="layer", y_label="spread per unit", log_y=True,
            ),
            *(parts.figures if parts else []),
        ],
        notes=[*notes, *_notes(found, options, drawn), *left, *remarks, *(parts.notes if parts else [])],
        options=options.model_dump(mode="json"),
        provenance={**subject.provenance, "images": drawn.name if drawn else "data"},
    )


def _active(chosen: Sequence[Generator], channels: int) -> tuple[list[Generator], list[str]]:
    """Those that do something to images of so many channels, and a sentence on the rest."""
    usable = []
    for one in chosen:
        takes = channels in (1, 3) or not getattr(one.transform, "needs_colour", False)
        if one.moves or (takes and any(one.transform.active(channels))):
            usable.append(one)
    if not usable:
        raise GeomsslError(
            f"generators {', '.join(g.name for g in chosen)} on images of {channels} channels", "one that changes such images",
            reason="no-generator",
        )
    idle = [g.name for g in chosen if g not in usable]
    return usable, [f"{', '.join(idle)}: left out, since nothing changes on {channels} channels."] if idle else []


@dataclass(frozen=True)
class _Figure:
    value: float | None
    low: float | None
    high: float | None
    relative: float | None
    moved: float | None
    asked: float | None


def _figures(found: Sequence[Found], options: Options) -> list[_Figure]:
    """Roots of the ratios, per shown unit, with the interval of the first; None where there is no spread."""
    errors, spreads = (torch.stack([getattr(f, name) for f in found], dim=1) for name in ("error", "spread"))
    bounds = bootstrap_ratio(errors, spreads, options.seed, options.level, options.resamples)
    figures = []
    for one, low, high in zip(found, *(b.tolist() for b in bounds), strict=True):
        if one.degenerate:
            figures.append(_Figure(None, None, None, None, None, None))
            continue
        per, below = one.generator.per, float(one.spread.sum())
        error, moved, asked = (per * math.sqrt(float(part.sum()) / below) for part in (one.error, one.moved, one.asked))
        ends = [per * end if math.isfinite(end) else None for end in (low, high)]
        relative = error / math.hypot(moved, asked) if moved or asked else None
        figures.append(_Figure(error, ends[0], ends[1], relative, moved, asked))
    return figures


def _table(found: Sequence[Found], figures: Sequence[_Figure]) -> Table:
    return Table(
        "lie", "Every movement and layer",
        {
            "movement": [f.generator.name for f in found], "per": [f.generator.shown for f in found],
            "layer": [f.layer.name for f in found], "value": [v.value for v in figures], "low": [v.low for v in figures],
            "high": [v.high for v in figures], "relative": [v.relative for v in figures], "moved": [v.moved for v in figures],
            "declared": [v.asked for v in figures], "action": [f.action for f in found],
            "degenerate": [f.degenerate for f in found],
        },
        "value: spread of the features per unit; moved: |J T x|, declared: |dΓ f|, over the same spread.",
    )


def _metrics(found: Sequence[Found], figures: Sequence[_Figure], n: int, options: Options) -> list[Metric]:
    last = found[-1].layer.name
    flat = "the features hardly vary from image to image, so there is nothing to compare with"
    metrics = []
    for one, figure in zip(found, figures, strict=True):
        if one.layer.name != last:
            continue
        interval = None
        if figure.low is not None and figure.high is not None:
            interval = Interval(figure.low, figure.high, f"{METHOD}, {options.level:.0%}")
        metrics.append(
            Metric(
                f"lie_{one.generator.name}", figure.value, n, interval, None if interval else flat,
                f"spread per {one.generator.shown}", "lower" if one.action == "spatial" else None,
                f"Lie derivative of {last}, {one.action} action",
            )
        )
    return metrics


def _headline(found: Sequence[Found], figures: Sequence[_Figure]) -> str:
    last = found[-1].layer.name
    here = [(f, v) for f, v in zip(found, figures, strict=True) if f.layer.name == last and v.value is not None]
    if not here:
        return f"The features {last} hardly vary from image to image: nothing can be told about how they change."
    said = ", ".join(f"{v.value:.2g} for a {f.generator.shown} ({f.generator.name})" for f, v in here[:7])
    if here[0][0].action == "spatial":
        return f"{last} misses the movement of the image by this share of its spread: {said}."
    return f"{last} changes by this share of its spread: {said}."


def _notes(found: Sequence[Found], options: Options, drawn: Rendered | None) -> list[str]:
    notes = ["First order only: nothing is said about large movements."]
    if drawn is not None:
        notes.append(
            f"The images are rendered ({drawn.name}, up to {drawn.bandwidth:g} cycles per pixel): their tangents are exact."
        )
    else:
        notes.append(
            f"Tangents of the images are {options.difference} differences of pixels, one-sided at the border; sharp edges make "
            "them approximate. --images fields makes them exact."
        )
    if any(f.action == "spatial" for f in found):
        notes.append(
            "Maps move by differences of their own pixels, so that what a map has beyond its own sampling (after strides and "
            "rectifiers) counts as error; the edge of each map is not judged"
            + (", nor is what sees padding." if options.boundary == "crop" else ", padding further in is.")
        )
    if any(f.layer.geometry is not None and f.layer.geometry.source == "sizes" and f.action == "spatial" for f in found):
        notes.append("Where the layers do not tell the stride of a map, the ratio of sizes stands in.")
    flat = sorted({f.layer.name for f in found if f.degenerate})
    if flat:
        said = "hardly varies from image to image, so a small derivative would mean nothing"
        notes.append(f"Degenerate: {', '.join(flat)} {said}.")
    return notes
