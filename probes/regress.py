"""regress: is what was done to an image readable from the features of both views? R^2 for every parameter, and its null."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import subject as subjects
from geomssl.probes.assurance import METHOD, bootstrap_ratio, interval, resampled_sums, summed
from geomssl.probes.changes import Pairs, Target, factor_pairs, moved_pairs, r2, usable
from geomssl.probes.classifier import wilson
from geomssl.probes.fitting import held_out
from geomssl.probes.question import check_frozen, train_sample
from geomssl.probes.regressor import fit, projected
from geomssl.probes.subject import Layer, Part, Subject
from geomssl.seeding import generator
from geomssl.transforms import named, policy
from geomssl.transforms.base import Transform

RESAMPLES = 2000
NO_INTERVAL = "too few of them to resample, or a resample in which nothing varies"
# Parameters that get a picture of predicted against true, and its points.
DRAWN, POINTS = 6, 200


class Options(subjects.Options):
    """Settings of the regression probe."""

    of: Literal["auto", "transform", "factors"] = Field(
        "auto", description="what is regressed: a transform's parameters, or how the data set's factors differ; "
        "auto: factors where the data set has continuous ones"
    )
    transform: str | None = Field(None, description='such as "rotate(±30) + flip", or a policy  [default: as in training]')
    hidden: int = Field(128, ge=1, description="width of both hidden layers")
    steps: int = Field(300, ge=1, description="training steps of the regressor")
    train_n: int | None = Field(None, ge=8, description="training images to use  [default: all of them]")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of the training pairs on which the weight decay is chosen")
    beside: bool = Field(True, description="read the random encoder and raw pixels too; raw pixels take most of the time")


@dataclass(frozen=True)
class Reading:
    """One kind of features: what was predicted for the test pairs, the decay, and the true values (shuffled for the null)."""

    key: str
    name: str
    predicted: Tensor
    wanted: Tensor
    decay: float


def probe(subject: Subject, options: Options) -> Artifact:
    """R^2 of a three-layer perceptron on both views' features, beside pixels, a random encoder and shuffled pairs."""
    check_frozen(subject.encoder)
    notes: list[str] = []
    rows, known = subject.choose(options), train_sample(subject, options.train_n, options.seed)
    by_factors = _by_factors(subject, options)
    transform = None if by_factors else _transform(subject, options, notes)
    if by_factors:
        train, targets = factor_pairs(subject, known, "train", options.seed)
        test, _ = factor_pairs(subject, rows, "own", options.seed)
    else:
        assert transform is not None
        train, targets = moved_pairs(subject, known, "train", transform, options.seed)
        test, _ = moved_pairs(subject, rows, "own", transform, options.seed)
    targets = _varying(targets, train.values, test.values, notes)
    readings = _read(subject, train, test, transform, options, notes)
    unit = "objects" if by_factors and "object" in subject.source.factors else "pairs"
    scores = _scores(readings, test, targets, options.seed, unit)
    what = "the data set's factors change" if by_factors else f"{transform.name} did"  # type: ignore[union-attr]
    if subject.source.split == "train":
        notes.append("These are training images: the regressor has seen them, and R^2 says little.")
    mean = _mean(readings, test, targets, options.seed, unit)
    return Artifact(
        probe="regress",
        title="What was done, regressed from the features of both views",
        headline=(
            f"From the frozen features of both views a three-layer perceptron reads what {what} with a mean R^2 of "
            f"{mean[0].value:.3f} over {len(targets)} parameters and {len(test.first)} test pairs."
        ),
        definition=(
            "R^2 = 1 - sum |predicted - true|^2 / sum |true - mean|^2 over test pairs that the regressor never saw; 1 is "
            "perfect, 0 is what the mean gives. The regressor sees the features of both views, standardised, concatenated. "
            "null: the same with the targets shuffled among the pairs, in training and in test. Angles count as (cosine, "
            "sine), categories as one-hot."
        ),
        metrics=[*mean, *_metrics(scores)],
        tables=[_table(scores), *_accuracies(readings[0], targets, train), *_points(readings[0], targets, test, options.seed)],
        figures=[
            Figure(
                "r2", "bar", "R² of each parameter", f"Bars: 95 % intervals, bootstrap over {unit}.", "r2", "parameter", "r2",
                "features", "low", "high", x_label="parameter", y_label="R² on test pairs",
            ),
            *_scatters(_drawn(targets), len(test.first)),
        ],
        notes=notes, options=options.model_dump(mode="json"), provenance=subject.provenance,
    )


def _by_factors(subject: Subject, options: Options) -> bool:
    differing = usable(subject.source)
    if options.of == "factors" and not differing:
        raise GeomsslError(
            f"--of factors on {subject.source.name}", "a data set with continuous factors, such as views", reason="no-factor"
        )
    return options.of == "factors" or (options.of == "auto" and options.transform is None and bool(differing))


def _transform(subject: Subject, options: Options, notes: list[str]) -> Transform:
    if options.transform:
        transform = named(options.transform)
        if not transform.parameters:
            given = f"--transform {options.transform!r}, which has no parameters"
            raise GeomsslError(given, 'one to regress, such as "rotate(±30)"', reason="bad-value")
        return transform
    transform = subject.training_policy(notes)
    if not transform.parameters:
        notes.append("The training drew no parameters: the views are drawn by the policy simclr.")
        return policy("simclr")
    return transform


def _varying(targets: list[Target], train: Tensor, test: Tensor, notes: list[str]) -> list[Target]:
    """Those that vary in both splits: R^2 of a constant is not defined."""
    found = [t for t in targets if all(bool((v[:, t.columns] != v[:1, t.columns]).any()) for v in (train, test))]
    gone = [t.name for t in targets if t not in found]
    if gone:
        notes.append(f"Left out, since they have one value here: {', '.join(gone)}.")
    if not found:
        raise GeomsslError("parameters that all have one value", "a transform that varies", reason="degenerate")
    return found


def _read(
    subject: Subject, train: Pairs, test: Pairs, transform: Transform | None, options: Options, notes: list[str]
) -> list[Reading]:
    """The regressor on every kind of features, the shuffled null after the encoder's own."""
    held = held_out(train.unit, options.held_out, options.seed)
    fitted_on, aside = (~held).nonzero()[:, 0], held.nonzero()[:, 0]
    kinds: list[tuple[str, str, Subject, Layer]] = [("h", "encoder", subject, "h")]
    if options.beside:
        twin = subject.random_twin()
        if twin is None:
            notes.append("No random encoder beside it: how this encoder is initialised is not known.")
        else:
            kinds.append(("random", "random encoder", twin, "h"))
        kinds.append(("pixels", "raw pixels", subject, "pixels"))
    found = []
    for key, name, of, layer in kinds:
        check_frozen(of.encoder)
        known = _both(of, train, "train", layer, transform, options.seed)
        asked = _both(of, test, "own", layer, transform, options.seed)
        if layer == "pixels" and subject.source.channels * subject.source.size**2 > known.shape[1] // 2:
            notes.append(f"Raw pixels: {known.shape[1] // 2} random directions of them.")
        for shuffled in (False, True) if key == "h" else (False,):
            values, wanted = train.values, test.values
            if shuffled:
                values, wanted = _shuffled(values, options.seed, 0), _shuffled(wanted, options.seed, 1)
            parts = known[fitted_on], values[fitted_on], known[aside], values[aside], asked
            fitted = fit(*parts, options.seed, options.hidden, options.steps)
            label = ("null", "encoder, pairs shuffled") if shuffled else (key, name)
            found.append(Reading(*label, fitted.predicted, wanted, fitted.decay))
    return found


def _shuffled(values: Tensor, seed: int, number: int) -> Tensor:
    return values[torch.randperm(len(values), generator=generator(seed, "regress-null", number))]


def _both(
    of: Subject, pairs: Pairs, part: Part, layer: Layer, transform: Transform | None, seed: int
) -> Tensor:
    """The features of both views side by side."""
    if pairs.second is None:
        assert transform is not None
        one, two = of.features(pairs.first, layer, part), of.features(pairs.first, layer, part, (transform, seed, 0))
    else:
        both, back = torch.cat([pairs.first, pairs.second]).unique(return_inverse=True)
        features = of.features(both, layer, part)
        one, two = features[back[: len(pairs.first)]], features[back[len(pairs.first) :]]
    return torch.cat([projected(one, seed), projected(two, seed)], dim=1)


@dataclass(frozen=True)
class Score:
    """R^2 of one target from one kind of features, and how much the encoder's own R^2 is above it."""

    target: Target
    reading: Reading
    value: float
    bounds: Interval | None
    gain: float | None
    gain_bounds: Interval | None
    n: int


def _sums(reading: Reading, targets: list[Target], unit: Tensor) -> tuple[Tensor, Tensor]:
    """Errors and deviations of every target, summed within each unit: (U, T) each."""
    parts = [r2(reading.predicted[:, t.columns], reading.wanted[:, t.columns]) for t in targets]
    errors, deviations = (summed(torch.stack([p[i] for p in parts], dim=1), unit) for i in (0, 1))
    return errors, deviations


def _scores(readings: list[Reading], test: Pairs, targets: list[Target], seed: int, word: str) -> list[Score]:
    """Every target from every kind of features, all of them on the same resamples."""
    sums = [_sums(reading, targets, test.unit) for reading in readings]
    errors, deviations = (torch.stack([pair[i] for pair in sums], dim=1) for i in (0, 1))
    values, count = errors.sum(dim=0) / deviations.sum(dim=0), len(targets)
    low = high = torch.full((len(readings), count), math.nan, dtype=torch.float64)
    below = above = low
    if len(errors) > 1:
        low, high = (end.view(-1, count) for end in bootstrap_ratio(errors.flatten(1), deviations.flatten(1), seed))
        # gains share the encoder's own deviations: the test pairs are the same
        drawn = resampled_sums(torch.cat([(errors - errors[:, :1]).flatten(1), deviations[:, 0]], dim=1), seed, RESAMPLES)
        share = drawn[:, :-count].view(len(drawn), -1, count) / drawn[:, None, -count:]
        below, above = (end.view(-1, count) for end in interval(share.flatten(1), 0.95))
    method = f"{METHOD.replace('images', word)}, 95 %"
    found = []
    for k, target in enumerate(targets):
        for i, reading in enumerate(readings):
            bounds = _interval(1 - float(high[i, k]) ** 2, 1 - float(low[i, k]) ** 2, method)
            gain, gain_bounds = None, None
            if reading.key in ("random", "pixels"):
                gain = float(values[i, k] - values[0, k])
                paired = f"percentile bootstrap over {word}, paired, 95 %"
                gain_bounds = _interval(float(below[i, k]), float(above[i, k]), paired)
            found.append(Score(target, reading, 1 - float(values[i, k]), bounds, gain, gain_bounds, len(test.first)))
    return found


def _interval(low: float, high: float, method: str) -> Interval | None:
    return Interval(low, high, method) if math.isfinite(low) and math.isfinite(high) else None


def _mean(readings: list[Reading], test: Pairs, targets: list[Target], seed: int, word: str) -> list[Metric]:
    """The mean R^2 over the parameters, for every kind of features; the parameters share their resamples."""
    sums = [_sums(reading, targets, test.unit) for reading in readings]
    values = [float((1 - errors.sum(dim=0) / deviations.sum(dim=0)).mean()) for errors, deviations in sums]
    bounds: list[Interval | None] = [None] * len(readings)
    if len(sums[0][0]) > 1:
        drawn = resampled_sums(torch.cat([column for pair in sums for column in pair], dim=1), seed, RESAMPLES)
        parts = drawn.view(len(drawn), len(readings), 2, len(targets))
        ends = interval((1 - parts[:, :, 0] / parts[:, :, 1]).mean(dim=2), 0.95)
        bounds = [_interval(float(a), float(b), f"percentile bootstrap over {word}, 95 %") for a, b in zip(*ends, strict=True)]
    return [
        Metric(
            "r2_mean" + ("" if reading.key == "h" else f"_{reading.key}"), value, len(test.first), bound,
            None if bound else NO_INTERVAL, better="higher" if reading.key == "h" else None,
            about=f"mean R^2 over {len(targets)} parameters, {reading.name}",
        )
        for reading, value, bound in zip(readings, values, bounds, strict=True)
    ]


def _metrics(scores: list[Score]) -> list[Metric]:
    """R^2 from the encoder, and what it gains over pixels and the random encoder; the table has the rest."""
    metrics = []
    for s in scores:
        if s.reading.key == "h":
            about = f"R^2 of {s.target.name} from the encoder"
            name, value, bounds = f"r2_{s.target.name}", s.value, s.bounds
        elif s.gain is not None:
            about = f"R^2 of {s.target.name} from the encoder minus that from the {s.reading.name}, same pairs"
            name, value, bounds = f"r2_{s.target.name}_gain_over_{s.reading.key}", s.gain, s.gain_bounds
        else:
            continue
        metrics.append(Metric(name, value, s.n, bounds, None if bounds else NO_INTERVAL, better="higher", about=about))
    return metrics


def _table(scores: list[Score]) -> Table:
    return Table(
        "r2", "R² by parameter and features",
        {
            "parameter": [s.target.name for s in scores],
            "part": [s.target.part for s in scores],
            "kind": [s.target.kind for s in scores],
            "features": [s.reading.name for s in scores],
            "r2": [s.value for s in scores],
            "low": [s.bounds.low if s.bounds else None for s in scores],
            "high": [s.bounds.high if s.bounds else None for s in scores],
            "n": [s.n for s in scores],
            "weight_decay": [s.reading.decay for s in scores],
        },
        "low and high: 95 % intervals.",
    )


def _accuracies(main: Reading, targets: list[Target], train: Pairs) -> list[Table]:
    """For flips and categories, how often the nearest value is the true one, beside always saying the most frequent."""
    rows: dict[str, list[float | int | str]] = {key: [] for key in ("parameter", "accuracy", "low", "high", "majority", "n")}
    for target in targets:
        if target.kind not in ("binary", "category"):
            continue
        said, true, seen = (_class(v[:, target.columns]) for v in (main.predicted, main.wanted, train.values))
        right, n = int((said == true).sum()), len(true)
        low, high = wilson(right, n)
        often = float((true == seen.mode().values).double().mean())
        values: tuple[float | int | str, ...] = (target.name, right / n, low, high, often, n)
        for key, value in zip(rows, values, strict=True):
            rows[key].append(value)
    about = "low and high: Wilson's 95 % interval. majority: always saying the most frequent value of the training pairs."
    return [Table("accuracy", "Accuracy of flips and categories", dict(rows), about)] if rows["n"] else []


def _drawn(targets: list[Target]) -> list[Target]:
    return [t for t in targets if t.kind in ("continuous", "angle")][:DRAWN]


def _scatters(targets: list[Target], n: int) -> list[Figure]:
    found = []
    for t in targets:
        unit = " (degrees of its period)" if t.kind == "angle" else f" ({t.unit})" if t.unit else ""
        found.append(Figure(
            f"predicted_{t.name}", "scatter", f"{t.name}, predicted against true",
            f"Test pairs ({min(n, POINTS)} of {n}), from the encoder's features. On the dashed line all is read.", "predicted",
            f"true {t.name}", f"predicted {t.name}", x_label=f"true {t.name}{unit}", y_label=f"predicted {t.name}{unit}",
            diagonal=True,
        ))
    return found


def _points(main: Reading, targets: list[Target], test: Pairs, seed: int) -> list[Table]:
    """Predicted and true values of some test pairs; of an angle its phase in degrees, -180 to 180."""
    drawn = _drawn(targets)
    if not drawn:
        return []
    rows = torch.randperm(len(test.first), generator=generator(seed, "predicted-points"))[:POINTS].sort().values
    columns: dict[str, list[float | int]] = {"index": test.first[rows].tolist()}
    for t in drawn:
        for word, values in (("true", main.wanted), ("predicted", main.predicted)):
            own = values[rows, t.columns]
            shown = torch.atan2(own[:, 1], own[:, 0]).rad2deg() if t.kind == "angle" else own[:, 0]
            columns[f"{word} {t.name}"] = [float(f"{v:.5g}") for v in shown.tolist()]
    about = "From the encoder's features; index: of the pair's first image."
    return [Table("predicted", "Predicted and true", dict(columns), about)]


def _class(values: Tensor) -> Tensor:
    return (values[:, 0] > 0.5).long() if values.shape[1] == 1 else values.argmax(dim=1)
