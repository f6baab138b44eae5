"""transfer: what a linear classifier reads from the frozen features on other data sets, beside chance and a random encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.data.base import Source, Split
from geomssl.errors import GeomsslError
from geomssl.probes import elsewhere
from geomssl.probes import subject as subjects
from geomssl.probes.assurance import bootstrap_mean, interval, resampled_sums
from geomssl.probes.linear import check_frozen, fit, train_sample, wilson
from geomssl.probes.subject import Subject

RESAMPLES = 2000
WILSON = "Wilson score, 95 %"


class Options(subjects.Options):
    """Settings of the transfer probe."""

    to: tuple[str, ...] = Field((), description="data set to carry the features to, NAME or NAME:PATH; repeat for several")
    to_set: tuple[str, ...] = Field(
        (), description="a setting of a data set of --to, NAME.KEY=VALUE, such as dtd.partition=2; repeat for several"
    )
    train_n: int | None = Field(None, ge=2, description="training images of each set; all of them when not given")
    download: bool = Field(False, description="fetch a set that is not here, where its files are pinned (mnist, cifar10, ...)")
    beside: bool = Field(True, description="measure the random encoder too")


@dataclass(frozen=True)
class Carried:
    """One data set: which test images each encoder got right, those that the most frequent class gets, and of which class."""

    source: Source
    trained_on: int
    right: dict[str, Tensor]
    chance: Tensor
    labels: Tensor
    strength: float

    @property
    def name(self) -> str:
        return self.source.name

    def accuracy(self, which: str) -> float:
        return float(self.right[which].double().mean())

    def by_class(self, which: str) -> float:
        """The mean over classes of the accuracy in each: what is usual for pets and aircraft."""
        each = [self.right[which][self.labels == label].double().mean() for label in self.labels.unique()]
        return float(torch.stack(each).mean())


def probe(subject: Subject, options: Options) -> Artifact:
    """Linear evaluation on every data set of options.to: encoder frozen, in eval mode; features of the plain images."""
    check_frozen(subject.encoder)
    channels, size = subject.source.channels, subject.source.size
    # all of them first: what is missing is found before anything is measured
    places = {part: _sources(options, part, channels, size) for part in ("train", subject.source.split)}
    twin = subject.random_twin() if options.beside else None
    notes = _remarks(subject, options, twin)
    encoders = {"encoder": subject.encoder, **({"random encoder": twin.encoder} if twin is not None else {})}
    found = []
    for source, train in zip(places[subject.source.split], places["train"], strict=True):
        found.append(_carry(subject, encoders, source, train, options, notes))
    return Artifact(
        probe="transfer",
        title="Linear evaluation on other data sets",
        headline=_headline(found),
        definition=(
            "Top-1 accuracy on the test images of each set, every image weighing the same, of multinomial logistic regression "
            "on frozen, standardised features; fitted on the set's own training split, its regularisation chosen on a fifth of "
            f"that. Images are brought to {size}x{size} pixels and {channels} channel{'s' if channels > 1 else ''}, those of "
            "the data that the encoder is measured on: files are cut to the centred square and resized; other sets are "
            "resized bilinearly (antialiased), grey is repeated, and colour becomes grey by its luma. Chance: the majority."
        ),
        metrics=_metrics(found, options.seed),
        tables=[_table(found)],
        figures=[
            Figure(
                "transfer", "bar", "Accuracy on other data sets", "Bars: Wilson's 95 % interval over test images.", "transfer",
                "dataset", "accuracy", "features", "low", "high", x_label="data set", y_label="top-1 accuracy",
            )
        ],
        notes=notes, options=options.model_dump(mode="json"), provenance=subject.provenance,
    )


def _sources(options: Options, split: Split, channels: int, size: int) -> list[Source]:
    """That split of every set, brought to the encoder's images."""
    if not options.to:
        raise GeomsslError("transfer to no data set", "--to NAME, such as --to fashion-mnist", reason="no-target")
    chosen, sources = elsewhere.settings(options.to, options.to_set), []
    for name in dict.fromkeys(options.to):
        source = elsewhere.source(name, split, channels, size, options.download, chosen)
        if source.labels is None:
            raise GeomsslError(f"transfer to {source.name}, which has no labels", "a labelled data set", reason="no-labels")
        if len(source) < 2:
            raise GeomsslError(f"{len(source)} images in {source.name}/{split}", "at least 2", reason="too-few-images")
        sources.append(source)
    return sources


def _carry(
    subject: Subject, encoders: dict[str, Any], source: Source, train: Source, options: Options, notes: list[str]
) -> Carried:
    right: dict[str, Tensor] = {}
    strength, known, labels = 0.0, torch.empty(0), torch.empty(0)
    for which, encoder in encoders.items():
        there = replace(subject, encoder=encoder, projector=None, source=source, train=train, _cache={}, _spill=None)
        check_frozen(there.encoder)
        rows, of = there.choose(options), train_sample(there, options.train_n, options.seed)
        labels = there.need_labels("transfer").cpu()[rows]
        known = there.need_labels("transfer", "train").cpu()[of]
        classifier = fit(there.features(of, "h", "train"), known, options.seed)
        if not classifier.converged:
            notes.append(f"The classifier of the {which} on {source.name} stopped at its iteration limit: a lower bound.")
        right[which] = classifier.predict(there.features(rows)) == labels
        strength = strength or classifier.strength
    unseen = int((~torch.isin(labels, known)).sum())
    if unseen:
        notes.append(f"{source.name}: {unseen} test images of classes that the training images do not have count as wrong.")
    return Carried(source, len(known), right, labels == known.mode().values, labels, strength)


def _remarks(subject: Subject, options: Options, twin: Subject | None) -> list[str]:
    notes = ["The accuracies are those of this one state of the encoder, not the best of several."]
    if options.beside and twin is None:
        notes.append("No random encoder beside it: how this encoder is initialised is not known.")
    if subject.source.split == "train":
        notes.append("These are training images: the classifier has seen them, and the accuracies say little.")
    return notes


def _metrics(found: Sequence[Carried], seed: int) -> list[Metric]:
    metrics = []
    # sets are independent, so each is resampled by draws of its own
    drawn = [
        resampled_sums(c.right["encoder"].double()[:, None], seed + k, RESAMPLES) / len(c.labels) for k, c in enumerate(found)
    ]
    low, high = interval(torch.cat(drawn, dim=1).mean(dim=1, keepdim=True), 0.95)
    metrics.append(Metric(
        "linear_mean", sum(c.accuracy("encoder") for c in found) / len(found), len(found),
        Interval(float(low), float(high), "percentile bootstrap over the images of every set, 95 %"), better="higher",
        about="mean of the accuracies over the data sets; no other choice of sets is in its interval",
    ))
    for c in found:
        n = len(c.labels)
        metrics.append(_proportion(f"linear_{c.name}", c.right["encoder"], f"linear classifier on h, {c.name}", "higher"))
        if "random encoder" in c.right:
            random = c.right["random encoder"]
            metrics.append(_proportion(f"random_{c.name}", random, f"the same on the random encoder, {c.name}"))
            gain = c.right["encoder"].double() - random.double()
            bounds = [float(b) for b in bootstrap_mean(gain, seed)]
            metrics.append(Metric(
                f"gain_{c.name}", float(gain.mean()), n,
                Interval(bounds[0], bounds[1], "percentile bootstrap over images, paired, 95 %"), better="higher",
                about=f"accuracy on h minus accuracy on the random encoder, {c.name}, same test images",
            ))
        metrics.append(_proportion(f"chance_{c.name}", c.chance, f"always the most frequent training class of {c.name}"))
    return metrics


def _proportion(name: str, right: Tensor, about: str, better: Any = None) -> Metric:
    low, high = wilson(int(right.sum()), len(right))
    return Metric(name, float(right.double().mean()), len(right), Interval(low, high, WILSON), better=better, about=about)


def _headline(found: Sequence[Carried]) -> str:
    each = []
    for c in found:
        random = f", random encoder {c.accuracy('random encoder'):.3f}" if "random encoder" in c.right else ""
        each.append(f"{c.name} {c.accuracy('encoder'):.3f}{random}, chance {float(c.chance.double().mean()):.3f}")
    return f"A linear classifier on the frozen features reads {'; '.join(each)}."


def _table(found: Sequence[Carried]) -> Table:
    """One row a data set and encoder, chance last."""
    rows: list[dict[str, Any]] = []
    for c in found:
        for which, right in [*c.right.items(), ("chance", c.chance)]:
            low, high = wilson(int(right.sum()), len(right))
            rows.append({
                "dataset": c.name, "features": which, "accuracy": float(right.double().mean()), "low": low, "high": high,
                "class_mean": c.by_class(which) if which in c.right else None, "n": len(right), "trained_on": c.trained_on,
                "classes": len(c.source.classes), "images_sha256": c.source.fingerprint,
            })
    return Table(
        "transfer", "Accuracy by data set", {key: [row[key] for row in rows] for key in rows[0]},
        "low and high: Wilson's 95 % interval. class_mean: the mean over classes of the accuracy in each.",
    )
