"""linear: what a linear map and nearest neighbours read from frozen features, beside pixels and a random encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.probes import numbers, subject
from geomssl.probes.classifier import Classifier, fit, nearest_neighbours, proportion, wilson
from geomssl.probes.fitting import Solver
from geomssl.probes.numbers import mean_interval
from geomssl.probes.question import LABEL, Question, ask, check_frozen, train_sample

__all__ = ["Classifier", "Options", "check_frozen", "fit", "nearest_neighbours", "probe", "train_sample", "wilson"]


class Options(subject.Options):
    """Settings of the linear probe."""

    target: str = Field(LABEL, description="what is read: label, or a factor of the data set (session, azimuth)")
    within: bool = Field(
        False, description="fit on one half of the measured split and measure the other, whole objects apart where possible"
    )
    solver: Solver = Field(
        "lbfgs", description="lbfgs (of a number: closed form), its penalty chosen; or sgd, 100 epochs by CIPER's schedule"
    )
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
    """What a linear map and kNN read of the target from h, with z, the random encoder and raw pixels beside it.

    A category (the label, a session) by a classifier and as accuracy; a number (azimuth) by regression (`numbers.artifact`).
    """
    check_frozen(subject.encoder)
    subject.need(2, "an accuracy")
    question = ask(subject, options.target, subject.choose(options), options.train_n, options.seed, options.within)
    notes = [*question.about, "The figures are of this one state of the encoder, not of the best of several."]
    if subject.source.split == "train" and not options.within:
        notes.append("These are training images: the classifier has seen them, and the accuracy says little.")
    notes += subject.projector_remarks() if options.beside else []
    kinds = _kinds(subject, question, options.beside, notes)
    if question.category:
        return _classified(subject, question, kinds, options, notes)
    return numbers.artifact(subject, question, kinds, options, notes)


def _kinds(
    subject: subject.Subject, question: Question, beside: bool, notes: list[str]
) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Name, key, training and test features of every kind that is compared."""
    part, train, test = question.part, question.train, question.test
    yield "encoder", "h", subject.features(train, "h", part), subject.features(test, "h")
    if not beside:
        return
    if subject.projector is not None:
        yield "projector", "z", subject.features(train, "z", part), subject.features(test, "z")
    twin = subject.random_twin()
    if twin is None:
        notes.append("No random encoder beside it: how this encoder is initialised is not known.")
    else:
        check_frozen(twin.encoder)
        yield "random encoder", "random", twin.features(train, "h", part), twin.features(test, "h")
    yield "raw pixels", "pixels", subject.features(train, "pixels", part), subject.features(test, "pixels")


def _classified(
    subject: subject.Subject, question: Question, kinds: Iterator[tuple[str, str, Tensor, Tensor]], options: Options,
    notes: list[str],
) -> Artifact:
    known, wanted = question.known, question.wanted
    k = min(options.k, len(known))
    if k < options.k:
        notes.append(f"kNN uses k = {k}: there are no more training images.")
    readings = []
    for name, key, train, test in kinds:
        fitted = fit(train, known, options.seed, held_out=options.held_out, solver=options.solver)
        if not fitted.converged:
            notes.append(f"The linear classifier on {name} stopped at its iteration limit; its accuracy is a lower bound.")
        right = fitted.predict(test) == wanted
        readings.append(Reading(name, key, "linear", right, f"lambda = {fitted.strength:g}"))
        right = nearest_neighbours(train, known, test, k) == wanted
        readings.append(Reading(name, key, "kNN", right, f"k = {k}"))
    chance = wanted == known.mode().values
    by = {(r.key, r.classifier): r for r in readings}
    word = "class" if question.name == LABEL else question.name
    classifier = "multinomial logistic regression on frozen, standardised features, " + (
        "its regularisation chosen on a held-out part of the training images" if options.solver == "lbfgs" else
        "by SGD: Nesterov .9, weight decay 1e-6, 100 epochs, the rate from 1 divided by 3.33 every 10"
    )
    return Artifact(
        probe="linear",
        title="Accuracy of a linear classifier and of nearest neighbours" + ("" if word == "class" else f": {word}"),
        headline=_headline(by, word, float(chance.double().mean())),
        definition=(
            f"Top-1 accuracy of the {word} on images that the classifier never saw, every image weighing the same. linear: "
            f"{classifier}. kNN: the majority among the {k} most cosine-similar training images. Chance: the most frequent "
            f"{word} of the training images."
        ),
        metrics=_metrics(by, chance, question, options.seed),
        tables=[_table(readings, question), _per_class(by["h", "linear"], question, subject)],
        figures=[
            Figure(
                "accuracy", "bar", "Accuracy from frozen features",
                f"Bars: 95 % intervals over {question.word}, {len(wanted)} test images. "
                f"Chance is {float(chance.double().mean()):.3f}.",
                "accuracy", "features", "accuracy", "classifier", "low", "high", x_label="features", y_label="top-1 accuracy",
            )
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _metrics(by: dict[tuple[str, str], Reading], chance: Tensor, question: Question, seed: int) -> list[Metric]:
    metrics, n = [], len(chance)
    for (key, classifier), reading in by.items():
        name = "linear" if classifier == "linear" else "knn"
        metrics.append(
            Metric(
                name if key == "h" else f"{name}_{key}", reading.accuracy, n, *_bounds(reading.right, question),
                better="higher" if key == "h" else None, about=f"{classifier} on {reading.features}, {reading.about}",
            )
        )
    metrics.append(
        Metric(
            "chance", float(chance.double().mean()), n, *_bounds(chance, question),
            about="always answering the most frequent training class",
        )
    )
    for name in ("linear", "kNN"):
        for key in ("random", "pixels"):
            if (key, name) in by:
                gain = by["h", name].right.double() - by[key, name].right.double()
                metrics.append(
                    Metric(
                        f"{name.lower()}_gain_over_{key}", float(gain.mean()), n, mean_interval(gain, question, seed),
                        better="higher", about=f"accuracy on h minus accuracy on {by[key, name].features}, same test images",
                    )
                )
    return metrics


def _bounds(right: Tensor, question: Question) -> tuple[Interval | None, str | None]:
    found = proportion(right, question.unit, question.word)
    return found, None if found else "one object"


def _headline(by: dict[tuple[str, str], Reading], word: str, chance: float) -> str:
    main = by["h", "linear"]
    others = [f"{by[key, 'linear'].accuracy:.3f} from {what}" for key, what in
              (("random", "the random encoder"), ("pixels", "raw pixels")) if (key, "linear") in by]
    return (
        f"A linear classifier reads the {word} of {main.accuracy:.1%} of {len(main.right)} test images from the frozen "
        f"features ({'; '.join([*([', '.join(others)] if others else []), f'chance {chance:.3f}'])})."
    )


def _table(readings: list[Reading], question: Question) -> Table:
    bounds = [proportion(r.right, question.unit, question.word) for r in readings]
    count = len(readings)
    return Table(
        "accuracy", "Accuracy by features and classifier",
        {
            "features": [r.features for r in readings],
            "classifier": [r.classifier for r in readings],
            "accuracy": [r.accuracy for r in readings],
            "low": [b.low if b else None for b in bounds],
            "high": [b.high if b else None for b in bounds],
            "n": [len(question.wanted)] * count,
            "trained_on": [len(question.known)] * count,
            "setting": [r.about for r in readings],
        },
        f"low and high: 95 % interval over {question.word}.",
    )


def _per_class(main: Reading, question: Question, subject: subject.Subject) -> Table:
    found = question.wanted.unique()
    within = [question.wanted == c for c in found]
    right = [main.right[rows] for rows in within]
    units = [None if question.unit is None else question.unit[rows] for rows in within]
    bounds = [proportion(r, unit, question.word) for r, unit in zip(right, units, strict=True)]
    named = subject.class_names(found) if question.name == LABEL else [str(int(v)) for v in found]
    return Table(
        "classes", f"Accuracy of the linear classifier on h, by {'class' if question.name == LABEL else question.name}",
        {
            "class": named,
            "accuracy": [float(r.double().mean()) for r in right],
            "low": [b.low if b else None for b in bounds],
            "high": [b.high if b else None for b in bounds],
            "n": [len(r) for r in right],
        },
        f"low and high: 95 % interval over {question.word}; none where there is one.",
    )
