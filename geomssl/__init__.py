"""geomssl: trains self-supervised image models and measures what the training did to their geometry.

Names are imported when they are first used, so that `import geomssl` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "GeomsslError": "geomssl.errors",
    "Artifact": "geomssl.artifact",
}
__all__ = ["GeomsslError", "Artifact", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
