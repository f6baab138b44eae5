"""The nearest negative of every image, over the whole set and in batches as in training: how far it is, and whose label."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.artifact import Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_mean
from geomssl.probes.negatives import nearest_negatives
from geomssl.progress import track
from geomssl.seeding import generator

RESAMPLED = "percentile bootstrap over images"
# Width of a bar of the histogram of distances, in units of the typical distance.
BAR = 0.05


@dataclass(frozen=True)
class Neighbours:
    """hardest: (n,) indices into cat([view 1, view 2]).  groups: images that are each other's negatives.
    suffix: of the metrics' names ("" over the whole set, "_batch" in batches).  words: the same, to be read."""

    hardest: Tensor
    groups: list[Tensor]
    suffix: str
    words: str


def everywhere(z1: Tensor, z2: Tensor) -> Neighbours:
    """Over the whole set."""
    return Neighbours(nearest_negatives(z1, z2), [torch.arange(len(z1))], "", "over the whole set")


def in_batches(z1: Tensor, z2: Tensor, size: int, seed: int) -> Neighbours:
    """Within random batches of that size, as in training; an image left over joins the last batch."""
    n = len(z1)
    groups = list(torch.randperm(n, generator=generator(seed, "tangent-batches")).split(size))
    if len(groups[-1]) < 2:
        groups[-2:] = [torch.cat(groups[-2:])]
    hardest = torch.empty(n, dtype=torch.long)
    for group in track(groups, "nearest negatives"):
        found = nearest_negatives(z1[group], z2[group])
        hardest[group] = group[found % len(group)] + n * (found >= len(group))
    return Neighbours(hardest, groups, "_batch", f"in batches of {size}")


def label_match(labels: Tensor, indices: Tensor) -> float:
    """The share of anchors i whose nearest negative indices[i], an index into cat([z1, z2]), has the label of i.

    labels: (N,), indices: (N,) in 0..2N-1. Source: Cosentino et al. 2022, Fig. 6.
    """
    return float(_matches(labels, indices).mean())


def _matches(labels: Tensor, indices: Tensor) -> Tensor:
    labels, indices = labels.cpu(), indices.cpu()
    if labels.shape != indices.shape or labels.dim() != 1:
        raise GeomsslError(
            f"{tuple(labels.shape)} labels and {tuple(indices.shape)} indices", "two vectors (N,)", reason="bad-shape"
        )
    if len(labels) and not 0 <= int(indices.min()) <= int(indices.max()) < 2 * len(labels):
        raise GeomsslError("an index outside cat([z1, z2])", f"0 to {2 * len(labels) - 1}", reason="bad-value")
    return (labels == labels[indices % len(labels)]).double()


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


def label_metrics(labels: Tensor, kind: str, found: Neighbours, seed: int) -> list[Metric]:
    """Label match with its chance and ceiling. kind: "" for the labels that train classifiers, else "coarse" or "fine"."""
    matches = _matches(labels, found.hardest)
    low, high = bootstrap_mean(matches, seed)
    chance, ceiling = chance_and_ceiling(labels, found.groups)
    name = f"label_match{f'_{kind}' if kind else ''}"
    what = f"{kind} label".strip()
    return [
        Metric(
            f"{name}{found.suffix}", float(matches.mean()), len(labels),
            Interval(float(low), float(high), f"{RESAMPLED}, negatives held fixed, 95 %"),
            better="higher", about=f"share of nearest negatives, {found.words}, with the {what} of their anchor",
        ),
        Metric(
            f"{name}_chance{found.suffix}", chance, reason="a closed form of the label counts",
            about=f"{what}: a negative drawn at random, {found.words}",
        ),
        Metric(
            f"{name}_ceiling{found.suffix}", ceiling, reason="a closed form of the label counts",
            about=f"{what}: share of anchors that have a negative of their own label at all, {found.words}",
        ),
    ]


def typical_distance(h1: Tensor, h2: Tensor) -> float:
    """The root mean square distance of two rows drawn at random from both views: sqrt(2 tr Cov), the unit of distances."""
    both = torch.cat([h1, h2]).double()
    return math.sqrt(2 * float((both - both.mean(dim=0)).square().sum()) / len(both))


def distances(h1: Tensor, others: Tensor, unit: float) -> Tensor:
    """||h_i(1) - other_i|| / unit, float64 (n,). About 1 for an image drawn at random. Source: Cosentino et al. 2022, Fig. 5
    (which does not state its normalisation)."""
    return torch.linalg.norm(h1.double() - others.double(), dim=1) / unit


def distance_metric(name: str, values: Tensor, seed: int, about: str) -> Metric:
    """Mean distance with its interval."""
    low, high = bootstrap_mean(values, seed)
    how = f"{RESAMPLED}, negatives and the unit of distance held fixed, 95 %"
    return Metric(name, float(values.mean()), len(values), Interval(float(low), float(high), how),
                  unit="typical distances", about=about)


def histogram(named: dict[str, Tensor]) -> Table:
    """Shares of images by distance, the same bars for all."""
    bars = int(max(float(values.max()) for values in named.values()) / BAR) + 1
    columns: dict[str, list[str | float]] = {"pair": [], "distance": [], "share": []}
    for name, values in named.items():
        counts = torch.bincount((values / BAR).long().clamp(max=bars - 1), minlength=bars)
        columns["pair"] += [name] * bars
        columns["distance"] += [(k + 0.5) * BAR for k in range(bars)]
        columns["share"] += (counts.double() / len(values)).tolist()
    return Table(
        "distances", "Distances in h", columns,
        f"Bars of {BAR}. Distances over the root mean square distance of two views drawn at random, sqrt(2 tr Cov h).",
    )
