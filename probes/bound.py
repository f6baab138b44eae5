"""bound: InfoNCE of batches as in training beside its upper bound, invariance + repulsion + constant, and what lies between."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.losses import Denominator, info_nce
from geomssl.probes import checks, subject
from geomssl.probes.assurance import bootstrap_mean
from geomssl.probes.negatives import silent
from geomssl.progress import track
from geomssl.seeding import generator
from geomssl.transforms.base import Transform

# fewer batches than this say little of their own spread
FEWEST = 5
# the bound is a theorem; what exceeds it by more than this share is a fault, less is rounding of the loss
ROUNDING = 1e-9


@dataclass(frozen=True)
class Bounded:
    """InfoNCE of one batch, taken apart. loss: float64 scalar. The others: float64 (N,), an anchor each; their mean is meant.

    bound = beta invariance + beta repulsion + constant = loss + slack,    slack = -log mean_l exp(beta (s_l - s*)) >= 0
    loss  = beta invariance + beta expected + entropy                      (Proposition C.1)

    invariance: -s+, minus the similarity of the positive.  repulsion: s*, the largest similarity in the denominator.
    expected: E_D[s], the mean similarity under D_l = exp(beta s_l) / sum_k exp(beta s_k).  entropy: H of D, in nats.
    constant: log m, where m terms stand in the denominator.
    """

    beta: float
    constant: float
    loss: Tensor
    invariance: Tensor
    repulsion: Tensor
    slack: Tensor
    expected: Tensor
    entropy: Tensor

    @property
    def bound(self) -> Tensor:
        return self.beta * (self.invariance + self.repulsion) + self.constant


def info_nce_bound(
    z1: Tensor, z2: Tensor, beta: float, denominator: Denominator = "decoupled", symmetric: bool = False
) -> Bounded:
    """The upper bound of InfoNCE on a batch of N pairs, for every denominator, with the gap between them.

        decoupled  m = 2 (N - 1), s* over both views of every other image (Cosentino et al. 2022, Eq. 3)
        nt-xent    m = 2 N - 1, s* over those and the positive
        pooled     m = 4 (N - 1), s* over all four pairs of views of this and every other image

    log sum_l exp(beta s_l) <= beta max_l s_l + log m holds for every batch, every projector and every beta >= 0, with
    equality where all s_l of an anchor are equal (a collapsed batch; beta = 0). z1, z2: (N, p), N >= 2; rows are normalised
    inside, all in float64. symmetric: each figure averaged over both directions (pooled has only one). loss is
    losses.info_nce, computed apart from the rest. Raises what that raises, and GeomsslError for numbers not finite.
    """
    a, b = (F.normalize(checks.matrix(z, "projector outputs"), dim=1) for z in (z1, z2))
    loss = info_nce(a, b, beta, denominator, symmetric)
    positive = (a * b).sum(dim=1)
    across, within1, within2 = (_others(x) for x in (a @ b.T, a @ a.T, b @ b.T))
    directions = [[across, within1]]
    if denominator == "pooled":
        directions = [[across, _others(b @ a.T), within1, within2]]
    elif symmetric:
        directions.append([_others(b @ a.T), within2])
    own = [positive[:, None]] if denominator == "nt-xent" else []
    parts = [_parts(torch.cat([*terms, *own], dim=1), positive, beta) for terms in directions]
    repulsion, slack, expected, entropy = (torch.stack(values).mean(dim=0) for values in zip(*parts, strict=True))
    constant = math.log(directions[0][0].shape[1] * len(directions[0]) + len(own))
    return Bounded(beta, constant, loss, -positive, repulsion, slack, expected, entropy)


def _others(similarities: Tensor) -> Tensor:
    """(N, N) without its diagonal: (N, N - 1)."""
    n = len(similarities)
    return similarities.flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)


def _parts(terms: Tensor, positive: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest similarity, slack, expected similarity and entropy of every anchor; terms (N, m)."""
    largest = terms.amax(dim=1)
    # each at most 1 and one of them 1, so that their mean is at most 1 and the slack never negative, also after rounding
    weights = (beta * (terms - largest[:, None])).exp()
    slack = -weights.mean(dim=1).log()
    share = weights / weights.sum(dim=1, keepdim=True)
    return largest, slack, (share * terms).sum(dim=1), -torch.xlogy(share, share).sum(dim=1)


def alignment(z1: Tensor, z2: Tensor) -> float:
    """Mean of ||z_i(1) - z_i(2)||^2 over pairs of unit rows (N, p): 2 + 2 invariance, 0 where views agree, 4 at most.

    Raises GeomsslError for shapes that differ or numbers not finite. Source: Wang and Isola 2020, with exponent 2.
    """
    if z1.shape != z2.shape:
        given = f"views of shapes {tuple(z1.shape)} and {tuple(z2.shape)}"
        raise GeomsslError(given, "two matrices (N, p)", reason="bad-shape")
    a, b = (F.normalize(checks.matrix(z, "projector outputs"), dim=1) for z in (z1, z2))
    return float((a - b).square().sum(dim=1).mean())


def uniformity(z: Tensor, t: float = 2.0) -> float:
    """log of the mean of exp(-t ||z_i - z_j||^2) over all pairs i < j of unit rows (N, p): 0 where all are equal.

    The lower, the more evenly they lie on the sphere. Raises GeomsslError for fewer than two rows or numbers not finite.
    Source: Wang and Isola 2020, with t = 2.
    """
    unit = F.normalize(checks.matrix(z, "projector outputs"), dim=1)
    if len(unit) < 2:
        raise GeomsslError(f"uniformity of {len(unit)} row", "at least 2", reason="too-few-images")
    return float((-t * (2 - 2 * _others(unit @ unit.T))).exp().mean().log())


class Options(subject.Options):
    """Settings of the bound probe."""

    batch: int | None = Field(None, ge=2, description="images a batch  [default: the run's own, else 128]")
    batches: int = Field(20, ge=1, le=10_000, description="batches at least; more passes, with new views, where one has fewer")
    beta: float | None = Field(None, ge=0, description="inverse temperature  [default: the run's own, else 2]")
    denominator: Denominator | None = Field(None, description="of InfoNCE  [default: the run's own, else decoupled]")
    symmetric: bool = Field(True, description="average both directions, as SimCLR trains")


@dataclass(frozen=True)
class _Setting:
    """What is measured, once the run's own settings have stood in for what was not asked."""

    batch: int
    beta: float
    denominator: Denominator
    per_pass: int
    passes: int


def probe(subject: subject.Subject, options: Options) -> Artifact:
    """InfoNCE and its upper bound on batches of two views of the run's own policy."""
    subject.need_projector("bound")
    subject.need(2, "a contrastive batch")
    notes: list[str] = []
    policy = subject.training_policy(notes)
    indices = subject.choose(options)
    setting = _setting(subject, options, len(indices), notes)
    rows = _measure(subject, indices, policy, setting, options)
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    above = sum(row["loss"] > row["bound"] + ROUNDING * max(1.0, abs(row["bound"])) for row in rows)
    if above:
        raise RuntimeError(f"InfoNCE exceeds its upper bound in {above} of {len(rows)} batches")
    metrics = _metrics(columns, setting, options.seed)
    value = {m.name: float(m.value or 0) for m in metrics}
    notes += _remarks(setting, value, columns)
    notes += silent(subject.features(indices, "z", view=(policy, options.seed, 1)), "z(1)") + subject.projector_remarks()
    directions = "Both directions averaged" if options.symmetric else "Anchors from view 1"
    constant = {"decoupled": "log 2(N-1)", "nt-xent": "log(2N-1)", "pooled": "log 4(N-1)"}[setting.denominator]
    return Artifact(
        probe="bound",
        title="InfoNCE and its upper bound",
        headline=(
            f"InfoNCE ({setting.denominator}, beta = {setting.beta:g}, N = {setting.batch}) is {value['loss']:.3f} on average, "
            f"{value['slack']:.3f} below its bound {value['bound']:.3f}; the bound held in all {len(rows)} batches."
        ),
        definition=(
            f"L <= beta invariance + beta repulsion + {constant}: invariance = -mean s(z_i(1), z_i(2)), repulsion = the mean "
            "over anchors of s*, the largest similarity in the denominator; s is the cosine of the projector's outputs. "
            "slack = bound - L = -mean log mean_l exp(beta (s_l - s*)) >= 0, zero where all similarities of an anchor are "
            f"equal. L = beta invariance + beta expected + entropy (Prop. C.1). {directions}; float64; eval mode. "
            "alignment = mean ||z_i(1) - z_i(2)||^2, uniformity = log mean exp(-2 ||z_i - z_j||^2) of unit outputs (Wang and "
            "Isola 2020)."
        ),
        metrics=metrics,
        tables=[
            _curve(columns),
            Table("batches", "Every batch", columns, "loss = bound - slack. A pass uses each image at most once."),
        ],
        figures=[
            Figure(
                "bound", "line", "InfoNCE and its upper bound, batch by batch",
                "The loss never exceeds the bound. Where they move together, lowering the bound is what training can do.",
                "curve", "batch", "value", "quantity", x_label="batch", y_label="nats",
            )
        ],
        notes=notes,
        options=options.model_dump(mode="json"),
        provenance=subject.provenance,
    )


def _setting(subject: subject.Subject, options: Options, n: int, notes: list[str]) -> _Setting:
    known = subject.trained
    asked = options.batch or known.get("batch_size")
    batch = min(asked or 128, n)
    if options.batch and batch < options.batch:
        raise GeomsslError(f"--batch {options.batch} on {n} images", f"2 to {n}", reason="too-few-images")
    if not asked:
        notes.append(f"The batch size of the training is not known: batches of {batch}.")
    elif batch < asked:
        notes.append(f"The training batch of {asked} is larger than the {n} images here: batches of {n} have fewer negatives.")
    beta = options.beta if options.beta is not None else known.get("beta")
    if beta is None:
        beta = 2.0
        notes.append("The inverse temperature of the training is not known: beta = 2.")
    denominator = options.denominator or known.get("denominator") or "decoupled"
    per_pass = n // batch
    return _Setting(batch, float(beta), denominator, per_pass, -(-options.batches // per_pass))


def _measure(
    subject: subject.Subject, indices: Tensor, policy: Transform, setting: _Setting, options: Options
) -> list[dict[str, float]]:
    """One row a batch, batches as in training: a seeded order, the last smaller one left out; pass p: views 2p + 1, 2p + 2."""
    rows: list[dict[str, float]] = []
    for number in track(range(setting.passes), "bound"):
        z1, z2 = (
            subject.features(indices, "z", view=(policy, options.seed, 2 * number + side)) for side in (1, 2)
        )
        order = torch.randperm(len(indices), generator=generator(options.seed, "bound-batches", number))
        for chosen in order[: setting.per_pass * setting.batch].split(setting.batch):
            a, b = z1[chosen], z2[chosen]
            found = info_nce_bound(a, b, setting.beta, setting.denominator, options.symmetric)
            spread = {"alignment": alignment(a, b), "uniformity": (uniformity(a) + uniformity(b)) / 2}
            rows.append(_row(len(rows), found, setting) | spread)
    return rows


def _row(number: int, found: Bounded, setting: _Setting) -> dict[str, float]:
    means = {
        key: float(getattr(found, key).mean())
        for key in ("loss", "bound", "slack", "invariance", "repulsion", "expected", "entropy")
    }
    return {"batch": number + 1, "pass": number // setting.per_pass + 1, **means, "constant": found.constant}


ABOUT: dict[str, tuple[str, str]] = {
    "loss": ("nats", "InfoNCE, mean over batches"),
    "bound": ("nats", "beta invariance + beta repulsion + constant, mean over batches"),
    "slack": ("nats", "bound - loss"),
    "invariance": ("", "minus the cosine similarity of the two views of an image"),
    "repulsion": ("", "cosine similarity to the most similar term of the denominator"),
    "expected": ("", "mean similarity in the denominator, each weighed by its share of it"),
    "entropy": ("nats", "entropy of those shares; the constant, where all terms weigh the same"),
    "alignment": ("", "squared distance of the unit outputs of the two views of an image"),
    "uniformity": ("nats", "log of the mean of exp(-2 squared distance) over pairs of images in a batch, views averaged"),
}


def _metrics(columns: dict[str, list[float]], setting: _Setting, seed: int) -> list[Metric]:
    count = len(columns["loss"])
    values = torch.tensor([columns[key] for key in ABOUT], dtype=torch.float64).T
    method = (
        f"percentile bootstrap over {count} batches, 95 %: another draw of batches and views"
        + (" of the same images" if setting.passes > 1 else "")
    )
    reason = None
    if count < FEWEST:
        reason = f"{count} batches: too few for an interval over batches"
    else:
        low, high = bootstrap_mean(values, seed)
    metrics = []
    for i, (name, (unit, about)) in enumerate(ABOUT.items()):
        interval = None if reason else Interval(float(low[i]), float(high[i]), method)
        metrics.append(Metric(name, float(values[:, i].mean()), count, interval, reason, unit, about=about))
    metrics.append(Metric(
        "constant", columns["constant"][0], reason="a closed form of the batch size", unit="nats",
        about="log of the number of terms",
    ))
    return metrics


def _remarks(
    setting: _Setting, value: dict[str, float], columns: dict[str, list[float]]
) -> list[str]:
    said = []
    if setting.passes > 1:
        plural = "es" if setting.per_pass > 1 else ""
        said.append(
            f"{setting.per_pass} batch{plural} of {setting.batch} a pass: {setting.passes} passes over the same images, with "
            "fresh views. The interval holds these images fixed."
        )
    if max(columns["slack"]) <= 1e-12 and setting.beta > 0:
        said.append("The slack is zero: all similarities are equal, as in a collapsed batch.")
    if setting.denominator == "nt-xent" and abs(value["repulsion"] + value["invariance"]) < 1e-6 < setting.beta:
        said.append("The positive is the most similar term of nearly every anchor: repulsion is its similarity.")
    said.append(
        "Encoder and projector are in eval mode; the training takes its loss in train mode, where BatchNorm sees the batch."
    )
    return said


def _curve(columns: dict[str, list[float]]) -> Table:
    quantities = ("loss", "bound")
    return Table(
        "curve", "Loss and bound, batch by batch",
        {
            "batch": [b for _ in quantities for b in columns["batch"]],
            "quantity": [q for q in quantities for _ in columns[q]],
            "value": [v for q in quantities for v in columns[q]],
        },
    )
