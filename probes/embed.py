"""embed: the features as a map on the plane, by PaCMAP, with how far that map can be trusted."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import checks, pictures, subject
from geomssl.probes.question import LABEL, described
from geomssl.probes.tangent import chance_and_ceiling
from geomssl.progress import track
from geomssl.seeding import seeded

FEWEST = 30
MOST = 2000
# A number is shown in so many ranges, each with a colour of its own.
RANGES = 8


def pacmap_map(features: Tensor, seed: int = 0, neighbours: int = 10) -> Tensor:
    """PaCMAP of features (n, d): a map (n, 2), float64. The same seed gives the same map.

    Equal rows are mapped once and share their place, since duplicates break its neighbour search. More than 100
    dimensions are first reduced to 100 by a truncated SVD, as PaCMAP does. The generators of numpy, torch and random, the
    threads of numba, faiss and torch, and PaCMAP's own seed are as before afterwards.
    Raises GeomsslError for features that are not finite or all equal, and for fewer than 30 different rows.
    Source: Wang, Huang, Rudin and Shaposhnik 2021.
    """
    exact = checks.varied(features, "features")
    rows, back = np.unique(exact.numpy().astype(np.float32), axis=0, return_inverse=True)
    if len(rows) < FEWEST:
        raise GeomsslError(f"{len(rows)} different features", f"at least {FEWEST} for a map", reason="too-few-images")
    with seeded(seed, "pacmap") as given, _pacmap() as engine:
        mapped = engine.PaCMAP(n_components=2, n_neighbors=neighbours, random_state=int(given) % 2**31).fit_transform(rows)
    if not np.isfinite(mapped).all():
        raise GeomsslError("features that PaCMAP maps to NaN", "features of an ordinary scale", reason="not-finite")
    return torch.from_numpy(mapped.astype(np.float64)[back.reshape(-1)])


@contextmanager
def _pacmap() -> Iterator[Any]:
    """The module of PaCMAP; what a seeded run changes in this process is put back, and its remarks about that are silent."""
    with warnings.catch_warnings():
        # faiss's wrapper warns about itself when it is first imported
        warnings.simplefilter("ignore", DeprecationWarning)
        engine: Any = importlib.import_module("pacmap.pacmap")
        faiss, numba = importlib.import_module("faiss"), importlib.import_module("numba")
    seed, level = engine._RANDOM_STATE, engine.logger.level
    threads = numba.get_num_threads(), faiss.omp_get_max_threads(), torch.get_num_threads()
    engine.logger.setLevel("ERROR")
    # on a busy machine its threads wait for each other far longer than one of them would work
    numba.set_num_threads(1)
    try:
        yield engine
    finally:
        engine._RANDOM_STATE = seed
        engine.logger.setLevel(level)
        numba.set_num_threads(threads[0])
        faiss.omp_set_num_threads(threads[1])
        # faiss and torch may share one OpenMP
        torch.set_num_threads(threads[2])


def pca_map(features: Tensor) -> Tensor:
    """The first two principal components of features (n, d): (n, 2), float64; the larger end of each axis is positive."""
    exact = checks.varied(features, "features")
    centred = exact - exact.mean(dim=0)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    found = centred @ right[:2].T
    found = torch.cat([found, found.new_zeros(len(found), 2 - found.shape[1])], dim=1)
    extreme = found.gather(0, found.abs().argmax(dim=0, keepdim=True))
    return found * torch.where(extreme < 0, -1.0, 1.0)


def trustworthiness(features: Tensor, mapped: Tensor, k: int = 10) -> float:
    """Trustworthiness of a map: 1 where neighbours on the map are neighbours in the features.

        1 - 2 / (n k (2n - 3k - 1)) sum_i sum over the k nearest j of i on the map of max(0, rank(i, j) - k)

    rank(i, j): the rank of j among the neighbours of i in the features, Euclidean. About .5 for a random map. k < n / 2.
    Source: Venna and Kaski 2001; by scikit-learn.
    """
    from sklearn.manifold import trustworthiness as measured

    a, b = checks.matrix(features, "features"), checks.matrix(mapped, "a map")
    if not 1 <= k < len(a) / 2:
        raise GeomsslError(f"k = {k} for {len(a)} images", "1 <= k < n / 2", reason="bad-value")
    return float(measured(a.numpy(), b.numpy(), n_neighbors=k))


def continuity(features: Tensor, mapped: Tensor, k: int = 10) -> float:
    """Continuity of a map: 1 where neighbours in the features stay so on the map; trustworthiness the other way round."""
    return trustworthiness(mapped, features, k)


def label_agreement(points: Tensor, labels: Tensor, k: int = 10) -> Tensor:
    """Per image (n,): the share of its k nearest points (Euclidean, itself left out) that carry its label."""
    exact = checks.matrix(points, "points")
    if not 1 <= k < len(exact):
        raise GeomsslError(f"k = {k} for {len(exact)} images", "1 <= k < n", reason="bad-value")
    distances = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    nearest = distances.topk(k, dim=1, largest=False).indices
    return (labels.cpu()[nearest] == labels.cpu()[:, None]).double().mean(dim=1)


class Options(subject.Options):
    """Settings of the embedding probe."""

    colour: str = Field(LABEL, description="what colours the points: label, or a factor (session; azimuth in eight ranges)")
    layer: Literal["h", "z"] = Field("h", description="what is mapped: the features h or the projector's output z")
    neighbours: int = Field(10, ge=2, description="neighbours that PaCMAP holds on to")
    k: int = Field(10, ge=1, description="neighbours in trustworthiness, continuity and label agreement")
    seeds: int = Field(3, ge=1, le=20, description="maps from different seeds; the first is drawn, all give the range")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """A PaCMAP map of the features, its trustworthiness on the map, and the PCA map beside it."""
    subject.need(FEWEST, "a map")
    if options.layer == "z":
        subject.need_projector("embed --layer z")
    notes: list[str] = []
    indices = _indices(subject, options, notes)
    features = checks.varied(subject.features(indices, options.layer), f"features {options.layer}")
    if not options.k < len(features) / 2:
        raise GeomsslError(f"--k {options.k} for {len(features)} images", "less than half of the images", reason="bad-value")
    equal = len(features) - len(torch.unique(features.float(), dim=0))
    if equal:
        notes.append(f"{equal} features equal another one exactly; they share its place on the map.")
    labels, names = _colours(subject, options.colour, indices)
    seeds = range(options.seed, options.seed + options.seeds)
    maps = [pacmap_map(features, seed, options.neighbours) for seed in track(seeds, "PaCMAP")]
    plane = pca_map(features)
    metrics = _metrics(features, maps, plane, labels, options)
    if labels is None:
        notes.append(f"{subject.source.name} has no labels: label agreement is left out, and the points have one colour.")
    notes.append(
        "Distances between clusters, their sizes and the axes of a PaCMAP map mean little; neighbourhoods mean something, as "
        "far as trustworthiness and continuity go."
    )
    picture, columns = pictures.sprite(subject.images(indices))
    value = {m.name: m.value for m in metrics}
    series, word = None if names is None else options.colour, "class" if options.colour == LABEL else options.colour
    return Artifact(
        probe="embed",
        title=f"A map of the {'features' if options.layer == 'h' else 'projections'} {options.layer}",
        headline=(
            f"On the PaCMAP map of {len(features)} images trustworthiness is {value['trustworthiness']:.3f} "
            f"(PCA map {value['trustworthiness_pca']:.3f}; a random map about .5)"
            + ("." if labels is None else f"; {value['label_agreement']:.1%} of the nearest points share the {options.colour}.")
        ),
        definition=(
            "trustworthiness = 1 - 2 / (n k (2n - 3k - 1)) sum_i sum_j max(0, rank(i, j) - k), j over the k nearest points "
            f"of i on the map, rank in the features, k = {options.k}: it falls where the map invents neighbours. continuity: "
            "the same with map and features exchanged: it falls where the map tears neighbours apart. label agreement: the "
            f"mean share of the {options.k} nearest points with the same {options.colour}"
            + (f", in {RANGES} ranges." if names and " to " in names[0] else ".")
        ),
        metrics=metrics,
        tables=[_table(indices, maps[0], plane, options.colour, names)],
        figures=[
            _scatter("map", "PaCMAP map", "x", "y", columns, series,
                     f"Seed {options.seed}. Every point is an image; colour is its {word}, which the map did not see."),
            _scatter("pca", "The first two principal components", "pca_x", "pca_y", columns, series,
                     "The same images on the plane of largest variance, for comparison."),
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
        files={"sprite.png": picture},
    )


def _indices(subject: subject.Subject, options: Options, notes: list[str]) -> Tensor:
    n = len(subject.source) if options.n is None else options.n
    if n < FEWEST:
        raise GeomsslError(f"--n {n}", f"at least {FEWEST} images for a map", reason="too-few-images")
    if n > MOST and len(subject.source) > MOST:
        notes.append(f"{MOST} images are mapped, drawn from {len(subject.source)}: more would not be seen.")
        options = options.model_copy(update={"n": MOST})
    return subject.choose(options)


def _metrics(
    features: Tensor, maps: list[Tensor], plane: Tensor, labels: Tensor | None, options: Options
) -> list[Metric]:
    k, n = options.k, len(features)
    metrics = []
    for name, measure, about in (
        ("trustworthiness", trustworthiness, "neighbours on the map that are true"),
        ("continuity", continuity, "true neighbours kept on the map"),
    ):
        metrics.append(_over_seeds(name, [measure(features, m, k) for m in maps], n, about))
        metrics.append(_fixed(f"{name}_pca", measure(features, plane, k), n, f"{about}, PCA map"))
    if labels is None:
        return metrics
    about = f"mean share of the {k} nearest points with the same {options.colour}"
    agreement = [float(label_agreement(m, labels, k).mean()) for m in maps]
    chance, _ = chance_and_ceiling(labels, [torch.arange(n)])
    return [
        *metrics,
        _over_seeds("label_agreement", agreement, n, f"{about}, on the map"),
        _fixed("label_agreement_pca", float(label_agreement(plane, labels, k).mean()), n, f"{about}, on the PCA map"),
        _fixed("label_agreement_features", float(label_agreement(features, labels, k).mean()), n, f"{about}, in the features"),
        _fixed("label_agreement_chance", chance, n, f"share of the same {options.colour} among all other images"),
    ]


def _over_seeds(name: str, values: list[float], n: int, about: str) -> Metric:
    """The value of the map that is drawn, and the range over the seeds."""
    interval = Interval(min(values), max(values), f"range over {len(values)} seeds") if len(values) > 1 else None
    return Metric(name, values[0], n, interval, None if interval else "one seed", better="higher", about=about)


def _fixed(name: str, value: float, n: int, about: str) -> Metric:
    return Metric(name, value, n, reason="a description of these images, with nothing drawn", about=about)


def _scatter(name: str, title: str, x: str, y: str, columns: int, series: str | None, caption: str) -> Figure:
    return Figure(name, "scatter", title, caption, "map", x, y, series, sprite="sprite.png", sprite_columns=columns)


def _colours(subject: subject.Subject, name: str, indices: Tensor) -> tuple[Tensor | None, list[str] | None]:
    """A colour (n,) for each image and its name; None and None for the label of a data set without labels.

    A category as it is; a number in eight equal ranges of its declared range, the same on every map.
    """
    if name == LABEL and subject.source.labels is None:
        return None, None
    parameter, values = described(subject, name, "own")
    values = values[indices]
    if name == LABEL:
        return values, subject.class_names(values)
    if parameter.kind in ("index", "binary"):
        return values, [str(v) for v in values.tolist()]
    step = (parameter.high - parameter.low) / RANGES
    ranges = ((values - parameter.low) / step).floor().clamp(0, RANGES - 1).long()
    ends = [f"{parameter.low + k * step:.3g} to {parameter.low + (k + 1) * step:.3g}" for k in range(RANGES)]
    return ranges, [ends[k] for k in ranges.tolist()]


def _table(indices: Tensor, mapped: Tensor, plane: Tensor, colour: str, names: list[str] | None) -> Table:
    columns: dict[str, list[Any]] = {
        "index": indices.tolist(),
        "x": _rounded(mapped[:, 0].numpy()),
        "y": _rounded(mapped[:, 1].numpy()),
        "pca_x": _rounded(plane[:, 0].numpy()),
        "pca_y": _rounded(plane[:, 1].numpy()),
    }
    if names is not None:
        columns[colour] = list(names)
    return Table("map", "Where every image lies", columns, "x, y: PaCMAP. pca_x, pca_y: principal components. No units.")


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{v:.6g}") for v in values]
