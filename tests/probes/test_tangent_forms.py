"""Both forms of the unexplained share at planted angles, what chance leaves, distances and labels, and bad input."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes.explained import DRAWS, Explained, chance, holding
from geomssl.probes.neighbours import BAR, Neighbours, distances, histogram, in_batches, label_metrics, typical_distance
from geomssl.probes.subject import Subject
from geomssl.probes.tangent import (
    Options,
    label_match,
    nearest_negatives,
    principal_angles,
    probe,
    unexplained_subspace,
    unexplained_variance,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tilted(angles: list[float], d: int = 9) -> tuple[Tensor, Tensor]:
    """Orthonormal bases (d, k) of two subspaces with those principal angles, in general position."""
    k = len(angles)
    turn = torch.linalg.qr(draw(d, d)).Q
    theta = torch.tensor(angles, dtype=torch.float64)
    return turn[:, :k], turn[:, :k] * theta.cos() + turn[:, k : 2 * k] * theta.sin()


def test_principal_angles_are_the_planted_ones_at_both_ends() -> None:
    planted = [0.0, 1e-11, 1e-4, math.pi / 2 - 1e-11]
    a, b = tilted(planted)
    mixed = b @ torch.linalg.qr(draw(4, 4, seed=1)).Q
    assert principal_angles(a, mixed).tolist() == pytest.approx(planted, abs=1e-14)
    assert principal_angles(a, mixed[:, :2]).shape == principal_angles(mixed[:, :2], a).shape == (2,)
    assert principal_angles(a[:, :2], torch.eye(9, dtype=torch.float64)).tolist() == pytest.approx([0, 0], abs=1e-14)


def test_energy_and_subspace_forms_at_planted_angles() -> None:
    """Steps along three directions at angles t_j to W with energies w_j: sum w sin^2 t / sum w, and mean sin^2 t."""
    angles, scales = [0.3, 1.0, 0.1], torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64)
    weight, own = tilted(angles)
    steps = torch.linalg.qr(draw(40, 3, seed=2)).Q * scales @ own.T
    energies = [float(s) ** 2 for s in scales]
    squares = [math.sin(t) ** 2 for t in angles]
    expected = sum(w * s for w, s in zip(energies, squares, strict=True)) / sum(energies)
    assert unexplained_variance(steps, weight) == pytest.approx(expected, abs=1e-12)
    for k in (1, 2, 3):
        assert unexplained_subspace(steps, weight, k) == pytest.approx(sum(squares[:k]) / k, abs=1e-12)
    # a W that spans the same, however scaled
    assert unexplained_subspace(steps, weight @ draw(3, 5, seed=3), 2) == pytest.approx(sum(squares[:2]) / 2, abs=1e-9)


def test_directions_that_weight_lacks_count_as_right_angles() -> None:
    weight, own = tilted([0.4, 0.2])
    steps = draw(30, 2, seed=1) @ own.T
    expected = (math.sin(0.4) ** 2 + 1) / 2
    assert unexplained_subspace(steps, weight[:, :1], 2) == pytest.approx(expected, abs=1e-12)


def test_at_full_span_the_subspace_form_is_the_chance_value_whatever_the_weight() -> None:
    assert unexplained_subspace(draw(50, 7), draw(7, 3, seed=1), 7) == pytest.approx(1 - 3 / 7)
    assert unexplained_subspace(draw(50, 7), draw(7, 7, seed=1), 4) == pytest.approx(0, abs=1e-12)
    with pytest.raises(GeomsslError, match="1 to its rank, 3"):
        unexplained_subspace(draw(3, 7), draw(7, 3, seed=1), 4)
    with pytest.raises(GeomsslError, match=r"Linear\.weight\.T"):
        unexplained_subspace(draw(3, 7), draw(3, 7, seed=1), 2)


def test_leading_directions_that_hold_a_share() -> None:
    energies = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    assert [holding(energies, share) for share in (0.5, 0.6, 0.61, 0.9, 0.95, 1.0)] == [1, 1, 2, 2, 3, 3]


def test_chance_is_that_of_a_random_subspace() -> None:
    """For steps along one direction the captured share of a random p of d directions is Beta(p / 2, (d - p) / 2)."""
    d, p = 12, 4
    steps = draw(20, 1) @ draw(1, d, seed=1)
    found = Explained("W", torch.zeros(1), torch.ones(1), [], 1 - p / d, torch.tensor([float(p)]), (d, p))
    law = stats.beta((d - p) / 2, p / 2)
    for value, q in zip(chance(steps, found, 0), (0.025, 0.975), strict=True):
        expected = law.ppf(q)
        error = math.sqrt(q * (1 - q) / DRAWS) / law.pdf(expected)
        assert abs(value - expected) < 4 * error
    even = chance(draw(4000, d), found, 0)
    assert even == pytest.approx((1 - p / d, 1 - p / d), abs=0.03)
    full = Explained("W", torch.zeros(1), torch.ones(1), [], 0.0, torch.tensor([float(d)]), (d, d))
    assert chance(steps, full, 0) == (0.0, 0.0)


def test_the_unit_of_distances_is_that_of_pairs_drawn_at_random() -> None:
    h = draw(40, 5) * 3 + 7
    pairs = (h[:, None] - h[None]).square().sum(dim=2)
    assert typical_distance(h[:20], h[20:]) ** 2 == pytest.approx(float(pairs.sum()) / 40**2)
    assert float(distances(h, h.roll(1, 0), 2.0)[3]) == pytest.approx(float((h[3] - h[2]).norm()) / 2)


def test_the_histogram_holds_every_image_once() -> None:
    values = torch.tensor([0.0, 0.049, 0.051, 1.0, 2.31], dtype=torch.float64)
    columns = histogram({"a": values, "b": values[:1]}).columns
    share = {(p, round(x / BAR - 0.5)): s for p, x, s in zip(*columns.values(), strict=True)}
    assert sum(s for (p, _), s in share.items() if p == "a") == pytest.approx(1)
    assert (share["a", 0], share["a", 1], share["a", 20], share["a", 46], share["b", 0]) == (0.4, 0.2, 0.2, 0.2, 1.0)


def test_label_match_with_planted_relabelling() -> None:
    """Ten images a place on a circle, all of one label, then a known number of labels changed: anchors and targets count."""
    place = torch.arange(60) // 10
    angle = place.double() * 2 * math.pi / 6
    z = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = place.clone()
    found = nearest_negatives(z, z)
    # ties go to the smallest index: the first of a place, and for the first itself the second
    expected = torch.where(torch.arange(60) % 10 == 0, torch.arange(60) + 1, place * 10)
    assert torch.equal(found, expected)
    assert label_match(labels, found) == 1.0
    labels[[5, 15, 16]] = 99  # three anchors, nobody's target
    assert label_match(labels, found) == pytest.approx(57 / 60)
    labels[20] = 99  # the target of nine anchors, and an anchor itself
    assert label_match(labels, found) == pytest.approx(47 / 60)


def test_batches_have_their_own_negatives_chance_and_ceiling() -> None:
    z1, z2, labels = draw(30, 4), draw(30, 4, seed=1), torch.arange(30) % 3
    found = in_batches(z1, z2, 8, 0)
    assert sorted(len(g) for g in found.groups) == [6, 8, 8, 8]
    for group in found.groups:
        inner = nearest_negatives(z1[group], z2[group])
        expected = torch.cat([group, group + 30])[inner]
        assert torch.equal(found.hardest[group], expected)
    names = [m.name for m in label_metrics(labels, "coarse", found, 0)]
    assert names == ["label_match_coarse_batch", "label_match_coarse_chance_batch", "label_match_coarse_ceiling_batch"]
    alone = Neighbours(torch.tensor([1, 0]), [torch.arange(2)], "", "")
    assert [m.value for m in label_metrics(torch.tensor([0, 1]), "", alone, 0)] == [0.0, 0.0, 0.0]


def test_probe_reports_both_kinds_of_negatives_forms_and_distances(make_subject: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    subject = make_subject(projector=nn.Linear(12, 5))
    subject.trained = {"batch_size": 16}
    found = probe(subject, Options(halves=5))
    h1, h2 = (subject.features(torch.arange(60), view=(subject.policy, 0, v)).double() for v in (1, 2))
    pairs, both = found.table("pairs").columns, torch.cat([h1, h2]).numpy()
    unit = math.sqrt(2 * np.trace(np.cov(both.T, bias=True)))
    weight = subject.projector.weight.T
    for suffix in ("", "_batch"):
        hardest = torch.tensor(pairs[f"nearest{suffix}"]) + 60 * (torch.tensor(pairs[f"view{suffix}"]) - 1)
        star = both[hardest.numpy()]
        assert found.metric(f"distance{suffix}").value == pytest.approx(
            float(np.linalg.norm(h1.numpy() - star, axis=1).mean()) / unit
        )
        delta = h2 - torch.from_numpy(star)
        assert found.metric(f"unexplained{suffix}").value == pytest.approx(unexplained_variance(delta, weight), abs=1e-9)
        chance, match, ceiling = (found.metric(f"label_match{kind}{suffix}").value for kind in ("_chance", "", "_ceiling"))
        assert match == label_match(subject.source.labels, hardest)
        assert chance < match <= ceiling
        if not suffix:
            k = int(found.metric("delta_h_directions").value)
            sigma = torch.linalg.svdvals(delta) ** 2
            assert float(sigma[:k].sum() / sigma.sum()) >= 0.9 > float(sigma[: k - 1].sum() / sigma.sum())
            assert found.metric("unexplained_subspace").value == pytest.approx(unexplained_subspace(delta, weight, k), abs=1e-9)
            angles = torch.deg2rad(torch.tensor(found.table("angles").columns["degrees"], dtype=torch.float64))
            assert float(angles.sin().square().mean()) == pytest.approx(found.metric("unexplained_subspace").value, abs=1e-6)
    null = found.metric("unexplained_null")
    assert null.interval.low < null.value < null.interval.high
    apart = float(np.linalg.norm((h1 - h2).numpy(), axis=1).mean()) / unit
    assert found.metric("distance_positive").value == pytest.approx(apart)
    assert found.metric("unexplained_subspace").interval is not None


def test_a_projector_without_one_map_has_no_subspace_form(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(projector=nn.Sequential(nn.ReLU(), nn.Linear(12, 5), nn.ReLU())), Options(local=8, halves=3))
    assert found.metric("unexplained_subspace").value is None
    assert "no one W" in found.metric("unexplained_subspace").reason
    assert "subspace" not in [f.name for f in found.figures]


def test_a_batch_that_holds_the_whole_set_is_said(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(), Options(local=8))
    assert not any(m.name.endswith("_batch") for m in found.metrics)
    assert any("batch of 128 holds all 60 images" in note for note in found.notes)


def test_fine_and_coarse_labels_are_matched_apart(make_subject: Callable[..., Subject]) -> None:
    source = make_subject().source
    images, labels = source.images(torch.arange(60)), source.labels
    coarse = Resident("named", "test", images, labels, factors={"coarse": (labels // 5).float()})
    found = probe(make_subject(source=coarse), Options(local=8))
    assert found.metric("label_match").value < found.metric("label_match_coarse").value
    assert found.metric("label_match_chance").value < found.metric("label_match_coarse_chance").value
    bare = Resident("named", "test", images, None, factors={"coarse": (labels // 5).float()})
    found = probe(make_subject(source=bare), Options(local=8))
    assert found.metric("label_match").value is None
    assert found.metric("label_match_coarse").value > 0


def test_duplicates_and_a_policy_that_does_nothing_are_named(make_subject: Callable[..., Subject]) -> None:
    from geomssl.transforms import policy

    source = make_subject().source
    images = source.images(torch.arange(60))
    images[50:] = images[:10]
    doubled = Resident("doubled", "test", images, source.labels)
    found = probe(make_subject(source=doubled, policy=policy("none"), batch_size=64), Options(local=8))
    assert found.metric("distance_positive").value == 0
    assert found.metric("distance").value > 0
    said = " ".join(found.notes)
    assert "exactly the features of their anchor, at distance 0: 20 of 60" in said
    assert "Both views of every image have the same features" in said
    images[30:] = images[:30]
    doubled = Resident("doubled", "test", images, source.labels)
    with pytest.raises(GeomsslError, match="delta-h of zero for every image"):
        probe(make_subject(source=doubled, policy=policy("none"), batch_size=64), Options(local=8))
