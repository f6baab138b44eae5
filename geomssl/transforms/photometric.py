"""Photometric transforms of images in [0, 1]: brightness, contrast, saturation, hue, their joint jitter, grayscale, blur."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.transforms.base import Parameter, Size, Transform
from geomssl.transforms.geometric import bernoulli, require, uniform
from geomssl.transforms.sampling import checked, smooth, working_dtype


class Photometric(Transform):
    """A Transform that changes values and leaves pixels in their places. Images lie in [0, 1] and stay there."""

    needs_colour: bool = True
    """Takes images of 1 or 3 channels only."""

    colour_only: bool = False
    """Is the identity on one channel."""

    pointwise: bool = True
    """Does every pixel depend on itself alone, so that it commutes with whatever moves pixels?"""

    @abstractmethod
    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        """Change pixels (n, C, H, W) in the working dtype by checked parameters (n, P)."""

    def active(self, channels: int) -> tuple[bool, ...]:
        return (channels != 1 or not self.colour_only,) * len(self.parameters)

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        params = checked(self, images, params)
        if self.needs_colour and images.shape[1] not in (1, 3):
            raise GeomsslError(
                f"images of {images.shape[1]} channels for {self.name}", "1 channel (gray) or 3 (red, green, blue)",
                reason="bad-channels",
            )
        return self.colour(images.to(working_dtype(images.dtype)), params).to(images.dtype)


def luma(pixels: Tensor) -> Tensor:
    """Gray (n, 1, H, W) = .2989 red + .587 green + .114 blue; one channel is its own gray."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, dim=1)
    return 0.2989 * red + 0.587 * green + 0.114 * blue


def adjust_brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    """factor · x, cut to [0, 1]. factor (n,)."""
    return (_cell(factor) * pixels).clamp(0, 1)


def adjust_contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    """factor · x + (1 - factor) · mean of the image's gray, cut to [0, 1]. factor (n,)."""
    return _blend(pixels, luma(pixels).mean(dim=(1, 2, 3), keepdim=True), factor)


def adjust_saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    """factor · x + (1 - factor) · gray, cut to [0, 1]; the identity on one channel. factor (n,)."""
    return pixels if pixels.shape[1] == 1 else _blend(pixels, luma(pixels), factor)


def adjust_hue(pixels: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue h of HSV by `turns` (n,) of the whole circle; the identity on one channel.

    With V and m the largest and smallest channel and h in [0, 6), a channel is V - (V - m) w(h), where
    w_red = cut(2 - |h - 3|), w_green = cut(|h - 2| - 1), w_blue = cut(|h - 4| - 1), cut to [0, 1]. The change of w is
    added to the pixel, so that a turn by 0 changes no bit.
    """
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.unbind(dim=1)
    top, bottom = torch.maximum(torch.maximum(red, green), blue), torch.minimum(torch.minimum(red, green), blue)
    chroma = top - bottom
    # Masks that are multiplied: several times faster than torch.where.
    is_red = (red == top).to(top.dtype)
    is_green = (green == top).to(top.dtype) * (1 - is_red)
    is_blue = 1 - is_red - is_green
    rise = is_red * (green - blue) + is_green * (blue - red) + is_blue * (red - green)
    hue = _wrap(rise / (chroma + (chroma == 0)) + 2 * is_green + 4 * is_blue)
    turned = _wrap(hue + 6 * turns.view(-1, 1, 1))
    change = torch.stack([old - new for old, new in zip(_weights(hue), _weights(turned), strict=True)], dim=1)
    return (pixels + chroma.unsqueeze(1) * change).clamp(0, 1)


def _wrap(hue: Tensor) -> Tensor:
    """Into [0, 6). Several times faster than torch.remainder."""
    return hue - 6 * (hue / 6).floor()


def _weights(hue: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        (2 - (hue - 3).abs()).clamp(0, 1),
        ((hue - 2).abs() - 1).clamp(0, 1),
        ((hue - 4).abs() - 1).clamp(0, 1),
    )


def _cell(factor: Tensor) -> Tensor:
    return factor.view(-1, 1, 1, 1)


def _blend(pixels: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (_cell(factor) * pixels + (1 - _cell(factor)) * other).clamp(0, 1)


class Jitter(Photometric):
    """Brightness, contrast, saturation and hue in this fixed order, all four applied or none (probability p, one draw).

    Parameters: brightness, contrast, saturation (factors, uniform in [max(0, 1 - s), 1 + s)), hue (turns, uniform in
    [-s, s)). Where jitter is not applied they take their identity 1, 1, 1, 0. torchvision's ColorJitter applies the same
    functions in random order.
    """

    name = "jitter"
    pointwise = False  # its contrast looks at the mean of the image

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1, p: float = 0.8
    ) -> None:
        require(0 <= p <= 1, f"Jitter(p={p})", "a probability from 0 to 1")
        self.p = float(p)
        self.parameters = (
            _factor("brightness", brightness), _factor("contrast", contrast), _factor("saturation", saturation),
            _hue(hue),
        )

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return _applied(self, n, generator)

    def active(self, channels: int) -> tuple[bool, ...]:
        return (True, True, channels != 1, channels != 1)

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        brightness, contrast, saturation, hue = params.unbind(dim=1)
        pixels = adjust_contrast(adjust_brightness(pixels, brightness), contrast)
        return adjust_hue(adjust_saturation(pixels, saturation), hue)


class Brightness(Photometric):
    """x times a factor. Parameters: brightness, uniform in [max(0, 1 - strength), 1 + strength) with probability p, else 1."""

    name = "brightness"
    needs_colour = False

    def __init__(self, strength: float = 0.4, p: float = 1.0) -> None:
        require(0 <= p <= 1, f"{type(self).__name__}(p={p})", "a probability from 0 to 1")
        self.p = float(p)
        self.parameters = (_factor(self.name, strength),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return _applied(self, n, generator)

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        return adjust_brightness(pixels, params[:, 0])


class Contrast(Brightness):
    """Away from the mean gray by a factor. Parameters: contrast, drawn as Brightness draws."""

    name = "contrast"
    needs_colour = True
    pointwise = False

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        return adjust_contrast(pixels, params[:, 0])


class Saturation(Brightness):
    """Away from gray by a factor. Parameters: saturation, drawn as Brightness draws. The identity on one channel."""

    name = "saturation"
    needs_colour = True
    colour_only = True

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        return adjust_saturation(pixels, params[:, 0])


class Hue(Photometric):
    """Turn the hue. Parameters: hue in turns of the colour circle, uniform in [-strength, strength) with probability p, else 0.

    The identity on one channel.
    """

    name = "hue"
    colour_only = True

    def __init__(self, strength: float = 0.1, p: float = 1.0) -> None:
        require(0 <= p <= 1, f"Hue(p={p})", "a probability from 0 to 1")
        self.p = float(p)
        self.parameters = (_hue(strength),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return _applied(self, n, generator)

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        return adjust_hue(pixels, params[:, 0])


class Grayscale(Photometric):
    """All three channels become gray. Parameters: gray, 1 (with probability p) or 0. The identity on one channel."""

    name = "grayscale"
    colour_only = True

    def __init__(self, p: float = 0.2) -> None:
        require(0 <= p <= 1, f"Grayscale(p={p})", "a probability from 0 to 1")
        self.p = float(p)
        self.parameters = (Parameter("gray", "", "binary", 0.0, 0.0, 1.0),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return bernoulli(n, self.p, generator).float().unsqueeze(1)

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        if pixels.shape[1] == 1:
            return pixels
        return torch.lerp(pixels, luma(pixels), (_cell(params[:, 0]) > 0.5).to(pixels.dtype))


class GaussianBlur(Photometric):
    """Convolve with a Gaussian of kernel_size taps an axis, the image mirrored at its edge (as numpy's "reflect").

    Parameters: sigma in pixels, uniform in [low, high) with probability p, else 0, which blurs nothing. The kernel keeps
    its size at every sigma, as in torchvision's F.gaussian_blur(kernel_size, sigma).
    """

    name = "gaussian-blur"
    needs_colour = False
    pointwise = False

    def __init__(self, kernel_size: int = 5, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        require(kernel_size >= 1 and kernel_size % 2 == 1, f"GaussianBlur(kernel_size={kernel_size})", "an odd size")
        require(0 < sigma[0] <= sigma[1], f"GaussianBlur(sigma={sigma})", "0 < low <= high")
        require(0 <= p <= 1, f"GaussianBlur(p={p})", "a probability from 0 to 1")
        self.kernel_size, self.p = int(kernel_size), float(p)
        self.parameters = (Parameter("sigma", "pixels", "continuous", 0.0, *map(float, sigma)),)

    def sample(self, n: int, generator: torch.Generator, size: Size) -> Tensor:
        return _applied(self, n, generator)

    def colour(self, pixels: Tensor, params: Tensor) -> Tensor:
        radius = self.kernel_size // 2
        if radius >= min(pixels.shape[2:]):
            raise GeomsslError(
                f"a blur of {self.kernel_size} taps on images {tuple(pixels.shape[2:])}",
                f"images of more than {radius} pixels a side", reason="bad-images",
            )
        return smooth(pixels, params[:, 0], radius)


def _factor(name: str, strength: float) -> Parameter:
    require(strength >= 0, f"{name} strength {strength}", "a strength from 0")
    return Parameter(name, "factor", "continuous", 1.0, max(0.0, 1.0 - strength), 1.0 + strength)


def _hue(strength: float) -> Parameter:
    require(0 <= strength <= 0.5, f"hue strength {strength}", "a strength from 0 to 0.5 turns")
    kind: Literal["periodic", "continuous"] = "periodic" if strength == 0.5 else "continuous"
    return Parameter("hue", "turns", kind, 0.0, -float(strength), float(strength))


def _applied(transform: Jitter | Brightness | Hue | GaussianBlur, n: int, generator: torch.Generator) -> Tensor:
    """Rows drawn uniformly from the ranges of all parameters, or with probability 1 - p all at their identity."""
    applied = bernoulli(n, transform.p, generator)
    columns = [torch.where(applied, uniform(n, p.low, p.high, generator), p.identity) for p in transform.parameters]
    return torch.stack(columns, dim=1)
