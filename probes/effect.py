"""What a repair changes: the total error before and after, with images in pairs, and which repairs to try first."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geomssl.probes.aliasing import Aliasing
from geomssl.probes.assurance import interval, resampled_sums
from geomssl.probes.breaks import border
from geomssl.probes.defect import EquivarianceError
from geomssl.probes.inputs import Inputs
from geomssl.probes.judge import Settings, judge
from geomssl.probes.layers import single
from geomssl.probes.repair import Repair, joint, repairs, together
from geomssl.probes.static import Call, Move
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Size, Transform

# A change under this share of the total is rounding of float32.
ROUNDING = 1e-5


@dataclass(frozen=True)
class Effect:
    """A repair, the total before and after, and the bounds of the change at a level that holds for all repairs at once."""

    repair: Repair
    where: str
    before: float
    after: float
    low: float
    high: float

    @property
    def name(self) -> str:
        return f"{self.where}: {self.repair.what}"

    @property
    def change(self) -> float:
        return self.after - self.before

    @property
    def sure(self) -> int:
        """-1 where the total falls, 1 where it rises, 0 where neither is sure, or where the change is but rounding."""
        if not abs(self.change) > ROUNDING * self.before:
            return 0
        return -1 if self.high < 0 else 1 if self.low > 0 else 0


def total(
    f: Callable[[Tensor], Any], inputs: Inputs, transform: Transform, params: Tensor, declared: Action, batch_size: int,
    seed: int,
) -> EquivarianceError:
    """The errors of all elements, image by image; without a floor or r, and with the one resample that cannot be helped."""
    reader = single(f, f(inputs.of(slice(0, 1))), None)
    settings = Settings(resamples=1, seed=seed, batch_size=batch_size, references=0)
    found, _ = judge(reader, inputs, OneWay(transform), params, [declared], "none", None, settings)
    return found[0]


class OneWay(Transform):
    """The transform without its inverse, so that no pass is spent on a floor that nothing here reads."""

    def __init__(self, transform: Transform) -> None:
        self.transform, self.name, self.parameters = transform, transform.name, transform.parameters

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return self.transform.sample(n, generator, size)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return self.transform(images, params)

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        return self.transform.is_exact(params, size)


def pooled(found: EquivarianceError) -> float | None:
    """The total over all elements together; None where the features do not vary."""
    below = float(found.denominators.sum())
    return math.sqrt(float(found.numerators.sum()) / below) if below > 0 else None


def effect(
    before: EquivarianceError, after: EquivarianceError, repair: Repair, where: str, count: int, seed: int = 0,
    level: float = 0.95, resamples: int = 2000,
) -> Effect:
    """The change of the pooled total with its interval: the images of both are resampled together.

    count: repairs among which the best will be named; the level is shared out over them (Bonferroni).
    """
    sums = [t.sum(dim=1) for found in (before, after) for t in (found.numerators, found.denominators)]
    drawn = resampled_sums(torch.stack(sums, dim=1), seed, resamples)
    change = (drawn[:, 2] / drawn[:, 3]).sqrt() - (drawn[:, 0] / drawn[:, 1]).sqrt()
    low, high = interval(change[:, None], 1 - (1 - level) / count)
    first, second = pooled(before), pooled(after)
    return Effect(
        repair, where, math.nan if first is None else first, math.nan if second is None else second,
        float(low[0]), float(high[0]),
    )


def suspects(
    calls: Sequence[Call], asked: tuple[Move, ...], metered: Mapping[int, Aliasing], most: int
) -> tuple[list[Repair], dict[int, str], list[Repair]]:
    """The repairs to measure, why a call has none, and the repairs that wait. Those first whose cause touches most: the share
    of the energy that aliases, or of the output's pixels that see the border.
    """
    found: list[Repair] = []
    unbuilt: dict[int, str] = {}
    for call in calls:
        made, why = repairs(call, asked)
        if why:
            unbuilt[call.number] = why
        found += made

    def touches(one: Repair) -> float:
        shares = [metered[call.number].share() for call in one.calls if call.number in metered]
        if one.cause == "padding":
            return max(border(call) for call in one.calls)
        return 1.0 if one.cause == "places" else max(shares, default=0.0)

    ordered = sorted(together(found), key=touches, reverse=True)
    return ordered[:most], unbuilt, ordered[most:]


def joints(found: Sequence[Repair]) -> list[Repair]:
    """All repairs of one cause at once, where there are several causes, and all of them: causes can hide each other."""
    causes = list(dict.fromkeys(one.cause for one in found))
    places = {cause: {call.number for one in found if one.cause == cause for call in one.calls} for cause in causes}
    made = [
        joint([one for one in found if one.cause == cause], f"all repairs of {cause}", cause)
        for cause in causes if len(causes) > 1 and sum(one.cause == cause for one in found) > 1 and len(places[cause]) > 1
    ]
    if sum(len(numbers) for numbers in places.values()) > 1:
        made.append(joint(found, "all repairs", "all"))
    return made
