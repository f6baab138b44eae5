"""LiDAR on planted classes and against its scatter matrices, alpha-ReQ, and what the rank probe says of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes import estimators
from geomssl.probes.estimators import effective_rank, lidar, power_law, singular_values
from geomssl.probes.rank import Options, probe
from geomssl.probes.subject import Subject
from geomssl.transforms import policy


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def even(q: int, d: int, size: float) -> Tensor:
    """q = 2 d views around 0 whose scatter is exactly size^2 / d times the identity: plus and minus each axis."""
    assert q == 2 * d
    axes = torch.eye(d, dtype=torch.float64) * size
    return torch.cat([axes, -axes])


@pytest.mark.parametrize("k", [2, 5, 9])
def test_simplex_means_with_even_noise_have_lidar_k_minus_one(k: int) -> None:
    """k means at equal distances span k - 1 directions equally; one image a mean, or several."""
    d = 10
    means = torch.eye(k, d, dtype=torch.float64) @ torch.linalg.qr(draw(d, d)).Q
    views = means.repeat(3, 1)[None] + even(20, d, 0.3)[:, None]
    found = lidar(views, eps=0.0)
    assert found.value == pytest.approx(k - 1, rel=1e-9)
    assert found.within == pytest.approx(0.3**2 / d)
    # each of the equal eigenvalues: 1 / k of between, over the within-image variance and its ridge
    assert found.eigenvalues[: k - 1].tolist() == pytest.approx([1 / k / (0.09 / d + 1e-4)] * (k - 1))
    p = 1 / (k - 1) + 1e-7
    rest = len(found.eigenvalues) - (k - 1)
    expected = math.exp(-(k - 1) * p * math.log(p) - rest * 1e-7 * math.log(1e-7))
    assert lidar(views).value == pytest.approx(expected, rel=1e-9)


def test_lidar_is_the_spectrum_of_its_two_scatter_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimators, "IMAGES", 7)
    n, q, d, delta = 40, 3, 6, 1e-2
    views = draw(q, n, d) * 0.5 + draw(n, d, seed=1) @ torch.diag(torch.linspace(0.1, 3, d, dtype=torch.float64)) + 4
    means = views.mean(0).numpy()
    within = (views - views.mean(0)).reshape(-1, d).numpy()
    inner = within.T @ within / (n * q) + delta * np.eye(d)
    between = np.cov(means.T, bias=True)
    values = np.sort(np.linalg.eigvals(np.linalg.solve(inner, between)).real)[::-1]
    p = values / values.sum() + 1e-7
    found = lidar(list(views), delta)
    assert found.eigenvalues.numpy() == pytest.approx(values, rel=1e-9)
    assert found.value == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)
    rows = torch.tensor([3, 1, 20, 33, 8, 7])
    assert lidar(views, delta, rows=rows).value == pytest.approx(lidar(views[:, rows], delta).value)


def test_lidar_does_not_change_under_any_linear_map_without_a_ridge() -> None:
    views = draw(4, 30, 5) + 3 * draw(30, 5, seed=1)
    mixed = views @ (draw(5, 5, seed=2) * torch.tensor([1.0, 10, 100, 1e-2, 1], dtype=torch.float64))
    assert lidar(mixed, delta=0.0).value == pytest.approx(lidar(views, delta=0.0).value, rel=1e-9)
    assert lidar(mixed).value != pytest.approx(lidar(views).value, rel=1e-3)


def test_lidar_refuses_what_it_cannot_tell() -> None:
    views = draw(3, 8, 4)
    for bad, options, said in [
        (views[:1], {}, "LiDAR of 1 view; expected at least 2 views"), ([views[0], views[1][:4]], {}, "one shape"),
        (views[:, :1], {}, "LiDAR of 1 image"), (views * math.nan, {}, "NaN"), (views, {"delta": -1.0}, "delta = -1"),
        (views[:, :, :1].expand(3, 8, 4), {"delta": 0.0}, "delta > 0"),
    ]:
        with pytest.raises(GeomsslError, match=said):
            lidar(bad, **options)
    assert lidar(torch.ones(3, 8, 4)).value == 0


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_estimators_of_a_power_law_through_a_matrix(alpha: float) -> None:
    """A matrix with sigma_k = k^(-alpha / 2): the exponent comes back, and the effective rank is the entropy of k^(-alpha)."""
    k = torch.arange(1, 31, dtype=torch.float64)
    left, right = torch.linalg.qr(draw(80, 30)).Q, torch.linalg.qr(draw(30, 30, seed=1)).Q
    matrix = left * k ** (-alpha / 2) @ right
    assert power_law(singular_values(matrix), 2, 30).alpha == pytest.approx(alpha, rel=1e-9)
    p = (k**-alpha / (k**-alpha).sum()).numpy()
    assert effective_rank(matrix, of="variance") == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_probe_reports_lidar_of_the_training_views(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options(views=3, halves=4))
    for layer in ("h", "z"):
        views = [subject.features(torch.arange(60), layer, view=(subject.policy, 0, k)) for k in (1, 2, 3)]
        metric = found.metric(f"lidar_{layer}")
        assert metric.value == pytest.approx(lidar(views).value)
        assert metric.interval.low <= metric.value <= metric.interval.high
    rows = found.table("estimates").columns
    assert rows["estimator"].count("lidar") == 2
    some = probe(subject, Options(views=2, lidar_images=20, halves=0)).metric("lidar_h")
    assert some.n == 20
    assert "no spread" in some.reason


def test_probe_quotes_both_scales_of_the_threshold_and_the_range_of_the_fit(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options(tau=0.05, views=0))
    curve = found.table("spectrum").columns
    sigma = torch.tensor([s for o, s in zip(curve["object"], curve["singular_value"], strict=True) if o == "features h"])
    assert found.metric("rank_h").value == int((sigma >= 0.05 * sigma[0]).sum())
    assert found.metric("rank_absolute_h").value == int((sigma >= 0.05).sum())
    other = probe(subject, Options(tau=0.05, views=0, relative=False))
    assert other.metric("rank_h").value == found.metric("rank_absolute_h").value
    assert other.metric("rank_relative_h").value == found.metric("rank_h").value
    fit = power_law(sigma.double(), 3)
    assert found.metric("alpha_h").value == pytest.approx(fit.alpha, rel=1e-5)
    assert f"indices 3-{fit.high}" in found.metric("alpha_h").about
    assert found.metric("alpha_projector_layer_0").reason == "a property of the weights, not of a sample"
    assert found.metric("lidar_h").value is None


def test_one_view_collapse_and_a_policy_that_does_nothing_are_said(make_subject: Callable[..., Subject]) -> None:
    one = probe(make_subject(), Options(views=1, halves=0)).metric("lidar_h")
    assert one.value is None
    assert "nothing is known within an image" in one.reason
    still = probe(make_subject(policy=policy("none")), Options(views=2, halves=0))
    assert any("LiDAR of h: the ridge" in note and "do not differ" in note for note in still.notes)
    subject = make_subject()
    subject.encoder.body[5].weight.zero_()
    flat = probe(subject, Options(views=2, halves=0))
    assert flat.metric("lidar_h").value is None
    assert "collapsed" in flat.metric("lidar_h").reason
    few = probe(make_subject(n=6), Options(views=2, halves=0))
    assert any("6 images of 2 views leave the within-image scatter singular in 12" in note for note in few.notes)


def test_duplicates_are_counted(make_subject: Callable[..., Subject]) -> None:
    from geomssl.data.base import Resident

    source = make_subject().source
    images = source.images(torch.arange(60))
    images[40:] = images[:20]
    doubled = make_subject(source=Resident("doubled", "test", images, source.labels), batch_size=64)
    found = probe(doubled, Options(views=0, halves=0))
    assert any("features h: 20 of 60 images have exactly the features of another; 40 images count" in n for n in found.notes)
