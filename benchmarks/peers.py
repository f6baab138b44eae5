"""Our C4 layers and a C4 network against those of e2cnn and escnn of equal width: a step, construction, peak memory."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from backbones import Memory, step
from harness import Row, device, duel
from torch import Tensor, nn

LIBRARIES = ("e2cnn", "escnn")
FIELDS, SIZE, BATCH = 16, 32, 32
# fields of the network's stages, at four orientations each
WIDTHS = (16, 32, 64)
# the network whose construction is timed: the same stages, wider
WIDE = (32, 64, 128)


def main() -> list[Row]:
    rows, where = [], device()
    for name in LIBRARIES:
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: its rows are left out (make bench-peers)", file=sys.stderr)
            continue
        # what a library builds once for a process (its tables) is built before any clock starts
        theirs(name, (4, 4))
        x = torch.randn(BATCH, 4 * FIELDS, SIZE, SIZE, device=where)
        lifted = x.unflatten(1, (FIELDS, 4))
        rows.append(duel(
            f"C4 convolution, {FIELDS} fields, 3×3, {SIZE}×{SIZE}, batch {BATCH}: forward and backward",
            step(ours_layer().to(where), lifted), f"{name} R2Conv", step(*their_layer(name, x)), rounds=41, target="≥ 1",
        ))
        pictures = torch.rand(BATCH, 3, SIZE, SIZE, device=where)
        rows.append(duel(
            f"C4 network of {len(WIDTHS)} stages, fields {WIDTHS}, {SIZE}×{SIZE}, batch {BATCH}: forward and backward",
            step(ours(WIDTHS).to(where), pictures), f"the same in {name}", step(theirs(name, WIDTHS).to(where), pictures),
            rounds=15, target="≥ 1",
        ))
        rows.append(duel(
            f"construction of the network, fields {WIDE}", lambda: ours(WIDE), name, lambda name=name: theirs(name, WIDE),
            rounds=5, target="≥ 10", warm=1,
        ))
        if where.type == "cpu" and Path("/proc/self/status").is_file():
            rows.append(memory(name))
    return rows


def ours_layer() -> nn.Module:
    from geomssl.encoders import GroupConv2d
    from geomssl.transforms import CyclicRotations

    return GroupConv2d(FIELDS, FIELDS, 3, CyclicRotations(4), padding=1, bias=False)


def ours(widths: tuple[int, ...]) -> nn.Module:
    """Lifting, then group convolutions, each with BatchNorm over the orientations and a ReLU; fibres at full size."""
    from geomssl.encoders import GroupConv2d
    from geomssl.transforms import CyclicRotations

    layers: list[nn.Module] = []
    for stage, (before, after) in enumerate(pairwise((3, *widths))):
        conv = GroupConv2d(before, after, 3, CyclicRotations(4), lifting=stage == 0, padding=1, bias=False)
        layers += [conv, nn.BatchNorm3d(after), nn.ReLU()]
    return nn.Sequential(*layers)


def their_layer(name: str, x: Tensor) -> tuple[nn.Module, Any]:
    """A C4 convolution between regular fields, and an input of its type."""
    library, space = _library(name)
    kind = library.FieldType(space, FIELDS * [space.regular_repr])
    layer = library.R2Conv(kind, kind, kernel_size=3, padding=1, bias=False).to(x.device)
    return layer, library.GeometricTensor(x.clone().requires_grad_(True), kind)


def theirs(name: str, widths: tuple[int, ...]) -> nn.Module:
    """The same network: trivial fields to regular ones, InnerBatchNorm, ReLU; from plain tensors to plain tensors."""
    library, space = _library(name)
    kinds = [library.FieldType(space, 3 * [space.trivial_repr])]
    kinds += [library.FieldType(space, width * [space.regular_repr]) for width in widths]
    layers: list[nn.Module] = []
    for before, after in pairwise(kinds):
        conv = library.R2Conv(before, after, kernel_size=3, padding=1, bias=False)
        layers += [conv, library.InnerBatchNorm(after), library.ReLU(after)]
    return Plain(library.SequentialModule(*layers), lambda images: library.GeometricTensor(images, kinds[0]))


class Plain(nn.Module):
    def __init__(self, body: nn.Module, typed: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.typed = body, typed

    def forward(self, images: Tensor) -> Tensor:
        return self.body(self.typed(images)).tensor


def _library(name: str) -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gspaces, library = importlib.import_module(f"{name}.gspaces"), importlib.import_module(f"{name}.nn")
    warnings.filterwarnings("ignore", module=name)
    return library, (gspaces.Rot2dOnR2(4) if name == "e2cnn" else gspaces.rot2dOnR2(4))


def memory(name: str) -> Row:
    """Peak memory of two steps of the network, each in a process of its own that has built both networks.

    The kernel's high-water mark of resident memory is set back before the first step, so that imports and construction
    stand under both alike and are taken off. glibc gives freed memory back at once in both, so that the figure is what was
    in use, not what was kept for later.
    """
    mine, their = (sorted(peak(kind, name) for _ in range(3)) for kind in ("ours", "theirs"))
    ratios = sorted(b / a for a, b in zip(mine, their, strict=True))
    return Memory(
        f"C4 network, fields {WIDTHS}, peak memory of a step, batch {BATCH}", mine[1], their[1], f"the same in {name}",
        ratios[1], ratios[0], ratios[2], 3, "≥ 1",
    )


def peak(kind: str, name: str) -> float:
    """MiB of resident memory that two steps add at most, in a fresh process."""
    told = subprocess.run(
        [sys.executable, __file__, kind, name, str(torch.get_num_threads())], capture_output=True, text=True, check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    return float(told.stdout)


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    images = torch.rand(BATCH, 3, SIZE, SIZE)
    networks = {"ours": ours(WIDTHS), "theirs": theirs(sys.argv[2], WIDTHS)}
    run = step(networks[sys.argv[1]], images)
    # 5: set the high-water mark back to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    start = _status("VmRSS")
    for _ in range(2):
        run()
    print(_status("VmHWM") - start)
