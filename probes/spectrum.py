"""spectrum: log singular values of the features on plain images and on the training's views, beside the untrained encoder's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import checks, subject
from geomssl.probes.rank import around, effective_rank
from geomssl.progress import track
from geomssl.seeding import generator

BLOCK = 4096
PLAIN, VIEWS = "plain", "views"
RANDOM = "untrained, "


def feature_spectrum(features: Tensor, centre: bool = True, rows: Tensor | None = None) -> Tensor:
    """Singular values of features (n, d) over sqrt(n): min(n, d) numbers, largest first, float64.

        sigma_k = singular value k of (X - 1 mean') / sqrt(n),     centre=False: of X / sqrt(n)

    so that centred ones are standard deviations along the principal directions. rows: use only those rows. Beyond 4096 rows X
    is read block by block and folded into a triangle, R <- qr([R; block]), in float64: nothing is squared, so that small
    singular values keep the accuracy of an SVD (a Gram matrix would lose those under 1e-8 sigma_1, in float32 under 3e-4).
    Raises GeomsslError where X is no matrix or not finite.
    """
    if features.dim() != 2 or features.numel() == 0:
        raise GeomsslError(
            f"features of shape {tuple(features.shape)}", "a matrix with at least one entry", reason="bad-shape"
        )
    where = torch.arange(len(features)) if rows is None else rows
    blocks = where.split(BLOCK)

    def block(part: Tensor) -> Tensor:
        return checks.matrix(features[part], "features")

    mean = torch.zeros(features.shape[1], dtype=torch.float64)
    if centre:
        # about the first row, so that a large common offset costs no digits
        first = block(where[:1])[0]
        mean = first + sum(((block(part) - first).sum(dim=0) for part in blocks), mean) / len(where)
    triangle = block(blocks[0]) - mean
    for part in blocks[1:]:
        triangle = torch.linalg.qr(torch.cat([triangle, block(part) - mean]), mode="r").R
    return torch.linalg.svdvals(triangle) / math.sqrt(len(where))


@dataclass(frozen=True)
class PowerLaw:
    """lambda_k = c k^-alpha fitted between two indices (1-based, both included), with the share of variance explained."""

    alpha: float
    r2: float
    low: int
    high: int


def power_law(sigma: Tensor, low: int = 3, high: int | None = None) -> PowerLaw | None:
    """The exponent of the eigenvalues lambda_k = sigma_k^2 by least squares of log lambda_k on log k, low <= k <= high.

    high: half of the positive singular values when not given, and never more than there are: a finite sample bends the tail.
    None where fewer than three values are in range. Source: Agrawal et al. 2022 (alpha-ReQ); alpha near 1 is scale-free.
    """
    positive = int((sigma > 0).sum())
    last = min(positive, high if high is not None else max(low + 2, positive // 2))
    if last - low < 2:
        return None
    k = torch.arange(low, last + 1, dtype=torch.float64).log()
    y = 2 * sigma[low - 1 : last].double().log()
    x, centred = k - k.mean(), y - y.mean()
    slope = float((x * centred).sum() / x.square().sum())
    total = float(centred.square().sum())
    r2 = 1 - float((centred - slope * x).square().sum()) / total if total > 0 else 1.0
    return PowerLaw(-slope, r2, low, last)


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


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Singular values of h and z on plain images and on one view of each, and of the encoder before training."""
    subject.need(4, "a spectrum")
    indices = subject.choose(options)
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


def _one(features: Tensor, layer: str, data: str, options: Options) -> _Found:
    n, d = features.shape
    squares = sum(float(part.double().square().sum()) for part in features.split(BLOCK))
    floor = torch.finfo(features.dtype).eps * math.sqrt(squares / n)

    def cleaned(rows: Tensor | None) -> Tensor:
        sigma = feature_spectrum(features, options.centre, rows)
        return torch.where(sigma > floor, sigma, 0.0)

    draws = (
        torch.randperm(n, generator=generator(options.seed, "spectrum-halves", draw))[: n // 2]
        for draw in range(options.halves)
    )
    return _Found(layer, data, (n, d), cleaned(None), [cleaned(rows) for rows in draws])


def _metrics(one: _Found, options: Options, notes: list[str]) -> list[Metric]:
    """Effective rank, exponent with its fit, and condition number of one spectrum."""
    n, d = one.shape
    what = f"{one.layer} on {one.data} images" if one.data == PLAIN else f"{one.layer}, {one.data}"
    most = min(n - 1, d)
    rank = effective_rank(torch.diag(one.sigma))
    draws = [effective_rank(torch.diag(half)) for half in one.halves]
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
        spread = around(fit.alpha, alphas, 1_000_000) if len(alphas) == len(others) else None
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
        if n <= d:
            notes.append(
                f"{one.layer}: {n} images span at most {n - 1} of {d} dimensions once centred. What lies beyond is not seen, "
                "and the tail falls because the images end: nothing can be said of the smallest singular values. Use more."
            )
        elif not one.sigma[0] > 0:
            notes.append(f"{one.layer}, {one.data}: the same for all images, up to rounding: collapsed to a point.")
        elif zero:
            notes.append(f"{one.layer}, {one.data}: {zero} of {d} dimensions hold nothing above rounding.")
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
    h = {one.data: effective_rank(torch.diag(one.sigma)) for one in found if one.layer == "h"}
    d = found[0].shape[1]
    text = f"h fills {h[PLAIN]:.3g} of {d} dimensions on plain images and {h[VIEWS]:.3g} on views (effective rank)"
    return text + (f"; untrained, {h[RANDOM + PLAIN]:.3g} and {h[RANDOM + VIEWS]:.3g}." if RANDOM + PLAIN in h else ".")
