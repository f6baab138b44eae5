"""Fitted actions: planted maps come back, permutations are recognised, and nothing is found where there is nothing."""

import math

import pytest
import torch
from torch import nn

from geomssl import encoders
from geomssl.encoders.cnn import C4CNN
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.errors import GeomsslError
from geomssl.probes.equivariance import equivariance_error
from geomssl.probes.fitted import (
    FittedActions,
    Fitter,
    agreement,
    fit_action,
    fit_orbit,
    group_law,
    matrix_of,
    permutation_distance,
)
from geomssl.probes.irreps import decompose, irreps, projector
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations, Dihedral, Flips, Translations
from geomssl.transforms.actions import action

C4, D4 = CyclicRotations(4), Dihedral(4)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed, "test-fitted"), dtype=torch.float64)


def rotation(d, seed=1):
    """A random orthogonal matrix."""
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def products(group):
    every = group.elements()
    return torch.stack([group.compose(g.expand(len(every), 1), every)[:, 0] for g in every]).long()


def pooled(encoder, images):
    return encoder.fibres(images).mean((3, 4)).flatten(1)


def orbit(encoder, group, n=200, size=9, seed=3):
    """Features (|G|, n, d) of turned noise, averaged over places."""
    images = torch.rand(n, 1, size, size, generator=generator(seed, "test-images"), dtype=torch.float64)
    with torch.no_grad():
        return torch.stack([pooled(encoder, group(images, g.expand(n, 1))) for g in group.elements()])


def build(name, widths=(4, 6, 8)):
    with seeded(0, "test-fitted-encoder"):
        made = encoders.build(name, in_channels=1, widths=widths).eval().double()
        # Norms with statistics of their own, as after training.
        for norm in made.norms:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return made.requires_grad_(False)


class D4Net(nn.Module):
    """Two group convolutions over D4, a plain module with fibres (n, 4, 8, h, w)."""

    def __init__(self):
        super().__init__()
        with seeded(0, "test-d4"):
            self.lift = GroupConv2d(1, 4, 3, D4, lifting=True, padding=1)
            self.conv = GroupConv2d(4, 4, 3, D4, padding=1)
        self.double().requires_grad_(False)

    def fibres(self, images):
        return self.conv(self.lift(images).relu()).relu()


@pytest.mark.parametrize("method", ["low-rank", "procrustes"])
def test_a_planted_rotation_with_an_offset_comes_back(method):
    x, matrix, offset = normal(300, 12) @ normal(12, 12, seed=5), rotation(12), normal(12, seed=7)
    found = fit_action(x, x @ matrix.T + offset, method=method)
    torch.testing.assert_close(found.matrix, matrix, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.offset, offset, atol=1e-8, rtol=0)
    torch.testing.assert_close(found(x), x @ matrix.T + offset, atol=1e-8, rtol=0)
    assert found.r2_held_out == pytest.approx(1, abs=1e-12)
    assert found.interval.low == pytest.approx(1, abs=1e-12)
    assert found.rank == 12
    assert found.effective_rank == pytest.approx(12)
    assert found.r2_null < 0.05
    assert found.r2_identity < 0.5


def test_least_squares_is_the_normal_equations_on_the_training_half():
    x, y = normal(400, 6), normal(400, 6, seed=2) + normal(400, 6) @ normal(6, 6, seed=3)
    fitter = Fitter(x)
    found = fitter.fit(y, rank=6)
    rows = fitter.train
    design = torch.cat([x[rows], torch.ones(len(rows), 1, dtype=x.dtype)], dim=1)
    solved = torch.linalg.lstsq(design, y[rows]).solution
    torch.testing.assert_close(found.matrix, solved[:6].T)
    torch.testing.assert_close(found.offset, solved[6])
    held = y[fitter.held]
    error = held - torch.cat([x[fitter.held], torch.ones(len(held), 1, dtype=x.dtype)], 1) @ solved
    expected = 1 - float(error.square().sum() / (held - held.mean(0)).square().sum())
    assert found.r2_held_out == pytest.approx(expected, abs=1e-12)
    assert found.interval.low < expected < found.interval.high
    assert sorted(fitter.train.tolist() + fitter.held.tolist()) == list(range(400))


def test_ridge_solves_its_own_normal_equations():
    x, y = normal(200, 5), normal(200, 5, seed=2) + normal(200, 5)
    fitter = Fitter(x)
    found = fitter.fit(y, rank=5, ridge=0.3)
    a = x[fitter.train] - x[fitter.train].mean(0)
    b = y[fitter.train] - y[fitter.train].mean(0)
    penalty = 0.3 * a.square().sum() / 5
    expected = torch.linalg.solve(a.T @ a + penalty * torch.eye(5, dtype=a.dtype), a.T @ b).T
    torch.testing.assert_close(found.matrix, expected)


def test_procrustes_is_nearest_among_maps_that_keep_lengths():
    x = normal(300, 7)
    y = x @ rotation(7).T * 2.5 + 0.3 * normal(300, 7, seed=9)
    fitter = Fitter(x)
    found = fitter.fit(y, "procrustes")
    torch.testing.assert_close(found.matrix @ found.matrix.T, torch.eye(7, dtype=x.dtype))
    a, b = (v[fitter.train] - v[fitter.train].mean(0) for v in (x, y))
    best = (b - a @ found.matrix.T).square().sum()
    for seed in range(20):
        turn = torch.matrix_exp(0.05 * (normal(7, 7, seed=seed) - normal(7, 7, seed=seed).T))
        assert (b - a @ (turn @ found.matrix).T).square().sum() > best


def test_scale_and_offset_of_the_features_change_no_figure():
    x, y = normal(120, 10), normal(120, 10) @ normal(10, 10, seed=4) + normal(120, 10, seed=6)
    plain, moved = fit_action(x, y), fit_action(1e3 * x + 50, 1e3 * y - 7)
    for key in ("r2_held_out", "r2_train", "r2_identity", "r2_null", "effective_rank"):
        assert getattr(moved, key) == pytest.approx(getattr(plain, key), rel=1e-8), key
    torch.testing.assert_close(moved.matrix, plain.matrix, rtol=1e-8, atol=1e-9)
    assert moved.rank == plain.rank


def test_with_fewer_images_than_dimensions_only_the_held_out_figure_is_honest():
    x, y = normal(40, 64), normal(40, 64, seed=8)
    found = fit_action(x, y, rank=64)
    assert found.r2_train == pytest.approx(1, abs=1e-9)
    assert found.r2_held_out < 0.1
    assert "20 training pairs are few against d = 64" in found.warning
    assert fit_action(x, y).r2_held_out == pytest.approx(0, abs=0.2)
    assert fit_action(normal(400, 8), normal(400, 8, seed=1)).warning is None


def test_a_truncation_is_not_chosen_on_the_held_out_pairs():
    x, y = normal(60, 30), normal(60, 30, seed=8)
    fitter = Fitter(x)
    again = y.clone()
    again[fitter.held] = normal(len(fitter.held), 30, seed=11) @ normal(30, 30, seed=12) * 9
    torch.testing.assert_close(fitter.fit(again).matrix, fitter.fit(y).matrix, rtol=0, atol=0)


def test_the_null_knows_that_pairs_are_pairs():
    x = normal(300, 10)
    found = fit_action(x, x @ rotation(10).T, draws=8)
    assert len(found.nulls) == 8
    assert max(found.nulls) < 0.02
    assert found.r2_held_out > 0.999999
    full = fit_action(x, x @ rotation(10).T, rank=10, draws=8)
    # Noise that is fitted with r of n directions loses about r / n on other noise.
    assert -0.2 < full.r2_null < 0


def test_a_span_that_is_deficient_is_left_alone_outside():
    low = normal(200, 5) @ normal(5, 9, seed=2)
    x = torch.cat([low, torch.full((200, 1), 3.0, dtype=low.dtype)], 1)
    order = torch.randperm(10, generator=generator(4, "test-order"))
    found = fit_action(x, x[:, order])
    assert found.rank == 5
    assert found.r2_held_out == pytest.approx(1, abs=1e-10)
    assert permutation_distance(found)[0] == pytest.approx(0, abs=1e-7)
    assert agreement(found, torch.eye(10, dtype=x.dtype)[order]) == pytest.approx(0, abs=1e-7)
    away = torch.eye(10, dtype=x.dtype) - found.basis @ found.basis.T
    assert float((found.matrix @ away).abs().max()) < 1e-9


def test_the_nearest_permutation_is_the_one_that_was_planted_and_its_distance_is_the_norm():
    x = normal(200, 8)
    order = torch.tensor([3, 0, 1, 2, 7, 6, 5, 4])
    found = fit_action(x, x[:, order] + 0.05 * normal(200, 8, seed=3))
    distance, which = permutation_distance(found)
    assert which.tolist() == order.tolist()
    permutation = torch.eye(8, dtype=x.dtype)[order]
    assert distance == pytest.approx(float((found.matrix - permutation).norm()) / math.sqrt(8), rel=1e-9)
    assert distance == pytest.approx(agreement(found, permutation), rel=1e-9)
    assert permutation_distance(fit_action(x, x @ rotation(8).T))[0] > 0.5


def test_quarter_turns_of_a_c4_network_are_recovered():
    features, table = orbit(build("c4-cnn"), C4), products(C4)
    fitter = Fitter(features[0])
    for k in (1, 2, 3):
        found = fitter.fit(features[k])
        declared = matrix_of(action("regular", C4), torch.tensor([[float(k)]], dtype=torch.float64), (8, 4, 1, 1), (9, 9))
        assert found.r2_held_out > 0.999999
        assert permutation_distance(found)[0] < 1e-6
        assert agreement(found, declared) < 1e-6
        if k != 2:
            back = torch.tensor([[float(4 - k)]], dtype=torch.float64)
            assert agreement(found, matrix_of(action("regular", C4), back, (8, 4, 1, 1), (9, 9))) > 0.5
    law = fit_orbit(features, table)
    assert law.judgeable
    for matrices in (law.least_squares, law.procrustes()):
        assert float(group_law(matrices, table, law.basis).max()) < 1e-6


def test_an_ordinary_network_has_no_such_action():
    features, table = orbit(build("cnn"), C4), products(C4)
    found = Fitter(features[0]).fit(features[1])
    assert found.r2_held_out < 0.95
    assert permutation_distance(found)[0] > 0.3
    fitted = fit_orbit(features, table)
    assert float(group_law(fitted.least_squares, table, fitted.basis).max()) > 0.1


def test_matrices_multiply_in_the_order_of_the_group():
    features, table = orbit(D4Net(), D4, n=120, size=7), products(D4)
    fitted = fit_orbit(features, table)
    assert float(group_law(fitted.least_squares, table, fitted.basis).max()) < 1e-6
    # D4 does not commute: the transposed table is the opposite order.
    assert float(group_law(fitted.least_squares, table.T, fitted.basis).max()) > 0.5
    for g in (1, 5):
        params = torch.tensor([[float(g)]], dtype=torch.float64)
        declared = matrix_of(action("regular", D4), params, (4, 8, 1, 1), (7, 7))
        on_span = declared @ fitted.basis
        assert float((fitted.least_squares[g] @ fitted.basis - on_span).norm() / on_span.norm()) < 1e-6


def test_upright_images_alone_may_not_span_what_turned_ones_do():
    x = torch.cat([normal(100, 2), torch.zeros(100, 2, dtype=torch.float64)], 1)
    features = torch.stack([x, x[:, [2, 3, 0, 1]]])
    table = torch.tensor([[0, 1], [1, 0]])
    swap = torch.eye(4, dtype=torch.float64)[[2, 3, 0, 1]]
    fitted = fit_orbit(features, table)
    torch.testing.assert_close(fitted.least_squares[1], swap, atol=1e-10, rtol=0)
    assert Fitter(x).fit(features[1]).rank == 2


def test_procrustes_of_an_orbit_is_that_of_its_pairs():
    features, table = orbit(build("cnn"), C4, n=60), products(C4)
    fitted = fit_orbit(features, table)
    x = (features - fitted.mean).flatten(0, 1)
    for g, matrix in enumerate(fitted.procrustes()):
        y = (features - fitted.mean)[table[g]].flatten(0, 1)
        left, _, right = torch.linalg.svd(y.T @ x @ fitted.basis, full_matrices=False)
        torch.testing.assert_close(matrix, left @ right @ fitted.basis.T, atol=1e-8, rtol=0)
        solved = torch.linalg.lstsq(x @ fitted.basis, y).solution.T
        torch.testing.assert_close(fitted.least_squares[g] @ fitted.basis, solved, atol=1e-8, rtol=0)


def test_few_rows_are_not_judged():
    features = torch.stack([normal(10, 30), normal(10, 30, seed=1)])
    fitted = fit_orbit(features, torch.tensor([[0, 1], [1, 0]]))
    # Any features would meet the law here.
    assert float(group_law(fitted.least_squares, torch.tensor([[0, 1], [1, 0]]), fitted.basis).max()) < 1e-6
    assert not fitted.judgeable


@pytest.mark.parametrize("group", [C4, CyclicRotations(5), CyclicRotations(8), D4, Dihedral(3), Dihedral(1), Flips()])
def test_characters_are_orthogonal_and_the_regular_representation_holds_each_irrep_dimension_times(group):
    found, table = irreps(group), products(group)
    order = group.order
    regular = torch.zeros(order, order, order, dtype=torch.float64)
    for g in range(order):
        regular[g, table[g], torch.arange(order)] = 1
    onto = [projector(regular, irrep) for irrep in found]
    torch.testing.assert_close(sum(onto), torch.eye(order, dtype=torch.float64))
    for i, (p, irrep) in enumerate(zip(onto, found, strict=True)):
        torch.testing.assert_close(p @ p, p)
        for other in onto[i + 1 :]:
            assert float((p @ other).abs().max()) < 1e-12
        # A real irrep of complex type (a frequency of c_n) holds two complex ones of multiplicity one each.
        complex_type = irrep.name.startswith("frequency")
        assert float(p.trace()) / irrep.dimension == pytest.approx(1 if complex_type else irrep.dimension)
        for h in range(order):
            inverse = int((table[h] == 0).nonzero())
            conjugate = table[table[h], inverse]
            torch.testing.assert_close(irrep.character[conjugate], irrep.character)


def test_irreps_of_a_planted_representation_are_counted():
    # three trivial, one sign and two frequencies, in a random frame
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    blocks = torch.block_diag(*[torch.ones(1, 1)] * 3, -torch.ones(1, 1), turn, turn).double()
    frame = rotation(8)
    step = frame @ blocks @ frame.T
    matrices = torch.stack([torch.linalg.matrix_power(step, k) for k in range(4)])
    x = normal(500, 8)
    moved = torch.stack([x @ m.T for m in matrices])
    parts = {p.irrep.name: p for p in decompose(matrices, irreps(C4), x, moved, 0.1 * moved)}
    assert {k: round(p.multiplicity, 9) for k, p in parts.items()} == {"trivial": 3, "sign": 1, "frequency 1": 2}
    assert all(p.residual < 1e-9 and p.idempotence < 1e-9 for p in parts.values())
    assert all(p.error == pytest.approx(0.1) for p in parts.values())
    assert sum(p.variance for p in parts.values()) == pytest.approx(1)
    assert parts["trivial"].variance == pytest.approx(float((x @ frame[:, :3]).square().sum() / x.square().sum()))
    spoilt = decompose(0.8 * matrices, irreps(C4), x, moved, moved)
    assert max(p.residual for p in spoilt) > 0.1
    assert min(p.idempotence for p in spoilt) > 0.1


def test_no_irreps_of_what_is_no_finite_group():
    assert irreps(Translations()) == []


def test_fitted_actions_stand_in_as_declared_ones():
    encoder = build("c4-cnn")
    images = torch.rand(80, 1, 9, 9, generator=generator(0, "test-images"), dtype=torch.float64)
    params = C4.elements()[1:]
    f = lambda x: pooled(encoder, x)  # noqa: E731
    with torch.no_grad():
        fitter = Fitter(f(images), held_out=0.2)
        fits = [fitter.fit(f(C4(images, g.expand(80, 1)))) for g in params]
    every = FittedActions(C4, params, fits)
    found = equivariance_error(f, images, C4, params.double(), every, resamples=100)
    assert float(found.total.max()) < 0.05
    assert not bool(found.exact.any())
    one = equivariance_error(f, images, C4, params[:1].double(), fits[0], resamples=100)
    assert float(one.total[0]) == pytest.approx(float(found.total[0]), rel=1e-6)
    wrong = equivariance_error(f, images, C4, params[2:].double(), fits[0], resamples=100)
    assert float(wrong.total[0]) > 0.5
    features = f(images)
    torch.testing.assert_close(every(features, torch.zeros(80, 1), (9, 9)), features, rtol=0, atol=0)
    with pytest.raises(GeomsslError, match="not fitted"):
        FittedActions(C4, params[:1], fits[:1])(features, torch.full((80, 1), 2.0), (9, 9))


def test_features_of_any_shape_move():
    x = normal(50, 2, 3)
    found = fit_action(x, x.flip(1))
    torch.testing.assert_close(found(x), x.flip(1), atol=1e-9, rtol=0)
    assert found.d == 6


def test_exactness_of_c4_holds_in_float32_to_rounding():
    with seeded(1, "test-fitted-float"):
        encoder = C4CNN(1, C4CNN.Config(widths=(2, 3, 4))).eval().requires_grad_(False)
    images = torch.rand(300, 1, 8, 8, generator=generator(0, "test-images"))
    fitter = Fitter(pooled(encoder, images))
    found = fitter.fit(pooled(encoder, C4(images, torch.ones(300, 1))))
    assert found.r2_held_out > 1 - 1e-6
    assert permutation_distance(found)[0] < 1e-2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit_action(normal(5, 3), normal(5, 3)), "n >= 8"),
        (lambda: fit_action(normal(20, 3), normal(19, 3)), "(20, 3)"),
        (lambda: fit_action(normal(20, 3), normal(20, 4)), "(20, 3)"),
        (lambda: fit_action(normal(20, 3), torch.ones(20, 3)), "all equal"),
        (lambda: fit_action(torch.ones(20, 3), normal(20, 3)), "all equal"),
        (lambda: fit_action(normal(20, 3), normal(20, 3) / 0), "finite"),
        (lambda: fit_action(normal(20, 3), normal(20, 3), held_out=1.0), "held_out = 1.0"),
        (lambda: fit_action(normal(20, 3), normal(20, 3), method="procustes"), "'procrustes'"),
        (lambda: fit_action(normal(20, 3), normal(20, 3), rank=0), "rank = 0"),
        (lambda: fit_action(normal(20, 3), normal(20, 3), ridge=-1.0), "ridge = -1"),
        (lambda: fit_action(normal(20, 3), normal(20, 3))(normal(2, 4)), "d = 3"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
