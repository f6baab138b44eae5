"""The decoder of reconstruction: where view 2 asks, view 1 answers, and blocks of self-attention paint it (row X2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl import modes
from geomssl.encoders.vit import MLP, Block, sincos
from geomssl.errors import GeomsslError


class Decoder(nn.Module):
    """Pixels (N, C, size, size) of view 2 from the equivariant tokens of both views, (N, G T, width) each, T = side².

        t = CrossAttention(query = e2, key = value = e1) + position;  t += mlp(norm t);  depth - 1 blocks of self-attention;
        pixels of a patch = linear(norm t), the mean over G orientations

    There is NO residual from the query: e2 says where to look and never what is there. Otherwise view 2 would reach its own
    reconstruction, and the loss would be that of an autoencoder. The position is a fixed sine and cosine of the token's
    place, the same for every image. A patch has ceil(size / side) pixels a side; what reaches beyond the image is cut off.
    """

    positions: Tensor

    def __init__(self, width: int, depth: int, heads: int, channels: int, size: int, orientations: int, side: int) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise GeomsslError(
                f"a decoder of width {width} with {heads} heads", "a multiple of 4 that the number of heads divides",
                reason="bad-value",
            )
        self.size, self.orientations, self.side = size, orientations, side
        self.patch = math.ceil(size / side)
        self.register_buffer("positions", sincos(side, width).repeat(1, orientations, 1), persistent=False)
        self.cross = CrossAttention(width, heads)
        self.norm, self.mlp = nn.LayerNorm(width), MLP(width, 4 * width)
        self.blocks = nn.Sequential(*(Block(width, heads, 4) for _ in range(depth - 1)))
        self.last, self.pixels = nn.LayerNorm(width), nn.Linear(width, channels * self.patch**2)

    def forward(self, e1: Tensor, e2: Tensor) -> Tensor:
        tokens = self.cross(e2, e1) + self.positions
        tokens = self.blocks(tokens + self.mlp(self.norm(tokens)))
        patches = self.pixels(self.last(tokens)).unflatten(1, (self.orientations, -1)).mean(dim=1)
        maps = patches.transpose(1, 2).unflatten(2, (self.side, self.side))
        return F.pixel_shuffle(maps, self.patch)[:, :, : self.size, : self.size]


class CrossAttention(nn.Module):
    """softmax((W_q q)(W_k x)ᵀ / √d) W_v x in each head, all heads joined by one linear map."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, queries: Tensor, values: Tensor) -> Tensor:
        q = self.q(queries).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(values).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def tokens(fibres: Tensor) -> Tensor:
    """Fibres (N, C, G, H, W) as tokens (N, G H W, C), orientation by orientation, row by row."""
    return fibres.flatten(2).transpose(1, 2)


@torch.no_grad()
def token_grid(encoder: nn.Module, channels: int, size: int) -> tuple[int, int]:
    """Orientations G and side H = W of the encoder's map of fibres on images of that size, from one pass in eval mode.

    Raises GeomsslError where the map is not square, or where h is no pooling of it (a class token): what is split must be
    the h that is used later.
    """
    weight = next(iter(encoder.parameters()), torch.empty(0))
    ramp = torch.linspace(0, 1, channels * size * size, dtype=weight.dtype, device=weight.device)
    image = ramp.view(1, channels, size, size)
    with modes.evaluating(encoder):
        maps = encoder.fibres(image)  # type: ignore[operator]
        pooled, h = encoder.pool(maps), encoder(image)  # type: ignore[operator]
    if maps.shape[3] != maps.shape[4]:
        given = f"reconstruction from fibres {tuple(maps.shape[1:])} (C, G, H, W)"
        raise GeomsslError(given, "as many rows as columns", reason="bad-shape")
    if not torch.allclose(pooled, h, rtol=1e-3, atol=1e-5):
        raise GeomsslError(
            "reconstruction on an encoder whose h is no pooling of its tokens (a class token)",
            "h = mean (--set encoder.h=mean)", reason="bad-value",
        )
    return maps.shape[2], maps.shape[3]
