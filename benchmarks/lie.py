"""Lie derivative of a ResNet-18 on 8 images of 32×32 under a rotation: one forward-mode pass against two backward passes."""

from __future__ import annotations

import torch
from harness import Row, device, duel
from torch import Tensor


def main() -> list[Row]:
    from geomssl import encoders
    from geomssl.encoders.capture import Capture
    from geomssl.probes.generators import generator, push, tangent

    where = device()
    torch.manual_seed(0)
    model = encoders.build("resnet18", in_channels=3).eval().requires_grad_(False).to(where)
    images = torch.rand(8, 3, 32, 32, device=where)
    moving = tangent(images, generator("rotate"))
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    capture = Capture(model, layers)

    def backward(layer: str | None) -> Tensor:
        """J v as the derivative in u of u^T J v: a backward pass, and a backward pass through it."""
        x = images.clone().requires_grad_(True)
        out = model(x) if layer is None else Capture(model, [layer]).one(x)
        u = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, x, u, create_graph=True)
        return torch.autograd.grad(pulled, u, moving)[0]

    def forward() -> Tensor:
        with torch.no_grad():
            return push(lambda x: [model(x)], images, moving)[1][0]

    def all_forward() -> list[Tensor]:
        with torch.no_grad():
            return push(lambda x: list(capture(x)[1].values()), images, moving)[1]

    torch.testing.assert_close(forward(), backward(None), rtol=1e-3, atol=1e-4)
    return [
        duel("Lie derivative of h, ResNet-18, 8×32²", forward, "two backward passes", lambda: backward(None), 7, "≥ 2", 1),
        duel(
            f"of {len(layers)} layers, one pass", all_forward, "two backward passes a layer",
            lambda: [backward(layer) for layer in layers], 3, "≥ 2", 1,
        ),
    ]
