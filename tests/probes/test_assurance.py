"""The bootstrap: coverage by simulation, exact cases, and a loop that resamples image by image."""

import math

import pytest
import torch

from geomssl.errors import GeomsslError
from geomssl.probes.assurance import bootstrap_mean, bootstrap_ratio, resampled_sums


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
    monkeypatch.setattr("geomssl.probes.assurance.ROWS", 7)
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
