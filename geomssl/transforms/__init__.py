"""One vocabulary of transformations: batched, on the device, with explicit parameters and generators."""

from __future__ import annotations

from geomssl.transforms.base import Group, Parameter, Transform
from geomssl.transforms.compose import Compose, policy
from geomssl.transforms.expression import Expression, named, parse
from geomssl.transforms.geometric import Geometric, HorizontalFlip, ResizedCrop, Rotate, Shear, Translate, Zoom
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
    "Expression",
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
    "Shear",
    "Transform",
    "Translate",
    "Translations",
    "Zoom",
    "named",
    "parse",
    "policy",
]
