"""Finite groups of turns and mirrors, wrapped shifts, and matched scales: how they compose, move pixels and move fibres."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.transforms.base import Group, Parameter, Size
from geomssl.transforms.geometric import Geometric, Zoom, column, require, turn, whole
from geomssl.transforms.sampling import frame, zeros_outside


class PointGroup(Geometric, Group):
    """A finite group of turns and mirrors about the image centre, given by tables. Elements are indices, 0 the identity.

    Element e turns by degrees[e] anticlockwise after mirroring left and right where mirrored[e]. product[g, h] = gh is
    "first h, then g". Where every turn is a multiple of 90 degrees, T_g and Γ_g gather pixels and nothing is resampled.
    """

    order: int
    fibre: int

    def __init__(self, name: str, degrees: list[float], mirrored: list[bool], product: Tensor) -> None:
        self.name = name
        self.order = self.fibre = len(degrees)
        self.parameters = (Parameter("element", "", "index", 0.0, 0.0, float(self.order - 1)),)
        self._degrees, self._mirrored, self._product = torch.tensor(degrees, dtype=torch.float64), mirrored, product
        self._inverse = (product == 0).int().argmax(dim=1)
        self._gathers = all(angle % 90 == 0 for angle in degrees)
        self._turns_sides = any(angle % 180 != 0 for angle in degrees)
        self._tables: dict[Any, Tensor] = {}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PointGroup) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return whole(n, 0, self.order - 1, generator).unsqueeze(1)

    def elements(self, size: Size | None = None) -> Tensor:
        return torch.arange(self.order, dtype=torch.float32).unsqueeze(1)

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        table = self._table("product", g.device, lambda: self._product)
        return table[self._indices(g), self._indices(h)].unsqueeze(1).to(g.dtype)

    def inverse(self, params: Tensor) -> Tensor:
        table = self._table("inverse", params.device, lambda: self._inverse)
        return table[self._indices(params)].unsqueeze(1).to(params.dtype)

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        period = 90.0 if size[0] == size[1] else 180.0
        return self._angles(self._indices(params), torch.float32).remainder(period) == 0

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        index = self._indices(params)
        mirrored = self._table("mirrored", index.device, lambda: torch.tensor(self._mirrored))[index]
        if self._turns_sides or self._degrees.any():
            y, x = turn(y, x, self._angles(index, y.dtype).view(-1, 1, 1), size)
        return y, torch.where(mirrored.view(-1, 1, 1), size[1] - 1 - x, x)

    def border(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor | None]:
        return (y, x, None) if self._gathers else zeros_outside(y, x, size)

    def admit(self, images: Tensor, params: Tensor) -> Tensor:
        params = super().admit(images, params)
        # Looking at values waits for the device, so on one it is done only where sides would swap.
        self._check(params, images.shape[2] != images.shape[3] and self._turns_sides)
        return params

    def _check(self, params: Tensor, oblong: bool) -> None:
        if params.device.type == "cpu":
            value = params.detach().round()
            if bool(((value < 0) | (value >= self.order)).any()):
                raise GeomsslError(
                    f"element {params.flatten().tolist()[:4]} of {self.name}", f"indices from 0 to {self.order - 1}",
                    reason="bad-parameters",
                )
        if oblong and bool((self._angles(self._indices(params), torch.float32).remainder(180) != 0).any()):
            raise GeomsslError(
                f"a turn of {self.name} on images that are not square", "square images, or turns by 180 degrees only",
                reason="not-square",
            )

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        if not self._gathers:
            return super().__call__(images, params)
        index = self._indices(self.admit(images, params))
        return _gather(images, self._places((images.shape[2], images.shape[3]), images.device)[index], 2)

    def act(self, fibres: Tensor, params: Tensor) -> Tensor:
        """[Γ_g f](k, u) = f(g^-1 k, g^-1 u) on fibres (n, C, |G|, H, W): T_g on the last two axes, and axis |G| permuted.

        Raises GeomsslError where axis 2 is not |G| long.
        """
        if fibres.dim() != 5 or fibres.shape[2] != self.order:
            raise GeomsslError(
                f"features {tuple(fibres.shape)} under the regular action of {self.name}",
                f"(n, C, {self.order}, H, W), an axis of {self.order} that the group permutes; where features have none: "
                "the spatial or the trivial action", reason="bad-features",
            )
        flat = fibres.flatten(1, 2)
        index = self._indices(self.admit(flat, params))
        device, size = fibres.device, (fibres.shape[3], fibres.shape[4])
        # Entry (g, k) is g^-1 k: the orientation that arrives at k.
        origin = self._table("origin", device, lambda: self._product[self._inverse])
        if not self._gathers:
            moved = super().__call__(flat, params).view_as(fibres)
            return moved.gather(2, origin[index].view(-1, 1, self.order, 1, 1).expand_as(moved))
        joint = self._table(
            ("joint", size), device,
            lambda: (origin[:, :, None] * math.prod(size) + self._places(size, device)[:, None, :]).flatten(1),
        )
        return _gather(fibres, joint[index], 2)

    def _places(self, size: Size, device: torch.device) -> Tensor:
        """Index (|G|, H W) of the pixel that arrives at each pixel."""

        def build() -> Tensor:
            y, x = self.source(*frame(size, self._degrees), self.elements(), size)
            return (y.round() * size[1] + x.round()).long().expand(self.order, *size).flatten(1)

        return self._table(("places", size), device, build)

    def _indices(self, params: Tensor) -> Tensor:
        return params[:, 0].detach().round().long()

    def _angles(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        return self._table(("degrees", dtype), index.device, lambda: self._degrees.to(dtype))[index]

    def _table(self, key: Any, device: torch.device, build: Callable[[], Tensor]) -> Tensor:
        return _kept(self._tables, (key, device), lambda: build().to(device))


class CyclicRotations(PointGroup):
    """C_n: element k turns by 360 k / n degrees anticlockwise; g h = g + h mod n. As rot90(x, k) for n = 4.

    Bit for bit a permutation of pixels at multiples of 90 degrees on square images (of 180 on all); between them bilinear
    with zeros outside. On images that are not square only turns by 180 degrees are taken.
    """

    def __init__(self, order: int = 4) -> None:
        require(isinstance(order, int) and order >= 1, f"CyclicRotations({order})", "a whole number of turns from 1")
        k = torch.arange(order)
        super().__init__(f"c{order}", [360 * i / order for i in range(order)], [False] * order, (k[:, None] + k) % order)


class Dihedral(PointGroup):
    """D_n, 2n elements: index k + n m is r^k s^m, a left-right mirror where m = 1, then a turn by 360 k / n degrees.

    (r^k s^m)(r^j s^l) = r^(k + (-1)^m j) s^(m + l), since s r = r^-1 s. The orientation axis of its regular representation
    has length 2n in the same order. Exact where CyclicRotations(n) is. `order` is n here, the order of its turns.
    """

    def __init__(self, order: int = 4) -> None:
        require(isinstance(order, int) and order >= 1, f"Dihedral({order})", "a whole number of turns from 1")
        element = torch.arange(2 * order)
        k, m = element % order, element // order
        sign = 1 - 2 * m[:, None]
        product = (k[:, None] + sign * k) % order + order * ((m[:, None] + m) % 2)
        degrees = [360 * i / order for i in range(order)]
        super().__init__(f"d{order}", degrees * 2, [False] * order + [True] * order, product)


class Flips(PointGroup):
    """The left-right mirror and the identity: order 2, fibre 2. Always exact."""

    def __init__(self) -> None:
        super().__init__("flips", [0.0, 0.0], [False, True], torch.tensor([[0, 1], [1, 0]]))


class Translations(Geometric, Group):
    """Shifts by (dy, dx) pixels, down and right positive. Parameters add: gh = g + h.

    wrap=True: the torus Z_H x Z_W; what leaves on one side enters on the other. Whole shifts permute pixels bit for bit,
    others read bilinearly across the seam. wrap=False: zeros move in, pixels are lost, and T_gh = T_g T_h holds only
    where nothing left the frame. Fibre 1: features move in space alone. Whole pixels are drawn uniformly from the torus
    (wrap=False: from the same range of shifts), or from those of at most `reach` pixels along each axis, which are then all
    that `elements` lists.
    """

    order = None
    fibre = 1
    fusible = False

    def __init__(self, wrap: bool = True, reach: int | None = None) -> None:
        require(reach is None or reach >= 0, f"Translations(reach={reach})", "pixels from 0")
        self.wrap, self.reach = bool(wrap), reach
        self.name = "translations" if wrap else "translations-zeros"
        self.parameters = tuple(
            Parameter(name, "pixels", "continuous", 0.0, -math.inf, math.inf) for name in ("dy", "dx")
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Translations) and self.wrap == other.wrap

    def __hash__(self) -> int:
        return hash(self.name)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return torch.stack([whole(n, *self._range(side), generator) for side in size], dim=1)

    def _range(self, side: int) -> tuple[int, int]:
        """The least and the largest shift, both included; never one shift of the torus twice."""
        low, high = -(side // 2), (side - 1) // 2
        return (low, high) if self.reach is None else (max(low, -self.reach), min(high, self.reach))

    def elements(self, size: Size | None = None) -> Tensor:
        if size is None or not self.wrap:
            raise GeomsslError(
                f"every element of {self.name}" + ("" if self.wrap else ", which are infinitely many"),
                "Translations(wrap=True) and a size (H, W)", reason="infinite-group",
            )
        if self.reach is None:
            return torch.cartesian_prod(*(torch.arange(side, dtype=torch.float32) for side in size))
        low, high = zip(*(self._range(side) for side in size), strict=True)
        return torch.cartesian_prod(*(torch.arange(a, b + 1, dtype=torch.float32) for a, b in zip(low, high, strict=True)))

    def compose(self, g: Tensor, h: Tensor) -> Tensor:
        return g + h

    def inverse(self, params: Tensor) -> Tensor:
        return -params

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        return ((params == params.round()) if self.wrap else (params == 0)).all(dim=1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        y, x = y - column(params, 0), x - column(params, 1)
        return (y.remainder(size[0]), x.remainder(size[1])) if self.wrap else (y, x)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        if not self.wrap:
            return super().__call__(images, params)
        params = self.admit(images, params)
        size = (images.shape[2], images.shape[3])
        (above, below, down), (left, right, across) = (_wrapped(params[:, i], size[i]) for i in (0, 1))
        flat = images.flatten(2).to(params.dtype)

        def read(rows: Tensor, columns: Tensor) -> Tensor:
            return _gather(flat, (rows[:, :, None] * size[1] + columns[:, None, :]).flatten(1), 2)

        across = across[:, None, None, :].expand(-1, 1, size[0], -1).flatten(2)
        down = down[:, None, :, None].expand(-1, 1, -1, size[1]).flatten(2)
        top, bottom = read(above, left), read(below, left)
        top = top + across * (read(above, right) - top)
        bottom = bottom + across * (read(below, right) - bottom)
        return (top + down * (bottom - top)).view_as(images).to(images.dtype)

    def act(self, fibres: Tensor, params: Tensor) -> Tensor:
        """[Γ_t f](k, u) = f(k, u - t) on fibres (n, C, G, H, W) of any G; t in pixels of the features."""
        if fibres.dim() != 5:
            raise GeomsslError(
                f"features {tuple(fibres.shape)} under {self.name}", "(n, C, G, H, W)", reason="bad-features"
            )
        return self(fibres.flatten(1, 2), params).view_as(fibres)


class Scales(Geometric):
    """Enlargements by factors from a finite list. No group: products leave the list, so it acts on features only in part.

    Parameters: the index of the factor (1.0 must be in the list; it is the identity). On images as Zoom.
    tolerance: how far apart, as |log ratio|, two factors may be and still count as one.
    """

    name = "scales"

    def __init__(
        self,
        factors: tuple[float, ...] = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75),
        tolerance: float = 0.01,
        antialias: bool = False,
    ) -> None:
        factors = tuple(float(f) for f in factors)
        require(1.0 in factors and min(factors) > 0, f"Scales({factors})", "positive factors with 1.0 among them")
        require(len(set(factors)) == len(factors), f"Scales({factors})", "factors that differ")
        self.factors, self.tolerance, self.antialias = factors, float(tolerance), antialias
        self.largest_shrink = max(1.0, 1 / min(factors))
        identity = float(factors.index(1.0))
        self.parameters = (Parameter("factor", "", "index", identity, 0.0, float(len(factors) - 1)),)
        self._zoom = Zoom(min(factors), max(factors), antialias)
        self._tables: dict[Any, Tensor] = {}

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return whole(n, 0, len(self.factors) - 1, generator).unsqueeze(1)

    def elements(self, size: Size | None = None) -> Tensor:
        """Every factor's index, (number of factors, 1)."""
        return torch.arange(len(self.factors), dtype=torch.float32).unsqueeze(1)

    def ratios(self, params: Tensor) -> Tensor:
        """The factors behind indices, (n, 1)."""
        dtype, device = params.dtype, params.device
        table = _kept(self._tables, (dtype, device), lambda: torch.tensor(self.factors, dtype=dtype, device=device))
        return table[params[:, 0].detach().round().long()].unsqueeze(1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        return self._zoom.source(y, x, self.ratios(params), size)

    def shrink(self, params: Tensor, size: Size) -> Tensor:
        return 1 / self.ratios(params)[:, 0]

    def matches(self) -> Tensor:
        """origin (S, S), long: entry (s, j) is the i with factors[j] = factors[s] factors[i] within tolerance, else -1."""
        log = torch.tensor(self.factors, dtype=torch.float64).log()
        gap = (log[None, :, None] - log[:, None, None] - log[None, None, :]).abs()
        best = gap.min(dim=2)
        return torch.where(best.values <= self.tolerance, best.indices, -1)

    def act(self, fibres: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The partial action on features (n, C, S, H, W), one scale an entry of axis S: (moved features, mask (n, S)).

        [Γ_s f](j, u) = f(i, u / s) where factors[j] = s factors[i]; entries with no such i are zero and masked False.
        """
        if fibres.dim() != 5 or fibres.shape[2] != len(self.factors):
            raise GeomsslError(
                f"features {tuple(fibres.shape)} under {self.name}", f"(n, C, {len(self.factors)}, H, W)",
                reason="bad-features",
            )
        moved = self(fibres.flatten(1, 2), params).view_as(fibres)
        origin = self.matches().to(fibres.device)[params[:, 0].detach().round().long().to(fibres.device)]
        mask = origin >= 0
        index = origin.clamp(min=0).view(len(fibres), 1, -1, 1, 1).expand_as(moved)
        return moved.gather(2, index) * mask.view(len(fibres), 1, -1, 1, 1), mask


def _kept(tables: dict[Any, Tensor], key: Any, build: Callable[[], Tensor]) -> Tensor:
    """A table that is built once for each device, so that no call copies it there again.

    It outlives the call, so it must be a plain tensor: one that belongs to a running torch.func transform is not kept.
    """
    if key in tables:
        return tables[key]
    table = build()
    try:
        table.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return table
    return tables.setdefault(key, table)


def _gather(values: Tensor, index: Tensor, axis: int) -> Tensor:
    """Flatten `values` from `axis` on, and take entry index[i, j] for place j of row i."""
    flat = values.flatten(axis)
    return flat.gather(axis, index.unsqueeze(1).expand(flat.shape)).view_as(values)


def _wrapped(amount: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """For shifts (n,) on a circle: the two entries (n, length) between which each place reads, and the second one's weight."""
    place = torch.arange(length, dtype=amount.dtype, device=amount.device) - amount[:, None]
    first = place.detach().floor()
    index = first.long().remainder(length)
    return index, (index + 1).remainder(length), place - first
