"""The built-in encoders: shapes, exactness of the C4 network at every size, also trained, and what they refuse."""

import sys

import pytest
import torch
from torch import nn

from geomssl import encoders, registry
from geomssl.encoders.base import Normalise
from geomssl.encoders.cnn import C4CNN, CNN, halve
from geomssl.errors import GeomsslError
from geomssl.transforms.groups import CyclicRotations, Dihedral

SIZES = [4, 5, 8, 9, 11, 14]


def built(name, channels=1, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return encoders.build(name, in_channels=channels, **options).to(dtype)


def small(name="c4-cnn", **options):
    return built(name, widths=(4, 6, 8), **options)


def images(size, n=4, channels=1, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def trained(encoder, steps=5, size=8):
    """A few steps on upright images, so that running statistics and weights are no longer those of the start."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x = images(size, n=16, dtype=next(encoder.parameters()).dtype)
        x = x * torch.linspace(0, 1, size, dtype=x.dtype)[:, None]  # no average over turns
        (encoder(x)[:, step % encoder.dim].mean() - encoder(x).var(dim=0).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder


def error(a, b):
    return float((a - b).detach().norm() / (b - b.mean(dim=0)).detach().norm())


@pytest.mark.parametrize(
    ("name", "shape", "dim"), [("cnn", (128, 1, 2, 2), 128), ("c4-cnn", (128, 4, 2, 2), 128), ("mlp", (128, 16, 1, 1), 128)]
)
def test_fibres_and_h_have_the_declared_shapes(name, shape, dim):
    encoder = built(name, dtype=torch.float32, **({"size": 8} if name == "mlp" else {}))
    x = images(8, dtype=torch.float32)
    assert encoder.fibres(x).shape == (4, *shape)
    assert encoder(x).shape == (4, dim)
    assert (encoder.dim, encoder.in_channels) == (dim, 1)
    assert torch.equal(encoder.eval()(x), encoder.pool(encoder.fibres(x)))
    assert encoder.group == (CyclicRotations(4) if name == "c4-cnn" else None)
    # Objectives read a fibre of C numbers with a head made for `dim`.
    assert encoder.fibres(x).shape[1] == encoder.dim


@pytest.mark.parametrize(("size", "side"), [(8, 2), (9, 3), (28, 7), (29, 8), (33, 9), (64, 16)])
def test_maps_halve_twice_rounding_up(size, side):
    for name in ("cnn", "c4-cnn"):
        assert small(name).fibres(images(size, n=2)).shape[-2:] == (side, side)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("state", ["initial", "trained", "training"])
def test_c4_cnn_is_exact_under_quarter_turns_at_every_size(size, state):
    encoder = small() if state == "initial" else trained(small())
    encoder.train(state == "training")
    x, group = images(size), CyclicRotations(4)
    fibres, h = encoder.fibres(x), encoder(x)
    for g in range(1, 4):
        params = torch.full((4, 1), float(g))
        turned = encoder.fibres(group(x, params))
        assert error(turned, group.act(fibres, params)) < 1e-11
        assert error(turned, group.act(fibres, group.inverse(params))) > 0.5 or g == 2
        assert error(encoder(group(x, params)), h) < 1e-11


def test_c4_cnn_is_exact_to_rounding_in_float32():
    encoder = trained(small(dtype=torch.float32)).eval()
    x, group = images(9, dtype=torch.float32), CyclicRotations(4)
    params = torch.ones(4, 1)
    assert error(encoder.fibres(group(x, params)), group.act(encoder.fibres(x), params)) < 3e-6


def test_statistics_of_each_orientation_would_break_it_after_training():
    class PerOrientation(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm = nn.BatchNorm2d(4 * width)

        def forward(self, x):
            return self.norm(x.flatten(1, 2)).unflatten(1, x.shape[1:3])

    encoder = small()
    encoder.norms = nn.ModuleList(PerOrientation(w) for w in (4, 6, 8)).double()
    trained(encoder).eval()
    x, group, params = images(8), CyclicRotations(4), torch.ones(4, 1)
    assert error(encoder.fibres(group(x, params)), group.act(encoder.fibres(x), params)) > 0.01


def test_the_plain_twin_is_not_equivariant():
    encoder = small("cnn").eval()
    x, group, params = images(8), CyclicRotations(4), torch.ones(4, 1)
    assert error(encoder.fibres(group(x, params)), group(encoder.fibres(x)[:, :, 0], params)[:, :, None]) > 0.5


def test_c4_cnn_knows_no_mirror():
    encoder = small().eval()
    x, d4, mirror = images(8), Dihedral(4), torch.full((4, 1), 4.0)
    mirrored = d4(encoder.fibres(x).flatten(1, 2), mirror).view(4, 8, 4, 2, 2)[:, :, [0, 3, 2, 1]]
    assert error(encoder.fibres(d4(x, mirror)), mirrored) > 0.3


@pytest.mark.parametrize("size", range(2, 12))
def test_halving_commutes_with_turns_and_mirrors(size):
    x, d4 = images(size), Dihedral(4)
    for g in range(8):
        params = torch.full((4, 1), float(g))
        assert torch.allclose(halve(d4(x, params)), d4(halve(x), params), atol=1e-15)


def test_coordinates_are_two_channels_from_minus_one_to_one():
    seen = []
    encoder = small("cnn", coordinates=True)
    encoder.convs[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    encoder(images(5))
    y, x = seen[0][:, 1], seen[0][:, 2]
    assert seen[0].shape == (4, 3, 5, 5)
    assert torch.equal(y[0, :, 0], torch.tensor([-1, -0.5, 0, 0.5, 1], dtype=torch.float64))
    assert torch.equal(x[3], y[3].T)


def test_images_are_normalised_first_by_one_constant():
    norm = Normalise()
    x = images(4)
    assert torch.allclose(norm(x), 2 * x - 1)
    assert norm.mean.dim() == 0


@pytest.mark.parametrize("name", ["cnn", "c4-cnn", "mlp"])
def test_gradients_reach_every_weight_and_half_precision_runs(name):
    options = {"size": 8, "widths": (20, 16)} if name == "mlp" else {"widths": (4, 6, 8)}
    encoder = built(name, channels=3, dtype=torch.float32, **options)
    x = images(8, n=8, channels=3, dtype=torch.float32)
    (encoder(x) * torch.randn(encoder.dim)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in encoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(x).isfinite().all()


def test_relu_layers_keep_the_scale_of_what_comes_in():
    for name in ("cnn", "c4-cnn"):
        encoder = built(name)
        x = torch.randn(16, 1, 16, 16, dtype=torch.float64)
        first = encoder.convs[0](x)
        second = encoder.convs[1](first.relu())
        # Zero padding lets the border have less.
        assert 0.6 < float(second.detach().var() / first.detach().var()) < 1.4


def test_a_class_of_somebody_else_is_built_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "elsewhere.py").write_text(
        "from geomssl.config import Settings\nfrom geomssl.encoders import Encoder\n"
        "class Own(Encoder):\n"
        "    class Config(Settings):\n        name: str = ''\n        scale: float = 1.0\n"
        "    def __init__(self, in_channels, config):\n"
        "        super().__init__()\n        self.in_channels, self.dim, self.scale = in_channels, in_channels, config.scale\n"
        "    def fibres(self, images):\n        return self.scale * images.unsqueeze(2)\n"
        "    def pool(self, fibres):\n        return fibres.mean(dim=(2, 3, 4))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    encoder = encoders.build("elsewhere:Own", in_channels=2, scale=3.0)
    assert torch.allclose(encoder(torch.ones(1, 2, 4, 4)), torch.full((1, 2), 3.0))
    with pytest.raises(GeomsslError, match="scalee"):
        encoders.build("elsewhere:Own", in_channels=2, scalee=3.0)


@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18"])
def test_a_library_that_is_not_installed_is_one_line(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name.partition(":")[0], None)
    with pytest.raises(GeomsslError) as caught:
        encoders.build(name)
    assert "pip install 'geomssl[zoo]'" in str(caught.value)
    assert caught.value.reason == "no-library"


def test_names_of_a_library_are_known_and_code_of_the_users_is_not():
    for name in ("timm:resnet18", "torchvision:anything", "resnet18"):
        assert registry.known("encoder", name)
    for name in ("mine:Net", "./timm.py:Net", "timmy:resnet18", "timm"):
        assert not registry.known("encoder", name)
    assert not registry.known("objective", "timm:resnet18")
    assert {"timm:NAME", "torchvision:NAME"} < registry.names("encoder").keys()


def test_a_size_left_open_is_filled_from_the_images():
    config = registry.resolve("encoder", "mlp").Config.model_validate({"widths": (8,), "fibres": 2})
    assert encoders.for_images(config, 1, 5).size == 5
    assert encoders.for_images(config.model_copy(update={"size": 4}), 1, 5).size == 4


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: encoders.build("c4cnn"), "'c4-cnn'"),
        (lambda: encoders.build("cnn", width=3), "'widths'"),
        (lambda: encoders.build("cnn", widths=(0, 1, 2)), "greater than 0"),
        (lambda: encoders.build("mlp"), "size=8"),
        (lambda: encoders.build("mlp", size=8, fibres=7), "7 fibres"),
        (lambda: built("mlp", size=8)(images(9)), "8x8"),
        (lambda: small()(images(8, channels=3)), "(N, 1, H, W)"),
        (lambda: small("cnn")(images(1)), "1x1"),
        (lambda: small("cnn")(images(8)[0]), "float (N, 1, H, W)"),
        (lambda: small("cnn")((255 * images(8)).byte()), "uint8"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_classes_are_built_without_options_too():
    assert C4CNN(1).dim == CNN(1).dim == 128
