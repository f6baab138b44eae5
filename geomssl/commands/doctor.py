"""geomssl doctor: what this machine has, and what is wrong with it, each problem with what to do."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import click

from geomssl.errors import GeomsslError
from geomssl.registry import BUILTIN, names

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "firefox", "open", "xdg-open")
# a run of a ResNet-18 with its artifacts takes some 100 MB
ROOM = 2**30


@dataclass(frozen=True)
class Finding:
    """One line. note: something that is not there and need not be. problem: something to mend, with `do`."""

    area: str
    said: str
    level: Literal["ok", "note", "problem"] = "ok"
    do: str = ""

    def __str__(self) -> str:
        mark = {"ok": " ", "note": "-", "problem": "!"}[self.level]
        return f"{mark} {self.area:<12} {self.said}" + (f": {self.do}" if self.do else "")


def examine(out: Path) -> list[Finding]:
    """Every finding about this machine and the folder `out`. A check that breaks is a problem itself, and stops no other."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("versions", _versions), ("devices", _devices), ("threads", _threads), ("precision", _precisions),
        ("data sets", _datasets), ("browser", _browser), ("disk", lambda: _disk(out)), ("entry points", _entries),
    ]
    found: list[Finding] = []
    for area, check in checks:
        try:
            found += check()
        except Exception as error:
            said = (str(error).splitlines() or [""])[0]
            found.append(Finding(area, f"this check broke: {type(error).__name__}: {said}", "problem", "mend what it names"))
    return found


def _versions() -> Iterator[Finding]:
    """geomssl, Python and what geomssl needs, as its own metadata lists it; extras where they are there."""
    own = metadata.version("geomssl")
    yield Finding("versions", f"geomssl {own}, Python {platform.python_version()}, {platform.platform()}")
    there, missing = [], []
    for text in metadata.requires("geomssl") or []:
        matched = re.match(r"([\w.-]+)\s*(?:>=\s*([\w.]+))?", text)
        if matched is None:
            continue
        name, least = matched.groups()
        extra = re.search(r"extra\s*==\s*['\"](\w+)['\"]", text)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if extra is None:
                yield Finding("versions", f"{name} is not installed", "problem", f"pip install '{matched[0]}'")
            else:
                missing.append(f"{name} ({extra[1]})")
            continue
        if least and _numbers(version) < _numbers(least):
            do = f"pip install --upgrade '{name}>={least}'"
            yield Finding("versions", f"{name} {version}, older than {least}", "problem", do)
        elif extra is None:
            there.append(f"{name} {version}")
    yield Finding("versions", ", ".join(there))
    if missing:
        yield Finding("versions", f"not installed, of the extras: {', '.join(missing)}", "note", "pip install 'geomssl[EXTRA]'")


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13): what compares, without trailing zeros and without a local or a pre-release part."""
    leading = re.match(r"\d+(?:\.\d+)*?(?=(?:\.0+)*(?![.\d]))", version)
    return tuple(int(part) for part in leading[0].split(".")) if leading else ()


def _devices() -> Iterator[Finding]:
    import torch

    from geomssl.device import device

    chosen = device("auto")
    yield Finding("devices", f"--device auto is {chosen}")
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        memory = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        said = f"cuda:{number} {about.name}, {memory}, compute capability {about.major}.{about.minor}"
        full = free < total / 10
        yield Finding("devices", said, "problem" if full else "ok", "another process fills it: see nvidia-smi" if full else "")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        if built and shutil.which("nvidia-smi"):
            yield Finding(
                "devices", f"torch was built for CUDA {built}, but finds no GPU", "problem",
                "compare the driver (nvidia-smi) with that version, and CUDA_VISIBLE_DEVICES",
            )
        else:
            yield Finding("devices", f"no cuda (torch {'for CUDA ' + built if built else 'without CUDA'})", "note")


def _threads() -> Iterator[Finding]:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    said = f"torch uses {threads} on {cores} cores (OMP_NUM_THREADS {os.environ.get('OMP_NUM_THREADS', 'not set')})"
    if threads > cores:
        yield Finding("threads", said, "problem", f"export OMP_NUM_THREADS={cores}: threads that wait for each other are slow")
    else:
        yield Finding("threads", said)


def _precisions() -> Iterator[Finding]:
    import torch

    from geomssl.device import device, precision

    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for where in dict.fromkeys((device("auto"), device("cpu"))):
            lacks = []
            for name in ("tf32", "bf16", "fp16"):
                try:
                    precision(name, where)
                except GeomsslError:
                    lacks.append(name)
            has = [name for name in ("float32", "tf32", "bf16", "fp16") if name not in lacks]
            yield Finding("precision", f"{where}: {', '.join(has)}{'; not ' + ', '.join(lacks) if lacks else ''}")
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def _datasets() -> Iterator[Finding]:
    from geomssl import data

    place = os.environ.get("GEOMSSL_DATA")
    if place and not Path(place).expanduser().is_dir():
        yield Finding("data sets", f"GEOMSSL_DATA is {place}, no folder", "problem", "make it, or unset GEOMSSL_DATA")
        return
    present: list[str] = []
    absent: list[str] = []
    for name in names("dataset"):
        try:
            (present if data.presence(name).present else absent).append(name)
        except (ImportError, AttributeError) as error:
            yield Finding("data sets", f"{name}: {error}", "problem", "mend or remove the package that brings it")
    yield Finding("data sets", f"here: {', '.join(present) or 'none'}")
    if absent:
        yield Finding("data sets", f"not here: {', '.join(absent)}", "note", "geomssl datasets says where each comes from")


def _browser() -> Iterator[Finding]:
    found = [path for name in BROWSERS if (path := shutil.which(name))]
    if found:
        yield Finding("browser", f"{found[0]} can open a report")
    else:
        yield Finding("browser", "none found", "note", "copy report.html, one file, to a machine that has one")


def _disk(out: Path) -> Iterator[Finding]:
    from geomssl import files

    try:
        files.check(out / "run.pt")
    except GeomsslError as error:
        yield Finding("disk", error.given, "problem", f"give {error.expected} as --out")
        return
    there = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    said = f"{free / 2**30:.1f} GiB free at {out}"
    if free < ROOM:
        yield Finding("disk", said, "problem", f"make room for {ROOM / 2**30:.0f} GiB, or give another --out")
    else:
        yield Finding("disk", said)


def _entries() -> Iterator[Finding]:
    """Every name that other packages bring, imported once."""
    good = []
    for kind in BUILTIN:
        for entry in metadata.entry_points(group=f"geomssl.{kind}"):
            owner = entry.dist.name if entry.dist else "an unknown package"
            try:
                entry.load()
            except Exception as error:
                said = (str(error).splitlines() or [""])[0]
                yield Finding(
                    "entry points", f"{kind} {entry.name!r} of {owner} cannot be imported: {type(error).__name__}: {said}",
                    "problem", f"mend or uninstall {owner}",
                )
            else:
                good.append(f"{kind} {entry.name} ({owner})")
            if entry.name in BUILTIN[kind]:
                yield Finding(
                    "entry points", f"{kind} {entry.name!r} of {owner} is hidden by the built-in one", "problem",
                    "use it as package.module:attribute, or let its author rename it",
                )
    yield Finding("entry points", ", ".join(good) or "none from other packages")
    if not shutil.which("geomssl"):
        yield Finding("entry points", "no command geomssl on PATH", "note", f"{sys.executable} -m geomssl does the same")


@click.command()
@click.option("--out", default=".", show_default=True, metavar="DIR", help="where runs are to be written")
@click.option("--json", "as_json", is_flag=True, help="print the findings as JSON")
def doctor(out: str, as_json: bool) -> int:
    """What this machine has: versions, devices, threads, precision, data sets, browser, disk, entry points.

    A line each; "!" marks a problem and says what to do, "-" something that is not there and need not be.
    Exit codes: 0 no problem; 2 a problem.

    \b
    Example:
      geomssl doctor --out runs
    """
    found = examine(Path(out))
    problems = sum(one.level == "problem" for one in found)
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found], indent=1))
    else:
        click.echo("\n".join(map(str, found)))
        click.echo(f"{problems} problem{'' if problems == 1 else 's'}")
    return 2 if problems else 0
