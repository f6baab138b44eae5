"""`digits`: 1,797 scanned handwritten digits of 43 writers, 8x8, 17 grey levels; they come with scikit-learn.

Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (the test part).
"""

from __future__ import annotations

from typing import Literal

import torch

from geomssl.config import Settings
from geomssl.data.base import Presence, Resident, Split
from geomssl.data.splits import stratified


class Digits:
    """Grey images 0..16, scaled to 0..255; split 60/20/20 by class with a fixed seed."""

    class Config(Settings):
        name: Literal["digits"] = "digits"

    @staticmethod
    def load(config: Config, split: Split) -> Resident:
        from sklearn.datasets import load_digits

        found = load_digits()
        labels = torch.from_numpy(found.target).long()
        pixels = torch.from_numpy(found.images).mul(255 / 16).round().to(torch.uint8)[:, None]
        chosen = stratified(labels, seed=0)[split]
        return Resident("digits", split, pixels[chosen], labels[chosen], [str(name) for name in found.target_names])

    @staticmethod
    def presence(root: str | None = None) -> Presence:
        return Presence(True, "1,797", "comes with scikit-learn")
