"""The aliasing meter on closed forms: waves, white noise, a rectified cosine, filters that pass everything or little."""

import math

import pytest
import torch
from torch import nn

from geomssl.probes.aliasing import Aliasing, finer, meter, spectrum_above
from geomssl.probes.static import read
from geomssl.seeding import generator, seeded


def wave(fy, fx, n=64, phase=0.3):
    y, x = torch.meshgrid(torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64), indexing="ij")
    return torch.cos(2 * math.pi * (fy * y + fx * x) + phase)[None, None]


def white(n=40, channels=3, side=32):
    return torch.randn(n, channels, side, side, generator=generator(0, "test-alias"), dtype=torch.float64)


@pytest.mark.parametrize(
    ("fy", "fx", "radial", "y", "x"),
    [(0.1, 0.1, 0, 0, 0), (0.4, 0.0, 1, 1, 0), (0.0, 0.4, 1, 0, 1), (0.2, 0.2, 1, 0, 0), (0.4, 0.4, 1, 1, 1)],
)
def test_a_wave_is_above_or_below_the_new_nyquist(fy, fx, radial, y, x):
    found = spectrum_above(wave(fy, fx) + 5, (2, 2))
    assert (found.share(), found.share("y"), found.share("x")) == pytest.approx((radial, y, x), abs=2e-3)


def test_the_new_nyquist_is_that_of_the_stride_of_each_axis():
    assert spectrum_above(wave(0.2, 0), (2, 2)).share() == pytest.approx(0, abs=2e-3)
    assert spectrum_above(wave(0.2, 0), (3, 3)).share() == pytest.approx(1, abs=2e-3)
    assert spectrum_above(wave(0.4, 0), (1, 2)).share() == pytest.approx(0, abs=2e-3)
    assert spectrum_above(wave(0.4, 0), (2, 1)).share() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("side", [31, 32])
def test_white_noise_has_the_shares_of_the_areas(side):
    found = spectrum_above(white(200, 4, side), (2, 2))
    # A disc of radius 1/4 in the unit square, and a band of half its width.
    assert found.share() == pytest.approx(1 - math.pi / 16, abs=0.02)
    band = sum(min(k, side - k) * 4 > side for k in range(side)) / side
    assert found.share("y") == pytest.approx(band, abs=0.01)
    assert found.share("x") == pytest.approx(band, abs=0.01)
    low, high = found.interval(0, 0.95, 500)
    assert low < found.share() < high < low + 0.02


def test_the_total_is_the_energy_by_parseval():
    x = white(3, 2, 16)
    window = torch.hann_window(18, periodic=False, dtype=torch.float64)[1:-1]
    window = window[:, None] * window
    centred = x - (x * window).sum((2, 3), keepdim=True) / window.sum()
    expected = ((centred * window) ** 2).sum((1, 2, 3)) * 16 * 16
    torch.testing.assert_close(spectrum_above(x, (2, 2)).total, expected)


def test_a_constant_map_has_nothing_to_alias():
    found = spectrum_above(torch.full((4, 1, 16, 16), 3.0, dtype=torch.float64), (2, 2))
    assert found.share() < 1e-9 or float(found.total.sum()) < 1e-20
    nothing = Aliasing(*(torch.zeros(4, dtype=torch.float64) for _ in range(4)))
    assert nothing.share() == 0
    assert nothing.interval(0, 0.95, 100) is None


@pytest.mark.parametrize("n", [16, 15])
def test_finer_is_the_wave_between_the_pixels(n):
    y, x = (torch.arange(2 * n, dtype=torch.float64) / 2 for _ in range(2))
    image = torch.cos(2 * math.pi * (3 * y[:, None] / n + 5 * x / n) + 0.2)
    torch.testing.assert_close(finer(image[::2, ::2][None, None])[0, 0], image)


def test_the_highest_wave_of_an_even_map_keeps_its_height_between_the_pixels():
    there = torch.cos(math.pi * torch.arange(8, dtype=torch.float64))[:, None].expand(8, 8)
    halves = torch.cos(math.pi * torch.arange(16, dtype=torch.float64) / 2)
    torch.testing.assert_close(finer(there[None, None])[0, 0], halves[:, None].expand(16, 16), atol=1e-12, rtol=0)


def test_what_a_rectifier_folds_back_is_its_upper_harmonics():
    f = 0.15
    net = nn.Sequential(nn.Identity(), nn.ReLU())
    images = wave(f, 0, 120, 0.0).expand(2, -1, -1, -1)
    calls = read(net, images, net)
    found = meter(net, [images], calls)[calls[0].number].share()
    # Half-wave rectified: 1/2 at f, 2 / (pi (4 k^2 - 1)) at 2 k f; above one half of a pixel from 4 f on.
    harmonics = [2 / (math.pi * (4 * k**2 - 1)) for k in range(1, 40)]
    above = sum(h**2 for h in harmonics[1:])
    assert found == pytest.approx(above / (0.25 + sum(h**2 for h in harmonics)), rel=0.1)
    # The finer grid folds the highest ones too: 40 half pixels are three periods.
    energy = torch.fft.fft(torch.cos(2 * math.pi * f / 2 * torch.arange(40, dtype=torch.float64)).relu()).abs() ** 2
    expected = energy[11:30].sum() / energy[1:].sum()
    assert found == pytest.approx(float(expected), rel=0.02)
    assert meter(net, [images + 2], calls)[calls[0].number].share() < 1e-4


def delta(stride):
    conv = nn.Conv2d(1, 1, 3, stride, 1, bias=False).double()
    with torch.no_grad():
        conv.weight.zero_()[0, 0, 1, 1] = 1
    return conv


def test_a_stride_is_metered_on_what_it_would_have_given_at_stride_one():
    x = white(20, 1)
    net = delta(2)
    calls = read(net, x, net)
    found = meter(net, x.split(7), calls)[calls[0].number]
    expected = spectrum_above(x, (2, 2))
    for key in ("radial", "y", "x", "total"):
        torch.testing.assert_close(getattr(found, key), getattr(expected, key))
    box = nn.AvgPool2d(2)
    calls = read(box, x, box)
    pooled = meter(box, [x], calls)[calls[0].number]
    torch.testing.assert_close(pooled.radial, spectrum_above(nn.functional.avg_pool2d(x, 2, 1), (2, 2)).radial)
    assert pooled.share() < found.share() - 0.2
    assert meter(delta(1), [x], read(delta(1), x, net)) == {}


def test_a_stride_of_any_length_is_metered_on_the_map_at_stride_one():
    # A constant but for a wave along y of two pixels a period: all above the new Nyquist of any stride.
    images = wave(0.5, 0, 64, 0.0).expand(2, -1, -1, -1)
    for stride in (2, 20, 32):
        net = delta(stride)
        calls = read(net, images, net)
        assert meter(net, [images], calls)[calls[0].number].share("y") == pytest.approx(1, abs=2e-3)
    slow = wave(2 / 256, 0, 256).expand(2, -1, -1, -1)
    net = delta(20)
    assert meter(net, [slow], read(net, slow, net))[0].share("y") < 1e-3


def test_metering_changes_nothing_and_adaptive_and_max_pools_are_seen():
    with seeded(0, "test-alias-net"):
        net = nn.Sequential(
            nn.Conv2d(1, 40, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(40, 6, 3, 3), nn.GELU(),
            nn.AdaptiveAvgPool2d(2), nn.AdaptiveAvgPool2d(1),
        ).double().eval()
    x = white(4, 1)
    with torch.no_grad():
        before = net(x)
    calls = read(net, x, net)
    seen = []
    found = meter(lambda batch: seen.append(net(batch)), [x], calls)
    torch.testing.assert_close(seen[0], before, rtol=0, atol=0)
    by_layer = {c.layer: found[c.number] for c in calls if c.number in found}
    assert list(by_layer) == ["1", "2", "3", "4", "5"]
    assert all(0 <= one.share() <= 1 for one in by_layer.values())
