"""Fitted actions: the affine map that best carries f(x) to f(T_g x), judged on images that it has not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from geomssl.errors import GeomsslError, unknown
from geomssl.probes import checks
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.rank import effective_rank
from geomssl.seeding import generator
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Size, Transform

Method = Literal["low-rank", "procrustes"]
METHODS = ("low-rank", "procrustes")
LEAST = 8
# The share of the training pairs on which a truncation is chosen, and the step between the ranks that are tried.
CHOOSING, STEP = 0.2, 1.2


class Bounds(NamedTuple):
    """Lower and upper bound of a figure."""

    low: float
    high: float


@dataclass(frozen=True, eq=False)
class FittedAction(Action):
    """The affine map of one element: moved = offset + matrix @ feature. An Action: `fitted(features)` moves every row.

    matrix (d, d), offset (d,): float64. basis (d, r): an orthonormal basis of the directions that the fit used; the matrix
    is zero outside their span, so that of two maps which agree on the features the smaller one is given.
    r2_train, r2_held_out: 1 - sum |moved - fitted|^2 / sum |moved - mean|^2 over the pairs it was fitted on, and over others;
    interval: of r2_held_out.  r2_identity: held-out R^2 of matrix = identity with a fitted offset.
    r2_null, nulls: the same fit after shuffling which feature belongs to which moved feature: mean of the draws, each draw.
    effective_rank: exp of the entropy of the matrix's singular values: how many directions it carries on.
    rank: r.
    """

    name = "fitted"

    matrix: Tensor
    offset: Tensor
    basis: Tensor
    method: str
    r2_train: float
    r2_held_out: float
    interval: Bounds
    r2_identity: float
    r2_null: float
    nulls: tuple[float, ...]
    effective_rank: float
    rank: int
    n: int
    n_train: int
    d: int
    warning: str | None
    transform: Transform | None = None  # type: ignore[assignment]

    def __call__(self, features: Tensor, params: Tensor | None = None, image_size: Size = (0, 0)) -> Tensor:
        rows = features.flatten(1)
        if rows.shape[1] != self.d:
            raise GeomsslError(
                f"features {tuple(features.shape)} under an action fitted on d = {self.d}", f"(n, {self.d})",
                reason="bad-features",
            )
        return (rows @ self.matrix.T.to(rows) + self.offset.to(rows)).view_as(features)

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        """False: a fitted map is an estimate, and no verdict on a declaration rests on it."""
        return torch.zeros(len(params), dtype=torch.bool, device=params.device)


class FittedActions(Action):
    """Several elements, one fit each: row i moves by the fit of params[i]; the identity leaves features as they are.

    Raises GeomsslError, when called, for an element that was not fitted.
    """

    name = "fitted"

    def __init__(self, transform: Transform, params: Tensor, fits: Sequence[FittedAction]) -> None:
        if len(params) != len(fits) or not len(fits):
            raise GeomsslError(f"{len(fits)} fits for {len(params)} elements", "one fit an element", reason="bad-parameters")
        self.transform, self.params, self.fits = transform, params, list(fits)

    def __call__(self, features: Tensor, params: Tensor, image_size: Size) -> Tensor:
        known = torch.cat([self.transform.identity(), self.params]).to(params)
        same = (params[:, None] == known[None]).all(dim=2)
        if not bool(same.any(dim=1).all()):
            raise GeomsslError(
                f"an element of {self.transform.name} that was not fitted", f"one of the {len(self.fits)} that were",
                reason="bad-parameters",
            )
        which = same.int().argmax(dim=1)
        moved = features.clone()
        for number in which.unique().tolist():
            if number:
                moved[which == number] = self.fits[number - 1](features[which == number])
        return moved

    def is_exact(self, params: Tensor, feature_size: Size, image_size: Size) -> Tensor:
        return torch.zeros(len(params), dtype=torch.bool, device=params.device)


def fit_action(
    features: Tensor,
    moved_features: Tensor,
    held_out: float = 0.5,
    method: Method = "low-rank",
    rank: int | None = None,
    ridge: float = 0.0,
    seed: int = 0,
    *,
    draws: int = 5,
    level: float = 0.95,
    resamples: int = 2000,
) -> FittedAction:
    """The affine action of one element, fitted on pairs f(x), f(T_g x): moved = matrix @ feature + offset, both centred.

    features, moved_features: (n, ...), row by row of the same images; more axes are flattened. n >= 8.
    held_out: share of the pairs, drawn by the seed, on which R^2 is judged.
    method:   "low-rank": least squares in the span of the leading `rank` principal directions of the training features,
                  matrix = Y' U_r S_r / (S_r^2 + lambda) V_r',   X = U S V',   lambda = ridge sum(S^2) / d;
              "procrustes": the map that keeps lengths on that span and fits best, by the SVD of Y' X (Schoenemann 1966).
    rank:     None: low-rank chooses it on a fifth of the training pairs (never on the held-out ones) and fits again on all of
              them; procrustes takes every direction. Directions under max(n, d) eps sigma_1 are left out, eps of the dtype.
    draws:    of the shuffled null.  level, resamples: of the interval of the held-out R^2, a percentile bootstrap.
    Matrices multiply in the order of the group, M_gh = M_g M_h, since f(T_g T_h x) = M_g f(T_h x). Ridge shrinks powers of a
    matrix, so that the group law is asked of fits without it. Raises GeomsslError for input that cannot be fitted.
    """
    return Fitter(features, held_out, seed, draws, level, resamples).fit(moved_features, method, rank, ridge)


class Fitter:
    """The fits of several elements from the same features: their SVD is computed once. See fit_action for the arguments."""

    def __init__(
        self, features: Tensor, held_out: float = 0.5, seed: int = 0, draws: int = 5, level: float = 0.95, resamples: int = 2000
    ) -> None:
        if features.dim() < 2 or len(features) < LEAST:
            raise GeomsslError(f"features {tuple(features.shape)}", f"(n, d) with n >= {LEAST}", reason="too-few-images")
        if not 0 < held_out < 1 or not 2 <= round(held_out * len(features)) <= len(features) - 4:
            raise GeomsslError(
                f"held_out = {held_out} of {len(features)} pairs", "a share that leaves 2 pairs to judge by and 4 to fit on",
                reason="bad-value",
            )
        self.x = checks.varied(features.flatten(1), "features")
        self.eps, self.seed, self.draws, self.level, self.resamples = (
            torch.finfo(features.dtype).eps, seed, draws, level, resamples
        )
        self.n, self.d = self.x.shape
        order = torch.randperm(self.n, generator=generator(seed, "fit-action"))
        self.held, self.train = order.split([round(held_out * self.n), self.n - round(held_out * self.n)])
        self.chooses, self.fits_on = self.train.split([
            max(1, round(CHOOSING * len(self.train))), len(self.train) - max(1, round(CHOOSING * len(self.train)))
        ])
        self.whole, self.part = self._span(self.train), self._span(self.fits_on)

    def _span(self, rows: Tensor) -> Span:
        mean = self.x[rows].mean(dim=0)
        u, s, vt = torch.linalg.svd(self.x[rows] - mean, full_matrices=False)
        kept = int((s > max(len(rows), self.d) * self.eps * s[0]).sum()) if s[0] > 0 else 0
        if not kept:
            raise GeomsslError("training features that are all equal", "features that differ", reason="degenerate")
        return Span(rows, mean, u[:, :kept], s[:kept], vt[:kept].T)

    def fit(
        self, moved_features: Tensor, method: Method = "low-rank", rank: int | None = None, ridge: float = 0.0
    ) -> FittedAction:
        """The fit of one element; see fit_action."""
        if method not in METHODS:
            raise unknown("method", method, METHODS)
        if rank is not None and rank < 1:
            raise GeomsslError(f"rank = {rank}", f"a whole number from 1 to {self.d}, or None", reason="bad-value")
        if not (ridge >= 0 and math.isfinite(ridge)):
            raise GeomsslError(f"ridge = {ridge}", "a number >= 0", reason="bad-value")
        if moved_features.shape[0] != self.n or moved_features.flatten(1).shape[1] != self.d:
            raise GeomsslError(
                f"moved features {tuple(moved_features.shape)}", f"({self.n}, {self.d}), row by row of the same images",
                reason="bad-features",
            )
        y = checks.varied(moved_features.flatten(1), "moved features")
        spread = y[self.held] - y[self.held].mean(dim=0)
        if not bool(spread.square().sum() > 0):
            raise GeomsslError("held-out moved features that are all equal", "features that differ", reason="degenerate")
        matrix, offset, used = self._solve(y, method, rank, ridge)
        held = self._residual(y, matrix, offset, self.held)
        low, high = bootstrap_ratio(
            held.square().sum(1, keepdim=True), spread.square().sum(1, keepdim=True), self.seed, self.level, self.resamples
        )
        by_identity = y[self.held] - self.x[self.held] - (y[self.train].mean(dim=0) - self.whole.mean)
        nulls = tuple(self._null(y, method, rank, ridge, draw) for draw in range(self.draws))
        return FittedAction(
            matrix=matrix, offset=offset, basis=self.whole.v[:, :used], method=method,
            r2_train=_r2(self._residual(y, matrix, offset, self.train), y[self.train]), r2_held_out=_r2(held, y[self.held]),
            interval=Bounds(1 - float(high) ** 2, 1 - float(low) ** 2), r2_identity=_r2(by_identity, y[self.held]),
            r2_null=sum(nulls) / len(nulls) if nulls else math.nan, nulls=nulls,
            effective_rank=effective_rank(matrix @ self.whole.v[:, :used]) if used else 0.0, rank=used, n=self.n,
            n_train=len(self.train), d=self.d, warning=self._warning(),
        )

    def _solve(self, y: Tensor, method: str, rank: int | None, ridge: float) -> tuple[Tensor, Tensor, int]:
        """Matrix, offset, and how many directions they use."""
        span = self.whole
        most = len(span.s)
        used = min(rank or most, most)
        if method == "procrustes":
            left, sizes, right = torch.linalg.svd((y[span.rows] - y[span.rows].mean(dim=0)).T @ self._scores(span, used),
                                                  full_matrices=False)
            kept = sizes > max(self.n, self.d) * torch.finfo(torch.float64).eps * sizes[0]
            matrix = left[:, kept] @ right[kept] @ span.v[:, :used].T
        else:
            used = self._choose(y, ridge) if rank is None else used
            matrix = self._coefficients(span, y, ridge)[:used].T @ span.v[:, :used].T
        return matrix, y[span.rows].mean(dim=0) - matrix @ span.mean, used

    @staticmethod
    def _scores(span: Span, used: int) -> Tensor:
        """The centred training features along the leading directions."""
        return span.u[:, :used] * span.s[:used]

    def _coefficients(self, span: Span, y: Tensor, ridge: float) -> Tensor:
        """Row k: what one unit along direction k adds to the moved feature, (r, d)."""
        shrink = ridge * float(span.s.square().sum()) / self.d
        weights = span.s / (span.s.square() + shrink)
        return weights[:, None] * (span.u.T @ (y[span.rows] - y[span.rows].mean(dim=0)))

    def _choose(self, y: Tensor, ridge: float) -> int:
        """The rank with the least error on the pairs that choose. Rank 0 leaves the mean alone."""
        span, most = self.part, len(self.part.s)
        along = (self.x[self.chooses] - span.mean) @ span.v
        each = self._coefficients(span, y, ridge)
        left = y[self.chooses] - y[span.rows].mean(dim=0)
        ranks, errors = [0], [float(left.square().sum())]
        while ranks[-1] < most:
            after = min(most, max(ranks[-1] + 1, int(ranks[-1] * STEP)))
            left = left - along[:, ranks[-1] : after] @ each[ranks[-1] : after]
            ranks.append(after)
            errors.append(float(left.square().sum()))
        best = ranks[min(range(len(ranks)), key=lambda i: errors[i])]
        # Every direction that the smaller part has means every direction that the whole has.
        return len(self.whole.s) if best == most else best

    def _residual(self, y: Tensor, matrix: Tensor, offset: Tensor, rows: Tensor) -> Tensor:
        return y[rows] - (self.x[rows] @ matrix.T + offset)

    def _null(self, y: Tensor, method: str, rank: int | None, ridge: float, draw: int) -> float:
        shuffled = y[torch.randperm(self.n, generator=generator(self.seed, "fit-null", draw))]
        matrix, offset, _ = self._solve(shuffled, method, rank, ridge)
        return _r2(self._residual(shuffled, matrix, offset, self.held), shuffled[self.held])

    def _warning(self) -> str | None:
        if len(self.train) >= 2 * self.d:
            return None
        return (
            f"{len(self.train)} training pairs are few against d = {self.d}: a fit can go through them whatever the features "
            "do, so that only the held-out R² counts, and it is a lower limit of what more images would show."
        )


class Span(NamedTuple):
    """The SVD of the centred features of some rows, without the directions that are rounding."""

    rows: Tensor
    mean: Tensor
    u: Tensor
    s: Tensor
    v: Tensor


def _r2(residual: Tensor, y: Tensor) -> float:
    """1 - sum |residual|^2 / sum |y - mean|^2, over all coordinates at once."""
    spread = float((y - y.mean(dim=0)).square().sum())
    return 1 - float(residual.square().sum()) / spread if spread > 0 else math.nan


class Orbit(NamedTuple):
    """Least-squares matrices (|G|, d, d) of every element on one span, with its mean, its basis (d, r) and singular values."""

    least_squares: Tensor
    mean: Tensor
    basis: Tensor
    s: Tensor
    rows: int

    @property
    def judgeable(self) -> bool:
        """Enough rows to judge a law by: with as few as the span has directions, any network would meet it."""
        return self.rows >= 4 * self.basis.shape[1]

    def procrustes(self) -> Tensor:
        """The matrices (|G|, d, d) that keep lengths on the span and fit best."""
        left, _, right = torch.linalg.svd(self.least_squares @ (self.basis * self.s.square()), full_matrices=False)
        return left @ right @ self.basis.T


def fit_orbit(features: Tensor, products: Tensor) -> Orbit:
    """The matrices of a whole finite group, fitted on orbits, so that their span moves into itself.

    features (|G|, n, d): f(T_h x) for every h. M_g is fitted on all pairs f(T_h x), f(T_gh x), centred on the mean of all
    orbits, without ridge and on every direction above rounding. products (|G|, |G|): the index of gh. Features of upright
    images alone span less (a unit may never fire for them), and no law could hold there, not even for an exact network.
    Raises GeomsslError where the features are all equal.
    """
    order, n, d = features.shape
    flat = checks.varied(features.flatten(0, 1), "features")
    mean = flat.mean(dim=0)
    u, s, vt = torch.linalg.svd(flat - mean, full_matrices=False)
    kept = int((s > max(len(flat), d) * torch.finfo(features.dtype).eps * s[0]).sum())
    u, s, v = u[:, :kept], s[:kept], vt[:kept].T
    images = (flat - mean).view(order, n, d)
    weights = u / s
    found = [images[products[g]].flatten(0, 1).T @ weights @ v.T for g in range(order)]
    return Orbit(torch.stack(found), mean, v, s, len(flat))


def group_law(matrices: Tensor, products: Tensor, basis: Tensor) -> Tensor:
    """|(M_g M_h - M_gh) B| / |M_gh B| in the Frobenius norm for every pair, (|G|, |G|): 0 where the fits are a representation.

    matrices (|G|, d, d), products (|G|, |G|): the index of gh, basis B (d, r): the span of the features, as of fit_orbit. Ask
    it of fits without ridge and at full rank, or of Procrustes fits: shrinking a matrix shrinks its powers more.
    """
    on_span = matrices @ basis
    found = torch.empty(products.shape, dtype=torch.float64)
    for g in range(len(matrices)):
        wanted = on_span[products[g]]
        gap = torch.linalg.vector_norm(matrices[g] @ on_span - wanted, dim=(1, 2))
        found[g] = gap / torch.linalg.vector_norm(wanted, dim=(1, 2))
    return found


def permutation_distance(fit: FittedAction) -> tuple[float, Tensor]:
    """The nearest permutation P and its distance min_P |(M - P) B| / |P B| on the span of the features: (distance, indices).

    moved[i] = feature[indices[i]] under P. By |M B|^2 - 2 max_P <P, M B B'> + r, an assignment (Kuhn 1955). Two vectors that
    have nothing to do with each other are about sqrt(2) apart.
    """
    from scipy.optimize import linear_sum_assignment

    on_span = fit.matrix @ fit.basis
    gain = on_span @ fit.basis.T
    rows, columns = linear_sum_assignment(gain.numpy(), maximize=True)
    best = float(gain[torch.as_tensor(rows), torch.as_tensor(columns)].sum())
    squared = float(on_span.square().sum()) - 2 * best + fit.rank
    if squared < 1e-6 * fit.rank:
        # The difference of two near numbers is rounding: take the norm itself.
        squared = float((on_span - fit.basis[torch.as_tensor(columns)]).square().sum())
    return math.sqrt(max(0.0, squared) / fit.rank), torch.as_tensor(columns)


def agreement(fit: FittedAction, declared: Tensor) -> float:
    """|(M - Γ) B| / |Γ B|, how far the fitted matrix is from a declared one (d, d) on the span of the features; 0: the same."""
    wanted = declared.double() @ fit.basis
    size = float(torch.linalg.matrix_norm(wanted))
    return float(torch.linalg.matrix_norm(fit.matrix @ fit.basis - wanted)) / size if size > 0 else math.inf


def matrix_of(action: Any, params: Tensor, shape: Sequence[int], image_size: Size) -> Tensor:
    """The matrix (d, d) of a linear action of one element on features of that shape (without the axis of images), float64."""
    d = math.prod(shape)
    units = torch.eye(d, dtype=torch.float64).view(d, *shape)
    return action(units, params.expand(d, -1), image_size).reshape(d, d).T
