"""tangent: delta-h, the step from a view to the hardest negative, how much of it the projector can see, and whose it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import affine, checks, subject
from geomssl.probes.assurance import bootstrap_mean, bootstrap_ratio
from geomssl.probes.negatives import nearest_negatives
from geomssl.progress import track
from geomssl.seeding import generator

RESAMPLED = "percentile bootstrap over images"


def unexplained_variance(delta_h: Tensor, weight: Tensor, cutoff: float | None = None) -> float:
    """The share of the variance of span{delta_h} that the columns of W do not explain, between 0 and 1.

        sum_i min over t_i of ||delta_h_i - W t_i||^2 / sum_i ||delta_h_i||^2

    delta_h: (N, d). weight: W (d, p), that is `Linear.weight.T`: torch stores the transpose of the papers' W.
    cutoff: singular values of W up to cutoff sigma_1 count as zero; max(d, p) eps of the dtype of `weight` when not given,
    since smaller ones are rounding. Least squares by a float64 SVD. Where W has rank d the result is 0 by construction;
    for a W that knows nothing of delta_h it is 1 - rank / d on average. Raises GeomsslError for shapes that do not fit and
    for delta_h all zero. Source: Cosentino et al. 2022, Eq. 10.
    """
    left, total = _residual_energy(delta_h, affine.column_space(weight, cutoff))
    return float(left.sum() / total.sum())


def label_match(labels: Tensor, indices: Tensor) -> float:
    """The share of anchors i whose nearest negative indices[i], an index into cat([z1, z2]), has the label of i.

    labels: (N,), indices: (N,) in 0..2N-1. Source: Cosentino et al. 2022, Fig. 6.
    """
    return float(_matches(labels, indices).mean())


def _residual_energy(delta_h: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Per image (N,), float64: the energy of delta_h outside the basis, and the whole energy."""
    exact = checks.matrix(delta_h, "delta-h")
    if exact.shape[1] != basis.shape[0]:
        raise GeomsslError(
            f"delta-h of width {exact.shape[1]} and a weight of {basis.shape[0]} rows",
            "a weight (d, p) with d the width of delta-h: Linear.weight.T", reason="bad-shape",
        )
    total = _energy(exact)
    return (exact - (exact @ basis) @ basis.T).square().sum(dim=1), total


def _energy(delta_h: Tensor) -> Tensor:
    """||delta_h_i||^2 per image (N,); GeomsslError where all of it is zero."""
    total = delta_h.square().sum(dim=1)
    if not total.sum() > 0:
        raise GeomsslError("delta-h of zero for every image", "views that differ from their negatives", reason="degenerate")
    return total


def _matches(labels: Tensor, indices: Tensor) -> Tensor:
    labels, indices = labels.cpu(), indices.cpu()
    if labels.shape != indices.shape or labels.dim() != 1:
        raise GeomsslError(
            f"{tuple(labels.shape)} labels and {tuple(indices.shape)} indices", "two vectors (N,)", reason="bad-shape"
        )
    if len(labels) and not 0 <= int(indices.min()) <= int(indices.max()) < 2 * len(labels):
        raise GeomsslError("an index outside cat([z1, z2])", f"0 to {2 * len(labels) - 1}", reason="bad-value")
    return (labels == labels[indices % len(labels)]).double()


class Options(subject.Options):
    """Settings of the tangent probe."""

    batch: int | None = Field(
        None, ge=2, description="look for negatives in random batches of this size, as in training; not given: in the whole set"
    )
    local: int = Field(256, ge=2, description="images at which the local affine map of a non-linear projector is taken")
    cutoff: float | None = Field(
        None, ge=0, lt=1, description="singular values up to this share of the largest count as zero; not given: max(d, p) eps"
    )


@dataclass(frozen=True)
class Explained:
    """What one map of the projector leaves unexplained of delta-h.

    left, total: energies per image (n,). curve[k]: the unexplained share after its k leading directions.
    null: the expected share for directions that know nothing of delta-h. ranks: of the map, per image or one.
    """

    name: str
    left: Tensor
    total: Tensor
    curve: list[float]
    null: float
    ranks: Tensor
    shape: tuple[int, int]

    @property
    def share(self) -> float:
        return float(self.left.sum() / self.total.sum())


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Unexplained variance of delta-h and label match of the nearest negatives, on two views of every image."""
    projector = subject.need_projector("tangent")
    subject.need(4, "nearest negatives")
    indices = subject.choose(options)
    notes: list[str] = []
    policy = subject.training_policy(notes)
    views = [(policy, options.seed, number) for number in (1, 2)]
    h1, h2 = (subject.features(indices, "h", view=view) for view in views)
    z1, z2 = (checks.varied(subject.features(indices, "z", view=view), "projector outputs") for view in views)
    groups = _groups(len(indices), options)
    hardest = _in_groups(z1, z2, groups)
    delta_h = checks.matrix(h2, "features h") - torch.cat([h1, h2]).double()[hardest]

    maps, linear = _maps(projector, h1, delta_h, options, notes)
    main = maps[0]
    random = _random_share(delta_h, main, options)
    metrics = [_share_metric("unexplained" if m is main else "unexplained_first_layer", m, options.seed) for m in maps]
    metrics += [
        Metric(
            "unexplained_null", main.null, reason="a closed form: 1 - rank / d",
            about="expected share for random directions, as many as the projector's map has",
        ),
        Metric("unexplained_random_draw", random, reason="one seeded draw", about="share for a Gaussian W of the same shape"),
        _mean_metric("map_rank", main.ranks, options.seed, "rank of the projector's affine map", not linear),
    ]
    labels = _labels(subject, indices, notes)
    matches = None if labels is None else _label_metrics(labels, hardest, groups, options.seed)
    metrics += matches or [Metric("label_match", None, reason=f"{subject.source.name} has no labels")]
    notes += _remarks(subject, main, linear, h1, z1, options) + subject.projector_remarks()
    return Artifact(
        probe="tangent",
        title="What the projector sees of the steps between neighbours",
        headline=_headline(main, linear, matches),
        definition=(
            "delta_h_i = h_i(2) - h*_i, with h*_i the representation whose projection is most cosine-similar to z_i(1) "
            "among all views of other images. unexplained = sum_i min_t ||delta_h_i - W t||^2 / sum_i ||delta_h_i||^2, "
            "where W spans what the projector can see: its weights where it is affine, else the transposed Jacobian at "
            "h_i(1). Least squares by a float64 singular value decomposition; singular values up to "
            f"{_cutoff(projector, main.shape, options):.1e} of the largest count as zero. "
            "label match: the share of h*_i that carry the label of image i."
        ),
        metrics=metrics,
        tables=[_curve(maps), _pairs(indices, hardest, z1, z2, labels)],
        figures=[
            Figure(
                "unexplained", "line", "Variance of delta-h left unexplained",
                "By the leading directions of the projector's map. Random directions fall along the straight line 1 - k / d.",
                "curve", "directions", "unexplained", "map", x_label="leading directions", y_label="unexplained share",
            )
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _groups(n: int, options: Options) -> list[Tensor]:
    """Indices of the images that are each other's negatives: all of them, or a seeded partition into batches."""
    if options.batch is None or options.batch >= n:
        return [torch.arange(n)]
    parts = list(torch.randperm(n, generator=generator(options.seed, "tangent-batches")).split(options.batch))
    if len(parts[-1]) < 2:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


def _in_groups(z1: Tensor, z2: Tensor, groups: list[Tensor]) -> Tensor:
    """nearest_negatives within every group, as indices into cat([z1, z2]) of the whole."""
    n = len(z1)
    hardest = torch.empty(n, dtype=torch.long)
    for group in track(groups, "nearest negatives"):
        found = nearest_negatives(z1[group], z2[group])
        hardest[group] = group[found % len(group)] + n * (found >= len(group))
    return hardest


def _maps(
    projector: nn.Module, h1: Tensor, delta_h: Tensor, options: Options, notes: list[str]
) -> tuple[list[Explained], bool]:
    """The projector's affine map (global or at each sample) first; then the gate before a non-linear one, where it has one."""
    # in double: whether a map is affine, and its rank, are decided on differences
    exact = copy.deepcopy(projector).cpu().double().eval()
    h = h1.double()
    if affine.is_affine(exact, h):
        weight = affine.jacobians(exact, h[:1])[0].T
        return [_global("projector", weight, delta_h, _cutoff(projector, tuple(weight.shape), options))], True
    chosen = torch.randperm(len(h), generator=generator(options.seed, "tangent-local"))[: options.local].sort().values
    if len(chosen) < len(h):
        notes.append(f"The local affine map is taken at {len(chosen)} of {len(h)} images.")
    maps = [_local(projector, exact, h[chosen], delta_h[chosen], options)]
    first = affine.gate(exact, h)
    if first is None:
        notes.append("No first linear layer through which all of h must pass: only the local map is measured.")
    else:
        maps.append(_global("first layer", first, delta_h, _cutoff(projector, tuple(first.shape), options)))
    return maps, False


def _cutoff(projector: nn.Module, shape: tuple[int, ...], options: Options) -> float:
    stored = next((p.dtype for p in projector.parameters() if p.is_floating_point()), torch.float32)
    return options.cutoff if options.cutoff is not None else max(shape) * torch.finfo(stored).eps


def _global(name: str, weight: Tensor, delta_h: Tensor, cutoff: float) -> Explained:
    """One W for every image."""
    basis = affine.column_space(weight, cutoff)
    left, total = _residual_energy(delta_h, basis)
    d, r = basis.shape
    captured = ((delta_h @ basis).square().sum(dim=0) / total.sum()).cumsum(0)
    curve = [1.0, *(1 - captured).clamp(0, 1).tolist()]
    return Explained(name, left, total, curve, 1 - r / d, torch.tensor([float(r)]), (d, weight.shape[1]))


def _local(projector: nn.Module, exact: nn.Module, h: Tensor, delta_h: Tensor, options: Options) -> Explained:
    """The transposed Jacobian at each h(1)_i in the place of W; energies summed, so that long delta-h weigh more."""
    lefts, ranks, captured = [], [], []
    shape = (0, 0)
    for rows in track(torch.arange(len(h)).split(32), "local maps", total=-(-len(h) // 32)):
        jacobians = affine.jacobians(exact, h[rows])
        shape = (jacobians.shape[2], jacobians.shape[1])
        _, sigma, right = torch.linalg.svd(jacobians, full_matrices=False)
        kept = (sigma > _cutoff(projector, shape, options) * sigma[:, :1]) & (sigma > 0)
        coordinates = torch.where(kept, torch.einsum("nrd,nd->nr", right, delta_h[rows]), 0.0)
        lefts.append((delta_h[rows] - torch.einsum("nrd,nr->nd", right, coordinates)).square().sum(dim=1))
        captured.append(coordinates.square().sum(dim=0))
        ranks.append(kept.sum(dim=1).double())
    left, rank, total = torch.cat(lefts), torch.cat(ranks), _energy(delta_h)
    curve = [1.0, *(1 - (torch.stack(captured).sum(dim=0) / total.sum()).cumsum(0)).clamp(0, 1).tolist()]
    curve = curve[: int(rank.max()) + 1]
    null = 1 - float((rank * total).sum() / total.sum()) / shape[0]
    return Explained("local affine map", left, total, curve, null, rank, shape)


def _random_share(delta_h: Tensor, main: Explained, options: Options) -> float:
    """unexplained_variance for one Gaussian W of the shape and (mean) rank of the projector's map."""
    width = round(float(main.ranks.mean()))
    drawn = torch.randn(main.shape[0], max(1, width), generator=generator(options.seed, "tangent-random"), dtype=torch.float64)
    return unexplained_variance(delta_h, drawn)


def _share_metric(name: str, found: Explained, seed: int) -> Metric:
    low, high = bootstrap_ratio(found.left[:, None], found.total[:, None], seed)
    return Metric(
        name, found.share, len(found.left),
        Interval(float(low[0]) ** 2, float(high[0]) ** 2, f"{RESAMPLED}, weights and negatives held fixed, 95 %"),
        about=f"share of the variance of delta-h outside the {found.name}",
    )


def _mean_metric(name: str, values: Tensor, seed: int, about: str, per_image: bool) -> Metric:
    if not per_image:
        return Metric(name, float(values.mean()), reason="a property of the weights, not of a sample", about=about)
    low, high = bootstrap_mean(values, seed)
    interval = Interval(float(low), float(high), f"{RESAMPLED}, 95 %")
    return Metric(name, float(values.mean()), len(values), interval, about=f"mean over images: {about} at h(1)")


def _labels(subject: subject.Subject, indices: Tensor, notes: list[str]) -> Tensor | None:
    labels = subject.source.labels
    if labels is None:
        notes.append(f"{subject.source.name} has no labels: label match is left out.")
        return None
    return labels.cpu()[indices]


def _label_metrics(labels: Tensor, hardest: Tensor, groups: list[Tensor], seed: int) -> list[Metric]:
    matches = _matches(labels, hardest)
    low, high = bootstrap_mean(matches, seed)
    chance, ceiling = chance_and_ceiling(labels, groups)
    return [
        Metric(
            "label_match", float(matches.mean()), len(labels),
            Interval(float(low), float(high), f"{RESAMPLED}, negatives held fixed, 95 %"),
            better="higher", about="share of nearest negatives with the label of their anchor",
        ),
        Metric("label_match_chance", chance, reason="a closed form of the label counts", about="a negative drawn at random"),
        Metric(
            "label_match_ceiling", ceiling, reason="a closed form of the label counts",
            about="share of anchors that have a negative of their own label at all",
        ),
    ]


def chance_and_ceiling(labels: Tensor, groups: list[Tensor]) -> tuple[float, float]:
    """Label match of a negative drawn at random, and the share of anchors that have a negative of their own label.

        chance = mean_i (c_i - 1) / (N_i - 1),  ceiling = mean_i [c_i > 1],  c_i = images in i's group with its label
    """
    chance, ceiling = 0.0, 0.0
    for group in groups:
        _, inverse, counts = labels[group].unique(return_inverse=True, return_counts=True)
        same = counts[inverse].double() - 1
        chance += float(same.sum()) / (len(group) - 1)
        ceiling += float((same > 0).sum())
    return chance / len(labels), ceiling / len(labels)


def _remarks(subject: subject.Subject, main: Explained, linear: bool, h: Tensor, z: Tensor, options: Options) -> list[str]:
    d = main.shape[0]
    notes = []
    if main.null < 1e-9:
        notes.append(
            f"The map has rank {d}, the width of h: nothing can lie outside it, and unexplained is 0 by construction."
        )
    elif main.share > main.null:
        notes.append("The projector explains no more of delta-h than random directions would.")
    if not linear:
        notes.append(
            "The projector is not affine: unexplained is that of the local affine map at each h(1). It describes a "
            "neighbourhood, and delta-h may reach beyond it. The share of the first layer, where given, holds everywhere: "
            "what lies outside its columns never gets in."
        )
    if options.batch is None:
        notes.append("Negatives are looked for in the whole set; in batches there are fewer, and they are less similar.")
    if len(h) <= d:
        notes.append(f"{len(h)} images for {d} dimensions: the span of delta-h is known only in part.")
    silent = int((z == 0).all(dim=1).sum())
    if silent:
        notes.append(f"The projector gives zero for {silent} views; their similarity to others counts as 0.")
    return notes


def _headline(main: Explained, linear: bool, matches: list[Metric] | None) -> str:
    text = (
        f"{main.share:.1%} of the variance of delta-h lies outside what the projector "
        f"{'sees' if linear else 'sees around each image'} (random directions: {main.null:.1%})"
    )
    if matches is None:
        return text + "."
    match, chance, _ = (float(m.value or 0) for m in matches)
    return text + f"; {match:.1%} of the nearest negatives share the label of their anchor (chance {chance:.1%})."


def _curve(maps: list[Explained]) -> Table:
    rows = [(m.name, k, share) for m in maps for k, share in enumerate(m.curve)]
    d = maps[0].shape[0]
    rows += [("random directions", k, 1 - k / d) for k in range(max(len(m.curve) for m in maps))]
    return Table(
        "curve", "Unexplained share by the number of leading directions",
        {"map": [r[0] for r in rows], "directions": [r[1] for r in rows], "unexplained": [r[2] for r in rows]},
        "Leading: by singular value of the map. At the last row of a map all its directions are in.",
    )


def _pairs(indices: Tensor, hardest: Tensor, z1: Tensor, z2: Tensor, labels: Tensor | None) -> Table:
    n = len(indices)
    a, b = F.normalize(z1, dim=1), F.normalize(torch.cat([z1, z2]), dim=1)
    columns = {
        "index": indices.tolist(),
        "nearest": indices[hardest % n].tolist(),
        "view": (hardest // n + 1).tolist(),
        "similarity": (a * b[hardest]).sum(dim=1).tolist(),
        "positive_similarity": (a * b[n:]).sum(dim=1).tolist(),
    }
    if labels is not None:
        columns |= {"label": labels.tolist(), "label_of_nearest": labels[hardest % n].tolist()}
    return Table(
        "pairs", "Every image and its nearest negative", columns,
        "nearest, view: image and view of the nearest negative of view 1. similarity: cosine in the projector's output.",
    )
