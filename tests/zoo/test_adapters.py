"""timm:NAME and torchvision:NAME: what the libraries give themselves, sizes, channels, and what is refused."""

import pytest
import timm
import torch
from torchvision import models

from geomssl import encoders
from geomssl.cli import main
from geomssl.encoders import foreign
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.recipe import build, refuse_strangers
from geomssl.registry import resolve
from geomssl.training import build_encoder

pytestmark = pytest.mark.zoo
IMAGENET = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def built(name, channels=3, **options):
    torch.manual_seed(0)
    return encoders.build(name, in_channels=channels, **options).eval()


def images(size=64, channels=3):
    return torch.rand(2, channels, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "size", "fibres", "dim"),
    [
        ("resnet18", 64, (512, 1, 2, 2), 512),
        ("vit_tiny_patch16_224", 64, (192, 1, 4, 4), 192),
        ("deit_tiny_distilled_patch16_224", 32, (192, 1, 2, 2), 192),
        ("swin_tiny_patch4_window7_224", 224, (768, 1, 7, 7), 768),
        ("convnext_atto", 64, (320, 1, 2, 2), 320),
        ("mobilenetv3_small_050", 64, (288, 1, 2, 2), 1024),
    ],
)
@torch.no_grad()
def test_timm_gives_its_own_features(name, size, fibres, dim):
    encoder = built(f"timm:{name}", size=size)
    x = images(size)
    about = timm.models.get_pretrained_cfg(name)
    normal = (x - torch.tensor(about.mean).view(3, 1, 1)) / torch.tensor(about.std).view(3, 1, 1)
    assert torch.allclose(encoder(x), encoder.model(normal), atol=1e-6)
    assert encoder.fibres(x).shape == (2, *fibres)
    assert encoder(x).shape == (2, dim)
    assert encoder.dim == dim
    # the map by the library's own function, whichever axis holds its channels
    own = encoder.model.forward_features(normal)
    if own.dim() == 3:
        tokens = own[:, getattr(encoder.model, "num_prefix_tokens", 0) :]
        assert torch.allclose(encoder.fibres(x).flatten(2).transpose(1, 2), tokens, atol=1e-6)
    elif name.startswith("swin"):
        assert torch.allclose(encoder.fibres(x)[:, :, 0], own.permute(0, 3, 1, 2), atol=1e-6)
    else:
        assert torch.allclose(encoder.fibres(x)[:, :, 0], own, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "size", "fibres", "dim"),
    [
        ("resnet18", 64, (512, 1, 2, 2), 512),
        ("squeezenet1_1", 64, (512, 1, 3, 3), 512),
        ("mobilenet_v2", 64, (1280, 1, 2, 2), 1280),
        ("mobilenet_v3_small", 64, (576, 1, 2, 2), 1024),
        ("shufflenet_v2_x0_5", 64, (1024, 1, 2, 2), 1024),
        ("densenet121", 64, (1024, 1, 2, 2), 1024),
        ("swin_t", 64, (768, 1, 2, 2), 768),
        ("convnext_tiny", 64, (768, 1, 2, 2), 768),
        ("regnet_y_400mf", 64, (440, 1, 2, 2), 440),
        ("mnasnet0_5", 64, (1280, 1, 2, 2), 1280),
        ("googlenet", 64, (1024, 1, 2, 2), 1024),
    ],
)
@torch.no_grad()
def test_torchvision_gives_what_enters_its_last_linear_layer(name, size, fibres, dim):
    encoder = built(f"torchvision:{name}", size=size)
    auxiliary = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    reference = models.get_model(name, weights=None, **auxiliary)
    missing = reference.load_state_dict(encoder.model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    reference.eval()
    entering = []
    classifier = [m for m in reference.modules() if isinstance(m, torch.nn.Linear)]
    x = images(size)
    if classifier:
        classifier[-1].register_forward_pre_hook(lambda _, given: entering.append(given[0]))
        reference((x - IMAGENET[0]) / IMAGENET[1])
    else:
        entering.append(reference.features((x - IMAGENET[0]) / IMAGENET[1]).relu().mean(dim=(2, 3)))
    assert torch.allclose(encoder(x), entering[0], atol=1e-5)
    assert encoder.fibres(x).shape == (2, *fibres)
    assert encoder(x).shape == (2, dim)
    assert encoder.dim == dim
    if name in ("resnet18", "swin_t", "regnet_y_400mf", "shufflenet_v2_x0_5"):
        assert torch.allclose(encoder.pool(encoder.fibres(x)), encoder(x), atol=1e-5)


@torch.no_grad()
def test_a_vision_transformer_of_torchvision_at_another_size():
    encoder = built("torchvision:vit_b_32", size=64)
    model, x = encoder.model, images(64)
    patches = model._process_input((x - IMAGENET[0]) / IMAGENET[1])
    tokens = model.encoder(torch.cat([model.class_token.expand(2, -1, -1), patches], dim=1))
    assert encoder.fibres(x).shape == (2, 768, 1, 2, 2)
    assert torch.allclose(encoder.fibres(x).flatten(2).transpose(1, 2), tokens[:, 1:], atol=1e-5)
    assert torch.allclose(encoder(x), tokens[:, 0], atol=1e-5)


@torch.no_grad()
def test_our_resnet18_is_theirs():
    theirs = built("torchvision:resnet18")
    ours = encoders.build("resnet18", stem="imagenet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).eval()
    own = {k: v for k, v in theirs.model.state_dict().items() if not k.startswith("fc.")}
    assert set(ours.state_dict()) - set(own) == {"normalise.mean", "normalise.std"}
    ours.load_state_dict(own, strict=False)
    x = images(96)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.fibres(x), theirs.fibres(x), atol=1e-5)


@torch.no_grad()
def test_our_vit_small_is_timms():
    theirs = built("timm:vit_small_patch16_224", size=64)
    ours = encoders.build("vit-small", size=64, patch=16).eval()
    missing = ours.load_state_dict(theirs.model.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) == {"normalise.mean", "normalise.std"}
    x = images(64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)
    assert torch.allclose(ours.fibres(x), theirs.fibres(x), atol=1e-5)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
@torch.no_grad()
def test_gray_images_are_repeated_over_three_channels(name):
    gray, colour = built(name, 1), built(name, 3)
    gray.load_state_dict(colour.state_dict())
    x = images(64, 1)
    assert torch.equal(gray(x), colour(x.expand(-1, 3, -1, -1)))


def test_five_channels_in_timm_only():
    assert built("timm:resnet18", 5)(images(64, 5)).shape == (2, 512)
    with pytest.raises(GeomsslError, match="1 or 3 channels"):
        built("torchvision:resnet18", 5)


def test_a_recipe_trains_on_one_and_its_checkpoint_is_no_strangers_code(tmp_path, capsys):
    recipe = build([{"encoder": {"name": "timm:resnet18"}}])
    encoder = build_encoder(recipe, 1, 8)
    assert isinstance(encoder, Encoder)
    assert isinstance(encoder, resolve("encoder", "timm:resnet18"))
    refuse_strangers(recipe.plain(), (), "run.pt")
    with pytest.raises(GeomsslError, match="your own code"):
        refuse_strangers({**recipe.plain(), "encoder": {"name": "tim:resnet18"}}, (), "run.pt")
    out = str(tmp_path / "run.pt")
    flags = ["--encoder", "timm:test_byobnet", "--epochs", "1", "--batch-size", "256", "--quiet", "--out", out]
    assert main(["train", *flags, "--set", "objective.projector=[16]"]) == 0
    assert main(["rank", "--checkpoint", out, "--quiet", "--n", "64"]) == 0
    assert main(["train", "--resume", out, "--quiet"]) == 0
    assert "checkpoint" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:mobilenet_v3_small"])
def test_a_probe_takes_one_by_name(name, tmp_path, capsys):
    assert main(["rank", "--model", name, "--quiet", "--n", "64", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    assert list(tmp_path.rglob("artifact.json"))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: built("timm:resnet81"), "'timm:resnet18'"),
        (lambda: built("timm:"), "unknown model timm:"),
        (lambda: built("timm:resnet18.a1_in2k"), "'timm:resnet18.a1_in1k'"),
        (lambda: built("torchvision:resnet81"), "'torchvision:resnet18'"),
        (lambda: built("torchvision:fasterrcnn_resnet50_fpn"), "torchvision.models.list_models()"),
        (lambda: built("torchvision:inception_v3", size=16), "16x16"),
        (lambda: built("timm:vit_tiny_patch16_224", size=8), "8x8"),
        (lambda: built("timm:resnet18", pretraind=True), "'pretrained'"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:squeezenet1_1"])
def test_weights_that_cannot_be_had_are_one_line(name, monkeypatch):
    def nowhere(*_, **__):
        raise OSError("no route to host")

    import timm.models._builder
    import torchvision.models._api

    monkeypatch.setattr(timm.models._builder, "load_pretrained", nowhere)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", nowhere)
    with pytest.raises(GeomsslError) as caught:
        built(name, pretrained=True)
    assert "cannot be had" in str(caught.value)
    assert "--weights" in str(caught.value)
    assert caught.value.reason == "no-weights"


def test_a_pretrained_run_is_measured_without_fetching_its_weights_again(tmp_path, monkeypatch, capsys):
    import timm.models._builder

    fetched = []
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *_, **__: fetched.append(1))
    out = str(tmp_path / "run.pt")
    flags = ["--encoder", "timm:test_byobnet", "--set", "encoder.pretrained=true", "--objective", "frozen", "--epochs", "1"]
    assert main(["train", *flags, "--batch-size", "512", "--quiet", "--out", out]) == 0, capsys.readouterr().err
    assert fetched == [1]
    assert main(["linear", "--checkpoint", out, "--quiet", "--n", "64"]) == 0, capsys.readouterr().err
    assert fetched == [1]


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_weights_of_others_go_into_a_librarys_model(name, tmp_path, capsys):
    torch.manual_seed(5)
    theirs = models.resnet18(weights=None)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "f.ckpt")
    encoder = built(name)
    loaded = foreign.load(encoder, tmp_path / "f.ckpt")
    assert loaded.ignored == {"backbone": 2}
    theirs.fc = torch.nn.Identity()
    x = images(64)
    with torch.no_grad():
        assert torch.allclose(encoder(x), theirs.eval()((x - IMAGENET[0]) / IMAGENET[1]), atol=1e-5)
    flags = ["--model", name, "--weights", str(tmp_path / "f.ckpt"), "--n", "32", "--out", str(tmp_path)]
    assert main(["rank", *flags]) == 0
    assert "ignored: backbone (2)" in capsys.readouterr().err
