"""Sums of single images beside an artifact: `equivariance` writes them, and the gate pairs two measurements by them."""

from __future__ import annotations

import hashlib
import io
import zipfile
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.seeding import generator

FILE = "sums.npz"
# At most BLOCKS rows and BYTES of numbers; where that would leave fewer than FEWEST rows nothing is kept.
BLOCKS, BYTES, FEWEST = 1024, 2**20, 128


@dataclass(frozen=True)
class Sums:
    """numerators, denominators of a squared error: float64 (rows, figures), one row a `word`: an image, or a block of them.

    key: what the rows are, as a digest: two files with the same key hold the same images in the same order.
    """

    numerators: Tensor
    denominators: Tensor
    key: str
    word: str = "images"


def key(indices: Tensor, count: int) -> str:
    """The digest of `count` rows made from the images `indices`."""
    return hashlib.sha256(f"{count} of ".encode() + indices.long().cpu().numpy().tobytes()).hexdigest()[:16]


def blocks(count: int, figures: int) -> int:
    """How many rows are kept of `count`, or 0."""
    room = BYTES // (8 * max(1, figures))
    return min(count, BLOCKS, room) if room >= FEWEST or room >= count else 0


def pack(sums: Sums) -> bytes | None:
    """The file, in float32: each sum to a ten-millionth of itself. Beyond the cap rows are dealt at random to blocks of
    equal size, the same way each time, and added up: sums over blocks vary as sums over as many images would. None where
    there are too many figures.
    """
    count = len(sums.numerators)
    kept = blocks(count, sums.numerators.shape[1])
    if not kept:
        return None
    parts = [sums.numerators, sums.denominators]
    if kept < count:
        dealt = torch.randperm(count, generator=generator(0, "sums", count)) % kept
        parts = [part.new_zeros(kept, part.shape[1]).index_add_(0, dealt, part) for part in parts]
    above, below = (part.float().numpy() for part in parts)
    word = sums.word if kept == count else f"blocks of {'clusters' if 'clusters' in sums.word else 'images'}"
    file = io.BytesIO()
    np.savez(file, numerators=above, denominators=below, key=np.array(sums.key), word=np.array(word))
    return file.getvalue()


def unpack(data: bytes) -> Sums:
    """What `pack` made. GeomsslError where it is damaged."""
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            above, below = (torch.from_numpy(held[name]).double() for name in ("numerators", "denominators"))
            return Sums(above, below, str(held["key"]), str(held["word"]))
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise GeomsslError(f"{FILE} is damaged: {error}", "a whole artifact folder", reason="damaged") from None
