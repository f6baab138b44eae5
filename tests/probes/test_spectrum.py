"""Singular values against closed forms and one SVD of the whole; exponents of exact power laws; what too few images hide."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import streaming
from geomssl.probes.rank import effective_rank
from geomssl.probes.spectrum import Options, feature_spectrum, power_law, probe
from geomssl.probes.subject import Subject


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(sigma: Tensor, n: int, seed: int = 0) -> Tensor:
    """A matrix (n, d) whose columns are centred and whose singular values over sqrt(n) are sigma."""
    d = len(sigma)
    left = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), random(n, d, seed=seed)], dim=1)).Q[:, 1:]
    return math.sqrt(n) * left @ torch.diag(sigma) @ torch.linalg.qr(random(d, d, seed=seed + 1)).Q


@pytest.mark.parametrize("block", [0, 5000, streaming.BYTES])
def test_blocks_give_the_known_spectrum_down_to_rounding(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BYTES", block)
    sigma = torch.logspace(2, -11, 12, dtype=torch.float64)
    found = feature_spectrum(made(sigma, 100) + 5.0)
    # the root of a float64 Gram matrix would be off from 1e-8 sigma_1 on
    assert torch.allclose(found, sigma, rtol=1e-2, atol=3e-14)
    assert torch.allclose(found[:9], sigma[:9], rtol=1e-6)


def test_centring_and_rows() -> None:
    x = random(50, 6) + 10
    assert torch.allclose(feature_spectrum(x, centre=False), torch.linalg.svdvals(x) / 50**0.5)
    rows = torch.tensor([3, 9, 4, 30, 31, 8, 7, 1])
    part = x[rows]
    assert torch.allclose(feature_spectrum(x, rows=rows), torch.linalg.svdvals(part - part.mean(dim=0)) / 8**0.5)
    assert torch.allclose(feature_spectrum(x + 1e6), feature_spectrum(x), rtol=1e-8)
    assert len(feature_spectrum(x[:4])) == 4
    with pytest.raises(GeomsslError, match="NaN"):
        feature_spectrum(x * torch.nan)
    with pytest.raises(GeomsslError, match="shape"):
        feature_spectrum(x[0])


def test_the_exponent_of_an_exact_power_law() -> None:
    k = torch.arange(1, 101, dtype=torch.float64)
    for alpha in (0.5, 1.0, 2.5):
        found = power_law(7 * k ** (-alpha / 2), 4, 60)
        assert found.alpha == pytest.approx(alpha)
        assert found.r2 == pytest.approx(1)
        assert (found.low, found.high) == (4, 60)
    assert power_law(k**-1.0).high == 50
    bent = torch.cat([k[:40] ** -0.5, torch.zeros(60, dtype=torch.float64)])
    assert power_law(bent, 1, 80).high == 40
    assert power_law(bent, 1, 80).alpha == pytest.approx(1)
    assert power_law(bent[:4], 3) is None
    assert power_law((-k).exp(), 1, 100).r2 < 0.95


def test_probe_against_one_svd_of_the_whole(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(n=60)
    found = probe(subject, Options())
    view = (subject.policy, 0, 1)
    expected = {
        "plain": subject.features(torch.arange(60)), "views": subject.features(torch.arange(60), view=view),
        "untrained, plain": subject.random_twin().features(torch.arange(60)),
        "untrained, views": subject.random_twin().features(torch.arange(60), view=view),
    }
    table = found.table("spectrum_h").columns
    for data, h in expected.items():
        exact = h.double() - h.double().mean(dim=0)
        sigma = torch.linalg.svdvals(exact) / 60**0.5
        drawn = torch.tensor([v for v, d in zip(table["singular_value"], table["data"], strict=True) if d == data])
        assert torch.allclose(drawn.double(), sigma, rtol=1e-5, atol=1e-5)
        name = data.replace(", ", "_")
        assert found.metric(f"effective_rank_h_{name}").value == pytest.approx(effective_rank(exact), rel=1e-4)
    assert {t.name for t in found.tables} == {"spectrum_h", "spectrum_z"}
    metric = found.metric("effective_rank_h_plain")
    assert metric.interval.low <= metric.value <= metric.interval.high
    assert probe(subject, Options()) == found


def test_too_few_images_leave_the_tail_unknown(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(n=8), Options())
    condition = found.metric("condition_h_plain")
    assert condition.value is None
    assert "8 images do not span 12 dimensions" in condition.reason
    assert sum("at most 7 of 12" in note for note in found.notes) == 1
    assert probe(make_subject(n=60), Options()).metric("condition_z_plain").value > 1


def test_collapse_and_dead_dimensions_are_named(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(n=60)
    last = subject.encoder.body[5]
    last.weight[0].zero_()
    last.bias[0] = -1.0
    found = probe(subject, Options())
    assert any("h on plain images: 1 of 12 dimensions holds nothing" in note for note in found.notes)
    assert found.metric("condition_h_plain").value is None
    subject = make_subject(n=60)
    subject.encoder.body[5].weight.zero_()
    found = probe(subject, Options())
    assert found.metric("effective_rank_h_plain").value == 0
    assert found.metric("alpha_h_plain").value is None
    assert any("h on plain images: the same for all images" in note for note in found.notes)


def test_without_projector_policy_or_twin(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(projector=None, policy=None, untrained=None), Options(halves=0, centre=False))
    assert [t.name for t in found.tables] == ["spectrum_h"]
    assert set(found.table("spectrum_h").columns["data"]) == {"plain", "views"}
    assert any("before training is not known" in note for note in found.notes)
    assert "not centred" in found.definition
    assert found.metric("effective_rank_h_plain").interval is None
