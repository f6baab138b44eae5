"""The pytest plugin in a suite of a user's own: pass, fail, refusal, options, summary, JUnit properties."""

import os
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest

SUITE = '''
import pytest
import torch
from torch import nn
from geomssl.encoders import build
from geomssl.seeding import seeded

def c4():
    with seeded(0, "t"):
        return build("c4-cnn", in_channels=1, widths=(4, 4, 4))

def plain():
    with seeded(0, "t"):
        return nn.Conv2d(1, 4, 3, padding=1, bias=False)

class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(len(x), 3)

@pytest.mark.equivariance(transform="c4", tolerance=1e-3, size=8)
def test_exact(assert_equivariant):
    found = assert_equivariant(c4())
    assert found.n == 12

@pytest.mark.equivariance(tolerance=0.5, in_channels=1, size=8, action="spatial")
def test_plain(assert_equivariant):
    assert_equivariant(plain(), tolerance=0.01)

@pytest.mark.equivariance(in_channels=1, size=8, action="trivial")
def test_constant(assert_equivariant):
    assert_equivariant(Constant())

@pytest.mark.equivariance(in_channels=1, size=8, action="spatial", tolerance=1.4)
def test_resampled(assert_equivariant):
    assert_equivariant(plain(), "rotate(15, 30)")

def test_twice(assert_equivariant):
    assert_equivariant(c4(), size=8)
    assert_equivariant(c4(), "c4", 0.5, size=9)

@pytest.mark.equivariance(tolerence=0.5)
def test_typo(assert_equivariant):
    assert_equivariant(c4())
'''
INI = "[pytest]\nequivariance_tolerance = 0.25\nequivariance_n = 12\nequivariance_seed = 3\naddopts = --strict-markers\n"


def run(folder, *words):
    """A pytest of its own, with this plugin and no other, and its JUnit XML."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV"))}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "geomssl.pytest_plugin", "-p", "no:cacheprovider", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    (folder / "test_net.py").write_text(SUITE)
    (folder / "pytest.ini").write_text(INI)
    done = run(folder, "--junit-xml", "out.xml")
    cases = {case.get("name"): case for case in ET.parse(folder / "out.xml").iter("testcase")}
    return done, cases


def properties(case):
    return {p.get("name"): p.get("value") for p in case.iter("property")}


def test_what_passes_and_what_does_not(suite):
    done, cases = suite
    assert done.returncode == 1, done.stdout
    assert "4 failed, 2 passed" in done.stdout
    failed = {name for name, case in cases.items() if case.find("failure") is not None}
    assert failed == {"test_plain", "test_constant", "test_resampled", "test_typo"}


def test_a_failure_says_expected_and_found(suite):
    done, _ = suite
    assert "expected total error < 0.01 at every element, found" in done.stdout
    assert "hardly vary from image to image" in done.stdout
    assert "pass rendered images" in done.stdout


def test_the_figure_is_a_property_also_of_a_failure(suite):
    _, cases = suite
    exact, plain = properties(cases["test_exact"]), properties(cases["test_plain"])
    assert float(exact["equivariance.total"]) < 1e-4
    assert (exact["equivariance.n"], exact["equivariance.elements"], exact["equivariance.outcome"]) == ("12", "3", "pass")
    assert plain["equivariance.outcome"] == "fail"
    assert float(plain["equivariance.low"]) <= float(plain["equivariance.total"]) <= float(plain["equivariance.high"])
    assert properties(cases["test_constant"])["equivariance.outcome"] == "refused"
    assert properties(cases["test_resampled"])["equivariance.outcome"] == "refused"


def test_call_over_marker_over_ini(suite):
    _, cases = suite
    assert float(properties(cases["test_exact"])["equivariance.tolerance"]) == 1e-3
    assert float(properties(cases["test_plain"])["equivariance.tolerance"]) == 0.01
    both = properties(cases["test_twice"])
    assert (float(both["equivariance.tolerance"]), float(both["equivariance.2.tolerance"])) == (0.25, 0.5)


def test_the_summary_has_a_line_for_every_measurement(suite):
    done, _ = suite
    # pytest's own summary comes after, and tells whole messages where the variable CI is set
    lines = done.stdout.split("equivariance errors")[1].split("short test summary")[0].splitlines()
    told = [line.split()[:2] for line in lines if "test_net.py::" in line and " c4 " in line]
    assert told == [
        ["pass", "test_net.py::test_exact"], ["pass", "test_net.py::test_twice"], ["pass", "test_net.py::test_twice"],
        ["fail", "test_net.py::test_plain"], ["refused", "test_net.py::test_constant"],
    ]


def test_an_option_that_does_not_exist_names_the_nearest(suite):
    done, _ = suite
    assert "unknown option of assert_equivariant 'tolerence'" in done.stdout
    assert "did you mean 'tolerance'" in done.stdout


def test_mistakes_in_the_ini_file_and_a_missing_tolerance(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_one.py").write_text("def test_one(assert_equivariant):\n    assert_equivariant(None)\n")
    assert "assert_equivariant without a tolerance; expected" in run(tmp_path).stdout
    (tmp_path / "pytest.ini").write_text("[pytest]\nequivariance_tolerance = small\n")
    assert "equivariance_tolerance = small; expected a number" in run(tmp_path).stdout


def test_the_plugin_itself_imports_nothing_heavy():
    code = (
        "import sys, pytest; before = set(sys.modules); import geomssl.pytest_plugin; "
        "heavy = {'torch', 'numpy', 'pydantic', 'click'} & (set(sys.modules) - before); sys.exit(repr(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_options_are_those_of_the_functions_behind_it():
    import inspect

    from geomssl.probes.equivariance import assert_equivariant, equivariance_error
    from geomssl.pytest_plugin import OPTIONS

    found = [p for f in (assert_equivariant, equivariance_error) for p in inspect.signature(f).parameters.values()]
    assert set(OPTIONS) == {p.name for p in found if p.kind is not p.VAR_KEYWORD} - {"model"}
