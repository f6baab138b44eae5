"""The static reader and its rules, held to measurement: what they call exact is exact in float64, and nothing else is."""

import itertools

import pytest
import torch
from torch import nn

from geomssl import encoders
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.encoders.hermite import HermiteConv2d
from geomssl.probes.breaks import breaks, exact, moves, sizes
from geomssl.probes.filters import asymmetry
from geomssl.probes.static import read
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations, Dihedral, Flips, Rotate, Translate, Translations, Zoom

C4 = CyclicRotations(4)


def noise(n, channels, height, width=None, seed=0):
    return torch.randn(
        n, channels, height, width or height, generator=generator(seed, "test-static"), dtype=torch.float64
    )


def symmetric(conv):
    """The same convolution with filters that quarter turns and mirrors leave alone."""
    with torch.no_grad():
        w = conv.weight
        turned = sum(torch.rot90(v, k, (2, 3)) for v in (w, w.flip(3)) for k in range(4)) / 8
        w.copy_(turned)
    return conv


def built(layers, seed=0):
    with seeded(seed, "test-static-net"):
        net = nn.Sequential(*(make() for make in layers)).double().eval().requires_grad_(False)
    for conv in net.modules():
        if isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) and conv.kernel_size[0] == conv.kernel_size[1]:
            symmetric(conv)
    return net


def turned(x, move):
    return {"90°": lambda: torch.rot90(x, 1, (-2, -1)), "180°": lambda: torch.rot90(x, 2, (-2, -1)),
            "mirror": lambda: x.flip(-1)}[move]()


def is_exact(net, x, move):
    wanted, found = turned(net(x), move), net(turned(x, move))
    return wanted.shape == found.shape and float((wanted - found).abs().max()) < 1e-9


def windows():
    for k, s, p in itertools.product((1, 2, 3, 4), (1, 2, 3), (0, 1)):
        yield lambda k=k, s=s, p=p: nn.Conv2d(1, 2, k, s, p)
    for k, d in itertools.product((2, 3, 4), (1, 2)):
        yield lambda k=k, d=d: nn.Conv2d(1, 2, k, padding="same", dilation=d)
        yield lambda k=k, d=d: nn.Conv2d(1, 2, k, 2, d * (k - 1) // 2, dilation=d, padding_mode="reflect")
    for k, s, p, up in itertools.product((2, 3), (1, 2, 3), (0, 1), (False, True)):
        yield lambda k=k, s=s, p=p, up=up: nn.MaxPool2d(k, s, p, ceil_mode=up)
        yield lambda k=k, s=s, p=p, up=up: nn.AvgPool2d(k, s, p, ceil_mode=up)
    for m in (1, 3, 4, 5):
        yield lambda m=m: nn.AdaptiveAvgPool2d(m)
        yield lambda m=m: nn.AdaptiveMaxPool2d(m)
    for k, s, extra in ((2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 1, 0)):
        yield lambda k=k, s=s, extra=extra: nn.ConvTranspose2d(1, 2, k, s, 1, extra)
    for mode in ("nearest", "bilinear"):
        yield lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode)
        yield lambda mode=mode: nn.Upsample(size=(11, 11), mode=mode)
    yield lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(1, 2, 3, 2))
    yield lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(1, 2, 3, 2))


@pytest.mark.parametrize("move", ["90°", "180°", "mirror"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_what_the_rules_call_exact_under_turns_and_mirrors_is_exact_and_nothing_else(move):
    told = {True: 0, False: 0}
    for number, make in enumerate(windows()):
        for side in range(7, 11):
            net = built([make], number)
            calls = read(net, noise(2, 1, side), net)
            predicted = exact(calls, move)
            assert predicted == is_exact(net, noise(2, 1, side), move), (net, side, calls)
            told[predicted] += 1
    assert min(told.values()) > 50


def test_the_rules_hold_through_several_layers():
    told = {True: 0, False: 0}
    for k, p, second, side in itertools.product((2, 3), (0, 1), (nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)), range(14, 22)):
        net = built([lambda k=k, p=p: nn.Conv2d(1, 2, k, 2, p), nn.ReLU, lambda second=second: second,
                     lambda: nn.Conv2d(2, 2, 3, 1, 1)])
        calls = read(net, noise(2, 1, side), net)
        predicted = exact(calls, "90°")
        assert predicted == is_exact(net, noise(2, 1, side), "90°"), (k, p, second, side)
        told[predicted] += 1
    assert min(told.values()) > 5


def test_images_and_windows_that_are_not_square():
    net = built([lambda: nn.Conv2d(1, 2, 3, 2, 1)])
    wide = noise(2, 1, 9, 8)
    calls = read(net, wide, net)
    assert exact(calls, "mirror") is False is is_exact(net, wide, "mirror")
    tall = noise(2, 1, 8, 9)
    assert exact(read(net, tall, net), "mirror") is True is is_exact(net, tall, "mirror")
    assert not exact(read(net, tall, net), "90°")
    long = built([lambda: nn.AvgPool2d((3, 1), 1, (1, 0))])
    assert not exact(read(long, noise(2, 1, 9), long), "90°")
    assert exact(read(long, noise(2, 1, 9), long), "180°")
    assert any("both axes" in b.words for b in breaks(read(long, noise(2, 1, 9), long)[0], "90°"))


def shifts():
    for k, s, side in itertools.product((1, 2, 3, 4), (1, 2, 3), (11, 12)):
        for mode, p in (("circular", k // 2), ("zeros", k // 2), ("reflect", k // 2), ("zeros", 0)):
            yield lambda k=k, s=s, p=p, mode=mode: nn.Conv2d(1, 2, k, s, p, padding_mode=mode), side
    for k, s, p, side in itertools.product((2, 3), (1, 2), (0, 1), (11, 12)):
        yield lambda k=k, s=s, p=p: nn.MaxPool2d(k, s, p), side
        yield lambda k=k, s=s, p=p: nn.Sequential(nn.CircularPad2d(p), nn.AvgPool2d(k, s)), side
    for m, side in itertools.product((1, 4, 5), (11, 12)):
        yield lambda m=m: nn.AdaptiveAvgPool2d(m), side
    for pool, k, side in ((nn.AvgPool2d, 11, 11), (nn.AvgPool2d, 11, 12), (nn.AvgPool2d, 12, 12), (nn.MaxPool2d, 12, 12)):
        yield lambda pool=pool, k=k: pool(k), side
    for mode, side in itertools.product(("nearest", "bilinear"), (11, 12)):
        yield lambda mode=mode: nn.Upsample(scale_factor=2, mode=mode), side
    for k in (2, 3):
        yield lambda k=k: nn.ConvTranspose2d(1, 2, k, 2), 12


def test_what_the_rules_call_exact_under_wrapped_shifts_is_exact_and_nothing_else():
    told = {True: 0, False: 0}
    for (make, side), amount in itertools.product(shifts(), (1, 2, 6)):
        net = built([make])
        x = noise(2, 1, side)
        calls = read(net, x, net)
        out = net(x)
        ratio = out.shape[-1] / side
        step = amount * ratio
        found = out.shape[-1] == 1 or step == round(step)
        if found:
            wanted = out.roll((round(step), round(step)), (-2, -1))
            found = float((wanted - net(x.roll((amount, amount), (-2, -1)))).abs().max()) < 1e-9
        predicted = exact(calls, "shift", (amount, amount))
        assert predicted == found, (net, side, amount, calls)
        told[predicted] += 1
    assert min(told.values()) > 30


def test_filters_that_are_tied_between_the_channels_of_regular_fields_are_found_in_any_order():
    with seeded(0, "test-static-group"):
        lift = GroupConv2d(1, 3, 3, Dihedral(4), lifting=True, padding=1).double()
        conv = GroupConv2d(3, 2, 3, Dihedral(4), padding=1).double()
        turns = GroupConv2d(3, 2, 3, C4, padding=1).double()
        kept = HermiteConv2d(3, 5, 5, 3, "rotation", padding=2).double()
        mixed = HermiteConv2d(3, 5, 5, 3, "rotation", padding=2, mixing="full").double()
        plain = nn.Conv2d(24, 16, 3).double()
    for layer in (lift, conv):
        assert max(asymmetry(layer.filters()).values()) < 1e-12
    for layer, groups in ((turns, 1), (kept, 4), (mixed, 1)):
        found = asymmetry(layer.filters(), groups)
        assert max(found["90°"], found["180°"]) < 1e-6
        assert found["mirror"] > 0.3
        other = layer.filters()[torch.randperm(len(layer.filters()), generator=torch.Generator().manual_seed(1))]
        assert asymmetry(other, groups)["90°"] > 0.1
    # in two groups of channels a quarter turn would tear the groups apart, and a half turn would not
    assert asymmetry(kept.filters(), 2)["90°"] > 0.1
    assert asymmetry(kept.filters(), 2)["180°"] < 1e-6
    # C2: filters and their half turns, nothing about a quarter of one
    half = torch.stack([plain.weight, plain.weight.rot90(2, (2, 3))], dim=1).flatten(0, 1)
    assert asymmetry(half)["180°"] < 1e-12
    assert asymmetry(half)["90°"] > 0.5
    for number in range(3):
        spoilt = conv.filters().clone()
        spoilt[5, 7, number, 1] += 1
        assert asymmetry(spoilt)["90°"] > 1e-2
    assert min(asymmetry(plain.weight).values()) > 0.5
    assert asymmetry(symmetric(plain).weight) == pytest.approx({"90°": 0, "180°": 0, "mirror": 0}, abs=1e-12)
    ones = torch.ones(1, 1, 3, 3)
    assert asymmetry(ones) == {"90°": 0, "180°": 0, "mirror": 0}
    edge = torch.tensor([[[[0.0, 0, 0], [-1, 0, 1], [0, 0, 0]]]])
    # Turned by 90 degrees it is orthogonal to itself; by 180, its own negative.
    assert asymmetry(edge) == pytest.approx({"90°": 1, "180°": 2**0.5, "mirror": 2**0.5})


def test_our_c4_network_is_predicted_exact_at_every_size_and_is():
    with seeded(0, "test-static-c4"):
        net = encoders.build("c4-cnn", in_channels=1, widths=(2, 3, 4)).double().eval().requires_grad_(False)
    for side in (7, 8, 9, 12):
        x = noise(2, 1, side)
        calls = read(net.fibres, x, net)
        assert exact(calls, "90°")
        found = C4.act(net.fibres(x), torch.ones(2, 1)) - net.fibres(C4(x, torch.ones(2, 1)))
        assert float(found.abs().max()) < 1e-10
        assert not exact(calls, "mirror")
    assert sizes(calls, "90°") == ("every size", 12)


class Down(nn.Module):
    """Four layers, three of stride 2: 90 degrees asks for H = 1 mod 8."""

    def __init__(self):
        super().__init__()
        with seeded(0, "test-static-down"):
            self.stem = symmetric(nn.Conv2d(1, 2, 3, padding=1).double())
            self.layer1, self.layer2, self.layer3 = (symmetric(nn.Conv2d(2, 2, 3, 2, 1).double()) for _ in range(3))

    def forward(self, x):
        x = self.stem(x).relu()
        for layer in (self.layer1, self.layer2, self.layer3):
            x = layer(x).relu()
        return x


def test_the_words_name_the_layer_the_size_and_what_would_do():
    net = Down().eval().requires_grad_(False)
    calls = [c for c in read(net, noise(2, 1, 32), net) if c.grid]
    assert [c.layer for c in calls] == ["stem", "layer1", "layer2", "layer3"]
    assert [b.words for b in breaks(calls[1], "90°")] == ["stride 2 on 32x32 leaves 1 pixel over at the far end"]
    assert sizes(calls, "90°", calls[1]) == ("H ≡ 1 mod 2", 33)
    assert sizes(calls, "90°", calls[2]) == ("H ≡ 1 mod 4", 33)
    assert sizes(calls, "90°", calls[3]) == sizes(calls, "90°") == ("H ≡ 1 mod 8", 33)
    for side in range(25, 42):
        assert is_exact(net, noise(2, 1, side), "90°") == (side % 8 == 1), side
    assert "only shifts by multiples of 8 pixels" in breaks(calls[3], "shift")[-1].words


def test_positions_and_linear_maps_over_places_are_named():
    with seeded(0, "test-static-vit"):
        vit = encoders.build("vit-small", in_channels=1, size=16, patch=4, width=24, depth=1, heads=2).eval()
        none = encoders.build("vit-small", in_channels=1, size=16, patch=4, width=24, depth=1, heads=2, position="none").eval()
        coordinates = encoders.build("cnn", in_channels=1, widths=(2, 2, 2), coordinates=True).eval()
    x = noise(2, 1, 16).float()
    told = [(c.what, c.layer) for c in read(vit.fibres, x, vit)]
    assert told[:2] == [("convolution", "patch_embed.proj"), ("position", "pos_embed")]
    assert "position" not in [c.what for c in read(none.fibres, x, none)]
    assert "position" in [c.what for c in read(coordinates.fibres, x, coordinates)]
    flat = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(2 * 14 * 14, 3)).eval()
    last = read(flat, x, flat)[-1]
    assert (last.what, last.layer, last.size_in) == ("linear over places", "4", (14, 14))
    assert not exact([last], "mirror")
    pooled = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3)).eval()
    assert [c.what for c in read(pooled, x, pooled)] == ["convolution", "adaptive average pool"]


def test_what_the_reader_does_not_know_it_says():
    class Shuffle(nn.Module):
        def forward(self, x):
            return nn.functional.pixel_unshuffle(x, 2)

    net = Shuffle()
    calls = read(net, noise(2, 1, 8), net)
    assert [c.what for c in calls] == ["unread"]
    assert "pixel_unshuffle takes 8x8 to 4x4" in breaks(calls[0], "90°")[0].words


def test_channels_last_blocks_are_no_maps_until_they_are_turned_back():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)

        def forward(self, x):
            last = self.down(nn.functional.gelu(self.up(x.permute(0, 2, 3, 1))))
            return nn.functional.gelu(x + last.permute(0, 3, 1, 2))

    net = Block().double()
    calls = read(net, noise(2, 3, 8), net)
    assert [(c.what, c.size_in) for c in calls] == [("gelu", (8, 8))]
    cut = lambda x: x.view(2, 1, 4, 2, 4, 2)  # noqa: E731
    assert [c.what for c in read(cut, noise(2, 1, 8), net)] == ["unread"]


def test_the_scale_of_channels_is_no_place_in_whichever_order_the_axes_are():
    class Scaled(nn.Module):
        def __init__(self, shape, last):
            super().__init__()
            self.scale, self.last = nn.Parameter(torch.rand(shape, dtype=torch.float64)), last

        def forward(self, x):
            return (x.permute(0, 2, 3, 1) * self.scale).permute(0, 3, 1, 2) if self.last else x * self.scale

    for shape, last, place in (
        ((3,), True, False), ((1, 1, 1, 3), True, False), ((8, 1, 3), True, True), ((3, 1, 1), False, False),
        ((1, 8), False, True), ((1, 8, 8, 1), True, True),
    ):
        net = Scaled(shape, last)
        assert [c.what for c in read(net, noise(2, 3, 8), net)] == ["position"] * place, (shape, last)


def test_sizes_are_not_made_up_behind_what_the_reader_does_not_know():
    net = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4, 1, 3, 2, 1)).double()
    assert sizes(read(net, noise(2, 1, 12), net), "90°") == ("not worked out", None)


def test_strides_of_two_and_three_side_by_side_have_their_common_period():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 3, 0)

        def forward(self, x):
            return self.a(x).mean() + self.b(x).mean()

    net = Two().double()
    assert sizes(read(net, noise(2, 1, 12), net), "90°") == ("H ≡ 3 mod 6", 15)


def test_residual_branches_read_their_own_inputs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.long = nn.Sequential(nn.Conv2d(2, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, 1, 1))
            self.short = nn.Conv2d(2, 2, 1, 2)

        def forward(self, x):
            return self.long(x) + self.short(x)

    net = nn.Sequential(nn.Conv2d(1, 2, 3, 1, 1), Block(), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 3, 2, 1)).eval()
    calls = [c for c in read(net, noise(2, 1, 17).float(), net) if c.grid]
    assert {c.layer: c.source for c in calls}["1.short"] == calls[0].number
    assert [c.reach for c in calls] == [(1, 1), (1, 1), (2, 2), (1, 1), (2, 2)]
    assert sizes(calls, "90°") == ("H ≡ 1 mod 4", 17)


class Weighed(nn.Module):
    """Weights of the channels from a pool over the map, times the map; either way round."""

    def __init__(self, first):
        super().__init__()
        self.first, self.down, self.weigh = first, nn.Conv2d(2, 2, 3, 2, 1), nn.Conv2d(2, 2, 1)
        self.after = nn.Conv2d(2, 2, 3, 2, 1)

    def forward(self, x):
        x = self.down(x)
        weights = torch.sigmoid(self.weigh(nn.functional.adaptive_avg_pool2d(x, 1)))
        return self.after(weights * x if self.first else x * weights)


@pytest.mark.parametrize("first", [True, False])
def test_weights_of_the_channels_leave_the_map_where_it_is(first):
    net = built([lambda: Weighed(first)])
    calls = read(net, noise(2, 2, 16), net)
    assert [(c.size_in, c.reach) for c in calls if c.what == "convolution" and c.layer.endswith("after")] == [((8, 8), (2, 2))]
    assert sizes(calls, "90°") == ("H ≡ 1 mod 4", 17)
    assert is_exact(net, noise(2, 2, 17), "90°")


def test_a_pool_over_the_whole_map_is_one_at_its_size_only():
    circular = lambda: nn.Conv2d(1, 2, 3, 1, 1, padding_mode="circular")  # noqa: E731
    net = built([circular, lambda: nn.AvgPool2d(8), lambda: nn.Conv2d(2, 2, 1)])
    calls = read(net, noise(2, 1, 8), net)
    assert exact(calls, "shift", (1, 3))
    assert sizes(calls, "shift") == ("H ≡ 0 mod 8", 8)
    assert not exact(read(net, noise(2, 1, 16), net), "shift", (1, 3))


def test_only_calls_that_the_features_come_from_are_told():
    net = Down()
    early = lambda x: (net.layer1(net.stem(x).relu_()), net(x))[0]  # noqa: E731
    assert [c.layer for c in read(early, noise(2, 1, 16), net)] == ["stem", "", "layer1"]


def test_the_moves_of_transforms():
    assert moves(C4) == moves(CyclicRotations(8)) == ("90°",)
    assert moves(CyclicRotations(2)) == ("180°",)
    assert moves(Dihedral(4)) == ("90°", "mirror")
    assert moves(Flips()) == moves(Dihedral(1)) == ("mirror",)
    assert moves(Translations()) == moves(Translate()) == ("shift",)
    assert moves(Rotate()) == moves(Zoom()) == moves(CyclicRotations(3)) == ()


def test_reading_leaves_no_hook_behind():
    net = Down()
    read(net, noise(2, 1, 8), net)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
