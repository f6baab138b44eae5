"""ViT: torch's own transformer layers with the same weights, patches in another order, sizes, positions, torch.func."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomssl import encoders
from geomssl.encoders.vit import sincos
from geomssl.errors import GeomsslError

SMALL = {"size": 8, "patch": 2, "width": 24, "heads": 3, "depth": 2}


def built(dtype=torch.float64, channels=3, **options):
    torch.manual_seed(0)
    return encoders.build("vit-small", in_channels=channels, **{**SMALL, **options}).to(dtype)


def images(size=8, n=2, channels=3, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def shaken(encoder):
    """Every weight drawn anew, so that no bias is zero and no norm the identity."""
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return encoder


def independent(encoder, x):
    """The same network of torch.nn.TransformerEncoderLayer (norm_first), patches cut by unfold: all tokens after the norm."""
    state = encoder.state_dict()
    width, patch, heads = encoder.dim, encoder.patch, encoder.blocks[0].attn.heads
    patches = F.unfold(2 * x - 1, patch, stride=patch).transpose(1, 2)
    tokens = patches @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    if "cls_token" in state:
        tokens = torch.cat([state["cls_token"].expand(len(x), -1, -1), tokens], dim=1)
    if encoder.pos_embed is not None:
        tokens = tokens + encoder.pos_embed
    names = {
        "norm1": "norm1", "norm2": "norm2", "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2",
    }
    for block in range(len(encoder.blocks)):
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.0, activation="gelu", layer_norm_eps=1e-6, batch_first=True, norm_first=True
        ).double()
        copied = {
            f"{theirs}.{kind}": state[f"blocks.{block}.{ours}.{kind}"]
            for ours, theirs in names.items() for kind in ("weight", "bias")
        }
        copied |= {f"self_attn.in_proj_{kind}": state[f"blocks.{block}.attn.qkv.{kind}"] for kind in ("weight", "bias")}
        layer.load_state_dict(copied)
        tokens = layer(tokens)
    return F.layer_norm(tokens, (width,), state["norm.weight"], state["norm.bias"], 1e-6)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("class_token", "position"), [(True, "learned"), (False, "sincos"), (True, "sincos"), (True, "none")])
def test_it_is_a_pre_norm_transformer(train, class_token, position):
    encoder = shaken(built(class_token=class_token, position=position)).train(train)
    x = images()
    expected = independent(encoder, x)
    patches = expected[:, 1:] if class_token else expected
    assert torch.allclose(encoder.tokens(x), patches, atol=1e-11)
    h = expected[:, 0] if class_token else patches.mean(dim=1)
    assert torch.allclose(encoder(x), h, atol=1e-11)


def test_fibres_are_the_patch_grid():
    encoder = shaken(built())
    x = images()
    fibres, tokens = encoder.fibres(x), encoder.tokens(x)
    assert fibres.shape == (2, 24, 1, 4, 4)
    assert torch.equal(fibres[:, :, 0, 1, 3], tokens[:, 1 * 4 + 3])
    assert torch.allclose(encoder.pool(fibres), tokens.mean(dim=1), atol=1e-12)
    averaged = shaken(built(h="mean"))
    assert torch.allclose(averaged(x), averaged.tokens(x).mean(dim=1))
    assert not torch.allclose(encoder(x), encoder.pool(fibres))


def permuted(x, order, patch=2):
    """The image with its patches in another order, row by row."""
    side = x.shape[-1] // patch
    cut = F.unfold(x, patch, stride=patch)[:, :, order]
    return F.fold(cut, (side * patch, side * patch), patch, stride=patch)


@pytest.mark.parametrize("position", ["none", "learned", "sincos"])
def test_without_positions_patches_have_no_order(position):
    encoder = shaken(built(position=position))
    x, order = images(), torch.randperm(16, generator=torch.Generator().manual_seed(2))
    moved = encoder.tokens(permuted(x, order))
    expected = encoder.tokens(x)[:, order]
    off = float((moved - expected).detach().norm() / expected.detach().norm())
    class_off = float((encoder(permuted(x, order)) - encoder(x)).detach().norm())
    if position == "none":
        assert max(off, class_off) < 1e-12
    else:
        assert min(off, class_off) > 1e-3


def test_without_positions_any_size_that_the_patch_divides():
    encoder = built(position="none", size=None)
    assert encoder.fibres(images(12)).shape == (2, 24, 1, 6, 6)
    wide = torch.rand(2, 3, 6, 10, dtype=torch.float64)
    assert encoder.fibres(wide).shape == (2, 24, 1, 3, 5)


@pytest.mark.parametrize("side", [1, 3])
def test_sincos_by_its_formula(side):
    found = sincos(side, 8)[0]
    for token in range(side**2):
        row, column = divmod(token, side)
        for k in range(2):
            rate = 10000 ** (-k / 2)
            expected = [torch.tensor(float(v)) for v in (column * rate, row * rate)]
            got = found[token]
            assert torch.allclose(got[[k, 2 + k]], torch.stack([expected[0].sin(), expected[0].cos()]))
            assert torch.allclose(got[[4 + k, 6 + k]], torch.stack([expected[1].sin(), expected[1].cos()]))


@pytest.mark.parametrize(("size", "patch"), [(224, 16), (32, 4)])
def test_weights_by_closed_form(size, patch):
    with torch.device("meta"):
        encoder = encoders.build("vit-small", size=size, patch=patch)
    d = 384
    block = (3 * d * d + 3 * d) + (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d) + 2 * 2 * d
    total = 12 * block + (3 * patch**2 + 1) * d + ((size // patch) ** 2 + 1) * d + d + 2 * d
    assert sum(p.numel() for p in encoder.parameters()) == total
    assert total == 21_665_664 or size == 32


def test_gradients_reach_every_weight_and_half_precision_runs():
    encoder = built(dtype=torch.float32)
    x = images(dtype=torch.float32)
    (encoder(x) * torch.randn(24)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in encoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(x).isfinite().all()


def test_coordinates_are_seen():
    plain, placed = built(position="none"), built(position="none", coordinates=True)
    assert placed.patch_embed.proj.in_channels == 5
    order = torch.arange(15, -1, -1)
    x = images()
    assert torch.allclose(plain(permuted(x, order)), plain(x), atol=1e-12)
    assert not torch.allclose(placed(permuted(x, order)), placed(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_derivatives_of_every_kind():
    encoder = shaken(built(depth=1)).eval()
    x, t = images(n=1), images(n=1).flip(-1)
    h, tangent = torch.func.jvp(encoder, (x,), (t,))
    assert torch.allclose(h, encoder(x), atol=1e-12)
    step = 1e-6
    assert torch.allclose((encoder(x + step * t) - encoder(x - step * t)) / (2 * step), tangent, atol=1e-5)
    assert torch.allclose(torch.func.vmap(encoder)(x[None])[0], h, atol=1e-12)
    # by two reverse passes, as the double-backward way does
    leaf = x.clone().requires_grad_()
    dummy = torch.ones_like(h, requires_grad=True)
    (pulled,) = torch.autograd.grad(encoder(leaf), leaf, dummy, create_graph=True)
    (twice,) = torch.autograd.grad(pulled, dummy, t)
    assert torch.allclose(twice, tangent, atol=1e-10)


def test_the_fused_and_the_plain_attention_agree():
    encoder = shaken(built(channels=1)).eval()
    x = images(channels=1)
    with torch.no_grad():
        fused = encoder(x)
    assert torch.allclose(encoder(x.clone().requires_grad_()), fused, atol=1e-12)


def test_training_takes_the_size_from_the_data():
    from geomssl.recipe import build
    from geomssl.training import build_encoder

    recipe = build([{"encoder": {"name": "vit-small", "patch": 2, "width": 12, "heads": 2, "depth": 1}}])
    assert build_encoder(recipe, 1, 8).size == 8
    with pytest.raises(GeomsslError, match="8x8 pixels in patches of 3"):
        build_encoder(build([{"encoder": {"name": "vit-small", "patch": 3}}]), 1, 8)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: built(size=None), "size=32"),
        (lambda: built(size=30, patch=4), "a side of 28 or 32, or patch=3"),
        (lambda: built(size=8, patch=16), "a side of 16, or patch=8"),
        (lambda: built()(images(10)), "8x8, or position none"),
        (lambda: built(position="none")(images(9)), "a side of 8 or 10"),
        (lambda: built(heads=5), "5 heads"),
        (lambda: built(width=30, heads=3, position="sincos"), "a multiple of 4"),
        (lambda: built(h="class", class_token=False), "h=mean"),
        (lambda: built(position="sine"), "position"),
        (lambda: built()(images(channels=1)), "(N, 3, H, W)"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
