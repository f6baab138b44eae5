"""Reading batches of images at real coordinates: border checks, bilinear reading, what lies outside, Gaussian smoothing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.transforms.base import Size, Transform


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which coordinates and pixels are computed: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def checked(transform: Transform, images: Tensor, params: Tensor) -> Tensor:
    """The parameters on the images' device, in the working dtype.

    Raises GeomsslError unless images are float (n, C, H, W) with C, H, W >= 1 and params are (n, P). Looks at shapes
    and dtypes only, never at values, so that nothing waits for a device.
    """
    if images.dim() != 4 or not images.is_floating_point() or 0 in images.shape[1:]:
        raise GeomsslError(
            f"images {images.dtype} {tuple(images.shape)} for {transform.name}", "float images (n, C, H, W)",
            reason="bad-images",
        )
    expected = (images.shape[0], len(transform.parameters))
    if tuple(params.shape) != expected:
        names = ", ".join(p.name for p in transform.parameters) or "none"
        raise GeomsslError(
            f"parameters {tuple(params.shape)} for {transform.name}", f"{expected}: one row an image, columns {names}",
            reason="bad-parameters",
        )
    return params.to(images.device, working_dtype(images.dtype), non_blocking=images.is_cuda)


def frame(size: Size, like: Tensor) -> tuple[Tensor, Tensor]:
    """Pixel coordinates y (1, H, 1) and x (1, 1, W) of every pixel of an image, in the dtype and on the device of `like`."""
    y = torch.arange(size[0], dtype=like.dtype, device=like.device)
    x = torch.arange(size[1], dtype=like.dtype, device=like.device)
    return y.view(1, -1, 1), x.view(1, 1, -1)


def zeros_outside(y: Tensor, x: Tensor, size: Size) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates held inside the frame, and the share of each reading that falls on it.

    A bilinear reading of an image that is zero outside its frame is a reading at the nearest point of the frame times
    c(y) c(x), where c falls from 1 to 0 over the one pixel around the frame. The product form is exact.
    """
    height, width = size
    share = torch.minimum(y + 1, height - y).clamp(0, 1) * torch.minimum(x + 1, width - x).clamp(0, 1)
    return y.clamp(0, height - 1), x.clamp(0, width - 1), share


def bilinear(images: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Read images (n, C, H, W) at coordinates inside the frame: y and x broadcast to (n, H', W'); returns (n, C, H', W').

    At whole coordinates the pixel itself comes back, bit for bit. For this the frame is widened to powers of two, where
    the normalised coordinates that grid_sample takes are exact.
    """
    height, width = images.shape[2:]
    rows, columns = _power_of_two(height), _power_of_two(width)
    if (rows, columns) != (height, width):
        images = F.pad(images, (0, columns - width, 0, rows - height))
    across, down = torch.broadcast_tensors((2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1)
    grid = torch.stack((across, down), dim=-1).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def smooth(images: Tensor, sigma: Tensor, radius: int, border: str = "reflect") -> Tensor:
    """Each image convolved with a normalised Gaussian of its own width, cut at `radius` pixels.

    k_t = exp(-t^2 / 2 sigma^2) / sum, t = -radius..radius, along both axes. images (n, C, H, W), sigma (n,) in pixels;
    sigma near 0 leaves an image bit for bit as it is. border: a mode of torch.nn.functional.pad.
    """
    taps = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    weights = torch.exp(-0.5 * (taps / sigma.clamp(min=1e-3)[:, None]) ** 2)
    weights = weights / weights.sum(dim=1, keepdim=True)
    height, width = images.shape[2:]
    padded = F.pad(images, (radius, radius, radius, radius), mode=border)
    rows = torch.zeros_like(padded[:, :, :height])
    for t, weight in enumerate(weights.T):
        rows = rows + weight.view(-1, 1, 1, 1) * padded[:, :, t : t + height]
    out = torch.zeros_like(images)
    for t, weight in enumerate(weights.T):
        out = out + weight.view(-1, 1, 1, 1) * rows[..., t : t + width]
    return out


def _power_of_two(length: int) -> int:
    return 1 << (length - 1).bit_length()
