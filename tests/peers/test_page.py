"""docs/peers.md does what it says: its files and commands are taken from the page and run."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from geomssl.cli import main
from geomssl.transforms import Dihedral

pytestmark = pytest.mark.peers
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "peers.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
ESCNN, THEIRS, E3NN = (text for kind, text in BLOCKS if kind == "python")
(RULES,) = (text for kind, text in BLOCKS if kind == "toml")
(COMMANDS,) = (text.splitlines() for kind, text in BLOCKS if not kind)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A command of the page, in this process: its exit code and what it says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    Path("escnn_model.py").write_text(ESCNN)
    Path("gate.toml").write_text(RULES)

    def command(line):
        first, *words = shlex.split(line)
        assert first == "geomssl"
        code = main([*words, "--quiet"])
        return code, capsys.readouterr().out

    return command


def test_the_commands_say_what_the_page_says(run):
    exact, strided, layers, gate = COMMANDS
    code, said = run(exact)
    assert code == 0
    assert "moves the fibres as declared: worst error" in said
    assert float(re.search(r"worst error (\S+)", said)[1]) < 2e-6
    assert 1.3 < float(re.search(r"action_size +(\S+)", said)[1]) < 1.5
    code, said = run(strided)
    assert "does not move the fibres as declared: worst error 1.7" in said
    code, said = run(layers)
    assert "the features of 4 layers as declared" in said
    code, said = run(gate)
    assert (code, said.split()[0]) == (0, "PASS")
    code, said = run(gate.replace(":make", ":strided"))
    assert (code, said.split()[0]) == (1, "FAIL")


def test_stride_2_is_exact_at_9_pixels(run):
    line = COMMANDS[1] + " --dataset fields --set dataset.size=9"
    code, said = run(line)
    assert code == 0
    assert "moves the fibres as declared" in said


def test_the_library_itself_may_be_the_action(library):
    space = library.space("d4")
    names = {"space": space, "kind": library.regular(space, 2)}
    if library.name == "e2cnn":
        names["kind"] = type("Kind", (), {"transform": lambda self, x, g: library.moved(x, library.regular(space, 2), g)})()
    exec(THEIRS, names)
    features = torch.randn(8, 2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    params = torch.arange(8.0).unsqueeze(1)
    moved = names["theirs"](features, params, (5, 5))
    assert torch.allclose(moved, Dihedral(4).act(features, params), atol=1e-5)


def test_the_map_of_e3nn_measures_as_exact():
    names = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(E3NN, names)
    found = names["found"]
    assert float(found.total.max()) < 1e-5
    assert float(found.action_size.min()) > 0.2
    assert found.exact.all()
