"""Residual networks: an independent ResNet-18, weights by closed form, exact quarter turns of the C4 twin, torch.func."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomssl import encoders
from geomssl.errors import GeomsslError, GeomsslNote
from geomssl.transforms.groups import CyclicRotations

C4 = CyclicRotations(4)


def built(name, channels=3, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return encoders.build(name, in_channels=channels, **options).to(dtype)


def small(name="c4-resnet18", channels=1, **options):
    return built(name, channels, **{"width": 8, "blocks": (1, 1, 1, 1), **options})


def images(size, n=2, channels=1):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def trained(encoder, steps=2, size=9):
    """Steps on upright images that get brighter downwards, so that nothing averages over turns."""
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        x = images(size, n=8) * torch.linspace(0, 1, size, dtype=torch.float64)[:, None]
        (encoder(x)[:, step % encoder.dim].mean() - encoder(x).var(dim=0).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder.eval()


def error(a, b):
    return float((a - b).detach().norm() / (b - b.mean(dim=0)).detach().norm())


def turned(encoder, size, g=1, wrong=False):
    """Defect of the fibres under the g-th quarter turn, against Γ_g or, where `wrong`, its inverse."""
    params = torch.full((2, 1), float(g))
    x = images(size)
    with torch.no_grad():
        return error(encoder.fibres(C4(x, params)), C4.act(encoder.fibres(x), C4.inverse(params) if wrong else params))


def plain_resnet18(weights, x, stem="small"):
    """ResNet-18 of He et al. (2016), written once more as functions of a dictionary of torchvision's names, eval mode."""

    def norm(y, name):
        w = {k: weights[f"{name}.{k}"] for k in ("running_mean", "running_var", "weight", "bias")}
        return F.batch_norm(y, w["running_mean"], w["running_var"], w["weight"], w["bias"])

    if stem == "imagenet":
        x = F.max_pool2d(F.relu(norm(F.conv2d(x, weights["conv1.weight"], stride=2, padding=3), "bn1")), 3, 2, 1)
    else:
        x = F.relu(norm(F.conv2d(x, weights["conv1.weight"], padding=1 if stem == "small" else 2), "bn1"))
    for name, stride in [(f"layer{s}.{b}", 2 if s > 1 and b == 0 else 1) for s in (1, 2, 3, 4) for b in (0, 1)]:
        y = F.relu(norm(F.conv2d(x, weights[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn1"))
        y = norm(F.conv2d(y, weights[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if stride == 2:
            x = norm(F.conv2d(x, weights[f"{name}.downsample.0.weight"], stride=2), f"{name}.downsample.1")
        x = F.relu(x + y)
    return x


@pytest.mark.parametrize("stem", ["small", "small-pad2", "imagenet"])
def test_resnet18_is_the_network_of_the_paper(stem):
    encoder = built("resnet18", width=8, stem=stem).eval()
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                nn.init.uniform_(tensor, 0.5, 1.5)
    x = images(32, channels=3)
    with torch.no_grad():
        expected = plain_resnet18(encoder.state_dict(), 2 * x - 1, stem)
        assert torch.allclose(encoder.fibres(x)[:, :, 0], expected, atol=1e-12)
        assert torch.allclose(encoder(x), expected.mean(dim=(2, 3)), atol=1e-12)


def count(encoder):
    return sum(p.numel() for p in encoder.parameters())


def expected_count(channels=3, kernel=3, widths=(64, 128, 256, 512), depth=1):
    """Weights of (2, 2, 2, 2) basic blocks, depth = the orientations that a filter spans after lifting."""
    total = channels * kernel**2 * widths[0] + 2 * widths[0]
    before = widths[0]
    for stage, width in enumerate(widths):
        total += 9 * depth * (before * width + 3 * width**2) + 4 * 2 * width
        total += (depth * before * width + 2 * width) * (stage > 0)
        before = width
    return total


@pytest.mark.parametrize(
    ("name", "options", "numbers", "known"),
    [
        ("resnet18", {}, {}, 11_168_832),
        ("resnet18", {"stem": "imagenet"}, {"kernel": 7}, 11_689_512 - 513_000),  # the published count, less its fc
        ("resnet18", {"coordinates": True, "width": 16}, {"channels": 5, "widths": (16, 32, 64, 128)}, None),
        ("c4-resnet18", {}, {"widths": (32, 64, 128, 256), "depth": 4}, None),
        ("c4-resnet18", {"match": "multiply-adds"}, {"widths": (16, 32, 64, 128), "depth": 4}, None),
    ],
)
def test_weights_by_closed_form(name, options, numbers, known):
    with torch.device("meta"):
        encoder = encoders.build(name, **options)
    assert count(encoder) == expected_count(**numbers)
    assert known in (None, count(encoder))


def test_the_twin_matches_what_it_says():
    def convolutions(encoder):
        return {k: p.numel() for k, p in encoder.named_parameters() if p.dim() > 1 and k != "conv1.weight"}

    def multiply_adds(encoder):
        """Of all convolutions, from what enters and leaves conv2d: 2 images side by side count once."""
        total, real = 0, F.conv2d

        def counted(x, weight, *rest, **named):
            nonlocal total
            y = real(x, weight, *rest, **named)
            total += weight[0].numel() * y[0].numel()
            return y

        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(F, "conv2d", counted)
            patch.setattr(nn.Conv2d, "forward", lambda m, x: counted(x, m.weight, m.bias, m.stride, m.padding))
            encoder.eval()(torch.rand(1, 3, 32, 32, dtype=torch.float64))
        return total

    plain = built("resnet18", width=16)
    equal_weights = built("c4-resnet18", width=16)
    equal_work = built("c4-resnet18", width=16, match="multiply-adds")
    assert convolutions(plain) == convolutions(equal_weights)
    assert multiply_adds(plain) == multiply_adds(equal_work)
    assert 3.9 < multiply_adds(equal_weights) / multiply_adds(plain) < 4
    assert 3.9 < sum(convolutions(plain).values()) / sum(convolutions(equal_work).values()) <= 4


@pytest.mark.parametrize("size", [32, 33, 28])
@pytest.mark.parametrize("stem", ["small", "imagenet"])
@pytest.mark.parametrize("state", ["initial", "training", "trained"])
def test_the_twin_is_exact_under_quarter_turns_at_every_size(size, stem, state):
    encoder = small(stem=stem, blocks=(1, 1, 2))
    if state == "trained":
        trained(encoder)
    encoder.train(state == "training")
    assert encoder.grids_turn(size)
    for g in (1, 2, 3):
        assert turned(encoder, size, g) < 1e-11
        x, params = images(size), torch.full((2, 1), float(g))
        assert error(encoder(C4(x, params)), encoder(x)) < 1e-11
    assert min(turned(encoder, size, g, wrong=True) for g in (1, 3)) > 0.3


@pytest.mark.filterwarnings("ignore::geomssl.errors.GeomsslNote")
@pytest.mark.parametrize(
    ("stem", "exact", "inexact"),
    [("small", (9, 25, 33), (32, 28, 29)), ("small-pad2", (7, 31), (9, 32)), ("imagenet", (33, 65), (32, 41))],
)
def test_the_strided_twin_is_exact_where_it_says(stem, exact, inexact):
    encoder = trained(small(stem=stem, downsample="stride"))
    for size in (*exact, *inexact):
        assert encoder.grids_turn(size) == (size in exact)
        defect = turned(encoder, size)
        assert defect < 1e-11 if size in exact else defect > 0.01, (size, defect)


def test_a_size_that_breaks_turns_is_said_once_with_the_nearest_that_does_not():
    """A second note, or one at an exact size, is an error here."""
    encoder = small(downsample="stride").eval()
    encoder(images(33))
    with pytest.warns(GeomsslNote, match="c4-resnet18 at 32x32 is not exact .* nearest exact size is 33 .*downsample = halve"):
        encoder(images(32))
    encoder(images(32))
    small().eval()(images(32))
    small("resnet18").eval()(images(32))


def test_the_strided_rule_is_one_modulo_the_total_stride():
    for stem, total in (("small", 8), ("imagenet", 32)):
        encoder = small(stem=stem, downsample="stride")
        assert [s for s in range(2, 130) if encoder.grids_turn(s)] == [s for s in range(2, 130) if s % total == 1]


def test_the_plain_network_turns_with_nothing():
    encoder = small("resnet18").eval()
    x, params = images(33), torch.ones(2, 1)
    with torch.no_grad():
        moved = C4(encoder.fibres(x)[:, :, 0], params)[:, :, None]
        assert error(encoder.fibres(C4(x, params)), moved) > 0.3


@pytest.mark.parametrize("name", ["resnet18", "c4-resnet18"])
def test_shapes_gradients_and_half_precision(name):
    encoder = built(name, dtype=torch.float32, width=16).to(memory_format=torch.channels_last)
    x = images(16, n=4, channels=3).float().contiguous(memory_format=torch.channels_last)
    fibres = encoder.fibres(x)
    assert fibres.shape == ((4, 128, 1, 2, 2) if name == "resnet18" else (4, 64, 4, 2, 2))
    assert fibres.shape[1] == encoder.dim
    assert encoder.group == (None if name == "resnet18" else C4)
    assert torch.equal(encoder.eval()(x), encoder.pool(encoder.fibres(x)))
    (encoder.train()(x) * torch.randn(encoder.dim)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in encoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(x).isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "c4-resnet18"])
def test_channels_last_changes_no_number(name):
    encoder, x = small(name), images(9)
    expected = encoder(x)
    moved = encoder.to(memory_format=torch.channels_last)
    assert torch.allclose(moved(x.contiguous(memory_format=torch.channels_last)), expected, atol=1e-11)
    again = small(name)
    again.load_state_dict(moved.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), moved.parameters(), strict=True))


def test_channels_last_is_kept_to_the_end():
    encoder = built("resnet18", dtype=torch.float32, width=8).to(memory_format=torch.channels_last).eval()
    seen = []
    encoder.layer4.register_forward_hook(lambda _, __, y: seen.append(y.is_contiguous(memory_format=torch.channels_last)))
    encoder(images(16, channels=3).float().contiguous(memory_format=torch.channels_last))
    assert seen == [True]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", ["resnet18", "c4-resnet18"])
def test_it_works_inside_transforms_and_keeps_nothing_from_them(name):
    encoder = small(name).eval().requires_grad_(False)
    x, t = images(9), images(9).flip(0)
    with torch.no_grad():
        before = encoder(x)
        encoder.train().eval()
        h, tangent = torch.func.jvp(encoder, (x,), (t,))
        assert torch.equal(encoder(x), before)
        again, same = torch.func.jvp(encoder, (x,), (t,))
        assert torch.allclose(torch.func.vmap(encoder)(x[None])[0], before, atol=1e-12)
    assert torch.allclose(h, before)
    assert torch.equal(again, h)
    assert torch.equal(same, tangent)
    pull = torch.func.vjp(encoder, x)[1]
    cotangent = torch.randn_like(h)
    # <u, J t> = <Jᵀ u, t>
    assert torch.allclose((cotangent * tangent).sum(), (pull(cotangent)[0] * t).sum(), atol=1e-12)
    step = 1e-7
    assert torch.allclose((encoder(x + step * t) - encoder(x - step * t)) / (2 * step), tangent, atol=1e-5)


def test_zero_init_gamma_starts_each_block_as_its_shortcut():
    encoder = built("resnet18", width=8, zero_init_gamma=True).eval()
    x = torch.rand(2, 8, 6, 6, dtype=torch.float64)
    assert torch.equal(encoder.layer1(x), x)
    assert not torch.equal(built("resnet18", width=8).eval().layer1(x), x)


def test_images_are_normalised_by_the_numbers_given():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    plain, own = built("resnet18", width=8).eval(), built("resnet18", width=8, mean=mean, std=std).eval()
    x = images(16, channels=3)
    shifted = (x * 2 - 1) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    assert torch.allclose(own(shifted), plain(x), atol=1e-6)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: small(width=9), "a multiple of 2, to match parameters"),
        (lambda: small(width=10, match="multiply-adds"), "a multiple of 4"),
        (lambda: small(stem="imagnet"), "'imagenet'"),
        (lambda: small(coordinates=True), "coordinates"),
        (lambda: small("resnet18", mean=(0.1, 0.2)), "images of 1 channels"),
        (lambda: small("resnet18", std=(0.0,)), "above 0"),
        (lambda: small("resnet18")(images(8, channels=3)), "(N, 1, H, W)"),
        (lambda: encoders.build("resnet-18"), "'resnet18'"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
