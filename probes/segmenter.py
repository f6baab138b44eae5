"""Train a decoder from an encoder's map to a region for every pixel, the encoder frozen or trained along with it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.data.base import Source
from geomssl.errors import GeomsslError
from geomssl.probes.decoders import DECODERS, Standardised, places
from geomssl.probes.subject import Subject
from geomssl.progress import track
from geomssl.seeding import generator, seeded

# Images by which features are standardised, and the share of the decoder's rate at which an encoder learns along.
SAMPLE, SLOWER, DECAY = 64, 0.1, 1e-4


@dataclass(frozen=True)
class Schedule:
    """steps of `images` pictures; rate: of AdamW, falling to 0 by a cosine; frozen: whether the encoder stays as it is."""

    steps: int
    images: int
    rate: float
    frozen: bool
    decoder: str
    seed: int


class Segmenter(nn.Module):
    """Images (N, C, size, size) to logits (N, K, size, size): encoder, standardisation, decoder. The encoder is in eval mode
    throughout, so that the statistics of its norms stay those of its training."""

    def __init__(self, encoder: nn.Module, standard: Standardised, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.standard, self.decoder = encoder, standard, decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(places(self.encoder.fibres(images)), images)  # type: ignore[operator]

    def decode(self, found: Tensor, images: Tensor) -> Tensor:
        return self.decoder(self.standard(found), images)


def fit(subject: Subject, rows: Tensor, regions: int, how: Schedule) -> Segmenter:
    """A segmenter trained on those images of the training split; the subject's own encoder is not changed.

        minimise  mean over named pixels of cross_entropy(logits, region)

    AdamW, batches drawn with replacement, the last step counts. Frozen: the encoder gives features without a graph, once for
    each image where the training sees them more often than that. Else a copy of it learns along, at a tenth of the rate.
    Deterministic by seed on one device. Raises GeomsslError where a loss is not finite.
    """
    source = subject.train
    assert source is not None
    encoder = subject.encoder if how.frozen else copy.deepcopy(subject.encoder).requires_grad_(True).eval()
    with torch.no_grad():
        sample = torch.cat([places(encoder.fibres(images)).cpu() for _, images in subject.batches(
            rows[:SAMPLE], "features of a sample", "train")])
    with seeded(how.seed, "segment-initialise"):
        grid = (sample.shape[2], sample.shape[3])
        decoder = DECODERS[how.decoder](sample.shape[1], grid, regions, source.channels, source.size)
    model = Segmenter(encoder, Standardised(sample), decoder).to(subject.device, subject.dtype)
    known = None
    if how.frozen and how.steps * how.images > len(rows):
        known = subject.features(rows, "fibres", "train")
    groups = [{"params": list(decoder.parameters()), "lr": how.rate}]
    if not how.frozen:
        groups.append({"params": list(encoder.parameters()), "lr": SLOWER * how.rate})
    optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
    peaks = [group["lr"] for group in optimizer.param_groups]
    masks, draw = Masks(source, rows, subject.memory), generator(how.seed, "segment-batches")
    losses = []
    with torch.enable_grad():
        for step in track(range(how.steps), "train decoder", how.steps):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * (1 + math.cos(math.pi * step / how.steps)) / 2
            chosen = torch.randint(len(rows), (min(how.images, len(rows)),), generator=draw)
            images = subject.images(rows[chosen], "train")
            if known is not None:
                logits = model.decode(places(known[chosen].to(images)), images)
            elif how.frozen:
                with torch.no_grad():
                    found = places(encoder.fibres(images))
                logits = model.decode(found, images)
            else:
                logits = model(images)
            true = masks[chosen].to(subject.device)
            # a sum over named pixels: the mean of none is no number
            loss = F.cross_entropy(logits, true, ignore_index=-1, reduction="sum") / (true >= 0).sum().clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    if losses and not bool(torch.stack(losses).isfinite().all()):
        expected = "a smaller --rate, or features that are finite"
        raise GeomsslError("a decoder whose loss is not finite", expected, reason="diverged")
    return model.requires_grad_(False)


@torch.no_grad()
def predictions(subject: Subject, model: Segmenter, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, regions int64 (n, size, size)) of the measured split, batch by batch, on the CPU."""
    for chunk, images in subject.batches(rows, "segment"):
        yield chunk, model(images).argmax(dim=1).cpu()


class Masks:
    """The masks of some images: kept as int16 where they fit into that much memory, else read when they are asked for."""

    def __init__(self, source: Source, rows: Tensor, memory: int) -> None:
        self.source, self.rows = source, rows
        fits = 2 * len(rows) * source.size**2 <= memory
        self.kept = torch.cat([source.masks(chunk).short() for chunk in rows.split(256)]) if fits else None

    def __getitem__(self, chosen: Tensor) -> Tensor:
        return self.source.masks(self.rows[chosen]) if self.kept is None else self.kept[chosen].long()
