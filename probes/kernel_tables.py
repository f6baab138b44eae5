"""Tables, figures and remarks of the kernel probe, from what it has measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from geomssl.artifact import Figure, Table
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.directions import Line
from geomssl.probes.generator_fit import FittedGenerator
from geomssl.probes.passing import least_share
from geomssl.probes.rank import effective_rank, rank

# a share or a part of it under this is zero for the statements: float32 features know no more
ZERO = 1e-6
# an R^2 under this: no one generator
HALF = 0.5
TWO = "two views"
Bands = dict[tuple[str, float], tuple[float, float]]


@dataclass(frozen=True)
class Moved:
    """What one augmentation at one strength does: energies per image (n,), and h and its directions v (n, d).

    passed, amplified, total: over the images that have a map; along, across, similarity, size: over all.
    """

    name: str
    strength: float
    h: Tensor
    v: Tensor
    passed: Tensor
    amplified: Tensor
    total: Tensor
    along: Tensor
    across: Tensor
    similarity: Tensor
    size: float
    still: bool

    @property
    def share(self) -> float:
        return float(self.passed.sum() / self.total.sum())


@dataclass(frozen=True)
class Fit:
    """One generator and its tests. r2: "small", "larger", "larger, exp", "larger, constant" -> (value, low, high)."""

    line: Line
    found: FittedGenerator
    r2: dict[str, tuple[float, float, float]]


def moves_table(
    name: str, title: str, moves: list[Moved], bands: Bands, null: float, seed: int
) -> Table:
    rows = []
    for one in moves:
        if name == "augmentations" and one.strength < 1:
            continue
        row: dict[str, float | str | None] = {"augmentation": one.name, "strength": one.strength}
        kept = dict.fromkeys(("share", "low", "high", "null_low", "null_high", "amplified", "across"))
        row |= {**kept, "null": null, "similarity": float(one.similarity.mean()), "size": one.size}
        if not one.still:
            low, high = bootstrap_ratio(one.passed[:, None], one.total[:, None], seed)
            whole = float((one.along + one.across).sum())
            known = not bool(low.isnan().any())
            row |= {
                "share": one.share, "low": float(low[0]) ** 2 if known else None,
                "high": min(1.0, float(high[0]) ** 2) if known else None,
                "null_low": bands[one.name, one.strength][0], "null_high": bands[one.name, one.strength][1],
                "amplified": float(one.amplified.sum() / one.total.sum()),
                "across": float(one.across.sum()) / whole if whole > 0 else None,
            }
        rows.append(row)
    return Table(
        name, title, {key: [row[key] for row in rows] for key in (rows[0] if rows else {"augmentation": None})},
        "share: of the energy of v; low, high: 95 %, bootstrap over images. null_low, null_high: 95 % of random subspaces of "
        "the rank of W. across: of ||W'v||^2. similarity: mean cosine of the projections. size: root of ||v||^2 over the "
        "variance of h.",
    )


def generator_table(
    fits: list[Fit], columns: list[tuple[float, float]], squares: list[float],
    bands: Bands, null: float,
) -> Table:
    band = [bands[f.line.name, -1.0] for f in fits]
    return Table(
        "generators", "One generator for every parameter that moves gradually",
        {
            "generator": [f.line.name for f in fits], "unit": [f.line.unit for f in fits],
            "eps_low": [f.line.low for f in fits], "eps_high": [f.line.high for f in fits],
            "n_fit": [f.found.n for f in fits], "ridge": [f.found.penalty for f in fits],
            "share": [c[0] for c in columns], "null": [null] * len(fits),
            "null_low": [b[0] for b in band], "null_high": [b[1] for b in band],
            "amplified": [c[1] for c in columns], "share_of_square": squares,
        },
        "share: ||P G||^2 / ||G||^2. null_low, null_high: 95 % of random subspaces of the rank of W. share_of_square: of G G.",
    )


def fit_table(fits: list[Fit]) -> Table:
    rows = [(f.line.name, test, *values) for f in fits for test, values in f.r2.items()]
    names = ("generator", "tested_at", "r2", "low", "high")
    return Table(
        "fits", "R2 of the generators on held-out images",
        {name: [row[i] for row in rows] for i, name in enumerate(names)},
        "small: eps as in the fit. larger: beyond it. exp: exp(eps G) h - h. constant: v = eps c, the same for every h.",
    )


def statements(
    two: Moved, r: int, fits: list[Fit], columns: list[tuple[float, float]], null: float, tau: float
) -> Table:
    """The three propositions as what they ask for, what was measured, and whether it was so."""
    d = two.v.shape[1]
    whole = float((two.along + two.across).sum())
    directions = rank(two.v, tau, relative=True)
    colinear = float((F.cosine_similarity(two.h, two.h + two.v).abs() > 1 - ZERO).double().mean())
    rows: list[tuple[str, str, float, float, bool]] = [
        ("4.1 premise", "share of images with h(1), h(2) colinear is 0", colinear, 0.0, colinear == 0),
        ("4.1", "v in Ker(W'): share let through is 0", two.share, null, two.share <= ZERO),
        ("4.1", "similarity of the projections is 1", float(two.similarity.mean()), 1.0,
         float(two.similarity.mean()) >= 1 - ZERO),
        ("4.1 only if", "share of ||W'v||^2 along W'h(1), which invariance leaves alone, is 0",
         float(two.along.sum()) / whole if whole > 0 else 0.0, 0.0, float(two.along.sum()) <= ZERO * whole),
        ("4.2", "rank of {v} is at most the nullity of W'", float(directions), float(d - r), directions <= d - r),
        ("4.2", "effective rank of {v} is at most the nullity of W'", effective_rank(two.v), float(d - r),
         effective_rank(two.v) <= d - r),
        ("4.2", "share let through is the least that this rank allows", two.share, least_share(two.v, r),
         two.share <= least_share(two.v, r) + ZERO),
    ]
    rows += [
        ("4.3", f"columns of G of {f.line.name} in Ker(W'): share let through is 0", passed, null, passed <= ZERO)
        for f, (passed, _) in zip(fits, columns, strict=True)
    ]
    names = ("proposition", "statement", "measured", "reference", "holds")
    return Table(
        "propositions", "Propositions 4.1 to 4.3, measured", {name: [row[i] for row in rows] for i, name in enumerate(names)},
        f"reference: what a random subspace gives, or the number asked for. holds: up to {ZERO:g}.",
    )


def figures(fits: list[Fit]) -> list[Figure]:
    figures = [
        Figure(
            "augmentations", "bar", "Share of each augmentation that the projector lets through",
            "Low: in the kernel. A random subspace lets rank / d of anything through.",
            "augmentations", "augmentation", "share", low="low", high="high", x_label="augmentation",
            y_label="share let through",
        ),
        Figure(
            "strengths", "line", "Share let through, by strength",
            "A kernel that holds small steps only rises to the right: the direction turns as the augmentation grows.",
            "strengths", "strength", "share", "augmentation", low="low", high="high", x_label="share of the full strength",
            y_label="share let through",
        ),
    ]
    if fits:
        figures.append(Figure(
            "generators", "bar", "Is there one generator for all images?",
            "R2 on held-out images. Near 1: v = eps G h. Like the constant: the same shift for every image.",
            "fits", "generator", "r2", "tested_at", low="low", high="high", x_label="parameter", y_label="held-out R2",
        ))
    return figures


def remarks(
    two: Moved, moves: list[Moved], fits: list[Fit], r: int, bands: Bands, local: int | None
) -> list[str]:
    notes = []
    n, d = two.v.shape
    if r == 0:
        notes.append("The projector gives all images one output: W is zero, its kernel is all of h, and nothing passes.")
    elif r == d:
        notes.append(f"W has rank {d}, the width of h: its kernel is zero, and everything passes by construction.")
    elif two.share >= bands[two.name, 1.0][0]:
        notes.append("W lets no less of the augmentations through than random subspaces do: they are not in its kernel.")
    if local is not None:
        notes.append(
            f"The projector is not affine: shares are those of its local map at {local} images, rank and nullity those of "
            "their mean rank. v may reach beyond the region of h(1); the split along and across is of the outputs themselves."
        )
    still = [m.name for m in moves if m.still and m.strength == 1]
    if still:
        notes.append(f"{', '.join(still)}: moves the features by no more than rounding, so that no share is given.")
    poor = [f.line.name for f in fits if f.r2["small"][0] < HALF]
    if poor:
        notes.append(f"{', '.join(poor)}: no one generator explains half of v on held-out images; its share says little.")
    if fits and fits[0].found.n < 2 * d:
        notes.append(f"Generators of {d} x {d} numbers are fitted on {fits[0].found.n} images: the ridge decides much of them.")
    if n <= d:
        notes.append(f"{n} images for {d} dimensions: the rank of the directions is at most {n}.")
    return notes
