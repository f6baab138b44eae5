"""The doctor: a machine that is well is told so, each thing that is wrong is named with what to do, and none hides another."""

from __future__ import annotations

import json
import os
from importlib import metadata

import pytest
import torch

from geomssl import device
from geomssl.cli import main
from geomssl.commands import doctor


@pytest.fixture(autouse=True)
def a_machine_that_is_well(monkeypatch, tmp_path):
    """Threads, path and data of this machine are not what is tested."""
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    monkeypatch.delenv("GEOMSSL_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def problems(found):
    return [str(one) for one in found if one.level == "problem"]


def test_a_machine_that_is_well(tmp_path, capsys):
    assert main(["doctor", "--out", str(tmp_path / "runs")]) == 0
    text = capsys.readouterr().out
    for area in ("versions", "devices", "threads", "precision", "data sets", "browser", "disk", "entry points"):
        assert f" {area} " in text
    assert f"torch {torch.__version__}" in text
    assert text.endswith("0 problems\n")
    assert not (tmp_path / "runs").exists()
    assert main(["doctor", "--json"]) == 0
    assert {one["level"] for one in json.loads(capsys.readouterr().out)} <= {"ok", "note"}


def test_precisions_are_those_that_training_takes(tmp_path):
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    (line,) = [one.said for one in doctor._precisions() if one.said.startswith("cpu")]
    has = line.removeprefix("cpu: ").partition(";")[0].split(", ")
    for name in ("float32", "tf32", "bf16", "fp16"):
        if name in has:
            device.precision(name, torch.device("cpu"))
        else:
            with pytest.raises(Exception, match="lacks"):
                device.precision(name, torch.device("cpu"))
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == flags


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [
        ("2.13.0+cpu", "2.6", False), ("2.5.1", "2.6", True), ("10.0", "9.9.9", False), ("1.26.4", "1.26", False),
        ("2", "2.0", False), ("2.0.0", "2.0", False), ("2.0rc1", "2.0.1", True), ("2.10", "2.1", False),
    ],
)
def test_versions_are_compared_as_numbers(version, least, older, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "requires", lambda _: [f"torch>={least}"])
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "torch" else real(name))
    assert bool(problems(doctor._versions())) is older


def test_what_is_missing_or_old_is_named_with_what_to_do(monkeypatch):
    wanted = ["no-such-package>=3", "torch>=99", "also-missing>=1; extra == 'zoo'", "numpy"]
    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    found = list(doctor._versions())
    assert problems(found) == [
        "! versions     no-such-package is not installed: pip install 'no-such-package>=3'",
        f"! versions     torch {torch.__version__}, older than 99: pip install --upgrade 'torch>=99'",
    ]
    assert any("also-missing (zoo)" in one.said and one.level == "note" for one in found)


def test_threads_disk_and_data(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.get_num_threads", lambda: 1 + len(os.sched_getaffinity(0)))
    assert "export OMP_NUM_THREADS=" in problems(doctor._threads())[0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: __import__("collections").namedtuple("U", "free")(doctor.ROOM - 1))
    assert "make room" in problems(doctor._disk(tmp_path / "a" / "b"))[0]
    (tmp_path / "file").write_text("")
    assert "is a file" in problems(doctor._disk(tmp_path / "file"))[0]
    monkeypatch.setenv("GEOMSSL_DATA", str(tmp_path / "nowhere"))
    assert "unset GEOMSSL_DATA" in problems(doctor._datasets())[0]


def test_names_of_other_packages_are_imported(monkeypatch, tmp_path):
    info = tmp_path / "broken_pack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-pack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[geomssl.encoder]\nbroken = no_such_module:Encoder\ncnn = json:loads\n[geomssl.probe]\nfine = json\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = list(doctor._entries())
    first, second = problems(found)
    assert "encoder 'broken' of broken-pack cannot be imported: ModuleNotFoundError" in first
    assert first.endswith("mend or uninstall broken-pack")
    assert "encoder 'cnn' of broken-pack is hidden by the built-in one" in second
    assert any("probe fine (broken-pack)" in one.said for one in found)


def test_a_check_that_breaks_is_a_problem_and_stops_no_other(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1 / 0)
    assert main(["doctor", "--out", str(tmp_path)]) == 2
    text = capsys.readouterr().out
    assert "! devices      this check broke: ZeroDivisionError" in text
    assert "GiB free" in text
    assert text.endswith(("problem\n", "problems\n"))
