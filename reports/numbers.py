"""How a figure is written: three digits that count, its interval beside it, and how many images it rests on."""

from __future__ import annotations

import math
from typing import Any

from geomssl.artifact import Interval, Metric


def number(value: Any) -> str:
    """0.913, 12.3, 1797, 3.1e-7. Whole numbers stay whole; None is a dash."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if value == 0 or isinstance(value, int):
        return str(int(value))
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:#.3g}".rstrip(".") if abs(value) < 1000 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def bounds(interval: Interval | None) -> str:
    """[0.880, 0.941], or nothing."""
    return "" if interval is None else f"[{number(interval.low)}, {number(interval.high)}]"


def figure(metric: Metric) -> str:
    """0.913 [0.880, 0.941], n=360, with the unit where there is one."""
    unit = f" {metric.unit}" if metric.unit and metric.value is not None else ""
    parts = [f"{number(metric.value)}{unit}", bounds(metric.interval)]
    text = " ".join(p for p in parts if p)
    return text if metric.n is None else f"{text}, n={metric.n}"
