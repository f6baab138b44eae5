"""Capture: what named layers of a module give, or are given, in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from geomssl.errors import GeomsslError, nearest


def submodule(module: nn.Module, layer: str) -> nn.Module:
    """The layer of that dotted name; GeomsslError naming the nearest where there is none."""
    return module.get_submodule(matching(module, [layer])[0])


def matching(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """The dotted names of layers that the patterns mean, in the order of named_modules().

    A pattern is a name, or has wild cards: `*` any text, dots included, `?` one character, `[...]` one of several; `all`
    is `*`. A module that is registered under several names is known by its first. GeomsslError for a pattern that means
    no layer, naming the nearest.
    """
    layers = {name: found for name, found in module.named_modules(remove_duplicate=False) if name}
    first = {id(found): name for name, found in reversed(layers.items())}
    wanted: set[str] = set()
    for pattern in patterns:
        exact = [pattern] if pattern in layers else []
        found = exact or [name for name in layers if pattern == "all" or fnmatchcase(name, pattern)]
        if not found:
            raise GeomsslError(
                f"unknown layer {pattern!r} of {type(module).__name__}", "a name from named_modules()",
                nearest(pattern, layers), reason="unknown-name",
            )
        wanted.update(exact or (first[id(layers[name])] for name in found))
    return [name for name in layers if name in wanted]


def unwrapped(value: Any) -> Any:
    """The tensor of what a library wraps with its type, as the GeometricTensor of escnn and e2cnn; else the value itself."""
    inner = None if isinstance(value, Tensor) else getattr(value, "tensor", None)
    return inner if isinstance(inner, Tensor) else value


class Capture:
    """Reads layers of a module while it runs: `output, seen = capture(images)`, seen: layer -> what it gave.

    A layer that runs several times in a pass (a module reused) is read at its last call; one that does not run is missing
    from `seen`. before: what enters the layer (its first argument) instead of what leaves it. What a later layer
    overwrites in place is kept as it was: the pass is repeated once, with copies, when that is first noticed. No hook
    stays between passes, and tangents and gradients go through.
    """

    def __init__(self, module: nn.Module, layers: Sequence[str], before: bool = False) -> None:
        self.module, self.layers, self.before = module, tuple(layers), before
        self._places = {layer: submodule(module, layer) for layer in self.layers}
        self._copied: set[str] = set()

    def __call__(self, images: Tensor, run: Callable[[Tensor], Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """One pass of run(images), the module itself unless given: what it returns, and what the layers gave."""
        output, seen, spoiled = self._pass(images, run or self.module)
        if spoiled:
            self._copied |= spoiled
            output, seen, _ = self._pass(images, run or self.module)
        return output, seen

    def _pass(self, images: Tensor, run: Callable[[Tensor], Any]) -> tuple[Any, dict[str, Any], set[str]]:
        seen: dict[str, Any] = {}
        versions: dict[str, int] = {}

        def keep(name: str, value: Any) -> None:
            value = unwrapped(value)
            if isinstance(value, Tensor):
                if name in self._copied or value.is_inference():
                    value = value.clone()
                versions[name] = -1 if value.is_inference() else value._version
            seen[name] = value

        handles = []
        try:
            for name, place in self._places.items():
                if self.before:
                    handles.append(place.register_forward_pre_hook(lambda _, given, name=name: keep(name, given[0])))
                else:
                    handles.append(place.register_forward_hook(lambda _, __, given, name=name: keep(name, given)))
            output = run(images)
        finally:
            for handle in handles:
                handle.remove()
        return output, seen, {name for name, version in versions.items() if 0 <= version != seen[name]._version}

    def one(self, images: Tensor) -> Any:
        """What the only layer gives; GeomsslError where it never runs."""
        _, seen = self(images)
        (layer,) = self.layers
        if layer not in seen:
            raise GeomsslError(
                f"layer {layer!r} of {type(self.module).__name__} never ran", "a layer that a pass goes through"
            )
        return seen[layer]
