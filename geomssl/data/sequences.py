"""Frames that follow one another: time-based positives, from the factors `sequence` and `frame` of a source."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl.data.base import Source
from geomssl.errors import GeomsslError


def neighbours(source: Source, indices: Tensor, generator: torch.Generator, reach: int = 1) -> Tensor:
    """For each of those images another one of its sequence, at most `reach` frames away; int64 (n,).

    Uniform among the frames that are there: near an end it draws from one side. An image that is alone in its reach is its
    own neighbour. Raises GeomsslError (reason "no-factor") for a source without sequences.
    Source of the idea: Schneider et al., Contrastive learning through time, SVRHM 2021.
    """
    if "sequence" not in source.factors or "frame" not in source.factors:
        raise GeomsslError(
            f"neighbouring frames of {source.name}", "a data set with the factors sequence and frame (views, core50)",
            reason="no-factor",
        )
    if reach < 1:
        raise GeomsslError(f"reach = {reach}", "at least 1 frame", reason="bad-value")
    sequence, frame = (source.factors[name].cpu().long() for name in ("sequence", "frame"))
    wide = int(frame.max()) - int(frame.min()) + 2 * reach + 2
    key = sequence * wide + (frame - frame.min())
    order = key.argsort()
    sorted_keys = key[order]
    steps = torch.tensor([s for s in range(-reach, reach + 1) if s])
    wanted = key[indices.cpu()][:, None] + steps
    place = torch.searchsorted(sorted_keys, wanted).clamp(max=len(key) - 1)
    there = sorted_keys[place] == wanted
    # the largest of as many uniform numbers is each candidate with the same probability; those that are not there lose
    drawn = torch.rand(wanted.shape, generator=generator).masked_fill(~there, -1.0)
    best = drawn.argmax(dim=1, keepdim=True)
    found = order[place.gather(1, best)[:, 0]]
    return torch.where(there.any(dim=1), found, indices.cpu())
