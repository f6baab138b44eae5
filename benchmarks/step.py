"""A training step: which share of its time is the encoder's forward and backward pass."""

from __future__ import annotations

import torch
from harness import Row, device, duel

BATCH = 128


def main() -> list[Row]:
    from geomssl.data.base import Resident
    from geomssl.objectives.base import joint
    from geomssl.recipe import build
    from geomssl.training import initialise, make_batch

    where = device()
    recipe = build([{"encoder": {"name": "resnet18"}, "objective": {"name": "simclr"}, "batch_size": BATCH}])
    pixels = torch.randint(0, 256, (512, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = Resident("noise", "train", pixels, torch.arange(512) % 10, [str(i) for i in range(10)]).to(where)
    learner = initialise(recipe, 3, 32, 10).to(where).train()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3, momentum=0.9)
    indices = torch.arange(BATCH)
    counter = iter(range(10**9))
    views = [v.images for v in make_batch(source, indices, learner.objective, where, 0, 0, 0).views.values()]
    cotangent = torch.randn_like(torch.cat(joint(learner.encoder, *views)))

    def whole() -> None:
        batch = make_batch(source, indices, learner.objective, where, 0, 0, next(counter))
        losses, classifier_loss, _ = learner(batch)
        (losses.total + classifier_loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def encoder_only() -> None:
        torch.cat(joint(learner.encoder, *views)).backward(cotangent)
        learner.zero_grad(set_to_none=True)

    return [duel(
        f"SimCLR step, resnet18, batch {BATCH}, 32×32", whole, "the encoder's forward and backward alone", encoder_only,
        rounds=5, target="≥ 0.9", warm=1,
    )]
