"""Rendered pictures: T_g is exact at every amount, spectra are what they say, and a picture depends on its index alone."""

import math

import pytest
import torch

from geomssl import data
from geomssl.data.rendered import SHAPES, Fields, Phantoms, natural_spectrum
from geomssl.errors import GeomsslError
from geomssl.transforms import (
    Brightness,
    Compose,
    Contrast,
    CyclicRotations,
    Dihedral,
    HorizontalFlip,
    Hue,
    ResizedCrop,
    Rotate,
    Translate,
    Translations,
    Zoom,
)

DOUBLE = torch.float64


def rows(*values, n):
    return torch.tensor(values, dtype=DOUBLE).expand(n, -1)


def points(size):
    line = torch.arange(size, dtype=DOUBLE)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)


KINDS = [Fields(40, 2, 17), Fields(40, 1, 16, periodic=True), Phantoms(40, 3, 20)]


@pytest.mark.parametrize("pictures", KINDS, ids=lambda p: f"{p.name}{p.size}")
def test_quarter_turns_and_mirrors_permute_the_samples(pictures):
    index = torch.arange(9)
    plain = pictures.images(index, dtype=DOUBLE)
    turned = pictures.images(index, Rotate(), rows(90.0, n=9), DOUBLE)
    assert (turned - torch.rot90(plain, 1, (2, 3))).abs().max() < 1e-12
    for group in (CyclicRotations(4), Dihedral(4)):
        params = group.elements()[torch.arange(9) % len(group.elements())]
        assert (pictures.images(index, group, params, DOUBLE) - group(plain, params)).abs().max() < 1e-12
    for parts, values in (([HorizontalFlip()], [1.0]), ([Rotate(), HorizontalFlip()], [90.0, 1.0])):
        chain, params = Compose(parts), rows(*values, n=9)
        assert (pictures.images(index, chain, params, DOUBLE) - chain(plain, params)).abs().max() < 1e-12


@pytest.mark.parametrize("pictures", KINDS, ids=lambda p: f"{p.name}{p.size}")
def test_amounts_compose_exactly_where_pixels_could_not(pictures):
    index, turn = torch.arange(6), Rotate()
    once = pictures.images(index, turn, rows(47.0, n=6), DOUBLE)
    twice = pictures.images(index, Compose([turn, turn]), rows(17.0, 30.0, n=6), DOUBLE)
    assert (once - twice).abs().max() < 1e-12
    chain = Compose([Translate(), Rotate(), Zoom()])
    back = Compose([Translate(), Rotate(), Zoom(), Zoom(), Rotate(), Translate()])
    moved = pictures.images(index, chain, rows(1.5, -0.3, 33.0, 0.7, n=6), DOUBLE)
    same = pictures.images(index, back, rows(1.5, -0.3, 33.0, 0.7, 1 / 0.7, -33.0, -1.5, 0.3, n=6), DOUBLE)
    plain = pictures.images(index, dtype=DOUBLE)
    assert (same - plain).abs().max() < 1e-12
    assert (moved - plain).abs().max() > 0.05


def test_whole_shifts_of_a_periodic_field_roll_it_and_others_interpolate_its_fourier_series():
    pictures, index = Fields(8, 2, 16, 0.3, periodic=True), torch.arange(8)
    plain = pictures.images(index, dtype=DOUBLE)
    for transform in (Translations(), Translate()):
        rolled = pictures.images(index, transform, rows(3.0, -2.0, n=8), DOUBLE)
        assert (rolled - plain.roll((3, -2), (2, 3))).abs().max() < 1e-12
    k = torch.fft.fftfreq(16, dtype=DOUBLE)
    phase = torch.exp(-2j * math.pi * (0.37 * k[:, None] + 2.5 * k))
    uncut = Fields(8, 2, 16, 0.3, periodic=True, contrast=None)
    shifted = torch.fft.ifft2(torch.fft.fft2(uncut.images(index, dtype=DOUBLE)) * phase)
    exact = uncut.images(index, Translations(), rows(0.37, 2.5, n=8), DOUBLE)
    assert (exact - shifted.real).abs().max() < 1e-12


def test_a_field_that_is_not_periodic_keeps_its_window_under_wrapped_shifts():
    pictures, index = Fields(4, 1, 12), torch.arange(4)
    wrapped = pictures.images(index, Translations(), rows(5.0, 1.0, n=4), DOUBLE)
    assert (wrapped - pictures.images(index, dtype=DOUBLE).roll((5, 1), (2, 3))).abs().max() < 1e-12


@pytest.mark.parametrize("bandwidth", [0.2, 0.37])
def test_the_band_limit_is_seen_in_the_transform_of_a_periodic_field(bandwidth):
    power = torch.fft.fft2(Fields(20, 1, 32, bandwidth, periodic=True, contrast=None).images(torch.arange(20), dtype=DOUBLE))
    k = torch.fft.fftfreq(32, dtype=DOUBLE)
    radius = (k[:, None] ** 2 + k**2).sqrt()
    energy = power.abs().square().mean(dim=(0, 1))
    assert energy[radius > bandwidth].max() < 1e-20 * energy.max()
    assert energy[(radius > 0.9 * bandwidth) & (radius <= bandwidth)].max() > 1e-4 * energy[radius > 0].max()


@pytest.mark.parametrize("transform", [None, Zoom(), Rotate(), Translate()])
def test_one_plane_wave_moves_as_its_closed_form(transform):
    pictures, index, size = Fields(5, 1, 16, 0.2, waves=1, contrast=0.1), torch.arange(5), 16
    waves, real, imaginary, mean = pictures._drawn(index)
    params = {None: (), "zoom": (1.7,), "rotate": (25.0,), "translate": (0.4, -3.3)}[getattr(transform, "name", None)]
    found = pictures.images(index, transform, None if transform is None else rows(*params, n=5), DOUBLE)
    u = points(size) - (size - 1) / 2
    if params and transform.name == "zoom":
        u = u / 1.7
    elif params and transform.name == "rotate":
        # anticlockwise as displayed, y down: a point comes from the one that lies 25 degrees clockwise of it
        a = math.radians(25)
        u = u @ torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], dtype=DOUBLE)
    elif params:
        u = u - torch.tensor([0.4, -3.3], dtype=DOUBLE)
    phase = 2 * math.pi * (u[None] * waves[:, :, None]).sum(-1)
    expected = mean[:, :, None] + real * phase.cos() - imaginary * phase.sin()
    assert (found[:, 0] - expected).abs().max() < 1e-12
    assert (real**2 + imaginary**2).sqrt().flatten().tolist() == pytest.approx([0.1 * math.sqrt(2)] * 5)


def test_both_ways_of_summing_the_waves_agree():
    pictures, index = Fields(3, 2, 16), torch.arange(3)
    scattered = torch.rand(3, 4, 5, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * 40 - 10
    found = pictures.at(index, scattered)
    single = [pictures.at(index, scattered[:, i : i + 1, j : j + 1]) for i in range(4) for j in range(5)]
    assert (found - torch.stack(single, -1).view_as(found)).abs().max() < 1e-12


@pytest.mark.parametrize("pictures", KINDS, ids=lambda p: f"{p.name}{p.size}")
def test_a_picture_depends_on_its_index_alone(pictures):
    whole = pictures.images(torch.arange(40), dtype=DOUBLE)
    order = torch.tensor([39, 3, 3, 17, 0])
    closed = {"periodic": True} if getattr(pictures, "periodic", False) else {}
    again = type(pictures)(400, pictures.channels, pictures.size, pictures.bandwidth, **closed)
    assert (again.images(order, dtype=DOUBLE) - whole[order]).abs().max() < 1e-12
    other = type(pictures)(40, pictures.channels, pictures.size, pictures.bandwidth, seed=1)
    assert (other.images(order, dtype=DOUBLE) - whole[order]).abs().max() > 0.05
    assert (whole[0] - whole[6]).abs().max() > 0.05


def test_more_blocks_than_are_kept_give_the_same_numbers(monkeypatch):
    from geomssl.data import rendered

    far = torch.tensor([0, 70, 200, 999, 3, 640])
    free = Fields(1000, 1, 8).images(far, dtype=DOUBLE)
    monkeypatch.setattr(rendered, "KEPT", 2)
    assert torch.equal(Fields(1000, 1, 8).images(far, dtype=DOUBLE), free)
    monkeypatch.setattr(rendered, "BYTES", 1)
    assert (Fields(1000, 1, 8).images(far, dtype=DOUBLE) - free).abs().max() < 1e-14


def test_contrast_is_the_spread_over_the_plane_and_none_is_never_cut():
    scattered = torch.rand(20, 60, 60, 2, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)) * 2000
    values = Fields(20, 1, 16, contrast=0.05).at(torch.arange(20), scattered)
    assert values.std(dim=(2, 3)).flatten().tolist() == pytest.approx([0.05] * 20, rel=0.05)
    _, real, imaginary, mean = Fields(20, 3, 16, contrast=None)._drawn(torch.arange(20))
    reach = (real**2 + imaginary**2).sqrt().sum(dim=2)
    assert reach.amax(dim=1).tolist() == pytest.approx([0.5] * 20)
    assert mean.unique().tolist() == [0.5]
    default = Fields(200, 3, 32).images(torch.arange(200))
    assert ((default == 0) | (default == 1)).double().mean() < 1e-4


def test_colour_parts_act_on_the_samples_and_what_looks_around_comes_last():
    pictures, index = Phantoms(6, 3, 20), torch.arange(6)
    turn, params = Rotate(), rows(20.0, n=6)
    turned = pictures.images(index, turn, params, DOUBLE)
    for order in ([turn, Brightness()], [Brightness(), turn]):
        values = rows(*((20.0, 1.3) if order[0] is turn else (1.3, 20.0)), n=6)
        assert torch.equal(pictures.images(index, Compose(order), values, DOUBLE), Brightness()(turned, rows(1.3, n=6)))
    hued = pictures.images(index, Compose([turn, Hue(), Contrast()]), rows(20.0, 0.2, 1.5, n=6), DOUBLE)
    assert torch.equal(hued, Contrast()(Hue()(turned, rows(0.2, n=6)), rows(1.5, n=6)))
    with pytest.raises(GeomsslError, match="contrast after everything that moves pixels"):
        pictures.images(index, Compose([Contrast(), turn]), rows(1.5, 20.0, n=6))


def test_a_crop_is_the_picture_at_the_points_of_its_box():
    pictures, index = Phantoms(6, 1, 20), torch.arange(6)
    found = pictures.images(index, ResizedCrop(), rows(2.0, 4.0, 10.0, 5.0, n=6), DOUBLE)
    box = points(20)
    at = torch.stack([(box[..., 0] + 0.5) * 0.5 - 0.5 + 2, (box[..., 1] + 0.5) * 0.25 - 0.5 + 4], dim=-1)
    assert (found - pictures.at(index, at.expand(6, -1, -1, -1))).abs().max() < 1e-12


@pytest.mark.parametrize("pictures", KINDS, ids=lambda p: f"{p.name}{p.size}")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
def test_forward_mode_through_the_formula_is_the_slope_in_the_parameters(pictures):
    index, chain = torch.arange(4), Compose([Translate(), Rotate(), Zoom()])
    at, way = rows(0.2, -0.1, 10.0, 1.1, n=4).clone(), rows(1.0, 0.5, 3.0, 0.2, n=4).clone()

    def picture(p):
        return pictures.images(index, chain, p, DOUBLE)

    _, slope = torch.func.jvp(picture, (at,), (way,))
    h = 1e-5
    difference = (picture(at + h * way) - picture(at - h * way)) / (2 * h)
    assert (slope - difference).abs().max() < 1e-7
    assert slope.abs().max() > 1e-2


@pytest.mark.parametrize("slope", [0.5, 1.0, 1.5])
def test_the_spectrum_of_fields_has_their_slope(slope):
    images = Fields(300, 1, 64, 0.4, slope, contrast=0.05).images(torch.arange(300))
    assert natural_spectrum(images, 0.35).slope == pytest.approx(slope, abs=0.12)


def test_fields_like_images_have_their_spectrum_mean_contrast_and_spread():
    given = Fields(300, 3, 32, 0.3, 1.4, contrast=0.1).images(torch.arange(300), dtype=DOUBLE)
    shade = torch.tensor([0.1, 0.0, -0.1], dtype=DOUBLE).view(3, 1, 1)
    own = 0.05 * torch.randn(300, 1, 1, 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    given = given + shade + own
    wanted = natural_spectrum(given, 0.3)
    found = natural_spectrum(Fields.like(given, n=600, bandwidth=0.3, seed=5).images(torch.arange(600), dtype=DOUBLE), 0.3)
    assert found.slope == pytest.approx(wanted.slope, abs=0.2)
    assert found.mean.tolist() == pytest.approx(wanted.mean.tolist(), abs=0.01)
    assert wanted.mean.tolist() == pytest.approx([0.6, 0.5, 0.4], abs=0.02)
    # a wave of one period across the picture has part of its variance in the picture's mean
    assert found.covariance.flatten().tolist() == pytest.approx(wanted.covariance.flatten().tolist(), rel=0.25)
    assert found.spread == pytest.approx(wanted.spread, rel=0.25)
    assert wanted.spread == pytest.approx(0.05, rel=0.2)


def test_phantoms_are_smooth_shapes_inside_the_inscribed_disc():
    pictures = Phantoms(120, 3, 32)
    index = torch.arange(120)
    values = pictures.images(index, dtype=DOUBLE)
    assert float(values.min()) >= 0
    assert 0.5 < float(values.max()) <= 1
    outside = torch.linalg.vector_norm(points(32) - 15.5, dim=-1) > 15.5
    assert float(values[:, :, outside].max()) < 2e-3
    assert pictures.labels.tolist() == [i % len(SHAPES) for i in range(120)]
    assert float(values.amax(dim=(1, 2, 3)).min()) > 0.3
    # sampled four times finer, so that nothing folds back
    fine = (points(128) / 4 - 0.375).expand(24, -1, -1, -1)
    energy = torch.fft.fft2(pictures.at(torch.arange(24), fine)).abs().square().sum(dim=(0, 1))
    k = torch.fft.fftfreq(128, 0.25, dtype=DOUBLE)
    radius = (k[:, None] ** 2 + k**2).sqrt()
    assert float(energy[radius > 0.35].sum() / energy[radius > 0].sum()) < 1e-4


def test_the_shapes_have_the_symmetries_of_their_names():
    """Turned about its own centre a square repeats every 90 degrees, a triangle every 120; the spot tells them apart."""
    pictures = Phantoms(6, 1, 41)
    radius, kind = torch.full((1, 1, 1), 12.0, dtype=DOUBLE), torch.arange(6).view(-1, 1, 1)
    angle, far = torch.linspace(0, 2 * math.pi, 361, dtype=DOUBLE)[:-1], torch.linspace(0, 16, 33, dtype=DOUBLE)
    y, x = far[:, None] * angle.sin(), far[:, None] * angle.cos()
    inside = pictures._inside(y.expand(6, -1, -1), x.expand(6, -1, -1), radius, kind)
    for number, period in enumerate((180, 90, 180, 120, 72, 1)):
        assert (inside[number] - inside[number].roll(period, 1)).abs().max() < 1e-9, SHAPES[number]
        if period > 1:
            assert (inside[number] - inside[number].roll(period // 2, 1)).abs().max() > 0.05, SHAPES[number]
    assert float(inside[5, 0].max()) < 0.1 < 0.9 < float(inside[:5, 0].min())


@pytest.mark.parametrize("name", ["fields", "phantoms"])
def test_as_data_sets_they_are_the_rounded_samples_with_the_formulas_beside(name):
    train, test = (data.load(name, split, size=16, n=30, channels=3, bandwidth=0.4) for split in ("train", "test"))
    index = torch.tensor([4, 0, 29])
    exact = train.rendered.images(index, dtype=DOUBLE)
    assert (train.images(index).double() / 255 - exact).abs().max() <= 0.5 / 255 + 1e-9
    assert train.to("cpu").rendered is train.rendered
    assert (train.pixels.float() - test.pixels.float()).abs().max() > 10
    assert train.fingerprint == data.load(name, "train", size=16, n=30, channels=3, bandwidth=0.4).fingerprint
    if name == "phantoms":
        assert train.labels.bincount().tolist() == [5] * 6
        assert train.classes == SHAPES


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Fields(0), "at least 1"),
        (lambda: Fields(4, bandwidth=0.5), "less than 0.5"),
        (lambda: Fields(4, size=8, bandwidth=0.1), "at least 2 cycles"),
        (lambda: Fields(4, contrast=0.0), "or None"),
        (lambda: Phantoms(4, size=12), "at least 14x14"),
        (lambda: Phantoms(4, channels=4), "1 to 3"),
        (lambda: Fields(4).images(torch.tensor([4])), "from 0 to 3"),
        (lambda: Fields(4).images(torch.arange(4), Rotate()), "one row a picture"),
        (lambda: natural_spectrum(torch.ones(3, 1, 16, 16)), "images that vary"),
        (lambda: natural_spectrum(torch.ones(3, 1, 16, 8)), "at least 8x8"),
        (lambda: data.load("phantoms", "test", size=8), "at least"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
