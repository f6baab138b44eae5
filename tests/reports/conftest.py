"""Made-up artifacts for every test here, and the one place that decides whether browser tests run."""

import os
import sys
from pathlib import Path

import pytest

# tests are imported by path: a folder's own helper is found only this way
sys.path.insert(0, str(Path(__file__).parent))
import report_samples

_AWAY = pytest.StashKey[int]()


def pytest_collection_modifyitems(config, items):
    if report_samples.browser() or os.environ.get("GEOMSSL_REQUIRE_BROWSER") == "1":
        return
    away = [item for item in items if item.get_closest_marker("browser")]
    if away:
        items[:] = [item for item in items if item not in away]
        config.hook.pytest_deselected(items=away)
        config.stash[_AWAY] = len(away)


def pytest_terminal_summary(terminalreporter, config):
    away = config.stash.get(_AWAY, 0)
    if away:
        terminalreporter.write_line(f"{away} browser tests deselected: neither chromium nor google-chrome is installed")


@pytest.fixture(scope="session")
def artifacts():
    return [a for run in report_samples.RUNS for a in report_samples.everything(run)]
