"""Bounds of the true defect: rendered inputs, r, the boundary, clusters and blocks, against what is known in closed form."""

import math

import pytest
import torch
from torch import nn

from geomssl.data.base import Resident
from geomssl.data.rendered import Drawn, Fields, Phantoms
from geomssl.encoders import wrap
from geomssl.encoders.geometry import Geometry
from geomssl.errors import GeomsslError
from geomssl.probes import units as units_module
from geomssl.probes.boundary import clean, on_the_torus
from geomssl.probes.equivariance import Options, assert_equivariant, equivariance_error, probe
from geomssl.probes.inputs import rendered
from geomssl.probes.resampling import distances
from geomssl.probes.subject import Subject
from geomssl.probes.units import units
from geomssl.reports.gate import Rules, evaluate
from geomssl.transforms import Brightness, CyclicRotations, Rotate, Translate, Translations, named
from geomssl.transforms.actions import action

ANGLE = torch.tensor([[15.0]], dtype=torch.float64)
HERE = Geometry((1.0, 1.0), (0.0, 0.0), reach=(1.0, 1.0))


def filter3(*rows):
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    conv.weight.data = torch.tensor(rows, dtype=torch.float64)[None, None]
    return conv.requires_grad_(False)


def fields(n=32, size=48, bandwidth=0.15, **kwargs):
    return Fields(n, 1, size, bandwidth, seed=3, **kwargs)


def noise(n=32):
    """1/f noise with nothing above the Nyquist frequency, as an ordinary tensor."""
    return fields(n, bandwidth=0.49).images(torch.arange(n), dtype=torch.float64)


DX = filter3([0, 0, 0], [-0.5, 0, 0.5], [0, 0, 0])
IDENTITY = filter3([0, 0, 0], [0, 1, 0], [0, 0, 0])


class TestADerivativeAt15Degrees:
    """f = dx turned by 15 degrees misses the declared map by 2 sin 7.5 = .261 of its spread, on any isotropic picture."""

    DEFECT = 2 * math.sin(math.radians(7.5))

    def test_on_noise_the_bounds_hold_it_while_excess_shows_nothing(self):
        x = noise()
        found = equivariance_error(DX, x, Rotate(), ANGLE, "spatial", boundary="crop", reference=Fields.like(x, 32))
        assert float(found.excess) < 0.02
        assert float(found.bounds.low) < self.DEFECT < float(found.bounds.high)
        assert float(found.bounds.low) > 0.05
        assert not found.exact.any()

    def test_on_smooth_rendered_pictures_they_close_in_on_it(self):
        widths = []
        for bandwidth in (0.3, 0.2, 0.1):
            found = equivariance_error(DX, fields(bandwidth=bandwidth), Rotate(), ANGLE, "spatial", boundary="crop")
            assert float(found.bounds.low) < self.DEFECT < float(found.bounds.high)
            widths.append(float(found.bounds.high - found.bounds.low))
        assert widths[0] > 2 * widths[1] / 1.5 > widths[2]

    def test_what_only_interpolates_is_cleared(self):
        found = equivariance_error(IDENTITY, fields(bandwidth=0.1), Rotate(), ANGLE, "spatial", boundary="crop")
        assert float(found.bounds.low) == 0 < float(found.total)
        assert float(found.bounds.high) < 0.05
        assert float(found.resampling) < 2 * float(found.total)

    def test_without_a_reference_there_is_no_bound(self):
        found = equivariance_error(DX, noise(4), Rotate(), ANGLE, "spatial")
        for values in (found.resampling, *found.bounds):
            assert values.isnan().all()


class TestTheDistance:
    def test_it_is_its_formula(self):
        pictures, declared = fields(n=5, size=16, bandwidth=0.25), action("spatial", Rotate(), HERE)
        x = pictures.images(torch.arange(5), dtype=torch.float64)
        (found,) = distances(
            lambda x: [DX(x)], pictures, 5, Rotate(), ANGLE, [declared], [None], [None], [torch.tensor([False])],
            resampled=True, dtype=torch.float64, batch_size=2,
        )
        above = below = 0.0
        mean = DX(x).mean(0, keepdim=True)
        for i in range(5):
            f = DX(x[i : i + 1])
            turned = pictures.images(torch.tensor([i]), Rotate(), ANGLE, dtype=torch.float64)
            images = DX(Rotate()(x[i : i + 1], ANGLE)) - DX(turned)
            feature = declared(f, ANGLE, (16, 16)) - declared.precise(f, ANGLE, (16, 16))
            above += float((images - feature).square().sum())
            below += float(declared(f - mean, ANGLE, (16, 16)).square().sum())
        assert float(found.r) == pytest.approx(math.sqrt(above / below), rel=1e-9)
        assert float(found.r) < float(found.high) <= float(found.high_any)

    @pytest.mark.parametrize("angle", [10.0, 37.0])
    def test_on_the_reference_itself_the_defect_lies_within_total_plus_and_minus_r(self, angle):
        pictures, params = fields(n=16, size=24, bandwidth=0.2), torch.tensor([[angle]], dtype=torch.float64)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1)).double()
        net.requires_grad_(False)
        x = pictures.images(torch.arange(16), dtype=torch.float64)
        found = equivariance_error(net, x, Rotate(), params, "spatial", reference=pictures)
        declared = action("spatial", Rotate(), HERE)
        rows = params.expand(16, 1)
        exact = net(pictures.images(torch.arange(16), Rotate(), rows, dtype=torch.float64))
        missed = exact - declared.precise(net(x), rows, (24, 24))
        spread = declared(net(x), rows, (24, 24))
        defect = float(missed.norm() / (spread - spread.mean(0)).norm())
        assert float(found.bounds.low) <= defect <= float(found.bounds.high)

    def test_it_is_nought_where_pixels_and_features_are_permuted(self):
        x = noise(4)
        c8 = CyclicRotations(8)
        found = equivariance_error(DX, x, c8, c8.elements()[1:].double(), "spatial", reference=Fields.like(x, 8))
        assert torch.equal(found.resampling == 0, found.exact)
        assert torch.equal(found.bounds.high[found.exact], found.interval.high[found.exact])
        assert (found.bounds.high[~found.exact] > found.interval.high[~found.exact]).all()

    def test_a_transform_that_cannot_be_rendered_has_no_bounds_and_says_why(self):
        data = Resident("noise", "test", (noise(6) * 255).to(torch.uint8), None)
        made = Subject(wrap(DX, in_channels=1), data, dtype=torch.float64)
        found = probe(made, Options(transform="contrast + rotate", draws=2))
        assert found.table("elements").columns["bound_high"] == [None] * 2
        assert any("no bounds of the defect" in note for note in found.notes)
        assert found.metric("defect").value is None


class TestCoverage:
    """Where the triangle inequality is an equality the bounds have nothing to spare: they must hold the defect even then.

    Wrapped shifts by half a pixel of periodic pictures, f the identity, T the exact shift (a phase in the Fourier domain), T~
    the bilinear one, rho = T~x - Tx. Declared: Γ = T - s (T~ - T). Then r = |rho|, the defect is |s| r, and total |1 + s| r:
    s = 1 puts the defect at total - r, s = -2 at total + r.
    """

    PARAMS = torch.tensor([[0.5, 0.0], [0.0, 0.5]], dtype=torch.float64)

    def shift(self, x, params):
        k = torch.fft.fftfreq(x.shape[-1], dtype=torch.float64)
        phase = torch.exp(-2j * math.pi * (params[:, 0, None, None] * k[:, None] + params[:, 1, None, None] * k))
        return torch.fft.ifft2(torch.fft.fft2(x) * phase[:, None]).real

    def declared(self, x, params, size):
        s = torch.where(params[:, :1] != 0, 1.0, -2.0)[:, None, None]
        exact = self.shift(x, params)
        return exact - s * (Translations()(x, params) - exact)

    def nature(self, n, seed):
        """Pictures whose contrast differs widely."""
        x = Fields(n, 1, 12, 0.3, periodic=True, seed=seed).images(torch.arange(n), dtype=torch.float64)
        g = torch.Generator().manual_seed(seed)
        return 0.5 + (x - 0.5) * torch.empty(n, 1, 1, 1, dtype=torch.float64).exponential_(generator=g).sqrt()

    def test_total_plus_and_minus_r_hold_a_defect_that_lies_at_their_very_end(self):
        trials, misses, many = 60, [0, 0], self.nature(2048, 10**6)
        truth = []
        for element in self.PARAMS:
            rows = element.expand(len(many), 2)
            missed = self.shift(many, rows) - self.declared(many, rows, (12, 12))
            truth.append(float(missed.norm() / self.declared(many - many.mean(0), rows, (12, 12)).norm()))
        for trial in range(trials):
            found = equivariance_error(
                nn.Identity(), self.nature(32, trial), Translations(), self.PARAMS, self.declared, resamples=400,
                reference=Fields(48, 1, 12, 0.3, periodic=True, seed=10**5 + trial),
            )
            misses[0] += float(found.bounds.low[0]) > truth[0]
            misses[1] += float(found.bounds.high[1]) < truth[1]
            assert float(found.total[0]) > 1.5 * truth[0]
            assert float(found.total[1]) < 0.75 * truth[1]
        # 2.5 % are allowed at each end: six or more of 60 have a chance of .004
        assert max(misses) <= 5


class TestRendered:
    def test_where_only_the_image_would_be_resampled_total_is_the_defect(self):
        """The mean over a disc does not turn; a vector needs no reading between feature pixels."""
        class Ring(nn.Module):
            def forward(self, x):
                y = torch.arange(48, dtype=x.dtype) - 23.5
                weight = torch.exp(-(y[:, None] ** 2 + y**2) / 40)
                return (x * weight).sum((2, 3))

        found = equivariance_error(Ring().double(), fields(), Rotate(), ANGLE, "trivial")
        assert float(found.total) < 2e-3  # what sampling does to the weighted mean of a band-limited picture
        assert float(found.resampling) == 0
        assert torch.equal(found.bounds.high, found.interval.high)
        plain = equivariance_error(Ring().double(), noise(), Rotate(), ANGLE, "trivial")
        assert float(plain.total) > 3 * float(found.total)

    def test_a_wrapped_shift_of_periodic_fields_is_a_shift_of_pixels(self):
        periodic = fields(n=8, size=16, periodic=True)
        circular = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular").double().requires_grad_(False)
        found = equivariance_error(circular, periodic, Translations(), torch.tensor([[3.0, -5.0]]).double(), "spatial")
        assert float(found.total) < 1e-12
        half = equivariance_error(circular, periodic, Translations(), torch.tensor([[0.5, 0.0]]).double(), "spatial")
        assert float(half.bounds.low) == 0 < float(half.total)
        assert float(half.bounds.high) < 3 * float(half.total)

    def test_slices_and_elements_come_in_order(self):
        pictures = Phantoms(7, 1, 32, seed=1)
        params = torch.tensor([[20.0], [-50.0]], dtype=torch.float64)
        inputs = rendered(pictures, Rotate(), torch.float64, "cpu", torch.tensor([6, 2, 4]))
        moved = inputs.moved(slice(1, 3), params)
        for at, (picture, angle) in enumerate([(2, 20.0), (4, 20.0), (2, -50.0), (4, -50.0)]):
            one = pictures.images(torch.tensor([picture]), Rotate(), torch.tensor([[angle]]).double(), dtype=torch.float64)
            assert torch.allclose(moved[at], one[0], atol=1e-12)

    def test_the_gate_judges_turns_by_any_angle_on_them(self):
        """Smooth pictures, pointwise network: turned by 15 degrees it must pass .1; the derivative must fail it."""
        rules = Rules.model_validate({"rule": [{"name": "r", "probe": "equivariance", "limit": 0.1}]})
        options = Options(transform="rotate(15)", images="fields", bandwidth=0.1, boundary="crop", n=32)
        data = Resident("noise", "test", (noise(4) * 255).to(torch.uint8), None)
        verdicts = [
            evaluate([probe(Subject(wrap(net, in_channels=1), data, dtype=torch.float64), options)], rules)[0].verdict
            for net in (IDENTITY, DX)
        ]
        assert verdicts == ["pass", "fail"]

    def test_a_rendered_data_set_is_rendered_anew(self):
        drawn = Drawn(fields(n=12, size=24), "test")
        found = probe(Subject(wrap(DX, in_channels=1), drawn, dtype=torch.float64), Options(transform="rotate(15)"))
        assert found.provenance["images"] == "fields"
        assert any("T_g is evaluated" in note for note in found.notes)

    def test_a_sweep_shows_what_remains_when_resampling_no_longer_matters(self):
        data = Resident("noise", "test", torch.randint(0, 255, (8, 1, 32, 32)).to(torch.uint8), None)
        options = Options(transform="rotate(15)", images="fields", boundary="crop", n=8, sweep=True)
        found = probe(Subject(wrap(DX, in_channels=1), data, dtype=torch.float64), options)
        table = found.table("sweep").columns
        assert table["bandwidth"] == [0.0625, 0.125, 0.1875, 0.25, 0.375, 0.49]
        assert table["resampling"] == sorted(table["resampling"])
        for low, high in zip(table["bound_low"], table["bound_high"], strict=True):
            assert low < TestADerivativeAt15Degrees.DEFECT < high
        assert [f.name for f in found.figures] == ["errors", "sweep"]


class TestBoundary:
    def kept(self, act, params, geometry=HERE, size=(8, 8), **kwargs):
        return clean(act, geometry, torch.tensor(params, dtype=torch.float64), size, (8, 8), **kwargs)

    def test_a_wrapped_shift_keeps_what_is_off_the_border_before_and_after(self):
        found = self.kept(action("spatial", Translations(), HERE), [[2.0, 0.0], [0.0, -1.0]])
        rows, columns = found.any(dim=2), found.any(dim=1)
        assert rows[0].nonzero().flatten().tolist() == [3, 4, 5, 6]
        assert columns[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]
        assert columns[1].nonzero().flatten().tolist() == [1, 2, 3, 4, 5]

    def test_where_zeros_move_in_the_field_must_come_from_the_image(self):
        """Shifted by 3, feature row u of f(T x) sees rows u - 1 to u + 1, which came from u - 4 to u - 2."""
        found = self.kept(action("spatial", Translate(), HERE), [[3.0, 0.0]])
        assert found.any(dim=2)[0].nonzero().flatten().tolist() == [4, 5, 6]
        trivial = self.kept(action("trivial", Translate()), [[3.0, 0.0]])
        assert trivial.any(dim=2)[0].nonzero().flatten().tolist() == [4, 5, 6]
        free = self.kept(action("trivial", Translate()), [[3.0, 0.0]], framed=False)
        assert free.any(dim=2)[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6]

    def test_right_angles_keep_the_square_and_others_lose_its_corners(self):
        act = action("spatial", Rotate(), HERE)
        found = self.kept(act, [[90.0], [45.0]])
        assert int(found[0].sum()) == 36
        assert 0 < int(found[1].sum()) < 36
        assert not found[1, 1, 1]
        assert torch.equal(found[1], found[1].flip(0))

    def test_colour_keeps_all_that_sees_no_padding(self):
        assert int(self.kept(action("spatial", Brightness(), HERE), [[0.5]]).sum()) == 36

    def test_only_judged_pixels_enter_the_figures(self):
        x = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        params = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
        found = equivariance_error(DX, x, Translations(), params, "spatial", boundary="crop")
        assert float(found.kept) == 24 / 64
        assert float(found.total) < 1e-14

        class Marked(nn.Module):
            def forward(self, x):
                return DX(x) * torch.linspace(0, 1, 8, dtype=x.dtype).view(8, 1)

        one = equivariance_error(Marked(), x, Translations(), params, "spatial", boundary="crop", geometry=HERE)
        f, g = Marked()(x), Marked()(x.roll(2, 2))
        rows, columns = slice(3, 7), slice(1, 7)
        declared = f.roll(2, 2)[:, :, rows, columns]
        spread = (declared - declared.mean(0)).square().sum()
        expected = (g[:, :, rows, columns] - declared).square().sum() / spread
        assert float(one.total) == pytest.approx(math.sqrt(expected))
        assert float(one.action_size) == pytest.approx(math.sqrt((declared - f[:, :, rows, columns]).square().sum() / spread))

    def test_circular_wraps_shifts_and_refuses_what_a_torus_cannot_do(self):
        assert on_the_torus(named("translate(2px)")) == Translations(wrap=True)
        assert on_the_torus(CyclicRotations(4)) == CyclicRotations(4)
        circular = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular").double().requires_grad_(False)
        data = Resident("noise", "test", (noise(4) * 255).to(torch.uint8), None)
        found = probe(
            Subject(wrap(circular, in_channels=1), data, dtype=torch.float64),
            Options(transform="translate(0.2)", boundary="circular", draws=4),
        )
        assert found.metric("total").value < 1e-12
        for bad in (Rotate(), CyclicRotations(8)):
            with pytest.raises(GeomsslError, match="circular"):
                on_the_torus(bad)

    @pytest.mark.parametrize(
        ("net", "said"),
        [
            (nn.Sequential(nn.Conv2d(1, 2, 9, padding=4)), "sees 9 pixels of 8x8"),
            (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2)), "sees the whole image"),
            (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Upsample(scale_factor=1.5)), "do not tell the receptive field"),
        ],
    )
    def test_what_leaves_nothing_to_judge_is_one_line(self, net, said):
        x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        with pytest.raises(GeomsslError) as caught:
            equivariance_error(net, x, Translate(), torch.tensor([[1.0, 0.0]]), "spatial", boundary="crop")
        assert said in str(caught.value)
        with pytest.raises(GeomsslError, match="say where they read"):
            equivariance_error(DX, x.double(), Translate(), torch.ones(1, 2), lambda f, p, s: f, boundary="crop", geometry=HERE)


class TestUnits:
    def test_copies_that_are_resampled_together_add_no_certainty(self):
        x = torch.rand(12, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        turns = CyclicRotations(4).elements()[1:].double()
        once = equivariance_error(DX, x, CyclicRotations(4), turns, "spatial")
        copies, names = x.repeat(5, 1, 1, 1), torch.arange(12).repeat(5) * 7 + 3
        together = equivariance_error(DX, copies, CyclicRotations(4), turns, "spatial", clusters=names)
        apart = equivariance_error(DX, copies, CyclicRotations(4), turns, "spatial")
        assert torch.allclose(together.total, once.total)
        assert torch.allclose(together.interval.low, once.interval.low)
        assert torch.allclose(together.interval.high, once.interval.high)
        assert together.units == "12 clusters of images"
        wide, narrow = (float((f.interval.high - f.interval.low)[0]) for f in (together, apart))
        assert wide > 1.7 * narrow

    def test_a_million_images_take_no_more_room_than_thousands(self):
        for figures, memory in ((16, 2**31), (16 * 60, 2**31), (16 * 60, 2**20)):
            found = units(10**6, figures, memory)
            assert 1024 <= found.count <= 8192
            assert found.count * figures * 16 <= max(memory, 1024 * figures * 16)
            sizes = torch.bincount(found.of, minlength=found.count)
            assert int(sizes.max() - sizes.min()) <= 1
        assert units(8192).word == "images"
        assert units(10**6, 16, clusters=torch.arange(10**6) // 10).word == "8192 blocks of clusters"

    def test_blocks_keep_the_figures_and_the_width_of_the_intervals(self, monkeypatch):
        x = torch.rand(600, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        turns = CyclicRotations(4).elements()[1:2].double()
        single = equivariance_error(DX, x, CyclicRotations(4), turns, "spatial")
        monkeypatch.setattr(units_module, "FEWEST", 100)
        monkeypatch.setattr(units_module, "MOST", 100)
        blocks = equivariance_error(DX, x, CyclicRotations(4), turns, "spatial")
        assert blocks.numerators.shape == (100, 1)
        assert torch.allclose(blocks.total, single.total)
        wide, narrow = (float(f.interval.high - f.interval.low) for f in (single, blocks))
        assert 0.7 < wide / narrow < 1.4

    def test_clusters_are_named_by_a_factor_or_the_label(self):
        pixels, sessions = (noise(8) * 255).to(torch.uint8), {"session": torch.arange(8) // 2}
        data = Resident("noise", "test", pixels, torch.arange(8) % 3, factors=sessions)
        made = Subject(wrap(DX, in_channels=1), data, dtype=torch.float64)
        for name, count in (("label", 3), ("session", 4)):
            notes = probe(made, Options(cluster=name)).notes
            assert any(f"Intervals resample {count} clusters of images, 8 images in all" in note for note in notes)
        with pytest.raises(GeomsslError, match="session, label"):
            probe(made, Options(cluster="colour"))
        with pytest.raises(GeomsslError, match="images data"):
            probe(made, Options(cluster="label", images="fields"))
        with pytest.raises(GeomsslError, match="one cluster"):
            equivariance_error(DX, noise(3), CyclicRotations(4), torch.ones(1, 1), "spatial", clusters=torch.zeros(3))


class TestDeclarationsOfOnesOwn:
    def test_a_function_named_on_the_command_line(self, tmp_path, monkeypatch):
        (tmp_path / "declared_there.py").write_text(
            "def mirrored(features, params, image_size):\n    return features.flip(-1)\n\nmirrored.permutes = True\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        even = filter3([0, 1, 0], [1, 0, 1], [0, 2, 0])
        data = Resident("noise", "test", (noise(6) * 255).to(torch.uint8), None)
        found = probe(
            Subject(wrap(even, in_channels=1), data, dtype=torch.float64),
            Options(transform="flips", action="declared_there:mirrored"),
        )
        assert found.provenance["action"] == "mirrored"
        assert found.table("elements").columns["exact"] == [True]
        assert found.metric("total").value < 1e-14

    def test_elements_that_a_text_lists_are_those_that_are_measured(self):
        data = Resident("noise", "test", (noise(4) * 255).to(torch.uint8), None)
        made = Subject(wrap(DX, in_channels=1), data, dtype=torch.float64)
        found = probe(made, Options(transform="rotate(0, 15, 90)", references=4))
        assert found.table("parameters").columns["angle (degrees)"] == [15.0, 90.0]
        assert found.table("elements").columns["exact"] == [False, True]

    def test_an_assertion_takes_rendered_pictures_where_something_resamples(self):
        smooth = fields(n=16, bandwidth=0.1)
        assert_equivariant(IDENTITY, Rotate(), 0.1, smooth, "spatial", ANGLE, boundary="crop")
        with pytest.raises(AssertionError, match="not equivariant under rotate"):
            assert_equivariant(DX, Rotate(), 0.1, smooth, "spatial", ANGLE, boundary="crop")
