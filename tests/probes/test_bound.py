"""The bound holds for every batch, projector, beta and denominator; its gap and Proposition C.1 are identities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomssl import losses
from geomssl.errors import GeomsslError
from geomssl.probes.bound import Options, info_nce_bound, probe
from geomssl.probes.subject import Subject
from geomssl.seeding import generator

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
