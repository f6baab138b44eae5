"""rank: how many directions the projector's weights and the features use, for every threshold and by four estimators."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError, unknown
from geomssl.probes import checks, subject
from geomssl.seeding import generator

THRESHOLDS = tuple(10.0 ** (k / 6) for k in range(-36, 13))


def singular_values(matrix: Tensor) -> Tensor:
    """Singular values of a matrix (n, d): min(n, d) numbers, largest first, float64 on the CPU.

    By an SVD in float64: the root of a float32 Gram matrix is 39 % off at a condition number of 1e4.
    Raises GeomsslError where the matrix is empty or not finite.
    """
    return torch.linalg.svdvals(checks.matrix(matrix, "a matrix"))


def rank(matrix: Tensor, tau: float, relative: bool = False) -> int:
    """Rank at a threshold: the number of singular values sigma_j >= tau.

    tau: > 0; with relative=True the threshold is tau sigma_1, and a zero matrix has rank 0.
    Raises GeomsslError where tau is not positive. Source: Cosentino et al. 2022, Eq. 2 (the absolute form).
    """
    return _rank(singular_values(matrix), tau, relative)


def effective_rank(
    matrix: Tensor, eps: float = 0.0, centre: bool = False, of: Literal["singular", "variance"] = "singular"
) -> float:
    """Effective rank: exp of the entropy of the normalised spectrum, between 1 and min(n, d); 0 for a zero matrix.

        p_k = s_k / sum_j s_j + eps,     erank = exp(-sum_k p_k log p_k),     0 log 0 = 0

    of:     "singular" takes s_k = sigma_k (Roy and Vetterli 2007), "variance" s_k = sigma_k^2.
    centre: remove the mean row first. A common mean left in place turns an exact 32 into 1.4.
    eps:    added to every p_k and not renormalised, as RankMe does (Garrido et al. 2023). It inflates wide matrices: 1e-5
            turns an exact 32 into 40.4 at d = 2048, so that it is 0 unless asked for.
    """
    if of not in ("singular", "variance"):
        raise unknown("spectrum", of, ("singular", "variance"))
    if not (eps >= 0 and math.isfinite(eps)):
        raise GeomsslError(f"eps = {eps}", "a number >= 0", reason="bad-value")
    values = checks.matrix(matrix, "a matrix")
    return _effective(torch.linalg.svdvals(_centred(values) if centre else values), eps, of)


def stable_rank(matrix: Tensor) -> float:
    """Stable rank ||A||_F^2 / sigma_1^2 = sum_k sigma_k^2 / sigma_1^2 of the matrix as it is; 0 for a zero matrix."""
    return _stable(singular_values(matrix))


def participation_ratio(matrix: Tensor) -> float:
    """Participation ratio (sum_k lambda_k)^2 / sum_k lambda_k^2 with lambda_k = sigma_k^2, of the matrix as it is.

    Of centred features this is the participation ratio of their covariance. 0 for a zero matrix.
    """
    return _participation(singular_values(matrix))


def _rank(sigma: Tensor, tau: float, relative: bool) -> int:
    if not (tau > 0 and math.isfinite(tau)):
        raise GeomsslError(f"tau = {tau}", "a threshold > 0", reason="bad-value")
    return int(((sigma >= tau * (sigma[0] if relative else 1.0)) & (sigma > 0)).sum())


def _effective(sigma: Tensor, eps: float, of: str) -> float:
    if sigma[0] == 0:
        return 0.0
    # dividing by the largest first keeps the squares of tiny matrices from underflowing
    spectrum = (sigma / sigma[0]) ** (2 if of == "variance" else 1)
    p = spectrum / spectrum.sum() + eps
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def _stable(sigma: Tensor) -> float:
    return 0.0 if sigma[0] == 0 else float(((sigma / sigma[0]) ** 2).sum())


def _participation(sigma: Tensor) -> float:
    if sigma[0] == 0:
        return 0.0
    variance = (sigma / sigma[0]) ** 2
    return float(variance.sum() ** 2 / (variance**2).sum())


def _centred(values: Tensor) -> Tensor:
    return values - values.mean(dim=0)


class Options(subject.Options):
    """Settings of the rank probe."""

    tau: float = Field(
        1e-3, gt=0, description="threshold of the rank that is quoted; 1e-3 lies well above float32 rounding (about 1e-6)"
    )
    relative: bool = Field(True, description="measure tau against the largest singular value, so that scale does not matter")
    eps: float = Field(0.0, ge=0, description="added to the normalised singular values of the effective rank (RankMe: 1e-5)")
    halves: int = Field(40, ge=0, le=1000, description="random halves of the images for the spread of feature ranks")


ESTIMATORS: dict[str, str] = {
    "rank": "singular values at or above the threshold",
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
    features = {"features h": subject.features(indices)}
    if subject.projector is not None:
        features["features z"] = subject.features(indices, "z")
    n = len(indices)

    notes: list[str] = []
    metrics: list[Metric] = []
    spectra: dict[str, Tensor] = {}
    estimates: list[dict[str, float | int | str | None]] = []
    for name, values in features.items():
        exact = checks.matrix(values.flatten(1), name)
        if checks.collapsed(values.flatten(1)):
            exact = torch.zeros_like(exact)
            notes.append(f"{name} are the same for all {n} images, up to rounding: they have collapsed to a point.")
        spectra[name] = torch.linalg.svdvals(_centred(exact)) / math.sqrt(n)
        if n <= exact.shape[1]:
            notes.append(f"{name}: once centred, {n} images span at most {n - 1} of {exact.shape[1]} dimensions; use more.")
        found = _estimate(spectra[name], options)
        halves = _halves(exact, options)
        for key, value in found.items():
            interval = around(value, halves.get(key, []), min(n - 1, exact.shape[1]))
            estimates.append(_row(name, key, value, exact.shape, interval, _mean(halves.get(key, []))))
            metrics.append(
                Metric(
                    f"{key}_{name[-1]}", float(value), n=n, interval=interval,
                    reason=None if interval else "no spread: fewer than 4 images or no halves asked for",
                    unit="dimensions", about=f"{name}: {ESTIMATORS[key]}",
                )
            )
    for name, weight in weights.items():
        spectra[name] = singular_values(weight)
        for key, value in _estimate(spectra[name], options).items():
            estimates.append(_row(name, key, value, weight.shape, None, None))
            metrics.append(
                Metric(
                    f"{key}_{name.replace(' ', '_')}", float(value), reason="a property of the weights, not of a sample",
                    unit="dimensions", about=f"{name}: {ESTIMATORS[key]}",
                )
            )
    notes += _disagreements(estimates)
    notes += _about_projector(subject.projector, weights) + subject.projector_remarks()
    return Artifact(
        probe="rank",
        title="Rank of the projector and of the features",
        headline=_headline(estimates, n, options),
        definition=(
            "rank(tau) = number of singular values sigma_k >= tau, or >= tau sigma_1 (relative). "
            f"Effective rank = exp(-sum p_k log p_k) with p_k = sigma_k / sum sigma + eps, eps = {options.eps:g}; "
            "of the variance with sigma_k^2. Stable rank = sum sigma_k^2 / sigma_1^2. "
            "Participation ratio = (sum sigma_k^2)^2 / sum sigma_k^4. "
            "Features are centred and divided by sqrt(n): sigma_k is a standard deviation. Weights are taken as they are. "
            "All by a float64 singular value decomposition."
        ),
        metrics=metrics,
        tables=[_estimates_table(estimates), _curve(spectra), _spectrum(spectra)],
        figures=_figures(),
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _linear_maps(projector: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    """The weight (out, in) of every nn.Linear of the projector, in the order in which it holds them."""
    found = [m for m in projector.modules() if isinstance(m, nn.Linear)] if projector is not None else []
    for i, module in enumerate(found):
        yield f"projector layer {i}", module.weight


def _estimate(sigma: Tensor, options: Options) -> dict[str, float]:
    """Every estimator of one spectrum, by the names of ESTIMATORS."""
    return {
        "rank": _rank(sigma, options.tau, options.relative),
        "effective_rank": _effective(sigma, options.eps, "singular"),
        "effective_rank_variance": _effective(sigma, options.eps, "variance"),
        "stable_rank": _stable(sigma),
        "participation_ratio": _participation(sigma),
    }


def _halves(values: Tensor, options: Options) -> dict[str, list[float]]:
    """Every estimator on random halves of the images, drawn without replacement."""
    found: dict[str, list[float]] = {key: [] for key in ESTIMATORS}
    half = len(values) // 2
    if half < 2:
        return found
    for draw in range(options.halves):
        rows = torch.randperm(len(values), generator=generator(options.seed, "rank-halves", draw))[:half]
        for key, value in _estimate(torch.linalg.svdvals(_centred(values[rows])) / math.sqrt(half), options).items():
            found[key].append(value)
    return found


def _mean(draws: list[float]) -> float | None:
    return sum(draws) / len(draws) if draws else None


def around(value: float, draws: list[float], most: int) -> Interval | None:
    """The spread of the halves about their own mean, laid around the value.

    A half drawn without replacement differs from the whole about as much as the whole differs from the population, since
    var(half) - var(whole) = var(whole). A bootstrap would repeat rows, and repeated rows lower every rank.
    """
    mean = _mean(draws)
    if mean is None:
        return None
    low, high = (max(0.0, min(float(most), value - d)) for d in (max(draws) - mean, min(draws) - mean))
    return Interval(
        min(low, value), max(high, value),
        f"range over {len(draws)} random halves of the images, without replacement, centred on the value",
    )


def _row(
    name: str, key: str, value: float, shape: tuple[int, ...], interval: Interval | None, half: float | None
) -> dict[str, float | int | str | None]:
    return {
        "object": name, "estimator": key, "value": float(value), "low": interval.low if interval else None,
        "high": interval.high if interval else None, "of": min(shape), "rows": shape[0], "columns": shape[1],
        "mean_of_halves": half,
    }


def _disagreements(estimates: list[dict[str, float | int | str | None]]) -> list[str]:
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


def _headline(estimates: list[dict[str, float | int | str | None]], n: int, options: Options) -> str:
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


def _estimates_table(estimates: list[dict[str, float | int | str | None]]) -> Table:
    return Table(
        "estimates", "Every estimator of every object", {key: [row[key] for row in estimates] for key in estimates[0]},
        "of: the largest rank that the shape allows. mean_of_halves: where it lies well under the value, n is too small.",
    )


def _curve(spectra: dict[str, Tensor]) -> Table:
    rows = [
        (name, tau, _rank(sigma, tau, False), _rank(sigma, tau, True)) for name, sigma in spectra.items() for tau in THRESHOLDS
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
