"""equivariance_error: closed forms, what must look bad, what must be degenerate, and assert_equivariant."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import nn

from geomssl import encoders
from geomssl.encoders import GroupConv2d
from geomssl.encoders.geometry import Geometry
from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.defect import simultaneous
from geomssl.probes.equivariance import assert_equivariant, elements, equivariance_error, label
from geomssl.transforms import (
    Brightness,
    CyclicRotations,
    Dihedral,
    Flips,
    HorizontalFlip,
    Rotate,
    Scales,
    Translate,
    Translations,
)
from geomssl.transforms.actions import FunctionAction

C4, D4, SHIFT = CyclicRotations(4), Dihedral(4), Translations()


def images(n=8, size=8, channels=1, seed=0, dtype=torch.float64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def others(group, size=None):
    return group.elements(size)[1:].double()


def conv(stride=1, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Conv2d(1, 3, 3, stride=stride, padding=1, padding_mode="circular", **kwargs).double()


def network(group, seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(
        GroupConv2d(1, 3, 3, group, lifting=True, padding=1, **kwargs), nn.ReLU(), GroupConv2d(3, 4, 3, group, padding=1)
    ).double()


PRECISIONS = pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])


class TestWhatIsExact:
    @PRECISIONS
    def test_a_circular_convolution_under_every_wrapped_shift(self, dtype, most):
        found = equivariance_error(conv().to(dtype), images(dtype=dtype), SHIFT, others(SHIFT, (8, 8)), "spatial")
        assert found.exact.all()
        assert float(found.total.max()) < most
        assert float(found.interval.high.max()) < most
        assert not found.degenerate.any()
        assert float(found.action_size.min()) > 0.5

    @PRECISIONS
    def test_a_strided_one_at_multiples_of_its_stride_only(self, dtype, most):
        params = others(SHIFT, (8, 8))
        found = equivariance_error(conv(stride=2).to(dtype), images(dtype=dtype), SHIFT, params, "spatial")
        whole = (params % 2 == 0).all(dim=1)
        assert torch.equal(found.exact, whole)
        assert float(found.total[whole].max()) < most
        assert float(found.total[~whole].min()) > 0.1

    @pytest.mark.parametrize("group", [C4, D4], ids=["c4", "d4"])
    @pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
    @pytest.mark.parametrize("size", [6, 7])
    def test_group_convolutions_at_every_element(self, group, dtype, most, size):
        model = network(group).to(dtype)
        found = equivariance_error(model, images(size=size, dtype=dtype), group, others(group).to(dtype))
        assert found.exact.all()
        assert float(found.total.max()) < most
        assert float(found.floor.max()) < most
        assert float(found.action_size.min()) > 0.5

    def test_stride_two_keeps_quarter_turns_at_odd_sizes_and_breaks_them_at_even_ones(self):
        model = network(C4, stride=2)
        assert float(equivariance_error(model, images(size=9), C4, others(C4)).total.max()) < 1e-13
        broken = equivariance_error(model, images(size=8), C4, others(C4))
        assert broken.exact.all()
        assert float(broken.total.min()) > 0.5

    def test_an_encoder_is_measured_at_its_fibres_and_h_is_invariant(self):
        encoder = encoders.build("c4-cnn", in_channels=1, widths=(2, 3, 4)).double()
        assert float(equivariance_error(encoder, images(), C4, others(C4)).total.max()) < 1e-12
        h = equivariance_error(encoder.forward, images(), C4, others(C4), "trivial")
        assert float(h.total.max()) < 1e-12
        assert float(h.action_size.max()) == 0


class TestWhatMustLookBad:
    @pytest.mark.parametrize("group", [C4, D4], ids=["c4", "d4"])
    def test_the_wrong_direction_of_the_action(self, group):
        wrong = FunctionAction(lambda f, params, size: group.act(f, group.inverse(params)), group, permutes=True)
        found = equivariance_error(network(group), images(), group, others(group), wrong)
        own = (others(group) == group.inverse(others(group))).all(dim=1)  # a half turn and a mirror are their own inverses
        assert own.tolist() == [False, True, False] + [True] * (len(own) - 3)
        assert float(found.total[own].max()) < 1e-13
        assert float(found.total[~own].min()) > 0.7

    def test_features_of_independent_images_score_chance(self):
        g = torch.Generator().manual_seed(0)
        found = equivariance_error(
            lambda x: torch.randn(len(x), 500, generator=g, dtype=x.dtype), images(n=400), C4, others(C4), "trivial"
        )
        assert torch.allclose(found.total, torch.full((3,), math.sqrt(2), dtype=torch.float64), rtol=0.01)
        assert found.chance == math.sqrt(2)
        assert (found.interval.low < math.sqrt(2) * 1.01).all()

    def test_a_large_offset_does_not_hide_a_defect(self):
        plain = equivariance_error(conv(), images(), C4, others(C4), "spatial")
        shifted = equivariance_error(lambda x: conv()(x) + 100, images(), C4, others(C4), "spatial")
        assert torch.allclose(shifted.total, plain.total, rtol=1e-9)
        assert float(plain.total.min()) > 0.5
        assert not shifted.degenerate.any()

    def test_a_defect_at_one_element_is_not_spread_over_the_others(self):
        def model(x):
            return x + x.flip(2) + x.flip(3) + x.flip((2, 3))

        found = equivariance_error(model, images(), D4, others(D4), "spatial")
        # f commutes with both mirrors and the half turn, and not with a transpose of rows and columns.
        turns = [label(D4, row) for row in others(D4).tolist()]
        small = {name for name, total in zip(turns, found.total.tolist(), strict=True) if total < 1e-12}
        assert small == {"90°", "180°", "270°", "mirror", "mirror, then 90°", "mirror, then 180°", "mirror, then 270°"}
        tall = equivariance_error(lambda x: x + x.flip(2), images(), D4, others(D4), "spatial")
        small = {name for name, total in zip(turns, tall.total.tolist(), strict=True) if total < 1e-12}
        assert small == {"180°", "mirror", "mirror, then 180°"}

    def test_statistics_of_each_orientation(self):
        class PerOrientation(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = GroupConv2d(1, 3, 3, C4, lifting=True, padding=1)
                self.norm = nn.BatchNorm2d(12)

            def forward(self, x):
                return self.norm(self.conv(x).flatten(1, 2)).unflatten(1, (3, 4))

        torch.manual_seed(0)
        model = PerOrientation().double()
        x = images() * torch.linspace(0, 1, 8, dtype=torch.float64)[:, None]
        for _ in range(30):
            model(x)
        assert float(equivariance_error(model, x, C4, others(C4)).total.min()) > 0.05


class TestClosedForms:
    """Models whose sums of squares are written down by hand."""

    def model(self, a):
        weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
        return lambda x: x + a * weight * x

    def test_total_action_size_and_denominator(self):
        x, a = images(n=5), 0.3
        found = equivariance_error(self.model(a), x, Flips(), others(Flips()), "spatial")
        weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
        f = x + a * weight * x
        declared = f.flip(3)
        error = (x.flip(3) + a * weight * x.flip(3) - declared).square().sum((1, 2, 3))
        spread = (declared - declared.mean(0)).square().sum((1, 2, 3))
        assert torch.allclose(found.numerators[:, 0], error)
        assert torch.allclose(found.denominators[:, 0], spread)
        assert float(found.total) == pytest.approx(math.sqrt(error.sum() / spread.sum()))
        moved = (declared - f).square().sum()
        assert float(found.action_size) == pytest.approx(math.sqrt(moved / spread.sum()))
        assert float(found.variance_share) == pytest.approx(float(spread.sum() / f.square().sum()))
        # The weight is odd under the mirror, so the two sides differ by twice its part.
        assert torch.allclose(error, (2 * a * weight * x.flip(3)).square().sum((1, 2, 3)))

    def test_floor_and_excess_where_both_resample(self):
        x = images(n=4, size=9)
        rotate, params = Rotate(), torch.tensor([[33.0]], dtype=torch.float64)
        found = equivariance_error(lambda x: x, x, rotate, params, "spatial")
        rows = params.expand(4, 1)
        there = rotate(x, rows)
        back = rotate(there, -rows)
        spread = (there - there.mean(0)).square().sum()
        # f is the identity, so image and features make the same round trip: half of it squared, and the whole of it squared.
        expected = (back - x).square().sum() * 1.5 / spread
        assert float(found.floor) == pytest.approx(math.sqrt(expected), rel=1e-6)
        assert float(found.total) < 1e-6
        assert float(found.excess) == 0
        assert not found.exact.any()

    def test_excess_is_what_is_left_in_squares(self):
        x, params = images(n=4, size=9), torch.tensor([[33.0]], dtype=torch.float64)
        found = equivariance_error(lambda x: x.flatten(1), x, Rotate(), params, "trivial")
        assert float(found.excess) == pytest.approx(math.sqrt(float(found.total) ** 2 - float(found.floor) ** 2))
        assert float(found.floor) > 0.01

    def test_a_transform_without_inverse_has_no_floor(self):
        scales = Scales((1.0, 1.5))
        found = equivariance_error(lambda x: x, images(size=9), scales, elements(scales, (9, 9)).double(), "spatial")
        assert found.floor.isnan().all()
        assert found.excess.isnan().all()
        assert found.total.isfinite().all()

    def test_results_do_not_depend_on_the_batch_size(self):
        model = conv(stride=2)
        runs = [
            equivariance_error(model, images(n=7), D4, others(D4), "spatial", batch_size=b) for b in (1, 3, 7, 20, 256)
        ]
        for run in runs[1:]:
            for key in ("total", "floor", "action_size", "numerators", "denominators", "low_any"):
                assert torch.allclose(getattr(run, key), getattr(runs[0], key), rtol=1e-9, atol=1e-12), key

    @pytest.mark.parametrize(("transform", "params", "passes"), [
        (C4, others(C4), 3),  # T_g only permutes, so there and back is f(x) itself
        (Rotate(), torch.tensor([[10.0], [20.0]]), 4),
        (CyclicRotations(8), others(CyclicRotations(8)), 3 + 2 * 4),
    ])  # fmt: skip
    def test_each_image_is_passed_once_plain_once_an_element_and_once_more_where_pixels_are_resampled(
        self, transform, params, passes
    ):
        seen = []
        equivariance_error(
            lambda x: seen.append(len(x)) or x, images(n=6), transform, params, "spatial", batch_size=4,
            geometry=Geometry((1.0, 1.0), (0.0, 0.0)),
        )
        assert sum(seen) == 1 + 6 * (1 + passes)  # one image before, to see what the features are


class TestIntervals:
    def test_they_hold_the_estimate_and_low_any_lies_below_low(self):
        found = equivariance_error(conv(stride=2), images(n=40), D4, others(D4), "spatial")
        assert (found.interval.low < found.total).all()
        assert (found.total < found.interval.high).all()
        assert (found.low_any < found.interval.low).all()

    def test_they_narrow_with_the_root_of_n(self):
        def width(n):
            found = equivariance_error(conv(stride=2), images(n=n), C4, others(C4)[:1], "spatial")
            return float(found.interval.high - found.interval.low)

        assert 2.5 < width(20) / width(320) < 6.5

    def test_the_simultaneous_bounds_hold_together_as_often_as_they_say(self):
        """Errors of eight columns with the same true ratio: how often does any low_any lie above it?"""
        trials, n, count = 200, 60, 8
        g = torch.Generator().manual_seed(0)
        misses = pointwise = 0
        for trial in range(trials):
            error = torch.empty(n, count, dtype=torch.float64).exponential_(generator=g)
            ones = torch.ones_like(error)
            misses += bool((simultaneous(error, ones, trial, 0.9, 400, count) > 1).any())
            pointwise += bool((bootstrap_ratio(error, ones, trial, 0.9, 400)[0] > 1).any())
        assert misses / trials < 0.1
        assert pointwise > 2 * misses

    def test_bounds_beyond_the_reach_of_the_resamples_are_no_higher_than_the_normal_ones(self):
        error = torch.empty(50, 1, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
        ones = torch.ones_like(error)
        far, near = (float(simultaneous(error, ones, 0, 0.9, 400, columns)) for columns in (10**6, 10))
        tail = NormalDist().inv_cdf(0.05 / 10**6)
        normal = float(error.mean() + tail * (error - error.mean()).square().sum().sqrt() / 50)
        assert far <= math.sqrt(max(0.0, normal)) < near


class TestDegenerate:
    @pytest.mark.parametrize("offset", [0.0, 5.0])
    def test_a_constant_network(self, offset):
        model = conv(bias=True)
        nn.init.zeros_(model.weight)
        nn.init.constant_(model.bias, offset)
        found = equivariance_error(model, images(), C4, others(C4), "spatial")
        assert found.degenerate.all()
        assert found.total.isnan().all()

    def test_a_spread_of_rounding_only(self):
        model = conv()
        found = equivariance_error(lambda x: 1e6 + model(x), images(), SHIFT, others(SHIFT, (8, 8))[:4], "spatial")
        assert found.degenerate.all()
        assert float(found.variance_share.max()) < 1e-6

    def test_the_share_is_the_callers(self):
        def model(x):
            return 1000 + x

        assert equivariance_error(model, images(), C4, others(C4), "spatial").degenerate.all()
        assert not equivariance_error(model, images(), C4, others(C4), "spatial", share=1e-9).degenerate.any()


class TestModes:
    def test_eval_mode_is_forced_and_every_module_gets_its_own_mode_back(self):
        model = nn.Sequential(conv(), nn.BatchNorm2d(3), nn.Dropout(0.5)).double()
        model[1].eval()
        before = model[1].running_mean.clone()
        for run in (model, model.forward, lambda x: model(x)):
            found = equivariance_error(run, images(), SHIFT, others(SHIFT, (8, 8))[:3], "spatial")
            assert float(found.total.max()) < 1e-13
            assert [m.training for m in model] == [True, False, True]
        assert torch.equal(model[1].running_mean, before)

    def test_what_a_module_keeps_in_eval_mode_only_is_gone_after(self):
        class Keeping(nn.Conv2d):
            def train(self, mode=True):
                if mode and "kept" in self._buffers:
                    del self.kept
                elif not mode:
                    self.register_buffer("kept", self.weight.detach().clone())
                return super().train(mode)

        model = nn.Sequential(Keeping(1, 3, 1), nn.BatchNorm2d(3), Keeping(3, 3, 1)).double()
        model[2].eval()
        before = set(model.state_dict())
        equivariance_error(model, images(), SHIFT, others(SHIFT, (8, 8))[:3], "spatial")
        assert set(model.state_dict()) == before
        assert [m.training for m in model] == [True, True, False]

    def test_no_gradient_is_kept(self):
        model = conv()
        equivariance_error(model, images(), C4, others(C4), "spatial")
        assert model.weight.grad is None

    def test_the_model_sees_the_dtype_that_it_is_given(self):
        seen = set()

        def model(x):
            seen.add(x.dtype)
            return x

        equivariance_error(model, images(dtype=torch.float32), C4, others(C4), "spatial")
        assert seen == {torch.float32}

    def test_half_precision_features_are_compared_in_more(self):
        found = equivariance_error(
            lambda x: x.bfloat16(), images(dtype=torch.float32), C4, others(C4), "spatial"
        )
        assert float(found.total.max()) == 0


class TestAssertEquivariant:
    def test_it_passes_what_is_equivariant_and_returns_the_figures(self):
        found = assert_equivariant(network(C4), C4, 1e-10, in_channels=1, size=9)
        assert found.n == 32
        encoder = encoders.build("c4-cnn", in_channels=2, widths=(2, 3, 4))
        assert_equivariant(encoder, C4, 1e-4)

    def test_it_names_the_worst_element_the_limit_and_what_was_found(self):
        with pytest.raises(AssertionError) as caught:
            assert_equivariant(network(C4), D4, 0.1, action="spatial", in_channels=1)
        assert "expected total error < 0.1" in str(caught.value)
        assert "chance 1.41" in str(caught.value)
        assert "32 images)" in str(caught.value)
        assert "holds the limit" not in str(caught.value)
        with pytest.raises(AssertionError, match=r"at 90°|at 270°"):
            assert_equivariant(lambda x: x + x.flip(2), C4, 0.1, images(), action="spatial")

    def test_it_refuses_degenerate_features(self):
        with pytest.raises(AssertionError, match="hardly vary"):
            assert_equivariant(lambda x: 0 * x, C4, 10.0, images(), action="spatial")

    def test_it_refuses_pairs_that_resample(self):
        with pytest.raises(AssertionError, match=r"at 45°, 135°, 225°, 315°: .*resamples"):
            assert_equivariant(lambda x: x, CyclicRotations(8), 10.0, images(), action="spatial")

    def test_it_judges_the_upper_bound(self):
        def model(x):
            return x + 0.3 * torch.linspace(-1, 1, 8, dtype=x.dtype) * x

        found = equivariance_error(model, images(), Flips(), others(Flips()), "spatial")
        between = float(found.total + found.interval.high) / 2
        with pytest.raises(AssertionError, match="its interval holds the limit: more images"):
            assert_equivariant(model, Flips(), between, images(), action="spatial")
        assert_equivariant(model, Flips(), float(found.interval.high) * 1.01, images(), action="spatial")


class TestElements:
    def test_finite_groups_are_measured_whole_without_the_identity(self):
        assert elements(C4, (8, 8)).tolist() == [[1], [2], [3]]
        assert len(elements(D4, (8, 8), draws=2)) == 7
        assert elements(HorizontalFlip(), (8, 8)).tolist() == [[1]]
        assert elements(Scales((1.0, 1.5, 2.0)), (8, 8)).tolist() == [[1], [2]]

    def test_others_are_drawn_by_the_seed_and_differ(self):
        drawn = elements(SHIFT, (8, 8), draws=10, seed=3)
        assert len(drawn) == 10 == len(drawn.unique(dim=0))
        assert torch.equal(drawn, elements(SHIFT, (8, 8), draws=10, seed=3))
        assert not torch.equal(drawn, elements(SHIFT, (8, 8), draws=10, seed=4))
        assert len(elements(SHIFT, (8, 8), draws=100, step=4)) == 3
        assert (elements(Translate(), (40, 40)) != 0).any(dim=1).all()

    def test_labels_are_words(self):
        assert [label(C4, [k]) for k in range(4)] == ["0°", "90°", "180°", "270°"]
        assert label(CyclicRotations(8), [1]) == "45°"
        assert label(SHIFT, [1.0, -2.0]) == "dy = 1, dx = -2 pixels"
        assert label(Flips(), [1]) == "mirror"
        assert label(Rotate(), [12.34]) == "angle = 12.3 degrees"


def nan():
    x = images()
    x[3, 0, 0, 0] = math.nan
    return x


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: equivariance_error(conv(), images(n=1), C4, others(C4), "spatial"), "one image"),
        (lambda: equivariance_error(conv(), images(size=1), C4, others(C4), "spatial"), "2x2"),
        (lambda: equivariance_error(conv(), torch.ones(3, 1, 8, 8).double(), C4, others(C4), "spatial"), "all equal"),
        (lambda: equivariance_error(conv(), nan(), C4, others(C4), "spatial"), "images with NaN"),
        (lambda: equivariance_error(lambda x: x / 0, images(), C4, others(C4), "spatial"), "features"),
        (lambda: equivariance_error(lambda x: x[:1], images(), C4, others(C4), "spatial"), "one row an image"),
        (lambda: equivariance_error(conv(), images(), C4, torch.zeros(0, 1), "spatial"), "one row an element"),
        (lambda: equivariance_error(conv(), images(), C4, torch.zeros(2), "spatial"), "one row an element"),
        (lambda: equivariance_error(conv(), images(), C4, others(C4), "regular"), "(n, C, 4, H, W)"),
        (lambda: equivariance_error(conv(), images(), C4, others(C4), "special"), "'spatial'"),
        (lambda: equivariance_error(conv(), images(), Rotate(), torch.ones(1, 1), "regular"), "a group"),
        (lambda: equivariance_error(lambda x: x, images(), C4, others(C4), lambda f, p, s: f[..., 0]), "as the model"),
        (lambda: equivariance_error(encoders.build("cnn", 3), images(dtype=torch.float32), C4, others(C4)), "3, as the"),
        (lambda: elements(Translate(0.0), (8, 8)), "besides the identity"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_colour_is_measured_too():
    found = equivariance_error(
        lambda x: x - x.mean((2, 3), keepdim=True), images(), Brightness(), torch.tensor([[0.5]]).double(), "trivial"
    )
    # f(x / 2) = f(x) / 2, so the error is half the features' size, and they are centred over space but not over images.
    assert 0.4 < float(found.total) < 0.7
