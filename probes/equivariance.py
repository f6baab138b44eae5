"""equivariance: how far f(T_g x) is from the declared action Γ_g on f(x), per element, with what resampling does beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.encoders.base import Encoder
from geomssl.encoders.geometry import Geometry, geometry
from geomssl.errors import GeomsslError
from geomssl.probes import subject
from geomssl.probes.assurance import METHOD
from geomssl.probes.defect import CHANCE, Bounds, EquivarianceError, Task, evaluating, measure
from geomssl.probes.elements import doing, elements, label, labels
from geomssl.seeding import generator
from geomssl.transforms import named
from geomssl.transforms.actions import Action, ActionFunction, action
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.photometric import Photometric

__all__ = [
    "Bounds", "EquivarianceError", "Options", "assert_equivariant", "elements", "equivariance_error", "label", "probe",
]

DEGENERATE = 1e-6
# Under this total the headline says "as declared"; no verdict rests on it.
CLOSE = 1e-3
SMALL_ACTION = 0.05

Model = Callable[[Tensor], Tensor]


def equivariance_error(
    model: Model,
    images: Tensor,
    transform: Transform,
    params: Tensor,
    action: str | ActionFunction | Action = "regular",
    *,
    geometry: Geometry | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int = 256,
    share: float = DEGENERATE,
) -> EquivarianceError:
    """Equivariance error of a model for each element: how far f(T_g x) is from Γ_g f(x), over the features' own spread.

        total_g = sqrt(sum |f(T_g x) - Γ_g f(x)|^2 / sum |Γ_g f(x) - mean|^2),   sums over images, mean over images

    0: moves as declared; sqrt(2): no better than the features of another image; see EquivarianceError for the rest.
    model:  anything from images to features (n, ...), in the dtype of `images`. An Encoder is measured at its fibres; pass
            `encoder.forward` for h. Modules are put in eval mode (those that it is, is bound to or closes over) and back.
    images: (n, C, H, W) floats, n >= 2.  params (E, P): the elements, such as transform.elements()[1:].
    action: "regular", "spatial", "trivial", or your own; Γ_g is affine. geometry: for what is counted in pixels; None reads
            it off the layers. share: features whose variance is under this share of their squared norm are degenerate.
    Intervals: percentile bootstrap over images with the mean held. Raises GeomsslError for input that cannot be judged.
    """
    if images.dim() != 4 or not images.is_floating_point() or min(images.shape[2:]) < 2:
        raise GeomsslError(
            f"images {images.dtype} {tuple(images.shape)}", "float (n, C, H, W) of at least 2x2 pixels", reason="bad-images"
        )
    if len(images) < 2:
        raise GeomsslError("one image" if len(images) else "no images", "at least 2", reason="too-few-images")
    channels = getattr(model, "in_channels", images.shape[1])
    if isinstance(model, Encoder) and channels != images.shape[1]:
        raise GeomsslError(f"images of {images.shape[1]} channels", f"{channels}, as the model", reason="bad-images")
    if params.dim() != 2 or params.shape[1] != len(transform.parameters) or not len(params):
        raise GeomsslError(
            f"params {tuple(params.shape)} of {transform.name}", f"(E, {len(transform.parameters)}), one row an element",
            reason="bad-parameters",
        )
    f: Model = model.fibres if isinstance(model, Encoder) else model
    with evaluating(model), torch.no_grad():
        features = torch.cat([f(chunk) for chunk in images.split(batch_size)])
        declared = _declare(action, transform, f, images[:1], features, geometry)
        task = Task(
            f, lambda rows: images[rows], lambda rows: features[rows], len(images), transform, declared,
            params.to(images.device), batch_size,
        )
        return measure(task, level, resamples, seed, share)


def assert_equivariant(
    model: Model,
    transform: Transform,
    tolerance: float,
    images: Tensor | None = None,
    action: str | ActionFunction | Action = "regular",
    params: Tensor | None = None,
    *,
    n: int = 16,
    in_channels: int | None = None,
    size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> EquivarianceError:
    """Raise an AssertionError unless the upper bound of the total error is under `tolerance` for every element.

    images: None draws n seeded ones in [0, 1], half coarse and half fine noise, of in_channels (the model's own, else 3) and
    size (the model's own, else 32), in the model's dtype. params: None stands for every element but the identity of a finite
    group, else 16 seeded draws. options: those of equivariance_error. Degenerate features and pairs that resample are refused
    by an AssertionError too: nothing can be told from them. Returns what was measured.
    """
    if images is None:
        images = _noise(model, n, in_channels or int(getattr(model, "in_channels", 3)), size, seed)
    shape = (images.shape[-2], images.shape[-1])
    params = elements(transform, shape, 16, seed) if params is None else params
    found = equivariance_error(model, images, transform, params, action, seed=seed, **options)
    names = labels(transform, params)
    for bad, why in (
        (found.degenerate, "the features hardly vary from image to image, so nothing can be told (a constant would pass)"),
        (~found.exact, "the transform or its action resamples there, so the error is not the model's alone"),
    ):
        if bool(bad.any()):
            where = ", ".join(name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad)
            raise AssertionError(f"equivariance under {transform.name} cannot be asserted at {where}: {why}")
    worst = int(found.interval.high.argmax())
    low, high = (float(bound[worst]) for bound in found.interval)
    if not high < tolerance:
        raise AssertionError(
            f"not equivariant under {transform.name}: expected total error < {tolerance:g} at every element, found "
            f"{float(found.total[worst]):.3g} [{low:.3g}, {high:.3g}] at {names[worst]} (chance {CHANCE:.3g}, action size "
            f"{float(found.action_size[worst]):.3g}, {found.n} images)"
        )
    return found


def _declare(
    chosen: str | ActionFunction | Action, transform: Transform, f: Model, image: Tensor, features: Tensor,
    placed: Geometry | None,
) -> Action:
    """The action, with the geometry of the features' grid where there is one."""
    if placed is None and isinstance(chosen, str) and features.dim() >= 4:
        placed = geometry(f, image)
    return action(chosen, transform, placed)


def _noise(model: Model, n: int, channels: int, size: int | None, seed: int) -> Tensor:
    side = size or int(getattr(model, "size", 32))
    draw = generator(seed, "assert-equivariant")
    coarse = torch.rand(n, channels, -(-side // 4), -(-side // 4), generator=draw)
    coarse = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    images = (coarse + torch.rand(n, channels, side, side, generator=draw)) / 2
    weight = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return images if weight is None else images.to(weight.device, weight.dtype)


class Options(subject.Options):
    """Settings of the equivariance probe."""

    transform: str = Field("c4", description="the transform: c4, d4, c8, flips, translations, rotate, a policy, ...")
    action: Literal["auto", "regular", "spatial", "trivial"] = Field(
        "auto",
        description="how features are declared to move; auto: regular where the encoder has this group, else spatial for "
        "maps, else trivial",
    )
    layer: Literal["fibres", "h"] = Field("fibres", description="which features: fibres before pooling, or the vector h")
    draws: int = Field(16, ge=1, le=4096, description="elements to draw where there are more, or infinitely many")
    step: int = Field(1, ge=1, description="shifts are multiples of so many pixels")
    level: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")
    share: float = Field(
        DEGENERATE, ge=0, lt=1, description="features with less variance than this share of their squared norm are degenerate"
    )


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Equivariance error of an encoder for every element of a transform, under a declared action of its features."""
    subject.need(2, "an equivariance error")
    encoder, size = subject.encoder, (subject.source.size,) * 2
    if min(size) < 2:
        raise GeomsslError(f"images of {size[0]}x{size[1]} pixels", "at least 2x2 pixels", reason="bad-images")
    transform = named(options.transform)
    indices = subject.choose(options)
    features = subject.features(indices, options.layer)
    f: Model = encoder.fibres if options.layer == "fibres" else encoder
    name, why = _chosen(options, encoder, transform, features)
    with evaluating(encoder), torch.no_grad():
        declared = _declare(name, transform, f, subject.images(indices[:1]), features, None)
        params = elements(transform, size, options.draws, options.seed, options.step)
        task = Task(
            f, lambda rows: subject.images(indices[rows]), lambda rows: features[rows].to(subject.device), len(indices),
            transform, declared, params.to(subject.device), subject.batch_size,
        )
        found = measure(task, options.level, options.resamples, options.seed, options.share)
    names = labels(transform, params)
    shape = f"{options.layer} of shape {tuple(features.shape[1:])}"
    notes = [why, *_notes(found, names, declared, size, features, subject.dtype)]
    return Artifact(
        probe="equivariance",
        title=f"Equivariance under {transform.name}",
        headline=_headline(found, names, transform, options.layer, declared),
        definition=(
            "total = √(Σ‖f(T_g x) − Γ_g f(x)‖² / Σ‖Γ_g f(x) − mean‖²) over images: 0 where features move as declared, "
            f"√2 = {CHANCE:.3g} where they are unrelated. floor² = ½ Σ‖f(T_g⁻¹T_g x) − f(x)‖² over the same denominator, plus "
            "‖Γ_g⁻¹Γ_g f − f‖² where Γ resamples; excess = √max(0, total² − floor²). action size = √(Σ‖Γ_g f − f‖² / same). "
            f"Here f gives {shape}, T is {transform.name}, Γ is the {declared.name} action. Judge by total, and only where the "
            "pair (T_g, Γ_g) is exact."
        ),
        metrics=_metrics(found, options),
        tables=[_table(found, names), _parameters(transform, params, names)],
        figures=[
            Figure(
                "errors", "bar", f"Equivariance error under {transform.name}",
                f"Total error of each element with its {options.level:.0%} interval. Unrelated features score {CHANCE:.3g}.",
                "elements", "element", "total", low="low", high="high", x_label="element", y_label="total error", log_y=True,
            )
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance={**subject.provenance, "action": declared.name},
    )


def _chosen(options: Options, encoder: Any, transform: Transform, features: Tensor) -> tuple[str, str]:
    """The name of the action, and a sentence that says why it is this one."""
    maps = features.dim() >= 4
    if options.action != "auto":
        if not maps and options.action != "trivial":
            raise GeomsslError(
                f"the {options.action} action on h, a vector", "action trivial, or layer fibres", reason="no-action"
            )
        return options.action, f"The {options.action} action was asked for."
    group = getattr(encoder, "group", None)
    if maps and group is not None and group == transform:
        return "regular", f"The encoder declares {group.name}, so its fibres are held to the regular action."
    if isinstance(transform, Photometric):
        return "trivial", f"{transform.name} moves no pixels, so features are held to stay as they are (the trivial action)."
    if maps and features.shape[-1] * features.shape[-2] > 1:
        if group is not None and group.fibre > 1:
            return "spatial", (
                f"The encoder declares {group.name}, not {transform.name}: its maps are held to move as images (the spatial "
                "action), which leaves the orientations where they are. An error here may be the declaration's, not the "
                "model's."
            )
        return "spatial", (
            f"The encoder declares no action of {transform.name}, so its maps are held to move as images (the spatial action)."
        )
    return "trivial", (
        "These features have no place and no orientation, so they are held to stay as they are (the trivial action)."
    )


def _table(found: EquivarianceError, names: list[str]) -> Table:
    return Table(
        "elements", "Every element",
        {
            "element": names,
            "total": _plain(found.total), "low": _plain(found.interval.low), "high": _plain(found.interval.high),
            "low_any": _plain(found.low_any), "floor": _plain(found.floor), "excess": _plain(found.excess),
            "action_size": _plain(found.action_size), "exact": found.exact.tolist(), "degenerate": found.degenerate.tolist(),
        },
        "[low, high] is the pointwise interval of total; low_any is the lower bound that holds for all elements at once.",
    )


def _parameters(transform: Transform, params: Tensor, names: list[str]) -> Table:
    columns = {f"{p.name} ({p.unit})" if p.unit else p.name: params[:, i].tolist() for i, p in enumerate(transform.parameters)}
    return Table("parameters", "Parameters of every element", {"element": names, **columns})


def _plain(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _metrics(found: EquivarianceError, options: Options) -> list[Metric]:
    count, n = len(found.total), found.n
    constant = "the features do not vary at all, so there is nothing to compare with"
    usable = found.total.isfinite()
    worst = int(found.total.nan_to_num(nan=-1.0).argmax())
    interval = None
    if bool(usable.any()):
        interval = Interval(
            float(found.low_any[usable].max()), float(found.interval.high[usable].max()),
            f"{METHOD}, {options.level:.0%}: from the largest simultaneous lower bound to the largest pointwise upper bound "
            f"of {count} elements",
        )

    def single(name: str, values: Tensor, missing: str, about: str) -> Metric:
        value = float(values[worst])
        given = value if math.isfinite(value) else None
        reason = missing if given is None else "describes the total error beside it and is no basis of a verdict"
        return Metric(name, given, n=n, reason=reason, about=about)

    no_floor = "the transform has no inverse" if bool(usable.any()) else constant
    return [
        Metric(
            "total", float(found.total[worst]) if interval else None, n=n, interval=interval,
            reason=None if interval else constant, better="lower", about="total error at the worst element",
        ),
        single("action_size", found.action_size, constant, "how much the declared action moves the features there"),
        single("floor", found.floor, no_floor, "what resampling there and back does to the features there"),
        single("excess", found.excess, no_floor, "total without the floor, in squares; never the basis of a verdict"),
        Metric("chance", CHANCE, reason="a constant: what unrelated features score", about="total error of unrelated features"),
        Metric(
            "exact", float(found.exact.double().mean()), n=n, reason="a property of the elements, not of a sample",
            about=f"share of the {count} elements whose pair of actions only permutes",
        ),
        Metric(
            "variance_share", float(found.variance_share.min()), n=n,
            reason=f"compared with a stated share only: under {options.share:g} the features are degenerate",
            about="variance of the features over their squared norm, at the element where it is least",
        ),
    ]


def _headline(found: EquivarianceError, names: list[str], transform: Transform, layer: str, declared: Action) -> str:
    features = "fibres" if layer == "fibres" else "vectors h"
    if bool(found.degenerate.all()):
        return f"The {features} hardly vary from image to image: nothing can be told about how {transform.name} moves them."
    judged = found.exact & ~found.degenerate
    total_of = found.total.nan_to_num(nan=-1.0)
    worst = int((total_of.masked_fill(~judged, -1.0) if bool(judged.any()) else total_of).argmax())
    total = float(found.total[worst])
    does, kept = doing(transform), total < CLOSE
    if not bool(judged.any()):
        return (
            f"{does} puts the {features} {total:.2g} of their spread from the declared place, at {names[worst]} "
            f"(chance {CHANCE:.3g}); nothing is merely permuted there, so this is no verdict on the model."
        )
    if declared.name == "trivial":
        said = f"{does} {'leaves' if kept else 'does not leave'} the {features} as they are"
    else:
        said = f"{does} {'moves' if kept else 'does not move'} the {features} as declared"
    count = "" if bool(judged.all()) else f" of the {int(judged.sum())} elements in {len(names)} that only permute"
    return f"{said}: worst error {total:.2g} of the features' spread{count}, at {names[worst]} (chance {CHANCE:.3g})."


def _notes(
    found: EquivarianceError, names: list[str], declared: Action, size: Size, features: Tensor, dtype: torch.dtype
) -> list[str]:
    notes = [f"Features were computed in {str(dtype).removeprefix('torch.')} and summed in float64."]
    exact, moved = found.exact, found.action_size.nan_to_num(nan=0.0)
    if bool(found.degenerate.any()):
        where = ", ".join(n for n, bad in zip(names, found.degenerate.tolist(), strict=True) if bad)
        notes.append(f"Degenerate at {where}: the features hardly vary, so a small error would mean nothing. Never a pass.")
    if declared.name == "trivial":
        notes.append("The trivial action asks for invariance: a network that keeps nothing of the image meets it too.")
    elif float(moved.min()) < SMALL_ACTION:
        notes.append(
            f"At {names[int(moved.argmin())]} the declared action moves the features by only {float(moved.min()):.2g} of their "
            "spread: an invariant network meets it trivially."
        )
    if not bool(exact.all()):
        notes.append(
            f"{int((~exact).sum())} of {len(names)} elements are not exact: the image or the features are resampled there, "
            "and total mixes the model's defect with that. The floor describes resampling there and back; it is no bound."
        )
    if float(found.total.nan_to_num(nan=0.0).max()) > 1.1 * CHANCE:
        notes.append(
            "A total above chance means that the mean of the features over images does not move as declared either: what all "
            "images share is put in the wrong place."
        )
    if bool(found.floor.isnan().all()) and bool(found.total.isfinite().any()):
        notes.append(f"{declared.transform.name} has no inverse, so there is no floor and no excess.")
    placed, counts = declared.geometry, any(p.unit == "pixels" for p in declared.transform.parameters)
    if declared.name == "spatial" and counts and placed is not None:
        stride = placed.stride[0]
        notes.append(
            f"A feature pixel is {stride:g} image pixels, as the layers say: only multiples of {stride:g} are whole (see step)."
            if placed.source == "layers"
            else f"The layers do not tell the stride; the ratio of sizes stands in, {size[0]} / {features.shape[-2]} = "
            f"{stride:.3g} pixels, and no shift counts as exact."
        )
    return notes
