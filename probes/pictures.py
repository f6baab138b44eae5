"""Images as PNG: sheets of square tiles, small enough to travel inside a report."""

from __future__ import annotations

import io
import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = (32, 24, 16, 12, 8)
LIMIT = 150_000


def sprite(images: Tensor, limit: int = LIMIT) -> tuple[bytes, int]:
    """A sheet with one tile an image, row by row, as (PNG, tiles in a row).

    images: (n, C, H, W) in [0, 1]. Tiles are 32 pixels wide, or the first of 24, 16, 12 and 8 that stays under `limit` bytes;
    colour images keep 64 colours where that is needed. The smallest is returned where none does.
    """
    columns = math.ceil(math.sqrt(len(images)))
    data = b""
    for side in SIDES:
        tiles = squares(images, side)
        detail = len(images) * min(side, images.shape[-1]) ** 2
        for colours, size in ((None, detail * tiles.shape[1]), (64, detail)):
            # PNG does not make a photograph eight times smaller: trying would only take time
            if size > 8 * limit and side > SIDES[-1]:
                continue
            data = png(grid(tiles, columns), colours)
            if len(data) <= limit:
                return data, columns
    return data, columns


def squares(images: Tensor, side: int) -> Tensor:
    """Images (n, C, H, W) as (n, 1 or 3, side, side): pixels repeated to enlarge, areas averaged to shrink.

    Three channels are colour; any other number is averaged to grey.
    """
    images = images.detach().float().cpu().clamp(0, 1)
    if images.shape[1] not in (1, 3):
        images = images.mean(dim=1, keepdim=True)
    if images.shape[-1] > side or images.shape[-2] > side:
        return F.interpolate(images, (side, side), mode="area")
    return F.interpolate(images, (side, side), mode="nearest-exact")


def grid(tiles: Tensor, columns: int) -> Tensor:
    """Tiles (n, C, s, s) as one image (C, rows s, columns s), row by row; missing tiles are black."""
    n, channels, height, width = tiles.shape
    rows = -(-n // columns)
    padded = torch.cat([tiles, tiles.new_zeros(rows * columns - n, channels, height, width)])
    return padded.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4).reshape(
        channels, rows * height, columns * width
    )


def png(image: Tensor, colours: int | None = None) -> bytes:
    """An image (1 or 3, H, W) in [0, 1] as PNG bytes; the same image gives the same bytes."""
    from PIL import Image

    values = image.mul(255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)
    if colours is not None and picture.mode == "RGB":
        picture = picture.quantize(colours)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
