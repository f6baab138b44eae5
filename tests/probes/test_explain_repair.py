"""Repairs: each is the module that one would have built, takes its cause away, and touches nothing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomssl import encoders
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.errors import GeomsslError
from geomssl.probes.effect import effect, joints, pooled, suspects, total
from geomssl.probes.equivariance import equivariance_error
from geomssl.probes.inputs import natural
from geomssl.probes.repair import blur, joint, repaired, repairs
from geomssl.probes.static import read
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations, Translations
from geomssl.transforms.actions import action

C4 = CyclicRotations(4)


def noise(n=6, channels=1, side=12, seed=0):
    return torch.randn(n, channels, side, side, generator=generator(seed, "test-repair"), dtype=torch.float64)


def net_of(*layers, seed=0):
    with seeded(seed, "test-repair-net"):
        return nn.Sequential(*(make() for make in layers)).double().eval().requires_grad_(False)


def only(net, x, asked, what, at=0):
    """The repair of that name of the call number `at` among those that have one."""
    found = [one for call in read(net, x, net) for one in repairs(call, asked)[0] if one.what == what]
    return found[at]


def symmetric(net):
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d):
            w = conv.weight
            w.copy_(sum(torch.rot90(w, k, (2, 3)) for k in range(4)) / 4)
    return net


@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 1, 1), (3, 1, 2)])
def test_circular_padding_is_the_convolution_that_pads_so(kernel, stride, dilation):
    p = dilation * (kernel - 1) // 2
    net = net_of(lambda: nn.Conv2d(1, 3, kernel, stride, p, dilation), nn.ReLU)
    twin = net_of(lambda: nn.Conv2d(1, 3, kernel, stride, p, dilation, padding_mode="circular"), nn.ReLU)
    x = noise()
    found = repaired(net, only(net, x, ("shift",), "circular padding"))
    torch.testing.assert_close(found(x), twin(x))
    assert not torch.allclose(net(x), twin(x))


def test_padding_of_pools_and_of_separate_layers_and_reflect_where_things_resample():
    x = noise()
    for pool in (nn.MaxPool2d, nn.AvgPool2d):
        net, twin = net_of(lambda pool=pool: pool(3, 1, 1)), net_of(
            lambda: nn.CircularPad2d(1), lambda pool=pool: pool(3, 1)
        )
        torch.testing.assert_close(repaired(net, only(net, x, ("shift",), "circular padding"))(x), twin(x))
    net = net_of(lambda: nn.ZeroPad2d(1), lambda: nn.Conv2d(1, 2, 3))
    twin = net_of(lambda: nn.ReflectionPad2d(1), lambda: nn.Conv2d(1, 2, 3))
    torch.testing.assert_close(repaired(net, only(net, x, (), "reflect padding"))(x), twin(x))


def test_an_average_instead_of_a_maximum_and_an_even_pooling_are_those_layers():
    x = noise()
    net, twin = net_of(lambda: nn.MaxPool2d(3, 2, 1)), net_of(lambda: nn.AvgPool2d(3, 2, 1))
    torch.testing.assert_close(repaired(net, only(net, x, ("shift",), "average instead of max"))(x), twin(x))
    net = net_of(lambda: nn.Conv2d(1, 2, 3, 2, 1))
    twin = net_of(lambda: nn.Conv2d(1, 2, 3, 1, 1), lambda: nn.AdaptiveAvgPool2d(6))
    torch.testing.assert_close(repaired(net, only(net, x, ("90°",), "at stride 1, then pooled evenly"))(x), twin(x))


@pytest.mark.parametrize(("stride", "taps"), [(2, [1, 2, 1]), (3, [1, 2, 3, 2, 1])])
def test_a_blurred_stride_is_blur_pool(stride, taps):
    x = noise()
    net, dense = net_of(lambda: nn.Conv2d(1, 2, 3, stride, 1)), net_of(lambda: nn.Conv2d(1, 2, 3, 1, 1))
    row = torch.tensor(taps, dtype=torch.float64) / sum(taps)
    kernel = (row[:, None] * row)[None, None].expand(2, 1, -1, -1)
    wide = F.pad(dense(x), (stride - 1,) * 4, mode="circular")
    expected = F.conv2d(wide, kernel, groups=2)[..., ::stride, ::stride]
    found = repaired(net, only(net, x, ("shift",), "at stride 1, then blurred"))(x)
    torch.testing.assert_close(found, expected)
    assert found.shape == net(x).shape
    assert float((blur(torch.ones(1, 1, 6, 6), (stride, 1), "reflect") - 1).abs().max()) < 1e-6


def test_patches_are_read_from_a_blurred_image():
    x = noise(side=16)
    net = net_of(lambda: nn.Conv2d(1, 2, 8, 8))
    found = repaired(net, only(net, x, ("shift",), "blurred, then at its stride"))(x)
    row = F.conv_transpose1d(torch.ones(1, 1, 8).double(), torch.ones(1, 1, 8).double())[0, 0] / 64
    wide = F.conv2d(F.pad(x, (7,) * 4, mode="circular"), (row[:, None] * row)[None, None])
    torch.testing.assert_close(found, net(wide))
    # The same as every patch of the torus, blurred, of which one in eight is kept: a blur and a convolution commute.
    every = F.conv2d(F.pad(x, (0, 7, 0, 7), mode="circular"), net[0].weight, net[0].bias)
    torch.testing.assert_close(found, blur(every, (8, 8), "circular")[..., ::8, ::8])


@pytest.mark.parametrize(("stride", "kernel", "side"), [(8, 8, 18), (8, 11, 20), (16, 16, 33)])
def test_strides_of_any_length_are_repaired_and_quarter_turns_made_exact(stride, kernel, side):
    net = symmetric(net_of(lambda: nn.Conv2d(1, 2, kernel, stride)))
    x = noise(20, 1, side)
    before = measured(net, x, C4, C4.elements()[1:], "spatial")[0]
    one = only(net, x, ("90°",), "at stride 1, then pooled evenly")
    assert before > 0.3
    assert measured(repaired(net, one), x, C4, C4.elements()[1:], "spatial")[0] < 1e-12


def test_pieces_of_a_call_at_stride_one_are_the_whole(monkeypatch):
    x = noise(7)
    net = net_of(lambda: nn.Conv2d(1, 3, 3, 2, 1))
    one = only(net, x, ("shift",), "at stride 1, then blurred")
    whole = repaired(net, one)(x)
    monkeypatch.setattr("geomssl.probes.repair.HELD", 2 * 3 * 12 * 12)
    torch.testing.assert_close(repaired(net, one)(x), whole)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(1, 2, 4, padding="same"),
        lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 2, 3, 2)),
        lambda: nn.Sequential(nn.ZeroPad2d((1, 2, 1, 2)), nn.AvgPool2d(4, 1)),
    ],
)
def test_padding_that_is_wider_at_one_end_is_made_even(make):
    net, x = symmetric(net_of(make)), noise(20)
    one = only(net, x, ("90°",), next(r.what for c in read(net, x, net) for r in repairs(c, ("90°",))[0]))
    assert "padded alike at both ends, at stride 1, then pooled evenly" in one.what
    assert measured(net, x, C4, C4.elements()[1:], "spatial")[0] > 0.1
    assert repaired(net, one)(x).shape == net(x).shape
    assert measured(repaired(net, one), x, C4, C4.elements()[1:], "spatial")[0] < 1e-12


def test_a_padding_and_a_stride_of_one_call_are_repaired_together_as_the_layer_that_one_would_have_built():
    x = noise()
    for make, twin in (
        (lambda: nn.Conv2d(1, 3, 3, 2, 1), lambda: nn.Conv2d(1, 3, 3, 1, 1, padding_mode="circular")),
        (lambda: nn.MaxPool2d(3, 2, 1), lambda: nn.Sequential(nn.CircularPad2d(1), nn.MaxPool2d(3, 1))),
    ):
        net, dense = net_of(make), net_of(twin)
        for found in (repairs(read(net, x, net)[0], ("shift",))[0], repairs(read(net, x, net)[0], ("shift",))[0][::-1]):
            kept = [one for one in found if one.what != "average instead of max"]
            every = joint(kept, "all", "all")
            torch.testing.assert_close(repaired(net, every)(x), blur(dense(x), (2, 2), "circular")[..., ::2, ::2])


def test_three_strides_off_the_grid_hide_each_other_and_together_they_are_the_whole_cause():
    with seeded(0, "test-repair-three"):
        net = nn.Sequential(
            GroupConv2d(1, 3, 3, C4, lifting=True, padding=1),
            *(m for _ in range(3) for m in (nn.ReLU(), GroupConv2d(3, 3, 3, C4, stride=2, padding=1))),
        ).double().eval().requires_grad_(False)
    x = noise(10, 1, 16)
    chosen, _, _ = suspects(read(net, x, net), ("90°",), {}, 6)
    assert len(chosen) == 3
    each = [measured(repaired(net, one), x, C4, C4.elements()[1:], "regular")[0] for one in chosen]
    assert min(each) > 0.3
    assert measured(repaired(net, joint(chosen, "all", "all")), x, C4, C4.elements()[1:], "regular")[0] < 1e-12


def test_all_of_a_cause_and_all_of_all_causes_are_offered_where_there_are_several():
    def offered(*layers, asked=("shift",)):
        net = net_of(*layers)
        return [(one.what, len(one.calls)) for one in joints(suspects(read(net, noise(), net), asked, {}, 9)[0])]

    conv, strided = (lambda: nn.Conv2d(1, 1, 3, padding=1)), (lambda: nn.Conv2d(1, 1, 3, 2, 1, padding_mode="circular"))
    assert offered(conv) == []
    assert offered(lambda: nn.MaxPool2d(2)) == []
    assert offered(conv, conv) == [("all repairs", 2)]
    assert offered(conv, strided) == [("all repairs", 2)]
    assert offered(conv, conv, strided) == [("all repairs of padding", 2), ("all repairs", 3)]
    assert offered(lambda: nn.Conv2d(1, 1, 3, 2, 1)) == [("all repairs", 1)]
    assert offered(strided, strided, asked=()) == [("all repairs", 2)]


def test_the_module_and_its_passes_are_left_as_they_were():
    net = net_of(lambda: nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU, lambda: nn.MaxPool2d(2))
    x = noise()
    kept, before = {k: v.clone() for k, v in net.state_dict().items()}, net(x)
    for call in read(net, x, net):
        for one in repairs(call, ("shift",))[0]:
            assert repaired(net, one)(x).shape == before.shape
    torch.testing.assert_close(net(x), before, rtol=0, atol=0)
    assert all(torch.equal(kept[k], v) for k, v in net.state_dict().items())


def measured(f, x, transform, params, name, images_of=None):
    inputs = natural(lambda rows: x[rows], len(x), None)
    found = total(f, inputs, transform, params, action(name, transform), 64, 0)
    return pooled(found), found


def test_a_group_network_with_a_stride_off_the_grid_is_made_exact():
    with seeded(0, "test-repair-c4"):
        net = nn.Sequential(
            GroupConv2d(1, 3, 3, C4, lifting=True, padding=1), nn.ReLU(), GroupConv2d(3, 3, 3, C4, stride=2, padding=1)
        ).double().eval().requires_grad_(False)
    x = noise(20)
    calls = read(net, x, net)
    chosen, _, waiting = suspects(calls, ("90°",), {}, 6)
    assert [one.what for one in chosen] == ["at stride 1, then pooled evenly"]
    assert waiting == []
    before, base = measured(net, x, C4, C4.elements()[1:], "regular")
    after, found = measured(repaired(net, chosen[0]), x, C4, C4.elements()[1:], "regular")
    assert before > 0.3
    assert after < 1e-12
    change = effect(base, found, chosen[0], "2", 1, resamples=500)
    assert change.name == "2: at stride 1, then pooled evenly"
    assert change.change == pytest.approx(after - before)
    assert change.low < change.change < change.high < 0


def test_the_one_padding_that_breaks_shifts_is_the_one_whose_repair_makes_them_exact():
    convs = [lambda m=m: nn.Conv2d(1, 1, 3, 1, 1, padding_mode=m) for m in ("circular", "zeros", "circular")]
    net = net_of(convs[0], nn.ReLU, convs[1], nn.ReLU, convs[2])
    x, shifts = noise(20), torch.tensor([[3.0, 1.0], [0.0, 5.0]])
    chosen, _, _ = suspects(read(net, x, net), ("shift",), {}, 6)
    assert [[c.layer for c in one.calls] for one in chosen] == [["2"]]
    assert measured(net, x, Translations(), shifts, "spatial")[0] > 0.1
    assert measured(repaired(net, chosen[0]), x, Translations(), shifts, "spatial")[0] < 1e-12


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.long, self.short = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(1, 2, 1, 2)

    def forward(self, x):
        return self.long(x) + self.short(x)


def test_branches_of_a_residual_block_are_repaired_together():
    net = symmetric(net_of(Residual))
    x = noise(20)
    calls = read(net, x, net)
    chosen, _, _ = suspects(calls, ("90°",), {}, 6)
    assert [[c.layer for c in one.calls] for one in chosen] == [["0.long", "0.short"]]
    after = measured(repaired(net, chosen[0]), x, C4, C4.elements()[1:], "spatial")[0]
    one_branch = measured(repaired(net, repairs(calls[0], ("90°",))[0][0]), x, C4, C4.elements()[1:], "spatial")[0]
    assert after < 1e-12
    assert one_branch > 0.1


def test_a_position_embedding_averaged_over_places_is_that_network():
    settings = {"size": 16, "patch": 4, "width": 24, "depth": 1, "heads": 2}
    with seeded(0, "test-repair-vit"):
        vit = encoders.build("vit-small", in_channels=1, **settings).double().eval().requires_grad_(False)
    x = noise(3, 1, 16)
    one = only(vit, x, ("shift",), "the same at all places (its mean)")
    found = repaired(vit.fibres, one)(x)
    marks = vit.pos_embed
    marks[:, 1:] = marks[:, 1:].mean(dim=1, keepdim=True)
    torch.testing.assert_close(vit.fibres(x), found)
    with seeded(0, "test-repair-coordinates"):
        cnn = encoders.build("cnn", in_channels=1, widths=(2, 2, 2), coordinates=True).double().eval()
    one = only(cnn, x, ("shift",), "the same at all places (its mean)")
    assert not torch.allclose(repaired(cnn, one)(x), cnn(x))


@pytest.mark.parametrize(
    ("make", "asked", "said"),
    [
        (lambda: nn.Conv2d(1, 2, 3, padding=1), ("90°",), "other filters would be other weights"),
        (lambda: nn.Conv2d(1, 2, 3), ("shift",), "no padding to swap"),
        (lambda: nn.AdaptiveAvgPool2d(5), ("shift",), "an average already"),
        (lambda: nn.AvgPool2d((3, 1), 1, (1, 0)), ("90°",), "not the same along both axes"),
        (lambda: nn.Upsample(size=(11, 11)), ("90°",), "an enlargement is not repaired"),
    ],
)
def test_what_cannot_be_repaired_says_why(make, asked, said):
    net = net_of(make)
    found = [repairs(call, asked) for call in read(net, noise(2, 1, 16), net)]
    assert found[0][0] == []
    assert said in found[0][1]


def test_what_need_not_be_repaired_is_left_alone():
    net = net_of(lambda: nn.Conv2d(1, 2, 3, 1, 1), lambda: nn.Conv2d(2, 2, 3, 2, 1))
    assert all(repairs(call, ("90°",))[0] == [] for call in read(symmetric(net), noise(2, 1, 13), net))


def test_a_pass_that_goes_another_way_is_refused():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.times = nn.Conv2d(1, 1, 3, padding=1), 0

        def forward(self, x):
            self.times += 1
            return self.a(x) if self.times == 1 else x * 2

    net = Fickle().double()
    one = only(net, noise(2), ("shift",), "circular padding")
    with pytest.raises(GeomsslError, match="do not depend on the values"):
        repaired(net, one)(noise(2))


def test_equal_totals_change_by_nothing_and_pairs_are_pairs():
    net = net_of(lambda: nn.Conv2d(1, 2, 3, 1, 1))
    x, shifts = noise(40), torch.tensor([[1.0, 0.0]])
    base = measured(net, x, Translations(), shifts, "spatial")[1]
    one = only(net, x, ("shift",), "circular padding")
    same = effect(base, base, one, "0", 1, resamples=300)
    assert (same.change, same.low, same.high) == (0, 0, 0)
    after = measured(repaired(net, one), x, Translations(), shifts, "spatial")[1]
    alone, shared = (effect(base, after, one, "0", count, resamples=2000) for count in (1, 20))
    assert shared.low < alone.low < alone.high < shared.high
    both = itertools.chain(base.interval, equivariance_error(net, x, Translations(), shifts, "spatial").interval)
    assert all(float(bound[0]) >= 0 for bound in both)
