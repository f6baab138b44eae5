"""Compose: transforms in sequence, neighbouring geometric parts read once; and the augmentation policies of the papers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from geomssl.errors import GeomsslError, unknown
from geomssl.transforms.base import Parameter, Size, Transform
from geomssl.transforms.geometric import Geometric, HorizontalFlip, ResizedCrop, Rotate, Translate, Zoom, resample
from geomssl.transforms.groups import CyclicRotations
from geomssl.transforms.photometric import GaussianBlur, Grayscale, Jitter
from geomssl.transforms.sampling import checked, working_dtype

# Numbers that a CPU works on at a time, so that they stay in its cache from one part to the next.
CACHED = 2**18


class Compose(Transform):
    """Parts applied in order, the first one first. Parameters are concatenated and named "<part>.<parameter>".

    A part that stands in twice is named "<part>-2" the second time; a Compose within is taken apart. Neighbouring
    geometric parts become one bilinear reading: their maps of coordinates are chained, and what any of them says lies
    outside is carried along. This equals applying them one by one wherever all but one of them move whole pixels onto
    whole pixels; elsewhere it blurs once instead of several times. Wrapped Translations stay a reading of their own.

    antialias: smooth before a reading that shrinks by s > 1 in all, with a Gaussian of sigma = sqrt(s^2 - 1) / 2 pixels
    (False by default; also on where a part has it).
    """

    def __init__(self, parts: Sequence[Transform], name: str = "compose", antialias: bool = False) -> None:
        self.name = name
        flat: list[Transform] = []
        for part in parts:
            flat += part.parts if isinstance(part, Compose) else [part]
        self.parts: tuple[Transform, ...] = tuple(flat)
        self.slices: list[slice] = []
        self.parameters = ()
        seen: Counter[str] = Counter()
        for part in self.parts:
            seen[part.name] += 1
            prefix = part.name if seen[part.name] == 1 else f"{part.name}-{seen[part.name]}"
            self.slices.append(slice(len(self.parameters), len(self.parameters) + len(part.parameters)))
            self.parameters += tuple(_prefixed(prefix, p) for p in part.parameters)
        self.antialias = antialias or any(isinstance(part, Geometric) and part.antialias for part in self.parts)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        empty = torch.empty(n, 0, device=generator.device)
        return torch.cat([empty, *(part.sample(n, generator, size) for part in self.parts)], dim=1)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        params = checked(self, images, params)
        few = max(1, CACHED // max(1, images[:1].numel()))
        if images.device.type != "cpu" or len(images) <= few or torch.compiler.is_compiling():
            return self._apply(images, params)
        pairs = zip(images.split(few), params.split(few), strict=True)
        return torch.cat([self._apply(some, rows) for some, rows in pairs])

    def _apply(self, images: Tensor, params: Tensor) -> Tensor:
        pixels = images.to(working_dtype(images.dtype))
        chain: list[tuple[Geometric, Tensor]] = []
        for part, columns in zip(self.parts, self.slices, strict=True):
            if isinstance(part, Geometric) and part.fusible:
                chain.append((part, part.admit(images, params[:, columns])))
                continue
            pixels = part(self._read(pixels, chain), params[:, columns])
            chain = []
        return self._read(pixels, chain).to(images.dtype)

    def _read(self, pixels: Tensor, chain: list[tuple[Geometric, Tensor]]) -> Tensor:
        if len(chain) == 1 and not self.antialias:
            return chain[0][0](pixels, chain[0][1])
        return resample(pixels, chain, self.antialias) if chain else pixels

    def pull(self, coordinates: Tensor, params: Tensor, size: Size) -> Tensor:
        """Where output points (n, H, W, 2) come from; GeomsslError where a part does not merely move pixels."""
        for part, columns in zip(reversed(self.parts), reversed(self.slices), strict=True):
            if not isinstance(part, Geometric):
                raise GeomsslError(f"{self.name} with {part.name}", "geometric parts only", reason="not-geometric")
            coordinates = part.pull(coordinates, params[:, columns], size)
        return coordinates

    def identity(self, n: int = 1) -> Tensor:
        return torch.cat([torch.empty(n, 0), *(part.identity(n) for part in self.parts)], dim=1)

    def inverse(self, params: Tensor) -> Tensor:
        if len(self.parts) == 1:
            return self.parts[0].inverse(params)
        return super().inverse(params)

    def active(self, channels: int) -> tuple[bool, ...]:
        return tuple(acts for part in self.parts for acts in part.active(channels))

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        exact = torch.ones(len(params), dtype=torch.bool, device=params.device)
        for part, columns in zip(self.parts, self.slices, strict=True):
            exact = exact & part.is_exact(params[:, columns], size)
        return exact


def _prefixed(prefix: str, parameter: Parameter) -> Parameter:
    return replace(parameter, name=f"{prefix}.{parameter.name}")


def _simclr(crop: float, strength: float, flip: float | None) -> Callable[[], list[Transform]]:
    """Crop, flip, jitter of strength s (.8 s, .8 s, .8 s, .2 s; p .8), grayscale (p .2)."""

    def build() -> list[Transform]:
        return [
            ResizedCrop((crop, 1.0)),
            *([] if flip is None else [HorizontalFlip(flip)]),
            Jitter(0.8 * strength, 0.8 * strength, 0.8 * strength, 0.2 * strength, p=0.8),
            Grayscale(0.2),
        ]

    return build


def _regressed() -> list[Transform]:
    """The six transformations that row X5 regresses, all of them in each view."""
    return [
        ResizedCrop((0.2, 1.0)), HorizontalFlip(0.5), Rotate(90), Translate(0.2), Jitter(0.4, 0.4, 0.4, 0.1, p=0.8),
        GaussianBlur(5, (0.1, 2.0), p=0.5),
    ]


POLICIES: dict[str, tuple[Callable[[], list[Transform]], str]] = {
    "none": (list, "images as they are"),
    "simclr": (_simclr(0.08, 0.5, 0.5), "SimCLR on CIFAR: crop .08-1, flip .5, jitter .5, gray .2"),
    "large": (_simclr(0.08, 0.5, 0.5), "crop .08-1, flip .5, jitter .5, gray .2 (row G11)"),
    "moderate": (_simclr(0.5, 0.25, 0.5), "crop .5-1, flip .5, jitter .25, gray .2 (row G11)"),
    "small": (_simclr(0.9, 0.05, None), "crop .9-1, no flip, jitter .05, gray .2 (row G11)"),
    "ciper": (_simclr(0.2, 0.5, 0.8), "crop .2-1, flip .8, jitter .5, gray .2 (row C4)"),
    "equivariant": (_regressed, "crop .2-1, flip .5, turn to 90 degrees, shift .2, jitter .4, blur (rows X2-X5)"),
    "turn-shift-jitter": (lambda: _regressed()[2:5], "turn to 90 degrees, shift .2, jitter .4: a part of equivariant"),
    "rotations": (lambda: [CyclicRotations(4)], "one of 0, 90, 180, 270 degrees (row H1)"),
    "translations20": (lambda: [Translate(0.2)], "shifts by up to 20 % of height and width (row H1)"),
    "scales": (lambda: [Zoom(0.57, 1.0)], "shrunk to .57-1 of the size (row H1)"),
}


def _without(base: str, name: str) -> Callable[[], list[Transform]]:
    return lambda: [part for part in POLICIES[base][0]() if part.name != name]


POLICIES |= {
    f"ciper-no-{word}": (_without("ciper", name), f"ciper without {name} (row C9)")
    for word, name in (
        ("crop", "resized-crop"), ("flip", "horizontal-flip"), ("jitter", "jitter"), ("gray", "grayscale")
    )
}


def policy(name: str) -> Compose:
    """The augmentation policy of that name; GeomsslError naming the nearest where there is none."""
    if name not in POLICIES:
        raise unknown("policy", name, POLICIES)
    return Compose(POLICIES[name][0](), name=name)
