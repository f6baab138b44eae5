"""Rendered pictures: formulas on the whole plane, evaluated where a transform pulls from, so that T_g is exact everywhere.

`Fields` are band-limited random fields, `Phantoms` smooth-edged shapes on a zero background. A pixel grid only samples them.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Resident, Split
from geomssl.data.spectrum import BYTES, Spectrum, natural_spectrum
from geomssl.errors import GeomsslError
from geomssl.seeding import derive, generator
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.compose import Compose
from geomssl.transforms.geometric import Geometric, require
from geomssl.transforms.photometric import Photometric
from geomssl.transforms.sampling import frame

__all__ = ["Drawn", "Fields", "Phantoms", "Rendered", "Spectrum", "natural_spectrum"]

# Pictures whose random numbers come from one generator, and the blocks of them that are kept.
BLOCK, KEPT = 64, 256
# A Gaussian-smoothed edge of this many pixels, over the bandwidth, has 1 % of its spectrum left there: exp(-2 pi^2 s^2 b^2).
EDGE = math.sqrt(math.log(100) / 2) / math.pi
SHAPES = ("ellipse", "square", "bar", "triangle", "pentagon", "ring")


class Rendered(ABC):
    """n pictures given by formulas. Picture i is a function of the plane that depends on (seed, i) and the settings alone.

    n, channels, size: how many pictures, their C, and the side of the grid on which `images` samples them.
    bandwidth: cycles per pixel, below 1/2, above which a picture has nothing (Fields) or next to nothing (Phantoms).
    classes, labels: names and int64 (n,), or none.
    """

    name: str
    columns: int
    """Random numbers that one picture takes."""
    weight: int
    """Numbers that one pixel of one picture takes on the way, for the size of a chunk."""

    classes: Sequence[str] = ()
    labels: Tensor | None = None

    def __init__(self, n: int, channels: int, size: int, bandwidth: float, seed: int) -> None:
        require(n >= 1, f"{n} pictures", "at least 1")
        require(channels >= 1, f"pictures of {channels} channels", "at least 1")
        require(size >= 4, f"pictures of {size}x{size} pixels", "at least 4x4")
        require(0 < bandwidth < 0.5, f"bandwidth {bandwidth:g}", "more than 0 and less than 0.5 cycles per pixel")
        self.n, self.channels, self.size, self.bandwidth, self.seed = n, channels, size, float(bandwidth), seed
        self._blocks: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return self.n

    @abstractmethod
    def at(self, indices: Tensor, coordinates: Tensor) -> Tensor:
        """Values in [0, 1], (n, C, H, W), of pictures `indices` (n,) at points (n, H, W, 2) as (y, x) in pixels, float64.

        Any point of the plane; differentiable in the points, backward and forward.
        """

    def images(
        self,
        indices: Tensor,
        transform: Transform | None = None,
        params: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """T_g of pictures `indices` (n,) with params (n, P), sampled on the grid: floats in [0, 1], (n, C, size, size).

        [T_g x](u) = x(g^-1 u) by `pull`: no reading between pixels and no frame, so that turns, shifts and zooms of every
        amount are exact. Photometric parts act on the samples. One that acts on every pixel alone commutes with what moves
        pixels; one that looks at other pixels (contrast, jitter, blur) must come after it, else GeomsslError.
        Equal indices and params give equal pictures whatever else is in the batch; memory is bounded by chunks.
        """
        device = torch.device(device)
        # Points need float64, which not every accelerator has.
        place = torch.device("cpu") if device.type == "mps" else device
        indices = indices.to("cpu", torch.long)
        if indices.dim() != 1 or (len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < self.n):
            raise GeomsslError(f"pictures {tuple(indices.shape)} of {self.name}", f"indices (n,) from 0 to {self.n - 1}")
        moving, recolouring = _divided(transform, params, len(indices))
        chunks = []
        per_chunk = max(1, BYTES // (8 * self.weight * self.size**2))
        for start in range(0, len(indices), per_chunk):
            rows = slice(start, start + per_chunk)
            points = _grid((self.size, self.size), place).expand(len(indices[rows]), -1, -1, -1)
            for part, values in reversed(moving):
                points = part.pull(points, values[rows].to(place), (self.size, self.size))
            chunks.append(self.at(indices[rows], points).to(device, dtype))
        empty = torch.empty(0, self.channels, self.size, self.size, dtype=dtype, device=device)
        pixels = torch.cat([empty, *chunks])
        for colour, values in recolouring:
            pixels = colour(pixels, values)
        return pixels

    def _numbers(self, indices: Tensor) -> Tensor:
        """The pictures' own uniform numbers in [0, 1), float64 (n, columns), drawn block by block."""
        blocks, place = (indices // BLOCK).unique(return_inverse=True)
        drawn = []
        for block in blocks.tolist():
            if block not in self._blocks:
                if len(self._blocks) >= KEPT:
                    self._blocks.pop(next(iter(self._blocks)))
                draw = generator(self.seed, self.name, block)
                self._blocks[block] = torch.rand(BLOCK, self.columns, dtype=torch.float64, generator=draw)
            drawn.append(self._blocks[block])
        return torch.cat(drawn)[place * BLOCK + indices % BLOCK]


def _grid(size: Size, device: torch.device) -> Tensor:
    """The pixels' own points, float64 (1, H, W, 2)."""
    y, x = frame(size, torch.empty((), dtype=torch.float64, device=device))
    return torch.stack(torch.broadcast_tensors(y, x), dim=-1)


def _divided(
    transform: Transform | None, params: Tensor | None, n: int
) -> tuple[list[tuple[Geometric, Tensor]], list[tuple[Photometric, Tensor]]]:
    """What moves points and what changes values, each with its parameters, in the order of the transform."""
    if transform is None:
        return [], []
    if params is None or tuple(params.shape) != (n, len(transform.parameters)):
        raise GeomsslError(
            f"parameters {None if params is None else tuple(params.shape)} for {transform.name}",
            f"{(n, len(transform.parameters))}: one row a picture", reason="bad-parameters",
        )
    moving: list[tuple[Geometric, Tensor]] = []
    recolouring: list[tuple[Photometric, Tensor]] = []
    whole = Compose([transform])
    for part, columns in zip(whole.parts, whole.slices, strict=True):
        if isinstance(part, Geometric):
            late = next((colour.name for colour, _ in recolouring if not colour.pointwise), None)
            if late:
                raise GeomsslError(
                    f"{part.name} after {late} on rendered pictures",
                    f"{late} after everything that moves pixels: it looks at other pixels, so the two do not commute",
                    reason="no-rendering",
                )
            moving.append((part, params[:, columns]))
        elif isinstance(part, Photometric):
            recolouring.append((part, params[:, columns]))
        else:
            raise GeomsslError(
                f"{part.name} on rendered pictures", "a transform that says where a point comes from, or a photometric one",
                reason="no-rendering",
            )
    return moving, recolouring


class Fields(Rendered):
    """Band-limited random fields: each picture is a sum of `waves` plane waves of random directions and phases.

        x_c(u) = mean + sum_k a_k cos(2 pi k . (u - centre) + phase_ck),   1 / size <= |k| <= bandwidth

    cut to [0, 1]. slope: the amplitude spectrum falls as |k|^-slope (1 as in natural images, 0 white), 2-D density; the |k|
    are log-uniform, one in each of `waves` equal strata. periodic: frequencies are whole numbers of cycles per image, so
    that the picture closes on the torus and wrapped shifts are exact (for a field that is not, T_g of a wrapped shift wraps the
    window [0, size)). contrast: the root mean square of each channel about its mean; None: the largest at which nothing is ever
    cut. At the default fewer than one value in 10^4 is cut, the band limit holds but for those, and T_g stays exact,
    since cutting acts on every point alone. Channels share directions; colour is 1 minus their correlation.
    """

    name = "fields"

    def __init__(
        self,
        n: int,
        channels: int = 1,
        size: int = 32,
        bandwidth: float = 0.25,
        slope: float = 1.0,
        periodic: bool = False,
        seed: int = 0,
        *,
        contrast: float | None = 0.12,
        colour: float = 0.1,
        waves: int = 32,
        spectrum: Spectrum | None = None,
    ) -> None:
        super().__init__(n, channels, size, bandwidth, seed)
        require(bandwidth * size >= 2, f"bandwidth {bandwidth:g} at {size} pixels", "at least 2 cycles across the picture")
        require(contrast is None or contrast > 0, f"contrast {contrast}", "more than 0, or None")
        require(0 <= colour <= 1, f"colour {colour}", "0 (gray) to 1 (independent channels)")
        require(waves >= 1, f"{waves} waves", "at least 1")
        self.slope, self.periodic, self.waves, self.spectrum = float(slope), bool(periodic), waves, spectrum
        self.columns, self.weight = waves * (2 + channels) + 1, 4 * waves
        if spectrum is None:
            shared = torch.full((channels, channels), 1 - colour, dtype=torch.float64)
            covariance = shared.fill_diagonal_(1.0) * (1.0 if contrast is None else contrast**2)
            self.mean, self.spread = torch.full((channels,), 0.5, dtype=torch.float64), 0.0
        else:
            require(len(spectrum.mean) == channels, f"{channels} channels", f"{len(spectrum.mean)}, as the spectrum")
            covariance, self.mean, self.spread = spectrum.covariance, spectrum.mean, spectrum.spread
        self._uncut = contrast is None and spectrum is None
        # The symmetric root exists for singular covariances too (gray images with three channels).
        values, vectors = torch.linalg.eigh(covariance)
        self._mix = vectors * values.clamp(min=0).sqrt()

    @classmethod
    def like(
        cls, images: Tensor, n: int | None = None, bandwidth: float = 0.49, periodic: bool = False, seed: int = 0,
        waves: int = 64,
    ) -> Fields:
        """Fields with the radial power spectrum, mean, contrast, colour and spread of means of images (m, C, H, H).

        n: how many, as many as images when not given. What the images have above `bandwidth` is given to what lies below.
        Phases are random: objects and edges are not reproduced, only second moments.
        """
        measured = natural_spectrum(images, bandwidth)
        return cls(
            len(images) if n is None else n, images.shape[1], images.shape[3], bandwidth, measured.slope, periodic, seed,
            waves=waves, spectrum=measured,
        )

    def at(self, indices: Tensor, coordinates: Tensor) -> Tensor:
        place = coordinates.device
        waves, real, imaginary, mean = (t.to(place) for t in self._drawn(indices))
        centred = coordinates - (self.size - 1) / 2
        # Where a point is a sum of what its row and what its column give (every affine map, and wrapped shifts), a wave is
        # a product of two factors, and the sum over waves one matrix product: no sine for every pixel.
        rows, columns = centred[:, :, :1], centred[:, :1] - centred[:, :1, :1]
        if bool(((centred - rows - columns).abs() < 1e-9 * self.size).all()):
            down = 2 * math.pi * torch.einsum("nhp,nkp->nhk", rows[:, :, 0], waves)
            across = 2 * math.pi * torch.einsum("nwp,nkp->nkw", columns[:, 0], waves)
            cos, sin = down.cos().unsqueeze(1), down.sin().unsqueeze(1)
            real, imaginary = real.unsqueeze(2), imaginary.unsqueeze(2)
            left = torch.cat([real * cos - imaginary * sin, -(real * sin + imaginary * cos)], dim=-1)
            right = torch.cat([across.cos(), across.sin()], dim=1)
            summed = torch.matmul(left.flatten(1, 2), right).unflatten(1, (self.channels, -1))
        else:
            angle = 2 * math.pi * torch.einsum("nhwp,nkp->nkhw", centred, waves)
            summed = torch.einsum("nck,nkhw->nchw", real, angle.cos()) - torch.einsum("nck,nkhw->nchw", imaginary, angle.sin())
        return (mean[:, :, None, None] + summed).clamp(0, 1)

    def _drawn(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Wave vectors (n, K, 2), complex amplitudes (n, C, K) as real and imaginary parts, means (n, C)."""
        numbers = self._numbers(indices)
        own, numbers = numbers[:, 0], numbers[:, 1:].view(len(indices), self.waves, 2 + self.channels)
        strata = (torch.arange(self.waves, dtype=torch.float64) + numbers[..., 0]) / self.waves
        length = (self.bandwidth * self.size) ** strata / self.size
        turn = 2 * math.pi * numbers[..., 1]
        waves = torch.stack([length * turn.sin(), length * turn.cos()], dim=-1)
        if self.periodic:
            cycles = waves * self.size
            whole = cycles.round()
            beyond = torch.linalg.vector_norm(whole, dim=-1, keepdim=True) > self.bandwidth * self.size
            waves = torch.where(beyond, cycles.trunc(), whole) / self.size
            length = torch.linalg.vector_norm(waves, dim=-1)
        # Log-uniform |k| already weigh as |k|^-2, hence the square of |k|.
        energy = self._density(length) * length**2
        amplitude = (2 * energy / energy.sum(dim=1, keepdim=True)).sqrt()
        phase = 2 * math.pi * numbers[..., 2:]
        waving = torch.polar(amplitude.unsqueeze(-1).expand_as(phase).contiguous(), phase).transpose(1, 2)
        mixed = self._mix.to(waving) @ waving
        if self._uncut:
            mixed = mixed * (0.5 / mixed.abs().sum(dim=2).amax(dim=1))[:, None, None]
        # A uniform number as a normal one; the ends are cut where float64 would give infinity.
        shift = self.spread * torch.special.ndtri(own.clamp(1e-12, 1 - 1e-12))
        return waves, mixed.real, mixed.imag, self.mean + shift[:, None]

    def _density(self, length: Tensor) -> Tensor:
        """Power per area of the frequency plane, any unit."""
        if self.spectrum is None:
            return length ** (-2 * self.slope)
        at, power = self.spectrum.frequencies.log(), self.spectrum.power.clamp(min=1e-300).log()
        above = torch.searchsorted(at, length.log()).clamp(1, len(at) - 1)
        share = (length.log() - at[above - 1]) / (at[above] - at[above - 1])
        return (power[above - 1] + share.clamp(0, 1) * (power[above] - power[above - 1])).exp()


class Phantoms(Rendered):
    """Smooth-edged shapes on a zero background, inside the inscribed disc, so that a turn loses nothing.

    One of six shapes (SHAPES; picture i shows shape i mod 6) of random place, size, orientation and colour, with an off-centre
    spot of another colour that tells how it is turned. An edge is a step smoothed by a Gaussian of .483 / bandwidth pixels,
    of whose spectrum 1 % is left at `bandwidth`; corners are rounded alike. Values lie in [0, 1] without any cutting.
    Outside the inscribed disc they are below 2e-3, three of those Gaussians away from every edge.
    """

    name = "phantoms"
    columns = 16
    weight = 40
    classes = SHAPES

    def __init__(self, n: int, channels: int = 1, size: int = 32, bandwidth: float = 0.35, seed: int = 0) -> None:
        super().__init__(n, channels, size, bandwidth, seed)
        self.edge = EDGE / bandwidth
        self.room = (size - 1) / 2 - 3 * self.edge
        least = math.ceil(9 * self.edge) + 1
        require(
            self.room >= 1.5 * self.edge, f"phantoms of {size}x{size} pixels at bandwidth {bandwidth:g}",
            f"at least {least}x{least} pixels (edges are {self.edge:.2g} wide), or a larger bandwidth below 0.5",
        )
        require(channels <= 3, f"phantoms of {channels} channels", "1 to 3")
        self.labels = torch.arange(n) % len(SHAPES)

    def at(self, indices: Tensor, coordinates: Tensor) -> Tensor:
        place = coordinates.device
        numbers, kind = self._numbers(indices).to(place), (indices % len(SHAPES)).to(place)

        def cell(values: Tensor) -> Tensor:
            return values.view(-1, 1, 1)

        radius = cell(self.room * (0.7 + 0.3 * numbers[:, 0]))
        away, towards, turn = (self.room - radius) * cell(numbers[:, 1]), *(2 * math.pi * cell(numbers[:, i]) for i in (2, 3))
        y = coordinates[..., 0] - (self.size - 1) / 2 - away * towards.sin()
        x = coordinates[..., 1] - (self.size - 1) / 2 - away * towards.cos()
        y, x = y * turn.cos() - x * turn.sin(), y * turn.sin() + x * turn.cos()
        inside = self._inside(y, x, radius, kind.view(-1, 1, 1))
        wide = (0.25 * radius).clamp(min=self.edge)
        spot = torch.exp(-((y - 0.2 * radius) ** 2 + (x - 0.45 * radius) ** 2) / (2 * wide**2))
        shade, other = 0.4 + 0.6 * numbers[:, 4 : 4 + self.channels], 0.4 * numbers[:, 7 : 7 + self.channels]
        shade, other = shade[:, :, None, None], other[:, :, None, None]
        return (inside.unsqueeze(1) * (shade + (other - shade) * spot.unsqueeze(1))).clamp(0, 1)

    def _inside(self, y: Tensor, x: Tensor, radius: Tensor, kind: Tensor) -> Tensor:
        """1 inside the shape, 0 outside, with a Gaussian edge between."""
        width = self.edge * math.sqrt(2)

        def within(distance: Tensor) -> Tensor:
            return 0.5 * torch.special.erfc(distance / width)

        def slab(place: Tensor, half: Tensor) -> Tensor:
            return within(place - half) - within(place + half)

        # The distance from an ellipse to first order: (f - 1) f / |grad f^2 / 2|, f = sqrt((x/a)^2 + (y/b)^2).
        level = (x**2 + (y / 0.6) ** 2 + 1e-9).sqrt() / radius
        ellipse = within((level - 1) * level * radius**2 / (x**2 + (y / 0.36) ** 2 + 1e-9).sqrt())
        square = slab(x, 0.7 * radius) * slab(y, 0.7 * radius)
        bar = slab(x, 0.93 * radius) * slab(y, 0.35 * radius)
        centre = (y**2 + x**2 + self.edge**2).sqrt()
        ring = within(centre - radius) - within(centre - 0.4 * radius)
        # A sharp corner fades slowly along its axis; the disc around it cuts that short.
        triangle, pentagon = (within(self._sides(y, x, radius, count)) * within(centre - radius) for count in (3, 5))
        found = torch.zeros_like(ellipse)
        for number, shape in enumerate((ellipse, square, bar, triangle, pentagon, ring)):
            found = torch.where(kind == number, shape, found)
        return found

    def _sides(self, y: Tensor, x: Tensor, radius: Tensor, count: int) -> Tensor:
        """The rounded largest of the distances from the sides of a regular polygon whose corners lie at `radius`."""
        angle = 2 * math.pi * torch.arange(count, dtype=y.dtype, device=y.device) / count
        planes = y[..., None] * angle.sin() + x[..., None] * angle.cos() - (radius * math.cos(math.pi / count))[..., None]
        round_by = 0.5 * self.edge
        return round_by * torch.logsumexp(planes / round_by, dim=-1)


class Drawn(Resident):
    """Rendered pictures as a data set: the grid's samples rounded to uint8, and `rendered`, the formulas behind them."""

    def __init__(self, rendered: Rendered, split: Split) -> None:
        rows = torch.arange(rendered.n).split(1024)
        pixels = torch.cat([rendered.images(r).mul(255).round().to(torch.uint8) for r in rows])
        super().__init__(rendered.name, split, pixels, rendered.labels, rendered.classes)
        self.rendered = rendered

    def to(self, device: torch.device | str) -> Drawn:
        moved = copy.copy(self)
        moved.pixels = self.pixels.to(device)
        return moved


class _Settings(Settings):
    size: int = Field(32, ge=4, description="side of the pictures")
    n: int = Field(512, ge=1, description="pictures in each split")
    channels: Literal[1, 2, 3] = Field(1, description="1 (grey) or 3 (RGB)")
    seed: int = Field(0, ge=0, description="seed of the pictures; every split has its own")


class FieldsSet:
    """`fields`: band-limited random fields, without labels."""

    class Config(_Settings):
        name: Literal["fields"] = "fields"
        bandwidth: float = Field(0.25, gt=0, lt=0.5, description="the highest frequency, cycles per pixel")
        slope: float = Field(1.0, ge=0, description="the amplitude spectrum falls as frequency^-slope")
        periodic: bool = Field(False, description="close the pictures on the torus, so that wrapped shifts are exact")

    @staticmethod
    def load(config: Config, split: Split) -> Drawn:
        c, seed = config, derive(config.seed, f"fields-{split}")
        return Drawn(Fields(c.n, c.channels, c.size, c.bandwidth, c.slope, c.periodic, seed), split)


class PhantomsSet:
    """`phantoms`: smooth-edged shapes on a zero background, labelled by their shape."""

    class Config(_Settings):
        name: Literal["phantoms"] = "phantoms"
        bandwidth: float = Field(0.35, gt=0, lt=0.5, description="where 1 % of an edge's spectrum is left, cycles per pixel")

    @staticmethod
    def load(config: Config, split: Split) -> Drawn:
        seed = derive(config.seed, f"phantoms-{split}")
        return Drawn(Phantoms(config.n, config.channels, config.size, config.bandwidth, seed), split)
