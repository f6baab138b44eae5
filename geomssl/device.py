"""Which device, number type, precision and compiler were asked for, and whether this machine has them."""

from __future__ import annotations

import warnings

import torch

from geomssl.errors import GeomsslError, unknown

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
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


def precision(name: str, where: torch.device) -> torch.dtype | None:
    """The number type that autocast uses for a training precision; None for float32 and tf32, which need no autocast.

    Raises GeomsslError (reason "no-precision") where the device lacks it, found by its own word and by one small
    convolution. On cuda this also decides TensorFloat-32 for the whole process: off, unless the name is "tf32".
    """
    if where.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"
    if name == "tf32" and (where.type != "cuda" or torch.cuda.get_device_capability(where) < (8, 0)):
        raise _lacks(name, where)
    if name not in HALF:
        return None
    if name == "bf16" and where.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise _lacks(name, where)
    try:
        with warnings.catch_warnings(), torch.no_grad(), torch.autocast(where.type, dtype=HALF[name]):
            warnings.simplefilter("error")
            ones = torch.ones(1, 1, 3, 3, device=where, dtype=torch.float32)
            probe = torch.nn.functional.conv2d(ones, ones)
    except (RuntimeError, UserWarning):
        raise _lacks(name, where) from None
    if probe.dtype != HALF[name]:
        raise _lacks(name, where)
    return HALF[name]


def _lacks(name: str, where: torch.device) -> GeomsslError:
    return GeomsslError(
        f"precision = {name} on {where}, which lacks it", "float32, which every device has, or another device",
        reason="no-precision",
    )


def compiler(where: torch.device) -> None:
    """Raise GeomsslError (reason "no-compiler") where torch.compile cannot work, found by compiling one addition."""
    try:
        torch.compile(lambda x: x + 1, dynamic=False)(torch.zeros(4, device=where))
    except Exception as error:
        raise no_compile(error) from error


def no_compile(error: Exception) -> GeomsslError:
    """The one line for an error of torch.compile."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return GeomsslError(f"compile = true fails: {said}", "compile = false, or a machine where torch.compile works",
                        reason="no-compiler")
