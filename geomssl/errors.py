"""The one exception that the command line turns into one line: what was given, what was expected, the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GeomsslError(Exception):
    """A mistake in what was asked, not in the program.

    given:    what the caller gave, in the caller's own words ("--encoder resnt18", "cat.png").
    expected: what would have been accepted.
    nearest:  the nearest valid name, where there is one.
    reason:   a machine-readable word for exit code 2 ("bad-input", "unknown-name", "inconclusive", ...).
    """

    def __init__(self, given: str, expected: str, nearest: str | None = None, *, reason: str = "bad-input") -> None:
        self.given, self.expected, self.nearest, self.reason = given, expected, nearest, reason
        super().__init__(given, expected, nearest)

    def __str__(self) -> str:
        line = f"{self.given}; expected {self.expected}"
        if self.nearest:
            line += f"; did you mean {self.nearest!r}?"
        return " ".join(line.split())


class GeomsslNote(UserWarning):
    """What a person should know though nothing is wrong with the call. The command line says it once, as a note."""


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to `name`, or None when nothing is close."""
    folded = {v.lower(): v for v in valid}
    found = difflib.get_close_matches(str(name).lower(), folded, n=1, cutoff=0.5)
    return folded[found[0]] if found else None


def unknown(kind: str, name: str, valid: Iterable[str]) -> GeomsslError:
    """The error for a name that is not in a table."""
    valid = sorted(valid)
    return GeomsslError(
        f"unknown {kind} {name!r}", f"one of {', '.join(valid)}", nearest(name, valid), reason="unknown-name"
    )
