"""A scheduled look of the geometry probes, from weights to artifacts, against the encoder's passes over the views it needs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from harness import Row, device, duel
from torch import Tensor

IMAGES = 256
# a ResNet-18 of a quarter of the width, so that the statistics weigh more than they would behind the whole one
RECIPE = {
    "dataset": {"name": "phantoms", "n": 128, "size": 32, "channels": 3},
    "encoder": {"name": "resnet18", "width": 16},
    "objective": {"name": "simclr", "projector": [32]},
    "epochs": 2,
    "batch_size": 64,
    "probes": {"every": 2, "run": ["rank", "bound", "spectrum", "tangent"]},
}


@contextmanager
def counted(kind: type) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what encoders of that class are passed."""
    shapes: list[tuple[int, ...]] = []
    plain = kind.forward

    def forward(self: object, images: Tensor) -> Tensor:
        shapes.append(tuple(images.shape))
        return plain(self, images)

    kind.forward = forward
    try:
        yield shapes
    finally:
        kind.forward = plain


def main() -> list[Row]:
    from geomssl import training
    from geomssl.commands.scheduled import Scheduled
    from geomssl.data.base import Resident
    from geomssl.recipe import build

    with tempfile.TemporaryDirectory() as folder:
        trainer = training.start(build([RECIPE]), Path(folder) / "run.pt", device())
        # held in memory, as data sets are: rendering is no part of a look
        noise = torch.randint(0, 256, (IMAGES, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        trainer.val = Resident("noise", "val", noise, torch.arange(IMAGES) % 10).to(device())
        encoder = trainer.learner.encoder
        look = Scheduled()
        with counted(type(encoder)) as shapes:
            look(trainer)
        rooms = {shape: torch.rand(shape, device=device()) for shape in shapes}
        images = sum(shape[0] for shape in shapes)

        @torch.no_grad()
        def passes() -> None:
            encoder.eval()
            for shape in shapes:
                encoder(rooms[shape])

        what = f"a scheduled look: rank, bound, spectrum, tangent, with their figures; resnet18 (width 16), {images:,} views"
        return [duel(what, lambda: look(trainer), "the encoder's passes alone", passes, rounds=3, target="≥ 0.77", warm=0)]
