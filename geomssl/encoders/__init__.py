"""Encoders: images to fibres (N, C, G, H, W) and to a vector h. `build` makes one by name, `wrap` from any module."""

from __future__ import annotations

from typing import Any

from geomssl.config import parse
from geomssl.encoders.base import Encoder, Normalise
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.encoders.wrap import wrap
from geomssl.registry import resolve

__all__ = ["Encoder", "GroupConv2d", "Normalise", "build", "for_images", "wrap"]


def build(name: str, in_channels: int = 3, **options: Any) -> Encoder:
    """The encoder of that name for images of `in_channels` channels; options are the fields of its Config.

    name: built in ("cnn", "resnet18", "vit-small", ...), "timm:NAME", "torchvision:NAME", an installed entry point, or
    package.module:Class. Weights are drawn from the global generator, so build under `seeding.seeded`. Raises GeomsslError for
    an unknown name, option or value.
    """
    chosen = resolve("encoder", name)
    named = {"name": name} if "name" in chosen.Config.model_fields else {}
    return chosen(in_channels, parse(chosen.Config, named | options, f"encoder {name}"))


def for_images(config: Any, channels: int, size: int) -> Encoder:
    """The encoder of those settings for images of that many channels and that side, which fills a `size` left open."""
    if "size" in type(config).model_fields and config.size is None:
        config = config.model_copy(update={"size": size})
    return resolve("encoder", config.name)(channels, config)
