"""Splits: train / val / test as 60 / 20 / 20 of every class, or val as a share of a released train; seeded."""

from __future__ import annotations

import torch
from torch import Tensor

from geomssl.data.base import Split
from geomssl.seeding import generator

SHARES = (0.6, 0.2)


def stratified(labels: Tensor, seed: int) -> dict[Split, Tensor]:
    """Sorted indices of each split. Every class gives round(.6 n) to train, round(.2 n) to val, the rest to test."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator(seed, "split", int(label)))]
        train = round(SHARES[0] * len(members))
        val = train + round(SHARES[1] * len(members))
        for part, chunk in zip(parts, (members[:train], members[train:val], members[val:]), strict=True):
            part.append(chunk)
    train_part, val_part, test_part = (torch.cat(part).sort().values for part in parts)
    return {"train": train_part, "val": val_part, "test": test_part}


def held_out(labels: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices (train, val): round(share n) of every class are held out for val, drawn by the seed."""
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator(seed, "held-out", int(label)))
        held[members[order[: round(share * len(members))]]] = True
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]
