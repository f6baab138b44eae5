"""wrap: an Encoder of any module. Maps become fibres with one orientation; vectors become fibres at one place."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from geomssl.encoders.base import Encoder
from geomssl.encoders.cnn import admit
from geomssl.errors import GeomsslError, nearest


def wrap(module: nn.Module, layer: str | None = None, in_channels: int = 3) -> Encoder:
    """An Encoder of a module that takes images (N, in_channels, H, W) in [0, 1]; normalise inside the module if it needs it.

    layer: a dotted name from module.named_modules(); its output at the last call within a pass is the feature. None: the
    module's own output, and an Encoder is returned as it is. Maps (N, C, H, W) give fibres (N, C, 1, H, W) and h by the
    mean over space; vectors (N, D) give fibres (N, D, 1, 1, 1) and h = the vector; fibres (N, C, G, H, W) stay.
    Raises GeomsslError for an unknown layer (nearest named) and, in a pass, for tokens (N, T, D) and for no tensor.
    """
    if not isinstance(module, nn.Module):
        raise GeomsslError(f"a {type(module).__name__} to wrap", "a torch.nn.Module")
    if isinstance(module, Encoder) and layer is None:
        return module
    return Wrapped(module, layer, in_channels)


def submodule(module: nn.Module, layer: str) -> nn.Module:
    """The layer of that dotted name; GeomsslError naming the nearest where there is none."""
    layers = {name: found for name, found in module.named_modules() if name}
    if layer not in layers:
        raise GeomsslError(
            f"unknown layer {layer!r} of {type(module).__name__}", "a name from named_modules()",
            nearest(layer, layers), reason="unknown-name",
        )
    return layers[layer]


class Wrapped(Encoder):
    """A module seen as an Encoder: G = 1, group None. `dim` and `default_action` are known after the first pass."""

    def __init__(self, module: nn.Module, layer: str | None, in_channels: int) -> None:
        super().__init__()
        self.module, self.layer, self.in_channels = module, layer, in_channels
        if layer is not None:
            submodule(module, layer)
        self._shape: tuple[int, ...] | None = None

    @property
    def dim(self) -> int:  # type: ignore[override]
        return self._known()[1]

    @property
    def default_action(self) -> Literal["spatial", "trivial"]:
        """ "spatial" for maps, "trivial" for vectors."""
        return "spatial" if len(self._known()) > 2 else "trivial"

    def _known(self) -> tuple[int, ...]:
        if self._shape is None:
            raise GeomsslError(
                f"the features of {type(self.module).__name__} before any pass", "a pass over at least one image first"
            )
        return self._shape

    def fibres(self, images: Tensor) -> Tensor:
        output = self._output(admit(images, self.in_channels))
        if not isinstance(output, Tensor) or output.dim() not in (2, 4, 5) or len(output) != len(images):
            raise self._refusal(output)
        self._shape = tuple(output.shape)
        if output.dim() == 5:
            return output
        return output.unsqueeze(2) if output.dim() == 4 else output[:, :, None, None, None]

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))

    def _output(self, images: Tensor) -> Any:
        if self.layer is None:
            return self.module(images)
        seen: list[Any] = []
        hook = submodule(self.module, self.layer).register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            self.module(images)
        finally:
            hook.remove()
        if not seen:
            raise GeomsslError(
                f"layer {self.layer!r} of {type(self.module).__name__} never ran", "a layer that a pass goes through"
            )
        return seen[-1]

    def _refusal(self, output: Any) -> GeomsslError:
        place = f"layer {self.layer!r} of " if self.layer else ""
        given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        tokens = isinstance(output, Tensor) and output.dim() == 3
        return GeomsslError(
            f"{place}{type(self.module).__name__} gives {given}" + (", tokens" if tokens else ""),
            "maps (N, C, H, W) or vectors (N, D), one an image; name another layer, or pool in a module of your own",
            reason="bad-features",
        )
