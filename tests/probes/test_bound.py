"""The bound holds for every batch, projector, beta and denominator; its gap and Proposition C.1 are identities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from geomssl import losses
from geomssl.errors import GeomsslError
from geomssl.probes.bound import Options, alignment, info_nce_bound, probe, uniformity
from geomssl.probes.negatives import nearest_negatives
from geomssl.probes.subject import Subject
from geomssl.seeding import generator, seeded

DENOMINATORS = ("decoupled", "nt-xent", "pooled")


def by_hand(z1, z2, beta, denominator):
    """Loss, bound, largest and expected similarity and entropy by loops over pairs, in Python floats. Anchors from z1."""
    views = [z / z.norm(dim=1, keepdim=True) for z in (z1.double(), z2.double())]
    n, rows = len(z1), []
    for i in range(n):
        positive = float(views[0][i] @ views[1][i])
        if denominator == "pooled":
            terms = [float(views[j][i] @ views[v][k]) for j in (0, 1) for v in (0, 1) for k in range(n) if k != i]
        else:
            terms = [float(views[0][i] @ views[v][k]) for v in (0, 1) for k in range(n) if k != i]
            terms += [positive] if denominator == "nt-xent" else []
        total = sum(math.exp(beta * s) for s in terms)
        shares = [math.exp(beta * s) / total for s in terms]
        rows.append((
            math.log(total) - beta * positive, beta * (max(terms) - positive) + math.log(len(terms)), max(terms),
            sum(p * s for p, s in zip(shares, terms, strict=True)), -sum(p * math.log(p) for p in shares), len(terms),
        ))
    return [sum(column) / n for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_every_part_against_loops(denominator: str) -> None:
    z1, z2 = torch.randn(2, 7, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = info_nce_bound(z1, z2, 3.0, denominator)
    loss, bound, largest, expected, entropy, terms = by_hand(z1, z2, 3.0, denominator)
    assert float(found.loss) == pytest.approx(loss, abs=1e-12)
    assert float(found.bound.mean()) == pytest.approx(bound, abs=1e-12)
    assert float(found.repulsion.mean()) == pytest.approx(largest, abs=1e-12)
    assert float(found.expected.mean()) == pytest.approx(expected, abs=1e-12)
    assert float(found.entropy.mean()) == pytest.approx(entropy, abs=1e-12)
    assert found.constant == pytest.approx(math.log({"decoupled": 12, "nt-xent": 13, "pooled": 24}[denominator]))
    assert math.exp(found.constant) == pytest.approx(terms)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_symmetric_is_the_mean_of_both_directions(denominator: str) -> None:
    z1, z2 = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    both = info_nce_bound(z1, z2, 2.0, denominator, symmetric=True)
    one, other = info_nce_bound(z1, z2, 2.0, denominator), info_nce_bound(z2, z1, 2.0, denominator)
    for part in ("bound", "slack", "repulsion", "expected", "entropy"):
        torch.testing.assert_close(getattr(both, part), (getattr(one, part) + getattr(other, part)) / 2)


@settings(max_examples=150, deadline=None)
@given(
    n=st.integers(2, 9), width=st.integers(1, 5), beta=st.floats(0, 60), seed=st.integers(0, 2**31),
    denominator=st.sampled_from(DENOMINATORS), symmetric=st.booleans(), scale=st.sampled_from((1e-20, 1.0, 1e15)),
    kind=st.sampled_from(("free", "near", "equal", "opposite", "zero")),
)
def test_the_bound_holds_for_every_batch(n, width, beta, seed, denominator, symmetric, scale, kind) -> None:
    z1, z2 = torch.randn(2, n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    if kind == "near":
        z1, z2 = z1[:1] + 1e-9 * scale * z1, z1[:1] + 1e-9 * scale * z2
    elif kind == "equal":
        z1, z2 = z1[:1].expand(n, -1), z1[:1].expand(n, -1)
    elif kind == "opposite":
        z2 = -z1
    elif kind == "zero":
        z1, z2 = torch.zeros_like(z1), z2
    found = info_nce_bound(z1, z2, beta, denominator, symmetric)
    assert bool((found.slack >= 0).all())
    bound, loss = float(found.bound.mean()), float(losses.info_nce(z1, z2, beta, denominator, symmetric))
    size = 1 + beta
    assert loss <= bound + 1e-12 * size
    assert bound - float(found.slack.mean()) == pytest.approx(loss, abs=1e-12 * size)
    assert float((beta * (found.invariance + found.expected) + found.entropy).mean()) == pytest.approx(loss, abs=1e-12 * size)
    if kind == "equal":
        assert float(found.slack.max()) <= 1e-13 * size
        assert bound == pytest.approx(found.constant, abs=1e-12 * size)


PROJECTORS = {
    "linear": lambda d, p: nn.Linear(d, p),
    "of rank one": lambda d, p: nn.Sequential(nn.Linear(d, 1), nn.Linear(1, p)),
    "mlp": lambda d, p: nn.Sequential(nn.Linear(d, 7), nn.BatchNorm1d(7).eval(), nn.ReLU(), nn.Linear(7, p)),
    "zero": lambda d, p: nn.Sequential(nn.Linear(d, p), nn.Threshold(1e9, 0.0)),
    "constant": lambda d, p: nn.Sequential(nn.Threshold(1e9, 1.0), nn.Linear(d, p)),
    "identity": lambda d, p: nn.Identity(),
    "tanh": lambda d, p: nn.Sequential(nn.Linear(d, p), nn.Tanh()),
}


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(sorted(PROJECTORS)), n=st.integers(2, 12), d=st.integers(1, 6), p=st.integers(1, 5),
    beta=st.floats(0, 40), seed=st.integers(0, 2**31), denominator=st.sampled_from(DENOMINATORS), twins=st.booleans(),
)
def test_the_bound_holds_behind_every_projector(kind, n, d, p, beta, seed, denominator, twins) -> None:
    with seeded(seed, "projector"):
        projector = PROJECTORS[kind](d, p).double()
    h1, h2 = torch.randn(2, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if twins:
        h1[n // 2 :], h2[n // 2 :] = h1[0].clone(), h2[0].clone()
    with torch.no_grad():
        z1, z2 = projector(h1), projector(h2)
    found = info_nce_bound(z1, z2, beta, denominator)
    size = 1 + beta
    assert bool((found.slack >= 0).all())
    assert float(found.slack.max()) <= found.constant + 1e-12
    assert float(losses.info_nce(z1, z2, beta, denominator)) <= float(found.bound.mean()) + 1e-12 * size
    # in the paper's words: s* is the similarity of the nearest negative in the projector's output
    if denominator == "decoupled":
        star = torch.cat([z1, z2])[nearest_negatives(z1, z2)]
        similar = nn.functional.cosine_similarity(z1, star, dim=1, eps=1e-12)
        assert torch.allclose(found.repulsion, similar, atol=1e-11)


def simplex(k: int) -> torch.Tensor:
    """k unit vectors with similarity -1 / (k - 1) to one another."""
    return nn.functional.normalize(torch.eye(k, dtype=torch.float64) - 1 / k, dim=1)


@pytest.mark.parametrize(("k", "beta"), [(2, 1.0), (5, 2.0), (16, 10.0)])
def test_a_simplex_of_classes_in_closed_form(k: int, beta: float) -> None:
    """Views agree, and classes lie as far apart as they can: s+ = 1, and all other similarities are s = -1 / (k - 1)."""
    z, s = simplex(k), -1 / (k - 1)
    for denominator, m in (("decoupled", 2 * (k - 1)), ("pooled", 4 * (k - 1))):
        found = info_nce_bound(z, z, beta, denominator)
        expected = beta * (s - 1) + math.log(m)
        assert float(found.loss) == pytest.approx(expected, abs=1e-12)
        assert float(found.bound.mean()) == pytest.approx(expected, abs=1e-12)
        assert float(found.slack.abs().max()) < 1e-12
    found, m = info_nce_bound(z, z, beta, "nt-xent"), 2 * (k - 1)
    # the positive is in the denominator and the largest in it
    assert float(found.loss) == pytest.approx(math.log1p(m * math.exp(beta * (s - 1))), abs=1e-12)
    assert float(found.bound.mean()) == pytest.approx(math.log(2 * k - 1), abs=1e-12)


def test_alignment_and_uniformity_in_closed_form() -> None:
    for k in (2, 5, 16):
        z = simplex(k)
        assert alignment(3 * z, 0.1 * z) == pytest.approx(0, abs=1e-15)
        assert alignment(z, -z) == pytest.approx(4)
        # all squared distances are 2 - 2 s = 2 k / (k - 1)
        assert uniformity(7 * z) == pytest.approx(-4 * k / (k - 1))
        assert uniformity(z, t=0.5) == pytest.approx(-k / (k - 1))
    turned = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.0, 0.7)], dtype=torch.float64)
    assert alignment(turned[:1], turned[1:]) == pytest.approx(2 - 2 * math.cos(0.7))
    assert uniformity(turned[[0, 0, 1]]) == pytest.approx(math.log((1 + 2 * math.exp(-4 * (1 - math.cos(0.7)))) / 3))
    assert uniformity(turned[[0, 0, 0]]) == 0
    with pytest.raises(GeomsslError, match="uniformity of 1 row"):
        uniformity(turned[:1])
    with pytest.raises(GeomsslError, match="shapes"):
        alignment(turned, turned[:1])


def test_it_is_the_bound_of_the_losses_for_the_decoupled_form() -> None:
    z1, z2 = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = losses.info_nce_upper_bound(z1, z2, 2.0)
    assert float(info_nce_bound(z1, z2, 2.0).bound.mean()) == pytest.approx(float(known.total), abs=1e-13)


def test_equality_without_temperature_and_the_widest_gap() -> None:
    z1, z2 = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert float(info_nce_bound(z1, z2, 0.0).slack.max()) == 0
    # one of m terms at 1, the others at -1, and beta large: the slack tends to log m
    z = torch.tensor([[1.0, 0], [1.0, 0]], dtype=torch.float64)
    one = info_nce_bound(z, -z, 100.0)
    assert one.slack.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-12)


def test_what_is_no_batch_is_refused() -> None:
    z = torch.randn(4, 3)
    for a, b, beta, denominator, said in [
        (z[:1], z[:1], 1.0, "decoupled", "at least 2 pairs"), (z, z[:3], 1.0, "decoupled", "shapes"),
        (z, z, -1.0, "decoupled", "beta"), (z, z, 1.0, "pool", "did you mean 'pooled'"),
        (z, z * torch.nan, 1.0, "pooled", "NaN"),
    ]:
        with pytest.raises(GeomsslError, match=said):
            info_nce_bound(a, b, beta, denominator)


def test_probe_measures_batches_of_the_training(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(n=60)
    subject.trained = {"batch_size": 16, "beta": 5.0, "denominator": "nt-xent"}
    found = probe(subject, Options(batches=7))
    rows = found.table("batches").columns
    assert len(rows["loss"]) == 9
    assert rows["pass"] == [1] * 3 + [2] * 3 + [3] * 3
    assert len(set(rows["loss"])) == 9
    assert found.metric("constant").value == pytest.approx(math.log(31))
    assert all(loss <= bound for loss, bound in zip(rows["loss"], rows["bound"], strict=True))
    for name in ("loss", "bound", "slack"):
        metric = found.metric(name)
        assert metric.value == pytest.approx(sum(rows[name]) / 9)
        assert metric.interval.low <= metric.value <= metric.interval.high
        assert "of the same images" in metric.interval.method
    assert found.metric("alignment").value == pytest.approx(2 + 2 * found.metric("invariance").value)
    z = [subject.features(torch.arange(60), "z", view=(subject.policy, 0, v)) for v in (1, 2)]
    first = torch.randperm(60, generator=generator(0, "bound-batches", 0))[:16]
    expected = losses.info_nce(z[0][first].double(), z[1][first].double(), 5.0, "nt-xent", symmetric=True)
    assert rows["loss"][0] == pytest.approx(float(expected), abs=1e-12)
    assert probe(subject, Options(batches=7)) == found


def test_probe_by_its_options_and_without_a_run(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(n=40, policy=None)
    found = probe(subject, Options(batch=10, batches=4, denominator="pooled"))
    assert "pooled, beta = 2, N = 10" in found.headline
    assert any("not known" in note for note in found.notes)
    assert found.metric("loss").interval is None
    assert "too few" in found.metric("loss").reason
    with pytest.raises(GeomsslError, match="batch 50 on 40 images"):
        probe(subject, Options(batch=50))
    with pytest.raises(GeomsslError, match="without a projector"):
        probe(make_subject(projector=None), Options())
