"""Fibres: where a base space g0 may lie on the axis of a group, and which pairs of places may be positives (rows H7, H8)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.transforms.base import Size
from geomssl.transforms.groups import CyclicRotations, PointGroup

Metric = Literal["euclidean", "group"]
Invariance = Literal["left", "right"]


@dataclass(frozen=True)
class Space:
    """The places at which a base space g0 of b fibres may start, P of them; they are counted from 0.

    bundles:   long (P, b): the fibres z(p g0) that are read from place p, in the order of g0.
    euclidean: float64 (P, P): |p - q|^2 of places as they are counted, which the paper plots.
    group:     float64 (P, P): the distance of the group (a circle, a torus, |log ratio|, the word length of a finite group);
               None where factors of scale are not known.
    product:   long (P, P), p q, and inverse, long (P,), where the places are a whole group; else None. Of a torus None too:
               there `grid` says how to add.
    grid:      (H, W) of a map, where the places lie on one, else None.
    turns:     long (P, 3): the index of the turn about the centre of the map, and the shift (dy, dx) after it, that each
               element is made of; of turns and shifts together alone, see `p4`.
    allowed:   the pairs of positives, see `bounded`; None: every pair.
    """

    bundles: Tensor
    euclidean: Tensor
    group: Tensor | None
    product: Tensor | None = None
    inverse: Tensor | None = None
    grid: Size | None = None
    turns: Tensor | None = None
    allowed: tuple[Tensor, Tensor] | None = None

    @property
    def torus(self) -> bool:
        """Are the places all of a map, so that they add over its edges?"""
        return self.grid is not None and len(self.bundles) == math.prod(self.grid)

    def to(self, device: torch.device) -> Space:
        """The same tables there."""
        moved: dict[str, Any] = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.allowed is not None:
            moved["allowed"] = tuple(t.to(device) for t in self.allowed)
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.bundles)

    def take(self, line: Tensor, starts: Tensor) -> Tensor:
        """The bundles [z(g) | g in p g0], (N, b C): line (N, C, places), starts p (N,)."""
        index = self.bundles[starts]
        picked = line.gather(2, index[:, None, :].expand(-1, line.shape[1], -1))
        return picked[:, :, 0] if index.shape[1] == 1 else picked.transpose(1, 2).flatten(1)

    def after(self, p: Tensor, q: Tensor) -> Tensor:
        """p q: the place to which q is carried. GeomsslError where the places are no group."""
        if self.product is not None:
            return self.product[p, q]
        if self.grid is None or not self.torus:
            raise GeomsslError(
                "draws that are matched, on places that are no group", "rotation, or translation with wrap = true",
                reason="no-exact-form",
            )
        height, width = self.grid
        row, column = (p // width + q // width) % height, (p % width + q % width) % width
        return row * width + column

    def bounded(self, distance: float, metric: Metric) -> Space:
        """The same, with `allowed`: the pairs (p, q) no farther apart than distance, p = q among them.

        allowed: how many there are up to and with p (P,), and each p's q (P, P), whose row p lists them first. Raises
        GeomsslError where no two different places are that near.
        """
        apart = self.euclidean if metric == "euclidean" else self.group
        if apart is None:
            raise GeomsslError(
                f"a distance of the group on {len(self)} places without factors", "metric = euclidean", reason="no-group",
            )
        near = apart <= distance * (1 + 1e-9)
        if not bool((near & (apart > 0)).any()):
            least = apart[apart > 0].min() if bool((apart > 0).any()) else None
            squared = ", squared" if metric == "euclidean" else ""
            raise GeomsslError(
                f"distance = {distance:g} ({metric}{squared}), within which there is no pair of different places",
                "places that are nearer, or more than one place" if least is None else f"at least {float(least):.4g}",
                reason="no-pair",
            )
        return replace(self, allowed=(near.sum(dim=1).cumsum(0), (~near).int().argsort(dim=1, stable=True)))


def draw_one(draw: Tensor, n: int) -> Tensor:
    """floor(draw n): a place, each as likely as another; draw uniform in [0, 1)."""
    return (draw * n).long().clamp_(max=n - 1)


def pick(fibres: Tensor, draw: Tensor) -> Tensor:
    """The fibre (N, C) at place floor(draw · places) of each example; fibres (N, C, places), draw uniform in [0, 1)."""
    place = draw_one(draw, fibres.shape[2])
    return fibres.gather(2, place[:, None, None].expand(-1, fibres.shape[1], 1))[:, :, 0]


def draw_pair(draw: Tensor, allowed: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A pair of `Space.allowed`, each as likely as another: draw (N, 2) uniform in [0, 1).

    The first number picks p with the share of its partners among all pairs, the second one of them.
    """
    upto, partners = allowed
    place = (draw[:, 0].double() * upto[-1]).long()
    first = torch.searchsorted(upto, place, right=True).clamp_(max=len(upto) - 1)
    many = upto[first] - torch.where(first > 0, upto[(first - 1).clamp(min=0)], 0)
    second = (draw[:, 1].double() * many).long()
    return first, partners[first, torch.minimum(second, many - 1)]


def finite(group: PointGroup, base: int, invariance: Invariance = "left") -> Space:
    """The places of a finite group of turns and mirrors; g0 is its first `base` elements.

    A place p stands for z(p), which H-SSL reads as z(g^-1) of g = p^-1; the distance is that of the g. Word length |g|: the
    fewest turns by one step and mirrors that make g. left: d(g, h) = |g^-1 h|, unchanged by g -> k g; right: |g h^-1|. They
    are equal where the group commutes (a circle: min(k, n - k) steps).
    """
    elements = group.elements()
    product = torch.stack([group.compose(elements[g : g + 1].expand_as(elements), elements) for g in range(group.order)])
    table, inverse = product[..., 0].long(), group.inverse(elements)[:, 0].long()
    length = word_length(table, _steps(group))
    p, q = torch.arange(group.order)[:, None], torch.arange(group.order)[None, :]
    return Space(table[:, :base], (p - q).double() ** 2, _of_group(table, inverse, length, invariance), table, inverse)


def _of_group(product: Tensor, inverse: Tensor, length: Tensor, invariance: Invariance) -> Tensor:
    """d(p^-1, q^-1): |p q^-1| invariant from the left, |p^-1 q| from the right."""
    every = torch.arange(len(product))
    p, q = every[:, None], every[None, :]
    return length[product[p, inverse[q]]] if invariance == "left" else length[product[inverse[p], q]]


def p4(group: PointGroup, side: int, base: int, invariance: Invariance = "left") -> Space:
    """The places (k, y, x) of maps (|G|, n, n) under turns and whole shifts together: p4 for quarter turns, p4m with mirrors.

    An element carries (k, u) to (r k, R u + t), R the turn about the centre of the map, u and t on the torus. One element
    takes (0, 0, 0) to a given place, so each place p, counted k first, then y, then x, stands for one, and p q is where p
    carries q. As maps move: f(T_g x) = Γ_g f(x) with T_g first the turn, then the shift by whole steps of the map.
    g0: the |G| elements of place 0, then of the next one, over a patch row by row. euclidean: |Δk|^2 + |Δy|^2 + |Δx|^2 as
    places are counted. group: word length, the fewest turns by one step, mirrors, and shifts by one pixel; `invariance` as
    in `finite`. It does not commute, so left and right differ.
    """
    order, pixels = group.order, side * side
    point = finite(group, 1)
    assert point.product is not None
    elements = group.elements()
    index = torch.arange(pixels, dtype=torch.float64).view(1, 1, side, side).expand(order, -1, -1, -1)
    # T_r brings to each pixel what stood at R^-1 of it
    carried = group(index, group.inverse(elements)).flatten(1).round().long()
    k, y, x = (part.flatten() for part in torch.meshgrid(*(torch.arange(n) for n in (order, side, side)), indexing="ij"))
    home = carried[k, 0]
    shift = torch.stack([(y - home // side) % side, (x - home % side) % side], dim=1)
    turned = carried[k[:, None], (y * side + x)[None, :]]
    rows, columns = ((part + shift[:, i, None]) % side for i, part in enumerate((turned // side, turned % side)))
    product = point.product[k[:, None], k[None, :]] * pixels + rows * side + columns
    inverse = (product == 0).int().argmax(dim=1)
    # one pixel down and one to the right; then the turns and mirrors about the centre
    steps = [side % pixels, 1 % pixels, *(r * pixels + int(carried[r, 0]) for r in _steps(group))]
    length = word_length(product, [s for s in dict.fromkeys(steps) if s])
    counted = torch.stack([k, y, x], dim=1).double()
    apart = (counted[:, None] - counted[None, :]).square().sum(dim=2)
    over = patch(-(-base // order), "total", (side, side))
    start = torch.arange(base)
    at = over[start // order]
    patches = start % order * pixels + at[:, 0] * side + at[:, 1]
    turns = torch.cat([k[:, None], shift], dim=1)
    distance = _of_group(product, inverse, length, invariance)
    return Space(product[:, patches], apart, distance, product, inverse, grid=(side, side), turns=turns)


def _steps(group: PointGroup) -> list[int]:
    """One turn by the smallest angle, and one mirror where there are any."""
    turns = group.order if isinstance(group, CyclicRotations) else group.order // 2
    steps = [1] if turns > 1 else []
    return [*steps, *([] if turns == group.order else [turns])]


def word_length(product: Tensor, steps: Sequence[int]) -> Tensor:
    """The fewest of the elements `steps` and their inverses that make each element, float64; breadth first from 0."""
    backwards = [int((product[s] == 0).int().argmax()) for s in steps]
    found = torch.full((len(product),), math.inf, dtype=torch.float64)
    front, length = [0], 0
    while front:
        fresh = [g for g in dict.fromkeys(front) if math.isinf(found[g])]
        found[fresh] = float(length)
        front, length = [int(product[g, s]) for g in fresh for s in (*steps, *backwards)], length + 1
    return found


def line(n: int, base: int, factors: Sequence[float]) -> Space:
    """n scales with ends: base neighbouring ones; distance |log(factor / factor')| of the first, where there are n factors."""
    starts = torch.arange(max(0, n - base + 1))
    squared = (starts[:, None] - starts[None, :]).double() ** 2
    apart = None
    if len(factors) == n:
        logs = torch.tensor(factors, dtype=torch.float64).log()[starts]
        apart = (logs[:, None] - logs[None, :]).abs()
    return Space(starts[:, None] + torch.arange(base), squared, apart)


def plane(grid: Size, patch: Tensor, wrap: bool) -> Space:
    """Places of a map (H, W): a patch of offsets (b, 2) wherever it fits, or on the torus wherever it starts.

    group: the length of the shortest way between two places, over the edges where `wrap`; in pixels of the map.
    """
    rows, columns = grid
    room = (rows, columns) if wrap else tuple(side - int(e) for side, e in zip(grid, patch.amax(dim=0), strict=True))
    starts = torch.cartesian_prod(*(torch.arange(max(0, r)) for r in room)).view(-1, 2)
    places = starts[:, None, :] + patch
    bundles = places[..., 0] % rows * columns + places[..., 1] % columns
    apart = (starts[:, None] - starts[None, :]).abs()
    sides = torch.tensor(grid)
    shortest = torch.minimum(apart, sides - apart) if wrap else apart
    squared, nearest = ((d.double() ** 2).sum(dim=2) for d in (apart, shortest))
    return Space(bundles, squared, nearest.sqrt(), grid=grid)


def patch(size: int, counts: Literal["total", "side"], grid: Size) -> Tensor:
    """Offsets (b, 2) of a contiguous patch, row by row. side: size x size. total: the first `size` places of the smallest
    square that holds them, or of a block that fits the map where that square does not.
    """
    total = size * size if counts == "side" else size
    width = size if counts == "side" else min(grid[1], max(math.isqrt(total - 1) + 1, -(-total // grid[0])))
    place = torch.arange(total)
    return torch.stack([place // width, place % width], dim=1)
