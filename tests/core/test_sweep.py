"""Sweeps: the table is the statistics of its runs, what is there is not made again, and one failure stops nothing else."""

from __future__ import annotations

import fcntl
import json

import numpy as np
import pytest
import torch
from scipy import stats

from geomssl import artifact, checkpoint, sweep, training
from geomssl.cli import main
from geomssl.errors import GeomsslError
from geomssl.paired import compare, mean
from geomssl.recipe import build

CPU = torch.device("cpu")
FILE = """# Sweep: two cells
title = "Two cells"
recipe = "base.toml"
seeds = [0, 1]
metrics = ["train.online_val_accuracy", "rank.effective_rank_h"]
[[cell]]
name = "a"
paper = {"train.online_val_accuracy" = [0.5, 0.1], "rank.effective_rank_h" = 9.0}
[[cell]]
name = "b"
set = {optim = {lr = 0.3}}
[probes.rank]
n = 64
halves = 2
[[compare]]
a = "a"
b = "b"
metric = "train.online_val_accuracy"
margin = 0.2
"""
BASE = {
    "encoder": {"name": "cnn", "widths": [4, 4, 8]}, "objective": {"name": "supervised"}, "optim": {"name": "sgd", "lr": 0.1},
    "epochs": 2, "batch_size": 512,
}
BASE_TOML = """encoder = {name = "cnn", widths = [4, 4, 8]}
epochs = 2
batch_size = 512
objective = {name = "supervised"}
optim = {name = "sgd", lr = 0.1}
"""


def write(folder, text=FILE):
    (folder / "base.toml").write_text(BASE_TOML)
    path = folder / "two.toml"
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A whole sweep, and the folder that it lies in; its pictures, half of the time, are left blank."""
    folder = tmp_path_factory.mktemp("swept")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geomssl.figures.draw", lambda *_, **__: "<svg/>")
        assert main(["sweep", str(write(folder)), "--out", str(folder / "two"), "--quiet", "--device", "cpu"]) == 0
    return folder


def table_of(out):
    (found,) = (artifact.load(place) for place in artifact.find(out))
    return found


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_means_have_the_interval_of_students_t(n, level):
    values = np.random.default_rng(n).normal(3.0, 2.0, n)
    found = mean(values.tolist(), level)
    low, high = stats.t.interval(level, n - 1, values.mean(), stats.sem(values))
    assert (found.value, found.std, found.low, found.high) == pytest.approx((values.mean(), values.std(ddof=1), low, high))


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, -5.0])
def test_pairs_are_compared_by_t_tests(n, shift):
    rng = np.random.default_rng(n)
    a = rng.normal(0.0, 1.0, n)
    b = a + shift + rng.normal(0.0, 0.2, n)
    found = compare(a.tolist(), b.tolist(), margin=0.4)
    assert found.p == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert found.p_lower == pytest.approx(stats.ttest_1samp(a - b, -0.4, alternative="greater").pvalue)
    assert found.p_upper == pytest.approx(stats.ttest_1samp(a - b, 0.4, alternative="less").pvalue)
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (found.difference.low, found.difference.high) == pytest.approx((low, high))
    narrow = stats.ttest_rel(a, b).confidence_interval(0.90)
    inside = narrow.low > -0.4 and narrow.high < 0.4
    expected = "equivalent" if inside else "different" if not low <= 0 <= high else "undecided"
    assert found.verdict == expected
    turned = compare(b.tolist(), a.tolist(), margin=0.4)
    assert (turned.p_lower, turned.p_upper, turned.verdict) == pytest.approx((found.p_upper, found.p_lower, found.verdict))


def test_a_difference_as_large_as_the_margin_is_seldom_called_equivalent():
    """At the margin itself the error is at most alpha; at 0, with a wide margin, nearly all pass."""
    rng = np.random.default_rng(0)
    drawn = rng.normal(0.0, 1.0, (2000, 6))
    at_margin = sum(compare((row + 1.0).tolist(), [0.0] * 6, margin=1.0).verdict == "equivalent" for row in drawn)
    assert stats.binomtest(at_margin, 2000, 0.05, alternative="greater").pvalue > 1e-3
    alike = sum(compare(row.tolist(), [0.0] * 6, margin=4.0).verdict == "equivalent" for row in drawn)
    assert alike > 1980


def test_no_spread_and_one_seed():
    same = compare([0.5, 0.7], [0.4, 0.6], margin=0.5)
    assert same.difference.value == pytest.approx(0.1)
    exact = compare([0.5, 0.5], [0.5, 0.5], margin=0.1)
    assert (exact.p, exact.p_lower, exact.p_upper, exact.verdict) == (1.0, 0.0, 0.0, "equivalent")
    assert compare([1.0, 1.0], [0.0, 0.0], margin=0.5).verdict == "different"
    assert compare([0.5, 0.5], [0.0, 0.0], margin=0.5).p_upper == 1.0
    one = compare([0.5], [0.5], margin=10.0)
    assert (one.verdict, one.p, one.p_lower, one.difference.low) == ("undecided", None, None, None)
    for given, margin in ([], None), ([float("nan"), 1.0], None), ([1.0], -1.0), ([1.0], 0.0):
        with pytest.raises(GeomsslError):
            compare(given, given, margin)
    with pytest.raises(GeomsslError, match="2 values against 1"):
        compare([1.0, 2.0], [1.0])


def test_cells_times_grid(tmp_path):
    text = (
        'recipe = "base.toml"\nseeds = [3, 5]\n[set]\nepochs = 4\n[[cell]]\nname = "x"\n'
        '[[cell]]\nname = "y"\nset = {epochs = 6}\n'
        '[grid]\nbatch_size = [256, 512]\noptim.lr = [0.5]\nencoder.widths = [[2, 3, 4], [4, 5, 6]]\n'
    )
    plan = sweep.plan(write(tmp_path, text), tmp_path / "out")
    assert len(plan.units) == 2 * 2 * 2 * 2
    assert plan.cells[:2] == ["x,batch_size=256,lr=0.5,widths=2-3-4", "x,batch_size=256,lr=0.5,widths=4-5-6"]
    last = plan.units[-1]
    assert (last.recipe.epochs, last.recipe.batch_size, last.recipe.seed) == (6, 512, 5)
    assert last.recipe.encoder.widths == (4, 5, 6)
    assert last.recipe.optim.lr == 0.5
    assert {u.recipe.epochs for u in plan.units if u.cell.startswith("x")} == {4}
    assert len({u.path for u in plan.units}) == 16


@pytest.mark.parametrize(
    ("was", "becomes", "line"),
    [
        ('title = "Two cells"', "titel = 1", "unknown key 'titel'; .*did you mean 'title'"),
        ('name = "b"', 'nme = "b"', "cell 2: unknown key 'nme'; expected one of name, recipe, set, paper; did you mean 'name'"),
        ("margin = 0.2", "margn = 0.2", "compare 1: unknown key 'margn'; .*did you mean 'margin'"),
        ("margin = 0.2", "margin = -1", "margin = -1; expected greater than 0"),
        ("lr = 0.3", "rl = 0.3", "cell b: optim: unknown key 'rl'; .*did you mean 'lr'"),
        ("optim = {lr = 0.3}", 'objective = {name = "hssl", distance = 0}', "cell b: objective hssl: distance = 0, or less"),
        ('a = "a"', 'a = "aa"', "unknown cell in compare of .* 'aa'; .*did you mean 'a'"),
        ('metric = "train.online_val_accuracy"', 'metric = "train.loss"', "unknown metric in compare"),
        ('"rank.effective_rank_h" = 9.0', '"rank.rank" = 9.0', "unknown metric of cell a's paper"),
        ("[probes.rank]", "[probes.rnak]", r"\[probes.rnak\] without a metric of it; .*did you mean 'rank'"),
        ("n = 64", "m = 64", "probes.rank: unknown key 'm'"),
        ('"rank.effective_rank_h"]', '"rnk.x"]', "unknown probe .*'rnk'|without a metric"),
        ('"rank.effective_rank_h"]', '"rank"]', "metric 'rank'; expected train.KEY, PROBE.METRIC or PROBE.METRIC@EPOCH"),
        ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds = \[1, 1\]; expected different numbers"),
        ('name = "b"', 'name = "a"', "two cells named 'a'"),
        ('name = "b"', 'name = "b/c"', "a cell named 'b/c'"),
        ('recipe = "base.toml"', 'recipe = "bsae.toml"', "no such file: bsae.toml|no recipe 'bsae"),
        ("[probes.rank]", "[grid]\nepochs = 3\n[probes.rank]", r"grid.epochs = 3; expected a list of values"),
        ("[[cell]]\nname = \"b\"", "cell = 3", "cell a: unknown key 'cell'"),
        ("[[compare]]", "[compare]", r"compare = .*; expected tables \[\[compare\]\]"),
    ],
)
def test_mistakes_are_one_line(was, becomes, line, tmp_path, capsys):
    path = write(tmp_path, FILE.replace(was, becomes, 1))
    before = sorted(tmp_path.iterdir())
    assert main(["sweep", str(path), "--out", str(tmp_path / "out")]) == 2
    (found,) = capsys.readouterr().err.strip().splitlines()
    assert __import__("re").search(line, found), found
    assert sorted(tmp_path.iterdir()) == before


def test_the_table_is_the_statistics_of_the_runs(swept):
    found = table_of(swept / "two")
    rows = {cell: [] for cell in "ab"}
    for cell in "ab":
        for seed in (0, 1):
            lines = (swept / "two" / f"{cell}-s{seed}" / "metrics.jsonl").read_text().splitlines()
            rows[cell].append(json.loads(lines[-1])["online_val_accuracy"])
    table = found.table("train_online_val_accuracy").columns
    assert table["cell"] == ["a", "b"]
    assert table["n"] == [2, 2]
    assert table["mean"] == pytest.approx([np.mean(rows["a"]), np.mean(rows["b"])])
    assert table["std"] == pytest.approx([np.std(rows["a"], ddof=1), np.std(rows["b"], ddof=1)])
    assert (table["paper"], table["paper_std"]) == ([0.5, None], [0.1, None])
    pair = {key: column[0] for key, column in found.table("compare").columns.items()}
    d = np.subtract(rows["a"], rows["b"])
    assert pair["difference"] == pytest.approx(d.mean())
    assert pair["p_lower"] == pytest.approx(stats.ttest_1samp(d, -0.2, alternative="greater").pvalue)
    ranks = found.table("rank_effective_rank_h").columns
    measured = [table_of_probe(swept / "two" / f"a-s{seed}", "effective_rank_h") for seed in (0, 1)]
    assert ranks["mean"][0] == pytest.approx(np.mean(measured))
    assert found.table("runs").columns["rank.effective_rank_h"][:2] == measured
    assert found.table("runs").columns["epochs"] == [2] * 4


def table_of_probe(folder, name):
    (place,) = artifact.find(folder)
    return artifact.load(place).metric(name).value


def test_a_run_of_a_sweep_is_the_training_of_its_recipe(swept, tmp_path):
    training.start(build([BASE, {"optim": {"lr": 0.3}, "seed": 1}]), tmp_path / "alone.pt", CPU).run()
    alone, ours = (checkpoint.load(path)["weights"] for path in (tmp_path / "alone.pt", swept / "two" / "b-s1.pt"))
    assert all(torch.equal(alone[key], ours[key]) for key in alone)


def test_what_is_there_is_not_made_again(swept, monkeypatch, capsys):
    def never(*_, **__):
        raise AssertionError("made again")

    monkeypatch.setattr("geomssl.training.start", never)
    monkeypatch.setattr("geomssl.training.resume", never)
    monkeypatch.setattr("geomssl.probes.load.from_checkpoint", never)
    before = table_of(swept / "two")
    arguments = ["sweep", str(swept / "two.toml"), "--out", str(swept / "two"), "--quiet"]
    assert main(arguments) == 0
    assert main([*arguments, "--only", "b"]) == 0
    assert table_of(swept / "two").metrics == before.metrics
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(": trained") == 4


def test_a_half_run_is_resumed_and_a_failing_cell_stops_nothing(tmp_path, capsys):
    text = FILE.replace('metrics = ["train.online_val_accuracy", "rank.effective_rank_h"]', 'metrics = ["train.loss"]')
    text = text.partition("[probes.rank]")[0].replace("seeds = [0, 1]", "seeds = [1]").partition("paper")[0]
    text += '[[cell]]\nname = "wrong"\nset = {batch_size = 5000}\n[[cell]]\nname = "cut"\n[[cell]]\nname = "late"\n'
    out = tmp_path / "out"
    half = build([BASE, {"seed": 1}])
    begun = training.start(half, out / "late-s1.pt", CPU).run(stop_after=1)
    training.start(half, out / "whole.pt", CPU).run()
    (out / "cut-s1.pt").write_bytes((out / "whole.pt").read_bytes()[:3000])
    path = write(tmp_path, text)
    assert main(["sweep", str(path), "--out", str(out), "--dry-run"]) == 2
    listed = capsys.readouterr().out
    assert "late  seed 1" in listed
    assert "resumes at epoch 1" in listed
    assert main(["sweep", str(path), "--out", str(out), "--quiet", "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert "wrong-s1.pt: failed: batch_size = 5000 on 1078 training images" in said.err
    assert "cut-s1.pt: failed: " in said.err
    assert "cut short or damaged" in said.err
    resumed, whole = (checkpoint.load(out / name) for name in ("late-s1.pt", "whole.pt"))
    assert all(torch.equal(resumed["weights"][key], whole["weights"][key]) for key in whole["weights"])
    assert resumed["history"][:1] == begun, "its first epoch, seconds and all, is the one that was there"
    table = table_of(out).table("train_loss").columns
    assert dict(zip(table["cell"], table["n"], strict=True)) == {"a": 1, "wrong": 0, "cut": 0, "late": 1}
    assert table["mean"][0] == table["mean"][3] == whole["history"][-1]["loss"]
    assert len(table_of(out).notes) == 2


def test_artifacts_of_other_weights_are_measured_anew(swept, tmp_path):
    """A run that was trained again under the same name: its artifacts' hash no longer fits."""
    out = tmp_path / "two"
    __import__("shutil").copytree(swept / "two", out)
    (place,) = artifact.find(out / "a-s0")
    old = artifact.load(place)
    (out / "a-s0.pt").write_bytes((out / "a-s1.pt").read_bytes())
    state = checkpoint.load(out / "a-s0.pt")
    state["config"]["seed"] = 0
    checkpoint.save(out / "a-s0.pt", {k: v for k, v in state.items() if k not in ("format", "kind")})
    arguments = ["sweep", str(swept / "two.toml"), "--out", str(out), "--quiet", "--only", "a", "--device", "cpu"]
    assert main(arguments) == 0
    new = artifact.load(place)
    assert new.provenance["checkpoint_sha256"] != old.provenance["checkpoint_sha256"]
    assert table_of_probe(out / "a-s0", "effective_rank_h") == pytest.approx(table_of_probe(out / "a-s1", "effective_rank_h"))


def test_changed_recipes_and_second_sweeps_are_refused(swept, capsys, tmp_path):
    kept = table_of(swept / "two")
    (tmp_path / "base.toml").write_text(BASE_TOML.replace("lr = 0.1", "lr = 0.2"))
    (tmp_path / "two.toml").write_text(FILE.replace("[probes.rank]", "[set]\nepochs = 3\n[probes.rank]"))
    arguments = ["sweep", str(tmp_path / "two.toml"), "--out", str(swept / "two")]
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "epochs = 3 (was 2) in a, b; optim.lr = 0.2 (was 0.1) in a; expected" in said
    with open(swept / "two" / ".lock", "a+") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert main(["sweep", str(swept / "two.toml"), "--out", str(swept / "two")]) == 2
        assert "another sweep (process " in capsys.readouterr().err
    assert table_of(swept / "two") == kept
    assert main(["sweep", str(swept / "two.toml"), "--only", "c"]) == 2
    assert "unknown cell of" in capsys.readouterr().err


def test_side_by_side_one_that_is_killed_takes_no_other_with_it(tmp_path, capsys, monkeypatch):
    """The other's result is that of a run alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deadly.py").write_text(
        "import os, signal\nfrom geomssl.data.digits import Digits\nclass Deadly(Digits):\n"
        "    @staticmethod\n    def load(config, split):\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    class Config(Digits.Config):\n        name: str = 'deadly.py:Deadly'\n"
    )
    text = FILE.partition("[probes.rank]")[0].replace("[0, 1]", "[1]").replace(', "rank.effective_rank_h"]', "]")
    text = text.partition("paper")[0] + '[[cell]]\nname = "deadly"\nset = {dataset = {name = "deadly.py:Deadly"}}\n'
    path = write(tmp_path, text)
    assert main(["sweep", str(path), "--out", "out", "--jobs", "2", "--quiet", "--device", "cpu"]) == 2
    assert "deadly-s1.pt: failed: its process ended with code -9 [killed]" in capsys.readouterr().err
    training.start(build([BASE, {"seed": 1}]), tmp_path / "alone.pt", CPU).run()
    alone, ours = (checkpoint.load(p)["weights"] for p in (tmp_path / "alone.pt", tmp_path / "out" / "a-s1.pt"))
    assert all(torch.allclose(alone[key], ours[key]) for key in alone)


def test_the_report_shows_the_table(swept):
    page = swept / "r.html"
    assert main(["report", str(swept / "two"), "-o", str(page)]) == 0
    text = page.read_text()
    assert "Two cells" in text
    assert "paper_std" in text
    assert "p_lower" in text
