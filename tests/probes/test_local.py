"""Local maps of a projector: closed forms for two regions, masks by hand, kinks of every kind, and the linear case."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes import tangent
from geomssl.probes.local import (
    Options,
    _measure,
    local_maps,
    local_rank,
    local_unexplained,
    map_distances,
    nearest,
    probe,
    singular_parts,
)
from geomssl.probes.regions import expected_regions, new_region_share, patterns, piecewise_affine, regions
from geomssl.probes.subject import Subject


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TwoRegions(nn.Module):
    """g(h) = A h + c max(0, h_1): W' = A where h_1 < 0, A + c e_1' where h_1 > 0."""

    def __init__(self, a: Tensor, c: Tensor) -> None:
        super().__init__()
        self.a, self.c = nn.Parameter(a), nn.Parameter(c)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.a.T + torch.relu(h[:, :1]) * self.c


def mlp(act: Callable[[], nn.Module] = nn.ReLU, seed: int = 0) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers = nn.Sequential(nn.Linear(7, 9), act(), nn.Linear(9, 6), act(), nn.Linear(6, 4)).double()
    for weight in layers.parameters():
        weight.data = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    return layers


def test_two_regions_in_closed_form() -> None:
    a, c = draw(3, 5), draw(3, seed=1)
    projector, h = TwoRegions(a, c), draw(40, 5, seed=2)
    right = h[:, 0] > 0
    other = a.clone()
    other[:, 0] += c
    maps = local_maps(projector, h)
    torch.testing.assert_close(maps[~right], a.expand(int((~right).sum()), -1, -1))
    torch.testing.assert_close(maps[right], other.expand(int(right.sum()), -1, -1))
    which = regions(patterns(projector, h))
    assert int(which.max()) == 1
    assert torch.equal(which == which[0], right == right[0])
    squares, size = map_distances(maps[right][:1], maps[~right][:1])
    assert float(squares) == pytest.approx(float(c.square().sum()), rel=1e-12)
    assert float(size) == pytest.approx(float(a.square().sum() + other.square().sum()) / 2, rel=1e-12)


def test_what_one_region_sees_the_other_does_not() -> None:
    """A = e_2 e_2', c = e_1: delta_h along e_1 is explained where h_1 > 0 only, and an angle theta leaves sin^2 theta."""
    projector = TwoRegions(torch.diag(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)), torch.eye(3).double()[0])
    h = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [2, 1, 1]], dtype=torch.float64)
    theta = 0.4
    steps = torch.tensor([[1.0, 0, 0], [1, 0, 0], [math.cos(theta), 0, math.sin(theta)]], dtype=torch.float64)
    sigma, directions = singular_parts(local_maps(projector, h))
    left, total = local_unexplained(sigma, directions, 3 * steps[:, None], 1e-12)
    assert (left / total).tolist() == pytest.approx([0, 1, math.sin(theta) ** 2], abs=1e-14)
    assert local_rank(sigma, 1e-6).tolist() == [2, 1, 2]


def test_swapped_uses_the_map_of_the_other_image() -> None:
    """Where h_1 > 0 the step is e_1, else e_2: each image's own map explains it, and the map of the left side misses e_1."""
    projector = TwoRegions(torch.diag(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)), torch.eye(3).double()[0])
    h = draw(30, 3, seed=5)
    positive = h[:, 0] > 0
    steps = torch.where(positive[:, None], torch.eye(3).double()[0], torch.eye(3).double()[1])
    found = _measure(projector, h, steps[:, None], Options())
    assert not (found.far == torch.arange(30)).any()
    assert found.left.tolist() == pytest.approx([0] * 30, abs=1e-14)
    missed = positive & ~positive[found.far]
    assert missed.any()
    assert found.swapped.tolist() == pytest.approx(missed.double().tolist(), abs=1e-14)


def test_local_rank_counts_from_the_threshold_on() -> None:
    sigma = torch.tensor([[10.0, 5, 0.5], [1, 0.1, 0.05], [0, 0, 0]], dtype=torch.float64)
    assert local_rank(sigma, 0.1).tolist() == [3, 2, 0]
    assert local_rank(sigma, 0.1, relative=True).tolist() == [2, 2, 0]


def test_local_maps_are_the_product_of_the_masked_weights() -> None:
    projector, h = mlp(), draw(30, 7, seed=3)
    w1, b1, w2, b2, w3 = (projector[0].weight, projector[0].bias, projector[2].weight, projector[2].bias, projector[4].weight)
    found = local_maps(projector, h)
    with torch.no_grad():
        for row, one in zip(h, found, strict=True):
            first = w1 @ row + b1
            second = w2 @ first.clamp(min=0) + b2
            by_hand = w3 @ torch.diag((second > 0).double()) @ w2 @ torch.diag((first > 0).double()) @ w1
            torch.testing.assert_close(one, by_hand, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("affine", [True, False])
def test_local_maps_through_batch_norm_are_those_of_a_loop(affine: bool) -> None:
    """Its mean decides which side of the kink a sample is on."""
    norm = nn.BatchNorm1d(9, affine=affine, eps=0.3).double()
    norm.running_mean, norm.running_var = draw(9, seed=3), draw(9, seed=4).abs() + 0.1
    if affine:
        norm.weight.data, norm.bias.data = draw(9, seed=5), draw(9, seed=6)
    first, last = mlp()[0], nn.Linear(9, 4).double()
    h = draw(50, 7, seed=7)
    for projector in (nn.Sequential(first, norm, nn.ReLU(), last), nn.Sequential(first, norm, nn.ReLU())):
        projector.eval()
        by_hand = torch.stack([torch.autograd.functional.jacobian(lambda row, g=projector: g(row[None])[0], one) for one in h])
        torch.testing.assert_close(local_maps(projector, h), by_hand)


def test_maps_do_not_depend_on_the_memory_and_leave_the_projector_alone() -> None:
    projector = mlp().float().train()
    h = draw(20, 7)
    torch.testing.assert_close(local_maps(projector, h), local_maps(projector, h, memory=3000), rtol=1e-12, atol=1e-12)
    assert projector.training
    assert next(projector.parameters()).dtype == torch.float32
    with pytest.raises(GeomsslError, match="NaN"):
        local_maps(projector, h * math.nan)


def test_a_linear_projector_gives_the_linear_figures() -> None:
    layer, steps = nn.Linear(8, 3).double(), draw(25, 8)
    sigma, directions = singular_parts(local_maps(layer, draw(25, 8, seed=1)))
    left, total = local_unexplained(sigma, directions, steps[:, None], 1e-12)
    assert float(left.sum() / total.sum()) == pytest.approx(tangent.unexplained_variance(steps, layer.weight.T), rel=1e-12)
    assert local_rank(sigma, 1e-3, relative=True).tolist() == [3] * 25


def test_batch_norm_in_eval_mode_is_affine() -> None:
    norm = nn.BatchNorm1d(6).double()
    norm.running_mean, norm.running_var = draw(6), draw(6, seed=1).square() + 0.1
    norm.weight.data, norm.bias.data = draw(6, seed=2), draw(6, seed=3)
    first, last = nn.Linear(5, 6).double(), nn.Linear(6, 4).double()
    projector = nn.Sequential(first, norm, last).eval()
    h = draw(12, 5, seed=4)
    scale = torch.diag(norm.weight / (norm.running_var + norm.eps).sqrt())
    expected = (last.weight @ scale @ first.weight).detach()
    torch.testing.assert_close(local_maps(projector, h), expected.expand(12, -1, -1), rtol=1e-12, atol=1e-12)
    assert regions(patterns(projector, h)).tolist() == [0] * 12


class Function(nn.Module):
    """A function of h, called as one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


KINKED = {
    "clamp": (lambda: Function(lambda h: torch.clamp(h, -1.0, 2.0)), [-1.0, 2.0]),
    "clamp below": (lambda: Function(lambda h: h.clamp(min=-0.5)), [-0.5]),
    "abs": (lambda: Function(torch.abs), [0.0]),
    "maximum": (lambda: Function(lambda h: torch.maximum(h, 0.5 * h)), [0.0]),
    "relu": (nn.ReLU, [0.0]), "in place": (lambda: nn.ReLU(inplace=True), [0.0]), "leaky": (nn.LeakyReLU, [0.0]),
    "prelu": (nn.PReLU, [0.0]), "relu6": (nn.ReLU6, [0.0, 6.0]), "hardtanh": (nn.Hardtanh, [-1.0, 1.0]),
    "threshold": (lambda: nn.Threshold(0.3, 0.0), [0.3]),
}


@pytest.mark.parametrize("name", KINKED)
def test_regions_are_the_sides_of_every_kink(name: str) -> None:
    """One layer on its own input: the pattern must be the place of each coordinate among the kinks."""
    make, kinks = KINKED[name]
    h = 4 * draw(200, 2)
    projector = nn.Sequential(nn.Identity(), make()).double().eval()
    place = sum((h > kink).long() for kink in kinks)
    wanted = {tuple(row) for row in place.tolist()}
    which = regions(patterns(projector, h.clone()))
    assert int(which.max()) + 1 == len(wanted)
    pairs = {(int(r), tuple(p)) for r, p in zip(which, place.tolist(), strict=True)}
    assert len(pairs) == len(wanted)
    assert piecewise_affine(projector, h.clone(), local_maps(projector, h))


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU, nn.Tanh])
def test_smooth_projectors_have_no_regions(act: type[nn.Module]) -> None:
    projector, h = mlp(act), 0.3 * draw(30, 7)
    assert not piecewise_affine(projector, h, local_maps(projector, h))


def test_one_region_has_one_map_also_across_two_layers() -> None:
    projector = mlp()
    h = torch.cat([0.3 * draw(60, 7), 0.3 * draw(60, 7) * (1 + 1e-9)])
    which = regions(patterns(projector, h))
    maps = local_maps(projector, h)
    same = which[:60] == which[60:]
    assert same.all()
    torch.testing.assert_close(maps[:60], maps[60:])
    # and two regions, told apart by a sign in either layer, have two maps
    first = which.unique()
    chosen = torch.stack([(which == r).nonzero()[0, 0] for r in first])
    apart = torch.cdist(maps[chosen].flatten(1), maps[chosen].flatten(1)).fill_diagonal_(1)
    assert len(first) > 20
    assert float(apart.min()) > 1e-9


def test_expected_regions_are_the_mean_over_all_subsets() -> None:
    counts = torch.tensor([3, 1, 2, 1])
    labels = torch.repeat_interleave(torch.arange(4), counts).tolist()
    for m in range(8):
        subsets = list(itertools.combinations(labels, m))
        mean = sum(len(set(s)) for s in subsets) / len(subsets)
        assert expected_regions(counts, m) == pytest.approx(mean, rel=1e-12, abs=1e-12)
    assert new_region_share(counts) == pytest.approx(2 / 7)
    with pytest.raises(GeomsslError):
        expected_regions(counts, 8)


def test_nearest_leaves_out_the_row_itself_and_takes_duplicates() -> None:
    h = torch.tensor([[0.0, 0], [1, 0], [0, 0], [5, 5]])
    assert nearest(h).tolist() == [2, 0, 0, 1]


def test_bad_input_is_refused() -> None:
    sigma, directions = singular_parts(local_maps(nn.Linear(5, 2), draw(4, 5)))
    for steps in (draw(4, 5), draw(3, 1, 5), draw(4, 1, 6)):
        with pytest.raises(GeomsslError):
            local_unexplained(sigma, directions, steps, 0.0)
    with pytest.raises(GeomsslError):
        local_rank(sigma, 0.0)


def test_the_probe_on_an_mlp(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(), Options(local=40))
    json.dumps(found.to_json(), allow_nan=False)
    value = {m.name: m.value for m in found.metrics}
    assert value["local_rank"] <= 6
    assert 0 <= value["unexplained"] <= 1
    assert found.table("regions").columns["regions"][19] == value["regions"]
    assert 0 <= value["distance_random"] <= 2
    assert len(found.table("images")) == 40
    assert any("40 of 60" in note for note in found.notes)


def test_the_probe_on_a_linear_projector_agrees_with_tangent(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(projector=nn.Linear(12, 5))
    found = probe(subject, Options(draws=1))
    other = tangent.probe(subject, tangent.Options())
    assert found.metric("unexplained").value == pytest.approx(other.metric("unexplained").value, rel=1e-9)
    assert found.metric("unexplained").value == pytest.approx(found.metric("unexplained_swapped").value, rel=1e-12)
    assert found.metric("distance_random").value == pytest.approx(0, abs=1e-12)
    assert found.metric("regions").value == 1
    assert found.metric("unexplained_null").value == pytest.approx(1 - 5 / 12)
    assert any("affine" in note for note in found.notes)


def test_the_probe_on_a_smooth_projector_has_no_regions(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(projector=nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4))), Options())
    assert found.metric("regions").value is None
    assert [t.name for t in found.tables] == ["images", "distances", "spectrum"]


def test_the_probe_needs_a_projector(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(GeomsslError) as caught:
        probe(make_subject(projector=None), Options())
    assert caught.value.reason == "no-projector"
