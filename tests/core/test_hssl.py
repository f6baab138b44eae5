"""The whole H-SSL objective: where base spaces lie, which pairs are drawn, and its losses written out again in float64."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import shortest_path
from torch import nn

from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.losses import info_nce
from geomssl.objectives.base import Batch, View
from geomssl.objectives.fibres import draw_one, draw_pair, finite, line, p4, patch, plane
from geomssl.objectives.hssl import HSSL
from geomssl.transforms import CyclicRotations, Dihedral, Flips, Scales, Translations, policy


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


class Linear(Encoder):
    """A 1x1 convolution to (C, G, H, W): a test can say every number."""

    def __init__(self, c=3, g=4, group=None, dim=None):
        super().__init__()
        self.group, self.dim, self.in_channels, self.shape = group, dim or c, 1, (c, g)
        self.conv = nn.Conv2d(1, c * g, 1)

    def fibres(self, images):
        return self.conv(images).tanh().unflatten(1, self.shape)

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


class Scaled(Linear):
    scales = Scales((1.0, 1.25, 1.5, 2.0))


def made(objective, n=5, size=4, draw=None):
    images = torch.rand(n, 1, size, size)
    views = {}
    for k, spec in enumerate(objective.views):
        params = spec.policy.sample(n, torch.Generator().manual_seed(k), (size, size)).double()
        views[spec.name] = View(spec.policy(images, params), params, spec.policy)
    return Batch(views, None, torch.arange(n), torch.rand(n, objective.draws) if draw is None else draw)


def grid_of_draws(m):
    """Uniform numbers at the middles of m equal cells, in both columns: every pair once."""
    middles = (torch.arange(m) + 0.5) / m
    return torch.cartesian_prod(middles, middles)


def test_single_draws_are_uniform():
    assert Counter(draw_one((torch.arange(60) + 0.5) / 60, 5).tolist()) == dict.fromkeys(range(5), 12)
    assert draw_one(torch.tensor([0.0, 1 - 2**-24]), 7).tolist() == [0, 6]


@pytest.mark.parametrize(
    ("space", "distance", "metric"),
    [
        (finite(CyclicRotations(4), 1), 1, "group"), (finite(CyclicRotations(6), 2), 4, "euclidean"),
        (plane((3, 4), patch(1, "total", (3, 4)), True), 1, "group"),
        (plane((3, 3), patch(2, "side", (3, 3)), False), 1, "euclidean"),
        (line(6, 2, (1, 1.25, 1.33, 1.5, 1.66, 1.75)), 0.3, "group"),
        (finite(Dihedral(3), 1), 1, "group"), (p4(CyclicRotations(4), 3, 1), 1, "group"),
    ],
)  # fmt: skip
def test_pairs_are_the_allowed_ones_and_all_alike_likely(space, distance, metric):
    """The first number is cut at the share of each place, the second at its number of partners: areas are counted exactly."""
    apart = space.euclidean if metric == "euclidean" else space.group
    allowed = {(p, q) for p, q in itertools.product(range(len(space)), repeat=2) if apart[p, q] <= distance}
    many = Counter(p for p, _ in allowed)
    m = len(allowed) * math.lcm(*many.values())
    first, second = draw_pair(grid_of_draws(m), space.bounded(distance, metric).allowed)
    counts = Counter(zip(first.tolist(), second.tolist(), strict=True))
    assert counts == dict.fromkeys(allowed, m * m // len(allowed))


def test_distances_by_brute_force():
    n, factors = 6, (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)
    ring, scales = finite(CyclicRotations(n), 1), line(n, 1, factors)
    for p, q in itertools.product(range(n), repeat=2):
        assert ring.euclidean[p, q] == scales.euclidean[p, q] == (p - q) ** 2
        assert ring.group[p, q] == min(abs(p - q + k * n) for k in (-1, 0, 1))
        assert scales.group[p, q] == pytest.approx(abs(math.log(factors[p] / factors[q])), abs=1e-15)
    h, w = 3, 5
    torus, flat = (plane((h, w), patch(1, "total", (h, w)), wrap) for wrap in (True, False))
    for (a, b), (c, d) in itertools.product(itertools.product(range(h), range(w)), repeat=2):
        p, q = a * w + b, c * w + d
        assert torus.euclidean[p, q] == flat.euclidean[p, q] == (a - c) ** 2 + (b - d) ** 2
        shortest = min(math.hypot(a - c + i * h, b - d + j * w) for i in (-1, 0, 1) for j in (-1, 0, 1))
        assert torus.group[p, q] == pytest.approx(shortest)
        assert flat.group[p, q] == pytest.approx(math.hypot(a - c, b - d))


@pytest.mark.parametrize("invariance", ["left", "right"])
def test_a_distance_on_a_group_that_does_not_commute(invariance):
    """d(kg, kh) = d(g, h), or d(gk, hk) = d(g, h), of the g = p^-1 that places stand for; the other one fails."""
    group = Dihedral(4)
    space = finite(group, 1, invariance)
    product, inverse = space.product, space.inverse
    of = torch.empty(8, 8)
    for g, h in itertools.product(range(8), repeat=2):
        of[g, h] = space.group[inverse[g], inverse[h]]
        assert product[g, h] == group.compose(torch.tensor([[float(g)]]), torch.tensor([[float(h)]])).item()
    holds = {
        side: all(
            of[g, h] == (of[product[k, g], product[k, h]] if side == "left" else of[product[g, k], product[h, k]])
            for g, h, k in itertools.product(range(8), repeat=3)
        )
        for side in ("left", "right")
    }
    assert holds[invariance]
    assert not holds["right" if invariance == "left" else "left"]
    assert of[0].tolist() == [0, 1, 2, 1, 1, 2, 3, 2]


@pytest.mark.parametrize(("group", "side"), [(CyclicRotations(4), 3), (CyclicRotations(4), 4), (Dihedral(4), 3), (Flips(), 2)])
def test_turns_and_shifts_together_move_places_as_the_maps_move(group, side):
    """Element p carries place q to p q: the regular action of its turn, then its shift, on a map that is 1 at q alone."""
    space, n = p4(group, side, 1), group.order * side**2
    assert sorted(space.product[0].tolist()) == list(range(n)) == space.product[0].tolist()
    one_hot = torch.eye(n).unflatten(1, (group.order, side, side))[:, None]
    for p in range(n):
        turn, shift = space.turns[p, :1], space.turns[p, 1:]
        params = (part.expand(n, -1).double() for part in (turn, shift))
        turned = group.act(one_hot, next(params))
        moved = Translations().act(turned, next(params)).flatten(1)
        assert torch.equal(moved.argmax(dim=1), space.product[p])
        assert torch.equal(moved.sum(dim=1), torch.ones(n))
        assert space.product[p, space.inverse[p]] == 0 == space.product[space.inverse[p], p]
    p, q, r = torch.randint(0, n, (3, 200))
    assert torch.equal(space.after(space.after(p, q), r), space.after(p, space.after(q, r)))


@pytest.mark.parametrize("invariance", ["left", "right"])
def test_distances_of_turns_and_shifts_are_words(invariance):
    """Shortest ways in the graph of steps (scipy): quarter turns and shifts by a pixel; kept by one side alone."""
    side, group = 3, CyclicRotations(4)
    n, space = 4 * side**2, p4(group, 3, 1, invariance)
    product, inverse = space.product, space.inverse
    unit = [[0, 1, 0], [0, 0, 1], [0, 2, 0], [0, 0, 2], [1, 0, 0], [3, 0, 0]]
    steps = [t for t in range(n) if space.turns[t].tolist() in unit]
    assert len(steps) == 6
    # g to g s: the distance on this graph is unchanged by g -> k g
    near = np.zeros((n, n))
    for s in steps:
        near[range(n), (product[:, s] if invariance == "left" else product[s]).tolist()] = 1
    words = shortest_path(near, unweighted=True)
    assert torch.equal(space.group, torch.from_numpy(words)[inverse][:, inverse])
    of = space.group[inverse][:, inverse]
    kept = {"left": [torch.equal(of[product[k]][:, product[k]], of) for k in range(n)],
            "right": [torch.equal(of[product[:, k]][:, product[:, k]], of) for k in range(n)]}  # fmt: skip
    assert all(kept[invariance])
    assert not all(kept["right" if invariance == "left" else "left"])
    k, y, x = (places.flatten() for places in torch.meshgrid(*map(torch.arange, (4, side, side)), indexing="ij"))
    assert torch.equal(space.euclidean, sum((c[:, None] - c[None, :]).square() for c in (k, y, x)).double())


@pytest.mark.parametrize("base", [1, 3, 4, 6, 35])
def test_base_spaces_of_turns_and_shifts(base):
    """All turns of one place, then of the next; the same shape wherever it starts, and no place twice."""
    space = p4(CyclicRotations(4), 3, base)
    over = patch(-(-base // 4), "total", (3, 3)).tolist()
    first = [r * 9 + y * 3 + x for y, x in over for r in range(4)][:base]
    assert space.bundles[0].tolist() == first
    for p in range(36):
        assert space.bundles[p].tolist() == space.product[p, first].tolist()
        assert len(set(space.bundles[p].tolist())) == base


@pytest.mark.parametrize("base", [1, 2, 3, 4, 5])
def test_base_spaces_of_a_ring_and_of_a_line(base):
    """|G| - 1 sizes: contiguous, over the end of a ring, inside a line."""
    ring, scales = finite(CyclicRotations(6), base), line(6, base, ())
    assert ring.bundles.tolist() == [[(p + k) % 6 for k in range(base)] for p in range(6)]
    assert scales.bundles.tolist() == [[p + k for k in range(base)] for p in range(7 - base)]


@pytest.mark.parametrize("grid", [(3, 4), (2, 8), (5, 2)])
@pytest.mark.parametrize("wrap", [True, False])
def test_base_spaces_of_a_map(grid, wrap):
    """Every total from 1 to |G| - 1: no place twice, each beside another, and the same shape wherever it starts."""
    places = grid[0] * grid[1]
    for total in range(1, places):
        found = plane(grid, patch(total, "total", grid), wrap)
        assert found.bundles.shape[1] == total
        assert len(found) == places if wrap else 1 <= len(found) <= places
        for start in found.bundles.tolist():
            assert len(set(start)) == total
            spots = {divmod(p, grid[1]) for p in start}
            first = divmod(start[0], grid[1])
            assert not wrap or first == divmod(found.bundles.tolist().index(start), grid[1])
            near = {((r + a) % grid[0], (c + b) % grid[1]) for r, c in spots for a, b in ((0, 1), (1, 0), (0, -1), (-1, 0))}
            assert total == 1 or spots <= near
    assert patch(2, "side", (9, 9)).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]


def bundle(maps, i, places):
    """z(p g0) of image i, one fibre after the other."""
    return torch.cat([maps[i, :, p] for p in places])


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"base": 2}, lambda p: [p, (p + 1) % 4]), ({"base": 3}, lambda p: [p, (p + 1) % 4, (p + 2) % 4]),
        ({"group": "scale", "base": 3}, lambda p: [p, p + 1, p + 2]),
        ({"group": "translation", "base": 2, "base_counts": "side"},
         lambda p: [(p // 4 + a) % 4 * 4 + (p % 4 + b) % 4 for a in (0, 1) for b in (0, 1)]),
        ({"group": "translation", "base": 3, "wrap": False},
         lambda p: [(p // 3 + a) * 4 + p % 3 + b for a, b in ((0, 0), (0, 1), (1, 0))]),
        # an element takes all turns at the corner to all turns at its own place
        ({"group": "p4", "base": 4}, lambda p: [(p // 16 + r) % 4 * 16 + p % 16 for r in range(4)]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("positives", ["fibres", "inputs", "both"])
@pytest.mark.parametrize("critic", ["cosine", "bilinear"])
def test_the_loss_is_its_equation(settings, read, positives, critic):
    """Bundles gathered by a loop, heads and InfoNCE applied to them one by one."""
    encoder = Linear()
    weights = {"fibres_weight": 0.7, "inputs_weight": 2.0} if positives == "both" else {}
    config = HSSL.Config(positives=positives, projector=(6, 5), critic=critic, beta=2.0, **settings, **weights)
    objective = HSSL(config, encoder, 0, 1).eval()
    batch = made(objective)
    found = objective(encoder, batch)
    places = {"translation": 9 if not config.wrap else 16, "scale": 2, "p4": 64}.get(config.group, 4)

    def fibres(name):
        maps = encoder.fibres(batch.views[name].images)
        if config.group == "p4":
            return maps.flatten(2)
        return maps.amax(dim=2).flatten(2) if config.group == "translation" else maps.mean(dim=(3, 4))

    def side(sources, columns):
        starts = [[int(u * places) for u in batch.draw[:, c].tolist()] for c in columns]
        pair = [torch.stack([bundle(m, i, read(p)) for i, p in enumerate(at)]) for m, at in zip(sources, starts, strict=True)]
        z1, z2 = (objective.over_bundles(b) for b in pair)
        if critic == "cosine":
            return info_nce(z1, z2, 2.0, "pooled")
        return by_sum(z1, z2, objective.critic.weight, 2.0)

    expected, terms = 0, {}
    if positives != "inputs":
        terms["fibres"] = side([fibres("plain")] * 2, (0, 1))
        expected += weights.get("fibres_weight", 1.0) * terms["fibres"]
    if positives != "fibres":
        column = 2 if positives == "both" else 0
        terms["inputs"] = side([fibres("1"), fibres("2")], (column, column))
        expected += weights.get("inputs_weight", 1.0) * terms["inputs"]
    torch.testing.assert_close(found.total, expected)
    assert found.terms.keys() == ({"fibres", "inputs"} if positives == "both" else {"info_nce"})
    assert found.h.shape == (5, 3)
    found.total.backward()
    assert all(p.grad.abs().max() > 0 for p in [*encoder.parameters(), *objective.parameters()])


def by_sum(z1, z2, w, beta):
    """Pooled InfoNCE with a' W b, by explicit sums."""
    views, n, total = (z1, z2), len(z1), 0
    for i in range(n):
        below = sum((beta * views[j][i] @ w @ views[m][k]).exp() for k in range(n) if k != i for j in (0, 1) for m in (0, 1))
        total = total - (beta * z1[i] @ w @ z2[i] - below.log()) / n
    return total


@pytest.mark.parametrize("positives", ["fibres", "inputs", "both"])
def test_matched_draws_are_the_same_of_both(positives):
    """g0, g1, g2 of columns 0, 1, 2: T_g x read at g0, or x at g^-1 g0. An encoder that mixes pixels, so directions show."""
    group, size = CyclicRotations(4), 4
    encoder = Linear(2, 4)
    objective = HSSL(HSSL.Config(draws="matched", positives=positives, projector=(5,)), encoder, 0, 1).eval()
    batch = made(objective, size=size)
    images, draw = batch.views["plain"].images, (batch.draw * 4).long()
    moved = [group(images, (-draw[:, k : k + 1] % 4).double()) for k in (1, 2)]
    rows = torch.arange(5)
    plain = encoder.fibres(images).mean(dim=(3, 4))
    pairs = {
        "inputs": [encoder.fibres(x).mean(dim=(3, 4))[rows, :, draw[:, 0]] for x in moved],
        "fibres": [plain[rows, :, (draw[:, k] + draw[:, 0]) % 4] for k in (1, 2)],
    }
    wanted = sum(
        info_nce(*(objective.projector(h) for h in pair), 10.0, "pooled")
        for name, pair in pairs.items() if positives in (name, "both")
    )
    torch.testing.assert_close(objective(encoder, batch).total, wanted)


def test_matched_shifts_are_whole_steps_of_the_map():
    class Halved(Linear):
        def fibres(self, images):
            return super().fibres(nn.functional.avg_pool2d(images, 2))

    encoder = Halved(2, 1)
    objective = HSSL(HSSL.Config(group="translation", draws="matched", positives="inputs", projector=(5,)), encoder, 0, 1)
    batch = made(objective, size=6)
    images, draw = batch.views["plain"].images, (batch.draw * 9).long()
    shift = -2 * torch.stack([draw[:, 1] // 3, draw[:, 1] % 3], dim=1).double()
    torch.testing.assert_close(objective.images(encoder, batch)[:5], Translations()(images, shift))
    assert objective.training
    with pytest.raises(GeomsslError, match="sides are multiples of the maps'"):
        objective(encoder, made(objective, size=7))


@pytest.mark.parametrize("method", ["byol", "simsiam", "infonce"])
@pytest.mark.parametrize("positives", ["fibres", "both"])
def test_a_few_steps_go_down(method, positives):
    """A golden run: with the same batch, gradient descent lowers the loss of every mode."""
    encoder = Linear(8, 4)
    config = HSSL.Config(method=method, positives=positives, projector=(8,), predictor=8, base=2, distance=1.0, metric="group")
    objective = HSSL(config, encoder, 0, 1)
    batch = made(objective, n=8)
    trained = [p for m in (encoder, objective) for p in m.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=0.05), []
    for _ in range(8):
        optimizer.zero_grad()
        found = objective(encoder, batch).total
        found.backward()
        optimizer.step()
        losses.append(found.item())
    assert losses[-1] < losses[0] - 1e-3
    assert all(math.isfinite(x) for x in losses)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"distance": 0}, "positives would be identical; expected a distance above 0"),
        ({"distance": -1.0}, "a distance above 0"),
        ({"distance": 1.0, "positives": "inputs"}, "the policy draws the augmentation; expected draws = matched"),
        ({"critic": "bilinear", "method": "byol"}, "critic = bilinear with method = byol"),
        ({"group": "scale", "draws": "matched"}, "scale, which has no exact form"),
        ({"base_counts": "side"}, "base_counts = side for rotation"), ({"group": "p4", "wrap": False}, "expected wrap = true"),
        ({"group": "translation", "draws": "matched", "wrap": False}, "expected wrap = true"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(settings, said):
    with pytest.raises(GeomsslError, match=said):
        HSSL.Config(**settings)


@pytest.mark.parametrize(
    ("settings", "encoder", "said"),
    [
        ({"base": 4}, Linear(), r"4 fibres, on a group of 4 places; expected 1 to 3 fibres"),
        ({"base": 4, "base_counts": "side", "group": "translation"}, Linear(), "16 fibres, on a group of 16 places"),
        ({"base": 5, "positives": "inputs"}, Linear(), "expected 1 to 4 fibres"),
        ({"base": 15, "wrap": False, "group": "translation"}, Linear(), "fits in 1 places of 16"),
        ({"distance": 0.5}, Linear(), "no pair of different places; expected at least 1"),
        ({"distance": 0.5, "metric": "group", "group": "translation"}, Linear(), "no pair"),
        ({"distance": 0.5, "metric": "group", "group": "scale"}, Linear(), "4 places without factors"),
        ({"group": "scale"}, Linear(group=CyclicRotations(4)), "stand for rotation; expected objective.group = rotation"),
        ({"group": "rotation"}, Scaled(), "stand for scale; expected objective.group = scale"),
        ({}, Linear(g=1), "more than one fibre along the group"),
        ({"group": "p4"}, Linear(g=1), "such as encoder c4-cnn, whose maps have turns and places"),
        ({"group": "p4"}, Linear(g=3), "maps 4x4 with 3 turns; expected square maps and quarter turns"),
        ({"group": "p4"}, Scaled(), "stand for scale; expected objective.group = scale"),
        ({"group": "p4", "base": 64}, Linear(), "64 fibres, on a group of 64 places; expected 1 to 63 fibres"),
        ({}, Linear(dim=7), "fibres have 3 numbers and whose h has 7; expected one width"),
    ],
)
def test_what_does_not_fit_the_encoder_is_one_line(settings, encoder, said):
    objective = HSSL(HSSL.Config(projector=(5,), **settings), encoder.double(), 0, 1)
    if encoder.dim == 7:
        objective.projector = nn.Identity()
    with pytest.raises(GeomsslError, match=said) as caught:
        objective(encoder, made(objective))
    assert "\n" not in str(caught.value)


def test_a_batch_too_small_for_negatives_is_one_line():
    objective = HSSL(HSSL.Config(projector=(5,)), Linear(), 0, 1).eval()
    with pytest.raises(GeomsslError, match="a batch of 1; expected at least 2 pairs"):
        objective(Linear(), made(objective, n=1))


def test_defaults_have_no_new_weights_and_probes_find_no_projector_of_another_width():
    objective = HSSL(HSSL.Config(), Linear(), 0, 1)
    assert {name.partition(".")[0] for name in objective.state_dict()} == {"projector"}
    wide = HSSL(HSSL.Config(base=2), Linear(), 0, 1)
    assert wide.projector is None
    assert wide.over_bundles[0].in_features == 6
    assert policy("rotations").name == "rotations"


def test_a_norm_before_the_head_takes_away_the_scale_and_the_mean_of_every_channel():
    encoder = Linear()
    for base in (1, 2):
        plain, normed = (HSSL(HSSL.Config(base=base, input_norm=on), encoder, 0, 1).train() for on in (False, True))
        assert len(normed.over_bundles) == len(plain.over_bundles) + 1
        # the widths of the norm are those of the bundle
        assert normed.over_bundles[0].num_features == 3 * base
        bundle = torch.randn(64, 3 * base)
        other = bundle * torch.linspace(1.0, 9.0, 3 * base) + torch.arange(3.0 * base)
        assert torch.allclose(normed.over_bundles(bundle), normed.over_bundles(other), atol=1e-4)
        assert not torch.allclose(plain.over_bundles(bundle), plain.over_bundles(other), atol=0.1)
        standard = (bundle - bundle.mean(dim=0)) / (bundle.var(dim=0, correction=0) + 1e-5).sqrt()
        rest = nn.Sequential(*list(normed.over_bundles)[1:])
        assert torch.allclose(normed.over_bundles(bundle), rest(standard), atol=1e-10)
