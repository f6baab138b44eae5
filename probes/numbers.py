"""linear, for a factor that is a number: what ridge regression reads of it, as R^2 and as a mean error in its own unit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.probes import ridge
from geomssl.probes.assurance import METHOD, bootstrap_ratio, interval, resampled_sums, summed
from geomssl.probes.changes import encode, r2
from geomssl.probes.fitting import Solver
from geomssl.probes.question import Question
from geomssl.probes.subject import Subject
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter

RESAMPLES = 2000
# More points than these are a cloud and a large file.
POINTS = 500


@dataclass(frozen=True)
class Reading:
    """One kind of features: predicted (n,) in the factor's unit; squares, deviations (n,) of R^2; error (n,), absolute."""

    name: str
    key: str
    predicted: Tensor
    squares: Tensor
    deviations: Tensor
    error: Tensor
    strength: float

    @property
    def r2(self) -> float:
        return 1 - float(self.squares.sum() / self.deviations.sum())


def decode(columns: Tensor, parameter: Parameter) -> Tensor:
    """Values (n,) of what `changes.encode` made columns of: the number itself; of cosine and sine, the angle in [low, high)."""
    if parameter.kind != "periodic":
        return columns[:, 0]
    period = parameter.high - parameter.low
    turn = torch.atan2(columns[:, 1], columns[:, 0]) / (2 * math.pi) * period
    return (turn - parameter.low).remainder(period) + parameter.low


def absolute_error(predicted: Tensor, wanted: Tensor, parameter: Parameter) -> Tensor:
    """|predicted - wanted| (n,) in the parameter's unit; the short way round where it is periodic."""
    difference = (predicted - wanted).abs()
    if parameter.kind != "periodic":
        return difference
    period = parameter.high - parameter.low
    difference = difference.remainder(period)
    return torch.minimum(difference, period - difference)


def read(
    question: Question, kinds: Iterable[tuple[str, str, Tensor, Tensor]], seed: int, held_out: float, solver: Solver
) -> tuple[list[Reading], Tensor]:
    """A reading for each kind (name, key, training features, test features), and the errors (n,) of always answering the mean.

    Numbers are fitted as they are, periodic ones as (cosine, sine). The constant answer is the training images' mean, of a
    periodic factor the direction of the mean (cosine, sine).
    """
    parameter = question.parameter
    known, _ = encode(question.known[:, None], [parameter])
    wanted, _ = encode(question.wanted[:, None], [parameter])
    found = []
    for name, key, train, test in kinds:
        fitted = ridge.fit(train, known, seed, held_out=held_out, unit=question.train_unit, solver=solver)
        said = fitted.predict(test)
        predicted = decode(said, parameter)
        error = absolute_error(predicted, question.wanted, parameter)
        found.append(Reading(name, key, predicted, *r2(said, wanted), error, fitted.strength))
    constant = decode(known.mean(dim=0, keepdim=True), parameter)
    return found, absolute_error(constant, question.wanted, parameter)


def mean_interval(values: Tensor, question: Question, seed: int) -> Interval | None:
    """Percentile bootstrap of a mean over images, whole objects at a time where the question knows them."""
    sums = _by_unit(torch.stack([values, torch.ones_like(values)], dim=1), question)
    if len(sums) < 2:
        return None
    drawn = resampled_sums(sums, seed, RESAMPLES)
    low, high = interval(drawn[:, :1] / drawn[:, 1:], 0.95)
    return Interval(float(low), float(high), f"percentile bootstrap over {question.word}, 95 %")


def _by_unit(values: Tensor, question: Question) -> Tensor:
    """Sums of values (n, k) over each object, or values as they are."""
    if question.unit is None:
        return values
    _, of = question.unit.unique(return_inverse=True)
    return summed(values, of)


def _r2_interval(reading: Reading, question: Question, seed: int) -> Interval | None:
    sums = _by_unit(torch.stack([reading.squares, reading.deviations], dim=1), question)
    low, high = (float(end) for end in bootstrap_ratio(sums[:, :1], sums[:, 1:], seed))
    if not math.isfinite(low + high):
        return None
    return Interval(1 - high**2, 1 - low**2, f"{METHOD.replace('images', question.word)}, 95 %")


def artifact(
    subject: Subject, question: Question, kinds: Iterable[tuple[str, str, Tensor, Tensor]], options: Any, notes: list[str]
) -> Artifact:
    """The artifact of the linear probe for a number. options: those of the linear probe."""
    readings, chance = read(question, kinds, options.seed, options.held_out, options.solver)
    parameter, n = question.parameter, len(question.wanted)
    unit = parameter.unit
    metrics = []
    for reading in readings:
        suffix = "" if reading.key == "h" else f"_{reading.key}"
        bounds = _r2_interval(reading, question, options.seed)
        about = f"{parameter.name} from {reading.name}, lambda = {reading.strength:g}"
        metrics.append(Metric(
            f"r2{suffix}", reading.r2, n, bounds, None if bounds else "a resample in which nothing varies",
            better=None if suffix else "higher", about=f"R^2 of {about}",
        ))
        metrics.append(Metric(
            f"error{suffix}", float(reading.error.mean()), n, mean_interval(reading.error, question, options.seed), unit=unit,
            better=None if suffix else "lower", about=f"mean absolute error of {about}",
        ))
    metrics.append(Metric(
        "error_chance", float(chance.mean()), n, mean_interval(chance, question, options.seed), unit=unit,
        about="always answering the training mean",
    ))
    main = readings[0]
    for other in readings[1:]:
        if other.key in ("random", "pixels"):
            gain = other.error - main.error
            metrics.append(Metric(
                f"error_gain_over_{other.key}", float(gain.mean()), n, mean_interval(gain, question, options.seed), unit=unit,
                better="higher", about=f"error from {other.name} minus error from the encoder, same test images",
            ))
    errors = ", ".join(f"{float(r.error.mean()):.3g} from {r.name}" for r in readings[1:])
    return Artifact(
        probe="linear",
        title=f"{parameter.name}, read by a linear map",
        headline=(
            f"A linear map reads {parameter.name} of {n} test images from the frozen features with R^2 {main.r2:.3f} and a "
            f"mean error of {float(main.error.mean()):.3g} {unit}".rstrip()
            + f" ({errors + '; ' if errors else ''}the constant answer {float(chance.mean()):.3g})."
        ),
        definition=(
            "Ridge regression on frozen, standardised features, its penalty chosen on a held-out part of the training images. "
            "R^2 = 1 - sum |predicted - true|^2 / sum |true - mean|^2 over test images. error: mean |predicted - true| in the "
            "factor's unit. A periodic factor is fitted as (cosine, sine), its error taken the short way round; answers that "
            "know nothing are a quarter of its period off."
        ),
        metrics=metrics,
        tables=[_table(readings, metrics, question), _points(main, question, options.seed)],
        figures=[
            Figure(
                "r2", "bar", f"R² of {parameter.name}", f"Bars: 95 % intervals over {question.word}, {n} test images.",
                "numbers", "features", "r2", low="r2_low", high="r2_high", x_label="features", y_label="R² on test images",
            ),
            Figure(
                "predicted", "scatter", f"{parameter.name}, predicted against true",
                f"Test images ({min(n, POINTS)} of {n}), from the encoder's features. On the dashed line all is read.",
                "predicted", "true", "predicted", x_label=_axis("true", parameter), y_label=_axis("predicted", parameter),
                diagonal=True,
            ),
        ],
        notes=notes, options=options.model_dump(mode="json"), provenance=subject.provenance,
    )


def _axis(word: str, parameter: Parameter) -> str:
    return f"{word} {parameter.name}" + (f" ({parameter.unit})" if parameter.unit else "")


def _table(readings: list[Reading], metrics: list[Metric], question: Question) -> Table:
    found = {metric.name: metric for metric in metrics}
    columns: dict[str, list[Any]] = {"features": [r.name for r in readings]}
    for name in ("r2", "error"):
        own = [found[name if r.key == "h" else f"{name}_{r.key}"] for r in readings]
        columns |= {
            name: [m.value for m in own],
            f"{name}_low": [m.interval.low if m.interval else None for m in own],
            f"{name}_high": [m.interval.high if m.interval else None for m in own],
        }
    columns |= {
        "n": [len(question.wanted)] * len(readings), "trained_on": [len(question.known)] * len(readings),
        "lambda": [r.strength for r in readings],
    }
    return Table("numbers", "R² and error by features", columns, "low and high: 95 % intervals.")


def _points(main: Reading, question: Question, seed: int) -> Table:
    rows = torch.randperm(len(question.wanted), generator=generator(seed, "predicted-points"))[:POINTS].sort().values
    columns: dict[str, list[Any]] = {
        "index": question.test[rows].tolist(),
        "true": [float(f"{v:.5g}") for v in question.wanted[rows].tolist()],
        "predicted": [float(f"{v:.5g}") for v in main.predicted[rows].tolist()],
    }
    return Table("predicted", "Predicted and true", columns, "From the encoder's features; index: of the image in its split.")
