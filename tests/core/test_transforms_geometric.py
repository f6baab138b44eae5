"""Geometric transforms against scipy, closed forms and gradcheck; what lies outside; draws."""

import math

import numpy as np
import pytest
import torch
from scipy import ndimage

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms import (
    Compose,
    CyclicRotations,
    Dihedral,
    Flips,
    HorizontalFlip,
    ResizedCrop,
    Rotate,
    Scales,
    Translate,
    Translations,
    Zoom,
)

SIZES = [(6, 6), (7, 7), (5, 8), (12, 12)]
ALL = [
    Rotate(), Translate(), Zoom(), HorizontalFlip(), ResizedCrop(), CyclicRotations(8), Dihedral(4), Flips(),
    Translations(wrap=False), Scales(),
]


def ids(transforms):
    return [t.name for t in transforms]


def picture(size, channels=2, dtype=torch.float64, n=1, seed=0):
    return torch.rand(n, channels, *size, dtype=dtype, generator=generator(seed, "picture"))


def read(image, y, x):
    """Bilinear reading of a numpy image (C, H, W) that is zero outside its frame."""
    return np.stack([ndimage.map_coordinates(c, [y, x], order=1, mode="grid-constant", cval=0.0) for c in image])


def points(size):
    return np.meshgrid(np.arange(size[0], dtype=float), np.arange(size[1], dtype=float), indexing="ij")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("degrees", [0.0, 17.0, 45.0, 90.0, -90.0, 133.7, 180.0, 270.0, 359.0, -725.0])
def test_rotation_against_scipy(size, degrees):
    image = picture(size)
    found = Rotate()(image, torch.tensor([[degrees]], dtype=torch.float64))
    y, x = points(size)
    up, right = (size[0] - 1) / 2 - y, x - (size[1] - 1) / 2
    back = complex(math.cos(math.radians(degrees)), -math.sin(math.radians(degrees)))
    origin = (right + 1j * up) * back
    expected = read(image[0].numpy(), (size[0] - 1) / 2 - origin.imag, (size[1] - 1) / 2 + origin.real)
    assert np.allclose(found[0].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shift", [(0.0, 0.0), (1.0, -2.0), (0.4, 2.3), (-7.5, 0.1), (30.0, 0.0)])
def test_translation_against_scipy(size, shift):
    image = picture(size)
    found = Translate()(image, torch.tensor([shift], dtype=torch.float64))
    y, x = points(size)
    assert np.allclose(found[0].numpy(), read(image[0].numpy(), y - shift[0], x - shift[1]), atol=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1.0, 0.57, 0.9, 1.3, 2.0, 5.0])
def test_zoom_against_scipy(size, factor):
    image = picture(size)
    found = Zoom()(image, torch.tensor([[factor]], dtype=torch.float64))
    (y, x), cy, cx = points(size), (size[0] - 1) / 2, (size[1] - 1) / 2
    expected = read(image[0].numpy(), cy + (y - cy) / factor, cx + (x - cx) / factor)
    assert np.allclose(found[0].numpy(), expected, atol=1e-12)


def crop_by_hand(image, top, left, height, width):
    """Cut first, then read the cut-out with its own border repeated."""
    rows, columns = image.shape[1:]
    padded = np.pad(image, ((0, 0), (height, height), (width, width)))
    box = padded[:, top + height : top + 2 * height, left + width : left + 2 * width]
    y, x = points((rows, columns))
    y, x = (y + 0.5) * height / rows - 0.5, (x + 0.5) * width / columns - 0.5
    return np.stack([ndimage.map_coordinates(c, [y, x], order=1, mode="nearest") for c in box])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("box", [(0, 0, 4, 4), (1, 2, 3, 5), (2, 0, 1, 1), (3, 3, 2, 2), (-1, -2, 4, 4), (2, 3, 6, 7)])
def test_crop_against_cutting_and_resizing(size, box):
    image = picture(size)
    found = ResizedCrop()(image, torch.tensor([box], dtype=torch.float64))
    assert np.allclose(found[0].numpy(), crop_by_hand(image[0].numpy(), *box), atol=1e-12)


def test_a_crop_repeats_the_border_of_its_box_and_reads_nothing_beyond():
    image = torch.full((1, 1, 8, 8), 9.0)
    image[:, :, 2:4, 2:4] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = ResizedCrop()(image, torch.tensor([[2.0, 2.0, 2.0, 2.0]]))
    assert (found.min(), found.max()) == (1, 4)
    assert found[0, 0, 0, 0] == 1
    assert found[0, 0, 7, 7] == 4


@pytest.mark.parametrize("size", SIZES)
def test_flip_is_numpys(size):
    image = picture(size, n=2)
    found = HorizontalFlip()(image, torch.tensor([[1.0], [0.0]]))
    assert np.array_equal(found[0].numpy(), image[0].numpy()[:, :, ::-1])
    assert torch.equal(found[1], image[1])


def test_signs_as_displayed():
    spot = torch.zeros(1, 1, 9, 9)
    spot[0, 0, 4, 7] = 1  # right of the centre

    def where(transform, *params):
        return divmod(int(transform(spot, torch.tensor([params])).flatten().argmax()), 9)

    assert where(Rotate(), 90.0) == (1, 4)  # anticlockwise: to the top
    assert where(Translate(), 2.0, -1.0) == (6, 6)  # down and left
    assert where(Zoom(), 4 / 3) == (4, 8)  # outwards
    assert where(HorizontalFlip(), 1.0) == (4, 1)
    assert where(Translations(), 0.0, 3.0) == (4, 1)


CASES = [
    (Rotate(), [[a] for a in (0, 45, 90, 180, 270, -90, 360, 30)]),
    (Translate(), [[0, 0], [1, 0], [0, -2], [0.5, 0.5]]),
    (Translations(), [[0, 0], [1, 0], [3, -2], [0.5, 0], [100, 7]]),
    (Translations(wrap=False), [[0, 0], [1, 0]]),
    (Zoom(), [[1], [1.1], [0.5]]),
    (HorizontalFlip(), [[0], [1]]),
    (ResizedCrop(), [[0, 0, 0, 0], [0, 0, 5, 5], [1, 0, 4, 5], [0, 0, 5, 4], [0, 1, 5, 5]]),
    (CyclicRotations(4), [[k] for k in range(4)]),
    (CyclicRotations(8), [[k] for k in range(8)]),
    (CyclicRotations(6), [[k] for k in range(6)]),
    (Dihedral(4), [[k] for k in range(8)]),
    (Dihedral(3), [[k] for k in range(6)]),
    (Flips(), [[0], [1]]),
    (Scales(), [[k] for k in range(6)]),
    (Compose([Rotate(), HorizontalFlip()]), [[90, 1], [45, 1], [0, 0], [180, 1]]),
]


@pytest.mark.parametrize(("transform", "rows"), CASES, ids=[t.name for t, _ in CASES])
@pytest.mark.parametrize("size", [(5, 5), (6, 6), (5, 6), (28, 28)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_means_that_pixels_are_permuted_bit_for_bit(transform, rows, size, dtype):
    """Both directions: `is_exact` exactly where an image of distinct values comes back as the same values."""
    params = torch.tensor(rows, dtype=torch.float32)
    if size[0] != size[1] and isinstance(transform, (CyclicRotations, Dihedral)):
        params = params[transform.is_exact(params, size)]
    count = size[0] * size[1]
    image = torch.randperm(count, generator=generator(0, "test")).to(dtype).add(1).view(1, 1, *size)
    moved = transform(image.expand(len(params), -1, -1, -1), params)
    permuted = (moved.flatten(1).sort().values == image.flatten().sort().values).all(dim=1)
    assert torch.equal(permuted, transform.is_exact(params, size))
    assert permuted.any()


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
def test_identity_and_inverse(transform):
    image = picture((6, 6), n=3, dtype=torch.float32)
    assert torch.equal(transform(image, transform.identity(3)), image)
    assert transform.is_exact(transform.identity(3), (6, 6)).all()
    if isinstance(transform, (ResizedCrop, Scales)):
        with pytest.raises(GeomsslError, match="no inverse"):
            transform.inverse(transform.identity())
        return
    params = transform.sample(8, generator(0, "test"), (6, 6))
    grid = torch.stack(torch.meshgrid(torch.arange(6.0), torch.arange(6.0), indexing="ij"), dim=-1).expand(8, -1, -1, -1)
    there = transform.pull(grid, params, (6, 6))
    assert torch.allclose(transform.pull(there, transform.inverse(params), (6, 6)), grid, atol=1e-5)


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
def test_rows_are_independent(transform):
    params = transform.sample(9, generator(0, "test"), (6, 6))
    images = picture((6, 6), n=9, dtype=torch.float32)
    together = transform(images, params)
    for i in range(9):
        assert torch.equal(together[i], transform(images[i : i + 1], params[i : i + 1])[0])


def test_pull_draws_a_transformed_formula():
    """phi(g^-1 u) for a formula phi agrees with T_g of its raster, up to what bilinear reading loses."""
    size = (41, 41)
    grid = torch.stack(torch.meshgrid(torch.arange(41.0), torch.arange(41.0), indexing="ij"), dim=-1)[None].double()

    def phi(p):
        return torch.exp(-((p[..., 0] - 17) ** 2 + (p[..., 1] - 25) ** 2) / 50)

    image = phi(grid).unsqueeze(1)
    for transform, row in (
        (Rotate(), [33.0]), (Translate(), [1.5, -3.2]), (Zoom(), [1.3]), (HorizontalFlip(), [1.0]), (Dihedral(8), [11.0]),
        (ResizedCrop(), [5.0, 8.0, 30.0, 28.0]), (Compose([Rotate(), Zoom()]), [20.0, 0.8]),
    ):
        params = torch.tensor([row], dtype=torch.float64)
        drawn = phi(transform.pull(grid, params, size))
        # (|f_xx| + |f_yy|) / 8 = 2 / 25 / 8 at the peak of this blob.
        assert (transform(image, params)[:, 0] - drawn).abs().max() < 1.01 * 2 / 25 / 8, transform.name
        assert (drawn - phi(grid)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("transform", "row"),
    [(Rotate(), [23.0]), (Rotate(), [-131.0]), (Translate(), [0.37, -1.21]), (Zoom(), [1.27]), (Zoom(), [0.71]),
     (ResizedCrop(), [0.63, 1.21, 3.3, 2.9]), (Compose([ResizedCrop(), Rotate()]), [0.63, 1.21, 3.3, 2.9, 12.0])],
)  # fmt: skip
def test_gradients_in_images_and_parameters(transform, row):
    image = picture((5, 5), channels=1).requires_grad_()
    params = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(transform, (image, params), eps=1e-7, atol=1e-5)
    grad = torch.autograd.grad(transform(image, params).square().sum(), params)[0]
    assert (grad != 0).all()


@pytest.mark.parametrize("transform", ALL, ids=ids(ALL))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(transform, dtype):
    image = picture((8, 8), n=4).to(dtype)
    params = transform.sample(4, generator(0, "test"), (8, 8))
    found = transform(image, params)
    assert found.dtype == dtype
    assert torch.equal(found, transform(image.float(), params).to(dtype))


def test_double_precision_is_kept():
    image = picture((7, 7))
    angle = torch.tensor([[12.3456789012345]], dtype=torch.float64)
    back_and_forth = Rotate().source(*torch.meshgrid(torch.arange(7.0).double(), torch.arange(7.0).double(), indexing="ij"),
                                     angle, (7, 7))  # fmt: skip
    assert Rotate()(image, angle).dtype == torch.float64
    again = Rotate().source(*back_and_forth, -angle, (7, 7))
    assert torch.allclose(again[0][0, :, 0], torch.arange(7.0).double(), atol=1e-13)


def test_smoothing_before_shrinking_removes_what_would_alias():
    """A checkerboard aliases under a shrink by 2; smoothed first it is nearly its mean. Without a shrink no bit changes."""
    board = (torch.arange(32)[:, None] + torch.arange(32)).remainder(2).float().view(1, 1, 32, 32)
    half = torch.full((1, 1), 0.52)
    raw, smooth = Zoom(0.5, 1.0)(board, half), Zoom(0.5, 1.0, antialias=True)(board, half)
    inside = (..., slice(10, 22), slice(10, 22))
    assert raw[inside].std() > 0.1
    assert smooth[inside].std() < 0.02
    # The amplitude at the highest frequency falls by exp(-(pi sigma)^2 / 2) an axis, sigma = sqrt(s^2 - 1) / 2.
    sigma = math.sqrt(1 / 0.52**2 - 1) / 2
    assert (smooth[inside] - 0.5).abs().max() < 0.5 * math.exp(-((math.pi * sigma) ** 2)) + 0.02
    for factor in (1.0, 1.3):
        params = torch.full((1, 1), factor)
        assert torch.equal(Zoom(0.5, 2.0, antialias=True)(board, params), Zoom()(board, params))
    constant = torch.full((1, 1, 32, 32), 0.7)
    assert torch.allclose(Zoom(0.5, 1.0, antialias=True)(constant, half)[inside], torch.tensor(0.7))
    # A crop by half and a shrink by half make no shrink.
    chain = Compose([ResizedCrop(), Zoom(0.5, 1.0, antialias=True)])
    params = torch.tensor([[8.0, 8.0, 16.0, 16.0, 0.5]])
    plain = Compose([ResizedCrop(), Zoom(0.5, 1.0)])
    assert chain.antialias
    assert torch.equal(chain(board, params), plain(board, params))


def test_crop_boxes_are_drawn_as_random_resized_crop_draws():
    crop, size = ResizedCrop((0.08, 1.0)), (32, 32)
    y, x, height, width = crop.sample(20000, generator(0, "test"), size).double().unbind(dim=1)
    for value in (y, x, height, width):
        assert torch.equal(value, value.round())
    assert (y >= 0).all()
    assert (x >= 0).all()
    assert (y + height <= 32).all()
    assert (x + width <= 32).all()
    assert height.min() >= 1
    area, aspect = height * width / 1024, width / height
    assert (area > 0.05).all()
    assert ((aspect > 0.6) & (aspect < 1.65)).all()
    assert aspect.log().mean().abs() < 0.01
    # An accepted draw has an area share uniform in [.08, 1] times the chance that its box fits; at shares under
    # (3/4) every box fits, so the density is flat there.
    low, high = ((area > a) & (area < b) for a, b in ((0.15, 0.35), (0.45, 0.65)))
    assert abs(low.double().mean() / high.double().mean() - 1) < 0.08
    room = 32 - height
    inner = room >= 4
    assert abs((y[inner] / room[inner]).mean() - 0.5) < 0.01
    assert (y[inner] == room[inner]).any()
    assert (y[inner] == 0).any()


def one_box(rng, scale, ratio, side):
    """RandomResizedCrop as its documentation tells it, one box at a time."""
    for _ in range(10):
        area, aspect = side**2 * rng.uniform(*scale), math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= side and 0 < height <= side:
            return rng.integers(side - height + 1), rng.integers(side - width + 1), height, width
    return 0, 0, side, side


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)])
def test_boxes_have_the_distribution_of_a_scalar_draw(scale):
    n, ratio, rng = 4000, (3 / 4, 4 / 3), np.random.default_rng(0)
    ours = ResizedCrop(scale, ratio).sample(n, generator(0, "test"), (32, 32)).numpy()
    theirs = np.array([one_box(rng, scale, ratio, 32) for _ in range(n)])
    # Two-sample Kolmogorov-Smirnov statistic at level 1e-4.
    limit = math.sqrt(-0.5 * math.log(1e-4 / 2) * 2 / n)
    for i, name in enumerate(("y", "x", "height", "width")):
        gap = [(ours[:, i] < g).mean() - (theirs[:, i] < g).mean() for g in np.arange(-0.5, 33)]
        assert np.abs(gap).max() < limit, name


def test_the_aspect_of_a_box_is_width_by_height():
    height, width = ResizedCrop((0.1, 0.3), (2.0, 3.0)).sample(500, generator(0, "test"), (64, 64))[:, 2:].unbind(dim=1)
    assert ((width / height > 1.8) & (width / height < 3.3)).all()


def test_crops_fall_back_to_the_centre_where_nothing_fits():
    tall = ResizedCrop((0.9, 1.0), (3.0, 3.0)).sample(5, generator(0, "test"), (8, 8))
    assert tall.tolist() == [[2, 0, 3, 8]] * 5  # width 8, height round(8 / 3), (8 - 3) // 2 above
    wide = ResizedCrop((0.9, 1.0), (0.25, 0.25)).sample(5, generator(0, "test"), (8, 8))
    assert wide.tolist() == [[0, 3, 8, 2]] * 5
    assert ResizedCrop((1.0, 1.0), (1.0, 1.0)).sample(3, generator(0, "test"), (8, 8)).tolist() == [[0, 0, 8, 8]] * 3
    one = ResizedCrop().sample(50, generator(0, "test"), (1, 1))
    assert one.tolist() == [[0, 0, 1, 1]] * 50


def test_other_draws():
    def draw(transform, n=20000, size=(10, 20)):
        drawn = transform.sample(n, generator(0, "test"), size)
        assert torch.equal(drawn, transform.sample(n, generator(0, "test"), size))
        assert drawn.dtype == torch.float32
        assert drawn.shape == (n, len(transform.parameters))
        return drawn.double()

    angle = draw(Rotate(30))
    assert (angle.min() >= -30, angle.max() < 30) == (True, True)
    assert abs(angle.mean()) < 0.5
    assert abs(angle.std() - 60 / math.sqrt(12)) < 0.3
    shift = draw(Translate(0.3))
    assert shift[:, 0].unique().tolist() == list(range(-3, 4))
    assert shift[:, 1].unique().tolist() == list(range(-6, 7))
    assert draw(Translate(0.2), size=(8, 8)).abs().max() == 1  # 1.6 pixels allow one
    factor = draw(Zoom(0.57, 1.0))
    assert 0.57 <= factor.min() < 0.571 < 0.999 < factor.max() <= 1
    flip = draw(HorizontalFlip(0.8))
    assert set(flip.view(-1).tolist()) == {0.0, 1.0}
    assert abs(flip.mean() - 0.8) < 0.015
    assert draw(HorizontalFlip(0.0)).sum() == 0
    assert draw(HorizontalFlip(1.0)).mean() == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Rotate(-1), "0 to 180"),
        (lambda: Rotate(200), "0 to 180"),
        (lambda: Translate(1.5), "fraction"),
        (lambda: Zoom(0.0, 1.0), "0 < low"),
        (lambda: Zoom(1.2, 1.0), "low <= high"),
        (lambda: HorizontalFlip(1.5), "probability"),
        (lambda: ResizedCrop((0.0, 1.0)), "0 < low"),
        (lambda: ResizedCrop((0.5, 1.1)), "<= 1"),
        (lambda: ResizedCrop((0.5, 1.0), (2.0, 1.0)), "low <= high"),
        (lambda: Rotate()(torch.rand(2, 1, 4, 4), torch.zeros(2, 3)), "columns angle"),
        (lambda: Rotate()(torch.rand(2, 1, 4, 4), torch.zeros(1, 1)), "one row an image"),
        (lambda: Rotate()(torch.zeros(2, 1, 4, 4).long(), torch.zeros(2, 1)), "float images"),
        (lambda: Rotate()(torch.rand(2, 4, 4), torch.zeros(2, 1)), r"\(n, C, H, W\)"),
        (lambda: Rotate()(torch.rand(2, 1, 0, 4), torch.zeros(2, 1)), r"\(n, C, H, W\)"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(GeomsslError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
