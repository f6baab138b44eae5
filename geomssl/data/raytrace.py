"""Pictures of superquadrics by ray tracing: batched, on any device, smooth in the view, so that jvp gives true tangents.

A superquadric is the unit ball of a norm (Barr, Superquadrics and Angle-Preserving Transformations, 1981), with x scaled by
the axes and p = 2 / exponent:

    G(x) = ( (|x_1|^p2 + |x_2|^p2)^(p1 / p2) + |x_3|^p1 )^(1 / p1)

Exponents up to 2 make p >= 1 and G convex, so along a ray g(t) = G(o + t d) has one minimum m, found by bisection of the
sign of g', and Newton's method from the near side meets the surface without ever passing it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from geomssl.errors import GeomsslError

# Columns of a part: axes (3), exponents e1 (towards the pole) and e2 (around it), centre (3), two colours (3 each).
PART = 14
# Columns of a view: azimuth and elevation in degrees, distance from the origin, hue of the light in turns.
VIEW = 4
WAVES = 4
# Columns of a background: its mean colour (3), then WAVES of frequency (2, cycles per picture), phase (turns), amplitude (3).
BACKGROUND = 3 + 6 * WAVES
HALF_WIDTH = math.tan(math.radians(18))
LIGHT = (0.36, -0.48, 0.8)
# for float32; twice as many for float64
BISECTIONS, NEWTONS = 12, 7
# Images are worked on so many at a time that what lies between two operations stays in a processor's cache.
CACHED = 2**18


def render(parts: Tensor, view: Tensor, background: Tensor, size: int) -> Tensor:
    """Pictures (n, 3, size, size) in [0, 1] of n scenes, in the dtype and on the device of `view`.

    parts (n, K, PART): the superquadrics of each object, around the origin, z up. view (n, VIEW): the camera looks at the
    origin from `distance` at `azimuth`, `elevation` (degrees; anticlockwise from x, and up), field of view 36 degrees; the
    light shines from a fixed side of the world in the colour `hue`. background (n, BACKGROUND): plane waves fixed to the
    picture, unlit.

    Differentiable in parts, view and background, forward and backward. An edge fades over one pixel on its inner side, so
    that a picture is a smooth function of the view, occlusion included; where the surface is met at t, t0 being the root
    without derivative, t = t0 - (g(t0) - 1) / g'(t0) carries the derivative of the implicit function. The minimum of g needs
    none (envelope theorem). Raises GeomsslError for other shapes and for exponents above 2.
    """
    n = len(view)
    shapes = (tuple(parts.shape[::2]), tuple(view.shape), tuple(background.shape))
    if parts.dim() != 3 or shapes != ((n, PART), (n, VIEW), (n, BACKGROUND)) or size < 2:
        raise GeomsslError(
            f"parts {tuple(parts.shape)}, view {shapes[1]}, background {shapes[2]}, size {size}",
            f"(n, K, {PART}), (n, {VIEW}), (n, {BACKGROUND}) and a size of at least 2", reason="bad-shape",
        )
    exponents = parts.detach()[:, :, 3:5]
    if len(exponents) and not (float(exponents.min()) > 0 and float(exponents.max()) <= 2):
        raise GeomsslError("a superquadric with an exponent outside (0, 2]", "convex ones", reason="bad-value")
    few = max(1, CACHED // size**2)
    if view.device.type != "cpu" or n <= few:
        return _render(parts, view, background, size)
    chunks = zip(parts.split(few), view.split(few), background.split(few), strict=True)
    return torch.cat([_render(*chunk, size) for chunk in chunks])


@torch.no_grad()
def owners(parts: Tensor, view: Tensor, size: int) -> Tensor:
    """int64 (n, size, size): which part the ray through the middle of each pixel meets first, -1 where it meets none.

    Exactly the surfaces that `render` draws, with no share of a pixel: an edge lies between two pixels.
    """
    few = max(1, CACHED // size**2)
    if len(view) > few:
        return torch.cat([owners(*chunk, size) for chunk in zip(parts.split(few), view.split(few), strict=True)])
    eye, forward, right, up = camera(view)
    towards = _rays(forward, right, up, size)
    nearest = view.new_full((len(view), size**2), math.inf)
    found = torch.full((len(view), size**2), -1, device=view.device)
    for k in range(parts.shape[1]):
        axes, centre = parts[:, k, :3], parts[:, k, 5:8]
        near, p1, p2 = (eye - centre) / axes, 2 / parts[:, k, 3], 2 / parts[:, k, 4]
        image, pixel, _, t, _ = _search(near, towards / axes[:, None], p1, p2)
        depth = torch.full_like(nearest, math.inf).index_put((image, pixel), t)
        found = torch.where(depth < nearest, k, found)
        nearest = torch.minimum(nearest, depth)
    return found.view(-1, size, size)


def _render(parts: Tensor, view: Tensor, background: Tensor, size: int) -> Tensor:
    eye, forward, right, up = camera(view)
    towards = _rays(forward, right, up, size)
    light = view.new_tensor(LIGHT)
    lit = light_colour(view[:, 3])
    layers = [_layer(parts[:, k], eye, towards, right, up, lit, light, size) for k in range(parts.shape[1])]
    picture = backdrop(background, size).flatten(2).transpose(1, 2)
    if layers:
        # over, in soft order of depth: two parts that meet blend over a hundredth of a unit
        shade = sum(colour * cover * _in_front(layers, k) for k, (colour, cover, _) in enumerate(layers))
        through = torch.stack([1 - cover for _, cover, _ in layers]).prod(dim=0)
        picture = shade + through * picture
    return picture.transpose(1, 2).reshape(len(view), 3, size, size)


def _rays(forward: Tensor, right: Tensor, up: Tensor, size: int) -> Tensor:
    """Directions (n, pixels, 3) through the middle of each pixel, unnormalised: t is the depth along the optical axis."""
    line = ((torch.arange(size, dtype=forward.dtype, device=forward.device) + 0.5) * 2 / size - 1) * HALF_WIDTH
    down, across = (grid.reshape(-1) for grid in torch.meshgrid(line, line, indexing="ij"))
    return forward[:, None] + across[:, None] * right[:, None] - down[:, None] * up[:, None]


def _in_front(layers: list[tuple[Tensor, Tensor, Tensor]], k: int) -> Tensor:
    """What the other layers let through to layer k: prod_j (1 - cover_j sigmoid((t_k - t_j) / 0.01))."""
    passed = torch.ones_like(layers[k][1])
    for j, (_, cover, depth) in enumerate(layers):
        if j != k:
            passed = passed * (1 - cover * torch.sigmoid((layers[k][2] - depth) / 0.01))
    return passed


def camera(view: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Place of the camera and its unit vectors forward, right and up, each (n, 3)."""
    azimuth, elevation = view[:, 0].deg2rad(), view[:, 1].deg2rad()
    ca, sa, ce, se = azimuth.cos(), azimuth.sin(), elevation.cos(), elevation.sin()
    outward = torch.stack([ce * ca, ce * sa, se], dim=1)
    right = torch.stack([-sa, ca, torch.zeros_like(ca)], dim=1)
    up = torch.stack([-se * ca, -se * sa, ce], dim=1)
    return view[:, 2:3] * outward, -outward, right, up


def light_colour(hue: Tensor, saturation: float = 0.6) -> Tensor:
    """RGB (n, 3) of a hue in turns: 1 - s / 2 + s / 2 cos(2 pi (hue - k / 3)), smooth where the HSV formula has corners."""
    thirds = torch.arange(3, dtype=hue.dtype, device=hue.device) / 3
    return 1 - saturation / 2 + saturation / 2 * (2 * math.pi * (hue[:, None] - thirds)).cos()


def backdrop(background: Tensor, size: int) -> Tensor:
    """The plane waves (n, 3, size, size) behind the object, in [0, 1] where the amplitudes leave room."""
    line = (torch.arange(size, dtype=background.dtype, device=background.device) + 0.5) / size
    waves = background[:, 3:].reshape(-1, WAVES, 6)
    angle = waves[:, :, 0, None, None] * line[:, None] + waves[:, :, 1, None, None] * line + waves[:, :, 2, None, None]
    waving = torch.einsum("nkhw,nkc->nchw", (2 * math.pi * angle).cos(), waves[:, :, 3:])
    return background[:, :3, None, None] + waving


def _layer(
    part: Tensor, eye: Tensor, towards: Tensor, right: Tensor, up: Tensor, lit: Tensor, light: Tensor, size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour (n, pixels, 3), cover and depth (n, pixels, 1) of one part of every object; depth is far where it is not seen."""
    n, pixels = towards.shape[:2]
    axes, centre = part[:, :3], part[:, 5:8]
    near = (eye - centre) / axes
    p1, p2 = 2 / part[:, 3], 2 / part[:, 4]
    image, pixel, bottom, t, slope = _search(near.detach(), towards.detach() / axes.detach()[:, None], p1.detach(), p2.detach())
    o, d, q1, q2, own = near[image], towards[image, pixel] / axes[image], p1[image], p2[image], axes[image]
    least = _gauge(*_along(o, d, bottom), q1, q2)[0]
    # how fast the minimum grows from pixel to pixel, taken where the ray passes closest in the scaled 2-norm: a closed form
    passing = -(o * d).sum(dim=1) / d.square().sum(dim=1)
    steep = _gradient(o + passing[:, None] * d, q1, q2) / own
    grows = (steep * right[image]).sum(dim=1).square() + (steep * up[image]).sum(dim=1).square()
    pace = (2 * HALF_WIDTH / size) * passing * (grows + 1e-12).sqrt()
    share = ((1 - least) / pace).clamp(0, 1)
    cover = share.square() * (3 - 2 * share)
    t = t - (_gauge(*_along(o, d, t), q1, q2)[0] - 1) / slope
    place = o + t[:, None] * d
    normal = _gradient(place, q1, q2) / own
    normal = normal / (normal.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()
    facing = (0.5 + 0.5 * (normal * light).sum(dim=1, keepdim=True)).square()
    mixed = 0.5 + 0.5 * torch.sin(4 * place[:, :1] + 2 * place[:, 2:])
    albedo = part[image, 8:11] + mixed * (part[image, 11:14] - part[image, 8:11])
    colour = albedo * (0.25 + 0.75 * facing * lit[image])
    row = image * pixels + pixel

    def spread(values: Tensor, fill: float) -> Tensor:
        room = values.new_full((n * pixels, values.shape[1]), fill)
        return room.index_copy(0, row, values).view(n, pixels, -1)

    return spread(colour, 0.0), spread(cover[:, None], 0.0), spread(t[:, None], 1e3)


@torch.no_grad()
def _search(near: Tensor, towards: Tensor, p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The rays that meet {G <= 1}: image and pixel, where g is least, where it is first 1, and its slope there, each (r,)."""
    # {G <= 1} lies in the cube and in the ball |x| <= 3^(1/2 - 1/p): rays that pass either by need no search
    radius = 3 ** (0.5 - 1 / torch.maximum(p1, p2)).clamp(min=0)
    square = towards.square().sum(dim=2)
    closest = -(near[:, None] * towards).sum(dim=2) / square
    rest = (radius**2 - near.square().sum(dim=1))[:, None] / square + closest.square()
    half = rest.clamp(min=0).sqrt()
    aside = torch.where(towards.abs() < 1e-9, 1e-9, towards)
    enter, leave = (-1 - near[:, None]) / aside, (1 - near[:, None]) / aside
    low = torch.maximum(closest - half, torch.minimum(enter, leave).amax(dim=2))
    high = torch.minimum(closest + half, torch.maximum(enter, leave).amin(dim=2))
    image, pixel = ((rest > 0) & (low < high)).nonzero(as_tuple=True)
    low, high = low[image, pixel], high[image, pixel]
    q1, q2 = p1[image], p2[image]
    o, d = ([v.contiguous() for v in values.unbind(dim=1)] for values in (near[image], towards[image, pixel]))
    first, fine = low, low.dtype == torch.float64
    for _ in range(2 * BISECTIONS if fine else BISECTIONS):
        between = (low + high) / 2
        falling = _gauge([a + between * b for a, b in zip(o, d, strict=True)], d, q1, q2)[1] < 0
        low, high = torch.where(falling, between, low), torch.where(falling, high, between)
    bottom = (low + high) / 2
    met = (_gauge([a + bottom * b for a, b in zip(o, d, strict=True)], d, q1, q2)[0] < 1 - 1e-5).nonzero()[:, 0]
    image, pixel, bottom, t, q1, q2 = (values[met] for values in (image, pixel, bottom, first, q1, q2))
    o, d = ([v[met] for v in values] for values in (o, d))
    for _ in range(2 * NEWTONS if fine else NEWTONS):
        value, slope = _gauge([a + t * b for a, b in zip(o, d, strict=True)], d, q1, q2)
        t = torch.minimum(t - (value - 1) / slope.clamp(max=-1e-6), bottom)
    slope = _gauge([a + t * b for a, b in zip(o, d, strict=True)], d, q1, q2)[1]
    return image, pixel, bottom, t, slope.clamp(max=-1e-4)


def _along(o: Tensor, d: Tensor, t: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The points o + t d and the directions, coordinate by coordinate."""
    return list((o + t[:, None] * d).unbind(dim=1)), list(d.unbind(dim=1))


def _gauge(x: Sequence[Tensor], d: Sequence[Tensor], p1: Tensor, p2: Tensor) -> tuple[Tensor, Tensor]:
    """G at points (each coordinate (r,)) and its derivative along d."""
    powers = [v.abs().clamp(min=1e-6) ** p for v, p in zip(x, (p2, p2, p1), strict=True)]
    rates = [a * v * w / v.square().clamp(min=1e-12) for a, v, w in zip(powers, x, d, strict=True)]
    inner = (powers[0] + powers[1]).clamp(min=1e-30)
    around = inner ** (p1 / p2)
    whole = around + powers[2]
    value = whole ** (1 / p1)
    return value, value / whole * (around / inner * (rates[0] + rates[1]) + rates[2])


def _gradient(x: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
    """The gradient of G at points (r, 3)."""
    first, second, third = (v.abs().clamp(min=1e-6) ** p for v, p in zip(x.unbind(dim=1), (p2, p2, p1), strict=True))
    inner = (first + second).clamp(min=1e-30)
    around = inner ** (p1 / p2)
    whole = around + third
    steps = torch.stack([around / inner * first, around / inner * second, third], dim=1)
    return (whole ** (1 / p1) / whole)[:, None] * steps * x / x.square().clamp(min=1e-12)
