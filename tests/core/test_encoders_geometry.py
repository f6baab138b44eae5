"""Stride and offset of feature maps, against the place that a map responds to, and what cannot be followed."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from geomssl import encoders
from geomssl.encoders.geometry import CHANNELS_LAST, Geometry, follow, geometry


def centre(model, size, index):
    """The centre of gravity (y, x) of |d feature / d pixel| at one feature pixel: where a symmetric positive net looks."""
    x = torch.ones(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    model(x)[..., index, index].sum().backward()
    weight = x.grad[0, 0].abs()
    place = torch.arange(size, dtype=torch.float64)
    return float((weight.sum(1) * place).sum() / weight.sum()), float((weight.sum(0) * place).sum() / weight.sum())


class NextBlock(nn.Module):
    """A block as ConvNeXt has it: a wide convolution, then channels last, linear maps, and back."""

    def __init__(self, channels, norm=False):
        super().__init__()
        self.wide = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels) if norm else nn.Identity()
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x):
        last = self.down(F.gelu(self.up(self.norm(self.wide(x).permute(0, 2, 3, 1)))))
        return x + (self.scale * last).permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """Channels last from the stem to the end, as Swin and MetaFormers hold them."""

    def __init__(self, back=True):
        super().__init__()
        self.stem, self.mix, self.back = nn.Conv2d(1, 3, 5, 4, 1), nn.Linear(3, 3), back

    def forward(self, x):
        last = self.mix(self.stem(x).movedim(1, -1)).relu()
        return last.transpose(2, 3).transpose(1, 2) if self.back else last


def positive(module):
    for p in module.parameters():
        nn.init.constant_(p, 0.1)
    return module.double()


NETS = {
    "conv": lambda: nn.Conv2d(1, 2, 3, padding=1),
    "valid": lambda: nn.Conv2d(1, 2, 5, stride=3),
    "even": lambda: nn.Conv2d(1, 2, 4, stride=2, padding=1),
    "dilated": lambda: nn.Conv2d(1, 2, 3, stride=2, padding=2, dilation=2),
    "same": lambda: nn.Conv2d(1, 2, 4, padding="same"),
    "circular": lambda: nn.Conv2d(1, 2, 3, stride=2, padding=1, padding_mode="circular"),
    "pad": lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 1, 0)), nn.Conv2d(1, 2, 2)),
    "pools": lambda: nn.Sequential(nn.AvgPool2d(3, 2, 1), nn.Conv2d(1, 1, 3, padding=1), nn.AvgPool2d(2)),
    "stem": lambda: nn.Sequential(
        nn.Conv2d(1, 2, 7, stride=2, padding=3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.AvgPool2d(3, 2, 1)
    ),
    "next": lambda: nn.Sequential(nn.Conv2d(1, 2, 4, 4), NextBlock(2), nn.Conv2d(2, 2, 2, 2), NextBlock(2)),
    "last": ChannelsLast,
    "adaptive": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(16), nn.Conv2d(1, 1, 3, stride=2, padding=1)),
}


SIZES = {"adaptive": 32, "next": 193}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETS)
def test_a_feature_pixel_sits_where_it_looks(name):
    model, size = positive(NETS[name]()).eval(), SIZES.get(name, 33)
    with torch.no_grad():
        x = torch.zeros(1, 1, size, size, dtype=torch.float64)
        found, middle = geometry(model, x), model(x).shape[-1] // 2
    assert found.source == "layers"
    for index in (middle - 1, middle) if size > 100 else (3, 4):
        looked = centre(model, size, index)
        for axis in (0, 1):
            assert found.offset[axis] + found.stride[axis] * index == pytest.approx(looked[axis], abs=1e-9)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETS)
def test_a_feature_pixel_sees_exactly_as_far_as_its_reach(name):
    model, size = positive(NETS[name]()).eval(), SIZES.get(name, 33)
    x = torch.rand(1, 1, size, size, dtype=torch.float64, requires_grad=True)
    found, output = geometry(model, x.detach()), model(x)
    index = output.shape[-1] // 2 if size > 100 else 4
    output[..., index, index].sum().backward()
    for axis in (0, 1):
        seen = x.grad[0, 0].abs().sum(1 - axis).nonzero().flatten()
        place = found.offset[axis] + index * found.stride[axis]
        assert (int(seen[0]), int(seen[-1])) == (place - found.reach[axis], place + found.reach[axis])


def test_channels_last_are_followed_in_the_middle_and_at_the_end():
    x = torch.rand(1, 1, 33, 33)
    block = nn.Sequential(nn.Conv2d(1, 2, 4, 4), NextBlock(2, norm=True), nn.Conv2d(2, 2, 3, 2, 1)).eval()
    found = geometry(block, x)
    assert found == Geometry((8.0, 8.0), (1.5, 1.5), "layers")
    # The ratio of sizes would be 33 / 4.
    assert found.reach == (1.5 + 12 + 4,) * 2
    model = ChannelsLast(back=False)
    _, follower = follow(model, x)
    (last,) = [t for t, g in follower.tensors.values() if g is not None and tuple(t.shape) == (1, 8, 8, 3)][-1:]
    assert follower.known(last) is None
    assert follower.known(last, CHANNELS_LAST) == Geometry((4.0, 4.0), (1.0, 1.0), "layers")
    assert geometry(encoders.wrap(model, in_channels=1).eval().fibres, x) == Geometry((4.0, 4.0), (1.0, 1.0), "layers")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.linear(x, torch.eye(8)),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8, 4)).permute(0, 3, 1, 2),
        lambda x: F.conv2d(x.permute(0, 2, 3, 1), torch.ones(8, 8, 1, 1)).permute(0, 3, 1, 2),
        lambda x: x + x.permute(0, 1, 3, 2),
        lambda x: x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(1, (8, 8)).permute(0, 3, 1, 2),
        lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 2, 1),
    ],
)
def test_channels_last_that_lose_their_places_are_not_followed(function):
    found = geometry(function, torch.rand(2, 4, 8, 8))
    assert found.source == "sizes" or found.reach == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("model", "reach"),
    [
        (nn.GroupNorm(1, 4), math.inf),
        (nn.InstanceNorm2d(4), math.inf),
        (nn.BatchNorm2d(4), 0.0),
        (lambda x: x - x.mean((2, 3), keepdim=True), math.inf),
        (lambda x: x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)), math.inf),
        (lambda x: x + x.flip(2), math.inf),
        (lambda x: x + torch.ones(1, 1, 8, 8) + F.conv2d(x, torch.ones(4, 4, 5, 5), padding=2), 2.0),
    ],
)
def test_what_a_statistic_of_the_whole_map_reaches(model, reach):
    found = geometry(model.eval() if isinstance(model, nn.Module) else model, torch.rand(2, 4, 8, 8))
    assert found == Geometry((1.0, 1.0), (0.0, 0.0))
    assert found.reach == (reach, reach)


def test_the_feature_pixels_whose_field_stays_on_the_image():
    assert Geometry((2.0, 2.0), (0.5, 0.5), reach=(1.5, 2.6)).clean(4, 8, 0) == (1, 2)
    assert Geometry((1.0, 1.0), (0.0, 0.0), reach=(1.0, 1.0)).clean(8, 8, 1) == (1, 6)
    first, last = Geometry((1.0, 1.0), (0.0, 0.0), reach=(4.0, 4.0)).clean(8, 8, 0)
    assert first > last
    first, last = Geometry((1.0, 1.0), (0.0, 0.0)).clean(8, 8, 0)
    assert first > last


def test_stride_two_from_33_is_a_half_and_the_ratio_of_sizes_is_not():
    found = geometry(nn.Conv2d(1, 1, 3, stride=2, padding=1), torch.zeros(1, 1, 33, 33))
    assert found == Geometry((2.0, 2.0), (0.0, 0.0), "layers")
    assert 1 / Geometry.from_sizes((33, 33), (17, 17)).stride[0] == pytest.approx(0.515, abs=1e-3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(F.conv2d(x, torch.ones(1, 1, 3, 3), padding=1)) + x,
        lambda x: F.max_pool2d(x, 1),
        lambda x: torch.cat([x, 2 * x], dim=1).reshape(len(x), 1, 2, *x.shape[2:]),
    ],
)
def test_what_keeps_pixels_in_their_places_passes_them_on(function):
    assert geometry(function, torch.zeros(1, 1, 8, 8)) == Geometry((1.0, 1.0), (0.0, 0.0), "layers")


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[..., ::2, ::2],
        lambda x: x.transpose(2, 3),
        lambda x: x.mT,
        lambda x: torch.roll(x, 1, 3),
        lambda x: F.max_pool2d(x, 2) + F.max_pool2d(x, 3, 2, 1),
        lambda x: F.adaptive_avg_pool2d(x, 5),
        lambda x: F.interpolate(x, scale_factor=0.5),
    ],
)
def test_what_cannot_be_followed_falls_back_to_the_ratio_of_sizes_and_says_so(function):
    x = torch.zeros(1, 1, 8, 8)
    found = geometry(function, x)
    assert found == Geometry.from_sizes((8, 8), tuple(function(x).shape[-2:]))
    assert found.source == "sizes"


def test_strides_and_offsets_differ_along_the_two_axes():
    found = geometry(nn.Conv2d(1, 1, (3, 5), stride=(1, 2), padding=(1, 0)), torch.zeros(1, 1, 9, 12))
    assert found == Geometry((1.0, 2.0), (0.0, 2.0), "layers")


def test_the_built_in_encoders_at_sizes_that_halve_twice():
    for name in ("cnn", "c4-cnn"):
        encoder = encoders.build(name, in_channels=1, widths=(2, 2, 2)).eval()
        assert geometry(encoder.fibres, torch.zeros(1, 1, 8, 8)) == Geometry((4.0, 4.0), (1.5, 1.5), "layers")
        assert geometry(encoder.fibres, torch.zeros(1, 1, 9, 9)).source == "sizes"
    wrapped = encoders.wrap(encoder, layer="convs.1", in_channels=1)
    assert geometry(wrapped.fibres, torch.zeros(1, 1, 8, 8)) == Geometry((2.0, 2.0), (0.5, 0.5), "layers")
