"""Image files to uint8 pixels: one file, and many of them by threads, in order, chunk by chunk."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from geomssl.errors import GeomsslError
from geomssl.progress import track

MODES = {1: "L", 3: "RGB"}
CHUNK = 64
UNREADABLE = "unreadable-image"

Array = npt.NDArray[np.uint8]
Decoded = Sequence["Array | GeomsslError"]


@dataclass(frozen=True)
class Decoding:
    """How a file becomes pixels. size: crop to the centred square and resize to this side. channels: 1 grey, 3 RGB."""

    size: int | None = None
    channels: int | None = None


@dataclass
class Pixels:
    """The pixels of some files below the folder `where`, decoded while they are iterated.

    Iterating yields uint8 (k, C, size, size) in the order of the files, without those that cannot be read; these are
    then in `unreadable` (row, why). All others must be square and of one shape, and not all of one colour.
    """

    paths: Sequence[Path]
    how: Decoding
    where: Path
    shape: tuple[int, int, int] = field(init=False)
    unreadable: list[tuple[int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model, image = self._first()
        self.shape = image.shape

    def _first(self) -> tuple[Path, Array]:
        """The first file that can be read, and its pixels: the others must be like it."""
        said = ""
        for path in self.paths:
            try:
                return path, read(path, self.how)
            except GeomsslError as error:
                if error.reason != UNREADABLE:
                    raise
                said = said or error.given
        raise GeomsslError(f"{said}, nor any other of {len(self.paths)} files", "a whole image file", reason=UNREADABLE)

    def __iter__(self) -> Iterator[Array]:
        # Pillow's decoders release the interpreter lock, so threads decode side by side and nothing is pickled.
        workers = min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        chunks = -(-len(self.paths) // CHUNK)
        colour, equal = None, True
        pool = ThreadPoolExecutor(workers)
        try:
            for start, images in track(self._decoded(pool, 2 * workers), f"reading {self.where.name}", chunks):
                chunk = self._whole(start, images)
                if len(chunk):
                    colour = chunk[0, 0, 0, 0] if colour is None else colour
                    equal = equal and bool((chunk == colour).all())
                    yield chunk
        finally:
            pool.shutdown(cancel_futures=True)
        if equal:
            given = f"all {len(self.paths)} images below {self.where} are one equal colour"
            raise GeomsslError(given, "images that differ", reason="bad-image")

    def _decoded(self, pool: ThreadPoolExecutor, ahead: int) -> Iterator[tuple[int, Decoded]]:
        """Chunks in the order of the files, at most `ahead` of them decoded before they are asked for."""
        waiting: deque[tuple[int, Future[Decoded]]] = deque()
        for start in range(0, len(self.paths), CHUNK):
            waiting.append((start, pool.submit(self._chunk, start)))
            if len(waiting) > ahead:
                begun, future = waiting.popleft()
                yield begun, future.result()
        for begun, future in waiting:
            yield begun, future.result()

    def _chunk(self, start: int) -> Decoded:
        found: list[Array | GeomsslError] = []
        for path in self.paths[start : start + CHUNK]:
            try:
                found.append(read(path, self.how))
            except GeomsslError as error:
                found.append(error)
        return found

    def _whole(self, start: int, images: Decoded) -> Array:
        """The images of a chunk stacked; raises for the first that is unlike the others."""
        kept = []
        for row, image in enumerate(images, start):
            if isinstance(image, GeomsslError):
                if image.reason != UNREADABLE:
                    raise image
                self.unreadable.append((row, image.given))
                continue
            if image.shape != self.shape:
                (c, h, w), (c0, h0, w0) = image.shape, self.shape
                raise GeomsslError(
                    f"{self.paths[row]} is {h}x{w} with {c} channels", f"{h0}x{w0} with {c0} as {self.model.name} (or "
                    "--set dataset.size=N and dataset.channels=1 or 3)", reason="bad-image",
                )
            kept.append(image)
        return np.stack(kept) if kept else np.empty((0, *self.shape), np.uint8)


def read(path: Path, how: Decoding) -> Array:
    """uint8 (C, H, W) of one file. Raises GeomsslError: reason "unreadable-image" where it is no whole image file,
    "bad-image" where its pixels are not what is asked for."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            opened.load()
            image = opened.copy()
    except Exception as error:  # Pillow's plugins raise nearly anything on damaged bytes
        raise GeomsslError(f"cannot read {path}: {error}", "a whole image file", reason=UNREADABLE) from None
    if image.mode == "F":
        said = "has NaN pixels" if np.isnan(np.asarray(image)).any() else "has floating-point pixels"
        raise GeomsslError(f"{path} {said}", "8-bit pixels", reason="bad-image")
    if image.mode.startswith("I"):
        raise GeomsslError(f"{path} has {image.mode} pixels", "8-bit pixels", reason="bad-image")
    if how.channels is not None:
        image = image.convert(MODES[how.channels])
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
    if how.size is not None:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((how.size,) * 2, Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    elif width != height:
        raise GeomsslError(f"{path} is {height}x{width}", "square images, or --set dataset.size=N", reason="bad-image")
    array = np.asarray(image)
    return np.ascontiguousarray(array.reshape(*array.shape[:2], -1).transpose(2, 0, 1))
