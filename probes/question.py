"""What a readout asks of each image, its label or one of its factors, and from which images it learns to answer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from geomssl.data.base import Source
from geomssl.errors import GeomsslError
from geomssl.objectives.pairs import factor
from geomssl.probes import subject as subjects
from geomssl.probes.subject import Part, Subject
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter

LABEL = "label"


@dataclass(frozen=True)
class Question:
    """One thing asked of every image.

    parameter: its name, unit and kind ("index" and "binary" are categories). train, test: rows to fit on and to measure; the
    former of `part`. known, wanted: its values there, long for a category and float64 for a number. train_unit, unit: what
    rows are alike (objects), int64; None where that is not known. about: sentences for the notes.
    """

    parameter: Parameter
    part: Part
    train: Tensor
    test: Tensor
    known: Tensor
    wanted: Tensor
    train_unit: Tensor | None
    unit: Tensor | None
    about: tuple[str, ...] = ()

    @property
    def category(self) -> bool:
        return self.parameter.kind in ("index", "binary")

    @property
    def name(self) -> str:
        return self.parameter.name

    @property
    def word(self) -> str:
        """What an interval resamples."""
        return "images" if self.unit is None else "objects"


class _Draw(subjects.Options):
    """A draw from the training split, whose size is another option than that of the measured split."""


def check_frozen(encoder: nn.Module) -> None:
    """Raise unless the encoder is in eval mode with every parameter frozen: else the accuracy is not one of its features."""
    moving = [name or "the encoder" for name, module in encoder.named_modules() if module.training]
    learning = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if moving or learning:
        raise GeomsslError(
            f"an encoder with {(moving or learning)[0]} {'in training mode' if moving else 'that still learns'}",
            "one in eval mode with frozen parameters", reason="not-frozen",
        )


def train_sample(subject: Subject, n: int | None, seed: int) -> Tensor:
    """Sorted indices of the training images to use: all, or a seeded draw of n of them."""
    subject.need(2, "a classifier", "train")
    return subject.choose(_Draw(n=n, seed=seed), "train")


def ask(subject: Subject, target: str, rows: Tensor, train_n: int | None, seed: int, within: bool) -> Question:
    """The question about those rows of the measured split. target: "label" or a factor's name.

    Learnt from the training split, or, `within`, from half of the rows themselves (`halves`); then the other half is measured.
    Raises GeomsslError for a target that is missing, has one value or is unknown for an image (`objectives.pairs.factor`), and
    for values that no training image has (reason "unseen-class").
    """
    parameter, values = described(subject, target, "own")
    category = parameter.kind in ("index", "binary")
    part: Part = "train"
    about: tuple[str, ...] = ()
    if within:
        first, word = halves(values[rows], category, subject.source, rows, seed, target)
        train, rows, part, known = rows[first], rows[~first], "own", values[rows[first]]
        about = (f"Fitted on one half of {_where(subject.source)} and measured on the other, whole {word} apart.",)
        if train_n is not None and train_n < len(train):
            kept = torch.randperm(len(train), generator=generator(seed, "within-train-n"))[:train_n].sort().values
            train, known = train[kept], known[kept]
    else:
        train = train_sample(subject, train_n, seed)
        known = described(subject, target, "train")[1][train]
    wanted = values[rows]
    source = subject.source if within else subject.train
    assert source is not None
    if category:
        missing = wanted[~torch.isin(wanted, known)].unique()
        if len(missing):
            name = subject.class_names(missing[:1])[0] if target == LABEL else str(int(missing[0]))
            raise GeomsslError(
                f"{len(missing)} of {len(wanted.unique())} values of {target} in {_where(subject.source)}, such as {name}, "
                f"without a sample to fit on in {_where(source)}",
                "a sample of every class: more of --train-n" + ("" if within else ", or --within to split the measured images"),
                reason="unseen-class",
            )
    for what, found in (("fit on", known), ("measure", wanted)):
        if not category and bool((found == found[:1]).all()):
            raise GeomsslError(
                f"{len(found)} images to {what} that share one value of {target}", "a factor that varies there",
                reason="constant-factor",
            )
    return Question(
        parameter, part, train, rows, known, wanted, _objects(source, train), _objects(subject.source, rows), about
    )


def described(subject: Subject, target: str, part: Part) -> tuple[Parameter, Tensor]:
    """What the target is and its values (len,): long for a category, float64 for a number.

    A factor that the data set does not describe is a category where all its values are whole numbers, else a number.
    """
    if target == LABEL:
        labels = subject.need_labels("a classifier", part).cpu()
        return Parameter(LABEL, "", "index", 0.0, 0.0, float(labels.max()) if len(labels) else 0.0), labels
    subject.need(2, f"the factor {target}", part)
    source = subject.source if part == "own" else subject.train
    assert source is not None
    values = factor(source, target)
    said = {p.name: p for p in source.parameters}.get(target)
    if said is None:
        whole = bool((values == values.round()).all())
        said = Parameter(target, "", "index" if whole else "continuous", 0.0, float(values.min()), float(values.max()))
    return said, values.long() if said.kind in ("index", "binary") else values.double()


def halves(
    values: Tensor, category: bool, source: Source, rows: Tensor, seed: int, target: str = "the target"
) -> tuple[Tensor, str]:
    """Two halves of those rows: (bool (n,), true in the half to fit on; what is kept whole).

    Whole objects go to one side, where the data set knows them and every class then has images on both sides; else whole
    sequences, on the same condition; else single images. Groups of one class go to the two sides in turn. Raises
    GeomsslError (reason "unseen-class") for a class with a single image.
    """
    classes = values.unique(return_inverse=True)[1] if category else torch.zeros(len(values), dtype=torch.long)
    known = {name: source.factors[name].cpu()[rows] for name in ("object", "sequence") if name in source.factors}
    known["image"] = torch.arange(len(rows))
    for word, ids in known.items():
        groups, of = ids.unique(return_inverse=True)
        # one class of each group: where a group has several, any of them will do
        own = torch.zeros(len(groups), dtype=torch.long).scatter_reduce(0, of, classes, "amax", include_self=True)
        drawn = torch.randperm(len(groups), generator=generator(seed, "within", len(groups)))
        order = drawn[own[drawn].argsort(stable=True)]
        side = torch.zeros(len(groups), dtype=torch.bool)
        side[order[::2]] = True
        first = side[of]
        if len(groups) > 1 and len(classes[first].unique()) == len(classes[~first].unique()) == len(classes.unique()):
            return first, f"{word}s"
    counts = classes.bincount()
    rare = int((counts < 2).sum())
    raise GeomsslError(
        f"{rare} of {len(counts)} values of {target} with a single image in {_where(source)}", "two images of each to split",
        reason="unseen-class",
    )


def _objects(source: Source, rows: Tensor) -> Tensor | None:
    """Which object each row shows, where the data set knows and there are several."""
    if "object" not in source.factors:
        return None
    found = source.factors["object"].cpu()[rows].long()
    return found if len(found.unique()) > 1 else None


def _where(source: Source) -> str:
    return f"{source.name}/{source.split}"
