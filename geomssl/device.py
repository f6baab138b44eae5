"""Which device and which number type were asked for, and whether this machine has them."""

from __future__ import annotations

import torch

from geomssl.errors import GeomsslError, unknown

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def device(name: str = "auto") -> torch.device:
    """"auto" is the first of cuda, mps and cpu that is there; else cpu, cuda, cuda:N or mps, or a GeomsslError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdigit()):
        raise unknown("device", name, ["auto", "cpu", "cuda", "cuda:0", "mps"])
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}[kind]
    if int(number or 0) >= there:
        raise GeomsslError(f"--device {name}", f"a device of this machine ({there} of kind {kind})", reason="no-device")
    return torch.device(name)


def dtype(name: str = "float32") -> torch.dtype:
    """float32 or float64."""
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]
