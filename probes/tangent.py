"""tangent: delta-h, the step from a view to the hardest negative, how much of it the projector can see, and whose it is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.probes import checks, subject
from geomssl.probes.assurance import METHOD, bootstrap_mean, bootstrap_ratio
from geomssl.probes.explained import (
    DRAWS,
    Explained,
    by_directions,
    chance,
    holding,
    leading,
    maps,
    principal_angles,
    threshold,
    unexplained_subspace,
    unexplained_variance,
)
from geomssl.probes.halves import around, halves
from geomssl.probes.negatives import nearest_negatives, silent
from geomssl.probes.neighbours import (
    RESAMPLED,
    Neighbours,
    chance_and_ceiling,
    distance_metric,
    distances,
    everywhere,
    histogram,
    in_batches,
    label_match,
    label_metrics,
    typical_distance,
)
from geomssl.probes.streaming import triangle

__all__ = [
    "chance_and_ceiling", "label_match", "nearest_negatives", "principal_angles", "probe", "unexplained_subspace",
    "unexplained_variance",
]

# Factors that are labels too, finer or coarser than the labels themselves.
OTHER_LABELS = ("coarse", "fine")


class Options(subject.Options):
    """Settings of the tangent probe."""

    batch: int | None = Field(
        None, ge=2, description="size of the random batches in which negatives are looked for as well, as in training  "
        "[default: the run's own, else 128]",
    )
    local: int = Field(256, ge=2, description="images at which the local affine map of a non-linear projector is taken")
    cutoff: float | None = Field(
        None, ge=0, lt=1, description="singular values up to this share of the largest count as zero; not given: max(d, p) eps"
    )
    energy: float = Field(0.9, gt=0, le=1, description="the subspace form is quoted for the directions that hold this share")
    halves: int = Field(20, ge=0, le=1000, description="random halves of the images for the spread of the subspace form")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Unexplained variance of delta-h, distances and labels of the nearest negatives, on two views of every image."""
    projector = subject.need_projector("tangent")
    subject.need(4, "nearest negatives")
    indices = subject.choose(options, least=4)
    notes: list[str] = []
    policy = subject.training_policy(notes)
    views = [(policy, options.seed, number) for number in (1, 2)]
    h1, h2 = (checks.varied(subject.features(indices, "h", view=view).flatten(1), "features h") for view in views)
    z1, z2 = (checks.varied(subject.features(indices, "z", view=view), "projector outputs") for view in views)
    both = torch.cat([h1, h2])
    found = [everywhere(z1, z2)]
    size = _batch(subject, options, len(indices), notes)
    if size is not None:
        found.append(in_batches(z1, z2, size, options.seed))
    deltas = [h2 - both[one.hardest] for one in found]

    seen, linear = maps(projector, h1, deltas, options.cutoff, options.local, options.seed, notes)
    main = seen[0][0]
    null = chance(deltas[0], main, options.seed)
    metrics = [
        _share_metric(m, i == 0, one, options.seed) for one, ms in zip(found, seen, strict=True) for i, m in enumerate(ms)
    ]
    metrics += [
        Metric(
            "unexplained_null", main.null, None,
            Interval(*null, f"central 95 % of {DRAWS} Gaussian W of the map's shape and rank"),
            about="share for directions that know nothing of delta-h, as many as the projector's map has: 1 - rank / d",
        ),
        _mean_metric("map_rank", main.ranks, options.seed, "rank of the projector's affine map", not linear),
    ]
    quoted = next((m for m in seen[0] if m.basis is not None), None)
    subspace, tables = _subspace(deltas[0], quoted, options)
    metrics += subspace
    unit = typical_distance(h1, h2)
    named = {f"h(1) to h*, {one.words}": distances(h1, both[one.hardest], unit) for one in found}
    for one, values in zip(found, named.values(), strict=True):
        about = f"mean distance in h from view 1 to its nearest negative, {one.words}"
        metrics.append(distance_metric(f"distance{one.suffix}", values, options.seed, about))
    named["h(1) to h(2)"] = distances(h1, h2, unit)
    metrics.append(
        distance_metric("distance_positive", named["h(1) to h(2)"], options.seed, "mean distance in h between both views")
    )
    matches = _label_metrics(subject, indices, found, options.seed, notes)
    metrics += matches
    notes += _remarks(main, null, linear, h1, h2, z1, named, options) + subject.projector_remarks()
    return Artifact(
        probe="tangent",
        title="What the projector sees of the steps between neighbours",
        headline=_headline(main, linear, matches),
        definition=(
            "delta_h_i = h_i(2) - h*_i, with h*_i the representation whose projection is most cosine-similar to z_i(1) "
            "among all views of other images, of the whole set or (_batch) of a random batch as in training. "
            "unexplained (energy form) = sum_i min_t ||delta_h_i - W t||^2 / sum_i ||delta_h_i||^2, "
            "where W spans what the projector can see: its weights where it is affine, else the transposed Jacobian at "
            "h_i(1). Least squares by a float64 singular value decomposition; singular values up to "
            f"{threshold(projector, main.shape, options.cutoff):.1e} of the largest count as zero. "
            "unexplained_subspace = mean of sin^2 of the principal angles between W and the leading directions of delta_h that "
            f"hold {options.energy:.0%} of its energy. distance = ||h_i(1) - h*_i|| / sqrt(2 tr Cov h). "
            "label match: the share of h*_i that carry the label of image i."
        ),
        metrics=metrics,
        tables=[_curve(seen[0]), *tables, histogram(named), _pairs(subject, indices, found, z1, z2, named)],
        figures=_figures(bool(tables)),
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _batch(subject: subject.Subject, options: Options, n: int, notes: list[str]) -> int | None:
    """The size of the batches, or None where the whole set is one."""
    size = int(options.batch or subject.trained.get("batch_size") or 128)
    if size >= n:
        notes.append(f"A batch of {size} holds all {n} images: negatives in batches are those of the whole set.")
        return None
    if options.batch is None and not subject.trained.get("batch_size"):
        notes.append("The batch size of the training is not known: batches of 128.")
    return size


def _share_metric(found: Explained, first: bool, neighbours: Neighbours, seed: int) -> Metric:
    low, high = bootstrap_ratio(found.left[:, None], found.total[:, None], seed)
    ends = (float(low[0]) ** 2, float(high[0]) ** 2)
    known = math.isfinite(ends[0]) and math.isfinite(ends[1])
    return Metric(
        f"unexplained{'' if first else '_first_layer'}{neighbours.suffix}", found.share, len(found.left),
        Interval(*ends, f"{METHOD}, weights and negatives held fixed, 95 %") if known else None,
        None if known else "a resample may hold no delta-h but zero",
        about=f"share of the variance of delta-h outside the {found.name}, negatives {neighbours.words}",
    )


def _mean_metric(name: str, values: Tensor, seed: int, about: str, per_image: bool) -> Metric:
    if not per_image:
        return Metric(name, float(values.mean()), reason="a property of the weights, not of a sample", about=about)
    low, high = bootstrap_mean(values, seed)
    interval = Interval(float(low), float(high), f"{RESAMPLED}, 95 %")
    return Metric(name, float(values.mean()), len(values), interval, about=f"mean over images: {about} at h(1)")


def _subspace(delta_h: Tensor, found: Explained | None, options: Options) -> tuple[list[Metric], list[Table]]:
    """The subspace form at the directions that hold the asked energy, its curve over all, and the angles there."""
    name, about = "unexplained_subspace", "mean sin^2 of the principal angles between delta-h's leading directions and "
    if found is None or found.basis is None:
        reason = "no one W: the projector is not affine, and no first linear layer lets all of h pass"
        return [Metric(name, None, len(delta_h), reason=reason, about=about + "W")], []
    basis = found.basis
    own, energies = leading(triangle(delta_h).factor(centre=False))
    curve = by_directions(own, basis)
    k = holding(energies, options.energy)
    value = float(curve[k - 1])
    drawn = []
    for half in halves(delta_h, options.halves, options.seed, "tangent-halves"):
        part, held = leading(half.factor(centre=False))
        drawn.append(float(by_directions(part, basis)[holding(held, options.energy) - 1]))
    spread = around(value, drawn, 1.0)
    d, r = basis.shape
    metrics = [
        Metric(
            name, value, len(delta_h), spread, None if spread else "no spread: no halves asked for",
            about=f"{about}the {found.name}, at {k} directions",
        ),
        Metric(
            "delta_h_directions", float(k), len(delta_h), reason=f"a count at a share of the energy ({options.energy:.0%})",
            unit="dimensions", about=f"leading directions of delta-h that hold {options.energy:.0%} of its energy",
        ),
    ]
    angles = torch.rad2deg(principal_angles(own[:, :k], basis)).tolist() + [90.0] * max(0, k - r)
    held_share = (energies.cumsum(0) / energies.sum()).tolist()
    count = len(curve)
    return metrics, [
        Table(
            "subspace", "Unexplained share of the leading directions of delta-h, each counted once",
            {
                "map": [found.name] * count + ["random directions"] * count,
                "directions": [*range(1, count + 1)] * 2,
                "unexplained": [*curve.tolist(), *([1 - r / d] * count)],
                "energy": held_share * 2,
            },
            "directions: of delta-h, leading by singular value. energy: the share of delta-h that they hold.",
        ),
        Table(
            "angles", f"Principal angles between {k} leading directions of delta-h and the {found.name}",
            {"index": list(range(1, k + 1)), "degrees": angles},
            "90 where the map has fewer directions than delta-h.",
        ),
    ]


def _label_metrics(
    subject: subject.Subject, indices: Tensor, found: list[Neighbours], seed: int, notes: list[str]
) -> list[Metric]:
    kinds = {} if subject.source.labels is None else {"": subject.source.labels}
    kinds |= {name: subject.source.factors[name] for name in OTHER_LABELS if name in subject.source.factors}
    metrics = [
        metric for kind, labels in kinds.items() for one in found
        for metric in label_metrics(labels.cpu()[indices], kind, one, seed)
    ]
    if subject.source.labels is None:
        notes.append(f"{subject.source.name} has no labels: label match is left out.")
        metrics.append(Metric("label_match", None, reason=f"{subject.source.name} has no labels"))
    return metrics


def _remarks(
    main: Explained, null: tuple[float, float], linear: bool, h1: Tensor, h2: Tensor, z1: Tensor, named: dict[str, Tensor],
    options: Options,
) -> list[str]:
    (n, d), notes = h1.shape, []
    if main.null < 1e-9:
        notes.append(
            f"The map has rank {d}, the width of h: nothing can lie outside it, and unexplained is 0 by construction."
        )
    elif main.share > null[1]:
        notes.append("The projector explains less of delta-h than nearly all random directions would.")
    elif main.share > null[0]:
        notes.append("The projector explains no more of delta-h than random directions may.")
    if not linear:
        notes.append(
            "The projector is not affine: unexplained is that of the local affine map at each h(1). It describes a "
            "neighbourhood, and delta-h may reach beyond it. The share of the first layer, where given, holds everywhere: "
            "what lies outside its columns never gets in."
        )
    if n <= d:
        notes.append(
            f"{n} images for {d} dimensions: the span of delta-h is known only in part. The energy form still holds for these "
            "images; the directions of delta-h are at most as many as images."
        )
    twins = int((next(iter(named.values())) == 0).sum())
    if twins:
        notes.append(
            f"Nearest negatives with exactly the features of their anchor, at distance 0: {twins} of {n} (duplicates, or views "
            "that show nothing)."
        )
    same = int((h1 == h2).all(dim=1).sum())
    if same == n:
        notes.append("Both views of every image have the same features: delta-h is h(1) - h*.")
    return notes + checks.zeros(h1, "h(1)") + silent(z1, "z(1)")


def _headline(main: Explained, linear: bool, matches: list[Metric]) -> str:
    text = (
        f"{main.share:.1%} of the variance of delta-h lies outside what the projector "
        f"{'sees' if linear else 'sees around each image'} (random directions: {main.null:.1%})"
    )
    value = {m.name: float(m.value) for m in matches if m.value is not None}
    if "label_match" not in value:
        return text + "."
    return text + (
        f"; {value['label_match']:.1%} of the nearest negatives share the label of their anchor "
        f"(chance {value['label_match_chance']:.1%})."
    )


def _curve(found: list[Explained]) -> Table:
    rows = [(m.name, k, share) for m in found for k, share in enumerate(m.curve)]
    d = found[0].shape[0]
    rows += [("random directions", k, 1 - k / d) for k in range(max(len(m.curve) for m in found))]
    return Table(
        "curve", "Unexplained share by the number of leading directions of the map",
        {"map": [r[0] for r in rows], "directions": [r[1] for r in rows], "unexplained": [r[2] for r in rows]},
        "Leading: by singular value of the map. At the last row of a map all are in. Negatives over the whole set.",
    )


def _pairs(
    subject: subject.Subject, indices: Tensor, found: list[Neighbours], z1: Tensor, z2: Tensor, named: dict[str, Tensor]
) -> Table:
    n = len(indices)
    a, b = F.normalize(z1, dim=1), F.normalize(torch.cat([z1, z2]), dim=1)
    labels = None if subject.source.labels is None else subject.source.labels.cpu()[indices]
    columns: dict[str, list[int | float]] = {"index": indices.tolist()}
    for one, values in zip(found, named.values(), strict=False):
        columns |= {
            f"nearest{one.suffix}": indices[one.hardest % n].tolist(),
            f"view{one.suffix}": (one.hardest // n + 1).tolist(),
            f"similarity{one.suffix}": (a * b[one.hardest]).sum(dim=1).tolist(),
            f"distance{one.suffix}": values.tolist(),
        }
        if labels is not None:
            columns[f"label_of_nearest{one.suffix}"] = labels[one.hardest % n].tolist()
    columns["positive_similarity"] = (a * b[n:]).sum(dim=1).tolist()
    if labels is not None:
        columns["label"] = labels.tolist()
    return Table(
        "pairs", "Every image and its nearest negatives", columns,
        "nearest, view: image and view of the nearest negative of view 1, over the whole set or (_batch) in its batch. "
        "similarity: cosine in the projector's output. distance: in h, over the typical distance.",
    )


def _figures(subspace: bool) -> list[Figure]:
    figures = [
        Figure(
            "unexplained", "line", "Variance of delta-h left unexplained",
            "By the leading directions of the projector's map. Random directions fall along the straight line 1 - k / d.",
            "curve", "directions", "unexplained", "map", x_label="leading directions of the map", y_label="unexplained share",
        ),
        Figure(
            "distances", "line", "Distance to the nearest negative, in h",
            "Over the typical distance of two views drawn at random, so that 1 is an image like any other.",
            "distances", "distance", "share", "pair", x_label="distance / typical distance", y_label="share of images",
        ),
    ]
    if subspace:
        figures.insert(1, Figure(
            "subspace", "line", "Leading directions of delta-h left unexplained, each counted once",
            "Low at the left: the projector sees the directions along which most of delta-h lies. Random directions: level.",
            "subspace", "directions", "unexplained", "map", x_label="leading directions of delta-h",
            y_label="mean sin² of the principal angles",
        ))
    return figures
