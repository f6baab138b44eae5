"""Settings, recipes, the registry and seeds: what is accepted, what is refused, and in which words."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from geomssl import recipe
from geomssl.config import assignments, merge, read_toml
from geomssl.errors import GeomsslError, nearest
from geomssl.registry import BUILTIN, resolve
from geomssl.seeding import derive, generator, seeded


def test_precedence_defaults_recipe_flags_set():
    low = {"epochs": 3, "optim": {"name": "sgd", "lr": 0.5}}
    built = recipe.build([low, {"epochs": 4}, assignments(["optim.lr=0.25", "objective.beta=3"])])
    assert (built.epochs, built.optim.lr, built.objective.beta) == (4, 0.25, 3.0)
    assert built.batch_size == recipe.Recipe.model_fields["batch_size"].default


def test_a_new_name_drops_the_old_names_options():
    merged = merge({"encoder": {"name": "cnn", "coordinates": True}}, {"encoder": {"name": "mlp"}})
    assert merged == {"encoder": {"name": "mlp"}}


def test_plain_recipe_builds_the_same_recipe():
    built = recipe.build([{"objective": {"name": "hssl"}, "encoder": {"name": "c4-cnn"}}])
    assert recipe.build([built.plain()]) == built


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"epoch": 3}, "unknown key 'epoch'; .*did you mean 'epochs'"),
        ({"optim": {"learning_rate": 3}}, "unknown key 'learning_rate'; expected one of lr"),
        ({"optim": {"lr": "fast"}}, "lr = 'fast'; expected a valid number"),
        ({"optim": {"lr": -1}}, "lr = -1; expected greater than 0"),
        ({"epochs": 0}, "epochs = 0"),
        ({"encoder": {"name": "c4cnn"}}, "unknown encoder 'c4cnn'; .*did you mean 'c4-cnn'"),
        ({"objective": {"name": "simcl"}}, "did you mean 'simclr'"),
        ({"objective": "simclr"}, "expected a table"),
        ({"optim": {"name": "sdg"}}, "did you mean 'sgd'"),
        ({"objective": {"name": "simclr", "denominator": "pool"}}, "denominator = 'pool'"),
        ({"batch_size": 1}, "batch_size = 1; expected greater than or equal to 2"),
    ],
)
def test_bad_recipes(layer, said):
    with pytest.raises(GeomsslError, match=said) as caught:
        recipe.build([layer], "r.toml")
    assert "\n" not in str(caught.value)


def test_toml(tmp_path):
    (tmp_path / "bad.toml").write_text("epochs = = 3\n")
    with pytest.raises(GeomsslError, match=r"bad.toml is broken: .*line 1"):
        read_toml(tmp_path / "bad.toml")
    with pytest.raises(GeomsslError, match=r"no such file: .*bat.toml; .*did you mean 'bad.toml'"):
        read_toml(tmp_path / "bat.toml")
    with pytest.raises(GeomsslError, match=r"did you mean 'digits-simclr'"):
        recipe.read("digits-simcrl")


def test_assignments():
    assert assignments(["a.b=1", "a.c=[1, 2]", "d=text", "e=true"]) == {"a": {"b": 1, "c": [1, 2]}, "d": "text", "e": True}
    with pytest.raises(GeomsslError, match="key=value"):
        assignments(["a.b"])


@pytest.mark.parametrize("kind", BUILTIN)
def test_every_built_in_name_resolves(kind):
    for name in BUILTIN[kind]:
        found = resolve(kind, name)
        assert hasattr(found, "Options" if kind == "probe" else "Config")


@pytest.mark.parametrize("name", [p.name for p in __import__("importlib.resources").resources.files("geomssl.recipes").iterdir()
                                  if p.name.startswith("digits-")])
def test_every_installed_recipe_is_valid(name):
    assert recipe.build([recipe.read(name.removesuffix(".toml"))]).dataset.name == "digits"


def test_nearest():
    assert nearest("resnt18", ["resnet18", "vit-small"]) == "resnet18"
    assert nearest("xyz", ["resnet18"]) is None


def test_seeds_depend_on_every_argument_and_on_nothing_else():
    found = [derive(0, "a"), derive(1, "a"), derive(0, "b"), derive(0, "a", 0), derive(0, "a", 1), derive(0, "a", 0, 1)]
    assert len(set(found)) == len(found)
    code = "from geomssl.seeding import derive; print(derive(0, 'a', 0, 1))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(there) == found[-1]
    assert torch.equal(torch.rand(3, generator=generator(0, "x")), torch.rand(3, generator=generator(0, "x")))


def test_seeded_restores_global_state():
    torch.manual_seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    with seeded(0, "library"):
        inside = torch.rand(2)
        np.random.rand(2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    with seeded(0, "library"):
        assert torch.equal(torch.rand(2), inside)
