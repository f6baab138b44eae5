"""The backbones of Homomorphic SSL: the shapes of the paper, what moves as declared, what stays apart, and what is refused."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomssl import encoders
from geomssl.cli import _notes
from geomssl.data.base import Resident
from geomssl.encoders.homomorphic import SCALES, FibreNorm
from geomssl.errors import GeomsslError, GeomsslNote
from geomssl.learner import initialise, make_batch
from geomssl.recipe import build
from geomssl.transforms.groups import CyclicRotations, Scales

C4 = CyclicRotations(4)
SMALL = {
    "hssl-mnist": {"widths": (4, 5, 6)},
    "hssl-cifar10": {"widths": (4, 5, 6), "stem": (3, 4), "blocks": (1, 1, 1)},
    "hssl-tiny": {"widths": (4, 4, 5, 6), "stem": (3, 4), "blocks": (1, 1, 1, 1)},
}
GOOD = {"hssl-mnist": 29, "hssl-cifar10": 25, "hssl-tiny": 25}
NATIVE = {"hssl-mnist": 28, "hssl-cifar10": 32, "hssl-tiny": 64}
STRUCTURES = {"translation": 1, "rotation": 4, "scale": 6, "none": 6}


def small(name="hssl-mnist", channels=1, seed=0, **options):
    torch.manual_seed(seed)
    return encoders.build(name, in_channels=channels, **(SMALL[name] | options)).double()


def images(size, n=2, channels=1, seed=1):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(encoder, size=29, steps=2):
    """A few steps on upright, shaded images, so that statistics and weights are no longer those of the start."""
    encoder = encoder.float()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.05)
    for step in range(steps):
        x = images(size, n=4, seed=step).float() * torch.linspace(0, 1, size)[:, None]
        encoder.fibres(x).square().mean().backward()
        encoder(x).var(dim=0).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return encoder.double()


def error(a, b):
    return float((a - b).detach().norm() / (b - b.mean(dim=0)).detach().norm())


def turned(encoder, size, g=1):
    params, x = torch.full((2, 1), float(g)), images(size)
    with torch.no_grad():
        return error(encoder.fibres(C4(x, params)), C4.act(encoder.fibres(x), params))


@pytest.mark.parametrize("group", STRUCTURES)
@pytest.mark.parametrize(
    ("name", "channels", "shape"),
    [("hssl-mnist", 1, (128, 8, 8)), ("hssl-cifar10", 3, (512, 7, 7)), ("hssl-tiny", 3, (512, 4, 4))],
)
def test_z_has_the_shape_of_the_paper_at_full_width(name, channels, shape, group):
    with torch.device("meta"):
        encoder = encoders.build(name, in_channels=channels, group=group)
        z = encoder.fibres(torch.rand(2, channels, GOOD[name], GOOD[name]))
        assert z.shape == (2, shape[0], STRUCTURES[group], *shape[1:])
        assert encoder.pool(z).shape == (2, shape[0]) == (2, encoder.dim)
    assert encoder.group == (C4 if group == "rotation" else None)
    assert encoder.exact == (group == "rotation")
    assert (encoder.scales.factors if group == "scale" else encoder.scales) == (SCALES if group == "scale" else None)


@pytest.mark.parametrize(
    ("name", "side", "sizes", "exact"),
    [("hssl-mnist", 8, range(29, 33), 29), ("hssl-cifar10", 7, range(25, 29), 25), ("hssl-tiny", 4, range(25, 33), 25)],
)
def test_of_the_sizes_with_that_shape_one_turns(name, side, sizes, exact):
    encoder = small(name, group="translation", size=None, kernel_size=3).float().eval()
    found = []
    for size in range(20, 40):
        with torch.no_grad():
            if encoder.fibres(images(size, n=1).float()).shape[-1] == side:
                found.append(size)
    assert found == list(sizes)
    assert [size for size in found if encoder.grids_turn(size)] == [exact]


def test_the_rule_is_one_modulo_the_total_stride():
    for name, total in (("hssl-mnist", 4), ("hssl-cifar10", 4), ("hssl-tiny", 8)):
        encoder = small(name)
        assert [s for s in range(8, 70) if encoder.grids_turn(s)] == [s for s in range(8, 70) if s % total == 1]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("mixing", ["none", "full"])
@pytest.mark.parametrize("state", ["initial", "training", "trained"])
def test_quarter_turns_are_exact_at_its_own_size(name, mixing, state):
    encoder = small(name, mixing=mixing, kernel_size=3)
    if state == "trained":
        trained(encoder)
    encoder.train(state == "training")
    assert encoder.exact
    x = images(GOOD[name])
    with torch.no_grad():
        z = encoder.fibres(x)
        for g in (1, 2, 3):
            params = torch.full((2, 1), float(g))
            moved = encoder.fibres(C4(x, params))
            assert error(moved, C4.act(z, params)) < 1e-11
            assert torch.allclose(encoder.pool(moved), encoder.pool(z), atol=1e-11)
            assert error(moved, C4.act(z, C4.inverse(params))) > 0.1 or g == 2


@pytest.mark.parametrize("name", SMALL)
def test_images_of_other_sizes_are_resampled_and_still_exact(name):
    encoder = small(name, kernel_size=3).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert turned(encoder, NATIVE[name]) < 1e-11


@pytest.mark.parametrize("name", SMALL)
def test_native_sizes_run_inexact_and_say_so_once(name):
    encoder = small(name, size=NATIVE[name], kernel_size=3).eval()
    x = images(NATIVE[name])
    nearest = {"hssl-mnist": 29, "hssl-cifar10": 33, "hssl-tiny": 65}[name]
    with pytest.warns(GeomsslNote, match=f"nearest exact size is {nearest}") as caught:
        encoder.fibres(x)
    assert "\n" not in str(caught[0].message)
    # a second warning would be an error here
    encoder.fibres(x)
    assert not encoder.exact
    assert turned(encoder, NATIVE[name]) > 0.3


def test_a_group_without_turns_warns_of_nothing():
    for group in ("translation", "scale", "none"):
        small(group=group, size=28).fibres(images(28))


def test_exact_in_single_precision_to_rounding():
    encoder = small("hssl-cifar10").float().eval()
    x, params = images(25).float(), torch.ones(2, 1)
    assert error(encoder.fibres(C4(x, params)), C4.act(encoder.fibres(x), params)) < 1e-5


@pytest.mark.parametrize("name", ["hssl-mnist", "hssl-tiny"])
@pytest.mark.parametrize("group", ["rotation", "scale", "none"])
@pytest.mark.parametrize("mixing", ["none", "full"])
def test_fibres_stay_apart_without_mixing_and_meet_with_it(name, group, mixing):
    encoder = small(name, group=group, mixing=mixing, kernel_size=5).eval()
    first = encoder.convs[0] if name == "hssl-mnist" else encoder.lift
    x = images(29)
    before = encoder.fibres(x)
    handle = first.register_forward_hook(lambda _, __, y: torch.cat([y[:, :, :-1], y[:, :, -1:] * 2], dim=2))
    after = encoder.fibres(x)
    handle.remove()
    moved = [not torch.equal(before[:, :, g], after[:, :, g]) for g in range(before.shape[2])]
    assert moved == [mixing == "full"] * (len(moved) - 1) + [True]


def test_a_fibre_of_the_scale_network_is_the_network_of_that_scale():
    """Without mixing, scale s is a plain network whose filters are those of scale s; and the block is He's pre-activation."""
    encoder = small("hssl-cifar10", group="scale", size=None, blocks=(1, 2, 1)).eval()
    for norm in (m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)):
        for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = images(17)

    def norm(m, y):
        return F.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias).relu()

    with torch.no_grad():
        z = encoder.fibres(x)
        for s in range(6):

            def conv(m, y, stride=1, s=s):
                filters = m.expand(m.weight).unflatten(0, (6, -1))[s]
                return F.conv2d(y, filters, stride=stride, padding=filters.shape[-1] // 2)

            y = norm(encoder.bn1, conv(encoder.conv1, conv(encoder.lift, 2 * x - 1)))
            for stage, blocks in enumerate(encoder.stages):
                for index, block in enumerate(blocks):
                    stride = 2 if stage and not index else 1
                    a = norm(block.bn1, y)
                    skip = y if block.downsample is None else conv(block.downsample, a, stride)
                    assert block.downsample is None or block.downsample.kernel_size == 1
                    assert (block.downsample is None) == (index > 0 or block.conv1.in_channels == block.conv1.out_channels)
                    y = conv(block.conv2, norm(block.bn2, conv(block.conv1, a, stride))) + skip
            assert torch.allclose(z[:, :, s], y, rtol=1e-10, atol=1e-12)
        top = z.amax(dim=2)
        assert torch.allclose(encoder(x), norm(encoder.norm, top).mean(dim=(2, 3)), atol=1e-12)


def test_weights_by_closed_form():
    def count(name, **options):
        with torch.device("meta"):
            return sum(p.numel() for p in encoders.build(name, in_channels=3, **options).parameters())

    norms = 2 * (32 + 64 + 128)
    mnist = 3 * 32 * 121 + 32 * 64 * 9 + 64 * 128 * 9
    for group in ("translation", "rotation", "scale"):
        assert count("hssl-mnist", group=group) == mnist + norms
    assert count("hssl-mnist", mixing="full") == 3 * 32 * 121 + 4 * (32 * 64 * 9 + 64 * 128 * 9) + norms
    free = 6 * (3 * 32 * 121 + 32 * 64 * 49 + 64 * 128 * 49)
    assert count("hssl-mnist", group="none") == free + 6 * norms
    wide = 6 * 3 * 32 * 121 + 36 * (32 * 64 * 49 + 64 * 128 * 49)
    assert count("hssl-mnist", group="none", mixing="full") == wide + 6 * norms

    total, before = 3 * 9 * 49 + 9 * 64 * 9 + 2 * 64 + 2 * 512, 64
    for width in (128, 256, 512):
        total += 9 * (before * width + 5 * width**2) + before * width + 2 * (before + 5 * width)
        before = width
    assert count("hssl-cifar10", group="scale") == total


def test_norms_pool_over_fibres_and_places():
    ours, theirs = FibreNorm(3).double(), nn.BatchNorm3d(3).double()
    x = torch.randn(4, 3, 5, 6, 6, dtype=torch.float64)
    assert torch.allclose(ours(x), theirs(x), atol=1e-12)
    assert torch.allclose(ours.running_var, theirs.running_var, atol=1e-12)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-12)


def test_shifts_by_the_stride_move_the_places():
    encoder = small(group="translation", size=None).eval()
    x = images(65)
    shifted = torch.zeros_like(x)
    shifted[:, :, 8:, 4:] = x[:, :, :-8, :-4]
    with torch.no_grad():
        z, moved = encoder.fibres(x), encoder.fibres(shifted)
    # 8 and 4 pixels are 2 and 1 places; 5 + 3 + 2 * 3 pixels, 4 places, of a border see what is outside.
    assert torch.allclose(moved[:, :, :, 6:-4, 5:-4], z[:, :, :, 4:-6, 4:-5], atol=1e-12)
    assert not torch.allclose(moved[:, :, :, 5:-4, 5:-4], z[:, :, :, 4:-5, 4:-5], atol=1e-3)


def test_the_control_shares_nothing_between_fibres():
    encoder = small(group="none", fibres=4).eval()
    assert encoder.group is None
    x, params = images(29), torch.ones(2, 1)
    with torch.no_grad():
        assert error(encoder.fibres(C4(x, params)), C4.act(encoder.fibres(x), params)) > 0.3
    train = small(group="none", fibres=4).train()
    z = train.fibres(images(29, n=8))
    first = train.norms[2]
    assert first.num_features == 4 * 6
    assert z.std(dim=(0, 3, 4)).shape == (6, 4)


def test_the_classifier_of_the_paper_learns_from_h_alone():
    encoder = small(readout="conv", group="scale")
    z = encoder.fibres(images(29))
    assert encoder.readout(z).shape[-2:] == (1, 1)
    z.square().sum().backward()
    assert encoder.readout.weight.grad is None
    encoder(images(29)).square().sum().backward()
    assert float(encoder.readout.weight.grad.norm()) > 0


def learner(objective, **options):
    torch.manual_seed(0)
    parts = {"name": "hssl-mnist", "group": "rotation", "kernel_size": 3, **SMALL["hssl-mnist"], **options}
    return initialise(build([{"encoder": parts, "objective": objective}]), 1, 29, 3)


def gradients(learner, classifies=True, seed=0):
    """Of every weight, after one step's backward pass over noise, in float64."""
    pixels = torch.randint(0, 256, (8, 1, 29, 29), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    source = Resident("noise", "train", pixels, torch.arange(8) % 3, list("abc"))
    batch = make_batch(source, torch.arange(8), learner.objective, torch.device("cpu"), 0, 0)
    batch = replace(batch, views={k: v._replace(images=v.images.double()) for k, v in batch.views.items()})
    losses, loss, _ = learner.double().train()(batch)
    assert not losses.h.requires_grad
    (losses.total + loss * classifies).backward()
    return {name: p.grad for name, p in learner.named_parameters()}


@pytest.mark.parametrize("positives", ["fibres", "inputs"])
def test_the_classifier_of_the_paper_learns_from_labels_and_the_backbone_does_not(positives):
    objective = {"name": "hssl", "positives": positives}
    found = gradients(learner(objective, readout="conv"))
    without = gradients(learner(objective, readout="conv"), classifies=False)
    assert float(found["encoder.readout.weight"].norm()) > 1e-3
    assert float(without["encoder.readout.weight"].norm()) == 0
    rest = [name for name in found if name.startswith(("encoder.convs", "encoder.norms", "objective"))]
    assert len(rest) > 9
    for name in rest:
        assert torch.equal(found[name], without[name])


def test_a_frozen_backbone_has_the_classifier_of_the_paper_too():
    found = gradients(learner({"name": "frozen"}, readout="conv"))
    learns = {name for name, gradient in found.items() if gradient is not None}
    assert learns == {"encoder.readout.weight", "classifier.weight", "classifier.bias"}
    assert float(found["encoder.readout.weight"].norm()) > 1e-3


def test_h_sees_no_label_where_the_loss_reaches_it_or_nothing_is_read_out():
    for objective, options in (({"name": "simclr"}, {"readout": "conv"}), ({"name": "hssl"}, {})):
        labelled, plain = (gradients(learner(objective, **options), classifies) for classifies in (True, False))
        for name in labelled:
            if name.startswith("encoder") and plain[name] is not None:
                assert torch.equal(labelled[name], plain[name])


def test_the_command_line_says_an_inexact_size_once_and_in_its_own_words(capsys):
    with _notes():
        for _ in range(2):
            small(size=28).fibres(images(28))
        with pytest.warns(UserWarning, match="another"):
            warnings.warn("another", stacklevel=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("geomssl: note: encoder hssl-mnist at 28x28 is not exact under quarter turns")
    assert line.endswith("(encoder.size=29)")


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("group", STRUCTURES)
def test_gradients_reach_every_weight_and_half_precision_runs(name, group):
    encoder = small(name, channels=3, group=group).float().to(memory_format=torch.channels_last)
    x = images(32, n=4, channels=3).float().contiguous(memory_format=torch.channels_last)
    (encoder(x) * torch.randn(encoder.dim)).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in encoder.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert encoder(x).isfinite().all()


def test_channels_last_changes_no_number():
    encoder, x = small("hssl-cifar10", group="scale").eval(), images(25)
    expected = encoder(x)
    moved = encoder.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert torch.allclose(moved, expected, atol=1e-11)


def test_the_scales_are_those_of_the_transform():
    encoder = small(group="scale", scales=(1.0, 1.5, 2.25))
    assert isinstance(encoder.scales, Scales)
    assert encoder.scales.factors == (1.0, 1.5, 2.25)
    assert encoder.fibres(images(29)).shape[2] == 3


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: small(group="rotations"), "'rotation'"),
        (lambda: small(mixing="some"), "'full'"),
        (lambda: small(scales=(1.5, 1.0)), "growing positive factors"),
        (lambda: small(kernel_size=8), "did you mean '9'"),
        (lambda: small(group="scale", scales=(1.0, 9.0)), "larger filters"),
        (lambda: small("hssl-tiny", blocks=(1, 1)), "4 numbers of blocks"),
        (lambda: small()(images(29, channels=3)), "(N, 1, H, W)"),
        (lambda: encoders.build("hssl-cifar"), "'hssl-cifar10'"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
