"""Directions of augmentation: each part of a policy alone, at a share of its strength, and along one parameter at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter, Size, Transform
from geomssl.transforms.geometric import ResizedCrop

# draws that tell how far a policy moves a parameter
DRAWS = 512
GRADUAL = ("continuous", "periodic")


def parts(policy: Transform, channels: int) -> tuple[dict[str, Transform], list[str]]:
    """The parts of a policy that act on images of so many channels, by name (a second one is "name-2"); and the others."""
    found: dict[str, Transform] = {}
    idle: list[str] = []
    seen: Counter[str] = Counter()
    for part in getattr(policy, "parts", (policy,)):
        seen[part.name] += 1
        name = part.name if seen[part.name] == 1 else f"{part.name}-{seen[part.name]}"
        if any(part.active(channels)):
            found[name] = part
        else:
            idle.append(name)
    return found, idle


def gradual(part: Transform, channels: int) -> bool:
    """Whether it can be done by half: every parameter that acts is a number, and none is a choice."""
    kinds = [p.kind for p, acts in zip(part.parameters, part.active(channels), strict=True) if acts]
    return all(kind in GRADUAL for kind in kinds)


def start(part: Transform, n: int, size: Size) -> Tensor:
    """The identity (n, P) from which a part moves away; a crop's as the whole box, since its four zeros are a shorthand."""
    if isinstance(part, ResizedCrop):
        return torch.tensor([[0.0, 0.0, *map(float, size)]]).expand(n, -1).clone()
    return part.identity(n)


class Scaled(Transform):
    """A part at a share s of its strength: params = identity + s (drawn - identity), with the part's own draws.

    Strengths share their draws, so that they are compared image by image.
    """

    def __init__(self, part: Transform, strength: float) -> None:
        if not 0 <= strength <= 1:
            raise GeomsslError(f"strength {strength}", "a share from 0 to 1", reason="bad-value")
        self.part, self.strength = part, float(strength)
        self.name, self.parameters = f"{part.name} at {strength:g}", part.parameters

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        drawn = self.part.sample(n, generator, size)
        if self.strength == 1:
            return drawn
        origin = start(self.part, n, size).to(drawn)
        return origin + self.strength * (drawn - origin)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return self.part(images, params)

    def active(self, channels: int) -> tuple[bool, ...]:
        return self.part.active(channels)


@dataclass(frozen=True)
class Line:
    """One parameter of a part, from its identity to the ends that the part draws: eps in [low, high], low <= 0 <= high.

    column: of the part's parameters; None: a crop's central box of side (1 - eps).
    """

    name: str
    part: Transform
    column: int | None
    unit: str
    low: float
    high: float


class Along(Transform):
    """Moves along a line by eps, its one parameter, drawn as a share `near` to `far` of the way to either end.

    An end is chosen with a probability in proportion to its distance, so that every eps is as likely as another.
    """

    def __init__(self, line: Line, near: float, far: float) -> None:
        self.line, self.near, self.far = line, near, far
        self.name = f"{line.name} {near:g} to {far:g}"
        self.parameters = (Parameter("eps", line.unit, "continuous", 0.0, line.low, line.high),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        share, side = torch.rand(2, n, generator=generator, device=generator.device)
        up = side * (self.line.high - self.line.low) < self.line.high
        way = self.near + (self.far - self.near) * share
        return (way * torch.where(up, self.line.high, self.line.low))[:, None]

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        size = (images.shape[2], images.shape[3])
        moved = start(self.line.part, len(images), size).to(params)
        if self.line.column is None:
            sides = torch.tensor([*map(float, size)]).to(params)
            moved = torch.cat([params * sides / 2, (1 - params) * sides], dim=1)
        else:
            moved[:, self.line.column] += params[:, 0]
        return self.line.part(images, moved)


def lines(policy: Transform, channels: int, size: Size, seed: int) -> list[Line]:
    """Every parameter of the policy that moves gradually away from its identity, with the ends that its draws reach.

    A crop gives one line, its central box; where the box lies is no way from the identity. Flips and grays give none.
    """
    found = []
    for name, part in parts(policy, channels)[0].items():
        drawn = part.sample(DRAWS, generator(seed, f"reach-{name}"), size)
        away = drawn - start(part, DRAWS, size).to(drawn)
        if isinstance(part, ResizedCrop):
            box = (drawn[:, 2:] / torch.tensor([*map(float, size)])).prod(dim=1).sqrt()
            found.append(Line(name, part, None, "share of the side", 0.0, 1 - float(box.min())))
            continue
        for column, (parameter, acts) in enumerate(zip(part.parameters, part.active(channels), strict=True)):
            if acts and parameter.kind in GRADUAL:
                low, high = min(0.0, float(away[:, column].min())), max(0.0, float(away[:, column].max()))
                label = name if len(part.parameters) == 1 else f"{name} {parameter.name}"
                found.append(Line(label, part, column, parameter.unit, low, high))
    return [line for line in found if line.high > line.low]
