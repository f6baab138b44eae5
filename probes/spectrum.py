"""spectrum: log singular values of the features on plain images and on the training's views, beside the untrained encoder's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Metric, Table
from geomssl.probes import checks, subject
from geomssl.probes.estimators import PowerLaw, effective, power_law
from geomssl.probes.halves import around, halves
from geomssl.probes.streaming import spectrum, triangle
from geomssl.progress import track

__all__ = ["PowerLaw", "feature_spectrum", "power_law", "probe"]

PLAIN, VIEWS = "plain", "views"
RANDOM = "untrained, "


def feature_spectrum(features: Tensor, centre: bool = True, rows: Tensor | None = None) -> Tensor:
    """Singular values of features (n, d) over sqrt(n): min(n, d) numbers, largest first, float64.

        sigma_k = singular value k of (X - 1 mean') / sqrt(n),     centre=False: of X / sqrt(n)

    so that centred ones are standard deviations along the principal directions. rows: use only those rows. X is read once,
    block by block (streaming.Triangle): nothing is squared, and memory does not grow with n.
    Raises GeomsslError where X is no matrix or not finite.
    """
    found = triangle(features, rows)
    return found.singular_values(centre) / math.sqrt(found.count)


class Options(subject.Options):
    """Settings of the spectrum probe."""

    centre: bool = Field(True, description="remove the mean feature first; without it the mean is the first direction")
    fit_low: int = Field(3, ge=1, description="first index of the power law's fit")
    fit_high: int | None = Field(None, ge=3, description="last index of the fit  [default: half of the positive ones]")
    halves: int = Field(20, ge=0, le=1000, description="random halves of the images for the spread of the figures")


@dataclass(frozen=True)
class _Found:
    """The spectrum of one layer on one kind of data; values at or below rounding are 0."""

    layer: str
    data: str
    shape: tuple[int, int]
    sigma: Tensor
    halves: list[Tensor]

    @property
    def name(self) -> str:
        return f"{self.layer}_{self.data}".replace(", ", "_")

    @property
    def words(self) -> str:
        return _words(self.layer, self.data)


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Singular values of h and z on plain images and on one view of each, and of the encoder before training."""
    subject.need(4, "a spectrum")
    indices = subject.choose(options, least=4)
    notes: list[str] = []
    view = (subject.training_policy(notes), options.seed, 1)
    wanted = [(subject, "h", data) for data in (PLAIN, VIEWS)]
    twin = subject.random_twin()
    if twin is None:
        notes.append("The encoder before training is not known: there is nothing to compare with.")
    else:
        wanted += [(twin, "h", RANDOM + data) for data in (PLAIN, VIEWS)]
    if subject.projector is not None:
        wanted += [(subject, "z", data) for data in (PLAIN, VIEWS)]
    found = []
    for owner, layer, data in track(wanted, "spectra"):
        features = owner.features(indices, layer, view=view if data.endswith(VIEWS) else None)  # type: ignore[arg-type]
        found.append(_one(features.flatten(1), layer, data, options))
        notes += checks.zeros(features.flatten(1), found[-1].words)
    metrics = [metric for one in found for metric in _metrics(one, options, notes)]
    notes += _remarks(found, len(indices)) + subject.projector_remarks()
    how = "centred" if options.centre else "not centred"
    ranges = {one.name: power_law(one.sigma, options.fit_low, options.fit_high) for one in found}
    fits = "; ".join(f"{name.replace('_', ' ')}: {f.low}-{f.high}" for name, f in ranges.items() if f)
    return Artifact(
        probe="spectrum",
        title="Singular values of the features",
        headline=_headline(found),
        definition=(
            f"sigma_k = singular value k of the features, {how}, over sqrt(n), by a float64 QR and SVD. Values at or below the "
            "rounding of the features (eps of their dtype times their root mean square length) are written 0. "
            "views: one view of each image by the training's policy. "
            "Effective rank = exp(-sum p_k log p_k), p_k = sigma_k / sum sigma. "
            "alpha: sigma_k^2 ~ k^-alpha, least squares of logarithms over the indices " + (fits or "(too few)") + ". "
            "Condition number = sigma_1 / sigma_d."
        ),
        metrics=metrics,
        tables=[_table(layer, [one for one in found if one.layer == layer]) for layer in _layers(found)],
        figures=[
            Figure(
                f"spectrum_{layer}", "line", f"Singular values of {layer}",
                "A cliff is a collapse to fewer dimensions; a straight fall on these axes is an exponential one.",
                f"spectrum_{layer}", "index", "singular_value", "data", x_label="index", y_label="singular value", log_y=True,
            )
            for layer in _layers(found)
        ],
        notes=list(dict.fromkeys(notes)),
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _words(layer: str, data: str) -> str:
    return f"{layer} on {data} images" if data == PLAIN else f"{layer}, {data}"


def _one(features: Tensor, layer: str, data: str, options: Options) -> _Found:
    whole = spectrum(triangle(features, what=f"features {_words(layer, data)}"), features.dtype, options.centre)
    drawn = halves(features, options.halves, options.seed, "spectrum-halves")
    spread = [spectrum(half, features.dtype, options.centre).sigma for half in drawn]
    return _Found(layer, data, (len(features), features.shape[1]), whole.sigma, spread)


def _metrics(one: _Found, options: Options, notes: list[str]) -> list[Metric]:
    """Effective rank, exponent with its fit, and condition number of one spectrum."""
    n, d = one.shape
    what = one.words
    most = min(n - 1, d)
    rank = effective(one.sigma)
    draws = [effective(half) for half in one.halves]
    none = "no spread: no halves asked for"
    spread = around(rank, draws, most)
    metrics = [Metric(
        f"effective_rank_{one.name}", rank, n, spread, None if spread else none, "dimensions",
        about=f"{what}: exp of the entropy of the normalised singular values",
    )]
    fit = power_law(one.sigma, options.fit_low, options.fit_high)
    if fit is None:
        reason = f"fewer than three positive singular values from index {options.fit_low} on"
        metrics.append(Metric(f"alpha_{one.name}", None, n, reason=reason, about=f"{what}: exponent of the power law"))
    else:
        others = [power_law(half, fit.low, fit.high) for half in one.halves]
        alphas = [o.alpha for o in others if o is not None and o.high == fit.high]
        spread = around(fit.alpha, alphas, math.inf) if len(alphas) == len(others) else None
        metrics.append(Metric(
            f"alpha_{one.name}", fit.alpha, n, spread, None if spread else none if not others else
            "halves of the images do not reach the last index of the fit",
            about=f"{what}: exponent over indices {fit.low}-{fit.high}, R2 = {fit.r2:.3f}",
        ))
        if fit.r2 < 0.95:
            notes.append(f"{what}: no power law over indices {fit.low}-{fit.high} (R2 = {fit.r2:.2f}); alpha says little.")
    metrics.append(_condition(one, what, options))
    return metrics


def _condition(one: _Found, what: str, options: Options) -> Metric:
    n, d = one.shape
    name, about = f"condition_{one.name}", f"{what}: largest over smallest singular value"
    if n - options.centre < d:
        return Metric(name, None, n, reason=f"{n} images do not span {d} dimensions: the smallest is not known", about=about)
    if one.sigma[-1] == 0:
        return Metric(name, None, n, reason="the smallest singular value is 0 up to rounding", about=about)
    value = float(one.sigma[0] / one.sigma[-1])
    return Metric(name, value, n, reason="a ratio of extremes: no interval is valid for the smallest", about=about)


def _remarks(found: list[_Found], n: int) -> list[str]:
    notes = []
    for one in found:
        d = one.shape[1]
        zero = int((one.sigma == 0).sum())
        if not one.sigma[0] > 0:
            notes.append(f"{one.words}: the same for all images, up to rounding: collapsed to a point.")
        elif n <= d:
            notes.append(
                f"{one.layer}: {n} images span at most {n - 1} of {d} dimensions once centred. What lies beyond is not seen, "
                "and the tail falls because the images end: nothing can be said of the smallest singular values. Use more."
            )
        elif zero:
            notes.append(f"{one.words}: {zero} of {d} dimensions {'holds' if zero == 1 else 'hold'} nothing above rounding.")
    return notes


def _layers(found: list[_Found]) -> list[str]:
    return list(dict.fromkeys(one.layer for one in found))


def _table(layer: str, found: list[_Found]) -> Table:
    rows = [
        (one.data, k + 1, s, s / max(float(one.sigma[0]), 1e-300))
        for one in found for k, s in enumerate(one.sigma.tolist())
    ]
    names = ("data", "index", "singular_value", "relative")
    return Table(
        f"spectrum_{layer}", f"Singular values of {layer}", {key: [row[i] for row in rows] for i, key in enumerate(names)},
        "Over sqrt(n). relative: over the largest.",
    )


def _headline(found: list[_Found]) -> str:
    h = {one.data: effective(one.sigma) for one in found if one.layer == "h"}
    d = found[0].shape[1]
    text = f"h fills {h[PLAIN]:.3g} of {d} dimensions on plain images and {h[VIEWS]:.3g} on views (effective rank)"
    return text + (f"; untrained, {h[RANDOM + PLAIN]:.3g} and {h[RANDOM + VIEWS]:.3g}." if RANDOM + PLAIN in h else ".")
