"""Timing two ways of doing one thing, turn and turn about in one run, so that a busy machine slows both."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One claim: what was compared, the median seconds of each, their ratio with its spread over rounds, and the target."""

    what: str
    ours: float
    peer: float
    against: str
    ratio: float
    low: float
    high: float
    rounds: int
    target: str = ""

    def cells(self) -> list[str]:
        return [
            self.what, _seconds(self.ours), self.against, _seconds(self.peer), f"{self.ratio:.2f}",
            f"{self.low:.2f}–{self.high:.2f}", str(self.rounds), self.target,
        ]


HEAD = ["what", "ours", "against", "theirs", "ratio", "quartiles of the ratio", "rounds", "asked"]


def duel(
    what: str, ours: Callable[[], Any], against: str, peer: Callable[[], Any], rounds: int = 15, target: str = "",
    warm: int = 2,
) -> Row:
    """Time both in turn, `rounds` times each, after `warm` untimed calls. ratio = peer / ours in each round: above 1, ours
    is faster. Order alternates, and the garbage collector waits until the round is over.
    """
    for _ in range(warm):
        ours()
        peer()
    pairs: list[tuple[float, float]] = []
    for number in range(rounds):
        first, second = (ours, peer) if number % 2 == 0 else (peer, ours)
        a, b = seconds(first), seconds(second)
        pairs.append((a, b) if number % 2 == 0 else (b, a))
    ratios = sorted(b / a for a, b in pairs)
    low, _, high = statistics.quantiles(ratios, n=4)
    return Row(
        what, statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs), against,
        statistics.median(ratios), low, high, rounds, target,
    )


def seconds(call: Callable[[], Any]) -> float:
    """One timed call; on a GPU, until it has finished."""
    gc.collect()
    gc.disable()
    try:
        synchronise()
        start = time.perf_counter()
        call()
        synchronise()
        return time.perf_counter() - start
    finally:
        gc.enable()


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
