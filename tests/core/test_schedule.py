"""Scheduled probes: when they are due, what a recipe may ask, and that they leave the training bit for bit as it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from geomssl import artifact, checkpoint
from geomssl.cli import main
from geomssl.commands.scheduled import Scheduled
from geomssl.errors import GeomsslError
from geomssl.recipe import build
from geomssl.schedule import Schedule

SMALL = {
    "epochs": 4, "batch_size": 512, "objective": {"name": "simclr", "policy": "small"},
    "encoder": {"name": "mlp", "widths": [64, 64], "fibres": 4},
}
TABLE = {
    "every": 2, "run": ["spectrum", "bound"], "spectrum": {"n": 64, "halves": 2},
    "bound": {"n": 128, "batch": 32, "batches": 4},
}


def written(table: dict, **more: object) -> list[str]:
    """Flags of a small training with that table."""
    flags = ["train", "--quiet", "--device", "cpu"]
    for key, value in {**SMALL, "probes": table, **more}.items():
        if isinstance(value, dict):
            flags += [f for k, v in value.items() for f in ("--set", f"{key}.{k}={_toml(v)}")]
        else:
            flags += ["--set", f"{key}={value}"]
    return flags


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    return json.dumps(value)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A training with probes and the same without, from the command line."""
    folder = tmp_path_factory.mktemp("runs")
    assert main([*written(TABLE), "--out", str(folder / "with.pt")]) == 0
    assert main([*written({}), "--out", str(folder / "without.pt")]) == 0
    return folder


def steps(folder, probe):
    return sorted(int(found.name.partition("@")[2]) for found in (folder / probe).iterdir() if "@" in found.name)


@pytest.mark.parametrize(
    ("table", "due"),
    [
        ({}, []), ({"every": 3}, [0, 3, 6, 7]), ({"every": 7}, [0, 7]), ({"every": 100}, [0, 7]),
        ({"every": 1}, list(range(8))),
        ({"at": [2]}, [2, 7]), ({"at": [0, 5], "every": 3}, [0, 3, 5, 6, 7]), ({"every": 0}, []),
    ],
)
def test_due_at_initialisation_at_every_nth_epoch_and_at_the_end(table, due):
    schedule = Schedule(run=("rank",), **table)
    assert [epoch for epoch in range(8) if schedule.due(epoch, 7)] == due


def test_what_is_not_due_reads_no_weights_and_no_images():
    """Nothing but the epoch and the recipe is looked at: a trainer that has no more than these is enough."""
    recipe = build([SMALL, {"probes": TABLE}])
    Scheduled()(SimpleNamespace(epoch=3, recipe=recipe, out="nowhere.pt"))
    with pytest.raises(AttributeError):
        Scheduled()(SimpleNamespace(epoch=2, recipe=recipe, out="nowhere.pt"))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"every": 1, "run": ["rnak"]}, "unknown probe 'rnak'.*did you mean 'rank'"),
        ({"evry": 1}, "probes: unknown key 'evry'.*did you mean 'every'"),
        ({"every": -1}, "every = -1; expected greater"),
        ({"every": 1}, "probes without probes.run"),
        ({"every": 1, "run": ["rank"], "rank": {"tua": 1}}, "probes.rank: unknown key 'tua'.*did you mean 'tau'"),
        ({"every": 1, "run": ["rank"], "rank": {"tau": -1.0}}, "probes.rank: tau = -1.0"),
        ({"every": 1, "run": ["rank"], "tangent": {"n": 8}}, "probes.tangent beside"),
        ({"every": 1, "run": ["rank"], "tnagent": {"n": 8}}, "unknown probe 'tnagent'"),
        ({"at": [9], "run": ["rank"]}, "probes.at = 9 in a training of 4 epochs"),
        ({"at": [-2], "run": ["rank"]}, "from 0 on"),
        ({"every": 1, "run": ["os:system"]}, "unknown probe 'os:system'"),
        (3, "probes = 3; expected a table"),
    ],
)
def test_a_recipe_is_refused_as_it_is_read(table, said):
    with pytest.raises(GeomsslError, match=said) as caught:
        build([{**SMALL, "probes": table}])
    assert "\n" not in str(caught.value)


def test_the_settings_survive_the_checkpoint():
    recipe = build([{**SMALL, "probes": TABLE}])
    assert build([recipe.plain()]) == recipe
    assert recipe.probes.options["spectrum"] == {"n": 64, "halves": 2}


def test_a_recipe_without_heavy_probes_imports_no_heavy_library():
    code = (
        "import sys; from geomssl.recipe import build; build([{'probes': {'every': 1, 'run': ['embed', 'saliency'], "
        "'embed': {'n': 9}}}]); found = {'pacmap', 'captum', 'matplotlib', 'sklearn'} & set(sys.modules); sys.exit(repr(found) "
        "if found else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert found.returncode == 0, found.stderr


def test_weights_are_bit_for_bit_those_of_a_training_without(runs):
    with_probes, without = checkpoint.load(runs / "with.pt"), checkpoint.load(runs / "without.pt")
    assert with_probes["epoch"] == without["epoch"] == 4
    for name, weight in without["weights"].items():
        assert torch.equal(weight, with_probes["weights"][name]), name
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in s["history"]] for s in (with_probes, without)]
    assert rows[0] == rows[1]


def test_an_artifact_for_every_moment_and_probe(runs):
    assert steps(runs / "with", "spectrum") == steps(runs / "with", "bound") == [0, 4, 8]
    assert {p.name for p in (runs / "without").iterdir()} == {"metrics.jsonl"}
    found = {(a.probe, a.step): a for a in map(artifact.load, artifact.find(runs / "with.pt"))}
    for (_, step), one in found.items():
        assert one.provenance["epoch"] == step // 2
        assert one.provenance["split"] == "val"
    first, last = (found["spectrum", step].metric("effective_rank_h_plain") for step in (0, 8))
    assert first.n == last.n == 64
    assert first.value != last.value


def test_the_last_moment_is_what_the_checkpoint_gives(runs, capsys):
    where = runs / "again"
    assert main(["bound", "--checkpoint", str(runs / "with.pt"), "--split", "val", "--n", "128", "--batch", "32",
                 "--batches", "4", "--out", str(where), "--quiet"]) == 0
    capsys.readouterr()
    (by_hand,) = (artifact.load(found) for found in artifact.find(where))
    scheduled = next(a for a in map(artifact.load, artifact.find(runs / "with.pt")) if (a.probe, a.step) == ("bound", 8))
    assert scheduled.metrics == by_hand.metrics
    assert scheduled.tables == by_hand.tables
    assert scheduled.options_hash == by_hand.options_hash


def test_a_resumed_run_continues_the_schedule_and_makes_up_for_what_was_cut(runs, tmp_path, capsys):
    out = tmp_path / "parts.pt"
    assert main([*written(TABLE), "--out", str(out), "--stop-after", "2"]) == 0
    (cut,) = (tmp_path / "parts" / "spectrum").glob("*@4")
    (cut / "artifact.json").unlink()
    kept = next((tmp_path / "parts" / "bound").glob("*@4")) / "artifact.json"
    before = kept.stat().st_mtime_ns
    assert main(["train", "--resume", str(out), "--quiet", "--device", "cpu"]) == 0
    assert kept.stat().st_mtime_ns == before
    for whole, part in zip(artifact.find(runs / "with.pt"), artifact.find(out), strict=True):
        a, b = artifact.load(whole), artifact.load(part)
        assert (a.probe, a.step, a.metrics, a.tables) == (b.probe, b.step, b.metrics, b.tables)
    capsys.readouterr()


def test_what_cannot_apply_is_told_once_and_an_older_course_forgotten(tmp_path, capsys):
    table = {"every": 1, "run": ["tangent", "spectrum"], "spectrum": {"n": 32, "halves": 0}}
    plain = {"objective": {"name": "supervised"}, "epochs": 2}
    out = tmp_path / "run.pt"
    assert main([*written(table, **plain), "--out", str(out)]) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "tangent after epoch 0: left out, the training goes on: tangent without a projector" in said[0]
    assert steps(tmp_path / "run", "spectrum") == [0, 2, 4]
    assert not (tmp_path / "run" / "tangent").exists()
    assert main(["spectrum", "--checkpoint", str(out), "--quiet", "--n", "32"]) == 0
    assert main([*written({"at": [1], "run": ["spectrum"], "spectrum": {"n": 33, "halves": 0}}, **plain), "--out", str(out),
                 "--overwrite"]) == 0
    found = [artifact.load(f) for f in artifact.find(out)]
    assert sorted((a.options["n"], a.step) for a in found if a.step is not None) == [(33, 2), (33, 4)]
    assert sum(a.step is None for a in found) == 1
    capsys.readouterr()
