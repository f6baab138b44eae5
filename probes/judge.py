"""judge: every layer under every element on given inputs. Judged pixels, what resampling does, and the measurement itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes.boundary import clean, refusal
from geomssl.probes.defect import Distance, EquivarianceError, Task, measure
from geomssl.probes.elements import labels
from geomssl.probes.inputs import Inputs
from geomssl.probes.layers import Layer, Reader
from geomssl.probes.resampling import distances
from geomssl.probes.units import units
from geomssl.transforms.actions import Action
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.sinc import Window

# Features whose variance is under this share of their squared norm are degenerate.
DEGENERATE = 1e-6
# Rendered pictures on which r is measured, and those of one bandwidth of a sweep.
REFERENCES = 64


@dataclass(frozen=True)
class Settings:
    """What a measurement is told beside the model, the images and the transform; see Options."""

    level: float = 0.95
    resamples: int = 2000
    seed: int = 0
    batch_size: int = 256
    share: float = DEGENERATE
    memory: int = 2**31
    references: int = REFERENCES


def judge(
    reader: Reader,
    inputs: Inputs,
    transform: Transform,
    params: Tensor,
    actions: list[Action],
    boundary: str,
    clusters: Tensor | None,
    settings: Settings,
) -> tuple[list[EquivarianceError], list[str]]:
    """Every layer under every element: masks, r, and the measurement. And remarks on r."""
    first, size = inputs.of(slice(0, 1)), inputs.size
    params = params.to(first.device)
    exact = [act.is_exact(params, layer.size, size) for act, layer in zip(actions, reader.layers, strict=True)]
    masks = _masks(reader.layers, actions, transform, params, size, boundary, inputs.moved is None)
    figures = len(params) * len(actions)
    chosen = units(inputs.n, figures, settings.memory, clusters, settings.seed)
    known, remarks = _distances(reader, inputs, transform, params, actions, masks, exact, boundary, settings)
    task = Task(
        reader.features, inputs.of, inputs.n, transform, params, actions, masks, chosen, inputs.moved, settings.batch_size,
        settings.memory // 8,
    )
    return measure(task, settings.level, settings.resamples, settings.seed, settings.share, known), remarks


def _masks(
    layers: list[Layer], actions: list[Action], transform: Transform, params: Tensor, size: Size, boundary: str,
    framed: bool,
) -> list[Tensor | None]:
    masks: list[Tensor | None] = []
    for layer, act in zip(layers, actions, strict=True):
        if boundary != "crop" or layer.geometry is None:
            masks.append(act.judged(params.cpu(), layer.size, None))
            continue
        mask = clean(act, layer.geometry, params.cpu(), layer.size, size, framed)
        empty = ~mask.flatten(1).any(dim=1)
        if bool(empty.any()):
            worst = labels(transform, params)[int(empty.int().argmax())]
            raise refusal(layer.name, worst, layer.geometry, size)
        masks.append(act.judged(params.cpu(), layer.size, mask))
    return masks


def _distances(
    reader: Reader, inputs: Inputs, transform: Transform, params: Tensor, actions: list[Action],
    masks: list[Tensor | None], exact: list[Tensor], boundary: str, settings: Settings,
) -> tuple[list[Distance] | None, list[str]]:
    if all(bool(e.all()) for e in exact):
        return None, []
    if inputs.reference is None or settings.references < 2:
        return None, [
            "What resampling does was not measured, so where something is resampled there are no bounds of the defect."
        ]
    first = inputs.of(slice(0, 1))
    windows = [
        None if boundary != "crop" or layer.geometry is None else _window(layer, inputs.size) for layer in reader.layers
    ]
    try:
        found = distances(
            reader.features, inputs.reference, settings.references, transform, params, actions, masks, windows, exact,
            resampled=inputs.moved is None, dtype=first.dtype, device=first.device, batch_size=settings.batch_size,
            level=settings.level, resamples=settings.resamples, seed=settings.seed,
        )
    except GeomsslError as error:
        if error.reason not in ("no-rendering", "not-geometric"):
            raise
        return None, [f"{error}. So what resampling does could not be measured, and there are no bounds of the defect."
        ]
    for index, (act, layer) in enumerate(zip(actions, reader.layers, strict=True)):
        if act.guesses(layer.size, inputs.size):
            # Where features are not known to lie, a distance from the declared place says nothing of the model.
            found[index] = Distance(*(torch.full_like(values, torch.nan) for values in found[index]))
    return found, []


def _window(layer: Layer, size: Size) -> Window:
    """The feature pixels of a layer that see the image alone."""
    assert layer.geometry is not None
    rows, columns = (layer.geometry.clean(layer.size[axis], size[axis], axis) for axis in (0, 1))
    return (*rows, *columns)


def croppable(
    reader: Reader, actions: list[Action], transform: Transform, params: Tensor, inputs: Inputs, named: Sequence[str]
) -> tuple[Reader, list[Action], list[str]]:
    """The layers of which `--boundary crop` leaves something, with a remark on the others.

    GeomsslError where it leaves nothing of a layer that was named itself, or of any.
    """
    kept, left = [], []
    refused: GeomsslError | None = None
    for index, (layer, act) in enumerate(zip(reader.layers, actions, strict=True)):
        try:
            _masks([layer], [act], transform, params, inputs.size, "crop", inputs.moved is None)
            kept.append(index)
        except GeomsslError as error:
            if error.reason != "no-field" or layer.source in named:
                raise
            refused = refused or error
            left.append(layer.name)
    if refused is None:
        return reader, actions, []
    if not kept:
        raise refused
    some = ", ".join(left[:4]) + (", …" if len(left) > 4 else "")

    def features(images: Tensor) -> list[Tensor]:
        given = reader.features(images)
        return [given[index] for index in kept]

    remark = f"{len(left)} layers were left out, of which --boundary crop leaves nothing: {some}."
    return Reader(features, [reader.layers[i] for i in kept]), [actions[i] for i in kept], [remark]


@torch.no_grad()
def unmixed(reader: Reader, image: Tensor, found: Sequence[EquivarianceError]) -> list[bool]:
    """Which layers are tokens that have not met the image: class tokens and registers before the first attention.

    They are constant by construction, which is no defect and no merit. Three facts, all needed: they stand before the patches
    (`Layer.apart`) and are degenerate at every element; an image of NaN leaves them finite, while it reaches the patches of
    the same layer (0 NaN = NaN, so weights of zero do not hide a path); and those patches, which stay to be judged, are not
    degenerate. A network that ignores its images fails the second and the third.
    """
    doubtful = [layer.apart and bool(one.degenerate.all()) for layer, one in zip(reader.layers, found, strict=True)]
    if not any(doubtful):
        return doubtful
    try:
        values = reader.features(torch.full_like(image, torch.nan))
    except Exception:  # a model may refuse such images in any way: then nothing is known, and what is degenerate stays so
        return [False] * len(doubtful)
    patches = {
        layer.source: bool(f.isnan().any()) and not bool(one.degenerate.any())
        for layer, f, one in zip(reader.layers, values, found, strict=True) if not layer.apart
    }
    return [
        here and bool(f.isfinite().all()) and patches.get(layer.source, False)
        for here, layer, f in zip(doubtful, reader.layers, values, strict=True)
    ]
