"""A linear classifier and nearest neighbours on frozen features, and the interval of what they get right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.artifact import Interval
from geomssl.errors import GeomsslError
from geomssl.probes import checks
from geomssl.probes.fitting import DECAY, STRENGTHS, Solver, descend, standard, stratified
from geomssl.progress import track


@dataclass(frozen=True)
class Classifier:
    """logits = features @ weight.T + bias; row j of weight (K, d) speaks for class classes[j]. float64.

    strength: the lambda that was chosen. held_out: its accuracy on the held-out part. converged: False where the optimiser
    stopped at its limit (a schedule ends where it ends).
    """

    weight: Tensor
    bias: Tensor
    classes: Tensor
    strength: float
    held_out: float
    converged: bool

    def logits(self, features: Tensor) -> Tensor:
        """Logits (n, K) of features (n, d), in float64."""
        return features.to(self.weight) @ self.weight.T + self.bias

    def predict(self, features: Tensor) -> Tensor:
        """The label (n,) with the largest logit."""
        return self.classes[self.logits(features).argmax(dim=1)]

    def module(self) -> nn.Linear:
        """The same map as a frozen layer, output j being class classes[j]."""
        layer = nn.Linear(self.weight.shape[1], len(self.weight)).to(self.weight).requires_grad_(False)
        layer.weight.copy_(self.weight)
        layer.bias.copy_(self.bias)
        return layer


def fit(
    features: Tensor, labels: Tensor, seed: int = 0, strengths: Sequence[float] = STRENGTHS, held_out: float = 0.2,
    solver: Solver = "lbfgs",
) -> Classifier:
    """Multinomial logistic regression on frozen features (n, d) with labels (n,).

        minimise over W, b   mean_i cross_entropy(W x_i + b, y_i) + lambda / 2 ||W||^2,    x standardised by the training set

    lbfgs: every lambda of `strengths` is fitted on a part of the training set; the one with the best accuracy on the rest
    (stratified share `held_out`; ties to the strongest) is fitted again on all of it. L-BFGS in float64.
    sgd: the schedule of row C8 (`fitting.descend`) on x / sqrt(number of features that vary), so that the rate 1 is stable;
    its weight decay 1e-6 is lambda = 1e-6 times that number, and nothing is chosen.
    The standardisation is folded into weight and bias; features that do not vary get no weight. Deterministic.
    Raises GeomsslError for features that are not finite, and for fewer than two classes.
    """
    exact = checks.matrix(features, "features")
    labels = labels.cpu()
    classes = labels.unique()
    if len(classes) < 2:
        raise GeomsslError(f"{len(labels)} training images of {len(classes)} class", "at least 2 classes", reason="one-class")
    if solver == "sgd":
        return _scheduled(exact, labels, seed)
    kept, aside = stratified(labels, held_out, seed)
    chosen, best = max(strengths), math.nan
    if len(strengths) > 1 and len(aside) and len(labels[kept].unique()) > 1:
        scores = {}
        for strength in track(sorted(strengths, reverse=True), "fit classifier", total=len(strengths)):
            trial = _fit_one(exact[kept], labels[kept], strength)
            scores[strength] = float((trial.predict(exact[aside]) == labels[aside]).double().mean())
        # max keeps the first of equals, and the strongest came first
        chosen = max(scores, key=lambda s: scores[s])
        best = scores[chosen]
    return _fit_one(exact, labels, chosen, best)


def _fit_one(exact: Tensor, labels: Tensor, strength: float, held_out: float = math.nan) -> Classifier:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    mean, scale = standard(exact)
    model = LogisticRegression(C=1 / (strength * len(exact)), max_iter=2000, tol=1e-6)
    # many small products: two BLAS threads that wait for each other took thirteen times as long as one
    with threadpool_limits(1, user_api="blas"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ConvergenceWarning)
        model.fit(((exact - mean) * scale).numpy(), labels.numpy())
    weight, bias = torch.from_numpy(model.coef_), torch.from_numpy(model.intercept_)
    if len(weight) == 1:
        # two classes come as one logit; half of it with either sign gives the same softmax
        weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
    weight = weight * scale
    converged = not any(issubclass(w.category, ConvergenceWarning) for w in said)
    return Classifier(weight, bias - weight @ mean, torch.from_numpy(model.classes_).long(), strength, held_out, converged)


def _scheduled(exact: Tensor, labels: Tensor, seed: int) -> Classifier:
    classes, wanted = labels.unique(return_inverse=True)
    mean, scale = standard(exact)
    varying = max(1, int((scale > 0).sum()))
    scale = scale / math.sqrt(varying)
    weight, bias = descend(
        (exact - mean) * scale, len(classes), lambda logits, chosen: F.cross_entropy(logits, wanted[chosen]), seed
    )
    weight = weight * scale
    return Classifier(weight, bias - weight @ mean, classes.long(), DECAY * varying, math.nan, True)


def nearest_neighbours(features: Tensor, labels: Tensor, queries: Tensor, k: int) -> Tensor:
    """Labels (m,) of queries (m, d): the majority among the k most cosine-similar rows of features (n, d) with labels (n,).

    Every neighbour has one vote; equal votes go to the smallest label. Rows of length zero are similar to nothing (0).
    Similarities in float64, in blocks of queries. Raises GeomsslError where k is not in 1..n.
    """
    if not 1 <= k <= len(features):
        raise GeomsslError(f"k = {k}", f"1 to {len(features)}, the number of training images", reason="bad-value")
    known = F.normalize(checks.matrix(features, "features"), dim=1)
    labels = labels.cpu()
    found = []
    for block in F.normalize(checks.matrix(queries, "features"), dim=1).split(1024):
        votes = labels[(block @ known.T).topk(k, dim=1).indices]
        found.append(F.one_hot(votes, int(labels.max()) + 1).sum(dim=1).argmax(dim=1))
    return torch.cat(found)


def wilson(correct: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion correct / n (Wilson 1927). Never empty at 0 or 1, unlike the Wald interval."""
    if not 0 <= correct <= n or n == 0:
        raise GeomsslError(f"{correct} of {n} correct", "0 <= correct <= n and n > 0", reason="bad-value")
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    p, shrink = correct / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


def proportion(right: Tensor, unit: Tensor | None = None, word: str = "images") -> Interval | None:
    """95 % interval of the share of `right` (n,), bool: Wilson's; where rows of one unit (n,) are alike, at the size n* < n.

        n* = n / max(1, deff) (z / t_{K-1})^2,   deff = K / (K - 1) sum_k (c_k - p n_k)^2 / (n p (1 - p))

    c_k of the n_k rows of unit k are right, K units; where p is 0 or 1, n* = K (z / t_{K-1})^2, as if all rows of a unit were
    one. None with fewer than two units. Source: Korn and Graubard, Survey Methodology 24, 1998; Wilson 1927.
    """
    n, p = len(right), float(right.double().mean())
    if unit is None:
        return Interval(*wilson(p * n, n), "Wilson score, 95 %")
    _, of = unit.unique(return_inverse=True)
    count = int(of.max()) + 1
    if count < 2:
        return None
    from scipy.stats import norm, t

    parts = torch.zeros(count, dtype=torch.float64).index_add(0, of, right.double() - p)
    deff = n / count if p in (0.0, 1.0) else count / (count - 1) * float(parts.square().sum()) / (n * p * (1 - p))
    size = n / max(1.0, deff) * float(norm.ppf(0.975) / t.ppf(0.975, count - 1)) ** 2
    return Interval(*wilson(p * size, size), f"Wilson score at the effective size over {word}, 95 %")
