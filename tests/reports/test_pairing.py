"""Paired increases: sums that survive the disk, bounds against loops and by simulation, and what pairing saves in images."""

import dataclasses
import io
import math

import numpy as np
import pytest
import torch
from report_samples import equivariance, row
from torch import nn

from geomssl import artifact
from geomssl.artifact import Artifact
from geomssl.data.base import Resident
from geomssl.encoders import wrap
from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_ratio
from geomssl.probes.equivariance import Options, probe
from geomssl.probes.subject import Subject
from geomssl.reports import pairing
from geomssl.reports.gate import Rule, Rules, evaluate
from geomssl.seeding import generator
from geomssl.sums import BLOCKS, BYTES, FILE, Sums, blocks, key, pack, unpack


def draw(seed):
    return torch.Generator().manual_seed(seed)


def sums(numerators, denominators=None, name="k"):
    return Sums(numerators, torch.ones_like(numerators) if denominators is None else denominators, name)


def population(n, columns, increase, seed=0, noise=0.05):
    """Squared errors of the same images now and then: what is hard is hard in both; totals .5 + increase and .5, exactly in
    the population, of which each column is a sample of n."""
    g = draw(seed)
    hard = torch.empty(n, columns, dtype=torch.float64).exponential_(generator=g)

    def of(total):
        own = 1 + noise * (2 * torch.rand(n, columns, generator=g, dtype=torch.float64) - 1)
        return total**2 * hard * own

    return of(0.5 + increase), of(0.5)


def together(now, then, level=0.95, resamples=1000):
    return pairing.Together(sums(now), sums(then), level, resamples, 0)


def spans(now, then, kind="increase", limit=math.inf, slack=None, **how):
    columns = list(range(now.shape[1]))
    return pairing.spans(together(now, then, **how), columns, columns, kind, slack or [0.0] * len(columns), limit)


class TestTheFile:
    def test_sums_come_back_to_a_ten_millionth(self):
        g = draw(0)
        given = sums(1e-14 * torch.rand(300, 5, generator=g).double(), torch.rand(300, 5, generator=g).double(), "ab")
        found = unpack(pack(given))
        assert torch.allclose(found.numerators, given.numerators, rtol=1e-7, atol=0)
        assert torch.allclose(found.denominators, given.denominators, rtol=1e-7, atol=0)
        assert (found.key, found.word, found.numerators.dtype) == ("ab", "images", torch.float64)

    def test_many_rows_become_blocks_that_keep_the_total_and_the_width_of_its_interval(self):
        above = torch.empty(8192, 2, dtype=torch.float64).exponential_(generator=draw(1))
        found = unpack(pack(sums(above)))
        assert (len(found.numerators), found.word) == (BLOCKS, "blocks of images")
        # Another artifact of the same images deals them to the same blocks.
        assert torch.allclose(unpack(pack(sums(3 * above))).numerators, 3 * found.numerators, rtol=1e-6)
        assert torch.allclose(found.numerators.sum(0) / found.denominators.sum(0), above.mean(0), rtol=1e-6)
        wide, narrow = (
            high - low
            for low, high in (
                bootstrap_ratio(above, torch.ones_like(above), 0), bootstrap_ratio(found.numerators, found.denominators, 0)
            )
        )
        assert torch.allclose(wide, narrow, rtol=0.15)

    @pytest.mark.parametrize("figures", [1, 16, 640, 1000, 1100])
    @pytest.mark.parametrize("count", [100, 8192])
    def test_it_stays_under_its_cap_whatever_was_measured(self, figures, count):
        kept = blocks(count, figures)
        assert kept * figures * 8 <= BYTES
        assert kept <= min(count, BLOCKS)
        data = pack(sums(torch.ones(count, figures, dtype=torch.float64)))
        assert (data is None) == (kept == 0) == (figures > 1024 and count > 119)
        assert data is None or len(data) < BYTES + 2000

    def test_the_key_tells_other_images_and_other_blocks(self):
        rows = torch.arange(10)
        assert key(rows, 10) == key(rows.int(), 10)
        assert len({key(rows, 10), key(rows, 9), key(rows + 1, 10), key(rows.flip(0), 10)}) == 4

    def test_a_damaged_file_is_one_line(self):
        whole = pack(sums(torch.ones(20, 2, dtype=torch.float64)))
        other = io.BytesIO()
        np.savez(other, numerators=np.ones(3))
        for data in (b"", b"nothing", whole[:-30], whole[:200], other.getvalue()):
            with pytest.raises(GeomsslError, match="damaged; expected|damaged:"):
                unpack(data)


class TestBounds:
    @pytest.mark.parametrize("kind", ["increase", "ratio"])
    def test_statistic_spread_and_studentised_draws_are_those_of_loops(self, kind):
        now, then = population(40, 2, 0.1, seed=3, noise=0.5)
        below = 0.5 + torch.rand(40, 2, generator=draw(4), dtype=torch.float64)
        base = 0.5 + torch.rand(40, 2, generator=draw(5), dtype=torch.float64)
        point, spread, drawn, studentised = pairing._drawn(now, below, then, base, kind, 6, 7)

        def by_hand(rows):
            a, b, c, d = (x.numpy()[rows] for x in (now, below, then, base))
            r, s = a.sum(0) / b.sum(0), c.sum(0) / d.sum(0)
            if kind == "increase":
                value = np.sqrt(r) - np.sqrt(s)
                each = (a - r * b) / (2 * np.sqrt(r) * b.sum(0)) - (c - s * d) / (2 * np.sqrt(s) * d.sum(0))
            else:
                value = np.log(np.sqrt(r / s))
                each = (a - r * b) / (2 * r * b.sum(0)) - (c - s * d) / (2 * s * d.sum(0))
            return value, np.sqrt((each**2).sum(0))

        value, error = by_hand(np.arange(40))
        assert point.numpy() == pytest.approx(value, rel=1e-9)
        assert spread.numpy() == pytest.approx(error, rel=1e-9)
        for b, rows in enumerate(torch.randint(40, (256, 40), generator=generator(7, "bootstrap", 0))[:6].numpy()):
            one, its = by_hand(rows)
            assert drawn[b].numpy() == pytest.approx(one, rel=1e-9)
            assert studentised[b].numpy() == pytest.approx((one - value) / its, rel=1e-6)

    def test_the_spread_is_that_of_leaving_one_out(self):
        now, then = population(80, 1, 0.1, seed=1)
        point, spread, *_ = pairing._drawn(now, torch.ones_like(now), then, torch.ones_like(then), "increase", 2, 0)
        left = [
            float((now.sum() - now[i]) / 79) ** 0.5 - float((then.sum() - then[i]) / 79) ** 0.5 for i in range(80)
        ]
        jackknife = math.sqrt(79 / 80 * sum((x - np.mean(left)) ** 2 for x in left))
        assert float(point) == pytest.approx(float(now.mean()) ** 0.5 - float(then.mean()) ** 0.5)
        assert float(spread) == pytest.approx(jackknife, rel=0.05)

    @pytest.mark.parametrize("kind", ["increase", "ratio"])
    @pytest.mark.parametrize("increase", [0.0, 0.1])
    def test_they_hold_the_true_increase_as_often_as_they_say(self, kind, increase):
        trials = 240
        truth = increase if kind == "increase" else 1 + increase / 0.5
        found = spans(*population(64, trials, increase, seed=11, noise=0.4), kind)
        most = 0.025 + 3 * math.sqrt(0.025 * 0.975 / trials)
        assert sum(low > truth for low, _, _ in found) / trials <= most
        assert sum(high < truth for _, high, _ in found) / trials <= most

    def test_the_bound_of_all_at_once_is_seldom_above_any_of_them(self):
        trials, many = 60, 8
        now, then = population(64, trials * many, 0.1, seed=2, noise=0.4)
        one = torch.ones_like(now)
        surely = pairing._lowest(now, one, then, one, "increase", together(now, then), many).view(trials, many)
        alone = pairing._bounds(now, one, then, one, "increase", 0.95, 400, 0)[0].view(trials, many)
        misses, apart = (int((values > 0.1).any(dim=1).sum()) for values in (surely, alone))
        assert misses / trials <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / trials)
        assert apart > misses

    def test_the_same_sums_differ_by_nothing(self):
        now, _ = population(50, 3, 0.0)
        assert spans(now, now) == [(0.0, 0.0, -math.inf)] * 3
        assert spans(now, now, "ratio") == [(1.0, 1.0, -math.inf)] * 3

    def test_an_error_of_nought_has_an_increase_and_no_ratio(self):
        now, then = population(50, 1, 0.0)
        (low, high, _), = spans(now, torch.zeros_like(then))
        assert low < float(now.mean()) ** 0.5 < high
        assert spans(now, torch.zeros_like(then), "ratio") is None
        (low, high, _), = spans(torch.zeros_like(now), then)
        assert low < -float(then.mean()) ** 0.5 < high

    def test_slack_takes_half_of_the_tail(self):
        now, then = population(60, 2, 0.1)
        plain, halved = spans(now, then, slack=[0.0, 0.0]), spans(now, then, slack=[0.0, 0.3])
        assert halved[0] == plain[0]
        assert halved[1][0] < plain[1][0] < plain[1][1] < halved[1][1]
        wanted = spans(now, then, level=0.975)[1]
        assert halved[1][:2] == pytest.approx(wanted[:2])


def measured(run, numerators, keyed="k", kept=True, resampling=0.0, **options):
    """An artifact whose table and file are those of these squared errors (n, E), over unit spreads."""
    ones, n = torch.ones_like(numerators), len(numerators)
    low, high = bootstrap_ratio(numerators, ones, 0)
    rows = [
        row(
            element=f"{90 * (e + 1)}°", total=math.sqrt(numerators[:, e].mean()), low=float(low[e]), high=float(high[e]),
            low_any=float(low[e]) * 0.99, resampling=resampling, bound_low=float(low[e]) - resampling,
            bound_high=float(high[e]) + resampling, bound_low_any=float(low[e]) * 0.99 - resampling, exact=resampling == 0,
        )
        for e in range(numerators.shape[1])
    ]
    found = equivariance(run, rows, n=n, **{"level": 0.95, "resamples": 1000, "seed": 0, **options})
    facts = {"images_sha256": "ab12", "split": "test", "action": "regular"}
    return dataclasses.replace(
        found, provenance=found.provenance | facts, files={FILE: pack(sums(numerators, name=keyed))} if kept else {}
    )


def gate(now, then, **rule):
    rules = Rules(rule=(Rule(**({"name": "r", "probe": "equivariance"} | rule)),))
    return evaluate([now], rules, [then])[0]


class TestTheGate:
    @pytest.mark.parametrize(("increase", "verdict"), [(0.0, "pass"), (0.08, "fail")])
    def test_it_decides_with_fewer_images_than_two_intervals_need(self, increase, verdict):
        """Limit .02, 64 images: paired each trial decides; from two intervals none does, and for a pass 16 times the images do
        not suffice either."""
        for trial in range(2):
            now, then = population(64, 3, increase, seed=trial)
            assert gate(measured("new", now), measured("old", then), max_increase=0.02).verdict == verdict
            alone = gate(measured("new", now), measured("old", then, kept=False), max_increase=0.02)
            assert alone.verdict == "inconclusive"
        now, then = population(1024, 3, increase, seed=99)
        alone = gate(measured("new", now, kept=False), measured("old", then), max_increase=0.02)
        assert alone.verdict == ("inconclusive" if increase == 0.0 else "fail")

    def test_it_says_how(self):
        now, then = population(64, 1, 0.0)
        said = gate(measured("new", now), measured("old", then), max_increase=0.05)
        assert "Bounds: paired, 64 images the same in both." in " ".join(said.why)
        assert said.interval.method == "paired, 64 images the same in both"
        assert gate(measured("new", now), measured("old", then), max_ratio=1.05).interval.method.startswith("paired, 64 images")
        for other, why in (
            (measured("old", then, kept=False), "not paired, since the baseline keeps no sums of single images"),
            (measured("old", then, keyed="else"), "not paired, since their sums are of other images"),
        ):
            assert why in " ".join(gate(measured("new", now), other, max_increase=0.05).why)
        bare = gate(measured("new", now, kept=False), measured("old", then), max_increase=0.05)
        assert "since this artifact keeps no sums" in " ".join(bare.why)

    def test_what_resampling_may_do_in_either_is_added(self):
        now, then = population(64, 1, 0.0)
        for r, verdict in ((0.005, "pass"), (0.02, "inconclusive")):
            found = gate(
                measured("new", now, resampling=r), measured("old", then, resampling=r), max_increase=0.03
            )
            assert found.verdict == verdict
            assert "widened by what resampling may do in either" in found.interval.method
        ratio = gate(measured("new", now, resampling=0.005), measured("old", then, resampling=0.005), max_ratio=1.05)
        assert "not paired" in ratio.interval.method

    def test_columns_follow_the_names_of_the_elements_not_their_places(self):
        now, then = population(64, 2, 0.0, seed=5)
        now, then = now * torch.tensor([1.0, 0.04]), then * torch.tensor([1.0, 0.04])
        turned = measured("old", then.flip(1))
        table = turned.table("elements")
        table.columns["element"].reverse()
        assert gate(measured("new", now), turned, max_increase=0.02).verdict == "pass"


class Sloppy(nn.Module):
    """Fixed random filters, of which a share follows no group."""

    def __init__(self, share):
        super().__init__()
        weight = torch.ones(3, 1, 3, 3, dtype=torch.float64)
        stray = torch.randn(3, 1, 3, 3, generator=draw(0), dtype=torch.float64)
        self.weight = nn.Parameter(weight + share * stray)

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight, padding=1)


def test_two_measured_models_are_paired_through_the_disk(tmp_path):
    pixels = torch.randint(0, 256, (96, 1, 8, 8), generator=draw(1)).to(torch.uint8) // torch.arange(1, 97).view(-1, 1, 1, 1)
    data = Resident("noise", "test", pixels.to(torch.uint8), None)

    def of(share, name, **options) -> Artifact:
        made = Subject(
            wrap(Sloppy(share), in_channels=1), data, dtype=torch.float64, provenance={"run": name, "images_sha256": "x"}
        )
        return artifact.load(probe(made, Options(n=64, **options)).save(tmp_path / name))

    before, after = of(0.5, "old"), of(0.51, "new")
    found = pairing.pair(after, before)
    direct = torch.tensor(after.table("elements").columns["total"]).double()
    assert torch.allclose((found.now.numerators.sum(0) / found.now.denominators.sum(0)).sqrt(), direct, rtol=1e-6)
    paired = gate(after, before, max_increase=0.03)
    assert (paired.verdict, paired.interval.method) == ("pass", "paired, 64 images the same in both")
    apart = gate(dataclasses.replace(after, files={}), before, max_increase=0.03)
    assert apart.verdict == "inconclusive"
    assert "other images" in str(pairing.pair(of(0.5, "seed", seed=1), before))
