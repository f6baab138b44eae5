"""action: does some affine action of the transform on the features exist, fitted and not declared, and which one is it?"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import subject
from geomssl.probes.assurance import METHOD
from geomssl.probes.elements import doing, elements, labels, spoken
from geomssl.probes.fitted import (
    FittedAction,
    FittedActions,
    Fitter,
    Method,
    Orbit,
    agreement,
    fit_action,
    fit_orbit,
    group_law,
    matrix_of,
    permutation_distance,
)
from geomssl.probes.irreps import Part, decompose, irreps
from geomssl.probes.layers import declare, read
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Group, Transform

__all__ = ["FittedAction", "FittedActions", "Options", "fit_action", "probe"]

# A held-out R² whose lower limit is above this reads as "yes"; a distance under NEAR reads as "the same".
CLOSE, NEAR = 0.99, 0.05
WIDEST = 4096


class Options(subject.Options):
    """Settings of the action probe."""

    n: int | None = Field(1000, description="images to use")
    transform: str = Field("c4", description='the transform: c4, d4, flips, translations, "rotate(±30)", a policy, ...')
    layer: str = Field("fibres", description="which features: fibres, the vector h, projections z, or the name of a layer")
    space: Literal["mean", "keep"] = Field(
        "mean", description="maps: average over places, so that channels and orientations remain, or keep every place"
    )
    method: Method = Field("low-rank", description="low-rank least squares, or the best map that keeps lengths")
    rank: int | None = Field(None, ge=1, description="directions to use  [default: chosen within the training pairs]")
    ridge: float = Field(0.0, ge=0, description="shrinkage in units of the features' mean variance")
    held_out: float = Field(0.5, gt=0, lt=1, description="share of the images on which the fit is judged")
    nulls: int = Field(5, ge=1, le=1000, description="draws of the shuffled null")
    draws: int = Field(8, ge=1, le=1024, description="elements to draw where there are more, or infinitely many")
    level: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    resamples: int = Field(2000, ge=100, le=100_000, description="bootstrap resamples")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Fit one affine action for every element of a transform, judge it on held-out images, and say which action it is."""
    subject.need(8, "a fitted action")
    size = (subject.source.size,) * 2
    transform, grid = spoken(options.transform)
    params = elements(transform, size, options.draws, options.seed) if grid is None else grid
    names = labels(transform, params)
    clean, moved, shape, held_to = _features(subject, options, transform, params)
    fitter = Fitter(clean, options.held_out, options.seed, options.nulls, options.level, options.resamples)
    fits = [fitter.fit(one, options.method, options.rank, options.ridge) for one in moved]
    declared, wanted = held_to.name, [matrix_of(held_to, row[None].double(), shape, size) for row in params]
    rows: dict[str, list[Any]] = {
        "element": names, "r2_held_out": [f.r2_held_out for f in fits], "low": [_plain(f.interval.low) for f in fits],
        "high": [_plain(f.interval.high) for f in fits], "r2_train": [f.r2_train for f in fits],
        "r2_identity": [f.r2_identity for f in fits], "r2_null": [f.r2_null for f in fits],
        "null_most": [max(f.nulls) for f in fits], "rank": [f.rank for f in fits],
        "effective_rank": [f.effective_rank for f in fits],
        "offset": [_offset(f, one) for f, one in zip(fits, moved, strict=True)],
        "permutation": [permutation_distance(f)[0] if f.rank else None for f in fits],
        "agreement": [agreement(f, one) if f.rank else None for f, one in zip(fits, wanted, strict=True)],
    }
    tables = [
        Table(
            "elements", "The fitted action of every element", rows,
            "permutation: distance to the nearest permutation. agreement: distance to the declared action. Both are relative, "
            "on the span of the features; maps that have nothing in common are about 1.4 apart. offset: its length over "
            "the features' spread.",
        ),
        _bars(rows), _spectrum(names, fits),
    ]
    orbit, law, parts = _group(transform, fitter, clean, moved)
    if law is not None and isinstance(transform, Group):
        tables += [_law(transform, law), _irreps(parts)] if parts else [_law(transform, law)]
    return Artifact(
        probe="action",
        title=f"Fitted action of {transform.name}",
        headline=_headline(rows, transform, options.layer, declared, law),
        definition=(
            "For each element g, the affine map M_g f(x) + b_g nearest to f(T_g x), fitted on a part of the images and judged "
            "on the rest: R² = 1 − Σ‖f(T_g x) − M_g f(x) − b_g‖² / Σ‖f(T_g x) − mean‖². Beside it: the R² of the identity with "
            "a fitted offset, and of the same fit on shuffled pairs. Group law: ‖(M_g M_h − M_gh)B‖ / ‖M_gh B‖, B a basis of "
            "the features' span. Irreps: P = dim / Σχ² · Σ_g χ(g) M_g, multiplicity = trace(P) / dim."
        ),
        metrics=_metrics(rows, fits, law, parts, options),
        tables=tables,
        figures=_figures(options),
        notes=_notes(subject, options, transform, fits, declared, orbit, shape),
        options=options.model_dump(mode="json"),
        provenance={**subject.provenance, "action": declared},
    )


def _features(
    subject: subject.Subject, options: Options, transform: Transform, params: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...], Action]:
    """f(x) (n, d), f(T_g x) (E, n, d), the shape of one image's features before they were flattened, and the action that
    such features would be held to.
    """
    projector = subject.need_projector("features z") if options.layer == "z" else None
    indices = subject.choose(options)
    reader, _ = read(subject.encoder, ["h" if projector is not None else options.layer], subject.images(indices[:1]))
    layer = reader.layers[0]
    averages = layer.maps and options.space == "mean"

    def f(images: Tensor) -> Tensor:
        found = reader.features(images)[0]
        if projector is not None:
            return projector(found)
        return found.mean(dim=(-2, -1), keepdim=True) if averages else found

    with torch.no_grad():
        shape = tuple(f(subject.images(indices[:1])).shape[1:])
        if math.prod(shape) > WIDEST:
            raise GeomsslError(
                f"features of {math.prod(shape)} numbers, {shape}", f"at most {WIDEST}: --space mean, or layer h",
                reason="too-wide",
            )
        clean, moved = [], []
        for _, images in subject.batches(indices, "fitted action"):
            clean.append(f(images).flatten(1).cpu())
            rows = params.to(images.device)
            moved.append(torch.stack([f(transform(images, g.expand(len(images), -1))).flatten(1).cpu() for g in rows]))
    held_to, _ = declare("auto", transform, replace(layer, shape=shape), getattr(subject.encoder, "group", None))
    return torch.cat(clean), torch.cat(moved, dim=1), shape, held_to


def _offset(fit: FittedAction, moved: Tensor) -> float:
    values = moved.double()
    spread = (values - values.mean(dim=0)).square().sum(dim=1).mean().sqrt()
    return float(torch.linalg.vector_norm(fit.offset) / spread)


def _group(
    transform: Transform, fitter: Fitter, clean: Tensor, moved: Tensor
) -> tuple[Orbit | None, Tensor | None, list[Part]]:
    """For a finite group: the fits on orbits of the training images, their law (2, |G|, |G|), and what held-out images show
    of each irrep. Nothing where there are too few rows to judge by.
    """
    if not isinstance(transform, Group) or transform.order is None:
        return None, None, []
    every = transform.elements()
    products = torch.stack([transform.compose(g.expand(len(every), 1), every)[:, 0] for g in every]).long()
    features = torch.cat([clean[None], moved])
    orbit = fit_orbit(features[:, fitter.train], products)
    if not orbit.judgeable:
        return orbit, None, []
    law = torch.stack([group_law(m, products, orbit.basis) for m in (orbit.least_squares, orbit.procrustes())])
    held = features[:, fitter.held].double() - orbit.mean
    targets = torch.stack([held[products[g]].flatten(0, 1) for g in range(len(every))])
    residuals = targets - held.flatten(0, 1) @ orbit.least_squares.transpose(1, 2)
    return orbit, law, decompose(orbit.least_squares, irreps(transform), held.flatten(0, 1), targets, residuals)


def _bars(rows: dict[str, list[Any]]) -> Table:
    found = [
        (name, label, rows[key][i], rows["low"][i] if key == "r2_held_out" else None,
         rows["high"][i] if key == "r2_held_out" else None)
        for i, name in enumerate(rows["element"])
        for key, label in (("r2_held_out", "fitted"), ("r2_identity", "identity"), ("r2_null", "shuffled pairs"))
    ]
    columns = ("element", "map", "r2", "low", "high")
    return Table("r2", "Held-out R²", {k: [row[i] for row in found] for i, k in enumerate(columns)})


def _spectrum(names: list[str], fits: list[FittedAction]) -> Table:
    found = [
        (name, k + 1, value) for name, fit in zip(names, fits, strict=True)
        for k, value in enumerate(torch.linalg.svdvals(fit.matrix @ fit.basis).tolist() if fit.rank else [0.0])
    ]
    columns = ("element", "index", "singular_value")
    return Table(
        "spectrum", "Singular values of the fitted matrices", {k: [row[i] for row in found] for i, k in enumerate(columns)},
        "1 for a map that keeps lengths; under 1 for directions that the transform destroys or that cannot be predicted.",
    )


def _law(transform: Group, law: Tensor) -> Table:
    every = transform.elements()
    names = labels(transform, every)
    pairs = [(g, h) for g in range(len(every)) for h in range(len(every))]
    product = [int(transform.compose(every[g : g + 1], every[h : h + 1])[0, 0]) for g, h in pairs]
    return Table(
        "law", "Group law",
        {
            "g": [names[g] for g, _ in pairs], "h": [names[h] for _, h in pairs], "gh": [names[k] for k in product],
            "least_squares": law[0].flatten().tolist(), "procrustes": law[1].flatten().tolist(),
        },
        "‖(M_g M_h − M_gh)B‖ / ‖M_gh B‖ of fits without shrinkage on orbits; gh means first h, then g.",
    )


def _irreps(parts: list[Part]) -> Table:
    return Table(
        "irreps", "What the features hold of each irreducible representation",
        {
            "irrep": [p.irrep.name for p in parts], "dimension": [p.irrep.dimension for p in parts],
            **{
                key: [_plain(getattr(p, key)) for p in parts]
                for key in ("multiplicity", "residual", "idempotence", "variance", "error")
            },
        },
        "residual: distance of the multiplicity from a whole number. idempotence: ‖PP − P‖ / ‖P‖. variance: share of the "
        "held-out orbits' variance. error: root of the share that the fit leaves unexplained there.",
    )


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _metrics(
    rows: dict[str, list[Any]], fits: list[FittedAction], law: Tensor | None, parts: list[Part], options: Options
) -> list[Metric]:
    worst = min(range(len(fits)), key=lambda i: fits[i].r2_held_out)
    fit, beside = fits[worst], "stands beside the held-out R² for comparison"
    n_held, no_interval = fit.n - fit.n_train, "a fit on resampled images would repeat rows; compare seeds"
    low, high = fit.interval

    def single(name: str, value: float | None, reason: str, about: str, n: int | None = None, missing: str = "") -> Metric:
        return Metric(name, value, n=n, reason=missing if value is None and missing else reason, about=about)

    def most(key: str) -> float | None:
        return max((v for v in rows[key] if v is not None), default=None)

    nothing = "no direction helps, so that the fitted matrix is zero"
    few = "no finite group, or too few images against the features' rank"
    return [
        Metric(
            "r2_held_out", fit.r2_held_out, n=n_held,
            interval=Interval(low, high, f"{METHOD}, {options.level:.0%}, of the held-out images at that element, the fit held")
            if math.isfinite(low + high) else None,
            reason=None if math.isfinite(low + high) else "too few held-out images that differ", better="higher",
            about="held-out R² of the fitted action at the worst element",
        ),
        single("r2_identity", fit.r2_identity, beside, "held-out R² of the identity with a fitted offset there", n_held),
        single("r2_null", fit.r2_null, beside, f"R² of the same fit on shuffled pairs, mean of {len(fit.nulls)}", n_held),
        single("r2_train", fit.r2_train, beside, "R² on the pairs that the fit has seen", fit.n_train),
        single("rank", float(fit.rank), "chosen or given, not estimated", "directions that the fit uses there", fit.n_train),
        single("effective_rank", fit.effective_rank, no_interval, "directions that the fitted matrix carries on", fit.n_train),
        *(
            single(key, most(key), no_interval, f"largest distance to the {of}", fit.n_train, nothing)
            for key, of in (("permutation", "nearest permutation"), ("agreement", "declared action"))
        ),
        single(
            "group_law", None if law is None else float(law[0].max()), no_interval,
            "largest violation of M_g M_h = M_gh by least squares on orbits", fit.n_train, few,
        ),
        single(
            "multiplicity_residual", max((p.residual for p in parts), default=None), no_interval,
            "largest distance of a multiplicity from a whole number", fit.n_train, few,
        ),
    ]


def _headline(
    rows: dict[str, list[Any]], transform: Transform, layer: str, declared: str, law: Tensor | None
) -> str:
    worst = min(range(len(rows["element"])), key=lambda i: rows["r2_held_out"][i])
    r2, low, identity, null = (rows[key][worst] for key in ("r2_held_out", "low", "r2_identity", "null_most"))
    features = {"fibres": "fibres", "h": "vectors h", "z": "projections z"}.get(layer, f"features of {layer}")
    found = f"{r2:.4g} of the variance at {rows['element'][worst]}, the worst element (identity {identity:.2g})"
    low = -math.inf if low is None else low
    if not low > max(0.0, null):
        return f"{doing(transform)}: no affine action on the {features} was found: held out, the fit explains {found}."
    said = "an affine action on the {} exists" if low > CLOSE else "an affine action explains the {} only in part"
    which = max(v for v in rows["agreement"] if v is not None)
    same = f"it is {'' if which < NEAR else 'not '}the declared {declared} one (relative distance {which:.2g})"
    if law is not None and float(law[0].max()) > NEAR:
        same += f"; its matrices are no representation (they miss the group law by {float(law[0].max()):.2g})"
    return f"{doing(transform)}: {said.format(features)}: held out, it explains {found}; {same}."


def _notes(
    subject: subject.Subject, options: Options, transform: Transform, fits: list[FittedAction], declared: str,
    orbit: Orbit | None, shape: tuple[int, ...],
) -> list[str]:
    size = (subject.source.size,) * 2
    worst = min(fits, key=lambda f: f.r2_held_out)
    notes = [fits[0].warning] if fits[0].warning else []
    if len(shape) > 1:
        kept = "averaged over places" if options.space == "mean" else "with every place kept"
        notes.append(f"Maps {shape}, {kept} and flattened to d = {fits[0].d}; the declared action of these is {declared}.")
    if worst.r2_identity > worst.r2_held_out - 0.01 and worst.r2_held_out > 0.5:
        notes.append("The identity explains as much: the features hardly move, and an action exists trivially.")
    if options.method == "low-rank" and options.rank is None:
        notes.append("The number of directions was chosen on a fifth of the training pairs; no held-out image took part in it.")
    if options.ridge:
        notes.append("A ridge shrinks the matrices: the distances to permutations and to the declared action include that.")
    if orbit is not None and not orbit.judgeable:
        notes.append(
            f"No group law and no irreps: {orbit.rows} rows against {orbit.basis.shape[1]} directions; with fewer than 4 to 1 "
            "any network would meet the law."
        )
    elif orbit is not None:
        notes.append("Group law and irreps come from fits on whole orbits of the training images, without shrinkage.")
        if isinstance(transform, Group) and not bool(transform.is_exact(transform.elements(), size).all()):
            notes.append(f"{transform.name} resamples here, so that T_g T_h is not quite T_gh, and the law includes that.")
    notes.append("An affine map that exists says nothing of what is declared; judge a declaration with the probe equivariance.")
    return notes + (subject.projector_remarks() if options.layer == "z" else [])


def _figures(options: Options) -> list[Figure]:
    return [
        Figure(
            "r2", "bar", "Held-out R² of the fitted action",
            f"With its {options.level:.0%} interval, beside the identity's and that of shuffled pairs.", "r2", "element", "r2",
            "map", "low", "high", x_label="element", y_label="held-out R²",
        ),
        Figure(
            "spectrum", "line", "Singular values of the fitted matrices", "A map that keeps lengths has all of them at 1.",
            "spectrum", "index", "singular_value", "element", x_label="index", y_label="singular value",
        ),
    ]
