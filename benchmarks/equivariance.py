"""Equivariance of all layers of ResNet-18 under 16 elements: one pass for all, against a loop over layers and elements."""

from __future__ import annotations

import torch
from harness import Row, device, duel
from torch import Tensor, nn

ELEMENTS, IMAGES, SIZE = 16, 8, 16


def main() -> list[Row]:
    from geomssl import encoders
    from geomssl.encoders.capture import matching
    from geomssl.probes.equivariance import equivariance_errors
    from geomssl.transforms import Rotate

    torch.manual_seed(0)
    net = encoders.build("resnet18", in_channels=3, width=16).to(device()).eval().requires_grad_(False)
    x = torch.rand(IMAGES, 3, SIZE, SIZE, device=device())
    params = (torch.arange(1, ELEMENTS + 1) * 20.0).unsqueeze(1)
    layers = [name for name in matching(net, ["all"]) if isinstance(net.get_submodule(name), (nn.Conv2d, nn.BatchNorm2d))]

    def ours() -> None:
        equivariance_errors(net, x, Rotate(), params, "spatial", layers)

    def loop() -> None:
        for layer in layers:
            for row in params:
                _one(net, layer, x, row)

    return [
        duel(
            f"{len(layers)} layers of ResNet-18 (width 16), {ELEMENTS} turns, {IMAGES} images of {SIZE}×{SIZE}, with intervals",
            ours, "a loop: per layer, per element, per batch; total, floor and action size, no intervals", loop,
            rounds=3, target="≥ 5", warm=0,
        )
    ]


@torch.no_grad()
def _one(net: nn.Module, layer: str, x: Tensor, row: Tensor) -> tuple[float, float, float]:
    """What people write: one hook, one element, the whole model for it, and the figures of one layer."""
    from geomssl.transforms import Rotate
    from geomssl.transforms.actions import action

    rotate, found = Rotate(), []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output: found.append(output.clone()))
    above = below = trips = moved = 0.0
    for batch in x.split(256):
        found.clear()
        rows = row.expand(len(batch), 1)
        turned = rotate(batch, rows)
        for images in (batch, turned, rotate(turned, -rows)):
            net(images)
        plain, after, back = found
        declared = action("spatial", rotate)(plain, rows, (SIZE, SIZE))
        above += float((after - declared).double().square().sum())
        below += float((declared - declared.mean(0)).double().square().sum())
        trips += float((back - plain).double().square().sum())
        moved += float((declared - plain).double().square().sum())
    handle.remove()
    return above / below, trips / below, moved / below
