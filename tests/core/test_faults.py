"""Killed, on a full disk, in a folder that may not be written: nothing is lost but the current epoch, nothing half-written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from geomssl import checkpoint
from geomssl.cli import main

SCRIPT = Path(__file__).parents[1] / "stress" / "faults.py"


def stress(*flags: str) -> str:
    found = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


@pytest.mark.slow
def test_five_kills_at_random_moments() -> None:
    said = stress("--kills", "5", "--seed", "3")
    assert re.search(r"^ +5  kills$", said, re.M), said
    assert "nothing lost but the current epoch" in said


@pytest.mark.slow
def test_commands_on_a_full_disk_and_without_permission() -> None:
    """The probes all save in one way; `tests/stress/faults.py --disk` tries every one of them."""
    commands = {"train", "resume", "features", "safetensors", "report", "rank", "embed"}
    found = json.loads(stress("--disk", *sorted(commands)))
    assert {(r["fault"], r["command"]) for r in found} == {(f, c) for f in ("full", "read-only") for c in commands}
    for one in found:
        what = f"{one['fault']} {one['command']}: {one['said']}"
        assert one["code"] == 2, what
        assert len(one["said"]) == 1, what
        why = "File too large; expected room" if one["fault"] == "full" else "no permission in"
        assert re.search(rf"geomssl: cannot write .*: {why}.* \[unwritable\]$", one["said"][0]), what
        assert one["changed"] == one["left"] == one["gone"] == [], one


def test_a_scheduled_probe_that_cannot_be_saved_stops_the_training_and_keeps_the_checkpoint(tmp_path, capsys) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "bound").write_text("in the way")
    flags = ["--epochs", "2", "--batch-size", "512", "--device", "cpu", "--quiet", "--set", "objective.policy=small",
             "--set", "probes.every=1", "--set", 'probes.run=["bound"]', "--set", "probes.bound.n=32"]
    assert main(["train", *flags, "--out", str(tmp_path / "run.pt")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "bound is a file" in said[0]
    assert checkpoint.load(tmp_path / "run.pt")["epoch"] == 0
