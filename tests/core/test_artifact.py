"""Artifacts: what is written is what is read; nothing is half-written; what is missing is said."""

import json
import resource
import shutil
import signal

import pytest

from geomssl import artifact, files
from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError


def example(**changes):
    columns = {"x": [1, 2, 3], "y": [0.5, None, 2.5], "who": ["a", 'b,\n"c"', "d"], "ok": [True, False, None]}
    table = Table("curve", "A curve", columns)
    made = {
        "probe": "rank", "title": "Rank", "headline": "It is 3.", "definition": "r = 3", "options": {"tau": 0.1},
        "metrics": [Metric("rank", 3.0, n=5, interval=Interval(2.0, 4.0, "halves")), Metric("w", None, reason="no projector")],
        "tables": [table], "figures": [Figure("curve", "line", "A curve", table="curve", x="x", y="y")],
        "provenance": {"run": "r"}, "files": {"dot.png": b"\x89PNG"}, "notes": ["n < d"],
    }
    return Artifact(**(made | changes))


def test_saved_and_loaded_are_equal(tmp_path):
    where = example().save(tmp_path)
    assert where.parent == tmp_path / "rank"
    assert artifact.load(where) == example()
    assert {p.name for p in where.iterdir()} == {"artifact.json", "curve.csv", "curve.svg", "dot.png"}
    assert example().save(tmp_path, drawn=False) == where
    assert artifact.load(where) == example(), "nothing is lost without the drawings"
    assert {p.name for p in where.iterdir()} == {"artifact.json", "curve.csv", "dot.png"}


def test_the_folder_depends_on_the_options_alone(tmp_path):
    first = example().save(tmp_path)
    assert example(headline="other").save(tmp_path) == first
    assert artifact.load(first).headline == "other"
    assert example(options={"tau": 0.2}).save(tmp_path) != first
    assert example(step=7).save(tmp_path).name == first.name + "@7"
    assert not [p for p in (tmp_path / "rank").iterdir() if p.name.startswith(".")]


def test_find_ignores_half_written_folders(tmp_path):
    whole = example().save(tmp_path / "run")
    shutil.copytree(whole, whole.with_name("half"))
    (whole.with_name("half") / "artifact.json").unlink()
    (tmp_path / "run.pt").touch()
    for name in (tmp_path / "run.pt", tmp_path / "run", whole):
        assert artifact.find(name) == [whole]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda w: (w / "artifact.json").write_text("{"), "damaged"),
        (lambda w: (w / "curve.csv").unlink(), "no curve.csv"),
        (lambda w: (w / "artifact.json").unlink(), "no artifact.json"),
        (lambda w: (w / "curve.csv").write_text("x\n1\n"), "damaged"),
    ],
)
def test_damage_is_said(tmp_path, spoil, said):
    where = example().save(tmp_path)
    spoil(where)
    with pytest.raises(GeomsslError, match=said):
        artifact.load(where)


def test_newer_schema_is_refused(tmp_path):
    where = example().save(tmp_path)
    data = json.loads((where / "artifact.json").read_text())
    (where / "artifact.json").write_text(json.dumps(data | {"schema": artifact.SCHEMA + 1}))
    with pytest.raises(GeomsslError, match="a newer geomssl"):
        artifact.load(where)


def test_a_metric_without_an_interval_says_why():
    with pytest.raises(ValueError, match="neither an interval nor a reason"):
        Metric("m", 1.0)
    with pytest.raises(ValueError, match="is nan"):
        Metric("m", float("nan"), reason="x")
    with pytest.raises(ValueError, match="lengths"):
        Table("t", "t", {"a": [1], "b": []})


def test_unknown_metric_names_the_nearest():
    with pytest.raises(GeomsslError, match="did you mean 'rank'"):
        example().metric("ranks")


def test_a_full_disk_keeps_the_old_file(tmp_path):
    """RLIMIT_FSIZE makes write() fail midway, as a full disk does."""
    target = files.write(tmp_path / "a.bin", b"old")
    where = example().save(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(GeomsslError, match="cannot write"):
            files.write(target, b"x" * 10_000)
        with pytest.raises(GeomsslError, match="cannot write"):
            example(headline="new", files={"dot.png": b"x" * 10_000}).save(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert target.read_bytes() == b"old"
    assert artifact.load(where) == example()
    assert sorted(p.name for p in tmp_path.rglob("*") if p.name.startswith(".")) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "f").write_text("")
    with pytest.raises(GeomsslError, match=r"cannot write .*: .*/f is a file"):
        files.write(tmp_path / "f" / "g" / "h.txt", "x")
