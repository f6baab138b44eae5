"""`folder:PATH`: images on disk, one sub-folder a class, optionally below train/, val/ and test/."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from geomssl.config import Settings
from geomssl.data.base import Resident, Split
from geomssl.data.splits import stratified
from geomssl.errors import GeomsslError, nearest
from geomssl.progress import track

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"}
MODES = {1: "L", 3: "RGB"}
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class Folder:
    """Every image decoded into memory. Without `size` all images must already be square and of one size."""

    class Config(Settings):
        name: Literal["folder"] = "folder"
        root: str = Field(description="the folder, with one sub-folder a class")
        size: int | None = Field(None, ge=2, description="crop each image to a centred square and resize it to this side")
        channels: Literal[1, 3] | None = Field(None, description="convert to grey (1) or RGB (3)  [default: as the files are]")
        seed: int = Field(0, description="seed of the split, where the folder has no train/, val/, test/")

    @staticmethod
    def load(config: Config, split: Split) -> Resident:
        root = Path(config.root)
        if not root.is_dir():
            beside = [p.name for p in root.parent.iterdir() if p.is_dir()] if root.parent.is_dir() else []
            raise GeomsslError(
                f"no such folder: {root}", "a folder of images, one sub-folder a class", nearest(root.name, beside),
                reason="no-file",
            )
        given = [name for name in SPLITS if (root / name).is_dir()]
        if given and split not in given:
            raise GeomsslError(f"{root} has no {split}/", f"{', '.join(SPLITS)} (found {', '.join(given)})", reason="no-split")
        base = root / split if given else root
        classes, files, labels = _listing(base, _classes(root / given[0]) if given else None)
        if not given:
            chosen = stratified(labels, config.seed)[split]
            files, labels = [files[i] for i in chosen.tolist()], labels[chosen]
        if not files:
            raise GeomsslError(f"no image in the {split} split of {root}", "at least one image", reason="too-few-images")
        return Resident(f"folder:{root.name}", split, _decode(files, config), labels, classes)


def _classes(base: Path) -> list[str]:
    return sorted(p.name for p in base.iterdir() if p.is_dir() and not p.name.startswith("."))


def _listing(base: Path, known: list[str] | None) -> tuple[list[str], list[Path], Tensor]:
    """Classes, files and labels below `base`, sorted by name. `known` fixes the classes across splits."""
    classes = known or _classes(base)
    strangers = sorted(set(_classes(base)) - set(classes))
    if strangers:
        raise GeomsslError(f"{base} has a class {strangers[0]!r}", f"the classes of train/: {', '.join(classes)}")
    files: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        inside = base / name
        found = sorted(p for p in inside.rglob("*") if p.suffix.lower() in SUFFIXES) if inside.is_dir() else []
        files += found
        labels += [label] * len(found)
    if not files:
        raise GeomsslError(
            f"no image below {base}", f"files ending in {', '.join(sorted(SUFFIXES))}, one sub-folder a class",
            reason="too-few-images",
        )
    return classes, files, torch.tensor(labels)


def _decode(files: Sequence[Path], config: Folder.Config) -> Tensor:
    """uint8 (n, C, size, size). Refuses, by name, the first file that is unreadable, not square, or unlike the others."""
    pixels: Tensor | None = None
    for row, path in enumerate(track(files, f"reading {Path(config.root).name}")):
        image = _read(path, config)
        if pixels is None:
            pixels = torch.empty((len(files), *image.shape), dtype=torch.uint8)
        if image.shape != pixels.shape[1:]:
            (c, h, w), (c0, h0, w0) = image.shape, pixels.shape[1:]
            raise GeomsslError(
                f"{path} is {h}x{w} with {c} channels", f"{h0}x{w0} with {c0} as {files[0].name} (or --set dataset.size=N "
                "and dataset.channels=1 or 3)", reason="bad-image",
            )
        pixels[row] = image
    assert pixels is not None
    if bool((pixels == pixels[0, 0, 0, 0]).all()):
        given = f"all {len(files)} images below {config.root} are one equal colour"
        raise GeomsslError(given, "images that differ", reason="bad-image")
    return pixels


def _read(path: Path, config: Folder.Config) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.copy()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise GeomsslError(f"cannot read {path}: {error}", "a whole image file", reason="bad-image") from None
    if image.mode == "F":
        said = "has NaN pixels" if np.isnan(np.asarray(image)).any() else "has floating-point pixels"
        raise GeomsslError(f"{path} {said}", "8-bit pixels", reason="bad-image")
    if image.mode.startswith("I"):
        raise GeomsslError(f"{path} has {image.mode} pixels", "8-bit pixels", reason="bad-image")
    if config.channels is not None:
        image = image.convert(MODES[config.channels])
    elif image.mode in ("P", "1"):
        image = image.convert("RGB" if image.mode == "P" else "L")
    if image.mode not in MODES.values():
        raise GeomsslError(
            f"{path} has {len(image.getbands())} channels ({image.mode})", "1 (grey) or 3 (RGB), or --set dataset.channels=3",
            reason="bad-image",
        )
    width, height = image.size
    if min(width, height) < 2:
        raise GeomsslError(f"{path} is {height}x{width} pixels", "at least 2x2", reason="bad-image")
    if config.size is not None:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((config.size,) * 2, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    elif width != height:
        raise GeomsslError(f"{path} is {height}x{width}", "square images, or --set dataset.size=N", reason="bad-image")
    array = np.asarray(image)
    return torch.from_numpy(array.copy()).view(*array.shape[:2], -1).permute(2, 0, 1)
