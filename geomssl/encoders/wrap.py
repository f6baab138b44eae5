"""wrap: an Encoder of any module. Maps and patch tokens become fibres with one orientation; vectors, fibres at one place."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from geomssl.encoders.base import Encoder
from geomssl.encoders.capture import Capture, submodule
from geomssl.encoders.cnn import admit
from geomssl.encoders.forms import Form, form
from geomssl.encoders.geometry import follow
from geomssl.errors import GeomsslError
from geomssl.transforms.base import Size

__all__ = ["Wrapped", "submodule", "wrap"]


def wrap(module: nn.Module, layer: str | None = None, in_channels: int = 3) -> Encoder:
    """An Encoder of a module that takes images (N, in_channels, H, W) in [0, 1]; normalise inside the module if it needs it.

    layer: a dotted name from module.named_modules(); its output at the last call within a pass is the feature. None: the
    module's own output, and an Encoder is returned as it is. Maps (N, C, H, W), also with channels last, give fibres
    (N, C, 1, H, W) and h by the mean over space; patch tokens (N, T, D) give fibres (N, D, 1, h, w) on their grid, the
    tokens before them (class, registers) left out; vectors (N, D) give fibres (N, D, 1, 1, 1) and h = the vector; fibres
    (N, C, G, H, W) stay. Raises GeomsslError for an unknown layer (nearest named) and, in a pass, for what is none of these.
    """
    if not isinstance(module, nn.Module):
        raise GeomsslError(f"a {type(module).__name__} to wrap", "a torch.nn.Module")
    if isinstance(module, Encoder) and layer is None:
        return module
    return Wrapped(module, layer, in_channels)


def channels_of(module: nn.Module) -> int | None:
    """Channels of the images that a module takes: its own `in_channels`, or those of its first convolution (also escnn's)."""
    own = getattr(module, "in_channels", None)
    if isinstance(own, int):
        return own
    for inner in module.modules():
        if isinstance(inner, nn.Conv2d):
            return inner.in_channels
        # layers of e2cnn and escnn
        fields = getattr(getattr(inner, "in_type", None), "size", None)
        if isinstance(fields, int):
            return fields
    return None


def misfit(module: nn.Module, images: Tensor, error: Exception) -> None:
    """Turn the fault of a pass into one line where the module takes images of other channels."""
    taken = channels_of(module)
    if taken is not None and taken != images.shape[1]:
        raise GeomsslError(
            f"images of {images.shape[1]} channels for {type(module).__name__}",
            f"{taken}, as its first convolution takes: another data set (--dataset NAME), or another model",
            reason="bad-images",
        ) from error


class Wrapped(Encoder):
    """A module seen as an Encoder: G = 1, group None. `dim` and `default_action` are known after the first pass."""

    def __init__(self, module: nn.Module, layer: str | None, in_channels: int) -> None:
        super().__init__()
        self.module, self.layer, self.in_channels = module, layer, in_channels
        self._capture = None if layer is None else Capture(module, [layer])
        self._dim = 0
        self._forms: dict[tuple[Size, tuple[int, ...]], Form] = {}

    @property
    def dim(self) -> int:  # type: ignore[override]
        self._known()
        return self._dim

    @property
    def default_action(self) -> Literal["spatial", "trivial"]:
        """ "spatial" for maps and patches, "trivial" for vectors."""
        return "trivial" if self._known().kind == "vector" else "spatial"

    def _known(self) -> Form:
        if not self._forms:
            raise GeomsslError(
                f"the features of {type(self.module).__name__} before any pass", "a pass over at least one image first"
            )
        return next(reversed(self._forms.values()))

    def fibres(self, images: Tensor) -> Tensor:
        output = self.output(admit(images, self.in_channels))
        features = self._form(output, images).placed(output)
        self._dim = features.shape[1]
        if features.dim() == 5:
            return features
        return features.unsqueeze(2) if features.dim() == 4 else features[:, :, None, None, None]

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))

    def output(self, images: Tensor) -> Any:
        """What the module, or its layer, gives as it stands."""
        try:
            return self.module(images) if self._capture is None else self._capture.one(images)
        except (RuntimeError, AssertionError, ValueError) as error:
            misfit(self.module, images, error)
            raise

    def _form(self, output: Any, images: Tensor) -> Form:
        """Found once for each size of images and shape of output; a patch grid is looked for by following one pass."""
        size: Size = (images.shape[2], images.shape[3])
        shape = tuple(output.shape[1:]) if isinstance(output, Tensor) else ()
        if (size, shape) not in self._forms:
            grids: list[Size] = []
            if len(shape) == 2:
                with torch.no_grad():
                    grids = [grid for grid, _ in follow(self.output, images[:1].detach())[1].grids]
            found = form(output, len(images), size, grids)
            if found is None:
                raise self._refusal(output)
            self._forms[size, shape] = found
        return self._forms[size, shape]

    def _refusal(self, output: Any) -> GeomsslError:
        place = f"layer {self.layer!r} of " if self.layer else ""
        given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
        return GeomsslError(
            f"{place}{type(self.module).__name__} gives {given}",
            "maps (N, C, H, W), tokens (N, T, D) of a patch grid or vectors (N, D), one an image; name another layer, or pool "
            "in a module of your own",
            reason="bad-features",
        )
