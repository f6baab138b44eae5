"""Rendering `views`: images a second at 64x64, beside the 150 that are asked for: `python benchmarks/views_data.py`."""

from __future__ import annotations

import argparse
import statistics

import torch
from harness import seconds, synchronise


def rate(n: int, size: int, rounds: int, where: torch.device) -> list[float]:
    """Images a second in each round, of scenes as `views` draws them, after one round that is not timed."""
    from geomssl import data

    source = data.load("views", "train", n=n, size=8)
    view = source.view.to(where, torch.float32)
    source.objects, source.backgrounds = source.objects.to(where), source.backgrounds.to(where)
    rows = torch.arange(n, device=where)

    def draw() -> None:
        from geomssl.data.raytrace import render

        render(source.objects[rows].float(), view, source.backgrounds[rows].float(), size)
        synchronise()

    draw()
    return [n / seconds(draw) for _ in range(rounds)]


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
    low, middle, high = min(found), statistics.median(found), max(found)
    print(
        f"views at {given.size}x{given.size} on {given.device}, {given.threads} threads: {middle:.0f} images/s "
        f"(median of {given.rounds} rounds of {given.n}; {low:.0f} to {high:.0f}); asked: 150 on two cores, ratio {middle / 150:.2f}"
    )


if __name__ == "__main__":
    main()
