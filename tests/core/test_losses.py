"""InfoNCE against explicit sums in float64, closed forms on simplices, and the bound as a property."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomssl.errors import GeomsslError
from geomssl.losses import info_nce, info_nce_upper_bound

DENOMINATORS = ("decoupled", "nt-xent", "pooled")


def pairs(n=5, p=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, p, generator=draw, dtype=torch.float64).unbind(0)


def by_hand(z1, z2, beta, denominator):
    """The definition, term by term, in plain Python."""
    views = [[(r / r.norm()).tolist() for r in z] for z in (z1, z2)]

    def s(a, b):
        return math.exp(beta * sum(x * y for x, y in zip(a, b, strict=True)))

    n, total = len(z1), 0.0
    for i in range(n):
        positive = s(views[0][i], views[1][i])
        others = [k for k in range(n) if k != i]
        if denominator == "pooled":
            below = sum(s(views[j][i], views[m][k]) for k in others for j, m in itertools.product((0, 1), (0, 1)))
        else:
            below = sum(s(views[0][i], views[m][k]) for k in others for m in (0, 1))
            below += positive if denominator == "nt-xent" else 0
        total -= math.log(positive / below) / n
    return total


@pytest.mark.parametrize("denominator", DENOMINATORS)
@pytest.mark.parametrize("beta", [0.0, 2.0, 10.0])
def test_info_nce_is_its_definition(denominator, beta):
    z1, z2 = pairs()
    assert info_nce(z1, z2, beta, denominator).item() == pytest.approx(by_hand(z1, z2, beta, denominator), abs=1e-12)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_symmetric_is_the_mean_of_both_directions(denominator):
    z1, z2 = pairs()
    both = (by_hand(z1, z2, 3.0, denominator) + by_hand(z2, z1, 3.0, denominator)) / 2
    assert info_nce(z1, z2, 3.0, denominator, symmetric=True).item() == pytest.approx(both, abs=1e-12)


@pytest.mark.parametrize("n", [2, 4, 7])
def test_simplex(n):
    """On a regular simplex with equal views, s_ii = 1 and s_ik = -1/(n-1)."""
    z = torch.eye(n, dtype=torch.float64) - 1 / n
    beta, s = 4.0, -1 / (n - 1)
    decoupled = math.log(2 * (n - 1)) + beta * s - beta
    assert info_nce(z, z, beta).item() == pytest.approx(decoupled, abs=1e-12)
    assert info_nce(z, z, beta, "pooled").item() == pytest.approx(decoupled + math.log(2), abs=1e-12)
    nt_xent = math.log(2 * (n - 1) * math.exp(beta * s) + math.exp(beta)) - beta
    assert info_nce(z, z, beta, "nt-xent").item() == pytest.approx(nt_xent, abs=1e-12)
    assert info_nce_upper_bound(z, z, beta).total.item() == pytest.approx(decoupled, abs=1e-12)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_gradient(denominator):
    z1, z2 = (z.requires_grad_() for z in pairs())
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, 2.0, denominator, symmetric=True), (z1, z2))


def test_rows_are_normalised_inside():
    z1, z2 = pairs()
    scales = torch.tensor([0.1, 1.0, 2.0, 30.0, 4.0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(info_nce(z1, z2), info_nce(z1 * scales, z2 / scales))


def test_large_beta_stays_finite_in_float32():
    z1, z2 = (z.float() for z in pairs())
    assert info_nce(z1, z2, beta=1e4).isfinite()


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 9), p=st.integers(1, 6), beta=st.floats(0, 30))
def test_bound_holds_for_every_batch(seed, n, p, beta):
    """bound - L = -log mean_l exp(beta (s_l - s*)) averaged over anchors: never negative."""
    z1, z2 = pairs(n, p, seed)
    bound = info_nce_upper_bound(z1, z2, beta)
    slack = bound.total - info_nce(z1, z2, beta)
    assert slack >= -1e-10
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (z1, z2))
    s = torch.cat([a @ a.T, a @ b.T], dim=1)
    keep = ~torch.eye(n, dtype=torch.bool).repeat(1, 2)
    s = s[keep].view(n, -1)
    expected = -(beta * (s - s.amax(dim=1, keepdim=True))).exp().mean(dim=1).log().mean()
    assert slack.item() == pytest.approx(expected.item(), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_half_precision_is_computed_in_float32_also_under_autocast(dtype, denominator):
    """Only the rounding of the inputs remains: bf16 similarities would be off by 1e-2."""
    z1, z2 = (z.to(dtype) for z in pairs(n=20))
    exact = info_nce(z1.double(), z2.double(), 10.0, denominator, symmetric=True).item()
    for on in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=on):
            found = info_nce(z1, z2, 10.0, denominator, symmetric=True)
            float32 = info_nce(z1.float(), z2.float(), 10.0, denominator, symmetric=True)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(exact, rel=1e-5)
        assert torch.equal(found, float32)


@pytest.mark.parametrize(
    ("given_pair", "said"),
    [
        ((torch.ones(1, 2), torch.ones(1, 2)), "batch of 1"),
        ((torch.ones(3, 2), torch.ones(4, 2)), "(3, 2) and (4, 2)"),
        ((torch.ones(3), torch.ones(3)), "(3,)"),
    ],
)
def test_bad_shapes(given_pair, said):
    with pytest.raises(GeomsslError, match=said.replace("(", r"\(").replace(")", r"\)")):
        info_nce(*given_pair)


def test_unknown_denominator_names_the_nearest():
    with pytest.raises(GeomsslError, match="did you mean 'nt-xent'"):
        info_nce(*pairs(), denominator="ntxent")
