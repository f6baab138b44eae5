"""The command line: light help, one line for every mistake, nothing half-written."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from geomssl import checkpoint
from geomssl.cli import COMMANDS, main
from geomssl.registry import names

RULES = '[[rule]]\nname = "turns"\nprobe = "equivariance"\nlimit = 0.01\n[rule.options]\ntransform = "c4"\n'
FAST = ["train", "--objective", "simclr", "--epochs", "1", "--batch-size", "512", "--quiet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run.pt"
    assert main([*FAST, "--out", str(path)]) == 0
    return path


def said(capsys):
    """The one line on stderr."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from geomssl.cli import main; main(['--help']); "
        "heavy = {'torch', 'matplotlib', 'numpy', 'pandas', 'sklearn', 'scipy'} & set(sys.modules); "
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    for name in [*COMMANDS, *names("probe")]:
        assert name in found.stdout


@pytest.mark.parametrize("name", [*COMMANDS, *names("probe")])
def test_every_command_has_help_with_an_example(name, capsys):
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert f"geomssl {name}" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["trian"], "unknown command 'trian'; expected one of demo, train"),
        (["train", "--objectiv", "simclr"], "did you mean '--objective'"),
        (["train", "--objective", "simcl"], "unknown objective 'simcl'; .*did you mean 'simclr'"),
        (["train", "--encoder", "c4cnn"], "did you mean 'c4-cnn'"),
        (["train", "--dataset", "digit"], "did you mean 'digits'"),
        (["train", "--optimizer", "sdg"], "did you mean 'sgd'"),
        (["train", "--dataset", "folder:/no/such/place"], "no such folder: /no/such/place"),
        (["train", "--set", "optim.learning=1"], "unknown key 'learning'"),
        (["train", "--set", "optim.lr=fast"], "lr = 'fast'; expected a valid number"),
        (["train", "--batch-size", "1"], "batch_size = 1"),
        (["train", "--batch-size", "9999"], "batch_size = 9999 on 1078 training images"),
        (["train", "--epochs", "many"], "'many' is not a valid integer"),
        (["train", "none.toml"], "no such file: none.toml"),
        (["train", "--resume", "none.pt"], "no such file: none.pt"),
        (["train", "--device", "cdua"], "unknown device 'cdua'"),
        (["train", "--objective", "no.such.module:Thing"], "objective 'no.such.module:Thing'"),
        (["rank"], "no model; expected one of --checkpoint"),
        (["rank", "--checkpoint", "none.pt"], "no such file: none.pt"),
        (["gate", "--rules", "none.toml", "--checkpoint", "none.pt"], "no such file: none.toml"),
        (["report", "none.pt"], "no such run none.pt"),
        (["probe", "some"], "geomssl probe some; expected all"),
    ],
)
def test_mistakes_are_one_line(arguments, line, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    found = said(capsys)
    assert found.startswith("geomssl: ")
    assert __import__("re").search(line, found), found
    assert list(tmp_path.iterdir()) == []


def test_bad_files_are_one_line(capsys, tmp_path, run):
    (tmp_path / "broken.toml").write_text("epochs = = 1")
    (tmp_path / "key.toml").write_text("epoch = 1")
    (tmp_path / "half.pt").write_bytes(run.read_bytes()[: run.stat().st_size // 2])
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"format": 99, "kind": checkpoint.KIND}, tmp_path / "newer.pt")
    for arguments, line in [
        (["train", str(tmp_path / "broken.toml")], "broken"),
        (["train", str(tmp_path / "key.toml")], "did you mean 'epochs'"),
        (["rank", "--checkpoint", str(tmp_path / "half.pt")], "cut short or damaged"),
        (["rank", "--checkpoint", str(tmp_path / "text.pt")], "not a checkpoint"),
        (["rank", "--checkpoint", str(tmp_path / "newer.pt")], "format 99"),
        (["rank", "--checkpoint", str(run), "--out", str(tmp_path / "text.pt" / "x")], "is a file"),
        (["report", str(run), "-o", str(tmp_path / "text.pt" / "r.html")], "no artifact in|is a file"),
        ([*FAST, "--out", str(tmp_path / "text.pt" / "run.pt")], "is a file"),
        ([*FAST, "--out", str(run)], "exists; expected another --out"),
        (["rank", "--checkpoint", str(run), "--n", "1"], "at least 2 images"),
        (["rank", "--checkpoint", str(run), "--dataset", "folder:/none"], "no such folder"),
    ]:
        assert main(arguments) == 2, arguments
        assert __import__("re").search(line, said(capsys)), arguments
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.toml", "half.pt", "key.toml", "newer.pt", "text.pt"]


def test_images_that_do_not_fit_the_encoder(capsys, tmp_path, run):
    for name in ("a", "b"):
        for i in range(10):
            (tmp_path / "rgb" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "rgb" / name / f"{i}.png")
    assert main(["rank", "--checkpoint", str(run), "--dataset", f"folder:{tmp_path / 'rgb'}"]) == 2
    assert "has 3 channels; expected 1" in said(capsys)


def test_train_probe_report_gate(capsys, tmp_path, run):
    assert main(["rank", "--checkpoint", str(run), "--quiet"]) == 0
    out = capsys.readouterr().out
    assert "effective_rank" in out
    assert "artifact: " in out
    assert main(["rank", "--checkpoint", str(run), "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["probe"] == "rank"
    rules = tmp_path / "gate.toml"
    rules.write_text(RULES)
    code = main(["gate", "--checkpoint", str(run), "--rules", str(rules), "--junit", str(tmp_path / "g.xml"), "--quiet"])
    assert code == 1
    assert "turns" in capsys.readouterr().out
    assert "<failure" in (tmp_path / "g.xml").read_text()
    assert main(["gate", str(run), "--rules", str(rules)]) == 1
    assert main(["report", str(run), "-o", str(tmp_path / "r.html"), "--rules", str(rules)]) == 0
    assert "<html" in (tmp_path / "r.html").read_text()


def test_step_summary(capsys, tmp_path, run, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    rules = tmp_path / "gate.toml"
    rules.write_text(RULES + "n = 64\n")
    assert main(["gate", "--checkpoint", str(run), "--rules", str(rules), "--quiet"]) == 1
    assert "turns" in (tmp_path / "summary.md").read_text()


USER = '''
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU())
        self.head = nn.Linear(32, 8)
    def forward(self, x):
        return self.head(self.body(x))

def net():
    return Net()

def pair():
    made = Net()
    return made.body, made.head
'''


def test_a_users_own_module(tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    (tmp_path / "own_net.py").write_text(USER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_net

    save_file(own_net.net().state_dict(), "w.safetensors")
    assert main(["tangent", "--model", "own_net:pair", "--out", "a", "--quiet"]) == 0
    first = capsys.readouterr().out
    assert main(["tangent", "--model", "own_net:net", "--projector", "head", "--weights", "w.safetensors", "--out", "b"]) == 0
    assert "unexplained" in first
    capsys.readouterr()
    for arguments, line in [
        (["tangent", "--model", "own_net:net", "--out", "c"], "without a projector"),
        (["tangent", "--model", "own_net:net", "--projector", "haed", "--out", "c"], "did you mean 'head'"),
        (["rank", "--model", "own_net:nett", "--out", "c"], "own_net:nett"),
        (["rank", "--model", "own_net:net", "--weights", "own_net.py", "--out", "c"], "own_net.py is no file of weights"),
        (["rank", "--model", "own_net:net", "--weights", "none", "--out", "c"], "no such file: none"),
    ]:
        assert main(arguments) == 2
        assert line in said(capsys)
    assert not (tmp_path / "c").exists()


STRICT = """
from torch import nn

class Strict(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.side, self.first = side, nn.Conv2d(3, 4, 3)

    def forward(self, x):
        assert x.shape[1:] == (3, self.side, self.side), x.shape
        return self.first(x)

def small():
    return Strict(17)

def usual():
    return Strict(32)
"""


def test_rendered_pictures_of_a_model_of_ones_own_need_no_data_set(tmp_path, monkeypatch, capsys):
    """They are 32x32 with the channels of the first convolution; a named data set keeps its own size and channels."""
    (tmp_path / "own_rgb.py").write_text(STRICT)
    monkeypatch.chdir(tmp_path)
    flags = ["--transform", "c4", "--n", "8", "--quiet", "--out", "a"]
    usual, small = (["equivariance", "--model", f"own_rgb.py:{name}", *flags] for name in ("usual", "small"))
    assert main([*usual, "--images", "fields"]) == 0, capsys.readouterr().err
    assert main([*small, "--dataset", "phantoms", "--set", "dataset.size=17"]) == 0, capsys.readouterr().err


def test_a_fault_leaves_a_log_and_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("geomssl.recipe.build", lambda *_: 1 / 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["train"]) == 2
    assert "fault: ZeroDivisionError" in said(capsys)
    (log,) = tmp_path.glob("geomssl-*.log")
    assert "Traceback" in log.read_text()


def test_settings_of_the_data_set_reach_a_probe(tmp_path, capsys, run):
    for name in ("a", "b"):
        for i in range(15):
            (tmp_path / "grey" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i + 20 * (name == "b")).integers(0, 255, (9, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "grey" / name / f"{i}.png")
    arguments = ["rank", "--checkpoint", str(run), "--dataset", f"folder:{tmp_path / 'grey'}", "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "expected square images, or --set dataset.size=N" in said(capsys)
    assert main([*arguments, "--set", "dataset.size=8"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--set", "optim.lr=8"]) == 2
    assert "keys of the data set" in said(capsys)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG])
def test_no_room_anywhere_is_one_line(number, monkeypatch, capsys):
    """Libraries write caches of their own: what they meet on a full disk is said like what we meet."""

    def full(**_):
        raise OSError(number, os.strerror(number), "cache.nbi")

    monkeypatch.setattr("geomssl.commands.listing.datasets.callback", full)
    assert main(["datasets"]) == 2
    expected = f"geomssl: cannot write cache.nbi: {os.strerror(number)}; expected room and permission to write [unwritable]\n"
    assert capsys.readouterr().err == expected


def test_a_fault_is_told_even_where_its_log_cannot_be_written(monkeypatch, capsys):
    def broken(**_):
        raise ZeroDivisionError("by nought")

    def refuse(**_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("geomssl.commands.listing.datasets.callback", broken)
    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert main(["datasets"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("geomssl: fault: ZeroDivisionError: by nought; no traceback could be written")
    assert said.count("\n") == 1
