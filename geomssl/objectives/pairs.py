"""Positives from other images: the next frame of a sequence, or another image of the same object (row C7)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Source
from geomssl.errors import GeomsslError, nearest
from geomssl.objectives.base import ViewSpec
from geomssl.transforms.base import Parameter

Partner = Callable[[Tensor, torch.Generator], Tensor]
Positives = Literal["image", "next", "object"]


class PairSettings(Settings):
    """Where the two positives of an example come from."""

    positives: Positives = Field(
        "image", description="views of one image; of an image and the next frame; or of other images of the same object"
    )
    sequence: str = Field("sequence", description="factor that tells the sequences apart (positives next)")
    frame: str = Field("frame", description="factor that orders the frames of a sequence (positives next)")
    object: str = Field("label", description="factor that names the object, or label (positives object)")


def partners(config: PairSettings, source: Source | None) -> tuple[Partner | None, Partner | None]:
    """Whom the first and the second view show in place of image i.

    image:  i and i. next: i and the frame after it (the one before it, for the last frame of a sequence). object: two draws,
    each uniform over the other images of the same object; they may fall on the same image.
    """
    if config.positives == "image":
        return None, None
    if config.positives == "next":
        table = following(factor(source, config.sequence), factor(source, config.frame))
        return None, lambda indices, generator: table[indices]
    draw = others(factor(source, config.object, labels=True))
    return draw, draw


def paired(views: tuple[ViewSpec, ...], config: PairSettings, source: Source | None) -> tuple[ViewSpec, ...]:
    """The two views, each with its partner."""
    return tuple(view._replace(partner=partner) for view, partner in zip(views, partners(config, source), strict=True))


def factor(source: Source | None, name: str, labels: bool = False) -> Tensor:
    """The factor (len,) of that name on the CPU; labels: "label" will do. GeomsslError where it is missing or constant."""
    known = {} if source is None else dict(source.factors)
    if labels and source is not None and source.labels is not None:
        known.setdefault("label", source.labels)
    where = "no data set" if source is None else source.name
    if name not in known:
        raise GeomsslError(
            f"no factor {name!r} of {where}",
            f"one of {', '.join(known)}" if known else "a data set with factors, such as views",
            nearest(name, known), reason="no-factor",
        )
    values = known[name].cpu()
    if not bool(values.isfinite().all()):
        missing = int((~values.isfinite()).sum())
        raise GeomsslError(
            f"factor {name!r} of {where}, unknown for {missing} of {len(values)} images", "a value for every image",
            reason="no-factor",
        )
    if bool((values == values[0]).all()):
        raise GeomsslError(
            f"factor {name!r} of {where} with the one value {float(values[0]):g}",
            "a factor of at least two values: one value is nothing to learn", reason="constant-factor",
        )
    return values


QUATERNION = tuple(f"quaternion_{axis}" for axis in "xyzw")


def factors_of(names: Sequence[str]) -> tuple[str, ...]:
    """The factors behind those words: "quaternion" stands for quaternion_x, quaternion_y, quaternion_z and quaternion_w."""
    return tuple(factor for name in names for factor in (QUATERNION if name == "quaternion" else (name,)))


def change(source: Source | None, name: str) -> tuple[Parameter, ...]:
    """How the factor of that name may change from one image to another: by up to its range on the training split, or, where
    the source says that it is periodic, by half its period either way. "quaternion" is the turn between two rotations: four
    parameters, of which w is not negative.

    Raises GeomsslError where it is missing, constant or a category.
    """
    for needed in factors_of([name]):
        factor(source, needed)
    if name == "quaternion":
        bounds = {axis: (1.0, 0.0) if axis == QUATERNION[3] else (0.0, -1.0) for axis in QUATERNION}
        return tuple(Parameter(axis, "", "continuous", identity, low, 1.0) for axis, (identity, low) in bounds.items())
    values = factor(source, name)
    said = {p.name: p for p in source.parameters}.get(name) if source is not None else None
    if said is not None and said.kind == "index":
        raise GeomsslError(f"the change of {name!r}, a category", "a continuous factor", reason="bad-value")
    if said is not None and said.kind == "periodic":
        half = (said.high - said.low) / 2
        return (Parameter(name, said.unit, "periodic", 0.0, -half, half),)
    reach = float(values.max() - values.min())
    return (Parameter(name, "" if said is None else said.unit, "continuous", 0.0, -reach, reach),)


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], by: tuple[Parameter, ...]) -> Tensor:
    """(N, len(by)): after - before, the short way round where a factor is periodic: in [low, high).

    Of a quaternion it is the `turn` from the one rotation to the other.
    """
    first = [before[p.name] for p in by]
    second = [after[p.name] for p in by]
    if len(by) == 4:
        return turn(torch.stack(first, dim=1), torch.stack(second, dim=1))
    difference = second[0] - first[0]
    if by[0].kind == "periodic":
        difference = (difference - by[0].low).remainder(by[0].high - by[0].low) + by[0].low
    return difference[:, None]


def turn(first: Tensor, second: Tensor) -> Tensor:
    """The unit quaternions (x, y, z, w) of first^-1 second, rows of (n, 4), with w >= 0: q and -q are one rotation.

    A rotation here leads from the object's own frame to the world's, so this is the turn in the object's frame, as 3DIEBench's
    published loader has it (facebookresearch/SIE, src/dataset.py). In the world's frame it would be second first^-1.
    """
    v1, w1, v2, w2 = first[:, :3], first[:, 3:], second[:, :3], second[:, 3:]
    found = torch.cat([w1 * v2 - w2 * v1 - torch.linalg.cross(v1, v2), w1 * w2 + (v1 * v2).sum(dim=1, keepdim=True)], dim=1)
    return torch.where(found[:, 3:] < 0, -found, found)


def following(sequence: Tensor, frame: Tensor) -> Tensor:
    """Per image, the index of the next frame of its sequence; of a last frame, the one before. long (len,)."""
    order = frame.argsort(stable=True)
    order = order[sequence[order].argsort(stable=True)]
    same = sequence[order][1:] == sequence[order][:-1]
    after = torch.cat([same, same.new_zeros(1)])
    before = torch.cat([same.new_zeros(1), same])
    alone = int((~after & ~before).sum())
    if alone:
        raise GeomsslError(
            f"{alone} of {len(sequence)} images alone in their sequence", "sequences of at least two frames",
            reason="too-few-images",
        )
    place = torch.arange(len(order))
    table = torch.empty_like(order)
    table[order] = order[torch.where(after, place + 1, place - 1)]
    return table


def others(objects: Tensor) -> Partner:
    """Draws, for each image, another of the same object; uniform over them."""
    _, group, count = objects.unique(return_inverse=True, return_counts=True)
    if int(count.min()) < 2:
        raise GeomsslError(
            f"{int((count < 2).sum())} of {len(count)} objects with a single image", "at least two images of every object",
            reason="too-few-images",
        )
    order = group.argsort(stable=True)
    start = count.cumsum(0) - count
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order)) - start[group[order]]

    def draw(indices: Tensor, generator: torch.Generator) -> Tensor:
        own, size = group[indices], count[group[indices]]
        room = size - 1
        step = 1 + (torch.rand(len(indices), generator=generator, dtype=torch.float64) * room).long().clamp(max=room - 1)
        return order[start[own] + (place[indices] + step) % size]

    return draw

