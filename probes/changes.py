"""What was done between two views, as numbers to regress: a transform's parameters, or how the data set's factors differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.data.base import Source
from geomssl.errors import GeomsslError
from geomssl.objectives.pairs import QUATERNION, turn
from geomssl.probes.subject import Part, Subject
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter, Transform

MOST_CATEGORIES = 64
Kind = Literal["continuous", "binary", "category", "angle", "rotation"]


@dataclass(frozen=True)
class Target:
    """One thing to regress: its columns in a matrix of targets. part: what it belongs to ("jitter" of "jitter.hue")."""

    name: str
    kind: Kind
    unit: str
    columns: slice

    @property
    def part(self) -> str:
        return self.name.partition(".")[0]


@dataclass(frozen=True)
class Pairs:
    """Pairs of views of one split. first, second: rows of the split; values (n, P): targets; unit (n,): what a bootstrap draws.

    second is None where it is a transformed view of `first`.
    """

    first: Tensor
    second: Tensor | None
    values: Tensor
    unit: Tensor


def encode(params: Tensor, parameters: Sequence[Parameter]) -> tuple[Tensor, list[Target]]:
    """Parameters (n, P) as regression targets (n, Q), float64, and what the columns are.

    continuous and binary: as they are; index: one column for each value (at most 64 of them); periodic: cosine and sine of the
    angle 2 pi value / (high - low), so that the two ends are one.
    """
    columns, targets, start = [], [], 0
    for given, parameter in zip(params.double().unbind(dim=1), parameters, strict=True):
        kind: Kind = "binary" if parameter.kind == "binary" else "continuous"
        found = given[:, None]
        if parameter.kind == "index":
            count = int(parameter.high) + 1
            if count > MOST_CATEGORIES:
                raise GeomsslError(
                    f"{parameter.name} with {count} values", f"at most {MOST_CATEGORIES}", reason="too-wide"
                )
            kind, found = "category", F.one_hot(given.long(), count).double()
        elif parameter.kind == "periodic":
            turn = 2 * math.pi * given / (parameter.high - parameter.low)
            kind, found = "angle", torch.stack([turn.cos(), turn.sin()], dim=1)
        columns.append(found)
        targets.append(Target(parameter.name, kind, parameter.unit, slice(start, start + found.shape[1])))
        start += found.shape[1]
    return torch.cat([torch.empty(len(params), 0, dtype=torch.float64), *columns], dim=1), targets


def r2(predicted: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors and squared deviations of each row, (n,) each, of one target's columns (n, k): R^2 = 1 - sum / sum.

    Deviations are from the mean of `wanted` itself, as usual; several columns (one-hot, cosine and sine, a quaternion) count
    as one vector.
    """
    errors = (predicted - wanted).square().sum(dim=1)
    return errors, (wanted - wanted.mean(dim=0)).square().sum(dim=1)


def usable(source: Source) -> list[Parameter]:
    """The factors whose difference between two images is a number: continuous and periodic ones."""
    found = [p for p in source.parameters if p.kind in ("continuous", "periodic") and p.name in source.factors]
    return [p for p in found if p.name not in QUATERNION or set(QUATERNION) <= set(source.factors)]


def moved_pairs(
    subject: Subject, rows: Tensor, part: Part, transform: Transform, seed: int
) -> tuple[Pairs, list[Target]]:
    """Each image beside its view number 0; the targets are the parameters that made it."""
    params = subject.view_params(rows, part, (transform, seed, 0))
    source = subject.source if part == "own" else subject.train
    assert source is not None
    acting = [i for i, acts in enumerate(transform.active(source.channels)) if acts]
    values, targets = encode(params[:, acting], [transform.parameters[i] for i in acting])
    return Pairs(rows, None, values, torch.arange(len(rows))), targets


def factor_pairs(subject: Subject, rows: Tensor, part: Part, seed: int) -> tuple[Pairs, list[Target]]:
    """Each image beside another of the same object, in a drawn circle; the targets are how the factors differ."""
    source = subject.source if part == "own" else subject.train
    assert source is not None
    known = {name: values.cpu().double()[rows] for name, values in source.factors.items()}
    group = known.get("object", torch.zeros(len(rows))).long()
    mixed = torch.randperm(len(rows), generator=generator(seed, f"regress-pairs-{part}"))
    order = mixed[group[mixed].argsort(stable=True)]
    following, starts = order.roll(-1), torch.ones(len(order), dtype=torch.bool)
    starts[1:] = group[order][1:] != group[order][:-1]
    first_of = order[starts][starts.long().cumsum(dim=0) - 1]
    ends = starts.roll(-1)
    following = torch.where(ends, first_of, following)
    kept = order != following
    one, two = order[kept], following[kept]
    if len(one) < 2:
        raise GeomsslError(f"{len(rows)} images of {source.name}/{source.split}, no two of one object", "several views of each",
                           reason="too-few-images")
    differing = usable(source)
    plain = [p for p in differing if p.name not in QUATERNION]
    changes = [known[p.name][two] - known[p.name][one] for p in plain]
    values, targets = encode(torch.stack(changes, dim=1) if changes else torch.empty(len(one), 0), plain)
    if any(p.name in QUATERNION for p in differing):
        turned = turn(*(torch.stack([known[name][of] for name in QUATERNION], dim=1) for of in (one, two)))
        targets.append(Target("rotation", "rotation", "", slice(values.shape[1], values.shape[1] + 4)))
        values = torch.cat([values, turned], dim=1)
    unit = group[one] if "object" in known else torch.arange(len(one))
    return Pairs(rows[one], rows[two], values, unit.unique(return_inverse=True)[1]), targets


