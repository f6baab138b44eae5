"""Run the benchmarks and print one Markdown table: `python benchmarks/run.py [NAME ...] [-o FILE]`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import platform
import sys
from pathlib import Path

import torch
from harness import HEAD, table

# torchvision's wheel beside the CPU build of torch, which lacks the schemas of two of its operators
if importlib.util.find_spec("torchvision") and not torch.cuda.is_available():
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

BENCHMARKS = (
    "views", "step", "group_conv", "backbones", "saliency", "negatives", "equivariance", "lie", "geometry", "jacobians",
    "objectives",
    "scheduled", "peers",
)


def machine() -> str:
    """The machine in words: processor, threads, GPU."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        name = lines[0] if lines else name
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    versions = f"torch {torch.__version__.partition('+')[0]}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads{gpu}; {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}  [default: all]")
    parser.add_argument("-o", "--out", help="append the table to this file as well")
    parser.add_argument("--threads", type=int, default=2, help="threads of every library  [default: 2]")
    given = parser.parse_args()
    unknown = set(given.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {sorted(unknown)[0]!r}; expected one of {', '.join(BENCHMARKS)}")
    torch.set_num_threads(given.threads)
    command = " ".join(["python benchmarks/run.py", *given.names])
    parts = [f"Machine: {machine()}.", f"Command: `{command}`."]
    rows = []
    for name in given.names or BENCHMARKS:
        for row in importlib.import_module(name).main():
            rows.append(row.cells())
            print(" | ".join(row.cells()), file=sys.stderr, flush=True)
    text = "\n\n".join([*parts, table(HEAD, rows)]) + "\n"
    print(text)
    if given.out:
        with open(given.out, "a", encoding="utf-8") as file:
            file.write("\n" + text)


if __name__ == "__main__":
    main()
