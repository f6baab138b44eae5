"""Planned looks and the power test: errors by simulation, the injected defect against a direct measurement."""

import itertools
import math

import pytest
import torch

from geomssl.data import load
from geomssl.data.base import Resident
from geomssl.encoders import build
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.probes import equivariance, power
from geomssl.probes.equivariance import equivariance_error
from geomssl.probes.looks import LEAST, Look, marked, plan, spent
from geomssl.probes.subject import Subject
from geomssl.reports.gate import Rule, Rules, evaluate
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations

LEVEL = 0.95
SIDE = (1 - LEVEL) / 2


class TestLooks:
    @pytest.mark.parametrize("budget", [2, 31, 64, 100, 129, 4096])
    @pytest.mark.parametrize("level", [0.8, 0.95, 0.999])
    def test_the_error_of_all_looks_is_the_one_asked_for(self, budget, level):
        looks = plan(budget, level)
        assert sum(1 - look.level for look in looks) == pytest.approx(1 - level)
        assert looks[-1].images == budget
        assert [look.number for look in looks] == list(range(1, looks[0].of + 1))
        assert all(a.images < b.images for a, b in itertools.pairwise(looks))
        assert all(look.images >= LEAST for look in looks[:-1])

    def test_a_quarter_a_half_and_all_of_it(self):
        looks = plan(400)
        assert [look.images for look in looks] == [100, 200, 400]
        # alpha t^2 = .05 / 16, then .05 / 4 - .05 / 16, then .05 - .05 / 4
        assert [1 - look.level for look in looks] == pytest.approx([0.003125, 0.009375, 0.0375])
        assert spent(0.5, 0.05) == pytest.approx(0.0125)

    def test_every_bound_has_resamples_beyond_it(self):
        for look in plan(4000, 0.99):
            draws = look.resamples(100)
            assert draws * (1 - look.level) / 2 >= 20 - 1e-9
        assert max(look.resamples(100) for look in plan(4000, 0.999)) == 100_000
        assert plan(2)[0].resamples(5000) == 5000

    @pytest.mark.parametrize(
        ("call", "said"),
        [
            (lambda: plan(1), "a budget of 1 images; expected at least 2"),
            (lambda: plan(100, 95), "level 95"),
            (lambda: plan(100, fractions=(0.5, 0.5, 1)), "rising shares"),
            (lambda: plan(100, fractions=(0.25, 0.5)), "rising shares"),
        ],
    )
    def test_bad_plans_are_one_line(self, call, said):
        with pytest.raises(GeomsslError, match=said):
            call()


def population(n=2000, skewed=True):
    """Per-image sums (n, 1) whose total is exactly 1, errors skewed from image to image."""
    g = torch.Generator().manual_seed(3)
    below = 1 + torch.rand(n, 1, generator=g, dtype=torch.float64)
    above = below * (torch.empty(n, 1, dtype=torch.float64).exponential_(generator=g) if skewed else 1)
    return above / above.sum() * below.sum(), below


def rates(limit, looks, trials):
    found = power.outcomes(*population(), limit, looks, trials=trials, resamples=1000)
    return {kind: found.count(kind) / trials for kind in ("passes", "fails", "inconclusive")}


class TestErrorsBySimulation:
    """The true total is 1 in every trial; the limit is laid below it, on it and above it."""

    def test_a_defect_at_the_limit_neither_passes_nor_fails_more_often_than_promised_over_all_looks(self):
        trials = 600
        found = rates(1.0, plan(256), trials)
        slack = 3 * math.sqrt(SIDE * (1 - SIDE) / trials)
        assert found["passes"] <= SIDE + slack
        assert found["fails"] <= SIDE + slack

    def test_looks_that_nobody_planned_would_break_the_promise(self):
        """What the plan is for: the same looks, each at the level of one, err far more often."""
        trials = 600
        careless = [Look(k, 3, n, 256, LEVEL) for k, n in enumerate((64, 128, 256), 1)]
        found = rates(1.0, careless, trials)
        assert found["passes"] + found["fails"] > 2 * SIDE + 3 * math.sqrt(2 * SIDE / trials)

    def test_twice_the_limit_fails_and_half_of_it_passes(self):
        assert rates(0.5, plan(256), 200)["fails"] > 0.99
        assert rates(2.0, plan(256), 200)["passes"] > 0.99

    def test_what_resampling_adds_widens_the_bounds_on_both_sides(self):
        above, below = population()
        for limit in (0.1, 2.0):
            assert set(power.outcomes(above, below, limit, plan(256), trials=40, widen=0.7)) != {"inconclusive"}
            assert set(power.outcomes(above, below, limit, plan(256), trials=40, widen=1.2)) == {"inconclusive"}

    def test_what_resampling_adds_counts_against_a_pass_that_the_interval_alone_would_give(self):
        # Bounds near [.85, 1.2]: below 2 by themselves, and not with .97 added.
        assert power.outcomes(*population(), 2.0, plan(64), trials=40, widen=0.97).count("passes") < 15

    def test_one_bad_element_fails_and_all_must_pass(self):
        above, below = population()
        both = torch.cat([above / 16, above], dim=1), torch.cat([below, below], dim=1)
        assert power.outcomes(*both, 0.6, plan(256), trials=50).count("fails") == 50
        assert power.outcomes(both[0] / 16, both[1], 0.6, plan(256), trials=50).count("passes") == 50


IMAGES = load("digits", "test").images(torch.arange(120)).double() / 255
TURNS = CyclicRotations(4)
PARAMS = TURNS.elements()[1:]


@pytest.fixture(scope="module")
def network():
    with seeded(0, "test-power"):
        return build("c4-cnn", in_channels=1, widths=(4, 4, 4)).double().eval()


def measured(f, images=IMAGES):
    return equivariance_error(f, images, TURNS, PARAMS, "regular", resamples=200)


@pytest.fixture(scope="module")
def injected(network):
    wander = power.stray(lambda x: [network.fibres(x)], IMAGES)
    return wander, power.inject(lambda eps: [measured(lambda x: network.fibres(x) + eps * wander(x)[0])])


class TestInjection:
    @pytest.mark.parametrize("eps", [0.01, 0.3, -2.0])
    def test_the_sums_are_those_of_the_model_with_that_defect(self, network, injected, eps):
        wander, sums = injected
        direct = measured(lambda x: network.fibres(x) + eps * wander(x)[0])
        above, below = sums.sums(eps)
        assert torch.allclose(above, direct.numerators, rtol=1e-9)
        assert torch.allclose(below, direct.denominators, rtol=1e-9)

    @pytest.mark.parametrize("target", [1e-3, 0.1, 0.9])
    def test_it_is_calibrated_to_the_worst_element(self, injected, target):
        _, sums = injected
        eps = sums.calibrate(target)
        above, below = sums.sums(eps)
        totals = (above.sum(0) / below.sum(0)).sqrt()
        assert float(totals.max()) == pytest.approx(target, rel=1e-6)

    def test_the_stray_map_follows_no_group_and_stays_the_same(self, network, injected):
        wander, _ = injected
        alone = measured(lambda x: wander(x)[0])
        assert (alone.total > 0.7).all()
        assert torch.equal(wander(IMAGES[:3])[0], wander(IMAGES[:3])[0])
        spread = [float((f - f.mean(0)).square().sum()) for f in (wander(IMAGES)[0], network.fibres(IMAGES).detach())]
        assert 0.2 < spread[0] / spread[1] < 5

    def test_what_cannot_be_injected_has_no_rate(self, injected):
        _, sums = injected
        assert sums.calibrate(1e-20) is None
        own = power.blend(*(values[0] for values in (sums.denominators, sums.denominators)))
        rows = power.table(own, 0.5, plan(64), trials=20)
        assert rows.columns["rate"] == [None] * 3
        assert rows.columns["holds"] == [None] * 3

    def test_without_the_model_the_sums_alone_do(self, injected):
        _, sums = injected
        blended = power.blend(sums.numerators[0], sums.denominators[0])
        eps = blended.calibrate(0.2)
        assert blended.worst(eps) == pytest.approx(0.2, rel=1e-6)
        # The spread of other images over its own sum: total^2 = eps^2 / (1 + eps^2).
        assert eps == pytest.approx(math.sqrt(0.04 / 0.96), rel=1e-6)

    def test_the_table_says_what_the_gate_does(self, injected):
        rows = power.table(injected[1], 0.1, plan(120), trials=60).columns
        assert rows["injected"] == ["L/2", "L", "2L"]
        assert rows["defect"] == pytest.approx([0.05, 0.1, 0.2])
        assert rows["holds"] == [True, True, True]
        assert rows["rate"][0] > 0.9
        assert rows["rate"][1] < 0.1
        assert rows["rate"][2] > 0.9

    def test_too_few_images_are_called_powerless(self, injected):
        few = power.table(injected[1], 0.1, plan(4), trials=60).columns
        assert not all(few["holds"])


def subject(images=IMAGES, encoder=None):
    given = load("digits", "test")
    pixels = (images * 255).round().to(torch.uint8)
    return Subject(
        encoder or build("c4-cnn", in_channels=1, widths=(4, 4, 4)), Resident("digits", "test", pixels, None, given.classes),
        dtype=torch.float64, provenance={"run": "r", "images_sha256": "x"},
    )


def test_a_subject_is_tested_with_all_its_layers():
    options = equivariance.Options(n=64, layer=["fibres", "h"])
    rows = power.measure(subject(), options, 0.1, plan(64), LEVEL, trials=20)
    assert rows.name == "power"
    assert rows.columns["trials"] == [20, 20, 20]


class Constant(Encoder):
    def __init__(self):
        super().__init__()
        self.in_channels, self.dim = 1, 3

    def fibres(self, images):
        return torch.ones(len(images), 3, 1, 2, 2, dtype=images.dtype)


def test_a_constant_network_is_refused():
    with pytest.raises(GeomsslError) as caught:
        power.measure(subject(encoder=Constant()), equivariance.Options(n=64), 0.1, plan(64), LEVEL, trials=20)
    assert caught.value.reason == "degenerate"


class Perturbed(Encoder):
    """A C4 network with a defect: fibres + eps * stray."""

    def __init__(self, network, wander, eps):
        super().__init__()
        self.network, self.wander, self.eps = network, wander, eps
        self.in_channels, self.dim, self.group = 1, network.dim, network.group

    def fibres(self, images):
        return self.network.fibres(images) + self.eps * self.wander(images)[0]


@pytest.mark.slow
def test_rates_of_the_gate_itself_on_real_models_with_a_calibrated_defect(network, injected):
    """The whole way: a C4 encoder with a defect, images drawn from a pool, the probe at planned looks, the verdict."""
    from geomssl.commands.judging import sequential

    wander, sums = injected
    limit, trials, budget = 0.1, 40, 128
    rule = Rule(name="turns", probe="equivariance", limit=limit, options={"transform": "c4"})
    found = {}
    for factor in (0.5, 1.0, 2.0):
        encoder = Perturbed(network, wander, sums.calibrate(factor * limit))
        said = []
        for trial in range(trials):
            rows = torch.randint(len(IMAGES), (budget,), generator=generator(trial, "slow-power"))
            of = subject(IMAGES[rows], encoder)
            _, (verdict,) = sequential(rule, lambda o, of=of: equivariance.probe(of, equivariance.Options(**o)), budget)
            said.append(verdict.verdict)
        found[factor] = said
    assert found[0.5].count("pass") >= 0.9 * trials
    assert found[2.0].count("fail") >= 0.9 * trials
    # At most 2.5 % are promised; three or more of 40 have probability .08 at that rate, five or more .003.
    assert found[1.0].count("pass") < 5
    assert found[1.0].count("fail") < 5


class TestSequential:
    def looks(self, network, limit, budget=120, eps=0.0, **options):
        """The options of each look, and the verdict."""
        from geomssl.commands.judging import sequential

        seen = []
        of = subject(encoder=Perturbed(network, lambda x: [network.fibres(x.flip(3))], eps))

        def measure(given):
            seen.append(given)
            return equivariance.probe(of, equivariance.Options(**given))

        rule = Rule(name="turns", probe="equivariance", limit=limit, options={"transform": "c4", **options})
        artifact, (verdict,) = sequential(rule, measure, budget)
        return seen, artifact, verdict

    def test_a_clear_case_stops_at_the_first_look(self, network):
        for eps, limit, wanted in ((0.0, 1e-3, "pass"), (1.0, 0.01, "fail")):
            seen, artifact, verdict = self.looks(network, limit, eps=eps, budget=128)
            assert (len(seen), verdict.verdict, verdict.n) == (1, wanted, 32)
            assert verdict.look["images"] == artifact.options["n"] == 32
            assert "Look 1 of 3, at 32 of 128 images" in " ".join(verdict.why)

    def test_a_close_one_goes_on_to_the_last(self, network):
        of = subject(encoder=Perturbed(network, lambda x: [network.fibres(x.flip(3))], 1.0))
        total = equivariance.probe(of, equivariance.Options()).metric("total").value
        seen, _, verdict = self.looks(network, total, eps=1.0, budget=128)
        assert (verdict.verdict, len(seen)) == ("inconclusive", 3)
        assert [given["n"] for given in seen] == [32, 64, 128]
        assert verdict.look["number"] == 3

    def test_the_level_of_a_rule_is_that_of_all_looks(self, network):
        seen, artifact, _ = self.looks(network, 1e-3, budget=64, level=0.9)
        assert seen[0]["level"] == pytest.approx(1 - 0.1 / 4)
        assert artifact.provenance["look"]["asked"]["level"] == 0.9
        rules = Rules(rule=(Rule(name="t", probe="equivariance", limit=0.1, options={"transform": "c4", "level": 0.9}),))
        assert evaluate([artifact], rules)[0].verdict == "pass"
        assert evaluate([marked(artifact, plan(64)[0], level=0.95)], rules)[0].reason == "no-artifact"

    def test_what_more_images_cannot_change_is_not_looked_at_again(self, network):
        seen, _, verdict = self.looks(network, 0.01, transform="rotate(15)", references=0)
        assert (verdict.reason, len(seen)) == ("inexact-pair", 1)

    def test_a_rule_that_only_compares_looks_once_at_as_many_images_as_its_baseline(self, network):
        from geomssl.commands.judging import sequential

        of, seen = subject(encoder=network), []

        def measure(given):
            seen.append(given["n"])
            return equivariance.probe(of, equivariance.Options(**given))

        rule = Rule(name="turns", probe="equivariance", max_increase=0.1, options={"transform": "c4"})
        before = equivariance.probe(of, equivariance.Options(n=80))
        _, (verdict,) = sequential(rule, measure, 80, [before])
        assert (verdict.verdict, seen, verdict.look["of"]) == ("pass", [80], 1)
        assert verdict.interval.method == "paired, 80 images the same in both"

    def test_images_of_a_look_are_among_those_of_the_next(self):
        of = subject()
        few, more = (set(of.choose(equivariance.Options(n=n)).tolist()) for n in (32, 64))
        assert few < more
