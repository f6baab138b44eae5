"""Subject: what a probe looks at. Encoder, projector and data, with features computed once and cached."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from geomssl.config import Settings
from geomssl.data.base import Source, to_unit
from geomssl.errors import GeomsslError
from geomssl.progress import track
from geomssl.seeding import generator
from geomssl.transforms.base import Transform

Layer = Literal["pixels", "fibres", "h", "z"]
Part = Literal["own", "train"]


class Options(Settings):
    """What every probe can be told; a probe's own Options adds to it. They are the identity of its artifact."""

    n: int | None = Field(None, description="images to use  [default: all of the split]")
    seed: int = Field(0, ge=0, description="seed of every draw of this probe")


@dataclass
class Subject:
    """An encoder in eval mode with frozen parameters, its projector, and the split of the data on which it is measured.

    encoder:   geomssl.encoders.base.Encoder (encoders.wrap makes one of any module).
    projector: module from h (N, D) to z (N, p), or None.
    source:    the split that is measured.  train: the training split, for classifiers and neighbours, or None.
    projector_note: what a reader must know of the projector (it was trained on something else than h), or None.
    policy:    the transform that drew the training views, or None where unknown.
    untrained: makes the same encoder at its random initialisation, or None where that is unknown.
    trained:   what is known of the training that a probe may take as its default: batch_size, beta, denominator.
    objective: the run's objective with its heads, or None where there was no run.
    """

    encoder: Any
    source: Source
    projector: nn.Module | None = None
    projector_note: str | None = None
    train: Source | None = None
    policy: Transform | None = None
    untrained: Callable[[], Any] | None = None
    trained: dict[str, Any] = field(default_factory=dict)
    objective: nn.Module | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    batch_size: int = 256
    memory: int = 2**31
    provenance: dict[str, Any] = field(default_factory=dict)
    _cache: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, repr=False)
    _spill: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for module in (self.encoder, self.projector):
            if module is not None:
                module.to(self.device, self.dtype).eval().requires_grad_(False)

    @property
    def channels(self) -> int:
        """Channels of pictures for the encoder: those that it takes, or the split's where it does not say."""
        return int(getattr(self.encoder, "in_channels", self.source.channels))

    def need(self, n: int, what: str, part: Part = "own") -> None:
        """Raise unless the split has at least n images."""
        have = len(self._source(part))
        if have < n:
            raise GeomsslError(
                f"{have} images in {self._source(part).name}/{self._source(part).split}", f"at least {n} for {what}",
                reason="too-few-images",
            )

    def need_projector(self, what: str) -> nn.Module:
        if self.projector is None:
            raise GeomsslError(f"{what} without a projector", "a model with one (--projector LAYER)", reason="no-projector")
        return self.projector

    def projector_remarks(self) -> list[str]:
        """Sentences for the notes of a probe that feeds h to the projector."""
        return [self.projector_note] if self.projector is not None and self.projector_note else []

    def training_policy(self, notes: list[str]) -> Transform:
        """The transform that drew the training views; the policy simclr, and a note, where that is unknown."""
        if self.policy is not None:
            return self.policy
        from geomssl.transforms import policy

        notes.append("The augmentation of the training is not known: the views are drawn by the policy simclr.")
        return policy("simclr")

    def need_labels(self, what: str, part: Part = "own") -> Tensor:
        labels = self._source(part).labels
        if labels is None:
            raise GeomsslError(f"{what} on {self.source.name}, which has no labels", "a labelled data set", reason="no-labels")
        return labels

    def class_names(self, labels: Tensor) -> list[str]:
        """The names of those labels; a label without a name is its number."""
        names = self.source.classes
        return [str(names[label]) if label < len(names) else str(label) for label in labels.tolist()]

    def choose(self, options: Options, part: Part = "own", least: int = 2) -> Tensor:
        """Sorted indices of the images to use: all of the split, or a seeded draw of options.n of them, `least` or more."""
        total = len(self._source(part))
        if options.n is None or options.n >= total:
            return torch.arange(total)
        if options.n < least:
            raise GeomsslError(f"--n {options.n}", f"at least {least} images", reason="too-few-images")
        return torch.randperm(total, generator=generator(options.seed, f"choose-{part}"))[: options.n].sort().values

    def images(self, indices: Tensor, part: Part = "own") -> Tensor:
        """Images (n, C, H, W) in [0, 1], in the subject's dtype, on its device."""
        return to_unit(self._source(part).images(indices).to(self.device), self.dtype)

    def batches(self, indices: Tensor, what: str, part: Part = "own") -> Iterator[tuple[Tensor, Tensor]]:
        """(indices, images) batch by batch, with a progress bar."""
        for chunk in track(indices.split(self.batch_size), what, total=-(-len(indices) // self.batch_size)):
            yield chunk, self.images(chunk, part)

    def features(
        self, indices: Tensor, layer: Layer = "h", part: Part = "own", view: tuple[Transform, int, int] | None = None
    ) -> Tensor:
        """Features of those images on the CPU: "pixels" (n, CHW), "fibres" (n, C, G, H, W), "h" (n, D) or "z" (n, p).

        view: None for plain images, or (policy, seed, number): view `number` of each image, its parameters drawn for the
        whole set at once, so that they do not depend on the batch size. Computed once; kept on disk beyond `memory` bytes.
        """
        key = (layer, part, view, tuple(indices.tolist()))
        if key not in self._cache:
            self._cache[key] = self._run(indices, layer, part, view)
        return self._cache[key]

    def view_params(self, indices: Tensor, part: Part, view: tuple[Transform, int, int]) -> Tensor:
        """The parameters (n, P) of that view of those images."""
        policy, seed, number = view
        return policy.sample(len(indices), generator(seed, f"view-{part}", number), (self._source(part).size,) * 2)

    @torch.no_grad()
    def _run(self, indices: Tensor, layer: Layer, part: Part, view: tuple[Transform, int, int] | None) -> Tensor:
        if layer == "z":
            h = self.features(indices, "h", part, view)
            return torch.cat([self._projected(chunk).cpu() for chunk in h.split(self.batch_size)])
        params = None
        if view is not None:
            params = self.view_params(indices, part, view)
        found, out = 0, None
        for chunk, images in self.batches(indices, f"features {layer}", part):
            if params is not None:
                images = view[0](images, params[found : found + len(chunk)].to(self.device))  # type: ignore[index]
            if layer == "pixels":
                values = images.flatten(1)
            else:
                values = self.encoder.fibres(images) if layer == "fibres" else self.encoder(images)
            if out is None:
                out = self._empty((len(indices), *values.shape[1:]), values.dtype)
            out[found : found + len(values)] = values.cpu()
            found += len(values)
        if out is None:
            raise GeomsslError("no images", "at least one image", reason="too-few-images")
        return out

    def _projected(self, h: Tensor) -> Tensor:
        """z (n, p) of h (n, D); GeomsslError for a projector that takes no such h, or gives no such z."""
        projector, expected = self.need_projector("features z"), f"a projector from h (n, {h.shape[-1]}) to z (n, p)"
        try:
            z = projector(h.to(self.device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise GeomsslError(
                f"a projector that cannot take h of shape {tuple(h.shape)}: {str(error).splitlines()[0]}", expected,
                reason="bad-shape",
            ) from error
        if not isinstance(z, Tensor) or z.dim() != 2 or len(z) != len(h):
            given = f"of shape {tuple(z.shape)}" if isinstance(z, Tensor) else f"of type {type(z).__name__}"
            raise GeomsslError(f"projector outputs {given} for {len(h)} images", expected, reason="bad-shape")
        return z

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room for features: in memory, or in a temporary file where that would pass the limit."""
        wanted = int(np.prod(shape)) * torch.empty((), dtype=dtype).element_size()
        if wanted + sum(t.numel() * t.element_size() for t in self._cache.values()) <= self.memory:
            return torch.empty(shape, dtype=dtype)
        if self._spill is None:
            self._spill = Path(tempfile.mkdtemp(prefix="geomssl-"))
            weakref.finalize(self, shutil.rmtree, self._spill, True)
        path = self._spill / f"{len(self._cache)}.bin"
        try:
            # room is taken now: a mapped file that finds the disk full later kills the process without a word
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, wanted)
        except OSError as error:
            raise GeomsslError(
                f"cannot write {wanted / 2**30:.2g} GB of features to {path}: {error.strerror}",
                "room in the temporary folder (TMPDIR), or a larger --memory", reason="unwritable",
            ) from None
        return torch.from_file(str(path), shared=True, size=int(np.prod(shape)), dtype=dtype).view(shape)

    def random_twin(self) -> Subject | None:
        """The same subject with the encoder at its random initialisation (no projector), or None where that is unknown."""
        if self.untrained is None:
            return None
        if not hasattr(self, "_twin"):
            self._twin = Subject(
                self.untrained(), self.source, train=self.train, device=self.device, dtype=self.dtype,
                batch_size=self.batch_size, memory=self.memory, provenance=self.provenance,
            )
        return self._twin

    def _source(self, part: Part) -> Source:
        if part == "own":
            return self.source
        if self.train is None:
            raise GeomsslError(f"no training split of {self.source.name}", "a data set with one", reason="no-split")
        return self.train
