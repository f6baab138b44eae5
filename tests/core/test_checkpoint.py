"""run.pt: what is refused, in which words, and that nothing in a file is ever executed."""

import os
import pickle
import zipfile

import pytest
import torch

from geomssl import checkpoint
from geomssl.errors import GeomsslError

STATE = {
    "weights": {"w": torch.arange(3.0)}, "optimizer": {}, "schedule": {}, "scaler": {}, "step": 4, "epoch": 2,
    "config": {"seed": 0}, "history": [{"epoch": 1, "loss": 0.5}],
}


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.fixture
def run(tmp_path):
    checkpoint.save(tmp_path / "run.pt", STATE)
    return tmp_path / "run.pt"


def test_round_trip_by_file_or_folder(run):
    (run.parent / "run").mkdir()
    for name in (run, run.parent / "run"):
        found = checkpoint.load(name)
        assert torch.equal(found["weights"]["w"], STATE["weights"]["w"])
        assert found["history"] == STATE["history"]
        assert found["format"] == checkpoint.FORMAT


def test_cut_anywhere_is_refused(run):
    whole = run.read_bytes()
    for part in (1, 3, 10, len(whole) // 2, len(whole) - 1):
        run.write_bytes(whole[:part])
        with pytest.raises(GeomsslError, match="cut short or damaged|not a checkpoint"):
            checkpoint.load(run)


def test_a_pickled_object_is_not_executed(tmp_path):
    torch.save({"format": 1, "kind": checkpoint.KIND, "weights": Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(GeomsslError, match="pickled object .*not executed"):
        checkpoint.load(tmp_path / "trap.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    with pytest.raises(GeomsslError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "plain.pt")
    assert not (tmp_path / "sprung").exists()


def test_newer_and_foreign_files(tmp_path, run):
    torch.save({"format": 99, "kind": checkpoint.KIND}, tmp_path / "new.pt")
    with pytest.raises(GeomsslError, match="format 99; expected at most"):
        checkpoint.load(tmp_path / "new.pt")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(GeomsslError, match="not a geomssl checkpoint"):
        checkpoint.load(tmp_path / "other.pt")
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(GeomsslError, match="damaged"):
        checkpoint.load(tmp_path / "zip.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(GeomsslError, match="not a checkpoint"):
        checkpoint.load(tmp_path / "text.pt")
    torch.save({"format": 1, "kind": checkpoint.KIND, "step": 3}, tmp_path / "part.pt")
    with pytest.raises(GeomsslError, match="lacks config, epoch"):
        checkpoint.load(tmp_path / "part.pt")
    with pytest.raises(GeomsslError, match=r"no such file: .*ran.pt; .*did you mean 'run.pt'"):
        checkpoint.load(tmp_path / "ran.pt")
