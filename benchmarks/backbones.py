"""The H-SSL backbones and their layers against plain convolutions of equal multiply-adds and groups; peers.py has others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Row, device, duel
from torch import Tensor, nn

SIZE, BATCH, FIELDS = 32, 16, 16
NARROW = {"stem": (9, 16), "widths": (16, 32, 64)}
PLACES = {"rotation": 4, "translation": 1, "scale": 6}


@dataclass(frozen=True)
class Memory(Row):
    """The same claim about peak memory, in MiB."""

    def cells(self) -> list[str]:
        spread = f"{self.low:.2f}–{self.high:.2f}"
        return [
            self.what, f"{self.ours:.0f} MiB", self.against, f"{self.peer:.0f} MiB", f"{self.ratio:.2f}", spread,
            str(self.rounds), self.target,
        ]


def main() -> list[Row]:
    from geomssl.encoders.hermite import HermiteConv2d
    from geomssl.encoders.homomorphic import SCALES

    rows, where = [], device()
    for group, mixing, places in (("rotation", "none", 4), ("scale", "none", 6), ("rotation", "full", 4)):
        layer = HermiteConv2d(FIELDS, FIELDS, 7, 3, group, SCALES, padding=3, mixing=mixing).to(where)
        plain = nn.Conv2d(places * FIELDS, places * FIELDS, 7, padding=3, groups=1 if mixing == "full" else places, bias=False)
        # as one layer leaves it to the next: G before C in memory
        x = torch.randn(BATCH, places, FIELDS, SIZE, SIZE, device=where).movedim(1, 2)
        rows.append(duel(
            f"HermiteConv2d, {group}, mixing {mixing}, {FIELDS} fields, 7×7, {SIZE}×{SIZE}, batch {BATCH}", step(layer, x),
            "conv2d of equal multiply-adds and groups", step(plain.to(where), x.movedim(2, 1).flatten(1, 2)), rounds=25,
            target="≥ 0.95",
        ))
    for group in PLACES:
        for batch in (BATCH, 4 * BATCH):
            images = pictures(where, batch)
            rows.append(duel(
                f"hssl-cifar10, {group}, widths {NARROW['widths']}, 25×25, batch {batch}", step(network(group), images),
                "the same of plain conv2d, equal groups", step(network("none", PLACES[group]), images), rounds=15,
                target="≥ 0.95",
            ))
    if where.type == "cpu" and Path("/proc/self/status").is_file():
        rows.append(memory())
    return rows


def network(group: str, places: int = 4) -> nn.Module:
    from geomssl import encoders

    return encoders.build("hssl-cifar10", 3, group=group, fibres=places, **NARROW).to(device())


def pictures(where: torch.device, batch: int = BATCH) -> Tensor:
    return torch.rand(batch, 3, 25, 25, device=where)


def step(layer: Callable[..., Tensor], x: Tensor) -> Callable[[], None]:
    """Forward and backward, to the weights and the input."""
    if isinstance(x, Tensor):
        x = x.detach().requires_grad_(True)
    weights = [p for p in layer.parameters() if p.requires_grad]  # type: ignore[attr-defined]

    def run() -> None:
        y = layer(x)
        y = y if isinstance(y, Tensor) else y.tensor
        torch.autograd.grad(y, [x if isinstance(x, Tensor) else x.tensor, *weights], torch.ones_like(y))

    return run


def memory() -> Row:
    """Peak memory of two steps of the backbone in a process of its own, less that of a process that only imports and draws."""
    found = {kind: [peak(kind) for _ in range(3)] for kind in ("rotation", "none", "nothing")}
    floor = sorted(found["nothing"])[1]
    ours, plain = (sorted(value - floor for value in found[kind]) for kind in ("rotation", "none"))
    ratios = sorted(b / a for a, b in zip(ours, plain, strict=True))
    return Memory(
        f"hssl-cifar10, rotation, peak memory of a step, batch {BATCH}", ours[1], plain[1],
        "the same of plain conv2d, equal groups", ratios[1], ratios[0], ratios[2], 3, "≥ 1",
    )


def peak(kind: str) -> float:
    """MiB of resident memory at most, in a fresh process."""
    told = subprocess.run(
        [sys.executable, __file__, kind, str(torch.get_num_threads())], capture_output=True, text=True, check=True
    )
    return float(told.stdout)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    images = pictures(torch.device("cpu"))
    run = None if sys.argv[1] == "nothing" else step(network(sys.argv[1]), images)
    if run is None:
        network("rotation")
    for _ in range(2):
        _ = run() if run else None
    # not ru_maxrss, which begins with the peak of the process that started this one
    status = Path("/proc/self/status").read_text()
    print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024)
