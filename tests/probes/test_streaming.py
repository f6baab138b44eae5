"""The growing QR factor against one SVD of the whole, at condition numbers that a Gram matrix loses; memory does not grow."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from geomssl.errors import GeomsslError
from geomssl.probes import streaming
from geomssl.probes.halves import GROUPS, around, halves
from geomssl.probes.streaming import Triangle, repeated, spectrum, triangle


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted(sigma: Tensor, n: int, seed: int = 0) -> Tensor:
    """A matrix (n, d) with centred columns and those singular values."""
    d = len(sigma)
    left = torch.linalg.qr(torch.cat([torch.ones(n, 1, dtype=torch.float64), random(n, d, seed=seed)], dim=1)).Q[:, 1:]
    return left @ torch.diag(sigma) @ torch.linalg.qr(random(d, d, seed=seed + 1)).Q


def test_a_condition_number_of_a_million_is_exact_through_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "BYTES", 0)
    sigma = torch.logspace(3, -3, 40, dtype=torch.float64)
    x = planted(sigma, 1000) + 7.0
    found = triangle(x).singular_values()
    assert torch.allclose(found, sigma, rtol=1e-8, atol=0)
    # the same data by the root of a float32 Gram matrix: the smallest values are gone
    single = (x - x.mean(dim=0)).float()
    gram = torch.linalg.eigvalsh(single.T @ single).clamp(min=0).sqrt().flip(0).double()
    assert float((gram / sigma - 1).abs().max()) > 0.5


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6, 7, 40])
@pytest.mark.parametrize("cut", [1, 2, 4])
def test_centred_and_as_it_is_from_one_pass_for_every_shape(n: int, cut: int) -> None:
    x = random(n, 5, seed=n) + 3
    rows = Triangle()
    for part in x.tensor_split(min(cut, n)):
        rows.add(part)
    assert rows.count == n
    assert torch.allclose(rows.singular_values(centre=False), torch.linalg.svdvals(x), atol=1e-12)
    assert torch.allclose(rows.singular_values(), torch.linalg.svdvals(x - x.mean(dim=0)), atol=1e-12)
    assert rows.norm(centre=False) == pytest.approx(float(x.norm()))
    assert rows.norm() == pytest.approx(float((x - x.mean(dim=0)).norm()), abs=1e-12)
    gram = rows.factor(centre=False).T @ rows.factor(centre=False)
    assert torch.allclose(gram, x.T @ x, atol=1e-10)


@pytest.mark.parametrize(("a", "b"), [(0, 9), (9, 0), (3, 4), (30, 2), (2, 30), (20, 25)])
def test_merging_is_the_union_of_the_rows(a: int, b: int) -> None:
    x = random(a + b, 6) * 2 - 5
    first, second = (triangle(part) if len(part) else Triangle() for part in (x[:a], x[a:]))
    before = second.singular_values() if b else None
    first.merge(second)
    assert torch.allclose(first.singular_values(), torch.linalg.svdvals(x - x.mean(dim=0)), atol=1e-12)
    assert torch.allclose(first.singular_values(centre=False), torch.linalg.svdvals(x), atol=1e-12)
    if before is not None:
        assert torch.equal(second.singular_values(), before)


def test_rows_that_do_not_fit_are_refused() -> None:
    rows = triangle(random(4, 3))
    with pytest.raises(GeomsslError, match="width 2 after rows of width 3"):
        rows.add(random(4, 2))
    with pytest.raises(GeomsslError, match="NaN or infinity in 4 of 4 rows"):
        rows.add(random(4, 3) * math.nan)
    with pytest.raises(GeomsslError, match="no rows"):
        Triangle().singular_values()
    for bad in (torch.zeros(0, 3), torch.zeros(3)):
        with pytest.raises(GeomsslError, match="shape"):
            triangle(bad)


def test_what_rounding_leaves_is_zero_and_a_point_is_a_point() -> None:
    flat = torch.cat([random(50, 3), torch.zeros(50, 2)], dim=1).float() + 100
    found = spectrum(triangle(flat), torch.float32)
    assert not found.collapsed
    assert (found.sigma > 0).tolist() == [True, True, True, False, False]
    point = (torch.full((50, 5), 3.0) * (1 + 1e-7 * random(50, 5))).float()
    found = spectrum(triangle(point), torch.float32)
    assert found.collapsed
    assert found.sigma.tolist() == [0.0] * 5
    # not centred, the mean is one direction
    assert int((spectrum(triangle(point), torch.float32, centre=False).sigma > 0).sum()) == 1
    assert spectrum(triangle(point.double()), torch.float64).collapsed is False


def test_repeated_rows_are_counted_exactly() -> None:
    x = random(9, 4).float()
    assert repeated(x) == 0
    assert repeated(torch.cat([x, x[:3], x[:1]])) == 4
    assert repeated(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])) == 1
    nudged = x.clone()
    nudged[0, 0] = torch.nextafter(nudged[0, 0], torch.tensor(9.0))
    assert repeated(torch.cat([x, nudged[:1]])) == 0


@pytest.mark.parametrize("n", [200, 4000])
def test_halves_are_halves_and_follow_the_seed(n: int) -> None:
    """Both ways of drawing them: the sum of squares of a half is that of some half of the rows, none of them twice."""
    codes = 4.0 ** torch.arange(2, dtype=torch.float64)
    x = random(n, 2).sign() * codes.sqrt()
    found = list(halves(x, 30, 0, "test"))
    assert len(found) == 30
    grouped = n + 30 * GROUPS // 2 * 2 < 30 * (n // 2)
    assert all(abs(half.count - n / 2) <= (GROUPS if grouped else 0.5) for half in found)
    for half in found:
        assert torch.allclose((half.factor(centre=False) ** 2).sum(dim=0), half.count * codes)
    again = [half.singular_values() for half in halves(x, 30, 0, "test")]
    assert all(torch.equal(a, b.singular_values()) for a, b in zip(again, found, strict=True))
    assert len({tuple(half.tolist()) for half in again}) > 25
    assert not list(halves(x[:3], 30, 0, "test"))


@pytest.mark.parametrize("n", [60, 9000])
def test_no_row_is_in_a_half_twice(n: int) -> None:
    """Row j alone has a 1 in column j: the energy of a column is how often its row was taken."""
    x = torch.zeros(n, 8, dtype=torch.float64)
    x[range(8), range(8)] = 1
    taken = torch.stack([(half.factor(centre=False) ** 2).sum(dim=0) for half in halves(x, 40, 0, "once")])
    assert torch.allclose(taken, taken.round(), atol=1e-12)
    assert set(taken.round().flatten().tolist()) == {0.0, 1.0}
    assert 0.3 < float(taken.mean()) < 0.7


@pytest.mark.parametrize("n", [60, 3000])
def test_the_spread_of_halves_is_that_of_fresh_samples(n: int) -> None:
    """var(half) - var(whole) = var(whole), drawn one by one (n = 60) and by groups (n = 3000)."""
    def total(x: Tensor) -> float:
        return float((x**2).mean())

    fresh = [total(random(n, 3, seed=s)) for s in range(100)]
    drawn = [half.norm(centre=False) ** 2 / half.count / 3 for half in halves(random(n, 3), 100, 0, "spread")]
    ratio = torch.tensor(drawn).std() / torch.tensor(fresh).std()
    # a standard deviation of 16 groups is itself uncertain by 1 / sqrt(2 * 15) = 18 %: four of those
    assert 0.3 < float(ratio) < 1.8


def test_around_stays_within_its_limits() -> None:
    found = around(5.0, [4.0, 8.0], 6)
    assert (found.low, found.high) == (3.0, 6.0)
    assert around(5.0, [], 6) is None


class Largest(TorchDispatchMode):
    """Remembers the largest float64 tensor that any operation returns."""

    numbers = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for one in found if isinstance(found, tuple | list) else (found,):
            if isinstance(one, Tensor) and one.dtype == torch.float64:
                self.numbers = max(self.numbers, one.numel())
        return found


def test_features_are_never_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The spectrum of 3,000 rows and of all its halves, and no float64 tensor of more than a block and the factor."""
    monkeypatch.setattr(streaming, "BYTES", 0)
    x = random(3000, 6).float()
    with Largest() as seen:
        spectrum(triangle(x), x.dtype)
        assert len([spectrum(half, x.dtype) for half in halves(x, 5, 0, "test")]) == 5
    assert 0 < seen.numbers <= 3 * 7 * 7


MEMORY = """
import resource, torch
from geomssl.probes.streaming import Triangle
torch.set_num_threads(1)
def measure(blocks):
    rows = Triangle()
    for k in range(blocks):
        rows.add(torch.randn(8192, 64, generator=torch.Generator().manual_seed(k)))
    rows.singular_values()
    return rows.count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(*measure(4), *measure(40))
"""


def test_memory_does_not_grow_with_the_number_of_rows() -> None:
    """Ten times the rows, 150 MB more of them in float64, and the peak rises by less than a tenth of that."""
    one = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, env=one).stdout.split()
    few, before, many, after = map(int, out)
    assert (few, many) == (4 * 8192, 40 * 8192)
    assert after - before < (many - few) * 64 * 8 / 10
