"""The measurement behind `lie`: |L f|^2 of every generator, layer and image, from one forward-mode pass a generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes.generators import RADIUS, Difference, Generator, flow, pushed
from geomssl.probes.layers import Layer, Reader
from geomssl.transforms.base import Size

Declared = Literal["auto", "spatial", "trivial"]
Edge = Literal["interior", "crop"]
# Features with less variance than this share of their squared norm are degenerate.
DEGENERATE = 1e-6


def declared_flow(
    features: Tensor, layer: Layer, chosen: Generator, group: Any, image_size: Size, action: Declared,
    difference: Difference,
) -> tuple[Tensor | None, str]:
    """d/dt Γ f(x) of one layer's features, places last, and the name of Γ; None and the reason where none is declared."""
    if action == "trivial" or not chosen.moves or not layer.maps or layer.size == (1, 1):
        return torch.zeros_like(features), "trivial"
    oriented = len(layer.shape) == 4 and group is not None and group.fibre > 1 and layer.shape[1] == group.fibre
    if oriented and chosen.name in ("rotate", "shear"):
        return None, f"{group.name} declares no action of a small turn or shear on its orientations"
    assert layer.geometry is not None
    return flow(features, chosen, layer.geometry, image_size, difference), "spatial"


def judged(layer: Layer, image_size: Size, boundary: Edge) -> Tensor | None:
    """bool (h, w): the feature pixels that are judged; None for vectors.

    interior: away from the edge by the stencil, or by a quarter of a small map. crop: besides, those whose receptive
    field stays on the image. GeomsslError where none is left, or where the field is not known.
    """
    if not layer.maps:
        return None
    kept = torch.ones(layer.size, dtype=torch.bool)
    for axis, length in enumerate(layer.size):
        margin = min(RADIUS, (length - 1) // 4)
        first, last = margin, length - 1 - margin
        if boundary == "crop":
            assert layer.geometry is not None
            if layer.geometry.source != "layers" or not math.isfinite(layer.geometry.reach[axis]):
                raise GeomsslError(
                    f"--boundary crop at {layer.name}, whose receptive field is the whole image or unknown",
                    "--boundary interior, or an earlier layer", reason="no-field",
                )
            clean = layer.geometry.clean(length, image_size[axis], axis)
            first, last = max(first, clean[0]), min(last, clean[1])
        if first > last:
            raise GeomsslError(
                f"--boundary crop at {layer.name}: no feature pixel sees the image alone", "--boundary interior, an earlier "
                "layer, or larger images", reason="no-field",
            )
        inside = (torch.arange(length) >= first) & (torch.arange(length) <= last)
        kept &= inside.view(-1, 1) if axis == 0 else inside
    return kept


@dataclass(frozen=True)
class Found:
    """Sums of one generator at one layer, image by image, (n,) float64: |L f|^2, |J T x|^2, |dΓ f|^2, and the spread."""

    generator: Generator
    layer: Layer
    action: str
    error: Tensor
    moved: Tensor
    asked: Tensor
    spread: Tensor
    square: Tensor

    @property
    def degenerate(self) -> bool:
        return not float(self.spread.sum()) >= DEGENERATE * float(self.square.sum())


@dataclass
class Task:
    """batches: (x, tangents per generator) of each slice of the images, as often as asked."""

    reader: Reader
    module: nn.Module
    group: Any
    batches: Callable[[Sequence[Generator]], Any]
    generators: Sequence[Generator]
    n: int
    image_size: Size
    action: Declared
    difference: Difference
    boundary: Edge


@torch.no_grad()
def measure(task: Task) -> tuple[list[Found], list[str]]:
    """|L f|^2 of every generator, layer and image: one plain pass for the means, then one forward-mode pass a generator."""
    layers = task.reader.layers
    masks = [judged(layer, task.image_size, task.boundary) for layer in layers]
    total: list[Any] = [0.0] * len(layers)
    for x, _ in task.batches([]):
        for i, values in enumerate(task.reader.features(x)):
            if not bool(values.isfinite().all()):
                raise GeomsslError(f"features of {layers[i].name} with NaN or infinity", "finite features", reason="not-finite")
            total[i] = total[i] + values.double().sum(dim=0)
    means = [value / task.n for value in total]
    sums: dict[tuple[int, int], list[Tensor]] = {}
    names: dict[tuple[int, int], str] = {}
    left: dict[str, list[str]] = {}
    for x, tangents in task.batches(task.generators):
        for g, (chosen, moving) in enumerate(zip(task.generators, tangents, strict=True)):
            features, slopes = pushed(task.reader.features, task.module, x, moving)
            for i, (values, slope, layer) in enumerate(zip(features, slopes, layers, strict=True)):
                declared, said = declared_flow(
                    values, layer, chosen, task.group, task.image_size, task.action, task.difference
                )
                if declared is None:
                    left.setdefault(said, []).append(f"{chosen.name} at {layer.name}")
                    continue
                names[g, i] = said
                parts = (slope - declared, slope, declared, values - means[i].to(values.dtype), values)
                sums.setdefault((g, i), []).append(torch.stack([_squares(part, masks[i]) for part in parts]))
    found = [
        Found(task.generators[g], layers[i], names[g, i], *torch.cat(parts, dim=1)) for (g, i), parts in sorted(sums.items())
    ]
    return found, [f"{', '.join(dict.fromkeys(where))}: left out, since {why}." for why, where in left.items()]


def _squares(values: Tensor, mask: Tensor | None) -> Tensor:
    """|row|^2 of the judged pixels, float64 (n,) on the CPU."""
    kept = values if mask is None else values[..., mask.to(values.device)]
    return (torch.linalg.vector_norm(kept.flatten(1).double(), dim=1) ** 2).cpu()
