"""Equivariance error of the scale backbones by size of filter: `python benchmarks/scale_error.py [-n PICTURES]`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from harness import table
from torch import nn

KERNELS = (7, 11, 15)
HEAD = ["features", "pixels of a filter", "factor", "matched pairs", "error [95 %]", "squared", "feature pixels judged"]


def models() -> Iterator[tuple[str, Callable[[int], nn.Module], int, str]]:
    """A name, the model for a size of filter, the side of the pictures, and which feature pixels are judged."""
    from geomssl import encoders
    from geomssl.encoders.base import Normalise
    from geomssl.encoders.hermite import HermiteConv2d
    from geomssl.encoders.homomorphic import SCALES

    def lifting(kernel: int) -> nn.Module:
        conv = HermiteConv2d(1, 8, kernel, 3, "scale", SCALES, lifting=True, padding=kernel // 2)
        return nn.Sequential(Normalise(), conv)

    def backbone(kernel: int, mixing: str = "none") -> nn.Module:
        return encoders.build("hssl-mnist", 1, group="scale", kernel_size=kernel, widths=(4, 8, 16), size=None, mixing=mixing)

    def strideless(kernel: int) -> nn.Module:
        model = backbone(kernel)
        for conv in model.convs:
            conv.stride = 1
        return model

    yield "one lifting layer, effective size 3", lifting, 65, "crop"
    yield "the three layers of hssl-mnist, no stride", strideless, 97, "crop"
    yield "z of hssl-mnist", backbone, 97, "crop"
    yield "the same, mixing = full", lambda kernel: backbone(kernel, "full"), 97, "crop"
    yield "z of hssl-mnist at its own size", backbone, 29, "none"


@torch.no_grad()
def main() -> None:
    from geomssl.data.rendered import Fields
    from geomssl.encoders.homomorphic import SCALES
    from geomssl.probes.scales import scale_error
    from geomssl.seeding import seeded
    from geomssl.transforms.groups import Scales

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-n", type=int, default=8, help="pictures  [default: 8]")
    parser.add_argument("--bandwidth", type=float, default=0.25, help="of the pictures, cycles per pixel  [default: 0.25]")
    given = parser.parse_args()
    torch.set_num_threads(1)
    scales = Scales(SCALES)
    params = torch.tensor([[1.0], [5.0]])
    rows = []
    for name, make, size, boundary in models():
        for kernel in KERNELS:
            with seeded(0, "scale-error"):
                model = make(kernel)
            pictures = Fields(given.n, 1, size, given.bandwidth, seed=1)
            found = scale_error(model, pictures, scales, params, boundary=boundary)
            for g, index in enumerate(params[:, 0].long().tolist()):
                total, low, high = (float(v[g]) for v in (found.total, *found.interval))
                pairs = [f"{SCALES[i]:g}→{SCALES[j]:g}" for j, i in enumerate(scales.matches()[index].tolist()) if i >= 0]
                rows.append([
                    name, str(kernel), f"{SCALES[index]:g}", ", ".join(pairs), f"{total:.3f} [{low:.3f}, {high:.3f}]",
                    f"{total**2:.4f}", f"{float(found.kept[g]):.0%}",
                ])
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
