"""Sources made of others: a part of one, and one brought to another size and number of channels."""

from __future__ import annotations

import copy
import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.data.base import Source
from geomssl.errors import GeomsslError
from geomssl.seeding import generator

# ITU-R 601, as Pillow's convert("L")
LUMA = (0.299, 0.587, 0.114)


class Derived(Source):
    """What is the same as in the source behind it."""

    def __init__(self, whole: Source, told: bytes) -> None:
        self.whole = whole
        self.name, self.split, self.classes = whole.name, whole.split, whole.classes
        self.labels, self.factors, self.parameters = whole.labels, whole.factors, whole.parameters
        self.channels, self.size = whole.channels, whole.size
        self.notes, self.watch, self.regions = whole.notes, whole.watch, whole.regions
        self.fingerprint = hashlib.sha256(whole.fingerprint.encode() + told).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.whole)

    def to(self, device: torch.device | str) -> Derived:
        moved = copy.copy(self)
        moved.whole = self.whole.to(device)
        return moved

    def check(self) -> None:
        self.whole.check()


class Part(Derived):
    """Some images of a source, in the order of `rows`, distinct indices (n,) into it. No other image is ever asked for."""

    def __init__(self, whole: Source, rows: Tensor) -> None:
        super().__init__(whole, rows.numpy().tobytes())
        self.rows = rows
        self.labels = None if whole.labels is None else whole.labels[rows]
        self.factors = {name: values[rows] for name, values in whole.factors.items()}

    def __len__(self) -> int:
        return len(self.rows)

    def images(self, indices: Tensor) -> Tensor:
        return self.whole.images(self.rows[indices.cpu()])

    def masks(self, indices: Tensor) -> Tensor:
        return self.whole.masks(self.rows[indices.cpu()])

    def prefetch(self, indices: Tensor) -> None:
        self.whole.prefetch(self.rows[indices.cpu()])


def share(source: Source, part: float, seed: int) -> Source:
    """A drawn share of a source: of every class the first round(part n) images, at least one, of an order drawn by the seed.

    Smaller shares lie in larger ones. part 1 is the source itself. Raises GeomsslError unless 0 < part <= 1.
    """
    if not 0 < part <= 1:
        raise GeomsslError(f"a share of {part} of {source.name}", "above 0 and at most 1", reason="bad-value")
    if part == 1:
        return source
    labels = torch.zeros(len(source), dtype=torch.long) if source.labels is None else source.labels.cpu()
    kept = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator(seed, "share", int(label)))
        kept.append(members[order[: max(1, round(part * len(members)))]])
    return Part(source, torch.cat(kept).sort().values)


class Fitted(Derived):
    """A source brought to another side and number of channels, for an encoder that was made for those.

    Side: bilinear, each pixel of a smaller image averaging what it covers (antialias). Channels: grey is repeated; colour to
    grey by 0.299 R + 0.587 G + 0.114 B. Rounded to uint8. Masks keep the nearest pixel.
    """

    def __init__(self, whole: Source, channels: int, size: int) -> None:
        super().__init__(whole, f"/{channels}/{size}".encode())
        if whole.channels != channels and (whole.channels, channels) not in ((1, 3), (3, 1)):
            raise GeomsslError(
                f"{whole.name} has {whole.channels} channels, and the encoder takes {channels}", "grey or colour images",
                reason="bad-shape",
            )
        self.channels, self.size = channels, size

    def images(self, indices: Tensor) -> Tensor:
        found = self.whole.images(indices)
        if found.shape[1] == self.channels and found.shape[2] == self.size:
            return found
        values = found.float()
        if found.shape[1] > self.channels:
            values = torch.einsum("nchw,c->nhw", values, values.new_tensor(LUMA))[:, None]
        if found.shape[2] != self.size:
            values = F.interpolate(values, (self.size,) * 2, mode="bilinear", antialias=True)
        return values.round().clamp(0, 255).byte().expand(-1, self.channels, -1, -1)

    def masks(self, indices: Tensor) -> Tensor:
        found = self.whole.masks(indices)
        if found.shape[1] == self.size:
            return found
        return F.interpolate(found[:, None].double(), (self.size,) * 2, mode="nearest-exact")[:, 0].long()

    def prefetch(self, indices: Tensor) -> None:
        self.whole.prefetch(indices)


def fitted(source: Source, channels: int, size: int) -> Source:
    """The source at that number of channels and that side; itself where it has them."""
    return source if (source.channels, source.size) == (channels, size) else Fitted(source, channels, size)
