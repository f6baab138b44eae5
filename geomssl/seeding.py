"""Random draws: generators derived from (seed, purpose, epoch, step), and one guard for libraries with global state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive(seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed that depends on every argument: SHA-256 of "seed/purpose/c0/c1/...". The same on every machine."""
    text = "/".join([str(int(seed)), purpose, *(str(int(c)) for c in counters)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator for one purpose at one moment. Drawing on the CPU keeps draws equal across devices."""
    return torch.Generator().manual_seed(derive(seed, purpose, *counters))


@contextmanager
def seeded(seed: int, purpose: str, *counters: int) -> Iterator[int]:
    """Seed the global generators of torch, numpy and random inside the block, and restore them after it.

    For initialisation, dropout and libraries that know no other way. Yields a 32-bit seed to hand to such a library.
    """
    value = derive(seed, purpose, *counters)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
    try:
        yield value % 2**32
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)
