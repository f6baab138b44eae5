"""Models of timm and torchvision as encoders, by the names `timm:NAME` and `torchvision:NAME`. Needs the extra `zoo`."""

from __future__ import annotations

import importlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from geomssl import modes
from geomssl.config import Settings
from geomssl.encoders.base import Encoder, Normalise
from geomssl.encoders.capture import Capture
from geomssl.encoders.cnn import admit
from geomssl.encoders.forms import Form, form
from geomssl.errors import GeomsslError, nearest
from geomssl.transforms.base import Size


class Adapter(Encoder):
    """A model of a library without its classifier; images in [0, 1] are normalised by the model's own mean and std.

    h (N, D) is what enters the model's last linear layer. Fibres (N, C, 1, H, W) are the last map, or the patch tokens
    on their grid (class and register tokens left out); group None. pool(fibres) is h where the model itself averages its
    map, else the mean over space. Images of one channel are repeated over three.

    Config: pretrained (the library's own weights, which it downloads; random weights otherwise), size (side of the images;
    the data's own in training, and needed to build models of a fixed size for another). Raises GeomsslError for a missing
    library, an unknown name, weights that cannot be had, and a size at which the model does not run.
    """

    library: ClassVar[str]

    class Config(Settings):
        name: str
        pretrained: bool = Field(False, description="the library's own weights instead of random ones")
        size: PositiveInt | None = Field(None, description="side of the images; the data's own when not given")

    def __init__(self, in_channels: int, config: Config) -> None:
        super().__init__()
        self.in_channels, self.name = in_channels, config.name
        self.model, mean, std = self._make(config.name.partition(":")[2], config)
        # one channel's constants are repeated where the model takes other channels than the constants have
        self.normalise = Normalise(mean, std) if in_channels in (1, 3) else Normalise(sum(mean) / 3, sum(std) / 3)
        self.dim = self._width()
        if config.size is not None:
            self._try(config.size)

    @abstractmethod
    def _make(self, name: str, config: Config) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
        """The model without its classifier, and its mean and std."""

    @abstractmethod
    def _width(self) -> int:
        """D."""

    @abstractmethod
    def _last(self, images: Tensor) -> Any:
        """The last map or tokens for normalised images."""

    @abstractmethod
    def _head(self, images: Tensor) -> Tensor:
        """h (N, D) for normalised images."""

    def _form(self, output: Any, images: Tensor) -> Form | None:
        """How the last output is read."""
        size: Size = (images.shape[2], images.shape[3])
        grid = getattr(getattr(self.model, "patch_embed", None), "grid_size", None)
        return form(output, len(images), size, [] if grid is None else [(int(grid[0]), int(grid[1]))])

    def _input(self, images: Tensor) -> Tensor:
        images = admit(images, self.in_channels)
        return self.normalise(images.expand(-1, 3, -1, -1) if self.in_channels == 1 else images)

    def fibres(self, images: Tensor) -> Tensor:
        output = self._last(self._input(images))
        found = self._form(output, images)
        if found is None:
            given = tuple(output.shape) if isinstance(output, Tensor) else f"a {type(output).__name__}"
            expected = "maps (N, C, H, W) or tokens of a patch grid"
            raise GeomsslError(f"{self.name} gives {given}", expected, reason="bad-features")
        placed = found.placed(output)
        return placed.unsqueeze(2) if placed.dim() == 4 else placed[:, :, None, None, None]

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.mean(dim=(2, 3, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self._head(self._input(images))

    @torch.no_grad()
    def _try(self, size: int) -> None:
        """One pass in eval mode over two blank images, so that a size at which the model does not run is found at once."""
        try:
            with modes.evaluating(self):
                self(torch.zeros(2, self.in_channels, size, size))
                self.fibres(torch.zeros(2, self.in_channels, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise GeomsslError(
                f"{self.name} on images of {size}x{size} pixels: {said}", "a size at which the model runs, such as 224",
                reason="bad-images",
            ) from None


class Timm(Adapter):
    """timm:NAME (Wightman): fibres by forward_features, h by forward_head before the classifier."""

    library = "timm"

    def _make(self, name: str, config: Adapter.Config) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
        timm = _library("timm")
        if not timm.is_model(name) or ("." in name and name not in timm.list_pretrained()):
            known = timm.list_pretrained() if "." in name else timm.list_models()
            raise _unknown(self.library, name, known, "timm.list_models()")
        about = timm.models.get_pretrained_cfg(name)
        given: dict[str, Any] = {"num_classes": 0, "in_chans": 3 if self.in_channels == 1 else self.in_channels}
        if about is not None and about.fixed_input_size and config.size is not None:
            given["img_size"] = config.size
        with _having(self.name, config):
            model = timm.create_model(name, pretrained=config.pretrained, **given)
        return model, tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])

    def _width(self) -> int:
        width: Any = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        return int(width)

    def _form(self, output: Any, images: Tensor) -> Form | None:
        if getattr(self.model, "output_fmt", None) == "NHWC" and isinstance(output, Tensor) and output.dim() == 4:
            return Form("channels-last", (output.shape[1], output.shape[2]))
        return super()._form(output, images)

    def _last(self, images: Tensor) -> Any:
        return self.model.forward_features(images)  # type: ignore[operator]

    def _head(self, images: Tensor) -> Tensor:
        return self.model.forward_head(self._last(images), pre_logits=True)  # type: ignore[operator]


class TorchVision(Adapter):
    """torchvision:NAME, a classification model: its last linear layer is the identity; fibres are what enters its
    global pooling, or the tokens of a vision transformer.
    """

    library = "torchvision"

    # where a model without `avgpool` has its last map
    LAST = ("encoder", "features", "layers", "conv5", "blocks")

    def _make(self, name: str, config: Adapter.Config) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...]]:
        models = _library("torchvision.models")
        if name not in (known := models.list_models(module=models)):
            raise _unknown(self.library, name, known, "torchvision.models.list_models()")
        if self.in_channels not in (1, 3):
            raise GeomsslError(f"{self.name} for {self.in_channels} channels", "images of 1 or 3 channels", reason="bad-shape")
        given: dict[str, Any] = {}
        if name in ("googlenet", "inception_v3"):
            # auxiliary heads are of no use here; init_weights is said only to keep torchvision from warning
            given = {"init_weights": True, **({} if config.pretrained else {"aux_logits": False})}
        if name.startswith("vit_") and config.size is not None:
            given["image_size"] = config.size
        choice = models.get_model_weights(name).DEFAULT
        with _having(self.name, config):
            model = models.get_model(name, weights=choice if config.pretrained else None, **given)
        linear = [layer for layer, module in model.named_modules() if isinstance(module, nn.Linear)]
        # squeezenet classifies by a convolution
        last = linear[-1] if linear else "classifier.1"
        removed = model.get_submodule(last)
        self._features = int(removed.in_features if linear else removed.in_channels)
        model.set_submodule(last, nn.Identity())
        children = dict(model.named_children())
        self._place = "avgpool" if "avgpool" in children else next(layer for layer in self.LAST if layer in children)
        self._capture = Capture(model, [self._place], before=self._place == "avgpool")
        normal = choice.transforms()
        return model, tuple(normal.mean), tuple(normal.std)

    def _width(self) -> int:
        return self._features

    def _last(self, images: Tensor) -> Any:
        return self._capture.one(images)

    def _head(self, images: Tensor) -> Tensor:
        return self.model(images)


def _library(name: str) -> Any:
    """That module, or one line on how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        if error.name not in (package, name):
            given = f"{package} cannot be imported: {error}"
            raise GeomsslError(given, "a working installation", reason="no-library") from error
        raise GeomsslError(f"{package} is not installed", "pip install 'geomssl[zoo]'", reason="no-library") from None
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise GeomsslError(
            f"{name.partition('.')[0]} cannot be imported: {said}", f"a build of it for torch {torch.__version__}",
            reason="no-library",
        ) from error


def _unknown(library: str, name: str, known: Iterable[str], where: str) -> GeomsslError:
    """The line for a name that the library does not have."""
    near = nearest(name, known)
    return GeomsslError(
        f"unknown model {library}:{name}", f"a name from {where}", None if near is None else f"{library}:{near}",
        reason="unknown-name",
    )


@contextmanager
def _having(name: str, config: Adapter.Config) -> Iterator[None]:
    """One line where a model cannot be made as asked, or its weights cannot be had."""
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if config.pretrained:
            raise GeomsslError(
                f"the weights of {name} cannot be had ({said})",
                "a network that reaches them, or pretrained=false with --weights F", reason="no-weights",
            ) from error
        size = "" if config.size is None else f" for images of {config.size}x{config.size} pixels"
        raise GeomsslError(f"{name}{size}: {said}", "a size that the model can be made for", reason="bad-value") from error
