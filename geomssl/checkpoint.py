"""run.pt: tensors and plain types only, read with weights_only=True, replaced whole. It owns the folder of its name."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from geomssl import files
from geomssl.errors import GeomsslError, nearest

FORMAT = 1
KEYS = {"format", "kind", "weights", "optimizer", "schedule", "scaler", "step", "epoch", "config", "history"}
KIND = "geomssl-run"


def folder(path: Path | str) -> Path:
    """The folder that a checkpoint owns: run.pt owns run/."""
    return Path(path).with_suffix("")


def save(path: Path | str, state: dict[str, Any]) -> None:
    """Replace the checkpoint by `state`, all of it or nothing."""
    # in memory first: torch's own writer says of a full disk only that a position is unexpected
    whole = io.BytesIO()
    torch.save({"format": FORMAT, "kind": KIND, **state}, whole)
    files.write(path, whole.getvalue())


def load(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint on the CPU. Nothing in it is executed.

    Raises GeomsslError for: no such file, not a checkpoint, one cut short, one with a pickled object, a newer format.
    """
    path = located(path)
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            head = file.read(4)
        said = "is cut short or damaged" if head == b"PK\x03\x04" else "is not a checkpoint"
        raise GeomsslError(f"{path} {said}", "a whole run.pt written by geomssl train", reason="damaged")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = str(error).partition("GLOBAL ")[2].split()
        raise GeomsslError(
            f"{path} holds a pickled object{f' ({found[0]})' if found else ''}, which was not executed",
            "tensors and plain types only", reason="pickled-object",
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise GeomsslError(
            f"{path} is cut short or damaged: {str(error).splitlines()[0]}", "a whole run.pt", reason="damaged"
        ) from None
    if not isinstance(state, dict) or state.get("kind") != KIND or not isinstance(state.get("format"), int):
        expected = "a run.pt written by geomssl train"
        raise GeomsslError(f"{path} is not a geomssl checkpoint", expected, reason="not-a-checkpoint")
    if state["format"] > FORMAT:
        raise GeomsslError(
            f"{path} has format {state['format']}", f"at most {FORMAT}: a newer geomssl wrote it", reason="newer-format"
        )
    missing = KEYS - set(state)
    if missing:
        raise GeomsslError(f"{path} lacks {', '.join(sorted(missing))}", "a whole run.pt", reason="damaged")
    return state


def located(path: Path | str) -> Path:
    """The checkpoint file that was meant: the file itself, or the one that owns the named folder."""
    path = Path(path)
    if path.is_dir() and path.with_suffix(".pt").is_file():
        path = path.with_suffix(".pt")
    if path.is_dir():
        raise GeomsslError(f"{path} is a folder", "a checkpoint file run.pt", reason="no-file")
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.pt")] if path.parent.is_dir() else []
        raise GeomsslError(f"no such file: {path}", "a checkpoint run.pt", nearest(path.name, beside), reason="no-file")
    return path


def digest(path: Path | str) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]
