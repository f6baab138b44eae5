"""Modes of modules: eval mode for a while, and after it every module's own, by train() and not by its flag alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn


def of(*roots: nn.Module) -> dict[nn.Module, bool]:
    """Every module below the roots, parents first, and whether it is in training mode."""
    return {module: module.training for root in roots for module in root.modules()}


def restore(modes: Mapping[nn.Module, bool]) -> None:
    """Bring back what `of` found.

    By train(), since a module may do more there than set its flag: adapters merge their weights into those they adapt, and
    steerable convolutions keep their filters. Parents first, since train() passes a mode on; the flags last, since a train()
    of a module's own may hold parts of it in eval mode.
    """
    for module, mode in modes.items():
        if module.training != mode:
            module.train(mode)
    for module, mode in modes.items():
        module.training = mode


@contextmanager
def evaluating(*roots: nn.Module) -> Iterator[None]:
    """Eval mode inside the block for everything below the roots, and each module's own mode after it."""
    kept = of(*roots)
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        restore(kept)
