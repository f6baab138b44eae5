"""local: the affine map of a non-linear projector around each image: its rank, what it leaves unexplained, its regions."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import affine, checks, subject
from geomssl.probes.assurance import bootstrap_mean, bootstrap_ratio
from geomssl.probes.explained import threshold
from geomssl.probes.negatives import nearest_negatives
from geomssl.probes.regions import expected_regions, new_region_share, patterns, piecewise_affine, regions
from geomssl.progress import track
from geomssl.seeding import generator

RESAMPLED = "bootstrap over images, 95 %: projector, negatives and pairs held fixed"
BYTES = 2**26
# images whose singular value decompositions are taken at once
TOGETHER = 64


def local_maps(projector: nn.Module, h: Tensor, memory: int = BYTES) -> Tensor:
    """W_omega' of every sample: the Jacobian dg/dh at each row of h (n, d), (n, p, d) float64 on the CPU.

    A projector of (leaky) ReLU layers, and of BatchNorm in eval mode, is affine in a region omega around h, with
    g(h) = W_omega' h + b_omega there; of a smooth one this is the tangent at h. Rows of h do not mix. By torch.func, as many
    rows at once as `memory` bytes allow. The projector is copied to the CPU in float64, in eval mode, and left as it is.
    Raises GeomsslError for an h that is no finite matrix. Source: Cosentino et al. 2022, Eq. 11.
    """
    exact, rows = exact_copy(projector), checks.matrix(h, "features h")
    with torch.no_grad():
        outputs = exact(rows[:1]).shape[1]
    widest = max([outputs, rows.shape[1], *(max(w.shape) for w in exact.parameters() if w.dim())])
    # reverse mode carries one row an output through every layer, and holds about three of them at a time
    chunk = max(1, int(memory // (3 * 8 * outputs * widest)))
    found, parts = rows.new_empty(len(rows), outputs, rows.shape[1]), rows.split(chunk)
    for into, part in track(zip(found.split(chunk), parts, strict=True), "local maps", total=len(parts)):
        into.copy_(affine.jacobians(exact, part))
    return found


def singular_parts(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (n, r), largest first, and right singular vectors (n, r, d) of maps (n, p, d), r = min(p, d)."""
    found = [torch.linalg.svd(part, full_matrices=False)[1:] for part in maps.split(TOGETHER)]
    return torch.cat([sigma for sigma, _ in found]), torch.cat([right for _, right in found])


def local_rank(sigma: Tensor, tau: float, relative: bool = False) -> Tensor:
    """Rank of every map at a threshold, int64 (n,): how many of its singular values sigma (n, r) are >= tau.

    relative: the threshold is tau times the map's own largest. A zero map has rank 0. Raises GeomsslError unless tau > 0.
    """
    if not (tau > 0 and math.isfinite(tau)):
        raise GeomsslError(f"tau = {tau}", "a threshold > 0", reason="bad-value")
    threshold = tau * sigma[:, :1] if relative else torch.full_like(sigma[:, :1], tau)
    return ((sigma >= threshold) & (sigma > 0)).sum(dim=1)


def local_unexplained(sigma: Tensor, right: Tensor, delta_h: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    """Energy of each sample's delta-h outside the columns of its own W_omega, and all of it: two float64 tensors (n,).

        left_i = sum_k min_t ||delta_h_ik - W_i t||^2,    total_i = sum_k ||delta_h_ik||^2

    sigma, right: of `singular_parts`; singular values up to cutoff times the map's largest count as zero.
    delta_h: (n, k, d), k directions a sample. Where all maps are one W, sum left / sum total is
    tangent.unexplained_variance of those rows. Source: Cosentino et al. 2022, Eq. 10 and 11.
    """
    if delta_h.dim() != 3 or delta_h.shape[::2] != right.shape[::2]:
        raise GeomsslError(
            f"delta-h {tuple(delta_h.shape)} for {len(right)} maps of width {right.shape[2]}",
            f"({len(right)}, k, {right.shape[2]})", reason="bad-shape",
        )
    kept = ((sigma > cutoff * sigma[:, :1]) & (sigma > 0)).double()
    coordinates = torch.einsum("nrd,nkd->nkr", right, delta_h.double()) * kept[:, None]
    left = (delta_h.double() - torch.einsum("nrd,nkr->nkd", right, coordinates)).square().sum(dim=(1, 2))
    return left, delta_h.double().square().sum(dim=(1, 2))


def map_distances(maps: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared Frobenius distance of each pair of maps (n, p, d), and the mean of their squared norms: two tensors (n,).

    sqrt(sum of the first / sum of the second) is the relative distance: 0 for equal maps, sqrt(2) for orthogonal ones (two
    that have nothing to do with each other), 2 for opposite ones.
    """
    return (maps - others).square().sum(dim=(1, 2)), (maps.square() + others.square()).sum(dim=(1, 2)) / 2


class Options(subject.Options):
    """Settings of the local probe."""

    local: int = Field(256, ge=4, description="images at which the local map is taken; regions are counted on all of them")
    draws: int = Field(2, ge=1, le=64, description="second views an image, each with a delta-h of its own")
    tau: float = Field(1e-3, gt=0, description="threshold of the local rank")
    relative: bool = Field(True, description="measure tau against the largest singular value of each map")
    cutoff: float | None = Field(
        None, ge=0, lt=1, description="singular values up to this share of the largest count as zero; not given: max(d, p) eps"
    )


@dataclass(frozen=True)
class _Local:
    """What is known at each of m images: every tensor has one row an image."""

    shape: tuple[int, int]
    sigma: Tensor
    rank: Tensor
    left: Tensor
    swapped: Tensor
    total: Tensor
    near: Tensor
    far: Tensor
    distances: dict[str, tuple[Tensor, Tensor]]
    smooth: bool
    maps: Tensor


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Local maps, their ranks, what they leave unexplained of delta-h, and the regions that two views of every image hit."""
    projector = subject.need_projector("local")
    subject.need(4, "pairs of local maps")
    indices = subject.choose(options, least=4)
    notes: list[str] = []
    policy = subject.training_policy(notes)
    h, z = (
        [subject.features(indices, layer, view=(policy, options.seed, 1 + k)) for k in range(options.draws + 1)]
        for layer in ("h", "z")
    )
    h1 = checks.varied(h[0], "features h")
    checks.varied(z[0], "projector outputs")
    chosen = _chosen(subject, h1, z[0].shape[1], options, notes)
    delta_h = torch.stack([_delta_h(h[0], z[0], h[k], z[k])[chosen] for k in range(1, len(h))], dim=1)
    if not delta_h.square().sum() > 0:
        raise GeomsslError("delta-h of zero for every image", "views that differ from their negatives", reason="degenerate")
    found = _measure(projector, h1[chosen], delta_h, options)
    hit = None if found.smooth else regions(patterns(projector, h1))
    if hit is not None and not _decides(found.maps, hit[chosen]):
        hit = None
        notes.append("Two images with the same signs at every kink have different maps: the regions cannot be told by them.")
    elif hit is None:
        notes.append("The projector bends everywhere, as with GELU or tanh: there are no regions, and every map is a tangent.")
    metrics = _metrics(found, options)
    metrics += _region_metrics(projector, h, hit, chosen, found, options.seed)
    notes += _remarks(found, h1, chosen) + checks.zeros(h1, "h(1)") + subject.projector_remarks()
    return Artifact(
        probe="local",
        title="The projector around each image",
        headline=_headline(found, hit),
        definition=(
            "W_i' = dg/dh at h_i(1), the matrix of the affine piece of the projector on which image i lies. local rank: "
            f"singular values at or above {options.tau:g}{' of the largest' if options.relative else ''}. unexplained = "
            "sum_ik min_t ||delta_h_ik - W_i t||^2 / sum_ik ||delta_h_ik||^2, delta_h_ik = h_i(k) - h*_ik, with h*_ik the "
            "nearest negative of z_i(1) among all other images in views 1 and k; singular values of W_i up to "
            f"{threshold(projector, found.shape, options.cutoff):.1e} of the largest count as zero. A region is a set of h "
            "with the same signs at every kink of the projector. distance of two maps = sqrt(sum ||W_i - W_j||_F^2 / sum "
            "(||W_i||_F^2 + ||W_j||_F^2) / 2): 0 where equal, sqrt 2 where orthogonal. Float64; eval mode."
        ),
        metrics=metrics,
        tables=[_image_table(indices[chosen], found, None if hit is None else hit[chosen]), _distance_table(found),
                _spectrum_table(found), *([] if hit is None else [_growth(hit)])],
        figures=[
            Figure(
                "distances", "line", "How much the local map changes from image to image",
                "Quantiles over pairs. Equal curves: near images share no more of a map than any two.",
                "distances", "share", "distance", "pairs", x_label="share of the pairs", y_label="relative distance of maps",
            ),
            Figure(
                "spectrum", "line", "Singular values of the local maps, over the largest",
                "Median over images, with the quartiles. One line without a band: a projector that is affine.",
                "spectrum", "index", "median", low="low", high="high", x_label="index", y_label="singular value / largest",
                log_y=True,
            ),
            *([] if hit is None else [Figure(
                "regions", "line", "Regions hit by that many images",
                "On the dashed line each image has a region of its own; a curve that levels off has found most of them.",
                "regions", "images", "regions", "count", x_label="images", y_label="distinct regions",
            )]),
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def exact_copy(projector: nn.Module) -> nn.Module:
    """The projector as a copy in double on the CPU: ranks, and whether two maps are one, are decided on differences."""
    return copy.deepcopy(projector).cpu().double().eval()


def _chosen(subject: subject.Subject, h: Tensor, p: int, options: Options, notes: list[str]) -> Tensor:
    """Rows at which the map is taken: a seeded draw, as many as asked for and as fit into memory."""
    # the maps, their singular vectors, and those of the pairs
    room = int(subject.memory // (8 * 4 * p * h.shape[1]))
    count = min(options.local, len(h), max(4, room))
    if count < len(h):
        why = f" ({room} fit into the memory)" if room < min(options.local, len(h)) else ""
        notes.append(f"The local map is taken at {count} of {len(h)} images{why}.")
    return torch.randperm(len(h), generator=generator(options.seed, "local-images"))[:count].sort().values


def _delta_h(h1: Tensor, z1: Tensor, hk: Tensor, zk: Tensor) -> Tensor:
    return checks.matrix(hk, "features h") - torch.cat([h1, hk]).double()[nearest_negatives(z1, zk)]


def _measure(projector: nn.Module, h: Tensor, delta_h: Tensor, options: Options) -> _Local:
    maps = local_maps(projector, h)
    sigma, right = singular_parts(maps)
    m, p, d = maps.shape
    cutoff = threshold(projector, (p, d), options.cutoff)
    left, total = local_unexplained(sigma, right, delta_h, cutoff)
    near = nearest(h)
    # a random cyclic shift of a random order pairs every image with another one, and never with itself
    order = torch.randperm(m, generator=generator(options.seed, "local-pairs"))
    far = torch.empty_like(order)
    far[order] = order.roll(1)
    swapped, _ = local_unexplained(sigma[far], right[far], delta_h, cutoff)
    distances = {"nearest neighbours": map_distances(maps, maps[near]), "random pairs": map_distances(maps, maps[far])}
    smooth = not piecewise_affine(exact_copy(projector), h, maps)
    rank = local_rank(sigma, options.tau, options.relative).double()
    return _Local((d, p), sigma, rank, left, swapped, total, near, far, distances, smooth, maps)


def nearest(h: Tensor) -> Tensor:
    """The other row nearest to each row of h (n, d) by Euclidean distance, ties to the smallest index: (n,)."""
    apart = torch.cdist(h.double(), h.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return apart.fill_diagonal_(torch.inf).argmin(dim=1)


def _decides(maps: Tensor, hit: Tensor) -> bool:
    """True where every two of those images in one region have one map: no kink went unseen."""
    order = torch.sort(hit, stable=True).indices
    a, b = order[:-1][hit[order].diff() == 0], order[1:][hit[order].diff() == 0]
    if not len(a):
        return True
    squares, size = map_distances(maps[a], maps[b])
    return bool((squares <= 1e-18 * size).all())


def _metrics(found: _Local, options: Options) -> list[Metric]:
    n, d = len(found.rank), found.shape[0]
    low, high = bootstrap_mean(found.rank, options.seed)
    null = 1 - float((found.rank * found.total).sum() / found.total.sum()) / d
    metrics = [
        Metric("local_rank", float(found.rank.mean()), n, Interval(float(low), float(high), f"percentile {RESAMPLED}"),
               unit="dimensions", about="mean over images of the rank of the local map"),
        share_metric("unexplained", found.left, found.total, options.seed, "share of delta-h outside the image's own map"),
        share_metric(
            "unexplained_swapped", found.swapped, found.total, options.seed,
            "the same with the local map of another, random image: what being local gains lies between the two",
        ),
        Metric("unexplained_null", null, n, reason="a closed form: 1 - local rank / d, weighed by the length of delta-h",
               about="expected share for random directions, as many as each local map has"),
    ]
    for name, (squares, size) in zip(("distance_neighbours", "distance_random"), found.distances.values(), strict=True):
        pairs = "an image and the one nearest in h(1)" if name == "distance_neighbours" else "two random images"
        metrics.append(_distance(name, squares, size, options.seed, f"relative Frobenius distance of the maps of {pairs}"))
    return metrics


def share_metric(name: str, above: Tensor, below: Tensor, seed: int, about: str) -> Metric:
    """sum above / sum below, a share of energy between 0 and 1, with its interval over images (n,)."""
    low, high = bootstrap_ratio(above[:, None], below[:, None], seed)
    # a share is at most 1, whatever the tails of a studentised interval say
    interval = Interval(float(low[0]) ** 2, float(high[0].square().clamp(max=1)), RESAMPLED)
    if math.isnan(interval.low):
        return Metric(name, float(above.sum() / below.sum()), len(above), reason="too few images with a delta-h", about=about)
    return Metric(name, float(above.sum() / below.sum()), len(above), interval, about=about)


def _distance(name: str, squares: Tensor, size: Tensor, seed: int, about: str) -> Metric:
    if not size.sum() > 0:
        return Metric(name, None, len(size), reason="every local map is zero", about=about)
    low, high = bootstrap_ratio(squares[:, None], size[:, None], seed)
    value = math.sqrt(float(squares.sum() / size.sum()))
    # opposite maps are 2 apart, and none are farther
    interval = Interval(float(low[0]), float(high[0].clamp(max=2)), RESAMPLED)
    if math.isnan(interval.low):
        return Metric(name, value, len(size), reason="too few local maps that are not zero", about=about)
    return Metric(name, value, len(size), interval, about=about)


def _region_metrics(
    projector: nn.Module, h: Sequence[Tensor], hit: Tensor | None, chosen: Tensor, found: _Local, seed: int
) -> list[Metric]:
    n = len(h[0])
    if hit is None:
        return [Metric("regions", None, n, reason="no regions that kinks could tell", about="distinct regions hit by h(1)")]
    counts = hit.bincount()
    both = regions(patterns(projector, torch.cat([h[0], h[1]])))
    shared = {
        "same_region_views": (both[:n] == both[n:], "images whose two views lie in one region"),
        "same_region_neighbours": (hit[chosen] == hit[chosen][found.near], "images in one region with the nearest in h(1)"),
        "same_region_random": (hit[chosen] == hit[chosen][found.far], "random pairs of images in one region"),
    }
    metrics = [
        Metric("regions", float(len(counts)), n, reason="grows with the number of images; see the curve of regions",
               about="distinct regions hit by h(1)"),
        Metric("new_region", new_region_share(counts), n, reason="Good-Turing: regions hit once / images",
               about="chance that one more image falls into a region not yet hit"),
    ]
    for name, (same, about) in shared.items():
        low, high = bootstrap_mean(same.double(), seed)
        interval = Interval(float(low), float(high), f"percentile {RESAMPLED}")
        metrics.append(Metric(name, float(same.double().mean()), len(same), interval, about=f"share of {about}"))
    return metrics


def _remarks(found: _Local, h: Tensor, chosen: Tensor) -> list[str]:
    d = found.shape[0]
    notes = []
    if bool((found.rank == d).all()):
        notes.append(
            f"Every local map has rank {d}, the width of h: nothing can lie outside it, and unexplained is 0 by construction."
        )
    if all(bool((squares <= 1e-18 * size).all()) for squares, size in found.distances.values()):
        notes.append("All local maps are one: the projector is affine on these images, and tangent says the same.")
    elif float(found.left.sum()) >= float(found.swapped.sum()) and float(found.left.sum()) > 1e-12 * float(found.total.sum()):
        notes.append("The map of another image explains delta-h as well: being local gains nothing here.")
    dead = int((found.sigma[:, 0] == 0).sum())
    if dead:
        notes.append(f"The local map of {dead} of {len(found.rank)} images is zero: nothing around them passes.")
    same = len(h) - len(torch.unique(h, dim=0))
    if same:
        notes.append(f"{same} of {len(h)} images repeat the h of another: they share a region by that, and a neighbour at 0.")
    if len(chosen) <= d:
        notes.append(f"Local maps at {len(chosen)} images for {d} dimensions of h: few of the regions are seen.")
    notes.append("A local map describes a neighbourhood of h(1); delta-h may reach into other regions.")
    return notes


def _headline(found: _Local, hit: Tensor | None) -> str:
    share, swapped = (float(x.sum() / found.total.sum()) for x in (found.left, found.swapped))
    text = (
        f"{share:.1%} of the variance of delta-h lies outside the image's own local map (another image's: {swapped:.1%}), "
        f"of rank {float(found.rank.mean()):.1f} of {found.shape[0]} on average"
    )
    if hit is None:
        return text + "."
    count = int(hit.max()) + 1
    return text + f"; {len(hit)} images hit {count} region{'s' if count > 1 else ''}."


def _image_table(indices: Tensor, found: _Local, hit: Tensor | None) -> Table:
    columns = {
        "index": indices.tolist(),
        "local_rank": found.rank.long().tolist(),
        "unexplained": [a / b if b else None for a, b in zip(found.left.tolist(), found.total.tolist(), strict=True)],
        "nearest": indices[found.near].tolist(),
    }
    for name, (squares, size) in zip(("distance_nearest", "distance_random"), found.distances.values(), strict=True):
        columns[name] = _relative(squares, size)
    if hit is not None:
        columns |= {"region": hit.tolist()}
    return Table("images", "Every image with a local map", columns, "nearest: the image nearest in h(1). region: its number.")


def _relative(squares: Tensor, size: Tensor) -> list[float | None]:
    return [math.sqrt(a / b) if b else None for a, b in zip(squares.tolist(), size.tolist(), strict=True)]


def _distance_table(found: _Local) -> Table:
    columns: dict[str, list[float | str]] = {"pairs": [], "share": [], "distance": []}
    for name, (squares, size) in found.distances.items():
        values = sorted(v for v in _relative(squares, size) if v is not None)
        columns["pairs"] += [name] * len(values)
        columns["share"] += [(k + 0.5) / len(values) for k in range(len(values))]
        columns["distance"] += values
    return Table("distances", "Relative distances of local maps, sorted", columns, "1.414: maps that are orthogonal.")


def _spectrum_table(found: _Local) -> Table:
    alive = found.sigma[found.sigma[:, 0] > 0]
    share = alive / alive[:, :1] if len(alive) else found.sigma
    low, middle, high = torch.quantile(share, torch.tensor([0.25, 0.5, 0.75], dtype=share.dtype), dim=0).tolist()
    return Table(
        "spectrum", "Singular values of the local maps, over the largest",
        {"index": list(range(1, len(middle) + 1)), "median": middle, "low": low, "high": high},
        "Median and quartiles over images whose map is not zero.",
    )


def _growth(hit: Tensor) -> Table:
    n = len(hit)
    sizes = sorted({max(1, round(n * k / 20)) for k in range(1, 21)})
    counted = [expected_regions(hit.bincount(), m) for m in sizes]
    return Table(
        "regions", "Regions hit by m of the images, on average over all choices of m",
        {
            "count": ["found"] * len(sizes) + ["one each"] * len(sizes), "images": [*sizes, *sizes],
            "regions": [*counted, *(float(m) for m in sizes)],
        },
        "Exact (Hurlbert 1971); at the last row all images are in.",
    )
