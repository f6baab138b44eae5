"""docs/ci.md does what it says: its workflow, its test and its comparison are taken from the page and run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from geomssl.cli import main
from geomssl.reports.gate import read_rules

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def blocks(language):
    return [text for kind, text in BLOCKS if kind == language]


def run(command):
    """A command of the page, in this process and in the folder of the test."""
    first, *words = shlex.split(command)
    assert first == "geomssl"
    return main([*words, "--quiet"])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    model, test = blocks("python")
    (tmp_path / "my_model.py").write_text(model)
    (tmp_path / "test_my_model.py").write_text(test)
    rules, compare = blocks("toml")
    (tmp_path / "gate.toml").write_text(rules)
    (tmp_path / "compare.toml").write_text(compare)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    return tmp_path


def commands():
    (workflow,) = blocks("yaml")
    assert len(workflow.splitlines()) == 5
    ran = [line.split("run: ")[1] for line in workflow.splitlines() if "run: " in line]
    install = [line for line in ran if line.startswith("pip install")]
    assert install == ["pip install geomssl"]
    return [line for line in ran if line not in install]


def test_the_workflow_passes_an_exact_model_and_fails_a_broken_one(folder, capsys, monkeypatch):
    (command,) = commands()
    assert run(command) == 0
    said = capsys.readouterr().out
    for line in ("PASS          quarter turns  (make)", "total < 0.01 for every element of c4", "Look 1 of 3, at 64 of 256"):
        assert line in PAGE
        assert line in said
    suite = ET.parse("gate.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "0")
    # A file of its own: a module is imported once.
    (folder / "broken").mkdir()
    (folder / "broken" / "my_model.py").write_text(Path("my_model.py").read_text().replace("range(4)", "range(3)"))
    (folder / "broken" / "gate.toml").write_text(Path("gate.toml").read_text())
    monkeypatch.chdir(folder / "broken")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    assert run(command) == 1
    said = capsys.readouterr().out
    assert "1.09 [1.05, 1.13] at 180°" in PAGE
    assert "1.09 [1.05, 1.13] at 180°" in said
    assert said.count("\n::error ") == 1
    assert "quarter turns" in Path("summary.md").read_text()
    assert ET.parse("gate.xml").getroot().get("failures") == "1"


def test_the_test_of_the_page_passes(folder):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pytest", "-p", "geomssl.pytest_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout
    assert "equivariance errors" in done.stdout
    assert re.search(r"pass +test_my_model.py::test_quarter_turns +c4 < 0.001: \S+e-07 \[", done.stdout)


def test_the_baseline_of_the_page_is_compared(folder, capsys):
    first, second = (text.strip() for text in blocks("sh"))
    assert run(first) == 0
    assert run(second) == 0
    said = capsys.readouterr().out
    assert "total < baseline + 0.02" in said
    assert "Bounds: paired, 256 images the same in both." in said


def test_the_whole_file_has_the_steps_of_the_page():
    whole = (ROOT / "examples" / "ci" / "gate.yml").read_text()
    (workflow,) = blocks("yaml")
    for line in workflow.splitlines()[1:]:
        assert line.strip() in whole


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("gate-*.toml")), ids=lambda p: p.name)
def test_rules_that_come_with_it_are_valid(path):
    assert read_rules(path).rule
