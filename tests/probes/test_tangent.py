"""The tangent probe: planted angles, brute-force neighbours, circles of labels, and maps of projectors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes import affine
from geomssl.probes.subject import Subject
from geomssl.probes.tangent import Options, chance_and_ceiling, label_match, nearest_negatives, probe, unexplained_variance


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def brute_force(z1: Tensor, z2: Tensor) -> list[int]:
    """One anchor and one candidate at a time, in float64; the first of the best."""
    n, everyone = len(z1), torch.cat([z1, z2]).double().numpy()
    found = []
    for i in range(n):
        best, where = -math.inf, -1
        for j in range(2 * n):
            a, b = everyone[i], everyone[j]
            s = float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
            if j not in (i, n + i) and s > best + 1e-12:
                best, where = s, j
        found.append(where)
    return found


@pytest.mark.parametrize("n", [2, 3, 17, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_negatives_are_those_of_brute_force(n: int, dtype: torch.dtype) -> None:
    z1, z2 = draw(n, 4).to(dtype), draw(n, 4, seed=1).to(dtype)
    assert nearest_negatives(z1, z2).tolist() == brute_force(z1, z2)


def test_nearest_negatives_over_several_blocks_of_rows_and_columns() -> None:
    z1, z2 = draw(1300, 3), draw(1300, 3, seed=1)
    similar = torch.nn.functional.normalize(z1, dim=1) @ torch.nn.functional.normalize(torch.cat([z1, z2]), dim=1).T
    rows = torch.arange(1300)
    similar[rows, rows] = similar[rows, rows + 1300] = -2
    assert torch.equal(nearest_negatives(z1, z2), similar.argmax(dim=1))


def test_both_views_of_an_image_are_left_out() -> None:
    z = draw(20, 6)
    found = nearest_negatives(z, z + 1e-3 * draw(20, 6, seed=1))
    assert not ((found % 20) == torch.arange(20)).any()


def test_similarity_is_a_cosine_not_a_product() -> None:
    z1 = torch.tensor([[1.0, 0.0], [0.9, 0.1], [100.0, 100.0]])
    assert nearest_negatives(z1, -z1)[0] == 1


def test_equal_similarities_go_to_the_smallest_index() -> None:
    """Each image is repeated along its ray, so that every anchor has several equally similar negatives."""
    base = draw(6, 5)
    z1 = torch.cat([base, 3 * base, base]).repeat(40, 1)
    z2 = 2 * z1
    n = len(z1)
    expected = [min(j for j in range(2 * n) if j % 6 == i % 6 and j % n != i) for i in range(n)]
    assert nearest_negatives(z1, z2).tolist() == expected
    assert nearest_negatives(z1.float(), z2.float()).tolist() == expected


def test_what_float32_cannot_tell_apart_is_decided_in_float64() -> None:
    """Two negatives at angles a and a (1 + 1e-9): their cosines differ by 1e-10, a thousandth of a float32 step."""
    angle = 0.3
    turned = torch.tensor([0.0, angle * (1 + 1e-9), angle, -2.0], dtype=torch.float64)
    z1 = torch.stack([turned.cos(), turned.sin()], dim=1)
    assert nearest_negatives(z1, z1)[0] == 2
    assert nearest_negatives(z1[[0, 2, 1, 3]], z1[[0, 2, 1, 3]])[0] == 1


def test_a_row_of_zeros_has_an_answer_and_spoils_no_other() -> None:
    z1, z2 = draw(10, 3), draw(10, 3, seed=1)
    z1[4] = 0
    found = nearest_negatives(z1, z2)
    assert found[4] == 0
    assert not ((found % 10) == torch.arange(10)).any()


def test_bad_pairs_are_refused() -> None:
    for z1, z2 in ((draw(1, 3), draw(1, 3)), (draw(4, 3), draw(4, 2)), (draw(4, 3) * math.nan, draw(4, 3))):
        with pytest.raises(GeomsslError):
            nearest_negatives(z1, z2)


@pytest.mark.parametrize("theta", [0.0, 0.3, 1.0, math.pi / 2])
def test_a_direction_at_angle_theta_leaves_sin_squared_theta(theta: float) -> None:
    """delta_h = cos(theta) e_1 + sin(theta) e_3, W spanning e_1 and e_2; with d = 7 and p = 2 a transposed W would not fit."""
    turn = torch.linalg.qr(draw(7, 7)).Q
    delta = math.cos(theta) * turn[:, 0] + math.sin(theta) * turn[:, 2]
    weight = turn[:, :2] @ draw(2, 2, seed=1)
    scales = torch.tensor([1.0, -5.0, 0.01, 2.0])
    found = unexplained_variance(scales[:, None] * delta, weight)
    assert found == pytest.approx(math.sin(theta) ** 2, abs=1e-12)


def test_unexplained_variance_is_the_least_squares_residual() -> None:
    delta, weight = draw(30, 9), draw(9, 4, seed=1)
    residual = np.linalg.lstsq(weight.numpy(), delta.numpy().T, rcond=None)[1].sum()
    assert unexplained_variance(delta, weight) == pytest.approx(residual / float(delta.square().sum()), rel=1e-12)


def test_long_steps_weigh_more() -> None:
    delta = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    assert unexplained_variance(delta, torch.tensor([[1.0], [0.0]])) == pytest.approx(0.1)


def test_a_weight_of_full_rank_explains_everything() -> None:
    assert unexplained_variance(draw(30, 5), draw(5, 8, seed=1)) < 1e-25
    assert unexplained_variance(draw(30, 5), torch.zeros(5, 8)) == 1.0


def test_random_weights_leave_one_minus_p_over_d_whatever_the_data() -> None:
    steps = draw(3, 12) * torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)[:, None]
    mean = np.mean([unexplained_variance(steps, draw(12, 5, seed=s)) for s in range(400)])
    # a share of one direction has a standard deviation of sqrt(2 p (d - p) / d^2 (d + 2)) = .19: four standard errors
    assert mean == pytest.approx(1 - 5 / 12, abs=4 * 0.19 / 20)


def test_directions_under_the_cutoff_are_not_in_the_span() -> None:
    turn = torch.linalg.qr(draw(6, 6)).Q
    weight = turn[:, :2] * torch.tensor([1.0, 1e-9], dtype=torch.float64)
    step = turn[:, 1:2].T
    assert unexplained_variance(step, weight) < 1e-12
    assert unexplained_variance(step, weight, cutoff=1e-8) == pytest.approx(1.0)
    # what a float32 weight holds below its own rounding is noise
    assert unexplained_variance(step, weight.float()) == pytest.approx(1.0, abs=1e-6)


def test_the_transposed_weight_of_torch_is_refused_with_a_hint() -> None:
    layer = nn.Linear(7, 3)
    assert 0 <= unexplained_variance(draw(5, 7), layer.weight.T) <= 1
    with pytest.raises(GeomsslError, match=r"Linear\.weight\.T"):
        unexplained_variance(draw(5, 7), layer.weight)
    with pytest.raises(GeomsslError, match="zero for every image"):
        unexplained_variance(torch.zeros(5, 7), layer.weight.T)


def test_label_match_counts_images_not_views() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    assert label_match(labels, torch.tensor([1, 4, 7, 0])) == 0.75
    for indices in (torch.tensor([1, 4, 8, 0]), torch.tensor([1, 4])):
        with pytest.raises(GeomsslError):
            label_match(labels, indices)


def test_label_match_on_a_circle() -> None:
    """Points at even angles in arcs of one label: the nearest negative of all but the ends of an arc is inside it."""
    angle = torch.arange(60, dtype=torch.float64) * 2 * math.pi / 60
    z1 = torch.stack([angle.cos(), angle.sin()], dim=1)
    # view 2 is turned a little, so that the nearest negative of i is view 2 of i + 1
    z2 = torch.stack([(angle - 0.03).cos(), (angle - 0.03).sin()], dim=1)
    labels = torch.arange(60) // 12
    found = nearest_negatives(z1, z2)
    assert torch.equal(found, 60 + (torch.arange(60) + 1) % 60)
    assert label_match(labels, found) == pytest.approx(11 / 12)


def test_chance_and_ceiling_in_closed_form() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    chance, ceiling = chance_and_ceiling(labels, [torch.arange(6)])
    assert chance == pytest.approx((3 * 2 + 2 * 1) / (6 * 5))
    assert ceiling == pytest.approx(5 / 6)
    chance, ceiling = chance_and_ceiling(labels, [torch.tensor([0, 3]), torch.tensor([1, 2, 4, 5])])
    assert chance == pytest.approx(2 * (1 / 3) / 6)
    assert ceiling == pytest.approx(2 / 6)


def test_ceiling_of_batches_of_128_on_100_classes() -> None:
    labels = torch.randint(100, (12800,), generator=torch.Generator().manual_seed(0))
    assert chance_and_ceiling(labels, list(torch.arange(12800).split(128)))[1] == pytest.approx(1 - 0.99**127, abs=0.02)


class Table(nn.Module):
    """An encoder that reads h off a table of planted features, view by view."""

    dim, in_channels, group = 9, 1, None

    def __init__(self, views: list[Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", torch.cat(views))
        self.at = 0

    def forward(self, images: Tensor) -> Tensor:
        found = self.table[self.at : self.at + len(images)]
        self.at += len(images)
        return found


def on_table(make_subject: Callable[..., Subject], projector: nn.Module, n: int = 60) -> tuple[Subject, Tensor, Tensor]:
    h1, h2 = draw(n, 9), draw(n, 9, seed=1)
    subject = make_subject(n=n, encoder=Table([h1, h2]), projector=projector, dtype=torch.float64)
    return subject, h1, h2


def test_probe_of_a_linear_projector_is_the_pure_functions(make_subject: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    projector = nn.Linear(9, 4)
    subject, h1, h2 = on_table(make_subject, projector)
    found = probe(subject, Options())
    nearest = nearest_negatives(projector(h1), projector(h2))
    expected = unexplained_variance(h2 - torch.cat([h1, h2])[nearest], projector.weight.T)
    assert found.metric("unexplained").value == pytest.approx(expected, rel=1e-9)
    assert found.metric("unexplained_null").value == pytest.approx(1 - 4 / 9)
    assert found.metric("label_match").value == label_match(subject.source.labels, nearest)  # type: ignore[arg-type]
    assert found.metric("map_rank").value == 4
    interval = found.metric("unexplained").interval
    assert interval is not None
    assert interval.low < expected < interval.high
    curve = found.table("curve").columns
    shares = [u for m, u in zip(curve["map"], curve["unexplained"], strict=True) if m == "projector"]
    assert shares[0] == 1.0
    assert shares[-1] == pytest.approx(expected, rel=1e-9)
    assert shares == sorted(shares, reverse=True)
    leading = torch.linalg.svd(projector.weight.T).U[:, :2]
    delta = h2 - torch.cat([h1, h2])[nearest]
    assert shares[2] == pytest.approx(unexplained_variance(delta, leading), rel=1e-9)
    json.dumps(found.to_json(), allow_nan=False)


def test_a_norm_after_the_linear_layer_does_not_make_it_local(make_subject: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.bias)
    norm.running_mean, norm.running_var = torch.randn(4), torch.rand(4) + 0.5
    projector = nn.Sequential(nn.Linear(9, 4), norm)
    subject, _, _ = on_table(make_subject, projector)
    found = probe(subject, Options())
    assert set(found.table("curve").columns["map"]) == {"projector", "random directions"}
    assert not any(m.name == "unexplained_first_layer" for m in found.metrics)


def test_a_projector_as_wide_as_h_is_said_to_explain_by_construction(make_subject: Callable[..., Subject]) -> None:
    subject, _, _ = on_table(make_subject, nn.Linear(9, 12))
    found = probe(subject, Options())
    assert found.metric("unexplained").value == pytest.approx(0, abs=1e-20)
    assert any("by construction" in note for note in found.notes)


def test_local_maps_are_products_of_weights_and_masks() -> None:
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 5)).double()
    h = draw(11, 9)
    mask = ((h @ projector[0].weight.T + projector[0].bias) > 0).double()
    expected = torch.stack([projector[2].weight @ torch.diag(m) @ projector[0].weight for m in mask])
    torch.testing.assert_close(affine.jacobians(projector, h), expected.detach())


def test_probe_of_a_relu_projector_uses_the_map_at_each_image(make_subject: Callable[..., Subject]) -> None:
    torch.manual_seed(0)
    projector = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))
    subject, h1, h2 = on_table(make_subject, projector)
    found = probe(subject, Options())
    nearest = nearest_negatives(projector(h1), projector(h2))
    delta = h2 - torch.cat([h1, h2])[nearest]
    weights = affine.jacobians(projector, h1)
    energy = sum(unexplained_variance(d[None], w.T) * float(d.square().sum()) for d, w in zip(delta, weights, strict=True))
    assert found.metric("unexplained").value == pytest.approx(energy / float(delta.square().sum()), rel=1e-9)
    first = unexplained_variance(delta, projector[0].weight.T)
    assert found.metric("unexplained_first_layer").value == pytest.approx(first, rel=1e-9)
    curve = found.table("curve").columns
    last = [u for m, u in zip(curve["map"], curve["unexplained"], strict=True) if m == "local affine map"][-1]
    assert last == pytest.approx(found.metric("unexplained").value, rel=1e-9)


def test_a_first_layer_beside_a_skip_is_no_gate() -> None:
    class Skip(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(9, 9)

        def forward(self, h: Tensor) -> Tensor:
            return (h + self.inner(h)).relu()

    torch.manual_seed(0)
    skip = Skip().double()
    with torch.no_grad():
        skip.inner.weight[5:] = 0
    assert affine.gate(skip, draw(20, 9)) is None
    assert not affine.is_affine(skip, draw(20, 9))
    late = nn.Sequential(nn.ReLU(), nn.Linear(9, 9)).double()
    assert affine.gate(late, draw(20, 9)) is None
    plain = nn.Sequential(nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    assert torch.equal(affine.gate(plain, draw(20, 9)), plain[0].weight.T)  # type: ignore[arg-type]


def test_batches_keep_negatives_inside_and_follow_the_seed(make_subject: Callable[..., Subject]) -> None:
    def pairs(key: str = "nearest_batch", **options: int) -> list[tuple[int, int]]:
        torch.manual_seed(0)
        subject, _, _ = on_table(make_subject, nn.Linear(9, 4), n=61)
        columns = probe(subject, Options(**options)).table("pairs").columns  # type: ignore[arg-type]
        return list(zip(columns["index"], columns[key], strict=True))

    whole, batched = pairs("nearest", batch=10), pairs(batch=10)
    assert whole == pairs("nearest", batch=20)
    assert batched == pairs(batch=10)
    assert batched != pairs(batch=10, seed=1)
    assert whole != batched
    # 61 images in batches of 10 leave one over, which joins a batch: components of the pairing have at most 11 members
    group = list(range(61))
    for _ in range(61):
        for a, b in batched:
            group[a] = group[b] = min(group[a], group[b])
    assert max(group.count(g) for g in group) <= 11
    assert all(a != b for a, b in batched)


def test_probe_on_images_draws_two_views_of_the_policy(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(), Options(local=20))
    assert found == probe(make_subject(), Options(local=20))
    assert found.metric("unexplained").n == 20
    assert any("20 of 60" in note for note in found.notes)
    columns = found.table("pairs").columns
    assert columns["positive_similarity"] != [1.0] * 60
    assert all(s <= 1 + 1e-5 for s in columns["similarity"])


def test_without_labels_the_match_is_left_out_with_its_reason(make_subject: Callable[..., Subject]) -> None:
    source = make_subject().source
    bare = Resident(source.name, source.split, source.images(torch.arange(60)), None)
    found = probe(make_subject(source=bare), Options(local=10))
    assert found.metric("label_match").value is None
    assert "no labels" in str(found.metric("label_match").reason)


def test_what_cannot_be_measured_is_refused(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(GeomsslError, match="without a projector"):
        probe(make_subject(projector=None), Options())
    with pytest.raises(GeomsslError, match="at least 4"):
        probe(make_subject(n=3), Options())
    collapsed = nn.Linear(12, 4)
    nn.init.zeros_(collapsed.weight)
    with pytest.raises(GeomsslError, match="all equal"):
        probe(make_subject(projector=collapsed), Options())
