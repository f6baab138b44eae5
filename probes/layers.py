"""Layers: which features of an encoder are measured, all in one pass, and how each of them is declared to move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from geomssl.encoders.base import Encoder
from geomssl.encoders.capture import Capture, matching
from geomssl.encoders.forms import Form, form
from geomssl.encoders.geometry import CHANNELS_LAST, LAST, Follower, Geometry, follow
from geomssl.encoders.wrap import Wrapped, misfit
from geomssl.errors import GeomsslError, nearest
from geomssl.transforms.actions import Action, ActionFunction, action
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.photometric import Photometric

BUILTIN = ("fibres", "h")
PREFIX = "prefix"


@dataclass(frozen=True)
class Layer:
    """One kind of features of one layer. apart: the tokens before the patches, as a vector.

    shape: of one image's features, places last.  geometry: None where they have no place on the image.
    """

    name: str
    source: str
    form: Form
    apart: bool
    shape: tuple[int, ...]
    geometry: Geometry | None = None

    def of(self, output: Tensor) -> Tensor:
        return self.form.apart(output) if self.apart else self.form.placed(output)

    @property
    def size(self) -> Size:
        return (self.shape[-2], self.shape[-1]) if len(self.shape) > 2 else (1, 1)

    @property
    def maps(self) -> bool:
        return len(self.shape) > 2


@dataclass(frozen=True)
class Reader:
    """features: one pass of the model, images to the features of every layer, a list as long as `layers`."""

    features: Callable[[Tensor], list[Tensor]]
    layers: list[Layer]


def single(f: Callable[[Tensor], Tensor], features: Tensor, geometry: Geometry | None) -> Reader:
    """A reader of what a function gives, whatever its shape."""
    kind: Any = {4: "map", 5: "fibres"}.get(features.dim(), "vector")
    layer = Layer("features", "features", Form(kind), False, tuple(features.shape[1:]), geometry)
    return Reader(lambda images: [f(images)], [layer])


@torch.no_grad()
def read(encoder: nn.Module, wanted: Sequence[str], image: Tensor) -> tuple[Reader, list[str]]:
    """A reader of the wanted layers of an encoder (in eval mode), and remarks on those that were left out.

    wanted: "fibres", "h", dotted names of modules, patterns with wild cards, or "all". One image (1, C, H, W) is passed to
    see what the layers give. Where several of a pattern give the very same tensor the outermost is kept. What is no
    feature of the images (tuples, masks, windows) is left out of a pattern, and refused where it was named itself.
    """
    root = encoder.module if isinstance(encoder, Wrapped) else encoder
    assert isinstance(root, nn.Module)
    builtin = [name for name in BUILTIN if name in wanted or "all" in wanted]
    patterns = [name for name in wanted if name not in BUILTIN]
    modules = _modules(root, patterns)
    capture = Capture(root, modules)
    core = _core(encoder, builtin)

    def run(images: Tensor) -> dict[str, Any]:
        output, seen = capture(images, core)
        return {**seen, **output}

    try:
        outputs, follower = follow(run, image)
    except (RuntimeError, AssertionError, ValueError) as error:
        misfit(root, image, error)
        raise
    named = {name for name in wanted if name in BUILTIN} | {p for p in patterns if p in modules}
    size: Size = (image.shape[2], image.shape[3])
    layers: list[Layer] = []
    left: list[str] = []
    seen: set[Any] = set()
    for name in sorted([*modules, *builtin], key=lambda n: (n in BUILTIN, n.count("."))):
        output = outputs.get(name)
        found = form(output, len(image), size, [grid for grid, _ in follower.grids])
        if found is None:
            if name in named:
                raise _refusal(root, name, output)
            left.append(name)
            continue
        place = None if found.grid in (None, (1, 1)) else found.grid
        same = {(output.data_ptr(), output.numel(), place)}
        if name == "h" and _equal(output, outputs.get("fibres")):
            same.add((outputs["fibres"].data_ptr(), output.numel(), None))
        if same & seen and name not in named:
            continue
        seen |= same
        layers += _split(name, output, found, follower, size)
    order = {name: index for index, name in enumerate([*modules, *builtin])}
    layers.sort(key=lambda layer: order[layer.source])
    if not layers:
        raise GeomsslError(f"layers {', '.join(wanted)}", "at least one that gives features of the images", reason="no-layer")
    remarks = []
    if left:
        some = ", ".join(left[:4]) + (", …" if len(left) > 4 else "")
        remarks.append(f"{len(left)} layers were left out (they do not run, or give no feature of each image): {some}.")


    def features(images: Tensor) -> list[Tensor]:
        given = run(images)
        return [layer.of(given[layer.source]) for layer in layers]

    return Reader(features, layers), remarks


def _equal(h: Tensor, fibres: Any) -> bool:
    """Are the fibres nothing but h, one vector at one place?"""
    return isinstance(fibres, Tensor) and fibres.numel() == h.numel() and torch.equal(fibres.flatten(), h.flatten())


def _modules(root: nn.Module, patterns: Sequence[str]) -> list[str]:
    names = [name for name, _ in root.named_modules() if name]
    try:
        return matching(root, patterns) if names else []
    except GeomsslError as error:
        wrong = str(error).split("'")[1]
        raise GeomsslError(
            f"unknown layer {wrong!r}", "fibres, h, all, or a name from named_modules() (wild cards: layer*)",
            nearest(wrong, [*BUILTIN, "all", *names]), reason="unknown-name",
        ) from None


def _core(encoder: nn.Module, builtin: Sequence[str]) -> Callable[[Tensor], dict[str, Any]]:
    """One pass that gives fibres and h."""
    if not isinstance(encoder, Encoder):
        return lambda images: {"fibres": encoder(images)}
    if type(encoder).forward is Encoder.forward:

        def both(images: Tensor) -> dict[str, Any]:
            fibres = encoder.fibres(images)
            return {"fibres": fibres, "h": encoder.pool(fibres)}

        return both

    def own(images: Tensor) -> dict[str, Any]:
        found = {"fibres": encoder.fibres(images)} if "fibres" in builtin else {}
        return found if builtin == ["fibres"] else {**found, "h": encoder(images)}

    return own


def _split(name: str, output: Tensor, found: Form, follower: Follower, size: Size) -> list[Layer]:
    layers = []
    if found.prefix:
        shape = tuple(found.apart(output).shape[1:])
        layers.append(Layer(f"{name}[{PREFIX}]", name, found, True, shape))
    placed = found.placed(output)
    shape = tuple(placed.shape[1:])
    here = None
    if placed.dim() >= 4:
        axes = CHANNELS_LAST if found.kind == "channels-last" else LAST
        here = follower.known(output, axes) if found.kind != "tokens" else None
        here = here or _of_grid(follower, (shape[-2], shape[-1])) or Geometry.from_sizes(size, (shape[-2], shape[-1]))
    layers.insert(0, Layer(name, name, found, False, shape, here))
    return layers


def _of_grid(follower: Follower, grid: Size) -> Geometry | None:
    """The geometry of the only grid of that size that a convolution of the pass made: a patch embedding's."""
    found = {(g.stride, g.offset): g for size, g in follower.grids if size == grid}
    return replace(next(iter(found.values())), reach=(float("inf"),) * 2) if len(found) == 1 else None


def _refusal(root: nn.Module, name: str, output: Any) -> GeomsslError:
    kind = type(root).__name__
    if output is None:
        return GeomsslError(f"layer {name!r} of {kind} never ran", "a layer that a pass goes through")
    given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
    return GeomsslError(
        f"layer {name!r} of {kind} gives {given} for one image",
        "maps (N, C, H, W), tokens (N, T, D) of a patch grid or vectors (N, D), one an image", reason="bad-features",
    )


def declare(
    chosen: str | ActionFunction | Action, transform: Transform, layer: Layer, group: Any
) -> tuple[Action, str]:
    """The action of one layer's features, and a sentence that says why it is this one. chosen "auto": by what they are."""
    if isinstance(chosen, str) and chosen == "auto":
        chosen, why = _auto(transform, layer, group)
    elif isinstance(chosen, str) and not layer.maps and chosen != "trivial":
        chosen, why = "trivial", "Vectors have no place and no orientation, so they are held to the trivial action."
    else:
        why = f"The {chosen if isinstance(chosen, str) else getattr(chosen, 'name', 'given')} action was asked for."
    return action(chosen, transform, layer.geometry), why


def _auto(transform: Transform, layer: Layer, group: Any) -> tuple[str, str]:
    oriented = len(layer.shape) == 4 and group is not None and layer.shape[1] == group.fibre
    if oriented and group == transform:
        return "regular", f"The encoder declares {group.name}, so its fibres are held to the regular action."
    if isinstance(transform, Photometric):
        return "trivial", f"{transform.name} moves no pixels, so features are held to stay as they are (the trivial action)."
    if layer.maps and layer.size != (1, 1):
        if oriented and group.fibre > 1:
            return "spatial", (
                f"The encoder declares {group.name}, not {transform.name}: its maps are held to move as images (the spatial "
                "action), which leaves the orientations where they are. An error here may be the declaration's, not the "
                f"model's: --transform {group.name} asks for its own."
            )
        return "spatial", (
            f"The encoder declares no action of {transform.name}, so its maps are held to move as images (the spatial action)."
        )
    return "trivial", (
        "These features have no place and no orientation, so they are held to stay as they are (the trivial action)."
    )
