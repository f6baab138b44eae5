"""rank: how many directions the projector's weights and the features use, for every threshold and by every estimator."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import checks, estimators, subject
from geomssl.probes.estimators import effective_rank, participation_ratio, rank, singular_values, stable_rank
from geomssl.probes.halves import FEWEST, around, halves, mean
from geomssl.probes.streaming import repeated, spectrum, triangle
from geomssl.probes.subject import Layer
from geomssl.seeding import generator

__all__ = ["effective_rank", "participation_ratio", "probe", "rank", "singular_values", "stable_rank"]

THRESHOLDS = tuple(10.0 ** (k / 6) for k in range(-36, 13))
# LiDAR factors its views anew for every half: fewer halves say enough
LIDAR_HALVES = 10
NO_SPREAD = "no spread: fewer than 4 images or no halves asked for"
OF_WEIGHTS = "a property of the weights, not of a sample"
Rows = list[dict[str, float | int | str | None]]


class Options(subject.Options):
    """Settings of the rank probe."""

    tau: float = Field(
        1e-3, gt=0, description="threshold of the rank that is quoted; 1e-3 lies well above float32 rounding (about 1e-6)"
    )
    relative: bool = Field(True, description="measure tau against the largest singular value, so that scale does not matter")
    eps: float = Field(0.0, ge=0, description="added to the normalised singular values of the effective rank (RankMe: 1e-5)")
    halves: int = Field(40, ge=0, le=1000, description="random halves of the images for the spread of feature ranks")
    fit_low: int = Field(3, ge=1, description="first index of the power law's fit (alpha)")
    fit_high: int | None = Field(None, ge=3, description="last index of the fit  [default: half of the positive ones]")
    views: int = Field(10, ge=0, le=1000, description="views of an image for LiDAR, by the training's policy; 0 leaves it out")
    lidar_images: int = Field(1000, ge=2, description="images for LiDAR, at most; each costs `views` forward passes")
    delta: float = Field(1e-4, gt=0, description="ridge of LiDAR's within-image scatter, in squared units of the features")
    lidar_eps: float = Field(1e-7, ge=0, description="added to LiDAR's normalised eigenvalues, as its paper does")


ESTIMATORS: dict[str, str] = {
    "rank": "singular values at or above the threshold",
    "rank_absolute": "singular values at or above tau itself",
    "rank_relative": "singular values at or above tau times the largest",
    "effective_rank": "exp of the entropy of the normalised singular values",
    "effective_rank_variance": "exp of the entropy of the normalised variances",
    "stable_rank": "sum of squared singular values over the largest squared",
    "participation_ratio": "squared sum of variances over the sum of their squares",
}


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Rank of every linear map of the projector and of the features h and z, with the whole rank(tau) curve.

    Weights are taken as they are. Features are centred and divided by sqrt(n), so that a singular value is the standard
    deviation along its direction and a threshold means the same for every n.
    """
    subject.need(2, "a rank")
    indices = subject.choose(options)
    weights = dict(_linear_maps(subject.projector))
    notes: list[str] = []
    metrics: list[Metric] = []
    spectra: dict[str, Tensor] = {}
    estimates: Rows = []
    layers: tuple[Layer, ...] = ("h",) if subject.projector is None else ("h", "z")
    for layer in layers:
        values = subject.features(indices, layer).flatten(1)
        name = f"features {layer}"
        found = spectrum(triangle(values, what=name), values.dtype)
        spectra[name] = found.sigma
        notes += _about_features(name, values, found.collapsed)
        shape = (len(values), values.shape[1])
        drawn = [spectrum(half, values.dtype).sigma for half in halves(values, options.halves, options.seed, "rank-halves")]
        for key, value in _estimate(found.sigma, options).items():
            draws = [_estimate(sigma, options)[key] for sigma in drawn]
            interval = around(value, draws, min(shape[0] - 1, shape[1]))
            estimates.append(_row(name, key, value, shape, interval, mean(draws)))
            metrics.append(_metric(name, key, value, shape[0], interval))
        metrics.append(_alpha(name, found.sigma, drawn, shape[0], options))
        metrics += _lidar(subject, layer, indices, found.collapsed, options, estimates, notes)
    for name, weight in weights.items():
        spectra[name] = singular_values(weight)
        for key, value in _estimate(spectra[name], options).items():
            estimates.append(_row(name, key, value, tuple(weight.shape), None, None))
            metrics.append(_metric(name, key, value, None, None))
        metrics.append(_alpha(name, spectra[name], [], None, options))
    notes += _disagreements(estimates)
    notes += _about_projector(subject.projector, weights) + subject.projector_remarks()
    return Artifact(
        probe="rank",
        title="Rank of the projector and of the features",
        headline=_headline(estimates, len(indices), options),
        definition=(
            "rank(tau) = number of singular values sigma_k >= tau (absolute), or >= tau sigma_1 (relative); tau = "
            f"{options.tau:g}. Effective rank = exp(-sum p_k log p_k) with p_k = sigma_k / sum sigma + eps, eps = "
            f"{options.eps:g}; of the variance with sigma_k^2. Stable rank = sum sigma_k^2 / sigma_1^2. "
            "Participation ratio = (sum sigma_k^2)^2 / sum sigma_k^4. alpha: sigma_k^2 ~ k^-alpha, least squares of "
            "logarithms over the indices that its metric states. LiDAR = exp(-sum p_k log p_k), p_k = lambda_k / sum lambda + "
            f"{options.lidar_eps:g}, lambda the eigenvalues of between- over within-image scatter of {options.views} views an "
            f"image, ridge {options.delta:g}. Features are centred and divided by sqrt(n): sigma_k is a standard deviation, "
            "and 0 at or below the rounding of the features (eps of their dtype times their root mean square length). "
            "Weights are taken as they are, neither centred nor scaled. Float64, by QR and singular value decomposition."
        ),
        metrics=metrics,
        tables=[_estimates_table(estimates), _curve(spectra), _spectrum(spectra)],
        figures=_figures(),
        notes=list(dict.fromkeys(notes)),
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _about_features(name: str, values: Tensor, collapsed: bool) -> list[str]:
    n, d = values.shape
    notes = checks.zeros(values, name)
    if collapsed:
        return [*notes, f"{name} are the same for all {n} images, up to rounding: they have collapsed to a point."]
    if n <= d:
        notes.append(
            f"{name}: once centred, {n} images span at most {n - 1} of {d} dimensions; use more. A rank near {n - 1} says only "
            "that the images end; one far below it does speak of the features."
        )
    twins = repeated(values)
    if twins:
        notes.append(f"{name}: {twins} of {n} images have exactly the features of another; {n - twins} images count.")
    return notes


def _lidar(
    subject: subject.Subject, layer: Layer, indices: Tensor, collapsed: bool, options: Options, estimates: Rows,
    notes: list[str],
) -> list[Metric]:
    """LiDAR of one layer, or why there is none."""
    name, about = f"lidar_{layer}", f"features {layer}: effective rank of between- over within-image scatter"
    reason = "the features have collapsed to a point" if collapsed else None
    if options.views < 2:
        reason = "--views 0: left out" if options.views == 0 else "--views 1: nothing is known within an image"
    if reason:
        return [Metric(name, None, reason=reason, unit="dimensions", about=about)]
    n = min(len(indices), options.lidar_images)
    draw = torch.randperm(len(indices), generator=generator(options.seed, "rank-lidar"))[:n].sort().values
    policy = subject.training_policy(notes)
    views = [
        subject.features(indices[draw], layer, view=(policy, options.seed, k + 1)).flatten(1)
        for k in range(options.views)
    ]
    try:
        found = estimators.lidar(views, options.delta, options.lidar_eps)
    except GeomsslError as error:
        if error.reason != "degenerate":
            raise
        return [Metric(name, None, n, reason=str(error), unit="dimensions", about=about)]
    d = views[0].shape[1]
    drawn = []
    for number in range(min(options.halves, LIDAR_HALVES) if n >= FEWEST else 0):
        rows = torch.randperm(n, generator=generator(options.seed, "rank-lidar-halves", number))[: n // 2]
        drawn.append(estimators.lidar(views, options.delta, options.lidar_eps, rows).value)
    if options.delta > found.within:
        notes.append(
            f"LiDAR of {layer}: the ridge {options.delta:g} exceeds the mean variance within images, {found.within:.2g}"
            f"{' (the views of an image do not differ)' if found.within == 0 else ''}: LiDAR is then mostly that of the means."
        )
    if n * (options.views - 1) < d:
        notes.append(
            f"LiDAR of {layer}: {n} images of {options.views} views leave the within-image scatter singular in {d} dimensions; "
            "the ridge decides there. Use more."
        )
    interval = around(found.value, drawn, min(n - 1, d))
    estimates.append(_row(f"features {layer}", "lidar", found.value, (n, d), interval, mean(drawn)))
    return [Metric(name, found.value, n, interval, None if interval else NO_SPREAD, "dimensions", about=about)]


def _metric(name: str, key: str, value: float, n: int | None, interval: Interval | None) -> Metric:
    if n is None:
        short, reason = name.replace(" ", "_"), OF_WEIGHTS
    else:
        short, reason = name[-1], NO_SPREAD
    return Metric(
        f"{key}_{short}", float(value), n, interval, None if interval else reason, "dimensions",
        about=f"{name}: {ESTIMATORS[key]}",
    )


def _alpha(name: str, sigma: Tensor, drawn: list[Tensor], n: int | None, options: Options) -> Metric:
    """The exponent of the power law of a spectrum, its range of indices stated."""
    short = name[-1] if n is not None else name.replace(" ", "_")
    fit = estimators.power_law(sigma, options.fit_low, options.fit_high)
    if fit is None:
        reason = f"fewer than three positive singular values from index {options.fit_low} on"
        return Metric(f"alpha_{short}", None, n, reason=reason, about=f"{name}: exponent of the power law")
    others = [estimators.power_law(half, fit.low, fit.high) for half in drawn]
    alphas = [other.alpha for other in others if other is not None and other.high == fit.high]
    interval = around(fit.alpha, alphas, math.inf) if len(alphas) == len(others) else None
    reason = "halves of the images do not reach the last index of the fit" if others else NO_SPREAD
    reason = OF_WEIGHTS if n is None else reason
    return Metric(
        f"alpha_{short}", fit.alpha, n, interval, None if interval else reason,
        about=f"{name}: exponent over indices {fit.low}-{fit.high}, R2 = {fit.r2:.3f}"
        + ("" if fit.r2 >= 0.95 else "; no power law there, alpha says little"),
    )


def _linear_maps(projector: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """The weight (out, in) of every nn.Linear of the projector, in the order in which it holds them."""
    found = [m for m in projector.modules() if isinstance(m, nn.Linear)] if projector is not None else []
    for i, module in enumerate(found):
        yield f"projector layer {i}", module.weight


def _estimate(sigma: Tensor, options: Options) -> dict[str, float]:
    """Every estimator of one spectrum, by the names of ESTIMATORS; of the two ranks, the one not quoted has its own name."""
    other = "rank_absolute" if options.relative else "rank_relative"
    return {
        "rank": estimators.count(sigma, options.tau, options.relative),
        other: estimators.count(sigma, options.tau, not options.relative),
        "effective_rank": estimators.effective(sigma, options.eps),
        "effective_rank_variance": estimators.effective(sigma, options.eps, "variance"),
        "stable_rank": estimators.stable(sigma),
        "participation_ratio": estimators.participation(sigma),
    }


def _row(
    name: str, key: str, value: float, shape: tuple[int, ...], interval: Interval | None, half: float | None
) -> dict[str, float | int | str | None]:
    return {
        "object": name, "estimator": key, "value": float(value), "low": interval.low if interval else None,
        "high": interval.high if interval else None, "of": min(shape), "rows": shape[0], "columns": shape[1],
        "mean_of_halves": half,
    }


def _disagreements(estimates: Rows) -> list[str]:
    """One sentence that names every object whose estimators differ by more than a factor of two."""
    found = []
    for name in dict.fromkeys(str(row["object"]) for row in estimates):
        rows = {str(r["estimator"]): float(r["value"] or 0) for r in estimates if r["object"] == name}
        least, most = min(rows, key=lambda k: rows[k]), max(rows, key=lambda k: rows[k])
        if rows[least] > 0 and rows[most] > 2 * rows[least]:
            small, large = (f"{rows[k]:.3g} ({k.replace('_', ' ')})" for k in (least, most))
            found.append(f"{name} from {small} to {large}")
    if not found:
        return []
    return [
        f"The estimators disagree: {'; '.join(found)}. "
        "A few directions dominate and many weak ones remain: read the whole curve."
    ]


def _about_projector(projector: nn.Module | None, weights: dict[str, Tensor]) -> list[str]:
    if projector is None:
        return ["There is no projector here: only the features h are measured."]
    if not weights:
        return ["The projector holds no nn.Linear: only the features h and z are measured."]
    return []


def _headline(estimates: Rows, n: int, options: Options) -> str:
    value = {(r["object"], r["estimator"]): r for r in estimates}
    h = value["features h", "effective_rank"]
    text = f"The features h of {n} images fill {float(h['value'] or 0):.3g} of {h['columns']} dimensions (effective rank)"
    layers = [r for r in estimates if str(r["object"]).startswith("projector") and r["estimator"] == "rank"]
    if not layers:
        return text + "."
    first = layers[0]
    scale = "relative to its largest singular value" if options.relative else "in absolute terms"
    return text + (
        f"; the projector's first linear map keeps rank {int(float(first['value'] or 0))} of {first['of']} "
        f"at tau = {options.tau:g} {scale}."
    )


def _estimates_table(estimates: Rows) -> Table:
    return Table(
        "estimates", "Every estimator of every object", {key: [row[key] for row in estimates] for key in estimates[0]},
        "of: the largest rank that the shape allows. mean_of_halves: where it lies well under the value, n is too small.",
    )


def _curve(spectra: dict[str, Tensor]) -> Table:
    rows = [
        (name, tau, estimators.count(sigma, tau, False), estimators.count(sigma, tau, True))
        for name, sigma in spectra.items() for tau in THRESHOLDS
    ]
    names = ("object", "tau", "rank_absolute", "rank_relative")
    return Table(
        "curve", "Rank against the threshold", {k: [row[i] for row in rows] for i, k in enumerate(names)},
        "rank_absolute counts sigma >= tau, rank_relative sigma >= tau sigma_1.",
    )


def _spectrum(spectra: dict[str, Tensor]) -> Table:
    rows = [(name, k + 1, s, s / max(float(v[0]), 1e-300)) for name, v in spectra.items() for k, s in enumerate(v.tolist())]
    names = ("object", "index", "singular_value", "relative")
    return Table(
        "spectrum", "Singular values", {k: [row[i] for row in rows] for i, k in enumerate(names)},
        "Of features: standard deviations along the principal directions.",
    )


def _figures() -> list[Figure]:
    reading = "A plateau means a gap in the spectrum: every threshold on it agrees. A slope means that the rank is a choice."
    return [
        Figure(
            "rank_relative", "line", "Rank against the threshold, relative to the largest singular value", reading, "curve",
            "tau", "rank_relative", "object", x_label="tau / largest singular value", y_label="rank", log_x=True,
        ),
        Figure(
            "rank_absolute", "line", "Rank against the absolute threshold", reading, "curve", "tau", "rank_absolute", "object",
            x_label="tau", y_label="rank", log_x=True,
        ),
        Figure(
            "spectrum", "line", "Singular values", "Of the weights as they are, of the features centred and over sqrt(n).",
            "spectrum", "index", "singular_value", "object", x_label="index", y_label="singular value", log_y=True,
        ),
    ]
