"""consistency: does the answer (top-1, or the nearest neighbour) stay under a transform, beyond what constant answers do."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.data.rendered import Rendered
from geomssl.errors import GeomsslError
from geomssl.probes import checks, subject
from geomssl.probes.assurance import bootstrap_mean, interval, resampled_sums
from geomssl.probes.elements import doing, elements, labels, spoken
from geomssl.probes.linear import check_frozen, fit, train_sample, wilson
from geomssl.progress import track
from geomssl.transforms.base import Size, Transform

Answers = Callable[[Tensor], Tensor]
# Above this share of equal answers the network counts as constant: agreement is then no achievement.
CONSTANT = 0.95
# Above this share of answers that would stay by chance a note says that agreement is no measure.
MUCH = 0.5


@dataclass(frozen=True)
class Agreement:
    """Of E elements over n images.

    agreement (E,): share of images whose answer is unchanged. low, high (E,): Wilson's interval.
    chance (E,): sum_k p_k q_k, the agreement of answers of these frequencies drawn apart; kappa (E,) = (agreement - chance)
    / (1 - chance), NaN where chance is 1. kappa_low, kappa_high (E,): percentile bootstrap over images.
    overall, overall_low, overall_high: agreement in the mean over elements, images resampled for all of them together;
    mean, mean_low, mean_high: kappa likewise.
    largest: share of the most frequent answer, plain or moved, the least over elements; constant: largest >= .95.
    """

    agreement: Tensor
    low: Tensor
    high: Tensor
    chance: Tensor
    kappa: Tensor
    kappa_low: Tensor
    kappa_high: Tensor
    overall: float
    overall_low: float
    overall_high: float
    mean: float
    mean_low: float
    mean_high: float
    largest: float
    constant: bool


def consistency(plain: Tensor, moved: Tensor, seed: int = 0, level: float = 0.95, resamples: int = 1000) -> Agreement:
    """How often answers stay: plain (n,) answers of the images, moved (E, n) of the transformed ones, whole numbers.

        agreement = mean_i [plain_i = moved_i],   chance = sum_k p_k q_k,   kappa = (agreement - chance) / (1 - chance)

    p and q are the frequencies of the answers: a network that always answers the same has agreement 1, chance 1 and no kappa.
    Cohen, A Coefficient of Agreement for Nominal Scales (1960). Raises GeomsslError for fewer than two images.
    """
    if plain.dim() != 1 or moved.dim() != 2 or moved.shape[1] != len(plain) or not len(moved):
        raise GeomsslError(f"answers {tuple(plain.shape)} and {tuple(moved.shape)}", "(n,) and (E, n)", reason="bad-shape")
    n = len(plain)
    if n < 2:
        raise GeomsslError(f"{n} images", "at least 2", reason="too-few-images")
    same = moved == plain
    bounds = [wilson(int(row.sum()), n, level) for row in same]
    found = [_kappas(plain, row, seed, resamples) for row in moved]
    chance = torch.tensor([float(one[0]) for one in found], dtype=torch.float64)
    kappa = torch.tensor([float(one[1]) for one in found], dtype=torch.float64)
    drawn = torch.stack([one[2] for one in found], dim=1)
    low, high = interval(drawn, level)
    usable = ~kappa.isnan()
    mean, ends = math.nan, (math.nan, math.nan)
    if bool(usable.all()):
        mean = float(kappa.mean())
        ends = tuple(float(b) for b in interval(drawn.mean(dim=1, keepdim=True), level))  # type: ignore[assignment]
    top = [float(row.unique(return_counts=True)[1].max()) / n for row in (plain, *moved)]
    largest = max(top[0], min(top[1:]))
    kept = same.double().mean(dim=0)
    under, over = (float(b) for b in bootstrap_mean(kept, seed, level, resamples))
    return Agreement(
        same.double().mean(dim=1), torch.tensor([b[0] for b in bounds]).double(), torch.tensor([b[1] for b in bounds]).double(),
        chance, kappa, low, high, float(kept.mean()), under, over, mean, *ends, largest, largest >= CONSTANT,
    )


def _kappas(plain: Tensor, moved: Tensor, seed: int, resamples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Chance, kappa, and kappa of every resample. Only answers that both give can agree by chance."""
    names = plain.unique()
    names = names[torch.isin(names, moved)]
    counted = torch.cat([
        (plain == moved).double()[:, None], (plain[:, None] == names).double(), (moved[:, None] == names).double(),
    ], dim=1)  # fmt: skip
    n = len(plain)

    def of(sums: Tensor) -> tuple[Tensor, Tensor]:
        shares = sums / n
        p, q = shares[..., 1 : 1 + len(names)], shares[..., 1 + len(names) :]
        chance = (p * q).sum(dim=-1)
        return chance, torch.where(chance < 1 - 1e-12, (shares[..., 0] - chance) / (1 - chance), torch.nan)

    chance, kappa = of(counted.sum(dim=0))
    return chance, kappa, of(resampled_sums(counted, seed, resamples))[1]


class Options(subject.Options):
    """Settings of the consistency probe."""

    n: int | None = Field(256, ge=2, description="images to use")
    transform: str = Field("c4", description='what moves the images: c4, "rotate(±30)", "translate(0.2)", "hue(0.1)", ...')
    answer: Literal["auto", "linear", "neighbour", "argmax"] = Field(
        "auto",
        description="linear: a classifier fitted on h of the training split; neighbour: the nearest training image in h, "
        "without labels; argmax: the model's own largest output; auto: linear where there are labels, else neighbour",
    )
    draws: int = Field(8, ge=1, le=4096, description="elements to draw where the transform does not list them")
    step: int = Field(1, ge=1, description="shifts are multiples of so many pixels")
    train_n: int | None = Field(2000, ge=2, description="training images for the classifier or the neighbours")
    level: float = Field(0.95, gt=0, lt=1, description="level of the intervals")
    resamples: int = Field(1000, ge=100, le=100_000, description="bootstrap resamples")


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """The share of images whose answer stays under every element of a transform, with chance and accuracy beside it."""
    check_frozen(subject.encoder)
    subject.need(2, "a consistency")
    size: Size = (subject.source.size,) * 2
    transform, grid = spoken(options.transform)
    if transform.parameters and not any(transform.active(subject.source.channels)):
        raise GeomsslError(
            f"{transform.name} on images of {subject.source.channels} channels, which it leaves alone",
            "a transform that changes them", reason="no-transform",
        )
    params = elements(transform, size, options.draws, options.seed, options.step) if grid is None else grid
    indices = subject.choose(options)
    answers, about, notes = _answers(subject, options)
    with torch.no_grad():
        plain = answers(_plain_features(subject, indices))
        moved = _moved(subject, indices, transform, params, answers)
    found = consistency(plain, moved, options.seed, options.level, options.resamples)
    right = _right(subject, options, indices, plain, moved, about, notes)
    names = labels(transform, params)
    return Artifact(
        probe="consistency",
        title=f"Consistency under {options.transform}",
        headline=_headline(found, names, transform, about, right),
        definition=(
            "agreement: share of images whose answer is the same before and after the transform. The answer is "
            f"{about}. chance = Σ_k p_k q_k is the agreement that answers of these frequencies have when drawn apart, and "
            "kappa = (agreement − chance) / (1 − chance): 1 where all answers stay, 0 where no more than by chance. A network "
            "that answers the same for everything agrees with itself always; its chance is 1 and it has no kappa."
        ),
        metrics=_metrics(found, right, options, len(indices)),
        tables=[_table(found, names, right)],
        figures=[
            Figure(
                "kappa", "bar", f"Consistency under {options.transform}",
                f"kappa of each element, {options.level:.0%} bootstrap intervals over {len(indices)} images; 0 is chance.",
                "elements", "element", "kappa", low="kappa_low", high="kappa_high", x_label="element", y_label="kappa",
            )
        ],
        notes=[*notes, *_notes(found, right, subject)],
        options=options.model_dump(mode="json"),
        provenance={**subject.provenance, "answer": about},
    )


def _answers(subject: subject.Subject, options: Options) -> tuple[Answers, str, list[str]]:
    """h -> answers, what they are in words, and remarks."""
    kind = options.answer
    if kind == "auto":
        labelled = subject.train is not None and subject.train.labels is not None
        kind = "linear" if labelled else "neighbour"
    if kind == "argmax":
        return (lambda h: h.argmax(dim=1).cpu()), "the largest of the model's outputs", []
    if subject.train is None:
        raise GeomsslError(
            f"--answer {kind} without a training split", "--answer argmax, or a data set with one", reason="no-split"
        )
    rows = train_sample(subject, options.train_n, options.seed)
    known = subject.features(rows, "h", "train")
    if kind == "linear":
        taught = subject.need_labels("a classifier", "train").cpu()[rows]
        classifier = fit(known, taught, options.seed)
        slow = [] if classifier.converged else ["The classifier stopped at its iteration limit."]
        return classifier.predict, f"the class of a linear classifier fitted on h of {len(rows)} training images", slow
    gallery = F.normalize(checks.matrix(known, "features"), dim=1)

    def nearest(h: Tensor) -> Tensor:
        queries = F.normalize(checks.matrix(h, "features"), dim=1)
        return torch.cat([(block @ gallery.T).argmax(dim=1) for block in queries.split(1024)])

    return nearest, f"the most cosine-similar of {len(rows)} training images in h", []


def _plain_features(subject: subject.Subject, indices: Tensor) -> Tensor:
    """h of the images; of the formulas themselves where the moved ones come from them, not of their rounded samples."""
    drawn: Rendered | None = getattr(subject.source, "rendered", None)
    if drawn is None:
        return subject.features(indices, "h")
    chunks = indices.split(subject.batch_size)
    return torch.cat([subject.encoder(drawn.images(c, None, None, subject.dtype, subject.device)).cpu() for c in chunks])


def _moved(subject: subject.Subject, indices: Tensor, transform: Transform, params: Tensor, answers: Answers) -> Tensor:
    """Answers (E, n) of the transformed images; rendered pictures are evaluated, not resampled."""
    drawn: Rendered | None = getattr(subject.source, "rendered", None)
    out = torch.empty(len(params), len(indices), dtype=torch.long)
    per_pass = max(1, subject.batch_size // max(1, len(params)))
    for start in track(range(0, len(indices), per_pass), "consistency", total=-(-len(indices) // per_pass)):
        chunk = indices[start : start + per_pass]
        images = subject.images(chunk) if drawn is None else torch.empty(0)
        for first in range(0, len(params), subject.batch_size):
            some = params[first : first + subject.batch_size]
            each = some.repeat_interleave(len(chunk), dim=0)
            if drawn is None:
                turned = transform(images.repeat(len(some), 1, 1, 1), each.to(subject.device))
            else:
                turned = drawn.images(chunk.repeat(len(some)), transform, each, subject.dtype, subject.device)
            found = answers(subject.encoder(turned).cpu())
            out[first : first + len(some), start : start + len(chunk)] = found.view(len(some), len(chunk))
    return out


@dataclass(frozen=True)
class _Right:
    """Which answers are right: plain (n,), moved (E, n)."""

    plain: Tensor
    moved: Tensor


def _right(
    subject: subject.Subject, options: Options, indices: Tensor, plain: Tensor, moved: Tensor, about: str, notes: list[str]
) -> _Right | None:
    wanted = subject.source.labels
    if wanted is None or about.startswith("the most"):
        notes.append("No accuracy beside it: " + ("there are no labels." if wanted is None else "neighbours are no classes."))
        return None
    outputs = int(max(plain.max(), moved.max())) + 1
    if about.startswith("the largest") and 0 < len(subject.source.classes) < outputs:
        notes.append("No accuracy beside it: the model has more outputs than the data set has classes.")
        return None
    truth = wanted.cpu()[indices]
    return _Right(plain == truth, moved == truth)


def _table(found: Agreement, names: Sequence[str], right: _Right | None) -> Table:
    return Table(
        "elements", "Every element",
        {
            "element": list(names), "agreement": found.agreement.tolist(), "low": found.low.tolist(),
            "high": found.high.tolist(), "chance": found.chance.tolist(), "kappa": _plain(found.kappa),
            "kappa_low": _plain(found.kappa_low), "kappa_high": _plain(found.kappa_high),
            "accuracy": [None] * len(names) if right is None else right.moved.double().mean(dim=1).tolist(),
        },
        "[low, high] is Wilson's interval of agreement; kappa is agreement beyond what the frequencies of the answers give.",
    )


def _plain(values: Tensor) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]


def _metrics(found: Agreement, right: _Right | None, options: Options, n: int) -> list[Metric]:
    count = len(found.agreement)
    worst = int(found.agreement.argmin())
    together = 1 - (1 - options.level) / count
    low, high = wilson(round(float(found.agreement[worst]) * n), n, together)
    flat = f"{found.largest:.0%} of the images get one answer: agreement is no achievement of such a network"
    usable = not found.constant and math.isfinite(found.mean)
    ends = usable and math.isfinite(found.mean_low)
    method = f"percentile bootstrap over images, {options.level:.0%}"
    metrics = [
        Metric(
            "kappa", found.mean if usable else None, n, Interval(found.mean_low, found.mean_high, method) if ends else None,
            None if ends else (flat if not usable else "some resample has one answer only"), better="higher",
            about=f"agreement beyond chance, mean over {count} elements",
        ),
        Metric(
            "agreement", None if found.constant else found.overall, n,
            None if found.constant else Interval(found.overall_low, found.overall_high, method),
            flat if found.constant else None, better="higher",
            about=f"share of unchanged answers, mean over {count} elements; read it against chance",
        ),
        Metric(
            "agreement_worst", None if found.constant else float(found.agreement[worst]), n,
            None if found.constant else Interval(low, high, f"Wilson score, {options.level:.0%} for all {count} elements"),
            flat if found.constant else None, better="higher", about="share of unchanged answers at the worst element",
        ),
        Metric(
            "chance", float(found.chance.mean()), n, reason="follows from the frequencies of the answers",
            about=f"agreement of answers of these frequencies drawn apart, mean over {count} elements",
        ),
        Metric("largest_answer", found.largest, n, reason=f"from {CONSTANT:g} on the network counts as constant"),
    ]
    if right is not None:
        low, high = wilson(int(right.plain.sum()), n, options.level)
        metrics.append(
            Metric(
                "accuracy", float(right.plain.double().mean()), n, Interval(low, high, f"Wilson score, {options.level:.0%}"),
                better="higher", about="of the answers on plain images",
            )
        )
        each = right.moved.double().mean(dim=0)
        ends_of = [float(b) for b in bootstrap_mean(each, options.seed, options.level, options.resamples)]
        metrics.append(
            Metric(
                "accuracy_moved", float(each.mean()), n,
                Interval(ends_of[0], ends_of[1], method), better="higher",
                about=f"of the answers on transformed images, mean over {count} elements",
            )
        )
    return metrics


def _headline(found: Agreement, names: Sequence[str], transform: Transform, about: str, right: _Right | None) -> str:
    if found.constant:
        return (
            f"{found.largest:.0%} of the images get one and the same answer, so that it stays under {transform.name} by "
            "itself: nothing can be told about consistency."
        )
    worst = int(found.agreement.argmin())
    said = (
        f"{doing(transform)} leaves {found.overall:.1%} of the answers as they were (kappa {found.mean:.2f}; "
        f"chance {float(found.chance.mean()):.1%}), least at {names[worst]} with {float(found.agreement[worst]):.1%}"
    )
    if right is not None:
        said += f"; accuracy {float(right.plain.double().mean()):.1%} before, {float(right.moved.double().mean()):.1%} after"
    return said + "."


def _notes(found: Agreement, right: _Right | None, subject: subject.Subject) -> list[str]:
    notes = ["Answers that stay may be wrong answers: read consistency beside the accuracy."]
    if found.constant:
        notes.append("The network counts as constant, whatever its agreement; no kappa is given.")
    elif float(found.chance.mean()) > MUCH:
        notes.append(
            f"Few answers are given, and {float(found.chance.mean()):.0%} would stay by chance alone: judge by kappa, not by "
            "agreement."
        )
    if getattr(subject.source, "rendered", None) is None:
        notes.append("The transform resamples natural images where it does not permute pixels; the answer sees that too.")
    if right is not None and float(right.plain.double().mean()) < 0.5:
        notes.append("Fewer than half of the plain answers are right.")
    return notes
