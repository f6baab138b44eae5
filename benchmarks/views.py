"""SimCLR views of a batch: ours against kornia's pipeline of the same policy and torchvision's, one image at a time."""

from __future__ import annotations

import torch
from harness import Row, device, duel

BATCH, SIZE = 512, 32


def main() -> list[Row]:
    import torchvision.transforms as T
    from kornia.augmentation import (
        AugmentationSequential,
        ColorJitter,
        RandomGrayscale,
        RandomHorizontalFlip,
        RandomResizedCrop,
    )
    from PIL import Image

    from geomssl.data.base import to_unit
    from geomssl.transforms import policy

    where = device()
    generator = torch.Generator().manual_seed(0)
    # smooth pictures, so that colours are not all saturated noise
    coarse = torch.rand(BATCH, 3, 8, 8, generator=generator)
    pixels = (torch.nn.functional.interpolate(coarse, SIZE, mode="bicubic").clamp(0, 1) * 255).to(torch.uint8).to(where)
    ours_policy = policy("simclr")

    def ours() -> torch.Tensor:
        params = ours_policy.sample(BATCH, generator, (SIZE, SIZE)).to(where)
        return ours_policy(to_unit(pixels), params)

    kornia = AugmentationSequential(
        RandomResizedCrop((SIZE, SIZE), scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)), RandomHorizontalFlip(p=0.5),
        ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), RandomGrayscale(p=0.2), data_keys=["input"],
    )
    single = T.Compose([
        T.RandomResizedCrop(SIZE, scale=(0.08, 1.0)), T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8), T.RandomGrayscale(0.2), T.ToTensor(),
    ])
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels.cpu()]
    title = f"SimCLR views, {BATCH} images {SIZE}×{SIZE}"
    return [
        duel(title, ours, "kornia", lambda: kornia(to_unit(pixels)), rounds=25, target="≥ 2"),
        duel(title, ours, "torchvision on PIL, image by image", lambda: torch.stack([single(p) for p in pictures]), rounds=7,
             target="≥ 8"),
    ]
