"""With the same parameters every transform gives what torchvision's functional of that name gives, to 1e-5."""

import math

import pytest
import torch
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from geomssl.seeding import generator, seeded
from geomssl.transforms import (
    Brightness,
    Compose,
    Contrast,
    GaussianBlur,
    Grayscale,
    HorizontalFlip,
    Hue,
    Jitter,
    ResizedCrop,
    Rotate,
    Saturation,
    Shear,
    Translate,
    Zoom,
    policy,
)

pytestmark = pytest.mark.zoo
BILINEAR = InterpolationMode.BILINEAR
SIZES = [(8, 8), (28, 28), (32, 32), (33, 47)]
N = 24


def crop(image, y, x, height, width):
    whole = [int(v) for v in (y, x, height, width)]
    return F.resized_crop(image, *whole, list(image.shape[-2:]), BILINEAR, antialias=False)


def jitter(image, brightness, contrast, saturation, hue):
    image = F.adjust_contrast(F.adjust_brightness(image, brightness), contrast)
    return F.adjust_hue(F.adjust_saturation(image, saturation), hue)


CASES = [
    (Rotate(180), lambda x, a: F.rotate(x, a, BILINEAR)),
    (Translate(0.4), lambda x, dy, dx: F.affine(x, 0.0, [dx, dy], 1.0, [0.0, 0.0], BILINEAR)),
    (Zoom(0.5, 2.0), lambda x, z: F.affine(x, 0.0, [0, 0], z, [0.0, 0.0], BILINEAR)),
    (Shear(40), lambda x, a: F.affine(x, 0.0, [0, 0], 1.0, [a, 0.0], BILINEAR)),
    (HorizontalFlip(), lambda x, flip: F.hflip(x) if flip else x),
    (ResizedCrop(), crop),
    (Brightness(0.8), F.adjust_brightness),
    (Contrast(0.8), F.adjust_contrast),
    (Saturation(0.8), F.adjust_saturation),
    (Hue(0.5), F.adjust_hue),
    (Jitter(0.8, 0.8, 0.8, 0.2), jitter),
    (Grayscale(0.5), lambda x, gray: F.rgb_to_grayscale(x, 3) if gray else x),
    (GaussianBlur(5), lambda x, sigma: F.gaussian_blur(x, [5, 5], [sigma, sigma]) if sigma else x),
]


@pytest.mark.parametrize(("transform", "reference"), CASES, ids=[t.name for t, _ in CASES])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_parameters_same_pixels(transform, reference, size, dtype):
    images = torch.rand(N, 3, *size, dtype=dtype, generator=generator(0, "picture"))
    params = transform.sample(N, generator(1, "test"), size)
    found = transform(images, params)
    expected = torch.stack([reference(x, *row) for x, row in zip(images, params.tolist(), strict=True)])
    assert (found - expected).abs().max() < 1e-5


@pytest.mark.parametrize("degrees", [0.0, 90.0, 180.0, 270.0, 45.0, -30.0])
@pytest.mark.parametrize("size", SIZES)
def test_rotation_at_marked_angles(degrees, size):
    images = torch.rand(1, 3, *size, generator=generator(0, "picture"))
    found = Rotate()(images, torch.tensor([[degrees]]))
    assert (found - F.rotate(images, degrees, BILINEAR)).abs().max() < 1e-5


@pytest.mark.parametrize("box", [(-2, -3, 9, 9), (4, 5, 8, 8), (0, 0, 1, 1), (7, 7, 1, 1)])
def test_crops_at_the_edge(box):
    images = torch.rand(1, 3, 8, 8, generator=generator(0, "picture"))
    found = ResizedCrop()(images, torch.tensor([box], dtype=torch.float32))
    assert (found - crop(images, *box)).abs().max() < 1e-5


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_and_brightness_on_gray_too(channels):
    images = torch.rand(4, channels, 8, 8, generator=generator(0, "picture"))
    params = torch.full((4, 1), 0.6)
    assert (Contrast()(images, params) - F.adjust_contrast(images, 0.6)).abs().max() < 1e-5
    assert (Hue()(images[:, :1], params) - F.adjust_hue(images[:, :1], 0.3)).abs().max() == 0


@pytest.mark.parametrize("name", ["simclr", "small", "moderate", "ciper"])
def test_a_whole_policy_is_its_functionals_in_sequence(name):
    drawn = policy(name)
    images = torch.rand(N, 3, 32, 32, generator=generator(0, "picture"))
    params = drawn.sample(N, generator(1, "test"), (32, 32))
    by_type = {type(transform): reference for transform, reference in CASES}
    expected = []
    for image, row in zip(images, params.tolist(), strict=True):
        for part, columns in zip(drawn.parts, drawn.slices, strict=True):
            image = by_type[type(part)](image, *row[columns])
        expected.append(image)
    assert (drawn(images, params) - torch.stack(expected)).abs().max() < 1e-5


def test_a_rotation_with_a_shift_and_a_zoom_is_one_affine_map():
    images = torch.rand(4, 3, 32, 32, generator=generator(0, "picture"))
    chain = Compose([Zoom(), Rotate(), Translate()])
    params = torch.tensor([[0.7, 20.0, 3.0, -2.0]]).expand(4, -1)
    # torchvision's affine turns clockwise.
    expected = F.affine(images, -20.0, [-2, 3], 0.7, [0.0, 0.0], BILINEAR)
    inner = (..., slice(6, 26), slice(6, 26))
    assert (chain(images, params)[inner] - expected[inner]).abs().max() < 1e-5


def test_boxes_have_the_distribution_of_random_resized_crop():
    n, image = 4000, torch.zeros(3, 32, 32)
    ours = ResizedCrop((0.2, 1.0)).sample(n, generator(0, "test"), (32, 32)).double()
    with seeded(0, "test"):
        theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(n)]).double()
    for i, name in enumerate(("y", "x", "height", "width")):
        # Two-sample Kolmogorov-Smirnov statistic at level 1e-4.
        grid = torch.arange(-0.5, 33)
        gap = [(ours[:, i] < g).double().mean() - (theirs[:, i] < g).double().mean() for g in grid]
        limit = math.sqrt(-0.5 * math.log(1e-4 / 2) * 2 / n)
        assert max(abs(float(d)) for d in gap) < limit, name
