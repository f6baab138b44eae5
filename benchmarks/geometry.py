"""The spectrum of 25,600 features of width 512: ours against one SVD, and against the Gram matrix it must not be."""

from __future__ import annotations

import torch
from harness import Row, duel

IMAGES, WIDTH = 25_600, 512


def main() -> list[Row]:
    from geomssl.probes.spectrum import feature_spectrum

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(IMAGES, WIDTH, generator=generator) @ torch.diag(torch.logspace(0, -6, WIDTH))
    what = f"singular values of {IMAGES:,}×{WIDTH} float32 features, centred, in float64"

    def ours() -> torch.Tensor:
        return feature_spectrum(features)

    def whole() -> torch.Tensor:
        exact = features.double()
        return torch.linalg.svdvals(exact - exact.mean(dim=0))

    def gram() -> torch.Tensor:
        exact = features.double()
        exact = exact - exact.mean(dim=0)
        return torch.linalg.eigvalsh(exact.T @ exact).clamp(min=0).sqrt()

    return [
        duel(what, ours, "torch.linalg.svdvals of the whole in float64", whole, rounds=3, target="≥ 1", warm=1),
        duel(what, ours, "root of the float64 Gram matrix (loses what lies under 1e-8 σ₁)", gram, rounds=3, warm=1),
    ]
