"""The bootstrap: coverage by simulation, exact cases, and a loop that resamples image by image."""

import math

import pytest
import torch

from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_mean, bootstrap_ratio, interval, resampled_sums


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    trials, n = 400, 60
    g = torch.Generator().manual_seed(0)
    samples = torch.empty(trials, n).exponential_(generator=g).double()
    inside = 0
    for trial in range(trials):
        low, high = bootstrap_mean(samples[trial], seed=trial, level=0.9, resamples=400)
        inside += bool(low <= 1) and bool(high >= 1)
    # Percentile intervals of 60 skewed values fall short of .90 by a little; five standard errors are .075.
    assert abs(inside / trials - 0.9) < 0.05


def test_the_interval_of_a_ratio_covers_it_as_often_as_it_says():
    trials, n = 300, 80
    g = torch.Generator().manual_seed(1)
    size = 1 + torch.rand(trials, n, 1, generator=g, dtype=torch.float64)
    numerators = size * torch.rand(trials, n, 1, generator=g, dtype=torch.float64) * 0.5
    true = math.sqrt(0.25 / 1.0)
    low, high = zip(
        *(bootstrap_ratio(numerators[t], size[t], seed=t, level=0.95, resamples=600) for t in range(trials)), strict=True
    )
    inside = ((torch.cat(low) <= true) & (torch.cat(high) >= true)).double().mean()
    assert abs(float(inside) - 0.95) < 5 * math.sqrt(0.95 * 0.05 / trials)
    missed_below = float((torch.cat(high) < true).double().mean())
    missed_above = float((torch.cat(low) > true).double().mean())
    assert missed_below < 0.07
    assert missed_above < 0.07


def test_the_upper_end_of_a_ratio_of_skewed_errors_misses_as_often_as_it_says():
    trials, n, level = 400, 64, 0.95
    g = torch.Generator().manual_seed(7)
    below = 1 + torch.rand(n, trials, generator=g, dtype=torch.float64)
    above = below * torch.empty(n, trials, dtype=torch.float64).exponential_(generator=g)
    missed = float((bootstrap_ratio(above, below, 0, level)[1] < 1).double().mean())
    drawn = resampled_sums(torch.cat([above, below], dim=1), 0, 2000)
    percentile = float((interval(drawn[:, :trials] / drawn[:, trials:], level)[1] < 1).double().mean())
    # 0.025 are promised; a standard error of 400 trials is 0.008. The percentile interval alone misses about twice as often.
    assert missed <= 0.025 + 3 * 0.008
    assert percentile > missed


def test_the_ends_are_those_of_a_loop_over_resamples():
    n, resamples, level = 12, 300, 0.8
    g = torch.Generator().manual_seed(8)
    below = 1 + torch.rand(n, 1, generator=g, dtype=torch.float64)
    above = below * torch.empty(n, 1, dtype=torch.float64).exponential_(generator=g)
    counts = resampled_sums(torch.eye(n, dtype=torch.float64), 3, resamples)
    whole = float(above.sum() / below.sum())

    def error(rows):
        r = float(above[rows].sum() / below[rows].sum())
        return r, float(((above[rows] - r * below[rows]) ** 2).sum().sqrt() / below[rows].sum())

    seen = [error(torch.repeat_interleave(torch.arange(n), row.long())) for row in counts]
    tails = torch.tensor([0.1, 0.9], dtype=torch.float64)
    percentile = torch.tensor([r for r, _ in seen], dtype=torch.float64).quantile(tails)
    student = torch.tensor([(r - whole) / s for r, s in seen], dtype=torch.float64).quantile(tails)
    ends = whole - error(torch.arange(n))[1] * student.flip(0)
    low, high = bootstrap_ratio(above, below, 3, level, resamples)
    assert float(low) == pytest.approx(math.sqrt(min(percentile[0], ends[0])), rel=1e-9)
    assert float(high) == pytest.approx(math.sqrt(max(percentile[1], ends[1])), rel=1e-9)


def test_two_images_have_an_interval_and_many_columns_are_those_of_one():
    g = torch.Generator().manual_seed(9)
    above, below = torch.rand(2, 70, 20, generator=g, dtype=torch.float64)
    assert bootstrap_ratio(above[:2], below[:2], 0)[1].isfinite().all()
    whole = bootstrap_ratio(above.T, below.T, 0, resamples=200)
    last = bootstrap_ratio(above.T[:, 69:], below.T[:, 69:], 0, resamples=200)
    assert torch.allclose(whole[1][69:], last[1], rtol=1e-12)


def test_the_spread_of_the_resampled_sums_is_the_one_of_the_multinomial():
    n, resamples = 50, 20_000
    values = torch.stack([torch.arange(n).double(), torch.arange(n).double() ** 2], dim=1)
    sums = resampled_sums(values, seed=3, resamples=resamples)
    assert sums.shape == (resamples, 2)
    expected = values.sum(0)
    spread = (n * values.var(dim=0, unbiased=False)).sqrt()
    assert torch.allclose(sums.mean(0), expected, atol=0, rtol=5 * float((spread / expected).max()) / math.sqrt(resamples))
    assert torch.allclose(sums.std(0), spread, rtol=0.03)
    centred = (values - values.mean(0)).T @ (values - values.mean(0))
    assert torch.allclose(torch.cov(sums.T), centred, rtol=0.05)


def test_the_draws_do_not_depend_on_the_columns_beside_them_nor_on_later_resamples():
    values = torch.rand(30, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    whole = resampled_sums(values, seed=5, resamples=50)
    assert torch.allclose(whole[:, 1:2], resampled_sums(values[:, 1:2], seed=5, resamples=50), rtol=1e-12)
    assert torch.allclose(whole[:20], resampled_sums(values, seed=5, resamples=20), rtol=1e-12)
    assert not torch.allclose(whole, resampled_sums(values, seed=6, resamples=50))


def test_many_blocks_are_used_and_differ(monkeypatch):
    monkeypatch.setattr("geomssl.bootstrap.ROWS", 7)
    values = torch.rand(30, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sums = resampled_sums(values, seed=5, resamples=40)
    assert sums.shape == (40, 1)
    assert len(sums.unique()) > 35


def test_exact_zeros_and_constants():
    zero, one = torch.zeros(10, 1), torch.ones(10, 1)
    low, high = bootstrap_ratio(torch.cat([zero, one, zero], 1), torch.cat([one, 4 * one, zero], 1), seed=0)
    assert low[:2].tolist() == high[:2].tolist() == [0.0, 0.5]
    assert low[2].isnan()
    assert high[2].isnan()
    low, high = bootstrap_mean(torch.full((8,), 3.0), seed=0)
    assert float(low) == float(high) == 3.0
    assert low.shape == ()


def test_a_wider_level_is_a_wider_interval():
    values = torch.rand(40, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    narrow, wide = bootstrap_mean(values, 0, level=0.5), bootstrap_mean(values, 0, level=0.99)
    assert (wide[0] < narrow[0]).all()
    assert (wide[1] > narrow[1]).all()
    assert narrow[0].shape == (3,)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: bootstrap_mean(torch.ones(1), 0), "1 images"),
        (lambda: bootstrap_mean(torch.ones(4), 0, level=95), "level 95"),
        (lambda: bootstrap_mean(torch.ones(4), 0, resamples=0), "0 resamples"),
        (lambda: bootstrap_ratio(torch.ones(4, 2), torch.ones(4, 1), 0), "(4, 2) over (4, 1)"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError, match="expected") as caught:
        call()
    assert said in str(caught.value)
