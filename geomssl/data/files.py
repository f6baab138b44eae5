"""Files: a source larger than memory. Images decoded once into a cache on disk, then gathered from a memory map."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from geomssl.config import canonical
from geomssl.data.base import Source, Split
from geomssl.data.images import Pixels
from geomssl.data.places import locked
from geomssl.data.watch import Watch
from geomssl.errors import GeomsslError
from geomssl.files import sync_folder

FORMAT = 1
AHEAD = 2  # a trainer announces the next batch before it asks for this one


class Files(Source):
    """A Source whose pixels lie in one file of uint8 (n, C, size, size), mapped into memory.

    `images` is one gather, in threads of torch; on a CUDA device it fills pinned memory and copies without waiting.
    `prefetch(indices)` starts the gather of the next batch in a thread, so that `images(indices)` finds it done.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        cached: Cached,
        labels: Tensor | None,
        classes: Sequence[str] = (),
        factors: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.name, self.split = name, split
        self.labels = None if labels is None else labels.long()
        self.classes, self.factors = tuple(classes), dict(factors or {})
        self.channels, self.size, self.fingerprint = cached.shape[1], cached.shape[2], cached.fingerprint
        self.watch, self.notes = watch, tuple(notes)
        self.pixels = _mapped(cached)
        self.device = torch.device("cpu")
        self._kept = Watch([cached.path])
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[Tensor, Future[Tensor]]] = deque(maxlen=AHEAD)

    def __len__(self) -> int:
        return len(self.pixels)

    def images(self, indices: Tensor) -> Tensor:
        indices = indices.cpu()
        gathered = next((future for wanted, future in self._ahead if torch.equal(wanted, indices)), None)
        if gathered is not None:
            while self._ahead.popleft()[1] is not gathered:
                pass
        found = self._gather(indices) if gathered is None else gathered.result()
        return found.to(self.device, non_blocking=True)

    def prefetch(self, indices: Tensor) -> None:
        """Start to gather those images; the last two batches that were announced are kept until they are asked for."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="geomssl-prefetch")
        indices = indices.cpu()
        self._ahead.append((indices, self._thread.submit(self._gather, indices)))

    def _gather(self, indices: Tensor) -> Tensor:
        room = torch.empty((len(indices), *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        return torch.index_select(self.pixels, 0, indices, out=room)

    def to(self, device: torch.device | str) -> Files:
        moved = copy.copy(self)
        moved.device, moved._thread, moved._ahead = torch.device(device), None, deque(maxlen=AHEAD)
        return moved

    def check(self) -> None:
        """As Source.check; the cache, too, must be as it was."""
        super().check()
        self._kept.check()


class Cached:
    """One whole cache: `path` of the pixels, their `shape`, the `fingerprint` of them, and what could not be read."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        n, channels, height, width = about["shape"]
        self.path, self.shape = folder / "pixels.u8", (int(n), int(channels), int(height), int(width))
        self.fingerprint: str = about["fingerprint"]
        self.unreadable = [(int(row), str(why)) for row, why in about["unreadable"]]


def _mapped(cached: Cached) -> Tensor:
    # Read-only and shared: a private, writable map (torch.from_file) counts as memory that is needed, and is refused
    # where the file is larger than the memory. torch warns that nobody must write to it; nobody does.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.memmap(cached.path, np.uint8, "r", shape=cached.shape))


def cached(pixels: Pixels, watch: Watch, place: Path) -> Cached:
    """The cache of those pixels below the folder `place`: the one that is there, or a new one.

    Its name is a hash of the files' paths, sizes and times and of how they are decoded, so that a changed folder never
    meets an old cache. It is built in a sibling and renamed once whole. A second process waits for the first; what a
    process that died left behind is removed. Raises GeomsslError (reason "unwritable") where the disk is full.
    """
    name = _key(pixels, watch)
    folder = place / name
    with locked(place, name) as alone:
        found = _opened(folder)
        if found is None:
            if alone:
                for leftover in [folder, *place.glob(f".{name}.*.part")]:
                    shutil.rmtree(leftover, ignore_errors=True)
            _build(pixels, watch, folder)
            found = _opened(folder)
    assert found is not None
    return found


def _key(pixels: Pixels, watch: Watch) -> str:
    digest = hashlib.sha256(canonical([FORMAT, PIL.__version__, pixels.how.size, pixels.how.channels]).encode())
    for path in watch.paths:
        digest.update(os.fsencode(path.absolute()) + b"\0")
    digest.update(watch.stats.tobytes())
    return digest.hexdigest()[:24]


def _opened(folder: Path) -> Cached | None:
    """The cache in that folder, or None where there is none or it is not whole: a short file under a map kills a process."""
    try:
        found = Cached(folder, json.loads((folder / "about.json").read_text()))
        whole = found.path.stat().st_size == prod(found.shape)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if whole else None


def _build(pixels: Pixels, watch: Watch, folder: Path) -> None:
    wanted = len(pixels.paths) * prod(pixels.shape)
    free = shutil.disk_usage(folder.parent).free
    elsewhere = "room for it, or --set dataset.cache=DIR on another disk"
    if free < wanted:
        said = f"the cache of {pixels.where} needs {wanted / 2**30:.3g} GB, and {folder.parent} has {free / 2**30:.3g} GB left"
        raise GeomsslError(said, elsewhere, reason="unwritable")
    digest, n, part = hashlib.sha256(), 0, folder
    try:
        part = Path(tempfile.mkdtemp(".part", f".{folder.name}.", folder.parent))
        with open(part / "pixels.u8", "wb") as file:
            for chunk in pixels:
                file.write(chunk.data)
                digest.update(chunk.data)
                n += len(chunk)
            _sync(file)
        about = {
            "format": FORMAT, "from": str(pixels.where), "shape": [n, *pixels.shape], "fingerprint": digest.hexdigest()[:12],
            "unreadable": pixels.unreadable,
        }
        with open(part / "about.json", "w") as text:
            json.dump(about, text)
            _sync(text)
        watch.check()
        os.replace(part, folder)
        sync_folder(folder.parent)
    except OSError as error:
        if _opened(folder) is not None:  # where nothing locks, another process may have been faster
            return
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = f"cannot write the cache of {pixels.where} to {folder.parent}: {error.strerror}"
        raise GeomsslError(said, elsewhere if full else "a writable --set dataset.cache=DIR", reason="unwritable") from None
    finally:
        if part != folder:
            shutil.rmtree(part, ignore_errors=True)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
