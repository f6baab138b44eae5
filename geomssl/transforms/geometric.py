"""Geometric transforms: each says where an output pixel comes from and what lies outside; one reading serves a whole chain."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.transforms.base import Parameter, Size, Transform
from geomssl.transforms.sampling import bilinear, checked, frame, smooth, working_dtype, zeros_outside


class Geometric(Transform):
    """A Transform that moves pixels: [T_g x](u) = x(g^-1 u), read bilinearly.

    antialias: where the map shrinks by s > 1, first smooth with a Gaussian of sigma = sqrt(s^2 - 1) / 2 pixels (False by
    default, as torchvision's functional of the same name with antialias=False).
    """

    fusible: bool = True
    """May a Compose chain this map with its neighbours and read once?"""

    largest_shrink: float = 1.0
    """The largest s that the declared range of parameters reaches; the smoothing before a reading is cut for it."""

    antialias: bool = False

    @abstractmethod
    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """g^-1 u: the input coordinates of output coordinates. y and x broadcast to (n, H, W), pixels; params (n, P)."""

    def border(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor | None]:
        """What lies outside: coordinates held where there are pixels, and the share of the reading that counts (None: all).

        Zeros outside the frame, unless a transform says otherwise.
        """
        return zeros_outside(y, x, size)

    def shrink(self, params: Tensor, size: Size) -> Tensor | float:
        """Input pixels per output pixel, (n,) or one number."""
        return 1.0

    def pull(self, coordinates: Tensor, params: Tensor, size: Size) -> Tensor:
        """Where output points come from: coordinates (n, H, W, 2) as (y, x) in pixels, to input coordinates alike.

        The bare map g^-1 u, with no frame: a picture given by a formula is transformed exactly by evaluating it there.
        """
        y, x = self.source(coordinates[..., 0], coordinates[..., 1], params.to(coordinates), size)
        return torch.stack(torch.broadcast_tensors(y, x), dim=-1)

    def admit(self, images: Tensor, params: Tensor) -> Tensor:
        """Checked parameters in the working dtype; GeomsslError where these images or parameters are not taken."""
        return checked(self, images, params)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return resample(images, [(self, self.admit(images, params))], self.antialias)


def resample(images: Tensor, chain: Sequence[tuple[Geometric, Tensor]], antialias: bool = False) -> Tensor:
    """Apply a chain of geometric parts, the first one first, by one bilinear reading. Parameters are checked already."""
    size: Size = (images.shape[2], images.shape[3])
    pixels = images.to(working_dtype(images.dtype))
    y, x = frame(size, pixels)
    share: Tensor | None = None
    for part, params in reversed(chain):
        y, x = part.source(y, x, params, size)
        y, x, seen = part.border(y, x, params, size)
        if seen is not None:
            share = seen if share is None else share * seen
    if antialias:
        pixels = _prefilter(pixels, chain, size)
    out = bilinear(pixels, y, x)
    if share is not None:
        out = out * share.unsqueeze(1)
    return out.to(images.dtype)


def _prefilter(pixels: Tensor, chain: Sequence[tuple[Geometric, Tensor]], size: Size) -> Tensor:
    largest = math.prod(part.largest_shrink for part, _ in chain)
    if largest <= 1:
        return pixels
    shrink = torch.ones(len(pixels), dtype=pixels.dtype, device=pixels.device)
    for part, params in chain:
        shrink = shrink * part.shrink(params, size)
    sigma = (shrink**2 - 1).clamp(min=1e-12).sqrt() / 2
    return smooth(pixels, sigma, radius=math.ceil(1.5 * math.sqrt(largest**2 - 1)), border="replicate")


def column(params: Tensor, index: int) -> Tensor:
    """One parameter as (n, 1, 1), to broadcast against coordinates."""
    return params[:, index].view(-1, 1, 1)


def turn(y: Tensor, x: Tensor, degrees: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """Where the points of an image turned anticlockwise about its centre come from; degrees (n, 1, 1).

    y - c_y = sin(a) (x' - c_x) + cos(a) (y' - c_y);  x - c_x = cos(a) (x' - c_x) - sin(a) (y' - c_y). Sines and cosines
    of multiples of 90 degrees are exactly 0 and ±1.
    """
    quarters = torch.round(degrees.detach() / 90)
    rest = torch.deg2rad(degrees - 90 * quarters)
    near, far = torch.cos(rest), torch.sin(rest)
    quadrant = quarters.remainder(4)
    odd = quadrant.remainder(2) == 1
    cos = torch.where(odd, far, near) * torch.where((quadrant == 1) | (quadrant == 2), -1.0, 1.0).to(near)
    sin = torch.where(odd, near, far) * torch.where(quadrant >= 2, -1.0, 1.0).to(near)
    centre_y, centre_x = (size[0] - 1) / 2, (size[1] - 1) / 2
    down, right = y - centre_y, x - centre_x
    return centre_y + (right * sin + down * cos), centre_x + (right * cos - down * sin)


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """n draws from [low, high), float32 on the generator's device."""
    return low + (high - low) * torch.rand(n, generator=generator, device=generator.device)


def bernoulli(n: int, p: float, generator: torch.Generator) -> Tensor:
    """n draws that are True with probability p, on the generator's device."""
    return torch.rand(n, generator=generator, device=generator.device) < p


def whole(n: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """n whole numbers from low to high, both included, float32 on the generator's device."""
    return torch.randint(low, high + 1, (n,), generator=generator, device=generator.device).float()


def require(condition: bool, given: str, expected: str) -> None:
    """GeomsslError unless the condition holds."""
    if not condition:
        raise GeomsslError(given, expected, reason="bad-transform")


class Rotate(Geometric):
    """Turn about the centre by an angle in degrees, anticlockwise as displayed; zeros outside.

    Parameters: angle. Drawn uniformly from [-max_degrees, max_degrees). As torchvision's F.rotate(angle, BILINEAR).
    Exact at multiples of 90 degrees on square images (of 180 on all).
    """

    name = "rotate"

    def __init__(self, max_degrees: float = 180.0) -> None:
        require(0 <= max_degrees <= 180, f"Rotate(max_degrees={max_degrees})", "0 to 180 degrees")
        self.max_degrees = float(max_degrees)
        kind: Literal["periodic", "continuous"] = "periodic" if max_degrees == 180 else "continuous"
        self.parameters = (Parameter("angle", "degrees", kind, 0.0, -self.max_degrees, self.max_degrees),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return uniform(n, self.parameters[0].low, self.parameters[0].high, generator).unsqueeze(1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        return turn(y, x, column(params, 0), size)

    def inverse(self, params: Tensor) -> Tensor:
        return -params

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        return params[:, 0].remainder(90.0 if size[0] == size[1] else 180.0) == 0


class Translate(Geometric):
    """Shift by (dy, dx) pixels, down and right positive; zeros move in.

    Parameters: dy, dx. Drawn uniformly from the whole pixels within max_fraction of the height and of the width, or within
    max_pixels where that is given; any real shift may be given. As torchvision's F.affine(translate=[dx, dy]). Exact at
    (0, 0) only, since pixels leave the frame.
    """

    name = "translate"

    def __init__(self, max_fraction: float = 0.2, max_pixels: float | None = None) -> None:
        require(0 <= max_fraction <= 1, f"Translate(max_fraction={max_fraction})", "a fraction from 0 to 1")
        require(max_pixels is None or max_pixels >= 0, f"Translate(max_pixels={max_pixels})", "pixels from 0")
        self.max_fraction, self.max_pixels = float(max_fraction), max_pixels
        self.parameters = tuple(
            Parameter(name, "pixels", "continuous", 0.0, -math.inf, math.inf) for name in ("dy", "dx")
        )

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        # The small constant keeps 0.3 * 10 at 3.
        reach = [self.max_fraction * length if self.max_pixels is None else self.max_pixels for length in size]
        limits = [math.floor(pixels + 1e-9) for pixels in reach]
        return torch.stack([whole(n, -limit, limit, generator) for limit in limits], dim=1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        return y - column(params, 0), x - column(params, 1)

    def inverse(self, params: Tensor) -> Tensor:
        return -params


class Shear(Geometric):
    """Lean by an angle in degrees about the centre: rows slide sideways, the top to the right where the angle is positive.

    x' = x - tan(angle) (y - c_y): zeros move in. Parameters: angle. Drawn uniformly from [-max_degrees, max_degrees). As
    torchvision's F.affine(shear=[angle, 0]). Exact at 0 only.
    """

    name = "shear"

    def __init__(self, max_degrees: float = 15.0) -> None:
        require(0 <= max_degrees < 90, f"Shear(max_degrees={max_degrees})", "0 to less than 90 degrees")
        self.parameters = (Parameter("angle", "degrees", "continuous", 0.0, -float(max_degrees), float(max_degrees)),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return uniform(n, self.parameters[0].low, self.parameters[0].high, generator).unsqueeze(1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        return torch.broadcast_tensors(y, x + torch.tan(torch.deg2rad(column(params, 0))) * (y - (size[0] - 1) / 2))

    def inverse(self, params: Tensor) -> Tensor:
        return -params


class Zoom(Geometric):
    """Enlarge about the centre by a factor z (z < 1 shrinks); zeros outside.

    Parameters: factor. Drawn uniformly from [low, high). As torchvision's F.affine(scale=z). Exact at 1 only.
    """

    name = "zoom"

    def __init__(self, low: float = 0.8, high: float = 1.25, antialias: bool = False) -> None:
        require(0 < low <= high < math.inf, f"Zoom(low={low}, high={high})", "0 < low <= high")
        self.low, self.high, self.antialias = float(low), float(high), antialias
        self.largest_shrink = max(1.0, 1 / self.low)
        self.parameters = (Parameter("factor", "ratio", "continuous", 1.0, self.low, self.high),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return uniform(n, self.low, self.high, generator).unsqueeze(1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        factor, centre_y, centre_x = column(params, 0), (size[0] - 1) / 2, (size[1] - 1) / 2
        return centre_y + (y - centre_y) / factor, centre_x + (x - centre_x) / factor

    def shrink(self, params: Tensor, size: Size) -> Tensor:
        return 1 / params[:, 0]

    def inverse(self, params: Tensor) -> Tensor:
        return 1 / params


class HorizontalFlip(Geometric):
    """Mirror left and right. Parameters: flip, 1 (mirrored, with probability p) or 0. Always exact."""

    name = "horizontal-flip"

    def __init__(self, p: float = 0.5) -> None:
        require(0 <= p <= 1, f"HorizontalFlip(p={p})", "a probability from 0 to 1")
        self.p = float(p)
        self.parameters = (Parameter("flip", "", "binary", 0.0, 0.0, 1.0),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return bernoulli(n, self.p, generator).float().unsqueeze(1)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        return y, torch.where(column(params, 0) > 0.5, size[1] - 1 - x, x)

    def border(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor | None]:
        return y, x, None

    def inverse(self, params: Tensor) -> Tensor:
        return params

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        return torch.ones(len(params), dtype=torch.bool, device=params.device)


class ResizedCrop(Geometric):
    """Cut a box and enlarge it to the size of the image, its last row and column repeated as a resize does.

    Parameters, in pixels and in this order: y, x (top left corner), height, width of the box; a height or width of 0 stands
    for the whole side, which makes four zeros the identity at every size. Drawn as torchvision's RandomResizedCrop draws:
    an area share uniform in `scale`, an aspect width / height log-uniform in `ratio`, whole pixels, ten tries, then the
    largest central box within `ratio`. As torchvision's F.resized_crop(y, x, height, width, antialias=False); a box that
    reaches out of the image reads zeros there. A box inside the image never shrinks. Exact for the whole image only.
    """

    name = "resized-crop"

    def __init__(self, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> None:
        require(0 < scale[0] <= scale[1] <= 1, f"ResizedCrop(scale={scale})", "0 < low <= high <= 1")
        require(0 < ratio[0] <= ratio[1], f"ResizedCrop(ratio={ratio})", "0 < low <= high")
        self.scale, self.ratio = scale, ratio
        self.parameters = tuple(
            Parameter(name, "pixels", "continuous", 0.0, low, math.inf)
            for name, low in (("y", -math.inf), ("x", -math.inf), ("height", 0.0), ("width", 0.0))
        )

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        tries, device = 10, generator.device
        area = size[0] * size[1] * uniform(n * tries, *self.scale, generator)
        aspect = uniform(n * tries, math.log(self.ratio[0]), math.log(self.ratio[1]), generator).exp()
        heights, widths = (area / aspect).sqrt().round().view(n, tries), (area * aspect).sqrt().round().view(n, tries)
        fits = (heights > 0) & (heights <= size[0]) & (widths > 0) & (widths <= size[1])
        first = fits.float().argmax(dim=1, keepdim=True)
        found = fits.gather(1, first).squeeze(1)
        fallback = self._central(size)
        height = torch.where(found, heights.gather(1, first).squeeze(1), float(fallback[0]))
        width = torch.where(found, widths.gather(1, first).squeeze(1), float(fallback[1]))
        corners = []
        for length, side in zip(size, (height, width), strict=True):
            room = length - side
            drawn = (torch.rand(n, generator=generator, device=device) * (room + 1)).floor()
            corners.append(torch.where(found, torch.minimum(drawn, room), (room / 2).floor()))
        return torch.stack([*corners, height, width], dim=1)

    def _central(self, size: Size) -> tuple[int, int]:
        height, width = size
        if width / height < self.ratio[0]:
            return min(height, max(1, round(width / self.ratio[0]))), width
        if width / height > self.ratio[1]:
            return height, min(width, max(1, round(height * self.ratio[1])))
        return size

    def _sides(self, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        height, width = column(params, 2), column(params, 3)
        return torch.where(height == 0, float(size[0]), height), torch.where(width == 0, float(size[1]), width)

    def source(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        height, width = self._sides(params, size)
        return (
            (y + 0.5) * (height / size[0]) - 0.5 + column(params, 0),
            (x + 0.5) * (width / size[1]) - 0.5 + column(params, 1),
        )

    def border(self, y: Tensor, x: Tensor, params: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor | None]:
        top, left = column(params, 0), column(params, 1)
        height, width = self._sides(params, size)
        # A box thinner than one pixel has its one row at its corner.
        y = torch.minimum(torch.maximum(y, top), top + (height - 1).clamp(min=0))
        x = torch.minimum(torch.maximum(x, left), left + (width - 1).clamp(min=0))
        return zeros_outside(y, x, size)

    def shrink(self, params: Tensor, size: Size) -> Tensor:
        height, width = self._sides(params, size)
        return (height / size[0] * width / size[1]).flatten().sqrt()

    def is_exact(self, params: Tensor, size: Size) -> Tensor:
        height, width = (side.flatten() for side in self._sides(params, size))
        return (params[:, 0] == 0) & (params[:, 1] == 0) & (height == size[0]) & (width == size[1])
