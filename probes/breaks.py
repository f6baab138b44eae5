"""The rules: which calls of a pass must break which move, said in words, and for which sizes of the image they would not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from geomssl.probes.filters import SYMMETRIC
from geomssl.probes.static import Call, Move, Pair
from geomssl.transforms.base import Size, Transform
from geomssl.transforms.geometric import HorizontalFlip, Translate
from geomssl.transforms.groups import CyclicRotations, Dihedral, Flips, Translations

# Sizes are tried over one period of the strides, and over a second one to see that it is a period.
LONGEST = 512


def moves(transform: Transform) -> tuple[Move, ...]:
    """The moves that the rules know and that make up the transform, or a part of it; none for what only resamples."""
    if isinstance(transform, (Flips, HorizontalFlip)):
        return ("mirror",)
    if isinstance(transform, (CyclicRotations, Dihedral)):
        turns = transform.order // 2 if isinstance(transform, Dihedral) else transform.order
        turn: tuple[Move, ...] = ("90°",) if turns % 4 == 0 else ("180°",) if turns % 2 == 0 else ()
        return (*turn, "mirror") if isinstance(transform, Dihedral) else turn
    return ("shift",) if isinstance(transform, (Translations, Translate)) else ()


@dataclass(frozen=True)
class Break:
    """Why a call must break a move: cause (grid, filters, padding, stride, places or unread), and part of a sentence."""

    cause: str
    words: str


def breaks(call: Call, move: Move) -> list[Break]:
    """Why f(T x) = Γ f(x) cannot hold for this call under a move of its input's grid; empty where the rules find nothing.

    Turns and mirrors: output i of a window layer starts at s i - p. Its windows lie alike from both ends when
    n + 2 p - d (k - 1) - 1 = s (m - 1), with m outputs and p the padding before; a quarter turn asks it of both axes, with
    the same window, and asks the filters to be their own turned selves. Adaptive average pools always lie alike.
    Shifts are wrapped and go by multiples of the total stride: the windows must read across the seam, m s = n.
    """
    if call.what == "position":
        return [Break("places", "it adds what depends on the place")]
    if call.what == "linear over places":
        return [Break("places", f"it weighs each of {call.size_in[0]}x{call.size_in[1]} places by itself")]
    if call.what == "unread":
        return [Break("unread", f"{call.name} takes {_by(call.size_in)} to {_by(call.size_out)}; the reader does not know it")]
    if not call.grid:
        return []
    found = _shifted(call) if move == "shift" else _turned(call, move)
    share = call.asymmetry.get(move, 0.0) if move != "shift" else 0.0
    if share > SYMMETRIC:
        found.append(Break("filters", f"its filters are not their own {_selves(move)} ({share:.2g}; unrelated ones: 1)"))
    return found


def _turned(call: Call, move: Move) -> list[Break]:
    axes = (1,) if move == "mirror" else (0, 1)
    found = []
    if move == "90°" and not call.whole and _differs(call):
        found.append(Break("grid", "its window is not the same along both axes"))
    for axis in axes:
        if not aligned(call, axis):
            found.append(Break("grid", _left_over(call, axis)))
            break
    return found


def _differs(call: Call) -> bool:
    pairs = (call.kernel, call.stride, call.dilation, call.before, call.size_in, call.size_out)
    return any(a != b for a, b in pairs)


def aligned(call: Call, axis: int, size: int | None = None, out: int | None = None) -> bool:
    """Do the windows of a grid call lie alike from both ends of that axis, at its own size or at another one?"""
    n, m = (call.size_in[axis], call.size_out[axis]) if size is None or out is None else (size, out)
    if call.adaptive:
        return True
    if call.name == "interpolate":
        return not call.mode.startswith("nearest") or m % n == 0
    if call.name == "conv_transpose2d":
        return call.before[axis] == call.after[axis]
    k, s, d, p = (v[axis] for v in (call.kernel, call.stride, call.dilation, call.before))
    return n + 2 * p - d * (k - 1) - 1 == s * (m - 1)


def _left_over(call: Call, axis: int) -> str:
    if call.name in ("interpolate", "conv_transpose2d"):
        return f"{call.what} does not lie alike from both ends of {call.size_in[axis]} pixels"
    k, s, d, p = (v[axis] for v in (call.kernel, call.stride, call.dilation, call.before))
    over = call.size_in[axis] + 2 * p - d * (k - 1) - 1 - s * (call.size_out[axis] - 1)
    if call.before[axis] != call.after[axis]:
        return f"it pads unevenly, {call.before[axis]} before and {call.after[axis]} after"
    kept = f"{abs(over)} pixel{'s' if abs(over) > 1 else ''}"
    how = f"leaves {kept} over at the far end" if over > 0 else f"overruns the far end by {kept}"
    return f"stride {s} on {_by(call.size_in)} {how}"


def _shifted(call: Call) -> list[Break]:
    found = []
    for axis in (0, 1):
        n, m = call.size_in[axis], call.size_out[axis]
        if call.whole:
            continue
        if call.adaptive:
            if n % m:
                found.append(Break("grid", f"its windows differ in size: {n} pixels to {m}"))
        elif call.name == "interpolate":
            if not (call.mode == "nearest" and m % n == 0):
                found.append(Break("padding", f"{call.mode} interpolation does not read across the seam"))
        elif call.name == "conv_transpose2d":
            if call.kernel[axis] > call.stride[axis] or call.before[axis]:
                found.append(Break("padding", "a transposed convolution does not write across the seam"))
        else:
            found += _window_shift(call, axis, n, m)
        if found:
            break
    if call.name not in ("conv_transpose2d", "interpolate") and not call.whole and max(call.down) > 1:
        whole = max(round(r * s) for r, s in zip(call.reach, call.down, strict=True))
        found.append(Break("stride", f"stride {max(call.down)}: only shifts by multiples of {whole} pixels land on its grid"))
    return found


def _window_shift(call: Call, axis: int, n: int, m: int) -> list[Break]:
    k, s, d, p = (v[axis] for v in (call.kernel, call.stride, call.dilation, call.before))
    across = p > 0 or s * (m - 1) - p + d * (k - 1) > n - 1
    if across and call.mode != "circular":
        said = {"": "no padding", "lowest": "padding", "zeros": "zero padding"}.get(call.mode, f"{call.mode} padding")
        return [Break("padding", f"{said} at the border: its windows do not read across the seam")]
    if m * s != n:
        if call.mode != "circular" and s == 1:
            return [Break("padding", f"no padding: {n} pixels become {m}, and none of them read across the seam")]
        return [Break("grid", f"stride {s} on {_by(call.size_in)} gives {m}, and {m} times {s} is not {n}")]
    return []


def border(call: Call) -> float:
    """The share of a window layer's outputs whose windows reach into the padding."""
    inside = 1.0
    for axis in (0, 1):
        n, m = call.size_in[axis], call.size_out[axis]
        k, s, d, p = (v[axis] for v in (call.kernel, call.stride, call.dilation, call.before))
        inside *= sum(s * i >= p and s * i - p + d * (k - 1) <= n - 1 for i in range(m)) / m
    return 1 - inside


def needed(breaks_found: Sequence[Break], grid_only: bool = False) -> list[Break]:
    """Those that make the move fail; a stride alone does not, since shifts by its multiples remain."""
    return [b for b in breaks_found if b.cause != "stride" and not (grid_only and b.cause == "filters")]


def exact(calls: Sequence[Call], move: Move, amount: Pair = (0, 0)) -> bool:
    """Do the rules predict f(T x) = Γ f(x) for the whole pass? amount: the pixels (dy, dx) of a shift."""
    if any(needed(breaks(call, move)) for call in calls):
        return False
    if move != "shift":
        return True
    return all(
        a % (r * s) == 0
        for call in calls if call.grid and not call.whole and call.size_in != (1, 1)
        for a, r, s in zip(amount, call.reach, call.down, strict=True)
    )


def sizes(calls: Sequence[Call], move: Move, upto: Call | None = None) -> tuple[str, int | None]:
    """For which sizes of a square image the grids lie as the move asks, of all calls or of one and those before it:
    ("H ≡ 1 mod 8", 33).

    The number is the nearest such size, or None where there is none within two periods of the strides. An adaptive pool whose
    target is a number keeps it; another one is taken to follow the size, as n / r rounded up.
    """
    by_number = {c.number: c for c in calls}
    asked = [c for c in calls if c.grid] if upto is None else _before(upto, by_number)
    if not asked:
        return "every size", None
    start = _image_size(calls)
    period = math.lcm(*(max(1, round(r * s)) for call in asked for r, s in zip(call.reach, _steps(call), strict=True)))
    if period > LONGEST or start is None or any(call.what == "unread" for call in calls):
        return "not worked out", None

    def good(n: int) -> bool:
        known: dict[int | None, int] = {None: n}
        return all(_fits(call, _sized(call, by_number, known), move) for call in asked)

    base = start + 2 * period
    fits = [good(base + i) for i in range(2 * period)]
    if fits[:period] != fits[period:]:
        return "not worked out", None
    if all(fits):
        return "every size", start
    if not any(fits):
        return "no size", None
    modulus = next(q for q in range(1, period + 1) if period % q == 0 and all(fits[i] == fits[i % q] for i in range(period)))
    residues = sorted((base + i) % modulus for i in range(modulus) if fits[i])
    said = " or ".join(str(r) for r in residues[:4]) + (" or ..." if len(residues) > 4 else "")
    around = sorted(range(max(1, start - period), start + 2 * period + 1), key=lambda n: (abs(n - start), -n))
    near = next((n for n in around if n % modulus in residues and good(n)), None)
    return f"H ≡ {said} mod {modulus}", near


def _steps(call: Call) -> Pair:
    """Strides as they are at another size, where a pool over the whole map may be none."""
    return call.down if call.adaptive else call.stride if "pool" in call.name else call.down


def _before(call: Call, by_number: dict[int, Call]) -> list[Call]:
    """The grid calls through which the image came to this one's output."""
    source = call.source
    return ([] if source is None else _before(by_number[source], by_number)) + ([call] if call.grid else [])


def _image_size(calls: Sequence[Call]) -> int | None:
    first = next((c for c in calls if c.grid and c.source is None), None)
    return None if first is None or first.size_in[0] != first.size_in[1] else first.size_in[1]


def _sized(call: Call, by_number: dict[int, Call], known: dict[int | None, int]) -> tuple[int, int]:
    """Input and output size along x of a grid call, when the image has known[None] pixels."""
    if call.source not in known:
        known[call.source] = _sized(by_number[call.source], by_number, known)[1]  # type: ignore[index]
    n = known[call.source]
    k, s, d, p, q = (v[1] for v in (call.kernel, call.stride, call.dilation, call.before, call.after))
    before, after = call.size_in[1], call.size_out[1]
    if call.adaptive and call.whole:
        return n, 1
    if call.adaptive:
        ratio = max(1, round(before / after))
        return n, (-(-n // ratio) if after == -(-before // ratio) else after)
    if call.name == "interpolate":
        return n, n * after // before
    if call.name == "conv_transpose2d":
        return n, (n - 1) * s - p - q + d * (k - 1) + 1
    room, traced = n + p + q - d * (k - 1) - 1, before + p + q - d * (k - 1) - 1
    up = after > traced // s + 1
    return n, (-(-room // s) if up else room // s) + 1


def _fits(call: Call, found: Size, move: Move) -> bool:
    n, m = found
    if move != "shift":
        return aligned(call, 1, n, m)
    if (call.adaptive and call.whole) or call.name in ("interpolate", "conv_transpose2d"):
        return True
    return n % m == 0 if call.adaptive else m * call.stride[1] == n or call.stride[1] == 1


def _selves(move: Move) -> str:
    return "mirror images" if move == "mirror" else f"selves turned by {move}"


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
