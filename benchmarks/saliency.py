"""FullGrad of a ResNet-18 on 8 images of 224×224: ours against pytorch-grad-cam's."""

from __future__ import annotations

import copy

import torch
from harness import Row, device, duel


def main() -> list[Row]:
    from pytorch_grad_cam import FullGrad
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchvision.models import resnet18

    from geomssl.probes.fullgrad import fullgrad

    where = device()
    torch.manual_seed(0)
    model = resnet18(weights=None).eval().to(where)
    for module in model.modules():
        # as after training: every BatchNorm has a bias of its own
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, std=0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    images = torch.rand(8, 3, 224, 224, device=where)
    targets = torch.arange(8, device=where)
    peer = FullGrad(copy.deepcopy(model), [])
    wanted = [ClassifierOutputTarget(int(t)) for t in targets]
    row = duel(
        "FullGrad, ResNet-18, 8×224²", lambda: fullgrad(model, images, targets), "pytorch-grad-cam FullGrad",
        lambda: peer(images, wanted), rounds=5, target="≥ 4", warm=1,
    )

    def pass_() -> None:
        x = images.clone().requires_grad_(True)
        torch.autograd.grad(model(x).gather(1, targets[:, None]).sum(), x)

    bare = duel(
        "FullGrad, ResNet-18, 8×224²", lambda: fullgrad(model, images, targets), "one forward and backward pass", pass_,
        rounds=5, warm=1,
    )
    return [row, bare]
