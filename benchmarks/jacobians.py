"""Local maps of a projector at 1,000 samples: one pull-back of all rows, a loop over samples, and vmap(jacrev)."""

from __future__ import annotations

import torch
from harness import Row, duel
from torch import Tensor, nn

SAMPLES = 1000
# h, hidden, z: the digits recipe's width, and the paper's 512 to 128
WIDTHS = {"128-128-64": (128, 128, 64), "512-512-128": (512, 512, 128)}


def loop(projector: nn.Module, h: Tensor) -> Tensor:
    """What one writes first: torch.autograd.functional.jacobian, sample by sample."""
    return torch.stack([torch.autograd.functional.jacobian(lambda row: projector(row[None])[0], one) for one in h])


def mapped(projector: nn.Module, h: Tensor) -> Tensor:
    """jacrev of one row, mapped over the rows, in chunks that fit into the cache as well as ours."""
    jacobian = torch.func.vmap(torch.func.jacrev(lambda row: projector(row[None])[0]))
    return torch.cat([jacobian(part) for part in h.split(64)])


def main() -> list[Row]:
    from geomssl.probes.local import local_maps

    rows = []
    for name, (d, width, p) in WIDTHS.items():
        torch.manual_seed(0)
        projector = nn.Sequential(nn.Linear(d, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, p))
        projector = projector.double().eval().requires_grad_(False)
        h = torch.randn(SAMPLES, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        torch.testing.assert_close(local_maps(projector, h[:20]), loop(projector, h[:20]))
        what = f"local maps, {SAMPLES:,} samples, {name}, float64"
        ours = lambda g=projector, x=h: local_maps(g, x)  # noqa: E731
        rows.append(duel(
            what, ours, "a loop of autograd.functional.jacobian", lambda g=projector, x=h: loop(g, x), rounds=3,
            target="≥ 20", warm=0,
        ))
        rows.append(duel(what, ours, "vmap(jacrev) over rows", lambda g=projector, x=h: mapped(g, x), rounds=5, warm=1))
    return rows
