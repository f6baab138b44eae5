"""A pytest plugin: the fixture `assert_equivariant`, the marker `equivariance`, and a summary of every error measured.

    @pytest.mark.equivariance(transform="c4", tolerance=1e-3)
    def test_turns(assert_equivariant):
        assert_equivariant(make_model())

An option is taken from the call, else from the marker, else from the ini keys. What was measured goes into the terminal's
summary and, as properties, into --junit-xml. At import this needs the standard library and pytest only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

# ini key -> (option, default, from text, help)
INI: dict[str, tuple[str, str, Callable[[str], Any], str]] = {
    "equivariance_transform": ("transform", "c4", str, "assert_equivariant: the transform, c4 unless given"),
    "equivariance_tolerance": ("tolerance", "", float, "assert_equivariant: the largest error allowed"),
    "equivariance_n": ("n", "", int, "assert_equivariant: images to draw where none are given"),
    "equivariance_seed": ("seed", "", int, "assert_equivariant: the seed of every draw"),
}
# What assert_equivariant and equivariance_error can be told, by name, so that a mistake is found before torch is imported.
OPTIONS = (
    "transform", "tolerance", "images", "action", "params", "n", "in_channels", "size", "seed", "geometry", "boundary",
    "reference", "clusters", "level", "resamples", "batch_size", "share",
)
PREFIX = "equivariance"


def pytest_addoption(parser: Any) -> None:
    for key, (_, default, _, about) in INI.items():
        parser.addini(key, about, default=default)


def pytest_configure(config: Any) -> None:
    config.addinivalue_line(
        "markers", "equivariance(transform, tolerance, action, n, ...): options of the fixture assert_equivariant"
    )


def _fixture(request: Any, record_property: Callable[[str, object], None]) -> Callable[..., Any]:
    """assert_equivariant(model, transform=None, tolerance=None, **options) -> EquivarianceError.

    geomssl.probes.equivariance.assert_equivariant with its options; transform also as an expression ("c4", "rotate(15, 30)");
    what was measured is recorded. Fails the test where the model is not equivariant, and where nothing can be told (degenerate
    features, a pair that resamples without a bound). An option that does not exist is a GeomsslError that names the nearest.
    """
    calls = 0

    def check(model: Any, transform: Any = None, tolerance: float | None = None, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        from geomssl.errors import GeomsslError

        given = {key: value for key, value in {"transform": transform, "tolerance": tolerance}.items() if value is not None}
        chosen = {**_from_ini(request.config), **_from_marker(request.node), **options, **given}
        _refuse_unknown(chosen)
        if "tolerance" not in chosen:
            raise GeomsslError(
                "assert_equivariant without a tolerance", "tolerance=... in the call or the marker, or equivariance_tolerance"
            )
        from geomssl.probes.elements import spoken
        from geomssl.probes.equivariance import NotEquivariant, assert_equivariant

        wanted, limit = chosen.pop("transform"), float(chosen.pop("tolerance"))
        what = {"transform": wanted if isinstance(wanted, str) else wanted.name, "tolerance": limit}
        if isinstance(wanted, str):
            wanted, listed = spoken(wanted)
            chosen = {"params": listed, **chosen}
        outcome, found = "pass", None
        try:
            found = assert_equivariant(model, wanted, limit, **chosen)
        except NotEquivariant as error:
            outcome, found = "fail" if error.judged else "refused", error.found
            raise
        except Exception:
            outcome = "error"
            raise
        finally:
            prefix = PREFIX if calls == 1 else f"{PREFIX}.{calls}"
            for key, value in {**what, **_figures(found), "outcome": outcome}.items():
                record_property(f"{prefix}.{key}", value)
        return found

    return check


# Not as a decorator: type checkers that do not see pytest take a decorated function for untyped.
assert_equivariant = pytest.fixture(name="assert_equivariant")(_fixture)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Every error measured, one line each, failures last."""
    lines = []
    for category in ("passed", "failed"):
        for report in terminalreporter.stats.get(category, []):
            if getattr(report, "when", "") == "call":
                lines += [_line(report.nodeid, one) for one in _recorded(report.user_properties)]
    if lines:
        terminalreporter.section("equivariance errors")
        for line in lines:
            terminalreporter.write_line(line)


def _from_ini(config: Any) -> dict[str, Any]:
    from geomssl.errors import GeomsslError

    found: dict[str, Any] = {}
    for key, (option, _, read, _) in INI.items():
        text = str(config.getini(key)).strip()
        try:
            found |= {option: read(text)} if text else {}
        except ValueError:
            raise GeomsslError(f"{key} = {text}", "a number in the ini file", reason="bad-value") from None
    return found


def _from_marker(node: Any) -> dict[str, Any]:
    from geomssl.errors import GeomsslError

    found: dict[str, Any] = {}
    for marker in reversed(list(node.iter_markers("equivariance"))):
        if marker.args:
            given = f"equivariance({', '.join(map(repr, marker.args))})"
            raise GeomsslError(given, 'options by name, such as transform="c4"')
        found |= marker.kwargs
    return found


def _refuse_unknown(chosen: Iterable[str]) -> None:
    from geomssl.errors import unknown

    for key in chosen:
        if key not in OPTIONS:
            raise unknown("option of assert_equivariant", key, OPTIONS)


def _figures(found: Any) -> dict[str, Any]:
    """The worst element's total error, with its interval and how many images and elements it rests on."""
    if found is None:
        return {}
    worst = int(found.interval.high.nan_to_num(nan=-1.0).argmax())
    return {
        "total": float(found.total[worst]), "low": float(found.interval.low[worst]),
        "high": float(found.interval.high[worst]), "n": found.n, "elements": len(found.total),
    }


def _recorded(properties: Iterable[tuple[str, object]]) -> list[dict[str, Any]]:
    """The measurements among a report's properties, in the order of the calls."""
    calls: dict[str, dict[str, Any]] = {}
    for name, value in properties:
        head, _, key = str(name).rpartition(".")
        if head == PREFIX or head.startswith(f"{PREFIX}."):
            calls.setdefault(head, {})[key] = value
    return list(calls.values())


def _line(test: str, one: dict[str, Any]) -> str:
    figure = "not measured"
    if "total" in one:
        figure = f"{one['total']:.3g} [{one['low']:.3g}, {one['high']:.3g}], n={one['n']}, {one['elements']} elements"
    return f"{one.get('outcome', '?'):<8} {test}  {one.get('transform')} < {one.get('tolerance'):g}: {figure}"
