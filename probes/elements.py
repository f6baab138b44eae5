"""Which elements of a transform to measure, and what they are called in tables, figures and sentences."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms import (
    CyclicRotations,
    Dihedral,
    Flips,
    HorizontalFlip,
    Rotate,
    Scales,
    Translate,
    Translations,
    Zoom,
)
from geomssl.transforms.base import Group, Size, Transform
from geomssl.transforms.expression import parse
from geomssl.transforms.photometric import Photometric


def spoken(text: str) -> tuple[Transform, Tensor | None]:
    """The transform of an expression, and the elements (E, P) that it lists, without the identity; None where it lists none."""
    found = parse(text)
    if found.grid is None:
        return found.transform, None
    grid = found.grid[(found.grid != found.transform.identity().to(found.grid)).any(dim=1)]
    if not len(grid):
        raise GeomsslError(f"the elements of {text!r}", "one besides the identity")
    return found.transform, grid


def elements(transform: Transform, size: Size, draws: int = 16, seed: int = 0, step: int = 1) -> Tensor:
    """The elements to measure, (E, P): all but the identity of a finite transform, else at most `draws` seeded ones.

    step: shifts are multiples of so many pixels. GeomsslError where only the identity is left.
    """
    kinds = [p.kind for p in transform.parameters]
    if isinstance(transform, Group) and transform.order is not None:
        found = transform.elements(size)
    elif isinstance(transform, Translations) and transform.wrap:
        found = transform.elements(size)
        found = found[(found % step == 0).all(dim=1) & (found != 0).any(dim=1)]
        found = found[torch.randperm(len(found), generator=generator(seed, "elements"))[:draws]]
    elif len(kinds) == 1 and kinds[0] in ("index", "binary"):
        only = transform.parameters[0]
        found = torch.arange(only.low, only.high + 1).unsqueeze(1)
    else:
        found = transform.sample(draws, generator(seed, "elements"), size)
        found = (found / step).round() * step if isinstance(transform, Translations) else found
    found = torch.unique(found, dim=0) if found.numel() else found
    found = found[(found != transform.identity().to(found)).any(dim=1)]
    if not len(found):
        raise GeomsslError(f"{transform.name} at {size[0]}x{size[1]} pixels", "an element besides the identity")
    return found


def label(transform: Transform, row: list[float]) -> str:
    """An element in words: "90°", "mirror, then 90°", "dy = 1, dx = -2 pixels"."""
    k = int(row[0]) if row else 0
    if isinstance(transform, Flips):
        return "mirror" if k else "identity"
    if isinstance(transform, CyclicRotations):
        return f"{360 * k / transform.order:g}°"
    if isinstance(transform, Dihedral):
        turns = transform.order // 2
        turn = f"{360 * (k % turns) / turns:g}°"
        return turn if k < turns else ("mirror" if k == turns else f"mirror, then {turn}")
    if isinstance(transform, Scales):
        return f"×{transform.factors[k]:.4g}"
    units = {p.unit for p in transform.parameters}
    unit = f" {units.pop()}" if len(units) == 1 else ""
    return (", ".join(f"{p.name} = {value:.3g}" for p, value in zip(transform.parameters, row, strict=True)) + unit).strip()


def labels(transform: Transform, params: Tensor) -> list[str]:
    """The elements (E, P) in words; "draw 1", "draw 2", ... where there are too many parameters to say."""
    if params.shape[1] > 3:
        return [f"draw {i + 1}" for i in range(len(params))]
    return [label(transform, row) for row in params.tolist()]


def doing(transform: Transform) -> str:
    """What the transform does, to begin a sentence: "Turning the image (c4)"."""
    for kinds, words in (
        ((CyclicRotations, Rotate), "Turning"), (Dihedral, "Turning and mirroring"), ((Flips, HorizontalFlip), "Mirroring"),
        ((Translations, Translate), "Shifting"), ((Scales, Zoom), "Zooming"), (Photometric, "Recolouring"),
    ):
        if isinstance(transform, kinds):
            return f"{words} the image ({transform.name})"
    return f"Transforming the image by {transform.name}"
