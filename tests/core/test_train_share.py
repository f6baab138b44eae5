"""Training on a drawn share of the images (row X6): nested, by class, and nothing else is ever touched."""

import numpy as np
import pytest
import torch
from PIL import Image

from geomssl import data, sweep, training
from geomssl.cli import main
from geomssl.data.base import Resident
from geomssl.data.derived import Part, share
from geomssl.errors import GeomsslError
from geomssl.probes import load
from geomssl.recipe import build, installed, seen


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", "train")


def recipe(**layers):
    return build([{
        "epochs": 2, "batch_size": 32, "train_share": 0.2, "encoder": {"name": "cnn", "widths": [4, 4, 8]},
        "objective": {"name": "sie", "half": 8, "projector": [8], "policy": "equivariant"}, **layers,
    }])


def test_shares_are_nested_and_take_the_same_part_of_every_class(digits):
    parts = [share(digits, p, 3) for p in (0.1, 0.2, 0.5)]
    rows = [set(p.rows.tolist()) for p in parts]
    assert rows[0] < rows[1] < rows[2]
    for part, p in zip(parts, (0.1, 0.2, 0.5), strict=True):
        wanted = [max(1, round(p * n)) for n in digits.labels.bincount().tolist()]
        assert part.labels.bincount().tolist() == wanted
    assert set(share(digits, 0.2, 4).rows.tolist()) != rows[1]
    assert share(digits, 1.0, 3) is digits
    assert len({p.fingerprint for p in parts} | {digits.fingerprint}) == 4
    with pytest.raises(GeomsslError, match="above 0"):
        share(digits, 0.0, 3)


def test_a_part_is_the_same_images_labels_factors_and_masks():
    whole = data.load("views", "train", n=24, size=16)
    part = Part(whole, torch.tensor([5, 2, 9]))
    rows = torch.tensor([2, 0])
    assert torch.equal(part.images(rows), whole.images(torch.tensor([9, 5])))
    assert torch.equal(part.masks(rows), whole.masks(torch.tensor([9, 5])))
    assert torch.equal(part.factors["azimuth"], whole.factors["azimuth"][part.rows])
    assert (part.regions, part.parameters, len(part)) == (whole.regions, whole.parameters, 3)


class Watched(Resident):
    """Remembers which images were asked for."""

    asked: set[int]

    def images(self, indices):
        self.asked |= set(indices.tolist())
        return super().images(indices)


@pytest.mark.parametrize("objective", ["sie", "supervised"])
def test_a_training_never_touches_the_other_images(digits, tmp_path, monkeypatch, objective):
    """Neither by asking for them, nor by way of anything else: with other pixels there the weights are the same to the bit."""
    chosen = recipe(objective={"name": objective, **({"half": 8, "projector": [8]} if objective == "sie" else {})})
    kept = set(seen(chosen, digits).rows.tolist())
    others = torch.tensor(sorted(set(range(len(digits))) - kept))
    weights, real = [], data.load_config
    for spoilt in (False, True):
        pixels = digits.pixels.clone()
        if spoilt:
            pixels[others] = 255 - pixels[others]
        source = Watched("digits", "train", pixels, digits.labels, digits.classes)
        source.asked = set()
        monkeypatch.setattr(Watched, "to", lambda self, device: self)
        monkeypatch.setattr(
            data, "load_config", lambda config, split, source=source: source if split == "train" else real(config, split)
        )
        trainer = training.start(chosen, tmp_path / f"{spoilt}.pt", torch.device("cpu"))
        trainer.run()
        assert source.asked <= kept
        assert len(source.asked) > 0.9 * len(kept), "all of them but the last, smaller batch of an epoch"
        weights.append(torch.cat([v.double().flatten() for v in trainer.learner.state_dict().values()]))
    assert torch.equal(*weights)
    assert weights[0].isfinite().all()


def test_probes_have_the_whole_training_split(tmp_path):
    chosen = recipe(epochs=1)
    trainer = training.start(chosen, tmp_path / "run.pt", torch.device("cpu"))
    trainer.run()
    subject = load.from_checkpoint(tmp_path / "run.pt")
    assert len(trainer.source) < 0.25 * len(trainer.whole)
    assert len(subject.train) == len(trainer.whole)


def test_a_resumed_run_keeps_its_share(tmp_path):
    trainer = training.start(recipe(), tmp_path / "run.pt", torch.device("cpu"))
    trainer.run(1)
    again = training.resume(tmp_path / "run.pt", torch.device("cpu"))
    assert torch.equal(again.source.rows, trainer.source.rows)
    with pytest.raises(GeomsslError, match="train_share"):
        training.resume(tmp_path / "run.pt", torch.device("cpu"), [{"train_share": 0.5}])


def test_too_small_a_share_for_a_batch_is_one_line(tmp_path, capsys):
    given = ["train", "--objective", "simclr", "--set", "train_share=0.05", "--batch-size", "256", "--device", "cpu"]
    assert main([*given, "--out", str(tmp_path / "r.pt")]) == 2
    assert "256 on 5" in capsys.readouterr().err
    assert main(["train", "--set", "train_share=0", "--out", str(tmp_path / "r.pt")]) == 2
    assert "train_share" in capsys.readouterr().err


def test_a_sweep_given_to_train_is_one_line(capsys):
    assert main(["train", "equivariant/table2-small"]) == 2
    said = capsys.readouterr().err
    assert "geomssl sweep equivariant/table2-small" in said
    assert said.count("\n") == 1


def test_what_could_not_be_written_is_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys):
    training.start(recipe(), tmp_path / "run.pt", torch.device("cpu")).run(1)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    monkeypatch.setattr(training.Trainer, "__init__", lambda *given: pytest.fail("it began"))
    assert main(["train", "--resume", str(tmp_path / "run.pt"), "--device", "cpu"]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["", "-small"])
def test_the_table_gives_sie_and_supervised_a_fifth_and_as_many_steps(size, tmp_path):
    plan = sweep.plan(installed()[f"equivariant/table3{size}"], tmp_path)
    cells = {unit.cell: unit.recipe for unit in plan.units}
    whole = cells["reconstruction"]
    assert whole.train_share == 1
    for name, cell in cells.items():
        assert cell.train_share == (0.2 if name.endswith("fifth") else 1)
        assert cell.epochs * cell.train_share == pytest.approx(whole.epochs)
    assert {"sie-all-fifth", "supervised-fifth"} <= cells.keys()


def test_an_absent_class_is_told_when_its_split_is_read(tmp_path, capsys):
    for split, names in (("train", "ab"), ("test", "b")):
        for name in names:
            for k in range(2):
                path = tmp_path / split / name / f"{k}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((4, 4), 50 * k + 9, np.uint8)).save(path)
    data.load(f"folder:{tmp_path}", "train")
    assert not capsys.readouterr().err
    data.load(f"folder:{tmp_path}", "test")
    assert "1 of 2 classes have no image here; the first: a" in capsys.readouterr().err
