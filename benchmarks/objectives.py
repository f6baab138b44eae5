"""What the equivariant objectives cost: CIPER's third image, reconstruction's decoder; and how fast `views` is rendered."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from harness import Row, device, duel
from views_data import rate

# a step of ViT-Small takes seconds without a GPU
BATCH = 256 if torch.cuda.is_available() else 16


def main() -> list[Row]:
    return [third_image(), decoder(), rendering()]


def step(objective: dict[str, object], encoder: dict[str, object], size: int) -> Callable[[], None]:
    """One whole training step of that objective on noise: views, forward, loss, backward, optimizer."""
    from geomssl.data.base import Resident
    from geomssl.learner import initialise, make_batch
    from geomssl.recipe import build

    where = device()
    recipe = build([{"encoder": encoder, "objective": objective, "batch_size": BATCH}])
    pixels = torch.randint(0, 256, (256, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = Resident("noise", "train", pixels, torch.arange(256) % 10, [str(i) for i in range(10)]).to(where)
    learner = initialise(recipe, 3, size, 10).to(where).train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-4, momentum=0.9)
    counter = iter(range(10**9))

    def run() -> None:
        batch = make_batch(source, torch.arange(BATCH), learner.objective, where, 0, 0, next(counter))
        losses, classifier_loss, _ = learner(batch)
        (losses.total + classifier_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def third_image(rounds: int = 5) -> Row:
    """CIPER encodes the un-augmented image beside both views. The same policy and projector on both sides."""
    encoder = {"name": "resnet18"}
    shared = {"policy": "ciper", "projector": [256, 256]}
    return duel(
        f"CIPER step, resnet18, batch {BATCH}, 32×32", step({"name": "ciper", **shared}, encoder, 32),
        "SimCLR's step (theirs / ours is 1 / cost)", step({"name": "simclr", **shared}, encoder, 32), rounds=rounds,
        target="≥ 0.645 (cost ≤ 1.55)", warm=1,
    )


def decoder(rounds: int = 5) -> Row:
    """Reconstruction at the paper's sizes against VICReg on the same split of h: the rest is the decoder and its head."""
    encoder = {"name": "vit-small", "patch": 4, "h": "mean"}
    shared = {"half": 256, "projector": [512, 192]}
    return duel(
        f"reconstruction step, ViT-Small, 64 tokens, batch {BATCH}", step({"name": "reconstruction", **shared}, encoder, 32),
        "VICReg's step: all but the decoder", step({"name": "vicreg", "projector": [512, 192]}, encoder, 32), rounds=rounds,
        target="≥ 0.75 (decoder ≤ 25 %)", warm=1,
    )


def rendering(n: int = 256, asked: float = 150, rounds: int = 5) -> Row:
    """`views` at 64x64 beside the time that `asked` images a second would take."""
    speeds = [speed for speed, _ in rate(n, 64, rounds, device())]
    low, middle, high = statistics.quantiles(speeds, n=4)
    return Row(
        f"views rendered, {n} images 64×64", n / middle, n / asked, f"{asked:g} images a second", middle / asked, low / asked,
        high / asked, rounds, "≥ 1",
    )
