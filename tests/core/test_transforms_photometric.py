"""Colour against colorsys and numpy in float64, blur against scipy; one channel; what stays bit for bit; gradients; draws."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from scipy import ndimage

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms import Brightness, Contrast, GaussianBlur, Grayscale, Hue, Jitter, Saturation

ALL = [Brightness(), Contrast(), Saturation(), Hue(), Grayscale(), Jitter(), GaussianBlur()]
LUMA = np.array([0.2989, 0.587, 0.114])


def ids(transforms):
    return [t.name for t in transforms]


def picture(channels=3, n=1, size=(6, 5), dtype=torch.float64, seed=0):
    return torch.rand(n, channels, *size, dtype=dtype, generator=generator(seed, "picture"))


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


@pytest.mark.parametrize("turns", [0.0, 0.05, -0.1, 1 / 3, 0.5, -0.5, 0.77, 2.2])
def test_hue_against_colorsys(turns):
    corners = torch.tensor(list(itertools.product([0.0, 0.4, 1.0], repeat=3)), dtype=torch.float64).T
    image = torch.cat([corners, torch.rand(3, 73, dtype=torch.float64, generator=generator(1, "test"))], dim=1)
    found = Hue()(image.view(1, 3, 10, 10), column(turns)).view(3, 100)
    for i in range(100):
        h, s, v = colorsys.rgb_to_hsv(*image[:, i].tolist())
        assert np.allclose(found[:, i].numpy(), colorsys.hsv_to_rgb((h + turns) % 1, s, v), atol=1e-9)


def test_a_third_of_a_turn_permutes_the_channels():
    image = picture()
    assert torch.allclose(Hue()(image, column(1 / 3)), image.roll(1, 1))
    assert torch.allclose(Hue()(image, column(-1 / 3)), image.roll(-1, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0, 1.7])
def test_factors_against_numpy(channels, factor):
    image = picture(channels)
    values = image[0].numpy()
    gray = values if channels == 1 else np.einsum("c,chw->hw", LUMA, values)[None]

    def blend(other):
        return np.clip(factor * values + (1 - factor) * other, 0, 1)

    for transform, other in ((Brightness(), 0.0), (Contrast(), gray.mean()), (Saturation(), gray)):
        assert np.allclose(transform(image, column(factor))[0].numpy(), blend(other), atol=1e-12), transform.name


def test_gray_is_luma_in_all_channels():
    image = picture(n=2)
    found = Grayscale()(image, column(1.0, 0.0))
    assert np.allclose(found[0].numpy(), np.broadcast_to(np.einsum("c,chw->hw", LUMA, image[0].numpy()), (3, 6, 5)))
    assert torch.equal(found[0, 0], found[0, 2])
    assert torch.equal(found[1], image[1])


@pytest.mark.parametrize("size", [3, 5, 9])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_blur_against_scipy(size, sigma, channels):
    image = picture(channels, size=(11, 8))
    found = GaussianBlur(size)(image, column(sigma))
    t = np.arange(size) - size // 2
    kernel = np.exp(-(t**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    expected = image[0].numpy()
    for axis in (1, 2):
        expected = ndimage.correlate1d(expected, kernel, axis=axis, mode="mirror")
    assert np.allclose(found[0].numpy(), expected, atol=1e-12)


def test_blur_keeps_constants_and_each_row_has_its_own_width():
    image = picture(n=3, size=(9, 9))
    sigma = column(0.0, 0.6, 1.9)
    found = GaussianBlur(7)(image, sigma)
    assert torch.equal(found[0], image[0])
    for i in range(3):
        assert torch.allclose(found[i], GaussianBlur(7)(image[i : i + 1], sigma[i : i + 1])[0])
    assert found[2].std() < found[1].std() < image[1].std()
    constant = torch.full((3, 1, 9, 9), 0.4, dtype=torch.float64)
    assert torch.allclose(GaussianBlur(7)(constant, sigma), constant)


def test_jitter_is_its_four_parts_in_order():
    image = picture(n=4)
    params = torch.tensor([[1.3, 0.6, 1.5, 0.08], [0.7, 1.4, 0.5, -0.1], [1, 1, 1, 0.2], [1.4, 1, 1, 0]], dtype=torch.float64)
    expected = image
    for i, part in enumerate((Brightness(), Contrast(), Saturation(), Hue())):
        expected = part(expected, params[:, i : i + 1])
    assert torch.allclose(Jitter()(image, params), expected)
    other = image
    for i, part in reversed(list(enumerate((Brightness(), Contrast(), Saturation(), Hue())))):
        other = part(other, params[:, i : i + 1])
    assert not torch.allclose(Jitter()(image, params), other, atol=1e-3)
    assert [p.name for p in Jitter().parameters] == ["brightness", "contrast", "saturation", "hue"]


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_identity_changes_no_bit(transform, channels, dtype):
    image = picture(channels, n=5, dtype=torch.float64).to(dtype)
    image[0, :, 0, :3] = torch.tensor([0.0, 1.0, 0.5], dtype=dtype)  # no chroma
    assert torch.equal(transform(image, transform.identity(5)), image)
    exact = transform.is_exact(torch.cat([transform.identity(), transform.identity() + 0.2]), (6, 5))
    assert exact.tolist() == [True, False]


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
def test_colours_do_not_act_on_one_channel_and_say_so(transform):
    image = picture(1, n=8)
    params = transform.sample(8, generator(0, "test"), (6, 5))
    for i, acts in enumerate(transform.active(1)):
        one = transform.identity(8)
        one[:, i] = transform.parameters[i].high
        assert torch.equal(transform(image, one), image) is not acts
    assert transform.active(3) == (True,) * len(transform.parameters)
    assert transform(image, params).shape == image.shape
    assert Jitter().active(1) == (True, True, False, False)


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
def test_values_stay_in_the_unit_interval_and_rows_are_independent(transform):
    image = picture(n=20)
    params = transform.sample(20, generator(0, "test"), (6, 5))
    found = transform(image, params)
    assert (found.min() >= 0, found.max() <= 1) == (True, True)
    for i in range(20):
        assert torch.allclose(found[i], transform(image[i : i + 1], params[i : i + 1])[0])


@pytest.mark.parametrize(
    ("transform", "row"),
    [(Brightness(), [0.9]), (Contrast(), [0.8]), (Saturation(), [0.7]), (Saturation(), [1.05]), (Hue(), [0.04]),
     (Hue(), [0.0]), (Hue(), [-0.3]), (Jitter(), [0.9, 0.9, 0.8, 0.05]), (GaussianBlur(), [0.8])],
)  # fmt: skip
def test_gradients_in_images_and_parameters(transform, row):
    image = (0.2 + 0.6 * picture(size=(3, 3))).requires_grad_()
    params = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform, (image, params), eps=1e-7, atol=1e-5)
    grad = torch.autograd.grad(transform(image, params).square().sum(), params)[0]
    assert (grad != 0).all()


def test_gray_pixels_have_finite_gradients():
    image = torch.full((1, 3, 2, 2), 0.5, requires_grad=True)
    params = torch.tensor([[1.1, 0.9, 1.2, 0.1]], requires_grad=True)
    Jitter()(image, params).sum().backward()
    assert image.grad.isfinite().all()
    assert params.grad.isfinite().all()


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
def test_half_precision_is_computed_in_single(transform):
    image = picture(n=4).half()
    params = transform.sample(4, generator(0, "test"), (6, 5))
    found = transform(image, params)
    assert found.dtype == torch.float16
    assert torch.equal(found, transform(image.float(), params).half())


def test_draws():
    def draw(transform):
        drawn = transform.sample(20000, generator(0, "test"), (6, 5))
        assert torch.equal(drawn, transform.sample(20000, generator(0, "test"), (6, 5)))
        assert drawn.dtype == torch.float32
        return drawn.double()

    drawn = draw(Jitter(0.4, 0.3, 1.5, 0.1, p=0.8))
    still = (drawn == torch.tensor([1.0, 1.0, 1.0, 0.0])).all(dim=1)
    assert abs(still.double().mean() - 0.2) < 0.015
    moved = drawn[~still]
    assert ((moved != torch.tensor([1.0, 1.0, 1.0, 0.0])).sum(dim=1) >= 3).all()  # jointly, not one by one
    for i, (low, high) in enumerate(((0.6, 1.4), (0.7, 1.3), (0.0, 2.5), (-0.1, 0.1))):
        assert low - 1e-6 <= moved[:, i].min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < moved[:, i].max() <= high + 1e-6
        assert abs(moved[:, i].mean() - (low + high) / 2) < 0.02 * (high - low)
    correlation = np.corrcoef(moved.numpy().T)
    assert np.abs(correlation - np.eye(4)).max() < 0.05
    assert draw(Brightness(0.4)).eq(1).double().mean() < 0.01
    assert abs(draw(Contrast(0.4, p=0.3)).eq(1).double().mean() - 0.7) < 0.015
    assert draw(Saturation(0.4, p=0.0)).eq(1).all()
    assert abs(draw(Hue(0.2, p=0.5)).eq(0).double().mean() - 0.5) < 0.015
    sigma = draw(GaussianBlur(5, (0.1, 2.0), p=0.5))
    assert abs(sigma.eq(0).double().mean() - 0.5) < 0.015
    assert 0.1 <= sigma[sigma > 0].min() < 0.12 < 1.98 < sigma.max() <= 2
    assert abs(draw(Grayscale(0.2)).mean() - 0.2) < 0.015


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Hue()(torch.rand(2, 2, 4, 4), torch.zeros(2, 1)), "3 .red"),
        (lambda: Saturation()(torch.rand(2, 4, 4, 4), torch.zeros(2, 1)), "4 channels"),
        (lambda: Grayscale()(torch.rand(2, 2, 4, 4), torch.zeros(2, 1)), "2 channels"),
        (lambda: Contrast()(torch.rand(2, 2, 4, 4), torch.ones(2, 1)), "2 channels"),
        (lambda: Jitter()(torch.rand(2, 5, 4, 4), torch.ones(2, 4)), "5 channels"),
        (lambda: Jitter()(torch.rand(2, 3, 4, 4), torch.ones(2, 3)), "brightness, contrast, saturation, hue"),
        (lambda: Hue()(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, 1)), "float images"),
        (lambda: GaussianBlur(9)(torch.rand(2, 3, 4, 9), torch.ones(2, 1)), "more than 4 pixels"),
        (lambda: GaussianBlur(4), "odd"),
        (lambda: GaussianBlur(5, (2.0, 1.0)), "low <= high"),
        (lambda: Hue(0.6), "0.5 turns"),
        (lambda: Brightness(-0.1), "strength"),
        (lambda: Contrast(0.4, p=2), "Contrast"),
        (lambda: Jitter(p=-1), "probability"),
        (lambda: Grayscale(p=2), "probability"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(GeomsslError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_brightness_takes_any_number_of_channels():
    image = picture(5)
    assert torch.allclose(Brightness()(image, column(0.5)), image / 2)
