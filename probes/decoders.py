"""Small decoders from a map of features to a region for every pixel: linear, or with weights that a hypernetwork makes."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.errors import GeomsslError

Kind = Literal["hypernetwork", "linear"]


class Standardised(nn.Module):
    """Places (N, D, H, W), each feature minus its mean over its standard deviation, of the features it was made from.

    Features that do not vary weigh nothing. Fixed: it does not learn, and it is the same in training and in use.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, sample: Tensor) -> None:
        super().__init__()
        rows = sample.detach().double().cpu().transpose(0, 1).flatten(1)
        mean, std = rows.mean(dim=1), rows.std(dim=1, correction=0)
        scale = torch.where(std > 1e-6 * mean.abs(), 1 / std.clamp(min=1e-300), 0.0)
        self.register_buffer("mean", mean.float().view(1, -1, 1, 1))
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1))

    def forward(self, places: Tensor) -> Tensor:
        return (places - self.mean) * self.scale


def places(fibres: Tensor) -> Tensor:
    """Fibres (N, C, G, H, W) as places (N, C G, H, W): every orientation's features side by side."""
    return fibres.flatten(1, 2)


class Linear(nn.Module):
    """A linear classifier of every place, its logits (N, K, size, size) bilinear between the places."""

    def __init__(self, dim: int, grid: tuple[int, int], regions: int, channels: int, size: int) -> None:
        super().__init__()
        if grid == (1, 1):
            raise GeomsslError(
                "a linear decoder of features at one place, which cannot tell pixels apart", "--decoder hypernetwork",
                reason="no-map",
            )
        self.size, self.classify = size, nn.Conv2d(dim, regions, 1)

    def forward(self, places: Tensor, images: Tensor) -> Tensor:
        return F.interpolate(self.classify(places), (self.size,) * 2, mode="bilinear")


class Hyper(nn.Module):
    """A network of two layers reads every pixel of a patch; a hypernetwork makes its weights from the features of that patch.

        s = W_s place,   (A, a, B, b) = W_h relu(s),   logits(pixel) = B relu(A [colours, y, x] + a) + b

    y, x in [-1, 1] are the pixel's place in its patch. As in HyperSeg, the encoder's features become weights of a decoder,
    another one for each patch, which looks at the picture itself; here one level of it, without its U-Net of contexts. The
    places of the map are spread evenly over the image; where they do not divide it, pixels are resampled and logits brought
    back.
    `width`: of the pixel network; `signal`: of s. Nirkin, Wolf and Hassner, HyperSeg, CVPR 2021.
    """

    spots: Tensor

    def __init__(
        self, dim: int, grid: tuple[int, int], regions: int, channels: int, size: int, width: int = 16, signal: int = 64
    ) -> None:
        super().__init__()
        self.size, self.grid, self.regions, self.width = size, grid, regions, width
        self.patch = (math.ceil(size / grid[0]), math.ceil(size / grid[1]))
        self.inputs = channels + 2
        self.counts = (self.inputs * width, width, width * regions, regions)
        self.signal = nn.Conv2d(dim, signal, 1)
        self.make = nn.Conv2d(signal, sum(self.counts), 1)
        lines = [(torch.arange(p) + 0.5) * 2 / p - 1 for p in self.patch]
        spots = torch.stack(torch.meshgrid(*lines, indexing="ij")).flatten(1)
        self.register_buffer("spots", spots, persistent=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """The hypernetwork's biases are an ordinary network's weights, so that it starts as one decoder for all patches."""
        self.make.weight.mul_(0.3)
        first, second = (torch.randn(count) * math.sqrt(2 / inputs) for count, inputs in (
            (self.counts[0], self.inputs), (self.counts[2], self.width)
        ))
        zeros = torch.zeros
        self.make.bias.copy_(torch.cat([first, zeros(self.counts[1]), second, zeros(self.counts[3])]))  # type: ignore[union-attr]

    def forward(self, places: Tensor, images: Tensor) -> Tensor:
        n, (rows, columns), (high, wide) = len(places), self.grid, self.patch
        side = (rows * high, columns * wide)
        if images.shape[2:] != side:
            images = F.interpolate(images, side, mode="bilinear")
        # (n h w, channels, pixels of a patch)
        cut = images.unflatten(3, (columns, wide)).unflatten(2, (rows, high)).permute(0, 2, 4, 1, 3, 5)
        cut = cut.reshape(n * rows * columns, -1, high * wide)
        seen = torch.cat([2 * cut - 1, self.spots.to(cut).expand(len(cut), -1, -1)], dim=1)
        made = self.make(self.signal(places).relu()).permute(0, 2, 3, 1).flatten(0, 2)
        first, lift, second, bias = made.split(self.counts, dim=1)
        hidden = torch.baddbmm(lift[:, :, None], first.view(-1, self.width, self.inputs), seen).relu()
        logits = torch.baddbmm(bias[:, :, None], second.view(-1, self.regions, self.width), hidden)
        whole = logits.view(n, rows, columns, self.regions, high, wide).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return whole if side == (self.size,) * 2 else F.interpolate(whole, (self.size,) * 2, mode="bilinear")


DECODERS: dict[str, type[Linear] | type[Hyper]] = {"hypernetwork": Hyper, "linear": Linear}
