"""Reading maps at real coordinates by a windowed sinc: what a band-limited map is between its pixels."""

from __future__ import annotations

import torch
from torch import Tensor

# Taps on either side, and the window's parameter, by Kaiser's rule: waves of up to a quarter of the sampling rate are read
# right to a thousandth. Shorter ones are not: between its pixels such a map is not known.
RADIUS, BETA = 5, 7.8


# First and last row, first and last column.
Window = tuple[int, int, int, int]


def windowed_sinc(
    maps: Tensor, y: Tensor, x: Tensor, radius: int = RADIUS, wrap: bool = False, window: Window | None = None
) -> Tensor:
    """Read maps (n, C, h, w) at coordinates y and x, which broadcast to (n, h', w'); returns (n, C, h', w').

        m(v) = sum_t k(v - t) m_t / sum_t k(v - t),   k(d) = sinc(d) I0(beta sqrt(1 - (d / radius)^2)), |d| < radius

    along both axes (Kaiser 1974). At whole coordinates the pixel itself comes back. wrap: over the torus. window: read no
    pixel but these (the whole map unless given); beyond its edge e the map goes on as 2 m_e - m_(2e - t), which keeps slopes.
    One sparse matrix a set of coordinates serves every map and channel that is read there.
    """
    n, channels, height, width = maps.shape
    first, last, left, right = window or (0, height - 1, 0, width - 1)
    y, x = torch.broadcast_tensors(y, x)
    y, x = y.expand(n, -1, -1), x.expand(n, -1, -1)
    spots, which = torch.unique(torch.stack([y, x], dim=1).flatten(1), dim=0, return_inverse=True)
    out = maps.new_empty((n, channels, y.shape[1] * y.shape[2]))
    for index, spot in enumerate(spots):
        rows = (which == index).nonzero().squeeze(1)
        down, across = spot.chunk(2)
        row_weights, row_taps = _taps(down, first, last, radius, wrap)
        column_weights, column_taps = _taps(across, left, right, radius, wrap)
        weights = (row_weights[:, :, None] * column_weights[:, None, :]).flatten(1)
        taps = (row_taps[:, :, None] * width + column_taps[:, None, :]).flatten(1)
        points = torch.arange(len(taps), device=maps.device).unsqueeze(1).expand_as(taps)
        read = weights != 0
        matrix = torch.sparse_coo_tensor(
            torch.stack([points[read], taps[read]]), weights[read], (len(taps), height * width), check_invariants=False
        )
        table = maps[rows].reshape(-1, height * width).T
        out[rows] = (matrix @ table).T.reshape(len(rows), channels, -1)
    return out.view(n, channels, *y.shape[1:])


def _taps(values: Tensor, first: int, last: int, radius: int, wrap: bool) -> tuple[Tensor, Tensor]:
    """Weights and pixels (points, 4 radius) that make up the reading at each coordinate of one axis."""
    reach = torch.arange(1 - radius, radius + 1, device=values.device)
    near = values.floor().long().unsqueeze(1) + reach
    distance = values.unsqueeze(1) - near
    window = torch.special.i0(BETA * (1 - (distance / radius) ** 2).clamp(min=0).sqrt())
    weights = torch.sinc(distance) * window * (distance.abs() < radius)
    weights = weights / weights.sum(dim=1, keepdim=True)
    # sinc at whole distances is zero but for rounding.
    weights = weights * (weights.abs() > 1e-12)
    if wrap:
        return weights, near.remainder(last + 1)
    edge = near.clamp(first, last)
    outside = near != edge
    mirrored = (2 * edge - near).clamp(first, last)
    return torch.cat([weights * (1 + outside), -weights * outside], dim=1), torch.cat([edge, mirrored], dim=1)
