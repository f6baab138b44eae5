"""Rendering `views`: images a second at 64x64, beside the 150 that are asked for: `python benchmarks/views_data.py`."""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from harness import seconds


def rate(n: int, size: int, rounds: int, where: torch.device) -> list[tuple[float, float]]:
    """Images a second, and a second of processor time, in each round, of scenes as `views` draws them."""
    from geomssl import data
    from geomssl.data.raytrace import render

    source = data.load("views", "train", n=n, size=8)
    scene = [values.to(where, torch.float32) for values in (source.objects, source.view, source.backgrounds)]

    def draw() -> None:
        render(*scene, size)

    draw()
    found = []
    for _ in range(rounds):
        busy = time.process_time()
        passed = seconds(draw)
        found.append((n / passed, n / (time.process_time() - busy)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    found = rate(given.n, given.size, given.rounds, torch.device(given.device))
    speeds, per_core = zip(*found, strict=True)
    print(f"views at {given.size}x{given.size} on {given.device}, {given.threads} threads, {given.rounds} rounds of {given.n}:")
    for what, values in (("images a second", speeds), ("images a second of processor time", per_core)):
        print(f"{what}: {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}); asked: 150 on two cores")


if __name__ == "__main__":
    main()
