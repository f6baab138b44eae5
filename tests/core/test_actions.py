"""Actions: closed forms for whole shifts and turns, where pairs are exact, and declarations of one's own."""

import math

import pytest
import torch
import torch.nn.functional as F

from geomssl.encoders.geometry import Geometry
from geomssl.errors import GeomsslError
from geomssl.transforms import (
    Brightness,
    Compose,
    CyclicRotations,
    Dihedral,
    Flips,
    HorizontalFlip,
    ResizedCrop,
    Rotate,
    Translate,
    Translations,
    Zoom,
    policy,
)
from geomssl.transforms.actions import Action, FunctionAction, action
from geomssl.transforms.base import Parameter, Transform

GRID = Geometry((4.0, 4.0), (1.5, 1.5))


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_regular_is_the_action_of_the_group():
    group = Dihedral(4)
    f, params = features(8, 3, 8, 5, 5), group.elements()
    assert torch.equal(action("regular", group)(f, params, (10, 10)), group.act(f, params))


def test_spatial_turns_the_maps_and_leaves_the_orientations():
    f = features(4, 3, 4, 5, 5)
    moved = action("spatial", CyclicRotations(4))(f, CyclicRotations(4).elements(), (10, 10))
    for k in range(4):
        assert torch.equal(moved[k], torch.rot90(f[k], k, (2, 3)))
    mirrored = action("spatial", Flips())(f[:, :, 0], rows([1], [1], [0], [0]), (10, 10))
    assert torch.equal(mirrored[:2], f[:2, :, 0].flip(3))
    assert torch.equal(mirrored[2:], f[2:, :, 0])


def test_trivial_leaves_any_shape():
    f = features(2, 7)
    assert action("trivial", Rotate())(f, rows([3.0], [4.0]), (9, 9)) is f


@pytest.mark.parametrize("declared", ["spatial", "regular"])
def test_wrapped_shifts_are_divided_by_the_stride(declared):
    f = features(3, 2, 1, 4, 6)
    moved = action(declared, Translations(), Geometry((2.0, 3.0), (0.5, 1.0)))(f, rows([2, 0], [-4, 3], [0, 9]), (8, 18))
    for i, shift in enumerate([(1, 0), (-2, 1), (0, 3)]):
        assert torch.equal(moved[i], torch.roll(f[i], shift, (2, 3)))
    half = action(declared, Translations(), Geometry((2.0, 2.0), (0.5, 0.5)))(f[:1], rows([1, 0]), (8, 12))
    assert torch.allclose(half[0], (f[0] + torch.roll(f[0], 1, 2)) / 2)


def test_shifts_that_lose_pixels_bring_in_zeros():
    f = features(1, 2, 4, 4)
    moved = action("spatial", Translate(), Geometry((2.0, 2.0), (0.5, 0.5)))(f, rows([2, -4]), (8, 8))
    assert torch.allclose(moved[..., 1:, :2], f[..., :-1, 2:])
    assert float(moved[..., 0, :].abs().max()) == 0
    assert float(moved[..., 2:].abs().max()) == 0


@pytest.mark.parametrize(
    ("transform", "params"),
    [
        (Rotate(), [30.0]),
        (Zoom(), [1.3]),
        (Translate(), [1.0, -2.5]),
        (ResizedCrop(), [2.0, 1.0, 9.0, 11.0]),
        (Compose([Rotate(), HorizontalFlip()]), [-20.0, 1.0]),
    ],
)
def test_at_stride_one_features_move_as_images_do(transform, params):
    f, params = features(2, 3, 13, 13), rows(params, params)
    moved = action("spatial", transform, Geometry((1.0, 1.0), (0.0, 0.0)))(f, params, (13, 13))
    if isinstance(transform, Compose):
        expected = transform.parts[1](transform.parts[0](f, params[:, :1]), params[:, 1:])
    else:
        expected = transform(f, params)
    assert torch.allclose(moved, expected, atol=1e-9)


@pytest.mark.parametrize(("stride", "offset", "size"), [(2.0, 0.5, 32), (2.0, 0.0, 33), (2.0, 0.0, 32), (4.0, 2.0, 40)])
@pytest.mark.parametrize(("transform", "params"), [(Rotate(), [25.0]), (Zoom(), [1.2]), (Translate(), [3.0, -2.0])])
def test_a_ramp_sampled_at_its_grid_moves_as_the_ramp_does(stride, offset, size, transform, params):
    """Features that are a linear picture at offset + stride i: read bilinearly, they must give the moved picture there."""
    last = offset + stride * (len(torch.arange(offset, size, stride)) - 1)
    along = torch.arange(offset, last + 1, stride, dtype=torch.float64)
    y, x = torch.meshgrid(along, along, indexing="ij")
    f = (3 * y - 2 * x + 5)[None, None]
    source = transform.pull(torch.stack([y, x], dim=-1)[None], rows(params), (size, size))[0]
    expected = 3 * source[..., 0] - 2 * source[..., 1] + 5
    inside = ((source >= offset) & (source <= last)).all(dim=-1)
    assert int(inside.sum()) > 20
    moved = action("spatial", transform, Geometry((stride, stride), (offset, offset)))(f, rows(params), (size, size))[0, 0]
    assert torch.allclose(moved[inside], expected[inside], atol=1e-9)


def test_colour_leaves_features_where_they_are():
    f = features(1, 2, 4, 4)
    assert torch.equal(action("spatial", Brightness())(f, rows([1.5]), (8, 8)), f)
    jitter_then_flip = Compose([Brightness(), HorizontalFlip()])
    assert torch.equal(action("spatial", jitter_then_flip)(f, rows([1.5, 1]), (8, 8)), f.flip(3))


class TestExactness:
    def exact(self, declared, transform, params, feature_size, image_size, geometry=None):
        return action(declared, transform, geometry).is_exact(rows(*params), feature_size, image_size).tolist()

    def test_quarter_turns_of_square_images_and_maps(self):
        c8 = [[i] for i in range(8)]
        for declared in ("regular", "spatial"):
            assert self.exact(declared, CyclicRotations(8), c8, (4, 4), (8, 8)) == [True, False] * 4
        assert self.exact("trivial", CyclicRotations(8), c8, (1, 1), (8, 8)) == [True, False] * 4
        assert self.exact("spatial", CyclicRotations(4), [[1], [2]], (4, 5), (8, 10)) == [False, True]
        for declared in ("regular", "spatial"):
            assert self.exact(declared, CyclicRotations(4), [[1], [2]], (4, 5), (9, 9)) == [False, True]
            assert self.exact(declared, CyclicRotations(4), [[1], [2]], (4, 4), (8, 9)) == [False, True]

    def test_wrapped_shifts_by_multiples_of_the_stride(self):
        shifts = [[0, 0], [4, -8], [2, 0], [0, 1], [0.5, 0]]
        assert self.exact("spatial", Translations(), shifts, (2, 2), (8, 8), GRID) == [True, True, False, False, False]
        assert self.exact("trivial", Translations(), shifts, (1, 1), (8, 8)) == [True] * 4 + [False]

    def test_no_shift_is_exact_under_a_guessed_stride(self):
        guess = Geometry.from_sizes((8, 8), (2, 2))
        for geometry in (None, guess):
            assert self.exact("spatial", Translations(), [[0, 0], [4, 0]], (2, 2), (8, 8), geometry) == [True, False]
        assert self.exact("spatial", Translations(), [[1, 0]], (8, 8), (8, 8)) == [True]

    def test_shifts_that_lose_pixels_are_not(self):
        assert self.exact("spatial", Translate(), [[0, 0], [4, 0]], (2, 2), (8, 8), GRID) == [True, False]

    def test_a_right_angle_is_where_the_grid_lies_about_the_centre(self):
        angles = [[0.0], [90.0], [45.0]]
        assert self.exact("spatial", Rotate(), angles, (2, 2), (8, 8), GRID) == [True, True, False]
        off_centre = Geometry((2.0, 2.0), (0.0, 0.0))
        assert self.exact("spatial", Rotate(), angles, (4, 4), (8, 8), off_centre) == [True, False, False]

    def test_pairs_that_are_exact_permute_features(self):
        f = torch.arange(2.0 * 6 * 6, dtype=torch.float64).view(1, 2, 6, 6)
        grid = Geometry((2.0, 2.0), (0.5, 0.5))
        for transform in (CyclicRotations(8), Dihedral(4), Translations(), Rotate(), Translate(), Zoom(), Flips()):
            g = torch.Generator().manual_seed(0)
            params = torch.cat([transform.identity(), transform.sample(30, g, (12, 12))]).double()
            declared = action("spatial", transform, grid)
            moved = declared(f.expand(31, -1, -1, -1), params, (12, 12))
            permuted = (moved.flatten(1).sort(1).values == f.flatten(1).sort(1).values).all(1)
            exact = declared.is_exact(params, (6, 6), (12, 12))
            assert exact[0]
            assert (permuted | ~exact).all()

    def test_a_function_counts_as_exact_only_when_it_is_said_to_permute(self):
        flip = FunctionAction(lambda f, params, size: f.flip(1), Flips())
        said = FunctionAction(lambda f, params, size: f.flip(1), Flips(), permutes=True)
        assert flip.is_exact(rows([0], [1]), (1, 1), (8, 8)).tolist() == [True, False]
        assert said.is_exact(rows([0], [1]), (1, 1), (8, 8)).tolist() == [True, True]


def test_a_callable_is_an_action():
    def reverse(f, params, image_size):
        return f.flip(1)

    declared = action(reverse, Flips())
    assert isinstance(declared, Action)
    assert declared.name == "reverse"
    assert action(declared, Flips()) is declared
    f = features(2, 3)
    assert torch.equal(declared(f, rows([1], [1]), (4, 4)), f.flip(1))


def test_gradients_pass_through_the_action():
    f = features(1, 1, 5, 5).requires_grad_()
    declared = action("spatial", Rotate(), Geometry((2.0, 2.0), (0.5, 0.5)))
    assert torch.autograd.gradcheck(lambda f: declared(f, rows([20.0]), (10, 10)), (f,))


class Unknown(Transform):
    name = "unknown"
    parameters = (Parameter("a", "", "continuous", 0.0, 0.0, 1.0),)

    def sample(self, n, generator, size):
        return torch.zeros(n, 1)

    def __call__(self, images, params):
        return F.relu(images)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: action("reguler", CyclicRotations(4)), "'regular'"),
        (lambda: action("regular", Rotate()), "a group"),
        (lambda: action("spatial", Unknown()), "unknown"),
        (lambda: action("spatial", CyclicRotations(4))(features(2, 3), rows([1], [1]), (4, 4)), "(2, 3)"),
        (lambda: action("regular", CyclicRotations(4))(features(1, 3, 1, 4, 4), rows([1]), (4, 4)), "(n, C, 4, H, W)"),
        (lambda: action("spatial", CyclicRotations(4))(features(1, 3, 4, 5), rows([1]), (4, 5)), "not square"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)


def test_policies_have_a_spatial_action_but_no_regular_one():
    simclr = policy("simclr")
    params = simclr.sample(2, torch.Generator().manual_seed(0), (8, 8)).double()
    assert action("spatial", simclr, GRID)(features(2, 3, 2, 2), params, (8, 8)).shape == (2, 3, 2, 2)
    with pytest.raises(GeomsslError):
        action("regular", simclr)


class TestPreciseReading:
    """What is between the pixels of a band-limited map: waves, whose value is known everywhere."""

    @staticmethod
    def wave(y, x, per_pixel):
        return torch.cos(2 * math.pi * per_pixel * (0.8 * y + 0.6 * x) + 0.3)

    @pytest.mark.parametrize("per_pixel", [0.05, 0.15, 0.25])
    @pytest.mark.parametrize(("transform", "params"), [(Rotate(), [25.0]), (Zoom(), [1.3]), (Translate(), [1.4, -0.7])])
    def test_a_wave_is_read_where_it_is_and_far_better_than_bilinearly(self, transform, params, per_pixel):
        size = (48, 48)
        y, x = torch.meshgrid(*[torch.arange(48, dtype=torch.float64)] * 2, indexing="ij")
        declared = action("spatial", transform, Geometry((1.0, 1.0), (0.0, 0.0)))
        f, params = self.wave(y, x, per_pixel)[None, None], rows(params)
        source = declared.places(params, size, size)
        inside = ((source[0] > 6) & (source[0] < 41) & (source[1] > 6) & (source[1] < 41)).expand(1, *size)[0]
        truth = self.wave(*(c.expand(1, *size)[0] for c in source), per_pixel)
        fine = (declared.precise(f, params, size)[0, 0] - truth)[inside].abs().max()
        plain = (declared(f, params, size)[0, 0] - truth)[inside].abs().max()
        assert int(inside.sum()) > 300
        assert float(fine) < 1e-3 < float(plain)
        assert float(fine) < float(plain) / 10

    def test_it_reads_round_the_torus_under_wrapped_shifts(self):
        along = torch.arange(16, dtype=torch.float64)
        f = torch.cos(2 * math.pi * 2 * along / 16).view(1, 1, 1, 16).expand(1, 1, 16, 16)
        moved = action("spatial", Translations(), GRID).precise(f, rows([0, 2]), (64, 64))
        expected = torch.cos(2 * math.pi * 2 * (along - 0.5) / 16)
        assert torch.allclose(moved[0, 0], expected.expand(16, 16), atol=3e-4)

    @pytest.mark.parametrize("transform", [CyclicRotations(4), Dihedral(4), Flips(), Translations(), HorizontalFlip()])
    @pytest.mark.parametrize("declared", ["spatial", "regular"])
    def test_where_nothing_is_resampled_both_readings_agree(self, declared, transform):
        if declared == "regular" and isinstance(transform, HorizontalFlip):
            return
        group = declared == "regular" and not isinstance(transform, Translations)
        f = features(6, 2, transform.fibre if group else 1, 5, 5)
        params = transform.sample(6, torch.Generator().manual_seed(0), (5, 5)).double()
        acts = action(declared, transform, Geometry((1.0, 1.0), (0.0, 0.0)))
        assert torch.allclose(acts.precise(f, params, (5, 5)), acts(f, params, (5, 5)), atol=1e-12)

    def test_orientations_are_permuted_alike_where_the_maps_are_resampled(self):
        """Constant maps do not feel the reading away from the corners, so only the permutation is left."""
        c8 = CyclicRotations(8)
        f = features(8, 3, 8, 1, 1).expand(-1, -1, -1, 9, 9)
        acts = action("regular", c8)
        plain, fine = (way(f, c8.elements().double(), (9, 9))[..., 3:6, 3:6] for way in (acts, acts.precise))
        assert torch.allclose(fine, plain, atol=1e-9)
        assert float((plain[1] - f[1, ..., 3:6, 3:6]).abs().max()) > 0.1

    def test_places_are_unbounded_and_those_of_colour_stay(self):
        y, _ = action("spatial", Translate(), Geometry((2.0, 2.0), (0.5, 0.5))).places(rows([3, 0]), (4, 4), (8, 8))
        assert y.flatten().tolist() == [-1.5, -0.5, 0.5, 1.5]
        y, x = action("spatial", Brightness()).places(rows([1.5]), (2, 3), (8, 8))
        assert (y.flatten().tolist(), x.flatten().tolist()) == ([0, 1], [0, 1, 2])
        assert FunctionAction(lambda f, p, s: f, Flips()).places(rows([1]), (2, 2), (8, 8)) is None
