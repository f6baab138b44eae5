"""Weights of others in their exact layouts: what is loaded, what is left, and what is refused with the encoder unchanged."""

import os
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from geomssl import encoders
from geomssl.cli import main
from geomssl.encoders import foreign
from geomssl.errors import GeomsslError

VIT = {"size": 8, "patch": 2, "width": 12, "heads": 2, "depth": 2}


def built(name="resnet18", seed=0, channels=3, **options):
    torch.manual_seed(seed)
    return encoders.build(name, in_channels=channels, **{**({"width": 8} if name == "resnet18" else VIT), **options})


def trained(encoder):
    """Every tensor of the encoder drawn anew, so that a swap of two shows."""
    state = {k: v for k, v in encoder.state_dict().items() if not k.startswith("normalise.")}
    return {k: torch.rand_like(v) + 0.5 if v.is_floating_point() else v + 3 for k, v in state.items()}


def head(width=64, name="fc"):
    return {f"{name}.weight": torch.rand(10, width), f"{name}.bias": torch.rand(10)}


def under(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def children(state, first, shortcut="downsample"):
    """nn.Sequential(*children): conv1 is 0, bn1 is 1, layer1 is `first`, ..."""
    named = {}
    for key, value in state.items():
        part, _, rest = key.partition(".")
        index = {"conv1": 0, "bn1": 1}.get(part)
        index = first + int(part[-1]) - 1 if index is None else index
        named[f"{index}.{rest}".replace("downsample", shortcut)] = value
    return named


def momentum(state):
    return {k: torch.zeros_like(v) for k, v in state.items()}


class Cut(nn.Module):
    """A module of the user's: an encoder under another name, and a head."""

    def __init__(self, encoder, with_head=False):
        super().__init__()
        self.trunk = encoder
        if with_head:
            self.out = nn.Linear(64, 3)

    def forward(self, images):
        return self.trunk(images)


def lightning(state):
    """What pytorch-lightning writes around a state dict."""
    return {
        "epoch": 7, "global_step": 100, "pytorch-lightning_version": "2.1.0", "state_dict": OrderedDict(state), "loops": {},
        "callbacks": {}, "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}],
        "lr_schedulers": [],
    }


RESIDUAL = {
    "torchvision": lambda s: s | head(),
    "torchvision, data parallel": lambda s: under("module.", s | head()),
    "lightly, children of torchvision's resnet": lambda s: lightning(
        under("backbone.", children(s, 4)) | head(name="projection_head.layers.3") | head(name="projection_head.layers.0")
    ),
    "lightly, children of its own resnet": lambda s: lightning(
        under("backbone.", children(s, 2, "shortcut")) | under("projection_head.layers.", {"0.weight": torch.rand(9, 64)})
    ),
    "lightly, moco": lambda s: lightning(
        under("backbone_momentum.", children(momentum(s), 4))
        | under("backbone.", children(s, 4))
        | head(name="projection_head.0")
    ),
    "solo-learn": lambda s: lightning(
        under("backbone.", s) | head(name="classifier") | under("projector.", {"0.weight": torch.rand(4)})
    ),
    "solo-learn, before 1.0.4": lambda s: lightning(under("encoder.", s) | head(name="classifier")),
    "solo-learn, byol": lambda s: lightning(under("momentum_backbone.", momentum(s)) | under("backbone.", s)),
    "moco": lambda s: {
        "epoch": 200, "arch": "resnet18", "optimizer": {},
        "state_dict": under("module.encoder_k.", momentum(s))
        | under("module.encoder_q.", s | head())
        | {"module.queue": torch.rand(8, 4)},
    },
    "dino": lambda s: {
        "student": under("module.backbone.", momentum(s)), "epoch": 1,
        "teacher": under("backbone.", s) | head(name="head.mlp.0"),
    },
    "pytorch-cifar": lambda s: {
        "net": under("module.", {k.replace("downsample", "shortcut"): v for k, v in s.items()} | head(name="linear")),
        "acc": 95.4, "epoch": 199,
    },
    "tensors beside it": lambda s: {"step": torch.tensor(3), "model": s | head()},
    "no counts of batches": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
    "half precision": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
}


def torchvision_vit(state):
    """timm's names to torchvision's."""
    pairs = [
        ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), ("patch_embed.proj.", "conv_proj."),
        ("blocks.", "encoder.layers.encoder_layer_"), (".attn.qkv.", ".self_attention.in_proj_"),
        (".attn.proj.", ".self_attention.out_proj."), (".norm1.", ".ln_1."), (".norm2.", ".ln_2."), (".mlp.fc1.", ".mlp.0."),
        (".mlp.fc2.", ".mlp.3."),
    ]
    named = {}
    for key, value in state.items():
        if key.startswith("norm."):
            key = "encoder.ln." + key.removeprefix("norm.")
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        named[key] = value
    return named


TRANSFORMERS = {
    "timm": lambda s: s | head(12, "head"),
    "lightly": lambda s: lightning(under("backbone.vit.", s) | {"backbone.mask_token": torch.zeros(1, 1, 12)}),
    "dino": lambda s: {
        "student": under("module.backbone.", momentum(s)), "teacher": under("backbone.", s) | head(12, "head.mlp.0")
    },
    "mae": lambda s: {"model": s | {"mask_token": torch.zeros(1, 1, 12), "decoder_pos_embed": torch.zeros(1, 17, 6)}},
    "moco-v3": lambda s: {
        "state_dict": under("module.momentum_encoder.", momentum(s)) | under("module.base_encoder.", s | head(12, "head.0"))
    },
    "torchvision": lambda s: torchvision_vit(s) | head(12, "heads.head"),
}


def write(path, content):
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def holds(encoder, state, atol=0.0):
    mine = encoder.state_dict()
    return all(torch.allclose(mine[k].float(), v.float(), rtol=0, atol=atol) for k, v in state.items())


@pytest.mark.parametrize("layout", RESIDUAL)
def test_residual_networks_of_others(layout, tmp_path):
    encoder, state = built(), trained(built(seed=1))
    loaded = foreign.load(encoder, write(tmp_path / "f.ckpt", RESIDUAL[layout](state)), builtin=True)
    kept = {k: v for k, v in state.items() if layout != "no counts of batches" or not k.endswith("num_batches_tracked")}
    assert holds(encoder, kept, 1e-3 if layout == "half precision" else 0.0)
    assert loaded.tensors == len(kept)
    assert next(encoder.parameters()).dtype == torch.float32


@pytest.mark.parametrize("layout", TRANSFORMERS)
def test_transformers_of_others(layout, tmp_path):
    encoder, state = built("vit-small"), trained(built("vit-small", seed=1))
    foreign.load(encoder, write(tmp_path / "f.pth", TRANSFORMERS[layout](state)), builtin=True)
    assert holds(encoder, state)


def test_what_was_loaded_and_left_is_said(tmp_path):
    state = trained(built())
    path = write(tmp_path / "f.ckpt", RESIDUAL["lightly, moco"](state))
    loaded = foreign.load(built(), path, builtin=True)
    assert str(loaded) == (
        f"{len(state)} tensors loaded (children of torchvision's resnet names, prefix 'backbone.'); ignored: "
        f"backbone_momentum ({len(state)}), projection_head (2)"
    )


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".ckpt"])
def test_safetensors_and_files_of_torch(suffix, tmp_path):
    encoder, state = built(), trained(built(seed=1))
    foreign.load(encoder, write(tmp_path / f"f{suffix}", state | head()), builtin=True)
    assert holds(encoder, state)


def test_the_old_format_of_torch(tmp_path):
    encoder, state = built(), trained(built(seed=1))
    torch.save({"state_dict": state}, tmp_path / "f.pth.tar", _use_new_zipfile_serialization=False)
    foreign.load(encoder, tmp_path / "f.pth.tar", builtin=True)
    assert holds(encoder, state)


@pytest.mark.parametrize("prefix", ["momentum_backbone", "momentum_backbone.", "backbone"])
def test_a_prefix_chooses(prefix, tmp_path):
    encoder, state = built(), trained(built(seed=1))
    path = write(tmp_path / "f.ckpt", RESIDUAL["solo-learn, byol"](state))
    loaded = foreign.load(encoder, path, prefix, builtin=True)
    assert loaded.prefix == prefix.removesuffix(".") + "."
    assert holds(encoder, momentum(state) if prefix.startswith("momentum") else state)


def test_without_a_prefix_names_stand_as_they_are(tmp_path):
    encoder, state = built(), trained(built(seed=1))
    foreign.load(encoder, write(tmp_path / "f.pt", state), "none", builtin=True)
    assert holds(encoder, state)
    with pytest.raises(GeomsslError, match="0 of 100 weights"):
        foreign.load(encoder, write(tmp_path / "g.pt", under("backbone.", state)), "none", builtin=True)


@pytest.mark.parametrize("layout", ["torchvision", "solo-learn", "lightly, children of its own resnet"])
def test_a_module_of_the_users_that_wraps_the_encoder(layout, tmp_path):
    module, state = Cut(built()), trained(built(seed=1))
    foreign.load(module, write(tmp_path / "f.pt", RESIDUAL[layout](state)))
    assert holds(module.trunk, state)
    # with a head of its own, only a file that has the head too
    both = Cut(built(), with_head=True)
    with pytest.raises(GeomsslError, match="out.weight is not"):
        foreign.load(both, write(tmp_path / "g.pt", under("trunk.", state)))
    whole = {**under("module.trunk.", state), **under("module.", {"out.weight": torch.ones(3, 64), "out.bias": torch.ones(3)})}
    foreign.load(both, write(tmp_path / "h.pt", whole))
    assert holds(both.trunk, state)
    assert bool((both.out.weight == 1).all())


def test_a_part_that_is_only_called_normalise_is_loaded_like_any_other(tmp_path):
    module = nn.Sequential(OrderedDict(normalise=nn.Linear(2, 2), head=nn.Linear(2, 2)))
    state = {k: torch.rand_like(v) for k, v in module.state_dict().items()}
    foreign.load(module, write(tmp_path / "f.pt", under("module.", state)))
    assert holds(module, state)


def without(state, *names):
    return {k: v for k, v in state.items() if k not in names}


def deeper(state, name):
    """One block more in the last list."""
    stem = name.replace("#", "1")
    return state | {k.replace(stem, name.replace("#", "2")): v for k, v in state.items() if k.startswith(stem)}


REFUSED = {
    "a stem": (
        lambda: trained(built(stem="imagenet")), {},
        "conv1.weight has shape (8, 3, 7, 7); expected (8, 3, 3, 3); encoder.stem=imagenet would fit",
    ),
    "the other stem": (lambda: trained(built()), {"stem": "imagenet"}, "encoder.stem=small would fit"),
    "a width": (lambda: trained(built(width=16)), {}, "encoder.width=16 would fit"),
    "channels": (lambda: trained(built(channels=1)), {}, "images of 1 channels would fit"),
    "a part": (
        lambda: without(trained(built()), "layer3.1.conv2.weight"), {},
        "99 of 100 weights of the encoder are there, layer3.1.conv2.weight is not; expected every weight of the encoder; did "
        "you mean 'layer",
    ),
    "a shape deep inside": (
        lambda: trained(built()) | {"layer4.0.downsample.0.weight": torch.zeros(64, 16, 1, 1)}, {},
        "layer4.0.downsample.0.weight has shape (64, 16, 1, 1); expected (64, 32, 1, 1)",
    ),
    "a deeper network": (
        lambda: deeper(trained(built()), "layer3.#."), {}, "holds layer3.2.conv1.weight, which the encoder does not have"
    ),
    "another network": (lambda: trained(built("vit-small")), {}, "0 of 100 weights"),
    "the C4 twin": (lambda: trained(encoders.build("c4-resnet18", width=16)), {}, "has shape (8, 3, 1, 3, 3)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_residual_network_that_does_not_fit_is_refused_whole(case, tmp_path):
    made, options, said = REFUSED[case]
    encoder = built(**options)
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    with pytest.raises(GeomsslError) as caught:
        foreign.load(encoder, write(tmp_path / "f.pt", made()), builtin=True)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())


@pytest.mark.parametrize(
    ("theirs", "ours", "said"),
    [
        ({"size": 16}, {}, "encoder.size=16 would fit"),
        ({"size": 16, "patch": 4}, {}, "encoder.patch=4, encoder.size=16 would fit"),
        ({"width": 24}, {}, "encoder.width=24 would fit"),
        ({}, {"position": "none"}, "holds pos_embed, which the encoder does not have"),
        ({}, {"class_token": False, "position": "none"}, "which the encoder does not have"),
        ({"depth": 3}, {}, "holds blocks.2."),
        ({}, {"depth": 3}, "blocks.2.norm1.weight is not"),
    ],
)
def test_a_transformer_that_does_not_fit_is_refused(theirs, ours, said, tmp_path):
    path = write(tmp_path / "f.pt", trained(built("vit-small", **theirs)))
    with pytest.raises(GeomsslError) as caught:
        foreign.load(built("vit-small", **ours), path, builtin=True)
    assert said in str(caught.value)


def test_deeper_lists_of_a_users_module_are_refused_and_heads_are_not(tmp_path):
    state = trained(built())
    module = Cut(built())
    inside = under("trunk.", state | head())
    foreign.load(module, write(tmp_path / "f.pt", inside))
    with pytest.raises(GeomsslError, match=r"layer3\.2"):
        foreign.load(module, write(tmp_path / "g.pt", under("trunk.", deeper(state, "layer3.#."))))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin"])
def test_a_pickle_is_refused_and_not_executed(suffix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = trained(built())
    torch.save({"state_dict": state, "hyper_parameters": Evil()}, tmp_path / f"f{suffix}")
    for protocol in range(2, 6):
        (tmp_path / f"{protocol}{suffix}").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol))
    for name in ("f", *"2345"):
        with pytest.raises(GeomsslError) as caught:
            foreign.read(tmp_path / f"{name}{suffix}")
        assert caught.value.reason == "pickled-object"
        assert ("mkdir" in str(caught.value)) == (name in ("f", "2", "3"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "-old.pt"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_refused(suffix, share, tmp_path):
    path = tmp_path / f"f{suffix}"
    if suffix == "-old.pt":
        torch.save(trained(built()), path, _use_new_zipfile_serialization=False)
    else:
        write(path, trained(built()))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(GeomsslError) as caught:
        foreign.read(path)
    assert caught.value.reason == "damaged"
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason", "said"),
    [
        (None, "no-file", "'f.pt'"),
        (b"not weights at all", "damaged", "no file of weights"),
        ({"epoch": 3, "state_dict": {}}, "no-weights", "epoch, state_dict"),
        ([torch.zeros(2)], "no-weights", "a list"),
        (torch.zeros(2), "no-weights", "a Tensor"),
    ],
)
def test_files_that_hold_no_weights(content, reason, said, tmp_path):
    path = tmp_path / "f.pt"
    if content is None:
        path.write_bytes(b"")
        path = tmp_path / "ff.pt"
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(GeomsslError) as caught:
        foreign.read(path)
    assert caught.value.reason == reason
    assert said in str(caught.value)


def run(*arguments):
    return main(["rank", "--n", "32", *map(str, arguments)])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_probe_of_a_built_in_encoder_with_weights_of_others(here, capsys):
    flags = ["--encoder", "resnet18", "--set", "encoder.width=8", "--set", "encoder.blocks=[1,1]"]
    state = trained(built(channels=1, blocks=(1, 1)))
    write(here / "solo.ckpt", RESIDUAL["solo-learn"](state))
    assert run(*flags, "--weights", "solo.ckpt", "--out", "a") == 0
    said = capsys.readouterr()
    line = f"solo.ckpt: {len(state)} tensors loaded (plain names, prefix 'backbone.'); ignored: classifier (2), projector (1)"
    assert line in said.err
    artifact = next((here / "a").rglob("artifact.json")).read_text()
    assert "weights_sha256" in artifact
    assert "prefix 'backbone.'" in artifact
    assert run(*flags, "--weights", "solo.ckpt", "--prefix", "encoder", "--quiet") == 2
    assert "--prefix encoder" in capsys.readouterr().err


def test_a_probe_of_a_users_module_from_a_file_with_weights_of_others(here, capsys):
    (here / "sub").mkdir()
    (here / "sub" / "mine.py").write_text(
        "from torch import nn\nfrom beside import width\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3))\n"
    )
    (here / "sub" / "beside.py").write_text("width = 5\n")
    torch.manual_seed(3)
    state = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Conv2d(5, 5, 3)).state_dict()
    write(here / "f.safetensors", under("net.", state))
    assert run("--model", "sub/mine.py:make", "--weights", "f.safetensors", "--out", "a", "--quiet") == 0
    assert run("--model", "sub/mine.py:mke", "--quiet") == 2
    assert run("--model", "sub/none.py:make", "--quiet") == 2
    said = capsys.readouterr().err
    assert "mke" in said
    assert "sub/none.py" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "no model"),
        (["--model", "a:b", "--encoder", "cnn"], "both --model and --encoder"),
        (["--checkpoint", "r.pt", "--weights", "f.pt"], "--weights with --checkpoint"),
        (["--encoder", "cnn", "--projector", "fc"], "--projector with cnn"),
        (["--encoder", "cnn", "--prefix", "x"], "--prefix x without --weights"),
        (["--encoder", "cnn", "--set", "encodr.width=3"], "--set encodr"),
        (["--encoder", "cnn", "--set", "encoder.width=3"], "'widths'"),
        (["--encoder", "cnn", "--weights", "none.pt"], "no such file: none.pt"),
        (["--encoder", "resnet81"], "'resnet18'"),
        (["--model", "a:b", "--set", "encoder.width=3"], "--set encoder"),
    ],
)
def test_flags_that_do_not_go_together(flags, said, here, capsys):
    assert run(*flags, "--quiet") == 2
    assert said in capsys.readouterr().err
