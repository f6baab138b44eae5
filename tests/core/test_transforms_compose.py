"""Compose: names, one reading for neighbours, what lies outside along a chain; policies; short names."""

import math

import numpy as np
import pytest
import torch

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms import (
    Brightness,
    Compose,
    CyclicRotations,
    Dihedral,
    Flips,
    Grayscale,
    Group,
    HorizontalFlip,
    Hue,
    Jitter,
    ResizedCrop,
    Rotate,
    Translate,
    Translations,
    Zoom,
    named,
    policy,
)
from geomssl.transforms.compose import POLICIES


def picture(channels=3, n=1, size=(6, 6), dtype=torch.float64):
    return torch.rand(n, channels, *size, dtype=dtype, generator=generator(0, "picture"))


def one_by_one(compose, images, params):
    for part, columns in zip(compose.parts, compose.slices, strict=True):
        images = part(images, params[:, columns])
    return images


def test_parameters_are_concatenated_and_named_by_part():
    compose = Compose([Rotate(10), Compose([HorizontalFlip(), Jitter()]), Rotate(20)])
    assert [p.name for p in compose.parameters] == [
        "rotate.angle", "horizontal-flip.flip", "jitter.brightness", "jitter.contrast", "jitter.saturation", "jitter.hue",
        "rotate-2.angle",
    ]  # fmt: skip
    assert [p.high for p in compose.parameters][:2] == [10.0, 1.0]
    assert compose.identity(3).tolist() == [[0, 0, 1, 1, 1, 0, 0]] * 3
    assert compose.active(1) == (True, True, True, True, False, False, True)
    assert compose.active(3) == (True,) * 7


def test_draws_are_those_of_the_parts_from_one_generator():
    parts = [ResizedCrop(), HorizontalFlip(), Jitter(), Grayscale()]
    g = generator(5, "test")
    expected = torch.cat([part.sample(7, g, (6, 6)) for part in parts], dim=1)
    assert torch.equal(Compose(parts).sample(7, generator(5, "test"), (6, 6)), expected)


EXACT_CHAINS = [
    (Compose([HorizontalFlip(), Rotate()]), [[1, 90], [1, 180], [0, 270], [1, -90]]),
    (Compose([Rotate(), HorizontalFlip()]), [[90, 1], [270, 1]]),
    (Compose([Translate(), Rotate(), HorizontalFlip()]), [[1, -2, 90, 1], [0, 3, 180, 0], [9, 0, 90, 1]]),
    (Compose([Rotate(), Translate(), Rotate()]), [[90, 2, 1, 180], [180, -1, 4, 90]]),
    (Compose([Translate(), Translate()]), [[3, 0, -3, 0], [0, 5, 0, -4]]),
    (Compose([CyclicRotations(4), Flips(), Dihedral(4)]), [[k, k % 2, 2 * k % 8] for k in range(4)]),
    (Compose([Translations(), Rotate(), Translations()]), [[2, -1, 90, 5, 3], [7, 8, 180, -1, 0]]),
    (Compose([Translations(wrap=False), HorizontalFlip()]), [[2, -1, 1]]),
    (Compose([Zoom(), HorizontalFlip(), Rotate()]), [[1.0, 1, 270]]),
]


@pytest.mark.parametrize(("compose", "rows"), EXACT_CHAINS)
@pytest.mark.parametrize("side", [5, 6, 28])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whole_pixel_chains_equal_their_steps_bit_for_bit(compose, rows, side, dtype):
    images, params = picture(n=len(rows), size=(side, side), dtype=dtype), torch.tensor(rows, dtype=dtype)
    assert torch.equal(compose(images, params), one_by_one(compose, images, params))


ONE_REAL_STEP = [
    (Compose([ResizedCrop(), HorizontalFlip()]), [[1, 2, 3, 4, 1]]),
    (Compose([HorizontalFlip(), ResizedCrop()]), [[1, 1, 0, 3, 4]]),
    (Compose([ResizedCrop(), Translate()]), [[1, 2, 3, 4, 2, -1], [0, 1, 5, 4, -7, 0]]),
    (Compose([ResizedCrop(), Rotate(), HorizontalFlip()]), [[1, 2, 4, 3, 90, 1], [0, 1, 2, 2, 180, 0]]),
    (Compose([Translate(), Rotate()]), [[2, -1, 33], [0, 4, -71]]),
    (Compose([Rotate(), Translate()]), [[33, 2, -1], [77, 0, 4]]),
    (Compose([HorizontalFlip(), Zoom(), CyclicRotations(4)]), [[1, 0.6, 1], [0, 1.4, 3]]),
    (Compose([Translations(), ResizedCrop()]), [[2, 3, 1, 2, 3, 4]]),
    (Compose([ResizedCrop(), Translations()]), [[1, 2, 3, 4, 2, 3]]),
]


@pytest.mark.parametrize(("compose", "rows"), ONE_REAL_STEP)
@pytest.mark.parametrize("side", [6, 7])
def test_one_resampled_step_among_whole_ones_equals_the_steps(compose, rows, side):
    images, params = picture(n=len(rows), size=(side, side)), torch.tensor(rows, dtype=torch.float64)
    assert torch.allclose(compose(images, params), one_by_one(compose, images, params), atol=1e-12)


def test_a_crop_then_a_flip_is_the_mirrored_crop():
    images, box = picture(), torch.tensor([[1.0, 2.0, 3.0, 3.0]], dtype=torch.float64)
    chain = Compose([ResizedCrop(), HorizontalFlip()])
    assert torch.equal(chain(images, torch.cat([box, torch.ones(1, 1)], 1)), ResizedCrop()(images, box).flip(3))


def test_outside_the_frame_of_a_crop_lie_zeros_and_not_more_of_the_image():
    images = torch.ones(1, 1, 16, 16)
    chain = Compose([ResizedCrop(), Rotate()])
    found = chain(images, torch.tensor([[4.0, 4.0, 8.0, 8.0, 45.0]]))
    alone = Rotate()(images, torch.tensor([[45.0]]))
    assert torch.allclose(found, alone, atol=1e-6)
    assert found[0, 0, 0, 0] == 0
    shifted = Compose([ResizedCrop(), Translate()])(images, torch.tensor([[4.0, 4.0, 8.0, 8.0, 3.0, 0.0]]))
    assert shifted[0, 0, :3].abs().max() == 0
    assert shifted[0, 0, 3:].min() == 1
    # Zeros that one step let in do not come back through a later one.
    there_and_back = Compose([Translate(), Translate()])(images, torch.tensor([[0.0, 6.0, 0.0, -6.0]]))
    assert torch.equal(there_and_back[0, 0, 0], torch.tensor([1.0] * 10 + [0.0] * 6))


def test_neighbours_are_read_once():
    """Two half-pixel shifts make one whole shift when fused, and blur when applied one by one."""
    images = picture(size=(8, 8))
    chain, params = Compose([Translate(), Translate()]), torch.tensor([[0, 0.5, 0, 0.5]], dtype=torch.float64)
    fused = chain(images, params)[..., 2:]
    assert torch.allclose(fused, images[..., 1:-1])
    assert not torch.allclose(fused, one_by_one(chain, images, params)[..., 2:], atol=0.01)
    apart = Compose([Translate(), Brightness(), Translate()])
    mixed = apart(images, torch.tensor([[0, 0.5, 1.0, 0, 0.5]], dtype=torch.float64))
    assert torch.allclose(mixed[..., 2:], one_by_one(chain, images, params)[..., 2:])


def test_order_matters_and_photometric_parts_stand_where_they_stand():
    images = picture(n=2)
    params = torch.tensor([[0.5, 2, 0], [0.5, 2, 0]], dtype=torch.float64)
    chain = Compose([Brightness(), Translate()])
    assert torch.allclose(chain(images, params), one_by_one(chain, images, params))
    full = policy("simclr")
    params = full.sample(2, generator(0, "test"), (6, 6)).double()
    assert torch.allclose(full(images, params), one_by_one(full, images, params), atol=1e-12)


def test_exactness_needs_every_part():
    chain = Compose([Rotate(), HorizontalFlip(), Hue()])
    params = torch.tensor([[90, 1, 0], [45, 1, 0], [90, 0, 0.1], [0, 0, 0.0]])
    assert chain.is_exact(params, (6, 6)).tolist() == [True, False, False, True]
    assert chain.is_exact(params, (5, 6)).tolist() == [False, False, False, True]


def test_inverse_and_pull():
    single = Compose([CyclicRotations(4)])
    assert single.inverse(torch.tensor([[1.0]])).tolist() == [[3.0]]
    with pytest.raises(GeomsslError, match="no inverse"):
        Compose([Rotate(), HorizontalFlip()]).inverse(torch.zeros(1, 2))
    grid = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij"), -1)[None]
    chain = Compose([Translate(), HorizontalFlip()])
    origin = chain.pull(grid, torch.tensor([[1.0, 2.0, 1.0]]), (5, 5))
    assert torch.equal(origin, torch.stack([grid[..., 0] - 1, 4 - grid[..., 1] - 2], -1))
    with pytest.raises(GeomsslError, match="geometric"):
        Compose([Rotate(), Hue()]).pull(grid, torch.zeros(1, 2), (5, 5))


def test_a_batch_larger_than_the_cache_gives_every_image_its_own_parameters():
    """200 images of 3x32x32 are worked on in three parts; each must come out as it does alone."""
    images = torch.rand(200, 3, 32, 32, generator=generator(0, "images"))
    drawn = policy("simclr")
    params = drawn.sample(200, generator(0, "params"), (32, 32))
    whole = drawn(images, params)
    for i in (0, 84, 85, 86, 170, 199):
        torch.testing.assert_close(drawn(images[i : i + 1], params[i : i + 1])[0], whole[i], rtol=0, atol=1e-6)


def test_an_empty_compose_is_the_identity():
    images, nothing = picture(n=4), policy("none")
    params = nothing.sample(4, generator(0, "test"), (6, 6))
    assert params.shape == (4, 0)
    assert nothing.identity(4).shape == (4, 0)
    assert torch.equal(nothing(images, params), images)
    assert nothing.is_exact(params, (6, 6)).all()
    assert nothing.active(3) == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("channels", [1, 3])
def test_policies_take_every_dtype_and_their_identity_changes_no_bit(name, dtype, channels):
    chosen, images = policy(name), picture(channels, n=6, size=(8, 8)).to(dtype)
    assert torch.equal(chosen(images, chosen.identity(6)), images)
    params = chosen.sample(6, generator(0, "test"), (8, 8))
    views = chosen(images, params)
    assert (views.dtype, views.shape) == (dtype, images.shape)
    assert views.isfinite().all()
    if dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(views, chosen(images.float(), params).to(dtype))  # rounded once, at the end


def settings(name):
    found = {}
    for part in policy(name).parts:
        match part:
            case ResizedCrop():
                found["crop"] = part.scale
            case HorizontalFlip() | Grayscale():
                found[part.name] = part.p
            case Jitter():
                found["jitter"] = (part.p, *(round((p.high - p.low) / 2, 6) for p in part.parameters))
    return found


def test_policies_are_those_of_the_papers():
    flip, gray = {"horizontal-flip": 0.5}, {"grayscale": 0.2}
    large = {"crop": (0.08, 1.0), **flip, "jitter": (0.8, 0.4, 0.4, 0.4, 0.1), **gray}
    assert settings("simclr") == settings("large") == large
    assert settings("moderate") == {"crop": (0.5, 1.0), **flip, "jitter": (0.8, 0.2, 0.2, 0.2, 0.05), **gray}
    assert settings("small") == {"crop": (0.9, 1.0), "jitter": (0.8, 0.04, 0.04, 0.04, 0.01), **gray}
    assert settings("ciper") == {**large, "crop": (0.2, 1.0), "horizontal-flip": 0.8}
    assert [p.name.split(".")[1] for p in policy("ciper").parameters] == [
        "y", "x", "height", "width", "flip", "brightness", "contrast", "saturation", "hue", "gray"
    ]  # fmt: skip
    assert sum(policy("ciper").active(1)) == 7
    assert policy("rotations").sample(400, generator(0, "test"), (8, 8)).unique().tolist() == [0, 1, 2, 3]
    assert policy("translations20").sample(400, generator(0, "test"), (20, 20)).abs().amax(0).tolist() == [4, 4]
    zoom = policy("scales").sample(400, generator(0, "test"), (8, 8))
    assert 0.57 <= zoom.min() < 0.59 < 0.98 < zoom.max() <= 1
    assert [p.name for p in policy("simclr").parts] == ["resized-crop", "horizontal-flip", "jitter", "grayscale"]


def test_names():
    for text, kind, order in (("c4", CyclicRotations, 4), ("c8", CyclicRotations, 8), ("d4", Dihedral, 8),
                              ("flips", Flips, 2), ("c6", CyclicRotations, 6), ("d3", Dihedral, 6)):  # fmt: skip
        found = named(text)
        assert (type(found), found.order, found.name) == (kind, order, text)
    for text in ("rotate", "translate", "zoom", "horizontal-flip", "resized-crop", "brightness", "contrast", "saturation",
                 "hue", "grayscale", "gaussian-blur", "jitter", "translations", *POLICIES):  # fmt: skip
        found = named(text)
        assert found.name == text
        params = found.sample(3, generator(0, "test"), (8, 8))
        assert found(picture(n=3, size=(8, 8)), params).shape == (3, 3, 8, 8)
        assert len(found.active(3)) == params.shape[1] == len(found.parameters)
    assert isinstance(named("translations"), Group)
    assert isinstance(named("geomssl.transforms.groups:Flips"), Flips)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: policy("simclrr"), "did you mean 'simclr'"),
        (lambda: named("rotat"), "did you mean 'rotate'"),
        (lambda: named("c0"), "unknown transform"),
        (lambda: named("no.such.module:thing"), "importable"),
        (lambda: policy("simclr")(torch.rand(2, 3, 8, 8), torch.zeros(2, 9)), "resized-crop.y"),
        (lambda: policy("simclr")(torch.rand(2, 2, 8, 8), torch.zeros(2, 10)), "2 channels"),
        (lambda: policy("rotations")(torch.rand(1, 1, 4, 6), torch.ones(1, 1)), "square"),
        (lambda: policy("none")(torch.rand(2, 8, 8), torch.zeros(2, 0)), r"\(n, C, H, W\)"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(GeomsslError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["c4", "c8", "d4", "flips", "translations", "rotate", "zoom", "gaussian-blur", *POLICIES])
def test_nothing_waits_for_the_device(name):
    """The meta device holds no values, so any look at one raises."""
    transform = named(name)
    params = transform.sample(3, generator(0, "test"), (8, 8))
    images = torch.empty(3, 3, 8, 8, device="meta")
    for given in (params, params.to("meta")):
        assert transform(images, given).device.type == "meta"
    if isinstance(transform, Group):
        fibres = torch.empty(3, 2, transform.fibre, 8, 8, device="meta")
        assert transform.act(fibres, params.to("meta")).shape == fibres.shape
        assert transform.compose(params.to("meta"), params.to("meta")).shape == params.shape
        assert transform.is_exact(params.to("meta"), (8, 8)).shape == (3,)


def test_a_zoom_chain_of_three_has_the_zoom_of_the_product():
    images = picture(1, size=(9, 9))
    chain = Compose([Zoom(), Zoom(), Rotate()])
    params = torch.tensor([[1.5, 1.2, 30.0]], dtype=torch.float64)
    direct = Compose([Zoom(), Rotate()])(images, torch.tensor([[1.8, 30.0]], dtype=torch.float64))
    inner = (..., slice(2, 7), slice(2, 7))
    assert torch.allclose(chain(images, params)[inner], direct[inner])
    assert math.isfinite(float(np.asarray(direct).sum()))
