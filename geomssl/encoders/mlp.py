"""A multilayer perceptron on pixels whose output is read as fibres of a group that it knows nothing of (row H4)."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from pydantic import Field, PositiveInt
from torch import Tensor, nn

from geomssl.config import Settings
from geomssl.encoders.base import Encoder, Normalise
from geomssl.encoders.cnn import admit
from geomssl.errors import GeomsslError


class MLP(Encoder):
    """Linear, BatchNorm, ReLU for every width; the last width read as (C, G), G fibres of C = width / G numbers each.

    The control without structure of Keller et al.: G > 1, group None. Fibres (N, C, G, 1, 1); h is the maximum over G, as
    the encoders with a group take it. With `places` the same fibres are read as the places of a square map, (N, C, 1, √G, √G),
    so that an objective over translation finds them; h stays what it is.
    """

    class Config(Settings):
        name: Literal["mlp"] = "mlp"
        widths: tuple[PositiveInt, ...] = Field((784, 1024, 2048), min_length=1, description="outputs of the layers")
        fibres: PositiveInt = Field(16, description="fibres as which the last output is read")
        places: bool = Field(False, description="read them as places of a square map, for objectives over translation")
        size: PositiveInt | None = Field(None, description="side of the images; the data's own when not given")

    def __init__(self, in_channels: int, config: Config | None = None) -> None:
        super().__init__()
        config = config or self.Config.model_validate({})
        if config.size is None:
            raise GeomsslError("encoder mlp without a size", "the side of the images, such as size=8", reason="bad-value")
        if config.widths[-1] % config.fibres:
            raise GeomsslError(
                f"encoder mlp: {config.widths[-1]} outputs read as {config.fibres} fibres",
                "a last width that the number of fibres divides", reason="bad-value",
            )
        side = math.isqrt(config.fibres)
        if config.places and side**2 != config.fibres:
            given = f"encoder mlp: {config.fibres} fibres as places of a square map"
            raise GeomsslError(given, "a square number, such as 16", reason="bad-value")
        self.in_channels, self.size = in_channels, config.size
        self.axes = (1, side, side) if config.places else (config.fibres, 1, 1)
        self.dim = config.widths[-1] // config.fibres
        self.normalise = Normalise()
        layers: list[nn.Module] = []
        for a, b in pairwise((in_channels * config.size**2, *config.widths)):
            linear = nn.Linear(a, b, bias=False)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.BatchNorm1d(b), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def fibres(self, images: Tensor) -> Tensor:
        if tuple(admit(images, self.in_channels).shape[2:]) != (self.size, self.size):
            raise GeomsslError(
                f"images of {images.shape[2]}x{images.shape[3]} pixels for an mlp",
                f"{self.size}x{self.size}, the size that it was built for", reason="bad-images",
            )
        return self.layers(self.normalise(images).flatten(1)).view(len(images), self.dim, *self.axes)

    def pool(self, fibres: Tensor) -> Tensor:
        return fibres.amax(dim=(2, 3, 4))
