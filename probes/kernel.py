"""kernel: how much of what each augmentation does to h the projector lets through, and is its generator in Ker(W')."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Interval, Metric
from geomssl.errors import GeomsslError
from geomssl.probes import affine, checks, subject
from geomssl.probes.assurance import bootstrap_mean, bootstrap_ratio, interval
from geomssl.probes.directions import Along, Line, Scaled, gradual, lines, parts
from geomssl.probes.explained import threshold
from geomssl.probes.generator_fit import fit_generator
from geomssl.probes.kernel_tables import (
    HALF,
    TWO,
    Fit,
    Moved,
    figures,
    fit_table,
    generator_table,
    moves_table,
    remarks,
    statements,
)
from geomssl.probes.local import exact_copy, local_maps, share_metric
from geomssl.probes.passing import Seen, along_across, least_share, let_through, random_shares, seen
from geomssl.probes.rank import rank
from geomssl.progress import track
from geomssl.seeding import generator
from geomssl.transforms import policy as named_policy
from geomssl.transforms.base import Transform

__all__ = ["Options", "along_across", "fit_generator", "least_share", "let_through", "probe", "random_shares"]
Features = Callable[..., Tensor]


class Options(subject.Options):
    """Settings of the kernel probe."""

    n: int | None = Field(1000, description="images to use, each passed about twenty times")
    strengths: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0), description="shares of the strength of each part, up to 1")
    local: int = Field(128, ge=4, description="images at which the local map of a non-linear projector is taken")
    draws: int = Field(100, ge=20, le=10_000, description="random subspaces of the null")
    tau: float = Field(1e-3, gt=0, lt=1, description="threshold of the rank of the directions, a share of the largest")
    cutoff: float | None = Field(
        None, ge=0, lt=1, description="singular values up to this share of the largest count as zero; not given: max(d, p) eps"
    )


class _Bench:
    """The projector in float64, and its map at given features: one for all where it is affine."""

    def __init__(self, projector: nn.Module, h: Tensor, options: Options) -> None:
        self.projector, self.options = projector, options
        self.exact = exact_copy(projector)
        self.affine = affine.is_affine(self.exact, h)
        few = torch.randperm(len(h), generator=generator(options.seed, "kernel-local"))[: options.local].sort().values
        self.rows = torch.arange(len(h)) if self.affine else few
        self.one = self._of(h[:1]) if self.affine else None

    def _of(self, h: Tensor) -> Seen:
        maps = local_maps(self.projector, h)
        self.cutoff = threshold(self.projector, (maps.shape[1], maps.shape[2]), self.options.cutoff)
        return seen(maps, self.cutoff)

    def at(self, h: Tensor) -> Seen:
        return self.one or self._of(h[self.rows])

    def two_views(self, features: Features, policy: Transform, eps: float) -> Moved:
        h1, h2 = features(policy, 1), features(policy, 2)
        return self.move(TWO, 1.0, h1, h2, self.at(h1), eps)

    @torch.no_grad()
    def move(self, name: str, strength: float, h: Tensor, moved: Tensor, map_: Seen, eps: float) -> Moved:
        """eps: rounding of the features as they were computed."""
        v = moved - h
        z, z2 = self.exact(h.clone()), self.exact(moved.clone())
        passed, amplified = map_.energies(v[self.rows])
        along, across = along_across(z2 - z, z)
        energy = v.square().sum(dim=1)
        spread = float((h - h.mean(dim=0)).square().sum())
        still = float(energy.sum()) <= (64 * eps) ** 2 * float(h.square().sum())
        size = (float(energy.sum()) / spread) ** 0.5 if spread > 0 else 0.0
        return Moved(
            name, strength, h, v, passed, amplified, energy[self.rows], along, across, F.cosine_similarity(z, z2), size, still
        )


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Directions of augmentation of the training's policy, part by part and strength by strength, against Ker(W')."""
    projector = subject.need_projector("kernel")
    subject.need(8, "directions and held-out ones")
    if not options.strengths or not all(0 < s <= 1 for s in options.strengths):
        raise GeomsslError(f"strengths {options.strengths}", "shares above 0, up to 1", reason="bad-value")
    indices = subject.choose(options, least=8)
    notes: list[str] = []
    policy = subject.training_policy(notes)
    eps = torch.finfo(subject.dtype).eps

    def features(transform: Transform | None, number: int = 1) -> Tensor:
        view = None if transform is None else (transform, options.seed, number)
        return checks.matrix(subject.features(indices, "h", view=view), "features h")

    h = checks.varied(subject.features(indices, "h"), "features h")
    checks.matrix(subject.features(indices, "z"), "projector outputs")
    bench = _Bench(projector, h, options)
    at, two = bench.at(h), bench.two_views(features, policy, eps)
    if two.still:
        notes.append(
            f"The views of the training ({policy.name}) have the same h, so that v is zero: the policy simclr stands in here."
        )
        policy = named_policy("simclr")
        two = bench.two_views(features, policy, eps)
    if two.still:
        raise GeomsslError("two views with the same features", "an augmentation that moves them", reason="degenerate")
    channels, side = subject.source.channels, subject.source.size
    acting, idle = parts(policy, channels)
    grid = [
        (name, s) for name, part in acting.items()
        for s in (sorted({*options.strengths, 1.0}) if gradual(part, channels) else [1.0])
    ]
    moves = [two]
    for name, strength in track(grid, "parts of the policy"):
        moves.append(bench.move(name, strength, h, features(Scaled(acting[name], strength)), at, eps))
    if idle:
        notes.append(f"{', '.join(idle)}: the identity on images of {channels} channel, left out.")
    fits = []
    for line in track(lines(policy, channels, (side, side), options.seed), "generators"):
        one = _fit(subject, indices, h, line, options, eps)
        if one is None:
            notes.append(f"{line.name}: moves the features by no more than rounding; no generator.")
        else:
            fits.append(one)
    r, d = round(at.rank), h.shape[1]
    sets = {(m.name, m.strength): m.v[bench.rows].T @ m.v[bench.rows] for m in moves if not m.still}
    sets |= {(f.line.name, -1.0): f.found.matrix @ f.found.matrix.T for f in fits}
    low, high = interval(random_shares(torch.stack(list(sets.values())), r, options.draws, options.seed), 0.95)
    bands = dict(zip(sets, zip(low.tolist(), high.tolist(), strict=True), strict=True))
    columns = [at.columns(f.found.matrix) for f in fits]
    squares = [at.columns(f.found.matrix @ f.found.matrix)[0] for f in fits]
    tables = [
        moves_table("augmentations", "Every part of the policy alone, at full strength", moves, bands, r / d, options.seed),
        moves_table("strengths", "Every part at every strength", moves[1:], bands, r / d, options.seed),
        generator_table(fits, columns, squares, bands, r / d),
        fit_table(fits),
        statements(two, r, fits, columns, r / d, options.tau),
    ]
    local = None if bench.affine else len(bench.rows)
    notes += checks.zeros(h, "h") + remarks(two, moves, fits, r, bands, local) + subject.projector_remarks()
    passed = float((two.along + two.across).sum())
    invariance = f"; {float(two.across.sum()) / passed:.1%} of what passes is seen by invariance" if passed > 0 else ""
    return Artifact(
        probe="kernel",
        title="Augmentations and the kernel of the projector",
        headline=(
            f"The projector lets {two.share:.1%} of the directions between two views through (random ones: {r / d:.1%}; "
            f"the least possible at rank {r}: {least_share(two.v, r):.1%}){invariance}."
        ),
        definition=(
            "v_i = h_i(2) - h_i(1) for two views, h(T x_i) - h(x_i) for a part T of the policy alone. share = sum ||P v_i||^2 "
            "/ sum ||v_i||^2 with P the projection on the columns of W (Ker(W') is where it is 0); amplified = sum ||W'v_i||^2 "
            "/ (sigma_1^2 sum ||v_i||^2). W'v is split along and across z(1) = g(h(1)), from the projector's own outputs. "
            "Strength s: parameters at identity + s (drawn - identity), the same draws for every s. Generator: v = eps G h by "
            "ridge regression on half of the images with eps up to half way to its end; R^2 = 1 - sum ||v - eps G h||^2 / "
            "sum ||v||^2 on the other half, and there at eps beyond half way too. "
            f"Singular values up to {bench.cutoff:.1e} of the largest count as zero. Float64; eval mode."
        ),
        metrics=_metrics(two, moves, fits, columns, r, d, options),
        tables=tables,
        figures=figures(fits),
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _fit(
    subject: subject.Subject, indices: Tensor, h: Tensor, line: Line, options: Options, eps: float
) -> Fit | None:
    """G from half of the images at small eps; tested on the other half at small and at larger eps."""
    order = torch.randperm(len(indices), generator=generator(options.seed, "kernel-halves"))
    train, held = (half.sort().values for half in order.tensor_split(2))

    def moved(near: float, far: float, rows: Tensor, number: int) -> tuple[Tensor, Tensor]:
        view = (Along(line, near, far), options.seed, number)
        found = checks.matrix(subject.features(indices[rows], "h", view=view), "features h")
        return found - h[rows], subject.view_params(indices[rows], "own", view)[:, 0].double()

    v, e = moved(0, HALF, train, 1)
    if float(v.square().sum()) <= (64 * eps) ** 2 * float(h[train].square().sum()):
        return None
    found = fit_generator(h[train], v, e)
    r2 = {}
    for name, near, far in (("small", 0.0, HALF), ("larger", HALF, 1.0)):
        v, e = moved(near, far, held, 2)
        r2[name] = _r2(v, found.step(h[held], e), options.seed)
        if name == "larger":
            flow = found.flow(h[held], e)
            if flow is not None and bool(torch.isfinite(flow).all()):
                r2["larger, exp"] = _r2(v, flow, options.seed)
            r2["larger, constant"] = _r2(v, e[:, None] * found.constant, options.seed)
    return Fit(line, found, r2)


def _r2(v: Tensor, guess: Tensor, seed: int) -> tuple[float, float, float]:
    left, total = (v - guess).square().sum(dim=1, keepdim=True), v.square().sum(dim=1, keepdim=True)
    low, high = bootstrap_ratio(left, total, seed)
    return 1 - float(left.sum() / total.sum()), 1 - float(high[0]) ** 2, 1 - float(low[0]) ** 2


def _metrics(
    two: Moved, moves: list[Moved], fits: list[Fit], columns: list[tuple[float, float]], r: int, d: int, options: Options
) -> list[Metric]:
    n = len(two.v)
    low, high = bootstrap_mean(two.similarity, options.seed)
    spectrum = rank(two.v, options.tau, relative=True)
    weights = "a property of the weights, not of a sample"
    metrics = [
        share_metric("share", two.passed, two.total, options.seed, "share of v = h(2) - h(1) that W lets through"),
        Metric("share_null", r / d, reason="a closed form: rank / d", about="expected share for a random subspace"),
        Metric("share_least", least_share(two.v, r), n, reason="an optimum over subspaces: biased towards 0 by its choice",
               about="least share that a projector of this rank could let through"),
        share_metric("amplified", two.amplified, two.total, options.seed, "||W'v||^2 / (sigma_1^2 ||v||^2)"),
        *_across(two, options.seed),
        Metric("similarity", float(two.similarity.mean()), n,
               Interval(float(low), float(high), "percentile bootstrap over images, 95 %"),
               about="mean cosine of the two projections; minus it is the invariance term"),
        Metric("rank_directions", float(spectrum), n, reason="a rank: repeated rows of a bootstrap would lower it",
               unit="dimensions", about=f"rank of the directions v, singular values from {options.tau:g} of the largest"),
        Metric("nullity", float(d - r), reason=weights, unit="dimensions", about="d - rank of W: the dimension of Ker(W')"),
    ]
    for one in moves[1:]:
        if one.strength == 1:
            about = f"share of the directions of {one.name} alone that W lets through"
            metrics.append(
                Metric(f"share_{_key(one.name)}", None, n, reason="moves the features by no more than rounding", about=about)
                if one.still else share_metric(f"share_{_key(one.name)}", one.passed, one.total, options.seed, about)
            )
    for fit, (passed, _) in zip(fits, columns, strict=True):
        for name in ("small", "larger"):
            value, below, above = fit.r2[name]
            metrics.append(Metric(
                f"generator_r2_{name}_{_key(fit.line.name)}", value, n - fit.found.n,
                Interval(below, above, "bootstrap over held-out images, 95 %: the fit held fixed"), better="higher",
                about=f"held-out R2 of v = eps G h along {fit.line.name}, {name} eps",
            ))
        metrics.append(Metric(
            f"generator_share_{_key(fit.line.name)}", passed, fit.found.n,
            reason="one fit; the spread of random subspaces is in the table generators",
            about="||P G||_F^2 / ||G||_F^2: share of the generator's columns that W lets through",
        ))
    return metrics


def _across(two: Moved, seed: int) -> list[Metric]:
    about = "share of ||W'v||^2 across W'h(1): the part that invariance sees"
    whole = two.along + two.across
    if not whole.sum() > 0:
        return [Metric("across", None, len(whole), reason="W'v is zero: nothing is let through", about=about)]
    return [share_metric("across", two.across, whole, seed, about)]


def _key(name: str) -> str:
    return name.replace(" ", "_").replace("-", "_")
