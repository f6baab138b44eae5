"""linear: what a linear classifier and nearest neighbours read from frozen features, beside pixels and a random encoder."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import checks, subject
from geomssl.probes.assurance import bootstrap_mean
from geomssl.progress import track
from geomssl.seeding import generator

STRENGTHS = (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)


@dataclass(frozen=True)
class Classifier:
    """logits = features @ weight.T + bias; row j of weight (K, d) speaks for class classes[j]. float64.

    strength: the lambda that was chosen. held_out: its accuracy on the held-out part. converged: did the optimiser say so.
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
    features: Tensor, labels: Tensor, seed: int = 0, strengths: Sequence[float] = STRENGTHS, held_out: float = 0.2
) -> Classifier:
    """Multinomial logistic regression on frozen features (n, d) with labels (n,), its regularisation chosen by itself.

        minimise over W, b   mean_i cross_entropy(W x_i + b, y_i) + lambda / 2 ||W||^2,    x standardised by the training set

    Every lambda of `strengths` is fitted on a part of the training set; the one with the best accuracy on the rest
    (stratified share `held_out`; ties to the strongest) is fitted again on all of it. L-BFGS in float64. The
    standardisation is folded into weight and bias; features that do not vary get no weight. Deterministic.
    Raises GeomsslError for features that are not finite, and for fewer than two classes.
    """
    exact = checks.matrix(features, "features")
    labels = labels.cpu()
    classes = labels.unique()
    if len(classes) < 2:
        raise GeomsslError(f"{len(labels)} training images of {len(classes)} class", "at least 2 classes", reason="one-class")
    kept, aside = _stratified(labels, held_out, seed)
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

    mean, std = exact.mean(dim=0), exact.std(dim=0, correction=0)
    # a spread at the level of float32 rounding is no feature; dividing by it would make it one
    scale = torch.where(std > 1e-6 * mean.abs(), 1 / std.clamp_min(1e-300), 0.0)
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


def _stratified(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices kept and held out: round(share n_c) of every class, and always one of each kept."""
    kept, aside = [], []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator(seed, "linear-held-out", int(label)))]
        cut = min(round(share * len(members)), len(members) - 1)
        aside.append(members[:cut])
        kept.append(members[cut:])
    return torch.cat(kept).sort().values, torch.cat(aside).sort().values


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


def wilson(correct: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion correct / n (Wilson 1927). Never empty at 0 or 1, unlike the Wald interval."""
    if not 0 <= correct <= n or n == 0:
        raise GeomsslError(f"{correct} of {n} correct", "0 <= correct <= n and n > 0", reason="bad-value")
    z = float(torch.special.ndtri(torch.tensor((1 + level) / 2, dtype=torch.float64)))
    p, shrink = correct / n, 1 + z**2 / n
    centre = (p + z**2 / (2 * n)) / shrink
    half = z / shrink * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half))


class Options(subject.Options):
    """Settings of the linear probe."""

    k: int = Field(20, ge=1, description="neighbours that vote in the cosine kNN")
    train_n: int | None = Field(None, ge=2, description="training images to use; all of them when not given")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the training images on which the regularisation is chosen")
    beside: bool = Field(True, description="read z, the random encoder and raw pixels too; raw pixels take most of the time")


@dataclass(frozen=True)
class Reading:
    """One classifier on one kind of features: which test images it got right."""

    features: str
    key: str
    classifier: str
    right: Tensor
    about: str

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """Top-1 accuracy of a linear classifier and of kNN on h, with z, the random encoder and raw pixels beside it."""
    check_frozen(subject.encoder)
    indices = subject.choose(options)
    labels = subject.need_labels("a classifier").cpu()[indices]
    subject.need(2, "an accuracy")
    train_indices = train_sample(subject, options.train_n, options.seed)
    known = subject.need_labels("a classifier", "train").cpu()[train_indices]
    k = min(options.k, len(train_indices))
    notes: list[str] = []
    readings = []
    for name, key, train, test in _kinds(subject, train_indices, indices, options.beside, notes):
        fitted = fit(train, known, options.seed, held_out=options.held_out)
        if not fitted.converged:
            notes.append(f"The linear classifier on {name} stopped at its iteration limit; its accuracy is a lower bound.")
        right = fitted.predict(test) == labels
        readings.append(Reading(name, key, "linear", right, f"lambda = {fitted.strength:g}"))
        right = nearest_neighbours(train, known, test, k) == labels
        readings.append(Reading(name, key, "kNN", right, f"k = {k}"))
    majority = known.mode().values
    chance = (labels == majority).double()
    notes += _remarks(subject, labels, known, k, options) + subject.projector_remarks()
    by = {(r.key, r.classifier): r for r in readings}
    main = by["h", "linear"]
    return Artifact(
        probe="linear",
        title="Accuracy of a linear classifier and of nearest neighbours",
        headline=_headline(by, float(chance.mean()), len(labels)),
        definition=(
            "Top-1 accuracy on images that the classifier never saw, every image weighing the same. linear: multinomial "
            "logistic regression on frozen, standardised features, its regularisation chosen on a held-out part of the "
            f"training split. kNN: the majority among the {k} most cosine-similar training images. Chance: the majority class."
        ),
        metrics=_metrics(by, chance, options.seed),
        tables=[_table(readings, len(labels), len(known)), _per_class(main, labels, subject)],
        figures=[
            Figure(
                "accuracy", "bar", "Accuracy from frozen features",
                f"Bars: Wilson's 95 % interval over {len(labels)} test images. Chance is {float(chance.mean()):.3f}.",
                "accuracy", "features", "accuracy", "classifier", "low", "high", x_label="features", y_label="top-1 accuracy",
            )
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def check_frozen(encoder: nn.Module) -> None:
    """Raise unless the encoder is in eval mode with every parameter frozen: else the accuracy is not one of its features."""
    moving = [name or "the encoder" for name, module in encoder.named_modules() if module.training]
    learning = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if moving or learning:
        raise GeomsslError(
            f"an encoder with {(moving or learning)[0]} {'in training mode' if moving else 'that still learns'}",
            "one in eval mode with frozen parameters", reason="not-frozen",
        )


def train_sample(subject: subject.Subject, n: int | None, seed: int) -> Tensor:
    """Sorted indices of the training images to use: all, or a seeded draw of n of them."""
    subject.need(2, "a classifier", "train")
    return subject.choose(_Draw(n=n, seed=seed), "train")


class _Draw(subject.Options):
    """A draw from the training split, whose size is another option than that of the measured split."""


def _kinds(
    subject: subject.Subject, train: Tensor, test: Tensor, beside: bool, notes: list[str]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Name, key, training and test features of every kind that is compared."""
    yield "encoder", "h", subject.features(train, "h", "train"), subject.features(test, "h")
    if not beside:
        return
    if subject.projector is not None:
        yield "projector", "z", subject.features(train, "z", "train"), subject.features(test, "z")
    twin = subject.random_twin()
    if twin is None:
        notes.append("No random encoder beside it: how this encoder is initialised is not known.")
    else:
        check_frozen(twin.encoder)
        yield "random encoder", "random", twin.features(train, "h", "train"), twin.features(test, "h")
    yield "raw pixels", "pixels", subject.features(train, "pixels", "train"), subject.features(test, "pixels")


def _remarks(subject: subject.Subject, labels: Tensor, known: Tensor, k: int, options: Options) -> list[str]:
    notes = ["The accuracy is that of this one state of the encoder, not the best of several."]
    if subject.source.split == "train":
        notes.append("These are training images: the classifier has seen them, and the accuracy says little.")
    unseen = int((~torch.isin(labels, known)).sum())
    if unseen:
        notes.append(f"{unseen} test images belong to classes that the training split does not have; they count as wrong.")
    if k < options.k:
        notes.append(f"kNN uses k = {k}: there are no more training images.")
    return notes


def _metrics(by: dict[tuple[str, str], Reading], chance: Tensor, seed: int) -> list[Metric]:
    metrics = []
    for (key, classifier), reading in by.items():
        n = len(reading.right)
        low, high = wilson(int(reading.right.sum()), n)
        name = "linear" if classifier == "linear" else "knn"
        metrics.append(
            Metric(
                name if key == "h" else f"{name}_{key}", reading.accuracy, n, Interval(low, high, "Wilson score, 95 %"),
                better="higher" if key == "h" else None, about=f"{classifier} on {reading.features}, {reading.about}",
            )
        )
    low, high = wilson(int(chance.sum()), len(chance))
    metrics.append(
        Metric(
            "chance", float(chance.mean()), len(chance), Interval(low, high, "Wilson score, 95 %"),
            about="always answering the most frequent training class",
        )
    )
    for name in ("linear", "kNN"):
        for key in ("random", "pixels"):
            if (key, name) in by:
                gain = by["h", name].right.double() - by[key, name].right.double()
                bounds = [float(b) for b in bootstrap_mean(gain, seed)]
                metrics.append(
                    Metric(
                        f"{name.lower()}_gain_over_{key}", float(gain.mean()), len(gain),
                        Interval(bounds[0], bounds[1], "percentile bootstrap over images, paired, 95 %"), better="higher",
                        about=f"accuracy on h minus accuracy on {by[key, name].features}, same test images",
                    )
                )
    return metrics


def _headline(by: dict[tuple[str, str], Reading], chance: float, n: int) -> str:
    others = [f"{by[key, 'linear'].accuracy:.3f} from {what}" for key, what in
              (("random", "the random encoder"), ("pixels", "raw pixels")) if (key, "linear") in by]
    return (
        f"A linear classifier reads the class of {by['h', 'linear'].accuracy:.1%} of {n} test images from the frozen features "
        f"({'; '.join([*([', '.join(others)] if others else []), f'chance {chance:.3f}'])})."
    )


def _table(readings: list[Reading], n: int, trained: int) -> Table:
    bounds = [wilson(int(r.right.sum()), n) for r in readings]
    return Table(
        "accuracy", "Accuracy by features and classifier",
        {
            "features": [r.features for r in readings],
            "classifier": [r.classifier for r in readings],
            "accuracy": [r.accuracy for r in readings],
            "low": [b[0] for b in bounds],
            "high": [b[1] for b in bounds],
            "n": [n] * len(readings),
            "trained_on": [trained] * len(readings),
            "setting": [r.about for r in readings],
        },
        "low and high: Wilson's 95 % interval.",
    )


def _per_class(main: Reading, labels: Tensor, subject: subject.Subject) -> Table:
    found = labels.unique()
    right = [int(main.right[labels == c].sum()) for c in found]
    total = [int((labels == c).sum()) for c in found]
    bounds = [wilson(r, t) for r, t in zip(right, total, strict=True)]
    return Table(
        "classes", "Accuracy of the linear classifier on h, by class",
        {
            "class": subject.class_names(found),
            "accuracy": [r / t for r, t in zip(right, total, strict=True)],
            "low": [b[0] for b in bounds],
            "high": [b[1] for b in bounds],
            "n": total,
        },
        "low and high: Wilson's 95 % interval.",
    )
