"""How far the filters of a convolution are from their own turned or mirrored selves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from geomssl.encoders.group_conv import GroupConv2d

# Filters that differ from their turned selves by less than this share count as symmetric: rounding of float32.
SYMMETRIC = 1e-5


def asymmetry(weight: Tensor, owner: nn.Module | None = None) -> dict[str, float]:
    """move -> |moved filters - filters| / (sqrt(2) |filters|) of a weight (O, I, k, k), in float64; inf where k is not square.

    Filters of a GroupConv2d are held to their group: the orientations of the inputs and outputs move along.
    """
    exact = weight.detach().double()
    size = float(torch.linalg.vector_norm(exact)) * math.sqrt(2)
    if not size:
        return {"90°": 0.0, "180°": 0.0, "mirror": 0.0}
    square = exact.shape[-1] == exact.shape[-2]
    moved = {
        "90°": torch.rot90(exact, 1, (-2, -1)) if square else None, "180°": torch.rot90(exact, 2, (-2, -1)),
        "mirror": exact.flip(-1),
    }
    found = {m: math.inf if v is None else float(torch.linalg.vector_norm(v - exact)) / size for m, v in moved.items()}
    if isinstance(owner, GroupConv2d):
        elements = {"90°": 1, "180°": 2} | ({"mirror": 4} if owner.group.name == "d4" else {})
        found |= {move: _tied(exact, owner, element) / size for move, element in elements.items()}
    return found


def _tied(weight: Tensor, owner: GroupConv2d, element: int) -> float:
    """|Γ_g w - w| with g on the places, on the orientations of the inputs (Γ) and on those of the outputs."""
    group, order = owner.group, owner.order
    g = torch.full((len(weight), 1), float(element), dtype=torch.float64, device=weight.device)
    turned = group(weight, g) if owner.lifting else group.act(weight.unflatten(1, (-1, order)), g).flatten(1, 2)
    elements = group.elements().to(g)
    to = group.compose(g[:1].expand(order, 1), elements)[:, 0].long()
    outputs = torch.empty_like(turned).unflatten(0, (-1, order))
    outputs[:, to] = turned.unflatten(0, (-1, order))
    return float(torch.linalg.vector_norm(outputs.flatten(0, 1) - weight))
