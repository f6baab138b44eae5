"""geomssl gate on models of one's own: looks, power, baselines, JSON, annotations, and one line for every mistake."""

import json
import re
from pathlib import Path

import pytest

from geomssl.cli import main

MODELS = '''
from geomssl import encoders
from geomssl.seeding import seeded

def turning():
    with seeded(0, "t"):
        return encoders.build("c4-cnn", in_channels=1, widths=(4, 4, 4))

def plain():
    with seeded(0, "t"):
        return encoders.build("cnn", in_channels=1, widths=(4, 4, 4))
'''
RULE = '[[rule]]\nname = "turns"\nprobe = "equivariance"\nlimit = 0.01\n[rule.options]\ntransform = "c4"\naction = "spatial"\n'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("gate")
    (made / "gate_models.py").write_text(MODELS)
    (made / "gate.toml").write_text(RULE.replace('action = "spatial"\n', ""))
    (made / "compare.toml").write_text(RULE.replace("limit = 0.01", "max_increase = 0.5"))
    return made


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))


def gate(*words):
    return main(["gate", "--quiet", *words])


def test_looks_stop_where_the_verdict_is_clear(capsys):
    assert gate("--model", "gate_models:turning", "--rules", "gate.toml", "--budget", "256", "--json", "--out", "a") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 0
    assert found["verdicts"][0]["look"]["images"] == 64
    assert gate("--model", "gate_models:plain", "--rules", "gate.toml", "--budget", "256", "--out", "b") == 1
    assert "Look 1 of 3, at 64 of 256 images" in capsys.readouterr().out
    # The saved artifact is judged again as it was.
    assert gate("a", "--rules", "gate.toml") == 0
    assert gate("b", "--rules", "gate.toml") == 1


def test_a_budget_beyond_the_data_set_is_all_of_it(capsys):
    assert gate("--model", "gate_models:turning", "--rules", "gate.toml", "--budget", "99999", "--json", "--out", "f") == 0
    look = json.loads(capsys.readouterr().out)["verdicts"][0]["look"]
    assert (look["budget"], look["images"]) == (360, 90)


def test_power_goes_into_the_verdict_and_the_artifact(capsys):
    words = ["--model", "gate_models:turning", "--rules", "gate.toml", "--budget", "64", "--power", "--out", "p"]
    assert gate(*words, "--out-json", "p.json") == 0
    out = capsys.readouterr().out
    assert "Power, by injected defects: L/2 passes in" in out
    rows = json.loads(Path("p.json").read_text())["verdicts"][0]["power"]
    assert [row["injected"] for row in rows] == ["L/2", "L", "2L"]
    assert rows[1]["rate"] < 0.1
    assert gate("p", "--rules", "gate.toml") == 0
    assert "Power, by injected defects" in capsys.readouterr().out


def test_a_baseline_passes_itself_and_another_measurement_is_named(capsys):
    probe = ["equivariance", "--quiet", "--model", "gate_models:turning", "--action", "spatial"]
    assert main([*probe, "--out", "base"]) == 0
    (file,) = [str(p) for p in Path("base").rglob("artifact.json")]
    words = ["--rules", "compare.toml", "--baseline", file, "--out", "c"]
    assert gate("--model", "gate_models:turning", *words) == 0
    capsys.readouterr()
    assert gate("--model", "gate_models:turning", *words, "--dtype", "float64") == 2
    assert "dtype = 'float64' here, 'float32' in the baseline" in capsys.readouterr().out


def test_annotations_only_where_github_runs(capsys, monkeypatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    words = ["--model", "gate_models:plain", "--rules", "gate.toml", "--budget", "64", "--out", "g"]
    assert gate(*words) == 1
    assert "::error" not in capsys.readouterr().out
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert gate(*words) == 1
    assert "::error title=geomssl gate%3A turns (plain)::fail" in capsys.readouterr().out
    assert gate(*words, "--json") == 1
    said = capsys.readouterr()
    json.loads(said.out)
    assert "::error" in said.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--model", "gate_models:plain", "--budget", "1"], "1 is not in the range x>=2"),
        (["a", "--budget", "9"], "--budget with measured runs"),
        (["a", "--power"], "--power with measured runs"),
        (["--rules", "compare.toml", "--model", "gate_models:plain"], "max_increase and no baseline; expected --baseline"),
        (["--rules", "compare.toml", "a", "--baseline", "none"], "no such run none"),
        (["--rules", "n.toml", "--model", "gate_models:plain", "--budget", "64"], "fixes n = 32 beside --budget 64"),
        (["--rules", "typo.toml", "a"], "unknown key 'max_incrase'.*did you mean 'max_increase'"),
        (["--rules", "empty.toml", "a"], "neither limit nor at_least, max_increase or max_ratio"),
        (["--model", "gate_models:plain", "--baseline", "base"], "a baseline, and no rule that compares"),
        ([], "no model; expected"),
    ],
)
def test_mistakes_are_one_line(words, line, capsys, folder):
    (folder / "n.toml").write_text(RULE + "n = 32\n")
    (folder / "typo.toml").write_text(RULE.replace("limit", "max_incrase"))
    (folder / "empty.toml").write_text(RULE.replace("limit = 0.01\n", ""))
    if not (folder / "base").exists():
        assert main(["equivariance", "--quiet", "--model", "gate_models:turning", "--n", "32", "--out", "base"]) == 0
        capsys.readouterr()
    (folder / "a").mkdir(exist_ok=True)
    words = words if "--rules" in words else [*words, "--rules", "gate.toml"]
    assert gate(*words) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1, said
    assert re.search(line, said[0]), said
