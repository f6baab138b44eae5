"""The installed recipes: every one is what its place says, every cell of the papers' tables is there, and each builds."""

from __future__ import annotations

import pytest
import torch

from geomssl import recipe, sweep, training
from geomssl.cli import main
from geomssl.config import read_toml
from geomssl.data.base import Resident
from geomssl.encoders import for_images
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.objectives.hssl import HSSL
from geomssl.recipe import build, installed, read
from geomssl.seeding import seeded
from geomssl.transforms import CyclicRotations

FOUND = installed()
CONTENT = {name: read_toml(path) for name, path in FOUND.items()}
RULES = [name for name, content in CONTENT.items() if "rule" in content]
SWEEPS = [name for name, content in CONTENT.items() if {"metrics", "seeds", "cell"} & content.keys()]
RECIPES = [name for name in FOUND if name not in RULES + SWEEPS]
SIDES = {"mnist": (1, 28), "fashion-mnist": (1, 28), "cifar10": (3, 32), "tiny-imagenet": (3, 64)}
# Keller et al., Tables 1 and 2, top-1 %: A-SSL, H-SSL, frozen, supervised
PAPER = {
    "mnist-rotation": (68.2, 70.3, 87.2, 99.4), "mnist-translation": (95.9, 96.0, 94.1, 99.2),
    "mnist-scale": (98.6, 98.3, 94.7, 99.3), "cifar10-rotation": (46.1, 48.3, 38.4, 73.0),
    "cifar10-translation": (39.2, 36.3, 40.4, 76.2), "cifar10-scale": (59.4, 56.7, 41.1, 78.0),
    "tiny-rotation": (14.9, 13.5, 6.1, 22.5), "tiny-scale": (16.2, 14.0, 6.4, 23.7),
    "mnist-mlp": (87.6, 58.2, 83.0, 98.6), "mnist-cnn6": (95.2, 87.2, 87.2, 99.3), "cifar10-cnn6": (53.6, 37.5, 43.6, 67.9),
}


class Shaped(Encoder):
    """What an objective asks of an encoder before a pass: its group and the shape of its fibres (C, G, H, W)."""

    def __init__(self, c, g, h, w, group):
        super().__init__()
        self.dim, self.group, self.shape = c, group, (c, g, h, w)

    def fibres(self, images):
        raise NotImplementedError

    def pool(self, fibres):
        raise NotImplementedError


def test_every_kind_is_there():
    assert "hssl/table1" in SWEEPS
    assert "digits-simclr" in RECIPES
    assert "gate-turns" in RULES


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_build(name):
    assert build([read(name)], name).epochs > 0
    assert FOUND[name].read_text().startswith("# ")


@pytest.mark.parametrize("name", SWEEPS)
def test_sweeps_plan(name, tmp_path):
    plan = sweep.plan(FOUND[name], tmp_path / "out")
    assert len(plan.sweep.seeds) >= 3
    assert len({unit.path for unit in plan.units}) == len(plan.units)
    cells = {unit.cell: unit.recipe.model_copy(update={"seed": 0}) for unit in plan.units}
    assert len({one.model_dump_json() for one in cells.values()}) == len(cells), "two cells are the same"
    assert not (tmp_path / "out").exists()


def test_every_point_of_the_figure_is_there(tmp_path):
    """g0 from 1 to |G|-1 of every group, and bounds up to the largest distance of the map."""
    for size, side in (("", 7), ("-small", 8)):
        bases = sweep.plan(FOUND[f"hssl/fig2-base{size}"], tmp_path).cells
        assert bases == [
            *(f"translation-{k}x{k}" for k in range(1, side)), *(f"rotation-{k}" for k in range(1, 4)),
            *(f"scale-{k}" for k in range(1, 6)),
        ]
        plan = sweep.plan(FOUND[f"hssl/fig2-distance{size}"], tmp_path)
        assert max(unit.recipe.objective.distance for unit in plan.units) == 2 * (side - 1) ** 2


@pytest.mark.parametrize("size", ["", "-small"])
def test_every_cell_of_the_tables_is_there_with_the_papers_figure(size, tmp_path):
    plans = [sweep.plan(FOUND[f"hssl/table{k}{size}"], tmp_path) for k in (1, 2)]
    paper = {cell: figures for plan in plans for cell, figures in plan.paper.items()}
    assert set(paper) == {f"{row}-{method}" for row in PAPER for method in ("a", "h", "frozen", "supervised")}
    for row, figures in PAPER.items():
        for method, figure in zip(("a", "h", "frozen", "supervised"), figures, strict=True):
            assert paper[f"{row}-{method}"]["linear.linear"][0] == pytest.approx(figure / 100)
    for unit in (unit for plan in plans for unit in plan.units):
        method = unit.cell.rpartition("-")[2]
        objective = unit.recipe.objective
        assert objective.name == {"frozen": "frozen", "supervised": "supervised"}.get(method, "hssl")
        if objective.name == "hssl":
            assert objective.positives == {"a": "inputs", "h": "fibres"}[method]


@pytest.mark.parametrize("row", PAPER)
def test_full_size_recipes_are_the_papers(row):
    """Row H11, and the heads of H6."""
    chosen = build([read(f"hssl/{row}")], row)
    mnist = row.startswith("mnist")
    assert (chosen.batch_size, chosen.epochs, chosen.precision) == (4096, 500 if mnist else 1300, "fp16")
    assert chosen.micro_batch is not None
    optim = chosen.optim
    assert (optim.name, optim.lr, optim.warmup_epochs, optim.weight_decay) == ("lars", 0.1, 10, 1e-4)
    assert chosen.objective.beta == 10.0
    assert chosen.objective.denominator == "pooled"
    assert chosen.objective.projector == ((128, 128, 128) if mnist else (512, 2048, 512))


@pytest.mark.parametrize("row", PAPER)
def test_an_encoder_gives_the_fibres_that_its_objective_picks_from(row):
    """One loss of each small recipe, with positives of both kinds, on noise."""
    for positives in ("fibres", "inputs"):
        chosen = build([read(f"hssl/{row}-small"), {"objective": {"positives": positives}}], row)
        channels, side = SIDES[chosen.dataset.name]
        learner = training.initialise(chosen, channels, side, 10)
        images = torch.randint(0, 256, (8, channels, side, side), dtype=torch.uint8)
        source = Resident("noise", "train", images, torch.arange(8))
        batch = training.make_batch(source, torch.arange(8), learner.objective, torch.device("cpu"), 0, 0, 0)
        losses, _, _ = learner(batch)
        assert losses.total.isfinite()
        losses.total.backward()


# z (C, G, H, W) of the paper's networks, by row
FULL = {
    "mnist-rotation": (128, 4, 8, 8), "mnist-translation": (128, 1, 8, 8), "mnist-scale": (128, 6, 8, 8),
    "cifar10-rotation": (512, 4, 7, 7), "cifar10-translation": (512, 1, 7, 7), "cifar10-scale": (512, 6, 7, 7),
    "tiny-rotation": (512, 4, 4, 4), "tiny-scale": (512, 6, 4, 4),
    "mnist-mlp": (128, 1, 4, 4), "mnist-cnn6": (128, 6, 8, 8), "cifar10-cnn6": (512, 6, 7, 7),
}


@pytest.mark.parametrize("row", PAPER)
def test_a_full_size_network_has_the_papers_fibres(row):
    chosen = build([read(f"hssl/{row}")], row)
    channels, side = SIDES[chosen.dataset.name]
    with torch.device("meta"):
        encoder = for_images(chosen.encoder, channels, side)
        assert encoder.fibres(torch.rand(2, channels, side, side)).shape == (2, *FULL[row])
        assert encoder.dim == FULL[row][0]


@pytest.mark.parametrize("name", ["fig2-base", "fig2-distance"])
def test_every_full_size_point_has_places_and_pairs_in_those_fibres(name, tmp_path):
    """Bundles of |g0| fibres with more than one place to be, and pairs of different places."""
    for unit in sweep.plan(FOUND[f"hssl/{name}"], tmp_path).units:
        config = unit.recipe.objective
        encoder = Shaped(*FULL[f"cifar10-{config.group}"], CyclicRotations(4) if config.group == "rotation" else None)
        space = HSSL(config, encoder, 0, 3).space(encoder, (2, *encoder.shape), torch.device("cpu"))
        assert space.bundles.shape == (len(space), config.fibres)
        assert len(space) > 1
        if config.distance is not None:
            assert len(space) < int(space.allowed[0][-1]) <= len(space) ** 2


def test_the_controls_keep_the_size_of_their_output():
    """Six times the fields, read as six fibres: as many numbers as the network over six scales gives."""
    shapes = []
    for row in ("mnist-scale-small", "mnist-cnn6-small"):
        with seeded(0, "initialise"):
            encoder = for_images(build([read(f"hssl/{row}")], row).encoder, 1, 28)
        shapes.append(tuple(encoder.fibres(torch.rand(2, 1, 28, 28)).shape))
    assert shapes[0] == shapes[1]
    assert shapes[0][2] == 6


def test_the_perceptron_over_shifts_picks_one_of_its_sixteen_rows():
    """As a map of 4 x 4 places it holds the same fibres and the same h as along the axis of a group."""
    settings = {"name": "mlp", "widths": [32, 64], "fibres": 16, "size": 8}
    made = []
    for places in (False, True):
        config = build([{"encoder": settings | {"places": places}}]).encoder
        with seeded(0, "initialise"):
            made.append(for_images(config, 1, 8).eval())
    images = torch.rand(5, 1, 8, 8)
    rows, places = (encoder.fibres(images) for encoder in made)
    assert rows.shape == (5, 4, 16, 1, 1)
    assert places.shape == (5, 4, 1, 4, 4)
    assert torch.equal(rows.flatten(2), places.flatten(2))
    assert torch.equal(made[0](images), made[1](images))
    with pytest.raises(GeomsslError, match="12 fibres as places of a square map"):
        for_images(build([{"encoder": settings | {"places": True, "fibres": 12, "widths": [24]}}]).encoder, 1, 8)


def test_one_epoch_of_a_small_recipe(tmp_path):
    """On digits, since data sets need not be here; all else is the recipe's."""
    chosen = build([read("hssl/small"), {"dataset": {"name": "digits"}, "epochs": 1}])
    history = training.start(chosen, tmp_path / "r.pt", torch.device("cpu")).run()
    assert history[0]["loss"] == pytest.approx(history[0]["info_nce"])


def test_names_of_sub_folders(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert "hssl/table1 " in listed
    assert "digits-simclr " in listed
    assert read("hssl/small")["encoder"]["name"] == "c4-cnn"
    for wrong, nearest in (("hssl/mnist-rotatoin", "hssl/mnist-rotation"), ("digits-simclrr", "digits-simclr")):
        with pytest.raises(GeomsslError, match=f"did you mean '{nearest}'"):
            read(wrong)
    (tmp_path / "hssl").mkdir()
    (tmp_path / "hssl" / "small.toml").write_text("epochs = 7")
    assert recipe.read("hssl/small.toml") == {"epochs": 7}
