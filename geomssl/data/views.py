"""`views`: superquadric objects seen from all sides, ray-traced here, whose class, view, light and background are known."""

from __future__ import annotations

import copy
import functools
import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Presence, Resident, Split
from geomssl.data.raytrace import BACKGROUND, PART, VIEW, WAVES, light_colour, owners, render
from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms.base import Parameter

SPLITS: tuple[Split, ...] = ("train", "val", "test")
# Instances of each class in train, val and test.
INSTANCES = (6, 2, 2)
TRAIN_SESSIONS = 2
# Ranges of elevation (degrees) and distance; azimuth and hue go round.
ELEVATION, DISTANCE = (5.0, 65.0), (3.6, 5.2)
# The largest step from a frame to the next, in the units of the factors.
STEPS = (20.0, 6.0, 0.15, 0.04)
# Steps of a low-discrepancy sequence in seven dimensions: powers of the root of x^8 = x + 1.
GOLDEN = [1.1127756842787055**-k for k in range(1, 8)]
VIEW_FACTORS = (
    Parameter("azimuth", "degrees", "periodic", 0.0, 0.0, 360.0),
    Parameter("elevation", "degrees", "continuous", 0.0, *ELEVATION),
    Parameter("distance", "", "continuous", 0.0, *DISTANCE),
    Parameter("hue", "turns", "periodic", 0.0, 0.0, 1.0),
)


class Views(Resident):
    """The pictures as a data set, and the scenes behind them, which can be drawn again at any other view.

    objects (n, K, PART) and backgrounds (n, BACKGROUND) as geomssl.data.raytrace.render takes them; view (n, VIEW).
    """

    def __init__(
        self, split: Split, pixels: Tensor, labels: Tensor, classes: list[str], factors: dict[str, Tensor], objects: Tensor,
        view: Tensor, backgrounds: Tensor, parameters: tuple[Parameter, ...],
    ) -> None:
        super().__init__("views", split, pixels, labels, classes, factors)
        self.objects, self.view, self.backgrounds, self.parameters = objects, view, backgrounds, parameters
        self.regions = ("background", *self.classes)

    def draw(self, indices: Tensor, view: Tensor | None = None, size: int | None = None) -> Tensor:
        """Pictures (n, 3, size, size), floats before rounding, of those scenes; from `view` (n, VIEW) where it is given.

        Differentiable in `view` (azimuth, elevation in degrees, distance, hue in turns), in its dtype and on its device:
        the tangent of picture i along a factor is torch.func.jvp of this at a unit vector.
        """
        indices = indices.cpu()
        view = self.view[indices] if view is None else view
        objects, backgrounds = (t[indices].to(view) for t in (self.objects, self.backgrounds))
        return render(objects, view, backgrounds, self.size if size is None else size)

    def masks(self, indices: Tensor) -> Tensor:
        """The object's class at every pixel whose middle its surface covers, 0 the background: exact, by the ray tracer."""
        indices = indices.cpu()
        seen = owners(self.objects[indices].float(), self.view[indices].float(), self.size)
        return torch.where(seen >= 0, self.need_labels()[indices, None, None] + 1, 0)

    def some(self, indices: Tensor) -> Views:
        return Views(
            self.split, self.pixels[indices], self.need_labels()[indices], list(self.classes),
            {name: values[indices] for name, values in self.factors.items()}, self.objects[indices], self.view[indices],
            self.backgrounds[indices], self.parameters,
        )

    def need_labels(self) -> Tensor:
        assert self.labels is not None
        return self.labels

    def to(self, device: torch.device | str) -> Views:
        moved = copy.copy(self)
        moved.pixels = self.pixels.to(device)
        return moved


class ViewsSet:
    """`views`: see docs/data.md for its factors, splits and sequences."""

    class Config(Settings):
        name: Literal["views"] = "views"
        n: int = Field(1024, ge=2, description="pictures in each split")
        size: int = Field(64, ge=8, le=512, description="side of the pictures")
        classes: int = Field(8, ge=2, le=64, description="classes of objects")
        sessions: int = Field(11, ge=1, le=64, description="backgrounds")
        length: int = Field(8, ge=1, description="frames of a sequence: one object, one session, neighbouring views")
        unseen: Literal["instances", "sessions"] = Field(
            "instances", description="what val and test hold that train does not: objects, or for test sessions as well"
        )
        seed: int = Field(0, ge=0, description="seed of objects, sessions and views")

        @model_validator(mode="after")
        def _enough(self) -> ViewsSet.Config:
            if self.unseen == "sessions" and self.sessions <= TRAIN_SESSIONS:
                raise GeomsslError(
                    f"dataset.sessions = {self.sessions} with unseen sessions", f"at least {TRAIN_SESSIONS + 1}: train has "
                    f"{TRAIN_SESSIONS}", reason="bad-value",
                )
            return self

    @staticmethod
    def load(config: Config, split: Split) -> Views:
        return _drawn(config, split)

    @staticmethod
    def presence(root: str | None = None) -> Presence:
        return Presence(True, "as many as asked for", "ray-traced when it is asked for")


@functools.lru_cache(maxsize=6)
def _drawn(config: ViewsSet.Config, split: Split) -> Views:
    """One split, ray-traced once in a process and then kept: nothing changes a source in place."""
    n, length = config.n, config.length
    runs = -(-n // length)
    sequence, frame = torch.arange(n) // length, torch.arange(n) % length
    draw = generator(config.seed, f"views-{split}")
    # every class and session as often as another, in a drawn order
    label = (torch.randperm(runs, generator=draw) % config.classes)[sequence]
    place = SPLITS.index(split)
    before = sum(INSTANCES[:place])
    number = (before + torch.randint(INSTANCES[place], (runs,), generator=draw))[sequence]
    session = _sessions(config, split)[torch.randperm(runs, generator=draw) % len(_sessions(config, split))][sequence]
    view = _walk(runs, length, draw).flatten(0, 1)[:n]
    table, waves = _objects(config.classes, config.seed), _backgrounds(config.sessions, config.seed)
    objects, backgrounds = table[label, number], waves[session]
    # where the waves lie differs from sequence to sequence: one pixel must not tell the session
    shift = torch.rand(runs, WAVES, generator=draw, dtype=torch.float64)[sequence]
    backgrounds[:, 3:].view(n, WAVES, 6)[:, :, 2] += shift
    seen = view.float()
    pixels = torch.cat([
        render(objects[rows].float(), seen[rows], backgrounds[rows].float(), config.size).mul(255).round().clamp(0, 255).byte()
        for rows in torch.arange(n).split(1024)
    ])
    factors = {name.name: seen[:, i] for i, name in enumerate(VIEW_FACTORS)}
    total = sum(INSTANCES)
    factors |= {
        "session": session.float(), "object": (label * total + number).float(), "sequence": sequence.float(),
        "frame": frame.float(),
    }
    described = (
        *VIEW_FACTORS, Parameter("session", "", "index", 0.0, 0.0, config.sessions - 1.0),
        Parameter("object", "", "index", 0.0, 0.0, config.classes * total - 1.0),
        Parameter("sequence", "", "index", 0.0, 0.0, runs - 1.0), Parameter("frame", "frames", "index", 0.0, 0.0, length - 1.0),
    )
    names = [f"class {k}" for k in range(config.classes)]
    return Views(split, pixels, label, names, factors, objects, view, backgrounds, described)


def _sessions(config: ViewsSet.Config, split: Split) -> Tensor:
    if config.unseen == "instances":
        return torch.arange(config.sessions)
    return torch.arange(TRAIN_SESSIONS, config.sessions) if split == "test" else torch.arange(TRAIN_SESSIONS)


def _walk(runs: int, length: int, draw: torch.Generator) -> Tensor:
    """Views (runs, length, VIEW), float64: each starts anywhere and moves on at its own pace.

    Where elevation or distance would leave its range it turns back, so that every view is as likely as another.
    """
    low = torch.tensor([0.0, ELEVATION[0], DISTANCE[0], 0.0], dtype=torch.float64)
    span = torch.tensor([360.0, ELEVATION[1], DISTANCE[1], 1.0], dtype=torch.float64) - low
    start = torch.rand(runs, 1, VIEW, generator=draw, dtype=torch.float64) * span
    pace = (2 * torch.rand(runs, 1, VIEW, generator=draw, dtype=torch.float64) - 1) * torch.tensor(STEPS, dtype=torch.float64)
    moved = start + pace * torch.arange(length, dtype=torch.float64)[:, None]
    folded = span - (moved % (2 * span) - span).abs()
    round_it = torch.tensor([True, False, False, True])
    return low + torch.where(round_it, moved % span, folded)


def _objects(classes: int, seed: int) -> Tensor:
    """Every instance of every class as two superquadrics, float64 (classes, instances, 2, PART).

    The shapes of the classes are points of a low-discrepancy sequence, so that they differ; an instance differs from its
    class by up to an eighth in every length and exponent, and has colours of its own. The second part stands off centre:
    with it no object looks the same from two sides. Colours are pale, so that the light's hue can be told from them.
    """
    total = sum(INSTANCES)
    shift = torch.rand(len(GOLDEN), generator=generator(seed, "views-classes"), dtype=torch.float64)
    shape = (shift + torch.arange(1, classes + 1, dtype=torch.float64)[:, None] * torch.tensor(GOLDEN, dtype=torch.float64)) % 1
    own = torch.rand(classes, total, 2, PART, generator=generator(seed, "views-instances"), dtype=torch.float64)
    vary = 1 + 0.125 * (2 * own - 1)
    found = torch.empty_like(own)
    tall, flat, away, small = (shape[:, None, i] for i in (2, 3, 4, 5))
    for column, length in enumerate((0.36 + 0.3 * flat, 0.36 + 0.3 * (1 - flat), 0.34 + 0.34 * tall)):
        found[:, :, 0, column] = length * vary[:, :, 0, column]
    for part, (pole, around) in enumerate(((0, 1), (6, 0))):
        found[:, :, part, 3] = (0.3 + 0.7 * shape[:, None, pole]) * vary[:, :, part, 3]
        found[:, :, part, 4] = (0.3 + 0.7 * shape[:, None, around]) * vary[:, :, part, 4]
    found[:, :, 0, 5:8] = 0
    found[:, :, 1, :3] = (0.16 + 0.14 * small)[:, :, None] * vary[:, :, 1, :3]
    turn = math.pi / 2 * (away - 0.5)
    found[:, :, 1, 5] = 0.68 * turn.cos() * vary[:, :, 1, 5]
    found[:, :, 1, 6] = 0.68 * turn.sin() * vary[:, :, 1, 6]
    found[:, :, 1, 7] = 0.5 * (tall - 0.4) * vary[:, :, 1, 7]
    for first in (8, 11):
        hue, value = own[..., first].flatten(), 0.55 + 0.4 * own[..., first + 1 : first + 2]
        found[..., first : first + 3] = value * light_colour(hue, 0.35).view(*own.shape[:3], 3)
    return found


def _backgrounds(sessions: int, seed: int) -> Tensor:
    """The background of every session, float64 (sessions, BACKGROUND): a mean colour and plane waves that stay in [0, 1]."""
    own = torch.rand(sessions, BACKGROUND, generator=generator(seed, "views-sessions"), dtype=torch.float64)
    found = own.clone()
    found[:, :3] = 0.35 + 0.3 * own[:, :3]
    waves, drawn = found[:, 3:].view(sessions, WAVES, 6), own[:, 3:].reshape(sessions, WAVES, 6)
    direction, cycles = 2 * math.pi * drawn[:, :, 0], 0.7 + 3.3 * drawn[:, :, 1]
    waves[:, :, 0], waves[:, :, 1] = cycles * direction.sin(), cycles * direction.cos()
    waves[:, :, 3:] = 0.16 * (drawn[:, :, 3:] - 0.5)
    return found
