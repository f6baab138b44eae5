"""geomssl features: both formats hold what the subject gives, in memory or streamed, and nothing is half-written."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from geomssl.cli import main
from geomssl.probes import load


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.pt"
    flags = ["--epochs", "1", "--batch-size", "512", "--quiet", "--device", "cpu", "--set", "objective.policy=small"]
    assert main(["train", *flags, "--out", str(path)]) == 0
    return path


def export(run, out, *more):
    return main(["features", "--checkpoint", str(run), "-o", str(out), "--device", "cpu", "--quiet", *more])


def read(path):
    """Arrays and texts of either format."""
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as found:
            about = json.loads(str(found["about"]))
            return {k: found[k] for k in found.files if found[k].dtype.kind != "U"}, about
    with safe_open(path, "np") as found:
        about = {k: json.loads(v) if v[0] in "[{" else v for k, v in found.metadata().items()}
        return {k: found.get_tensor(k) for k in found.keys()}, about  # noqa: SIM118


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("memory", ["2", "0"])
def test_the_file_holds_what_the_subject_gives(run, tmp_path, suffix, memory, capsys):
    out = tmp_path / f"f{suffix}"
    layers = [flag for layer in ("h", "z", "fibres") for flag in ("--layer", layer)]
    assert export(run, out, *layers, "--views", "2", "--n", "50", "--memory", memory) == 0
    assert f"features: {out}" in capsys.readouterr().out
    arrays, about = read(out)
    subject = load.from_checkpoint(run)
    indices = torch.from_numpy(arrays["indices"])
    assert len(indices) == 50
    for layer in ("h", "z", "fibres"):
        assert np.array_equal(arrays[layer], subject.features(indices, layer).numpy())
        assert np.array_equal(arrays[f"view2_{layer}"], subject.features(indices, layer, view=(subject.policy, 0, 2)).numpy())
    assert np.array_equal(arrays["labels"], subject.source.labels[indices].numpy())
    assert (about["split"], about["classes"][3]) == ("test", "3")
    assert about["provenance"]["checkpoint_sha256"] == subject.provenance["checkpoint_sha256"]
    assert about["view_parameters"] == [p.name for p in subject.policy.parameters]
    # the parameters are those that made the view
    moved = subject.policy(subject.images(indices), torch.from_numpy(arrays["view1_params"]))
    assert np.allclose(arrays["view1_h"], subject.encoder(moved).numpy(), atol=1e-5)
    assert not np.array_equal(arrays["view1_h"], arrays["view2_h"])
    assert [p.name for p in tmp_path.iterdir()] == [out.name]


def test_by_default_h_and_z_of_the_whole_split(run, tmp_path):
    assert export(run, tmp_path / "f.npz", "--split", "val") == 0
    arrays, about = read(tmp_path / "f.npz")
    assert set(arrays) == {"h", "z", "indices", "labels"}
    assert len(arrays["h"]) == len(arrays["labels"]) > 300
    assert about["split"] == "val"


def test_factors_come_along(run, monkeypatch, tmp_path):
    from geomssl.data.digits import Digits

    plain = Digits.load

    def with_factor(config, split):
        source = plain(config, split)
        source.factors = {"angle": torch.arange(len(source)) * 0.5}
        return source

    monkeypatch.setattr(Digits, "load", staticmethod(with_factor))
    for name in ("f.npz", "f.safetensors"):
        assert export(run, tmp_path / name, "--n", "9") == 0
        arrays, _ = read(tmp_path / name)
        assert np.array_equal(arrays["factor_angle"], arrays["indices"] * np.float32(0.5))


def test_mistakes_are_one_line_and_leave_nothing(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "own_map.py").write_text("from torch import nn\n\ndef net():\n    return nn.Flatten()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "a").write_text("x")
    for arguments, line in [
        (["--checkpoint", str(run), "-o", str(tmp_path / "f.npy")], "did you mean 'f.npz'"),
        (["--checkpoint", str(run), "-o", str(tmp_path / "f")], "ending in .npz or .safetensors"),
        (["--checkpoint", str(run), "-o", str(tmp_path / "a" / "f.npz")], "is a file"),
        (["--model", "own_map:net", "-o", str(tmp_path / "f.npz"), "--layer", "z"], "features z without a projector"),
        (["-o", str(tmp_path / "f.npz")], "no model"),
    ]:
        assert main(["features", *arguments]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1
        assert line in said[0]
    assert {p.name for p in tmp_path.iterdir()} <= {"own_map.py", "a", "__pycache__"}


def test_an_existing_file_is_replaced_whole_or_kept(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "f.npz"
    assert export(run, out, "--n", "10") == 0
    before = out.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert export(run, out, "--n", "20") == 2
    assert "cannot write" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["f.npz"]
