"""One vocabulary of transformations: batched, on the device, with explicit parameters and generators."""

from __future__ import annotations

import re
from collections.abc import Callable

from geomssl import registry
from geomssl.errors import unknown
from geomssl.transforms.base import Group, Parameter, Transform
from geomssl.transforms.compose import POLICIES, Compose, policy
from geomssl.transforms.geometric import Geometric, HorizontalFlip, ResizedCrop, Rotate, Translate, Zoom
from geomssl.transforms.groups import CyclicRotations, Dihedral, Flips, Scales, Translations
from geomssl.transforms.photometric import (
    Brightness,
    Contrast,
    GaussianBlur,
    Grayscale,
    Hue,
    Jitter,
    Saturation,
)

__all__ = [
    "Brightness",
    "Compose",
    "Contrast",
    "CyclicRotations",
    "Dihedral",
    "Flips",
    "GaussianBlur",
    "Geometric",
    "Grayscale",
    "Group",
    "HorizontalFlip",
    "Hue",
    "Jitter",
    "Parameter",
    "ResizedCrop",
    "Rotate",
    "Saturation",
    "Scales",
    "Transform",
    "Translate",
    "Translations",
    "Zoom",
    "named",
    "policy",
]

_NAMED: dict[str, Callable[[], Transform]] = {
    "c4": CyclicRotations,
    "c8": lambda: CyclicRotations(8),
    "d4": Dihedral,
    "flips": Flips,
    "translations": Translations,
    **{
        kind.name: kind
        for kind in (
            Rotate, Translate, Zoom, HorizontalFlip, ResizedCrop, Brightness, Contrast, Saturation, Hue, Jitter,
            Grayscale, GaussianBlur,
        )
    },
}


def named(text: str) -> Transform:
    """A transform by a short name, with its default settings.

    "c4", "d4" and any other "c<n>" or "d<n>", "flips", "translations"; a continuous transform's name ("rotate", "zoom",
    "resized-crop", ...); a policy's name; or "package.module:attribute", which is called. GeomsslError otherwise.
    """
    if text in _NAMED:
        return _NAMED[text]()
    if text in POLICIES:
        return policy(text)
    if found := re.fullmatch(r"([cd])([1-9]\d{0,2})", text):
        return {"c": CyclicRotations, "d": Dihedral}[found[1]](int(found[2]))
    if ":" in text:
        return registry.load_attribute(text, "transform")()
    raise unknown("transform", text, [*_NAMED, *POLICIES])
