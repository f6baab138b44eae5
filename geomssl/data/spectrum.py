"""What a set of images has of each frequency: the radial power spectrum, its slope, mean and contrast."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError

# Bytes that one chunk of pictures may take on the way.
BYTES = 2**26


@dataclass(frozen=True)
class Spectrum:
    """What a set of images has of each frequency, in the mean over images and channels.

    frequencies (R,): cycles per pixel; power (R,): |FFT|^2 averaged over the ring, any unit; slope: s of the amplitude
    spectrum |k|^-s that fits it best; mean (C,): of all pixels; covariance (C, C): of the channels within an image, over
    its pixels; spread: standard deviation, over images, of an image's mean. float64 on the CPU.
    """

    frequencies: Tensor
    power: Tensor
    slope: float
    mean: Tensor
    covariance: Tensor
    spread: float


def natural_spectrum(images: Tensor, bandwidth: float = 0.5) -> Spectrum:
    """The spectrum, mean and contrast of images (n, C, H, H), floats, under a Hann window, in rings one cycle per image wide.

    Raises GeomsslError unless the images are square, finite, at least 8 pixels wide and not flat. The window widens every
    line by about one ring, so that the lowest ring says little; slope is fitted from the second on, up to `bandwidth`.
    """
    if images.dim() != 4 or images.shape[2] != images.shape[3] or images.shape[3] < 8 or not images.is_floating_point():
        raise GeomsslError(
            f"images {images.dtype} {tuple(images.shape)} for a spectrum", "float (n, C, H, H) of at least 8x8 pixels",
            reason="bad-images",
        )
    size = images.shape[3]
    window = torch.hann_window(size, periodic=False, dtype=torch.float64)
    y, x = torch.meshgrid(torch.fft.fftfreq(size), torch.fft.rfftfreq(size), indexing="ij")
    ring = ((y**2 + x**2).sqrt() * size).round().long().flatten()
    rings = size // 2
    power = torch.zeros(y.numel(), dtype=torch.float64)
    total, outer, means = 0.0, torch.zeros(images.shape[1], images.shape[1], dtype=torch.float64), []
    for chunk in images.split(max(1, BYTES // (16 * images[0].numel()))):
        pixels = chunk.detach().to("cpu", torch.float64)
        means.append(pixels.mean(dim=(2, 3)))
        pixels = pixels - means[-1][:, :, None, None]
        outer += torch.einsum("nahw,nbhw->ab", pixels, pixels)
        power += torch.fft.rfft2(pixels * window[:, None] * window).abs().square().mean(dim=1).sum(dim=0).flatten()
        total += len(chunk) * size**2
    own = torch.cat(means)
    if not bool(power.isfinite().all()) or not float(power.sum()) > 0:
        raise GeomsslError(f"the spectrum of {len(images)} images, flat or not finite", "images that vary", reason="degenerate")
    inside = (ring >= 1) & (ring <= rings)
    count = torch.bincount(ring[inside], minlength=rings + 1)[1:]
    averaged = torch.bincount(ring[inside], power[inside], minlength=rings + 1)[1:] / count / len(images)
    frequencies = torch.arange(1, rings + 1, dtype=torch.float64) / size
    fitted = frequencies <= bandwidth
    fitted[0] = False
    log_k, log_p = frequencies[fitted].log(), averaged[fitted].clamp(min=1e-300).log()
    centred = log_k - log_k.mean()
    slope = -float((centred * log_p).sum() / centred.square().sum()) / 2
    spread = float(own.mean(dim=1).std(correction=0))
    return Spectrum(frequencies, averaged, slope, own.mean(dim=0), outer / total, spread)
