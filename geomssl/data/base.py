"""The contract of data: a Source hands out uint8 images with labels and factors; nothing else sees a file."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from geomssl.data.masks import MaskFiles
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError
from geomssl.transforms.base import Parameter

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class Presence:
    """Whether a data set is on this machine (by a cheap look, not by its hashes), how many images it has, and where it is
    or how to get it."""

    present: bool
    images: str
    where: str


class Source(ABC):
    """One split of one data set.

    name, split:  what it is.
    labels:       int64 (len,) or None; classes: their names.
    factors:      float (len,) tensors by name: what else is known of each image (view angles, session, ...).
    parameters:   unit, kind and range of those factors, as far as they are known; kind "index" is a category.
    channels, size: C and the side of the square images.
    fingerprint:  the first 12 hexadecimal digits of the SHA-256 of all pixels, in order: it changes when the images do.
    notes:        sentences that a reader of a result must know (images that were left out).
    watch:        the files it was read from, or None where it is embedded.
    regions:      names of what `masks` tells apart, () where there are no masks.
    mask_files:   where the masks lie, for a set on disk that has them.
    """

    name: str
    split: Split
    labels: Tensor | None
    classes: Sequence[str]
    factors: Mapping[str, Tensor]
    parameters: tuple[Parameter, ...] = ()
    channels: int
    size: int
    fingerprint: str
    notes: tuple[str, ...] = ()
    watch: Watch | None = None
    regions: Sequence[str] = ()
    mask_files: MaskFiles | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """uint8 (n, C, size, size) on the source's device."""

    def masks(self, indices: Tensor) -> Tensor:
        """int64 (n, size, size) on the CPU: the region at every pixel of those images, -1 where it has no name.

        Cropped and resized as the images are. Raises GeomsslError (reason "no-masks") where the set has none.
        """
        if self.mask_files is None:
            given = f"masks of {self.name}, which has none"
            raise GeomsslError(given, "a data set with masks, such as views", reason="no-masks")
        return self.mask_files.read(indices)

    def to(self, device: torch.device | str) -> Source:
        """The same source, handing out images on `device`."""
        return self

    def prefetch(self, indices: Tensor) -> None:  # noqa: B027
        """Say which images will be asked for next, so that a source on disk can fetch them meanwhile. Never needed."""

    def check(self) -> None:
        """Raise GeomsslError (reason "changed-data") that names a file behind this source which is not as it was read.

        One stat a file; nothing is read again. For the start of an epoch.
        """
        if self.watch is not None:
            self.watch.check()


class Resident(Source):
    """A Source that keeps all its images in memory, on one device."""

    def __init__(
        self,
        name: str,
        split: Split,
        pixels: Tensor,
        labels: Tensor | None,
        classes: Sequence[str] = (),
        factors: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        if pixels.dtype != torch.uint8 or pixels.dim() != 4 or pixels.shape[2] != pixels.shape[3]:
            raise GeomsslError(f"images of {name}: {pixels.dtype} {tuple(pixels.shape)}", "uint8 (n, C, size, size)")
        if labels is not None and len(labels) != len(pixels):
            raise GeomsslError(f"{len(labels)} labels for {len(pixels)} images of {name}", "one label an image")
        self.name, self.split = name, split
        self.pixels = pixels
        self.labels = None if labels is None else labels.long()
        self.classes = tuple(classes)
        self.factors = dict(factors or {})
        self.channels, self.size = pixels.shape[1], pixels.shape[2]
        self.watch, self.notes = watch, tuple(notes)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        return hashlib.sha256(self.pixels.cpu().numpy().tobytes()).hexdigest()[:12]

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor) -> Tensor:
        return self.pixels.index_select(0, indices.to(self.pixels.device))

    def some(self, indices: Tensor) -> Resident:
        """The same source with those images alone, in that order."""
        labels = None if self.labels is None else self.labels[indices]
        factors = {name: values[indices] for name, values in self.factors.items()}
        found = Resident(self.name, self.split, self.pixels[indices], labels, self.classes, factors, self.watch, self.notes)
        found.parameters, found.regions = self.parameters, self.regions
        found.mask_files = None if self.mask_files is None else self.mask_files.some(indices)
        return found

    def to(self, device: torch.device | str) -> Resident:
        moved = copy.copy(self)
        moved.pixels = self.pixels.to(device)
        return moved


def to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 images as floats in [0, 1]."""
    return pixels.to(dtype) / 255
