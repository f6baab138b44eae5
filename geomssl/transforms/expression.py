"""A transform from a short text: "c4", "rotate(±30)", "zoom(0.57..1)", "translate(8px, wrap)", "rotate(15, 30) + hue(0.1)".

    expression  part ["+" part ...]                    the first part acts first
    part        name, or name(argument, ...)           a group, a transform, a policy, or package.module:attribute
    argument    a..b   ±a (or +-a)   a..b by s         a range to draw from; with "by", the grid a, a + s, ..., b
                a, b, ...                              exactly these
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from geomssl import registry
from geomssl.errors import GeomsslError, nearest, unknown
from geomssl.transforms.base import Group, Transform
from geomssl.transforms.compose import POLICIES, Compose, policy
from geomssl.transforms.geometric import HorizontalFlip, ResizedCrop, Rotate, Shear, Translate, Zoom
from geomssl.transforms.groups import CyclicRotations, Dihedral, Flips, Scales, Translations
from geomssl.transforms.photometric import Brightness, Contrast, GaussianBlur, Grayscale, Hue, Jitter, Saturation

LARGEST = 65536
T = TypeVar("T", bound=Transform)


@dataclass(frozen=True)
class Expression:
    """transform; grid: the elements that the text lists, (E, P), or None where it draws them; text: its canonical form.

    Where there is a grid, `transform.sample` draws from it too. parse(text).text == text.
    """

    transform: Transform
    grid: Tensor | None
    text: str


def named(text: str) -> Transform:
    """The transform of a short expression; see `parse`."""
    return parse(text).transform


def parse(text: str) -> Expression:
    """Read an expression. Several parts with lists make the grid of all combinations; finite groups join it whole.

    Where one part lists and another only draws, all is drawn, and the lists are drawn from. Units: degrees, pixels (px),
    factors, turns of the colour circle, as `transform.parameters` says. Raises GeomsslError that names the offending piece
    and the nearest name.
    """
    pieces = _pieces(text)
    found = [_part(text, piece) for piece in pieces]
    if len(found) == 1:
        return found[0]
    transform: Transform = Compose([one.transform for one in found])
    canonical = " + ".join(one.text for one in found)
    grids = [one.grid if one.grid is not None else _whole(one.transform) for one in found]
    if all(one.grid is None for one in found) or any(grid is None for grid in grids):
        return Expression(transform, None, canonical)
    listed = [grid for grid in grids if grid is not None]
    if math.prod(len(grid) for grid in listed) > LARGEST:
        _refuse(text, canonical, f"at most {LARGEST} combinations")
    rows = torch.cartesian_prod(*(torch.arange(len(grid)) for grid in listed)).view(-1, len(listed))
    grid = torch.cat([part[rows[:, i]] for i, part in enumerate(listed)], dim=1)
    return Expression(transform.on(grid), grid, canonical)


def _refuse(text: str, piece: str, expected: str, near: str | None = None) -> NoReturn:
    where = f"transform {text!r}" if piece == text or not piece else f"transform {text!r}, at {piece!r}"
    raise GeomsslError(where, expected, near, reason="bad-expression")


def _pieces(text: str) -> list[str]:
    """The parts between the plus signs that stand outside parentheses."""
    depth, parts = 0, [""]
    for place, character in enumerate(text):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not 0 <= depth <= 1:
            _refuse(text, text[: place + 1], "one pair of parentheses around the arguments, as in rotate(±30)")
        if character == "+" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        _refuse(text, text[text.rindex("(") :], "a closing parenthesis")
    if any(not part.strip() for part in parts):
        _refuse(text, text, "a transform on both sides of every +" if "+" in text else "a transform, such as c4 or rotate(±30)")
    return [part.strip() for part in parts]


def _part(text: str, piece: str) -> Expression:
    found = re.fullmatch(r"([^()\s]+)\s*(?:\((.*)\))?", piece)
    if not found:
        _refuse(text, piece, "name or name(arguments), such as c4 or rotate(±30)")
    name = {"blur": "gaussian-blur", "crop": "resized-crop"}.get(found[1].lower(), found[1])
    if ":" not in name:
        name = name.lower()
    arguments = [word.strip() for word in found[2].split(",")] if found[2] is not None else []
    if arguments == [""]:
        arguments = []
    if arguments and name in READERS:
        made = READERS[name](_Arguments(text, name, arguments))
        shown = "blur" if name == "gaussian-blur" else name
        return replace(made, text=f"{shown}({made.text})" if made.text else made.transform.name)
    transform = _plain(name)
    if arguments:
        _refuse(text, piece, f"{name} without arguments")
    return Expression(transform, None, name)


_PLAIN: dict[str, Callable[[], Transform]] = {
    "c4": CyclicRotations,
    "c8": lambda: CyclicRotations(8),
    "d4": Dihedral,
    "flips": Flips,
    "translations": Translations,
    **{
        kind.name: kind
        for kind in (
            Rotate, Translate, Zoom, Shear, HorizontalFlip, ResizedCrop, Brightness, Contrast, Saturation, Hue, Jitter,
            Grayscale, GaussianBlur,
        )
    },
}


# What else people call these.
ALSO = {
    **dict.fromkeys(("p4", "z4", "rot90", "rotate90", "90", "90°"), "c4"), "p4m": "d4",
    **dict.fromkeys(("so2", "so(2)", "rotation"), "rotate"), **dict.fromkeys(("shift", "translation", "roll"), "translate"),
    **dict.fromkeys(("scale", "scaling", "resize"), "zoom"), **dict.fromkeys(("mirror", "reflection", "hflip"), "flips"),
}


def _plain(name: str) -> Transform:
    """A transform with its default settings."""
    if name in _PLAIN:
        return _PLAIN[name]()
    if name in POLICIES:
        return policy(name)
    if found := re.fullmatch(r"([cd])([1-9]\d{0,2})", name):
        return {"c": CyclicRotations, "d": Dihedral}[found[1]](int(found[2]))
    if ":" in name:
        return registry.load_attribute(name, "transform")()
    refused = unknown("transform", name, [*_PLAIN, *POLICIES, "blur", "crop"])
    refused.nearest = ALSO.get(name, refused.nearest)
    raise refused


def _whole(transform: Transform) -> Tensor | None:
    """Every element of what has finitely many, else None."""
    if isinstance(transform, Group) and transform.order is not None:
        return transform.elements()
    only = transform.parameters[0] if len(transform.parameters) == 1 else None
    if only is not None and only.kind in ("index", "binary"):
        return torch.arange(only.low, only.high + 1).unsqueeze(1)
    return None


NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?"
UNIT = r"\s*(px|pixels?|°|deg|degrees?)?"
RANGE = rf"({NUMBER}){UNIT}\s*\.\.\s*({NUMBER}){UNIT}"
AMOUNT = rf"(?:±\s*({NUMBER}){UNIT}|{RANGE}|({NUMBER}){UNIT})(?:\s+by\s+({NUMBER}){UNIT})?"


def _shown(value: float) -> str:
    return format(value + 0.0, ".10g")


@dataclass(frozen=True)
class _Amount:
    """One argument: low..high, by a step, written ±high (around), or one number (low = high, alone)."""

    low: float
    high: float
    step: float | None = None
    alone: bool = False
    around: bool = False
    unit: str = ""

    def values(self) -> list[float]:
        if self.step is None:
            return [self.low] if self.alone else []
        count = math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return [self.low + self.step * i for i in range(count)]

    def __str__(self) -> str:
        if self.alone:
            return _shown(self.low)
        if self.step is not None:
            return f"{_shown(self.low)}..{_shown(self.high)}{self.unit} by {_shown(self.step)}"
        return (f"±{_shown(self.high)}" if self.low == -self.high else f"{_shown(self.low)}..{_shown(self.high)}") + self.unit


class _Arguments:
    """The arguments of one part, and the complaints about them."""

    def __init__(self, text: str, name: str, words: Sequence[str]) -> None:
        self.text, self.name, self.words = text, name, list(words)

    def refuse(self, word: str, expected: str, near: str | None = None) -> NoReturn:
        _refuse(self.text, word or f"{self.name}({', '.join(self.words)})", expected, near)

    def amount(self, word: str, units: Sequence[str] = ()) -> _Amount:
        """One argument as numbers; a unit is kept as "px", and degrees need none."""
        plain = word.lower().replace("+/-", "±").replace("+-", "±").replace("…", "..").replace("−", "-")
        found = re.fullmatch(AMOUNT, plain)
        if not found:
            self.refuse(word, f"a number, a range a..b or ±a, or a grid a..b by s in {self.name}(...)")
        around, unit1, low, unit2, high, unit3, alone, unit4, step, unit5 = found.groups()
        said = {("px" if unit.startswith("p") else "°") for unit in (unit1, unit2, unit3, unit4, unit5) if unit}
        if said - set(units):
            self.refuse(word, f"numbers without {said.pop()} in {self.name}(...)")
        unit = "px" if "px" in said else ""
        by = None if step is None else float(step)
        if alone is not None:
            if by is not None:
                self.refuse(word, "a range before 'by', such as -30..30 by 5")
            return _Amount(float(alone), float(alone), alone=True, unit=unit)
        first, last = (-float(around), float(around)) if around is not None else (float(low), float(high))
        if first > last:
            self.refuse(word, "the smaller number first" if around is None else "a positive number after ±")
        if by is not None and not 0 < by <= LARGEST:
            self.refuse(word, "a step above 0")
        if by is not None and (last - first) / by >= LARGEST:
            self.refuse(word, f"at most {LARGEST} steps")
        return _Amount(first, last, by, around=around is not None, unit=unit)

    def one(self, units: Sequence[str] = ()) -> tuple[_Amount, list[float]]:
        """A range, or the values that a grid or a list of numbers gives."""
        amounts = [self.amount(word, units) for word in self.words]
        if len(amounts) > 1 and not all(a.alone for a in amounts):
            bad = next(word for word, a in zip(self.words, amounts, strict=True) if not a.alone)
            self.refuse(bad, f"one range, or a list of numbers, in {self.name}(...)")
        values = [value for a in amounts for value in a.values()]
        if len(set(values)) < len(values):
            self.refuse("", "numbers that differ")
        span = _Amount(min(values), max(values)) if values else amounts[0]
        return (replace(amounts[0], alone=True) if len(amounts) == 1 and amounts[0].alone else span), values

    def show(self) -> str:
        return ", ".join(str(self.amount(word, ("°", "px"))) for word in self.words)


def _ranged(transform: T, low: float, high: float) -> T:
    """The transform with another range of its one parameter."""
    only = transform.parameters[0]
    same = (low, high) == (only.low, only.high)
    transform.parameters = (replace(only, low=low, high=high, kind=only.kind if same else "continuous"),)
    return transform


def _checked(arguments: _Arguments, make: Callable[[], T]) -> T:
    """What `make` makes; its own complaint, with the text that led there."""
    try:
        return make()
    except GeomsslError as error:
        _refuse(arguments.text, f"{arguments.name}({', '.join(arguments.words)})", error.expected, error.nearest)


def _listed(transform: Transform, values: list[float], text: str) -> Expression:
    """The values of one parameter as a grid, or none where there are none."""
    if not values:
        return Expression(transform, None, text)
    grid = torch.tensor(values, dtype=torch.float64).float().unsqueeze(1)
    return Expression(transform.on(grid), grid, text)


def _angle(arguments: _Arguments) -> Expression:
    span, values = arguments.one(("°",))
    kind = {"rotate": Rotate, "shear": Shear}[arguments.name]
    largest = max(abs(span.low), abs(span.high))
    if kind is Rotate and largest > 180:
        inside = dict.fromkeys(_shown((value + 180) % 360 - 180) for value in values)
        near = "rotate(±180)" if not 0 < len(inside) <= 8 else f"rotate({', '.join(inside)})"
        arguments.refuse("", "angles from -180 to 180 degrees", "c4" if values and not any(v % 90 for v in values) else near)
    made = _ranged(_checked(arguments, lambda: kind(largest)), span.low, span.high)
    return _listed(made, values, arguments.show())


def _factor(arguments: _Arguments) -> Expression:
    span, values = arguments.one()
    return _listed(_checked(arguments, lambda: Zoom(span.low, span.high)), values, arguments.show())


def _strength(arguments: _Arguments) -> Expression:
    """A lone number and ±a are a strength about the identity; a..b and lists are the parameter itself."""
    span, values = arguments.one()
    kind = {"brightness": Brightness, "contrast": Contrast, "saturation": Saturation, "hue": Hue}[arguments.name]
    if span.alone or (not values and (span.around or (kind is Hue and span.low == -span.high))):
        made = _checked(arguments, lambda: kind(span.high))
        return Expression(made, None, f"±{_shown(span.high)}")
    least, most, expected = (-0.5, 0.5, "turns from -0.5 to 0.5") if kind is Hue else (0.0, math.inf, "factors from 0")
    if span.low < least or span.high > most:
        arguments.refuse("", expected)
    return _listed(_ranged(kind(), span.low, span.high), values, arguments.show())


def _blur(arguments: _Arguments) -> Expression:
    """Always applied, with a kernel that holds three sigma."""
    span, values = arguments.one(("px",))
    taps = 2 * math.ceil(3 * span.high) + 1
    made = _checked(arguments, lambda: GaussianBlur(max(taps, 3), (span.low, span.high), p=1.0))
    return _listed(made, values, arguments.show())


def _shift(arguments: _Arguments) -> Expression:
    """translate(0.2), translate(8px), translate(-8..8px by 4), translate(0:4, 3:-2), each also with `wrap`."""
    wrap = "wrap" in arguments.words
    words = [word for word in arguments.words if word != "wrap"]
    tail = ", wrap" if wrap else ""
    if not words:
        return Expression(Translations(), None, "")
    if all(":" in word for word in words):
        pairs = [[_number(arguments, side, word) for side in word.split(":", 1)] for word in words]
        grid = torch.tensor(pairs, dtype=torch.float64).float()
        made: Transform = Translations() if wrap else Translate()
        return Expression(made.on(grid), grid, ", ".join(f"{_shown(a)}:{_shown(b)}" for a, b in pairs) + tail)
    if len(words) > 1:
        near = nearest(words[-1], ["wrap"])
        arguments.refuse(words[-1], "one amount and perhaps wrap, or shifts dy:dx such as 0:4, 3:-2", near)
    amount = arguments.amount(words[0], ("px",))
    if amount.step is not None:
        steps = torch.tensor(amount.values(), dtype=torch.float64).float()
        if len(steps) ** 2 > LARGEST:
            arguments.refuse(words[0], f"at most {LARGEST} shifts")
        grid = torch.cartesian_prod(steps, steps).view(-1, 2)
        made = Translations() if wrap else Translate()
        return Expression(made.on(grid), grid, str(replace(amount, unit="px")) + tail)
    if not amount.alone and amount.low != -amount.high:
        arguments.refuse(words[0], "as far one way as the other, such as ±8px, or a grid such as 0..8px by 2")
    if amount.high > LARGEST:
        arguments.refuse(words[0], f"at most {LARGEST} pixels")
    if amount.unit != "px":
        if wrap:
            arguments.refuse(words[0], "pixels, such as 8px, where shifts wrap")
        if amount.high > 1:
            arguments.refuse("", "a fraction of the side from 0 to 1, or pixels", f"translate({words[0]}px)")
        return Expression(_checked(arguments, lambda: Translate(amount.high)), None, _shown(amount.high))
    if wrap and amount.high != round(amount.high):
        arguments.refuse(words[0], "whole pixels where shifts wrap, or a grid such as 0..1px by 0.25")
    made = _checked(
        arguments, lambda: Translations(reach=int(amount.high)) if wrap else Translate(max_pixels=amount.high)
    )
    return Expression(made, None, f"{_shown(amount.high)}px{tail}")


def _number(arguments: _Arguments, side: str, word: str) -> float:
    found = re.fullmatch(rf"({NUMBER})\s*(?:px)?", side.strip().lower().replace("−", "-"))
    if not found:
        arguments.refuse(word, "a shift dy:dx in pixels, such as 3:-2")
    return float(found[1])


def _crop(arguments: _Arguments) -> Expression:
    span, values = arguments.one()
    if values:
        arguments.refuse("", "a range of area shares, such as 0.2..1")
    return Expression(_checked(arguments, lambda: ResizedCrop((span.low, span.high))), None, arguments.show())


def _numbers(most: int, make: Callable[..., Transform]) -> Callable[[_Arguments], Expression]:
    """Up to `most` plain numbers, handed on."""

    def read(arguments: _Arguments) -> Expression:
        amounts = [arguments.amount(word) for word in arguments.words]
        if len(amounts) > most or not all(a.alone for a in amounts):
            arguments.refuse("", f"{'one number' if most == 1 else f'at most {most} numbers'}")
        return Expression(_checked(arguments, lambda: make(*(a.low for a in amounts))), None, arguments.show())

    return read


READERS: dict[str, Callable[[_Arguments], Expression]] = {
    "rotate": _angle,
    "shear": _angle,
    "zoom": _factor,
    "brightness": _strength,
    "contrast": _strength,
    "saturation": _strength,
    "hue": _strength,
    "gaussian-blur": _blur,
    "translate": _shift,
    "resized-crop": _crop,
    "horizontal-flip": _numbers(1, HorizontalFlip),
    "grayscale": _numbers(1, Grayscale),
    "jitter": _numbers(4, Jitter),
    "scales": _numbers(64, lambda *factors: Scales(factors)),
}
