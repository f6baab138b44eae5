"""How far the filters of a convolution are from their own turned or mirrored selves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Filters that differ from their turned selves by less than this share count as symmetric: rounding of float32.
SYMMETRIC = 1e-5
# Elements of the groups whose regular fields are looked for: C2 or a mirror, C4, and C8 or D4.
ORDERS = (2, 4, 8)


def asymmetry(weight: Tensor, groups: int = 1) -> dict[str, float]:
    """move -> min_P |P moved filters - filters| / (sqrt(2) |filters|) of a weight (O, I / groups, k, k), in float64.

    P runs over no permutation at all, and over what the move does to regular fields of C2, C4, C8 or D4 among the input
    channels, the output channels or both, whichever library made them: the elements of a field one after another, or a
    channel of every field for the first element, then for the second. So 0 says that the convolution takes some regular (or
    scalar) fields to others and commutes with the move, and about 1 that its filters have nothing to do with their moved
    selves. inf where k is not square. Ties between filters of other fields (irreducible ones, quotients) are not seen.
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
    # A quarter turn keeps the norm of a filter, so only channels of equal norms can change places.
    outputs = exact.flatten(1).norm(dim=1)
    inputs = exact.transpose(0, 1).flatten(1).norm(dim=1)
    found = {}
    for move, turned in moved.items():
        found[move] = math.inf
        if turned is None:
            continue
        ways = itertools.product(_permutations(outputs, move), _permutations(inputs, move))
        for first, second in ways:
            if not _keeps_groups(first, groups):
                continue
            placed = turned if first is None else turned[first]
            placed = placed if second is None else placed[:, second]
            found[move] = min(found[move], float(torch.linalg.vector_norm(placed - exact)) / size)
            if found[move] < SYMMETRIC:
                break
    return found


def _permutations(norms: Tensor, move: str) -> Iterator[Tensor | None]:
    """What a move may do to channels of those norms: nothing (None), or permute regular fields whose norms it keeps."""
    yield None
    places = torch.arange(len(norms), device=norms.device)
    for order in ORDERS:
        if len(norms) % order:
            continue
        views = [places.view(-1, order)] + ([places.view(order, -1).T] if len(norms) > order else [])
        for fields, within in itertools.product(views, _regular(order, move)):
            to = torch.empty_like(places)
            to[fields.flatten()] = fields[:, within].flatten()
            if float((norms[to] - norms).abs().max()) <= SYMMETRIC * float(norms.max()):
                yield to


def _regular(order: int, move: str) -> list[list[int]]:
    """What a move may do to the elements of a group of that order, in either sense of turning."""
    found: list[list[int]] = []
    if order == 2:
        found += [[1, 0]] if move != "90°" else []
    elif move != "mirror":
        # of C4 and C8: k to k + s; of D4, its turns before its mirrored turns: each half to and fro
        step = order // 4 if move == "90°" else order // 2
        found += [[(k + s) % order for k in range(order)] for s in {step, order - step}]
        if order == 8:
            turn = 1 if move == "90°" else 2
            for s, t in itertools.product({turn, 4 - turn}, repeat=2):
                found.append([(k + s) % 4 for k in range(4)] + [4 + (k + t) % 4 for k in range(4)])
    elif order == 8:
        for sense, c in itertools.product((1, -1), range(4)):
            half = [(sense * k + c) % 4 for k in range(4)]
            back = [0] * 4
            for k, value in enumerate(half):
                back[value] = k
            found.append([4 + k for k in half] + back)
    return found


def _keeps_groups(outputs: Tensor | None, groups: int) -> bool:
    """Whether a permutation of the output channels takes whole groups to groups, so that inputs can move along."""
    if outputs is None or groups == 1:
        return True
    to = (outputs // (len(outputs) // groups)).view(groups, -1)
    return bool((to == to[:, :1]).all())
