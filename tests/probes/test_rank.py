"""Rank estimators against planted spectra, and the artifact of the rank probe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes.rank import Options, effective_rank, participation_ratio, probe, rank, singular_values, stable_rank
from geomssl.probes.subject import Subject


def planted(spectrum: list[float], n: int = 40, d: int = 17, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix (n, d) with those singular values and random singular vectors."""
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(n, len(spectrum), generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(d, len(spectrum), generator=draw, dtype=torch.float64)).Q
    return (left * torch.tensor(spectrum, dtype=torch.float64) @ right.T).to(dtype)


def test_singular_values_are_the_planted_ones_in_order() -> None:
    spectrum = [9.0, 4.0, 1.0, 1e-9]
    found = singular_values(planted(spectrum))
    assert found.dtype == torch.float64
    assert found.shape == (17,)
    torch.testing.assert_close(found[:4], torch.tensor(spectrum, dtype=torch.float64), rtol=1e-5, atol=0)


def test_singular_values_of_float32_do_not_go_through_a_gram_matrix() -> None:
    matrix = planted([1.0, 1e-5], dtype=torch.float32)
    assert abs(float(singular_values(matrix)[1]) / 1e-5 - 1) < 1e-2


@pytest.mark.parametrize(
    ("tau", "relative", "expected"), [(2.0, False, 2), (0.5, False, 3), (100.0, False, 0), (0.3, True, 2), (0.2, True, 3)]
)
def test_rank_counts_singular_values_at_or_above_the_threshold(tau: float, relative: bool, expected: int) -> None:
    assert rank(planted([8.0, 4.0, 1.7, 1e-13]), tau, relative) == expected


def test_rank_at_exactly_a_singular_value_counts_it() -> None:
    assert rank(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2.0) == 2
    assert rank(torch.diag(torch.tensor([4.0, 2.0, 1.0])), 0.5, relative=True) == 2


def test_relative_rank_ignores_scale_and_absolute_rank_does_not() -> None:
    matrix = planted([8.0, 4.0, 1.0])
    assert rank(1e-3 * matrix, 0.3, True) == rank(matrix, 0.3, True) == 2
    assert (rank(1e-3 * matrix, 0.3), rank(matrix, 0.3)) == (0, 3)


@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("of", ["singular", "variance"])
def test_a_flat_spectrum_of_k_has_effective_rank_k(k: int, of: str) -> None:
    assert effective_rank(planted([0.3] * k), of=of) == pytest.approx(k, rel=1e-9)  # type: ignore[arg-type]
    assert stable_rank(planted([0.3] * k)) == pytest.approx(k, rel=1e-9)
    assert participation_ratio(planted([0.3] * k)) == pytest.approx(k, rel=1e-9)


@pytest.mark.parametrize(("of", "power"), [("singular", 1), ("variance", 2)])
def test_a_geometric_spectrum_has_the_entropy_of_a_geometric_law(of: str, power: int) -> None:
    r, m = 0.7**power, 15
    p = np.array([r**k for k in range(m)]) * (1 - r) / (1 - r**m)
    # entropy of a truncated geometric law, summed by hand: -sum p log p
    expected = math.exp(-math.log((1 - r) / (1 - r**m)) - math.log(r) * float((p * np.arange(m)).sum()))
    matrix = planted([0.7**k for k in range(m)])
    assert effective_rank(matrix, of=of) == pytest.approx(expected, rel=1e-9)  # type: ignore[arg-type]
    # eps joins every p, also those of the two directions that hold nothing, and nothing is renormalised, as in RankMe
    inflated = math.exp(-sum((q + 1e-3) * math.log(q + 1e-3) for q in [*p, 0.0, 0.0]))
    assert effective_rank(matrix, eps=1e-3, of=of) == pytest.approx(inflated, rel=1e-9)  # type: ignore[arg-type]


def test_stable_rank_and_participation_ratio_in_closed_form() -> None:
    matrix = planted([3.0, 2.0, 1.0])
    assert stable_rank(matrix) == pytest.approx(14 / 9)
    assert participation_ratio(matrix) == pytest.approx(14**2 / 98)


def test_eps_inflates_a_wide_matrix_by_the_known_amount() -> None:
    flat = torch.zeros(2048, 2048, dtype=torch.float64)
    flat[range(32), range(32)] = 1.0
    p, eps = 1 / 32, 1e-5
    expected = math.exp(-32 * (p + eps) * math.log(p + eps) - 2016 * eps * math.log(eps))
    assert expected == pytest.approx(40.4, abs=0.05)
    # a diagonal matrix has its diagonal for singular values: 64 columns stand for 2048 by the same formula
    small = flat[:64, :64]
    expected = math.exp(-32 * (p + eps) * math.log(p + eps) - 32 * eps * math.log(eps))
    assert effective_rank(small, eps=eps) == pytest.approx(expected, rel=1e-12)
    assert effective_rank(small) == pytest.approx(32, rel=1e-12)


def test_a_common_mean_hides_the_rank_until_it_is_removed() -> None:
    matrix = planted([1.0] * 8) + 100.0
    assert effective_rank(matrix) < 1.2
    centred = effective_rank(matrix, centre=True)
    exact = planted([1.0] * 8)
    assert centred == pytest.approx(effective_rank(exact - exact.mean(dim=0)), rel=1e-6)
    assert centred > 7


def test_estimators_do_not_change_under_rotation_scale_or_transposition() -> None:
    matrix = planted([5.0, 3.0, 1.0, 0.2])
    turn = torch.linalg.qr(torch.randn(17, 17, generator=torch.Generator().manual_seed(3), dtype=torch.float64)).Q
    for estimate in (effective_rank, stable_rank, participation_ratio):
        assert estimate(1e-200 * matrix @ turn) == pytest.approx(estimate(matrix), rel=1e-9)
        assert estimate(matrix.T) == pytest.approx(estimate(matrix), rel=1e-9)


def test_a_zero_matrix_has_no_rank() -> None:
    zero = torch.zeros(4, 3)
    assert (rank(zero, 0.1), rank(zero, 0.1, True)) == (0, 0)
    assert effective_rank(zero) == stable_rank(zero) == participation_ratio(zero) == 0.0


@pytest.mark.parametrize(
    "bad", [torch.zeros(0, 3), torch.zeros(3), torch.tensor([[math.nan, 1.0]]), torch.tensor([[math.inf]])]
)
def test_what_is_no_finite_matrix_is_refused_in_one_line(bad: Tensor) -> None:
    for function in (singular_values, effective_rank, stable_rank, participation_ratio):
        with pytest.raises(GeomsslError) as error:
            function(bad)
        assert "\n" not in str(error.value)


def test_bad_thresholds_and_names_are_refused() -> None:
    for tau in (0.0, -1.0, math.nan):
        with pytest.raises(GeomsslError, match="threshold"):
            rank(torch.eye(2), tau)
    with pytest.raises(GeomsslError, match="variance"):
        effective_rank(torch.eye(2), of="varience")  # type: ignore[arg-type]
    with pytest.raises(GeomsslError, match="eps"):
        effective_rank(torch.eye(2), eps=-1.0)


class Planted(nn.Module):
    """An encoder that ignores its input and hands out planted features in order, pass after pass."""

    dim, in_channels, group = 17, 1, None

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", features)
        self.at = 0

    def forward(self, images: Tensor) -> Tensor:
        found = self.table[torch.arange(self.at, self.at + len(images)) % len(self.table)]
        self.at += len(images)
        return found


def test_probe_measures_centred_features_as_standard_deviations(make_subject: Callable[..., Subject]) -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(60, 17, generator=draw, dtype=torch.float64) + 5.0
    subject = make_subject(encoder=Planted(features), projector=None, dtype=torch.float64)
    found = probe(subject, Options())
    expected = torch.from_numpy(np.sqrt(np.linalg.eigvalsh(np.cov(features.numpy().T, bias=True))[::-1].copy()))
    spectrum = found.table("spectrum").columns["singular_value"]
    torch.testing.assert_close(torch.tensor(spectrum, dtype=torch.float64), expected, rtol=1e-9, atol=1e-12)
    assert any("no projector" in note for note in found.notes)


def test_probe_curve_agrees_with_rank_and_falls(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options(tau=0.01))
    curve = found.table("curve").columns
    assert set(curve["object"]) == {"features h", "features z", "projector layer 0", "projector layer 1"}
    weight = subject.projector[0].weight  # type: ignore[index]
    for name, tau, absolute, relative in zip(*curve.values(), strict=True):
        if name == "projector layer 0":
            assert absolute == rank(weight, tau)
            assert relative == rank(weight, tau, True)
    for name in set(curve["object"]):
        ranks = [r for o, r in zip(curve["object"], curve["rank_relative"], strict=True) if o == name]
        assert ranks == sorted(ranks, reverse=True)
    assert found.metric("rank_projector_layer_0").reason == "a property of the weights, not of a sample"
    assert found.metric("rank_projector_layer_0").value == rank(weight, 0.01, True)
    interval = found.metric("effective_rank_h").interval
    assert interval is not None
    assert interval.low <= found.metric("effective_rank_h").value <= interval.high  # type: ignore[operator]
    json.dumps(found.to_json(), allow_nan=False)


def test_halves_tell_how_far_the_effective_rank_moves_between_samples(make_subject: Callable[..., Subject]) -> None:
    """The range over halves is of the size of the true spread over fresh samples of the same n."""
    scale = torch.linspace(0.2, 2, 8, dtype=torch.float64)
    draws = [torch.randn(60, 8, generator=torch.Generator().manual_seed(s), dtype=torch.float64) * scale for s in range(40)]
    fresh = [effective_rank(x, centre=True) for x in draws]
    subject = make_subject(encoder=Planted(draws[0]), projector=None, dtype=torch.float64)
    interval = probe(subject, Options()).metric("effective_rank_h").interval
    assert interval is not None
    assert 0.4 < (interval.high - interval.low) / (max(fresh) - min(fresh)) < 2.5


def test_probe_is_deterministic_and_draws_with_its_seed(make_subject: Callable[..., Subject]) -> None:
    first, again, other = (probe(make_subject(), Options(seed=s)) for s in (0, 0, 1))
    assert first == again
    assert first.metric("effective_rank_h").interval != other.metric("effective_rank_h").interval
    assert first.metric("effective_rank_h").value == other.metric("effective_rank_h").value


def test_collapsed_features_have_rank_zero_and_say_so(make_subject: Callable[..., Subject]) -> None:
    constant = torch.full((60, 17), 3.0) * (1 + 1e-7 * torch.randn(60, 17, generator=torch.Generator().manual_seed(0)))
    found = probe(make_subject(encoder=Planted(constant), projector=None), Options())
    assert found.metric("rank_h").value == 0
    assert found.metric("effective_rank_h").value == 0
    assert any("collapsed" in note for note in found.notes)


def test_features_with_nan_are_refused(make_subject: Callable[..., Subject]) -> None:
    features = torch.ones(60, 17)
    features[3, 4] = math.nan
    with pytest.raises(GeomsslError, match="NaN or infinity in 1 of 60 rows"):
        probe(make_subject(encoder=Planted(features), projector=None), Options())


def test_too_few_images_for_the_width_is_said(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(n=10), Options())
    assert any("once centred, 10 images span at most 9 of 12" in note for note in found.notes)
    assert not any("span at most" in note for note in probe(make_subject(n=60), Options()).notes)


def test_estimators_that_disagree_are_named(make_subject: Callable[..., Subject]) -> None:
    spread = planted([100.0] + [1.0] * 12, n=60)
    found = probe(make_subject(encoder=Planted(spread.float()), projector=None), Options())
    assert any("estimators disagree" in note and "features h" in note for note in found.notes)
    flat = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    found = probe(make_subject(encoder=Planted(flat), projector=None), Options())
    assert not any("disagree" in note for note in found.notes)
