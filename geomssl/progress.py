"""Progress on stderr: what, how far, how long still. Silent off a terminal and under --quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
_bars: Any = None


@contextmanager
def shown(enabled: bool = True) -> Iterator[None]:
    """Show the bars of every `track` inside the block, where stderr is a terminal."""
    global _bars
    if not enabled or not sys.stderr.isatty() or _bars is not None:
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(),
    ) as bars:
        _bars = bars
        try:
            yield
        finally:
            _bars = None


def track(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The items, with a bar that says `what` while they are consumed."""
    if _bars is None:
        yield from items
        return
    task = _bars.add_task(what, total=total if total is not None else len(items))  # type: ignore[arg-type]
    try:
        for item in items:
            yield item
            _bars.advance(task)
    finally:
        _bars.remove_task(task)
