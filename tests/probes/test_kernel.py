"""Directions of augmentation against Ker(W'): planted angles, the counterexample to Prop. 4.1, and planted generators."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes import tangent
from geomssl.probes.directions import Along, Line, Scaled, gradual, lines, parts
from geomssl.probes.generator_fit import fit_generator
from geomssl.probes.kernel import Options, _fit, along_across, least_share, let_through, probe, random_shares
from geomssl.probes.passing import seen
from geomssl.probes.subject import Subject
from geomssl.seeding import generator
from geomssl.transforms import Brightness, Compose, CyclicRotations, Grayscale, HorizontalFlip, ResizedCrop, policy


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_exp(matrix)


@pytest.mark.parametrize("theta", [0.0, 0.4, 1.2, math.pi / 2])
def test_a_direction_at_angle_theta_passes_by_cos_squared(theta: float) -> None:
    """W = U diag(3, 1) R in d = 6: e_1 is amplified by 3, e_2 by 1, so along e_2 the amplified share is a ninth."""
    turn = torch.linalg.qr(draw(6, 6)).Q
    weight = turn[:, :2] @ torch.diag(torch.tensor([3.0, 1.0]).double()) @ torch.linalg.qr(draw(2, 2, seed=1)).Q
    for column, gain in ((0, 1.0), (1, 1 / 9)):
        v = 5 * (math.cos(theta) * turn[:, column] + math.sin(theta) * turn[:, 4])[None]
        passed, amplified = let_through(v, weight)
        assert passed == pytest.approx(math.cos(theta) ** 2, abs=1e-14)
        assert amplified == pytest.approx(gain * math.cos(theta) ** 2, abs=1e-14)


def test_what_passes_is_what_least_squares_explains() -> None:
    v, weight = draw(30, 9), draw(9, 4, seed=1)
    assert let_through(v, weight)[0] == pytest.approx(1 - tangent.unexplained_variance(v, weight), rel=1e-12)
    direct = float((v @ weight).square().sum()) / float(np.linalg.norm(weight.numpy(), 2) ** 2 * v.square().sum())
    assert let_through(v, weight)[1] == pytest.approx(direct, rel=1e-12)


def test_bad_directions_are_refused() -> None:
    for v, weight in ((draw(5, 4), draw(3, 4)), (torch.zeros(5, 4), draw(4, 2)), (draw(5, 4) * math.nan, draw(4, 2))):
        with pytest.raises(GeomsslError):
            let_through(v, weight)


def test_the_counterexample_to_only_if() -> None:
    """W = e_1, h_1 = (1, 0), h_2 = (2, 1): not colinear, similarity 1, and yet v = (1, 1) is not in the kernel."""
    weight, h1, h2 = torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 1.0]])
    z1, z2 = h1 @ weight, h2 @ weight
    assert float(torch.nn.functional.cosine_similarity(h1, h2)) < 0.9
    assert float(torch.nn.functional.cosine_similarity(z1, z2)) == 1
    assert let_through(h2 - h1, weight)[0] == pytest.approx(0.5)
    along, across = along_across(z2 - z1, z1)
    assert (float(along), float(across)) == (1.0, 0.0)


def test_along_and_across_share_the_energy_and_fix_the_cosine() -> None:
    z, moved = draw(50, 4), draw(50, 4, seed=1)
    along, across = along_across(moved, z)
    torch.testing.assert_close(along + across, moved.square().sum(dim=1))
    signed = (moved * z).sum(dim=1) / z.norm(dim=1)
    cosine = (z.norm(dim=1) + signed) / ((z.norm(dim=1) + signed).square() + across).sqrt()
    torch.testing.assert_close(cosine, torch.nn.functional.cosine_similarity(z, z + moved))
    torch.testing.assert_close(along, signed.square())
    assert along_across(moved, torch.zeros(50, 4))[0].tolist() == [0.0] * 50


def test_least_share_is_reached_by_the_trailing_directions_and_by_no_other() -> None:
    v = draw(40, 6) * torch.tensor([5.0, 4, 3, 2, 1, 0.5]).double()
    right = torch.linalg.svd(v)[2]
    for r in (1, 2, 5):
        least = least_share(v, r)
        assert let_through(v, right[6 - r :].T)[0] == pytest.approx(least, rel=1e-10)
        assert all(let_through(v, draw(6, r, seed=s))[0] > least for s in range(50))
    assert least_share(draw(3, 6), 2) == 0
    assert least_share(v, 6) == pytest.approx(1)


def test_random_subspaces_let_rank_over_d_through() -> None:
    v = draw(3, 10) * torch.tensor([9.0, 1.0, 0.1]).double()[:, None]
    found = random_shares(torch.stack([v.T @ v, torch.eye(10).double()]), 4, 600, 0)
    # the share of one direction has a standard deviation of sqrt(2 r (d - r) / d^2 (d + 2)) = .2: four standard errors
    assert float(found[:, 0].mean()) == pytest.approx(0.4, abs=4 * 0.2 / math.sqrt(600))
    torch.testing.assert_close(found[:, 1], torch.full((600,), 0.4).double())


def test_columns_of_a_matrix_pass_as_its_columns_do_alone() -> None:
    maps, matrix = draw(3, 2, 7), draw(7, 5, seed=1)
    alone = [let_through(matrix.T, one.T) for one in maps]
    passed, amplified = seen(maps, 1e-12).columns(matrix)
    assert passed == pytest.approx(sum(a for a, _ in alone) / 3, rel=1e-12)
    assert amplified == pytest.approx(sum(b for _, b in alone) / 3, rel=1e-12)


def test_energies_of_one_map_an_image() -> None:
    maps, v = draw(4, 2, 7), draw(4, 7, seed=1)
    passed, amplified = seen(maps, 1e-12).energies(v)
    for i in range(4):
        one = let_through(v[i][None], maps[i].T)
        assert float(passed[i] / v[i].square().sum()) == pytest.approx(one[0], rel=1e-12)
        assert float(amplified[i] / v[i].square().sum()) == pytest.approx(one[1], rel=1e-12)


def test_a_planted_generator_is_found() -> None:
    """v = eps G h without noise: G itself, whatever its shape, and R2 = 1 by construction."""
    g, h, eps = draw(6, 6), draw(60, 6, seed=1), draw(60, seed=2)
    found = fit_generator(h, eps[:, None] * (h @ g.T), eps)
    torch.testing.assert_close(found.matrix, g, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found.step(h[:5], eps[:5]), eps[:5, None] * (h[:5] @ g.T), rtol=1e-7, atol=1e-8)


def test_a_rotation_gives_its_generator_times_the_mean_of_sinc() -> None:
    """exp(eps J) h for every h at +eps and -eps: least squares gives sum eps sin eps / sum eps^2 J exactly."""
    turn = torch.linalg.qr(draw(4, 4)).Q
    flat = torch.zeros(4, 4).double()
    flat[0, 1], flat[1, 0] = -1, 1
    j = turn @ flat @ turn.T
    half = 0.6
    h = draw(40, 4, seed=1).repeat(2, 1)
    eps = torch.tensor([half, -half], dtype=torch.float64).repeat_interleave(40)
    v = torch.stack([expm(float(e) * j) @ row - row for e, row in zip(eps, h, strict=True)])
    found = fit_generator(h, v, eps, penalties=(0.0,))
    torch.testing.assert_close(found.matrix, j * math.sin(half) / half, rtol=1e-12, atol=1e-12)
    # the ridge that leave-one-out chooses stays close by
    torch.testing.assert_close(fit_generator(h, v, eps).matrix, found.matrix, rtol=0, atol=0.01)


def test_flow_is_the_matrix_exponential() -> None:
    g, h, eps = 3 * draw(5, 5), draw(7, 5, seed=1), 2 * draw(7, seed=2)
    found = fit_generator(draw(50, 5, seed=3), draw(50, 5, seed=3) @ g.T, torch.ones(50))
    flow = found.flow(h, eps)
    assert flow is not None
    by_hand = torch.stack([expm(float(e) * found.matrix) @ row - row for e, row in zip(eps, h, strict=True)])
    torch.testing.assert_close(flow, by_hand, rtol=1e-9, atol=1e-9)
    assert found.flow(h, 1e4 * eps) is None


def test_the_ridge_keeps_noise_from_being_fitted() -> None:
    """v that knows nothing of h: the fit predicts next to nothing on others, where plain least squares would be far off."""
    h, v, eps = draw(40, 30), draw(40, 30, seed=1), torch.ones(40).double()
    found = fit_generator(h, v, eps)
    others = draw(40, 30, seed=2)
    plain = torch.linalg.lstsq(h, v).solution
    assert float((others @ plain).square().sum()) > 20 * float(found.step(others, eps).square().sum())
    for bad in ((h, v[:, :5], eps), (h, v, eps[:5]), (h[:3], v[:3], eps[:3]), (h, v, 0 * eps)):
        with pytest.raises(GeomsslError):
            fit_generator(*bad)


def test_half_a_crop_is_half_way_to_the_whole_image() -> None:
    part, size = ResizedCrop((0.1, 0.5)), (16, 16)
    rows = [Scaled(part, s).sample(40, torch.Generator().manual_seed(0), size) for s in (0.0, 0.5, 1.0)]
    assert rows[0].tolist() == [[0, 0, 16, 16]] * 40
    torch.testing.assert_close(rows[1], (rows[0] + rows[2]) / 2)
    torch.testing.assert_close(rows[2], part.sample(40, torch.Generator().manual_seed(0), size))
    images = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Scaled(part, 0.0)(images, rows[0]), images)


def test_parts_that_do_nothing_on_one_channel_are_left_out() -> None:
    whole = Compose([HorizontalFlip(), Brightness(0.4), Brightness(0.2), Grayscale(0.2), CyclicRotations(4)])
    found, idle = parts(whole, 1)
    assert list(found) == ["horizontal-flip", "brightness", "brightness-2", CyclicRotations(4).name]
    assert idle == ["grayscale"]
    assert len(parts(whole, 3)[0]) == 5
    assert [gradual(p, 1) for p in found.values()] == [False, True, True, False]
    assert [line.name for line in lines(whole, 1, (8, 8), 0)] == ["brightness", "brightness-2"]
    assert [line.name for line in lines(policy("simclr"), 1, (8, 8), 0)] == [
        "resized-crop", "jitter brightness", "jitter contrast",
    ]


def test_a_line_is_drawn_evenly_between_its_shares_and_moves_one_parameter() -> None:
    part = Brightness(0.4)
    line = Line("brightness", part, 0, "factor", -0.1, 0.3)
    drawn = Along(line, 0.5, 1.0).sample(4000, torch.Generator().manual_seed(0), (8, 8))[:, 0]
    up = drawn > 0
    assert float(up.double().mean()) == pytest.approx(0.75, abs=0.03)
    assert 0.15 <= float(drawn[up].min()) < 0.16 < 0.29 < float(drawn[up].max()) <= 0.3
    assert -0.1 <= float(drawn[~up].min()) < float(drawn[~up].max()) <= -0.05
    images = 0.5 * torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    eps = torch.tensor([[0.0], [0.2], [-0.1]])
    torch.testing.assert_close(Along(line, 0, 1)(images, eps), images * (1 + eps)[:, :, None, None])


def test_a_crop_line_is_the_central_box() -> None:
    part = ResizedCrop((0.25, 1.0))
    (line,) = lines(part, 1, (16, 16), 0)
    assert (line.low, line.column) == (0.0, None)
    assert 0.4 < line.high <= 0.52
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    moved = Along(line, 0, 1)(images, torch.tensor([[0.0], [0.5]]))
    torch.testing.assert_close(moved[0], images[0])
    torch.testing.assert_close(moved[1], part(images[1:], torch.tensor([[4.0, 4.0, 8.0, 8.0]]))[0])


def test_the_probe_on_a_linear_projector(make_subject: Callable[..., Subject]) -> None:
    layer = nn.Linear(12, 5)
    subject = make_subject(projector=layer, policy=policy("simclr"))
    found = probe(subject, Options(draws=20, strengths=(0.5,)))
    views = [subject.features(torch.arange(60), "h", view=(subject.policy, 0, k)).double() for k in (1, 2)]
    expected = let_through(views[1] - views[0], layer.weight.T)
    assert found.metric("share").value == pytest.approx(expected[0], rel=1e-6)
    assert found.metric("amplified").value == pytest.approx(expected[1], rel=1e-6)
    assert found.metric("nullity").value == 7
    json.dumps(found.to_json(), allow_nan=False)
    assert found.metric("share_null").value == pytest.approx(5 / 12)
    assert set(found.table("strengths").columns["augmentation"]) == {"resized-crop", "horizontal-flip", "jitter"}
    assert found.table("generators").columns["generator"] == ["resized-crop", "jitter brightness", "jitter contrast"]
    assert any("grayscale" in note for note in found.notes)
    statements = found.table("propositions").columns
    assert {s[:3] for s in statements["proposition"]} == {"4.1", "4.2", "4.3"}


def test_a_projector_whose_kernel_holds_the_directions(make_subject: Callable[..., Subject]) -> None:
    """W is put into the null space of the measured v: nothing passes, similarity is 1, and 4.1 and 4.2 hold."""
    subject = make_subject(n=8)
    views = [subject.features(torch.arange(8), "h", view=(subject.policy, 0, k)).double() for k in (1, 2)]
    v = views[1] - views[0]
    layer = nn.Linear(12, 3, bias=False).double()
    layer.weight.data = torch.linalg.svd(v, full_matrices=True)[2][9:]
    found = probe(make_subject(n=8, projector=layer), Options(draws=20))
    assert found.metric("share").value == pytest.approx(0, abs=1e-9)
    assert found.metric("similarity").value == pytest.approx(1, abs=1e-5)
    rows = list(zip(*found.table("propositions").columns.values(), strict=True))
    assert all(row[4] for row in rows if "share let through is 0" in row[1] and row[0] == "4.1")
    assert next(row for row in rows if row[0] == "4.2")[2:] == (8.0, 9.0, True)


def test_the_probe_on_an_mlp_uses_its_local_maps(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(), Options(draws=20, local=20, strengths=(1.0,)))
    assert found.metric("share").n == 20
    assert found.metric("similarity").n == 60
    assert any("not affine" in note for note in found.notes)


class Blind(nn.Module):
    """An encoder that sees the brightest pixel's place only, which a brighter image does not change."""

    dim, in_channels, group = 12, 1, None

    def forward(self, images: Tensor) -> Tensor:
        flat = images.flatten(1)
        flat = (flat - flat.mean(dim=1, keepdim=True)).sign()
        return flat[:, 20:32] + 0.1 * torch.arange(12)


def test_an_encoder_that_the_policy_does_not_move(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(encoder=Blind()), Options(draws=20, strengths=(1.0,)))
    assert any("simclr" in note for note in found.notes)
    # what is left of the policy that stands in: jitter may not move it either, and then it has no share
    assert found.metric("share").value is not None


def test_the_probe_refuses_bad_options(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(GeomsslError):
        probe(make_subject(), Options(strengths=(1.5,)))
    with pytest.raises(GeomsslError) as caught:
        probe(make_subject(projector=None), Options())
    assert caught.value.reason == "no-projector"


def test_columns_of_a_square_matrix_are_not_its_rows() -> None:
    """G sends everything to e_1: its one direction lies inside W = e_1 and outside W = e_2, whatever it reads from h."""
    g = torch.zeros(4, 4).double()
    g[0] = torch.tensor([0.0, 3.0, 1.0, 2.0])
    for axis, share in ((0, 1.0), (1, 0.0)):
        assert seen(torch.eye(4).double()[axis][None, None], 1e-12).columns(g)[0] == pytest.approx(share)


def test_directions_under_the_cutoff_do_not_pass() -> None:
    """W' = diag(1, 1e-9): its second direction is rounding, so that nothing along it is let through, alone or in a matrix."""
    w = torch.diag(torch.tensor([1.0, 1e-9]).double())
    v = torch.tensor([[0.0, 1.0]]).double()
    assert let_through(v, w, cutoff=1e-8) == (0.0, 0.0)
    assert let_through(v, w, cutoff=1e-10)[0] == pytest.approx(1.0)
    assert seen(w[None], 1e-8).columns(v.T) == (0.0, 0.0)


def test_r2_of_a_generator_is_of_images_and_eps_that_the_fit_has_not_met(make_subject: Callable[..., Subject]) -> None:
    """Fewer images than numbers in a row of G: in the fit's own half R2 is near 1, and only the other half tells."""
    subject, rows = make_subject(n=20, policy=policy("simclr")), torch.arange(20)
    line = lines(subject.policy, 1, (8, 8), 0)[1]
    h = subject.features(rows, "h").double()
    found = _fit(subject, rows, h, line, Options(), 1e-7)
    assert found is not None
    train, held = (half.sort().values for half in torch.randperm(20, generator=generator(0, "kernel-halves")).tensor_split(2))
    for name, near, far in (("small", 0.0, 0.5), ("larger", 0.5, 1.0)):
        view = (Along(line, near, far), 0, 2)
        eps = subject.view_params(held, "own", view)[:, 0].double()
        assert float(eps.abs().max()) <= far * max(line.high, -line.low) * (1 + 1e-6)
        v = subject.features(held, "h", view=view).double() - h[held]
        left = v - torch.stack([e * (found.found.matrix @ row) for e, row in zip(eps, h[held], strict=True)])
        assert found.r2[name][0] == pytest.approx(1 - float(left.square().sum() / v.square().sum()), rel=1e-9)
    assert not set(train.tolist()) & set(held.tolist())
