"""Metrics of a moment: a sweep reads what scheduled probes left on the way, and compares moments of one cell."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from scipy import stats

from geomssl import artifact, checkpoint
from geomssl.cli import main

RECIPE = """encoder = {name = "cnn", widths = [4, 4, 8]}
epochs = 2
batch_size = 512
objective = {name = "simclr", projector = [4]}
optim = {name = "sgd", lr = 0.3}
[probes]
every = 1
run = ["rank"]
[probes.rank]
n = 64
halves = 2
views = 0
"""
SWEEP = """title = "Course"
recipe = "base.toml"
seeds = [0, 1, 2]
metrics = ["rank.effective_rank_h@0", "rank.effective_rank_h@1", "rank.effective_rank_h@last", "train.loss"]
[[cell]]
name = "short"
[[cell]]
name = "long"
set = {epochs = 3}
[[compare]]
a = "long"
b = "long"
metric = "rank.effective_rank_h@last"
against = "rank.effective_rank_h@0"
[[compare]]
a = "long"
b = "short"
metric = "rank.effective_rank_h@last"
"""


def write(folder, text=SWEEP):
    (folder / "base.toml").write_text(RECIPE)
    (folder / "course.toml").write_text(text)
    return folder / "course.toml"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("geomssl.figures.draw", lambda *_, **__: "<svg/>")
        assert main(["sweep", str(write(folder)), "--out", str(folder / "out"), "--quiet", "--device", "cpu"]) == 0
    return folder


def at(folder, cell, epoch):
    """The figure of each seed at that epoch, as its artifact states its own epoch, read without the sweep's code."""
    values = []
    for seed in range(3):
        (found,) = (
            data for path in (folder / "out" / f"{cell}-s{seed}" / "rank").glob("*@*/artifact.json")
            if (data := json.loads(path.read_text()))["provenance"]["epoch"] == epoch
        )
        values.append(next(m["value"] for m in found["metrics"] if m["name"] == "effective_rank_h"))
    return np.array(values)


def table(folder):
    (found,) = (artifact.load(place) for place in artifact.find(folder / "out"))
    return found


def test_a_metric_of_a_moment_is_the_scheduled_one_of_that_epoch(swept):
    found = table(swept)
    for metric, epochs in (("at_0", (0, 0)), ("at_1", (1, 1)), ("at_last", (2, 3))):
        columns = found.table(f"rank_effective_rank_h_{metric}").columns
        expected = [at(swept, cell, epoch) for cell, epoch in zip(("short", "long"), epochs, strict=True)]
        assert columns["mean"] == pytest.approx([values.mean() for values in expected])
        assert columns["std"] == pytest.approx([values.std(ddof=1) for values in expected])
    assert not list((swept / "out" / "short-s0" / "rank").glob("[!@]" * 10)), "nothing was asked for after training"


def test_two_moments_of_a_cell_are_compared_seed_by_seed(swept):
    pairs = table(swept).table("compare").columns
    assert pairs["against"] == ["rank.effective_rank_h@0", "rank.effective_rank_h@last"]
    expected = stats.ttest_rel(at(swept, "long", 3), at(swept, "long", 0))
    assert pairs["p"][0] == pytest.approx(expected.pvalue)
    assert pairs["difference"][0] == pytest.approx((at(swept, "long", 3) - at(swept, "long", 0)).mean())
    assert pairs["difference"][1] == pytest.approx((at(swept, "long", 3) - at(swept, "short", 2)).mean())


def test_the_course_of_a_metric_has_a_band_of_one_standard_deviation(swept):
    course = table(swept).table("rank_effective_rank_h_course").columns
    assert list(zip(course["cell"], course["epoch"], strict=True)) == [
        ("short", 0), ("short", 1), ("short", 2), ("long", 0), ("long", 1), ("long", 3),
    ]
    values = at(swept, "long", 3)
    mean, std = values.mean(), values.std(ddof=1)
    given = [course[key][-1] for key in ("mean", "std", "low", "high", "n")]
    assert given == pytest.approx([mean, std, mean - std, mean + std, 3])


def test_what_was_not_measured_on_the_way_fails_that_run_alone(swept, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "copy")
    for place in (tmp_path / "copy" / "out" / "short-s1" / "rank").glob("*@0"):
        shutil.rmtree(place)
    out = tmp_path / "copy" / "out"
    assert main(["sweep", str(tmp_path / "copy" / "course.toml"), "--out", str(out), "--quiet", "--device", "cpu"]) == 2
    assert "short-s1.pt without rank of epoch 0; expected what its training measured on its way" in capsys.readouterr().err
    assert table(tmp_path / "copy").table("rank_effective_rank_h_at_0").columns["n"] == [2, 3]
    assert checkpoint.load(out / "short-s1.pt")["epoch"] == 2


@pytest.mark.parametrize(
    ("was", "becomes", "line"),
    [
        ("rank_h@1", "rank_h@9", "metric rank.effective_rank_h@9; expected an epoch at which its recipe looks: 0, 1, 2"),
        ("rank_h@1", "rank_h@x", "metric 'rank.effective_rank_h@x'; expected train.KEY, PROBE.METRIC or PROBE.METRIC@EPOCH"),
        ('"train.loss"', '"train.loss@1"', "metric 'train.loss@1'; expected train.KEY"),
        ('"train.loss"', '"bound.loss@1"', "metric bound.loss@1; expected bound in probes.run of its recipe, now ['rank']"),
        ('against = "rank.effective_rank_h@0"', 'against = "rank.effective_rank_h@00"', "unknown metric in compare"),
        ("[[compare]]", "[probes.rank]\nn = 9\n[[compare]]", "[probes.rank] without a metric of it"),
    ],
)
def test_mistakes_are_one_line(was, becomes, line, tmp_path, capsys):
    assert main(["sweep", str(write(tmp_path, SWEEP.replace(was, becomes, 1))), "--out", str(tmp_path / "out")]) == 2
    (found,) = capsys.readouterr().err.strip().splitlines()
    assert line in found, found
