"""Groups: axioms for every pair, permutations against numpy, the regular action against 2x2 matrices, matched scales."""

import copy
import itertools
import math
import pickle

import numpy as np
import pytest
import torch

from geomssl.errors import GeomsslError
from geomssl.seeding import generator
from geomssl.transforms import CyclicRotations, Dihedral, Flips, Scales, Translations

FINITE = [*map(CyclicRotations, (1, 2, 3, 4, 8)), *map(Dihedral, (1, 2, 3, 4, 8)), Flips()]
EXACT = [CyclicRotations(1), CyclicRotations(2), CyclicRotations(4), Dihedral(1), Dihedral(2), Dihedral(4), Flips()]


def ids(groups):
    return [g.name for g in groups]


def matrices(group):
    """Each element as a 2x2 matrix on (right, up), written down apart from the tables of the group."""
    n = 1 if isinstance(group, Flips) else group.order // (2 if isinstance(group, Dihedral) else 1)
    found = []
    for e in range(group.order):
        k, m = (0, e) if isinstance(group, Flips) else (e % n, e // n)
        a = 2 * math.pi * k / n
        turn = np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
        found.append(turn @ np.diag([-1.0, 1.0]) if m else turn)
    return np.stack(found)


def index_of(matrix, table):
    return int(np.abs(table - matrix).sum(axis=(1, 2)).argmin())


def pairs(group):
    """Every pair (g, h) as two columns of parameters."""
    e = group.elements()
    return e.repeat_interleave(group.order, 0), e.repeat(group.order, 1)


@pytest.mark.parametrize("group", FINITE, ids=ids(FINITE))
def test_products_and_inverses_are_those_of_the_matrices(group):
    table = matrices(group)
    g, h = pairs(group)
    product = group.compose(g, h).long().view(-1).tolist()
    for (a, b), c in zip(itertools.product(range(group.order), repeat=2), product, strict=True):
        assert c == index_of(table[a] @ table[b], table)
    for a, b in enumerate(group.inverse(group.elements()).long().view(-1).tolist()):
        assert b == index_of(np.linalg.inv(table[a]), table)
    assert group.identity().tolist() == [[0.0]]
    assert index_of(np.eye(2), table) == 0


@pytest.mark.parametrize("group", FINITE, ids=ids(FINITE))
def test_axioms_for_every_triple(group):
    e = group.elements()
    g, h, k = (torch.cartesian_prod(*[e[:, 0]] * 3)[:, i : i + 1] for i in range(3)) if group.order > 1 else (e, e, e)
    compose, inverse = group.compose, group.inverse
    assert torch.equal(compose(compose(g, h), k), compose(g, compose(h, k)))
    assert torch.equal(compose(g, inverse(g)), torch.zeros_like(g))
    assert torch.equal(compose(inverse(g), g), torch.zeros_like(g))
    assert torch.equal(compose(g, torch.zeros_like(g)), g)
    assert e.shape == (group.order, 1)
    assert len(set(e.view(-1).tolist())) == group.order


def test_order_and_length_of_the_fibre():
    assert [(g.order, g.fibre) for g in (CyclicRotations(4), CyclicRotations(8), Dihedral(4), Flips())] == [
        (4, 4), (8, 8), (8, 8), (2, 2)
    ]
    assert (Translations().order, Translations().fibre) == (None, 1)
    assert CyclicRotations(4) == CyclicRotations(4) != CyclicRotations(8)
    assert Translations() == Translations() != Translations(wrap=False)
    assert len({CyclicRotations(4), CyclicRotations(4), Dihedral(4)}) == 2
    assert Flips() != CyclicRotations(2) != Translations()


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_c4_is_numpys_rot90_bit_for_bit(size):
    group = CyclicRotations(4)
    image = torch.rand(2, size, size, generator=generator(0, "test"))
    moved = group(image.expand(4, -1, -1, -1), group.elements())
    for k in range(4):
        assert np.array_equal(moved[k].numpy(), np.rot90(image.numpy(), k, (1, 2)))


@pytest.mark.parametrize("size", [5, 6])
def test_d4_mirrors_first_and_turns_then(size):
    group = Dihedral(4)
    image = torch.rand(2, size, size, generator=generator(0, "test"))
    moved = group(image.expand(8, -1, -1, -1), group.elements())
    for e in range(8):
        mirrored = image.numpy()[:, :, ::-1] if e >= 4 else image.numpy()
        assert np.array_equal(moved[e].numpy(), np.rot90(mirrored, e % 4, (1, 2)))


@pytest.mark.parametrize("group", EXACT, ids=ids(EXACT))
@pytest.mark.parametrize("size", [5, 6])
def test_images_move_as_the_products_say(group, size):
    g, h = pairs(group)
    image = torch.rand(3, size, size, generator=generator(0, "test")).expand(len(g), -1, -1, -1)
    assert torch.equal(group(image, group.compose(g, h)), group(group(image, h), g))
    assert torch.equal(group(group(image, g), group.inverse(g)), image)
    assert torch.equal(group(image, torch.zeros_like(g)), image)


@pytest.mark.parametrize("group", EXACT, ids=ids(EXACT))
def test_the_regular_action_is_a_left_action_for_every_pair(group):
    g, h = pairs(group)
    fibres = torch.rand(2, group.order, 5, 5, generator=generator(0, "test")).expand(len(g), -1, -1, -1, -1)
    assert torch.equal(group.act(fibres, group.compose(g, h)), group.act(group.act(fibres, h), g))
    assert torch.equal(group.act(group.act(fibres, g), group.inverse(g)), fibres)


@pytest.mark.parametrize("group", FINITE, ids=ids(FINITE))
def test_the_orientation_axis_moves_as_the_regular_representation(group):
    """[Γ_g f](k) = f(g^-1 k) with products of matrices, on features of one pixel, for every pair."""
    table, n = matrices(group), group.order
    fibres = torch.rand(n, 2, n, 1, 1, generator=generator(0, "test"))
    moved = group.act(fibres, group.elements())
    for g, k in itertools.product(range(n), repeat=2):
        origin = index_of(np.linalg.inv(table[g]) @ table[k], table)
        assert torch.allclose(moved[g, :, k], fibres[g, :, origin], atol=1e-6)
    g, h = pairs(group)
    wide = fibres[:1].expand(len(g), -1, -1, -1, -1)
    both, apart = group.act(wide, group.compose(g, h)), group.act(group.act(wide, h), g)
    assert torch.allclose(both, apart, atol=1e-6)


@pytest.mark.parametrize("group", [CyclicRotations(4), Dihedral(4)], ids=["c4", "d4"])
def test_the_regular_action_at_every_place_against_coordinates(group):
    """[Γ_g f](k, u) = f(g^-1 k, g^-1 u), with u as vectors (right, up) turned by matrices."""
    table, n, size = matrices(group), group.order, 4
    fibres = torch.rand(n, 1, n, size, size, generator=generator(0, "test"))
    moved = group.act(fibres, group.elements())
    centre = (size - 1) / 2
    for g, k, y, x in itertools.product(range(n), range(n), range(size), range(size)):
        back = np.linalg.inv(table[g])
        right, up = back @ np.array([x - centre, centre - y])
        origin = index_of(back @ table[k], table)
        assert moved[g, 0, k, y, x] == fibres[g, 0, origin, round(centre - up), round(centre + right)]


def test_a_quarter_turn_rolls_the_orientations_forward():
    group = CyclicRotations(4)
    fibres = torch.rand(1, 3, 4, 6, 6, generator=generator(0, "test"))
    quarter = torch.ones(1, 1)
    expected = torch.rot90(fibres, 1, (3, 4)).roll(1, 2)
    assert torch.equal(group.act(fibres, quarter), expected)
    assert not torch.allclose(group.act(fibres, quarter), torch.rot90(fibres, 1, (3, 4)).roll(-1, 2))


@pytest.mark.parametrize("group", [CyclicRotations(8), Dihedral(8)], ids=["c8", "d8"])
def test_resampled_elements_compose_on_smooth_images_and_even_ones_exactly(group):
    g, h = pairs(group)
    y, x = torch.meshgrid(torch.arange(33.0) - 16, torch.arange(33.0) - 16, indexing="ij")
    blob = torch.exp(-((x - 4) ** 2 + (y + 3) ** 2) / 18) + 0.5 * torch.exp(-((x + 5) ** 2 + (y - 2) ** 2) / 18)
    image = blob.expand(len(g), 1, -1, -1)
    gap = (group(image, group.compose(g, h)) - group(group(image, h), g)).abs().amax(dim=(1, 2, 3))
    # A bilinear reading errs by at most (|f_xx| + |f_yy|) / 8 = 1/36 on a blob of height 1 and width 3; two are made.
    limit = 1.1 * 2 / 36
    assert gap.max() < limit
    exact = group.is_exact(g, (33, 33)) & group.is_exact(h, (33, 33))
    assert exact.any()
    assert gap[exact].max() == 0
    assert (group(image, group.compose(g, h)) - image).abs().amax(dim=(1, 2, 3)).max() > 0.4
    fibres = blob * torch.arange(1.0, group.order + 1).view(1, 1, -1, 1, 1).expand(len(g), -1, -1, -1, -1)
    gap = (group.act(fibres, group.compose(g, h)) - group.act(group.act(fibres, h), g)).abs().max()
    assert gap < limit * group.order


def test_an_odd_element_of_c8_turns_anticlockwise():
    spot = torch.zeros(1, 1, 21, 21)
    spot[0, 0, 10, 17] = 1  # seven to the right
    moved = CyclicRotations(8)(spot, torch.ones(1, 1))
    y, x = divmod(int(moved.flatten().argmax()), 21)
    assert (y, x) == (5, 15)  # 7 cos 45 = 4.95 to the right and up


@pytest.mark.parametrize("group", [*EXACT, CyclicRotations(8), Translations(), Translations(wrap=False)])
def test_rows_of_a_mixed_batch_are_independent(group):
    params = group.sample(12, generator(3, "test"), (6, 6))
    images = torch.rand(12, 2, 6, 6, generator=generator(0, "test"))
    together = group(images, params)
    for i in range(12):
        assert torch.equal(together[i], group(images[i : i + 1], params[i : i + 1])[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("group", [CyclicRotations(4), Dihedral(4), CyclicRotations(8), Translations()])
def test_exact_elements_are_exact_in_every_dtype(group, dtype):
    params = group.sample(16, generator(1, "test"), (6, 6))
    images = torch.rand(16, 2, 6, 6, generator=generator(0, "test")).to(dtype)
    moved, exact = group(images, params), group.is_exact(params, (6, 6))
    assert moved.dtype == dtype
    same = moved.flatten(1).sort().values == images.flatten(1).sort().values
    assert same.all(dim=1)[exact].all()


def test_a_whole_wrapped_shift_is_numpys_roll_for_every_element():
    group, size = Translations(), (4, 5)
    shifts = group.elements(size)
    image = torch.rand(2, *size, generator=generator(0, "test"))
    moved = group(image.expand(len(shifts), -1, -1, -1), shifts)
    assert len(shifts) == 20
    assert shifts[0].tolist() == [0, 0]
    for shift, found in zip(shifts.long().tolist(), moved, strict=True):
        assert np.array_equal(found.numpy(), np.roll(image.numpy(), shift, (1, 2)))
    far = shifts + torch.tensor([-8.0, 35.0])
    assert torch.equal(group(image.expand(20, -1, -1, -1), far), moved)


def test_translations_compose_and_act_on_space_alone():
    group = Translations()
    g, h = (group.sample(30, generator(i, "test"), (5, 6)) for i in (1, 2))
    fibres = torch.rand(30, 2, 3, 5, 6, generator=generator(0, "test"))
    assert torch.equal(group.act(fibres, group.compose(g, h)), group.act(group.act(fibres, h), g))
    assert torch.equal(group.act(group.act(fibres, g), group.inverse(g)), fibres)
    assert torch.equal(group.act(fibres, g)[:, :, 1], group(fibres[:, :, 1], g))


def test_a_part_of_a_wrapped_shift_is_linear_around_the_circle():
    row = np.array([3.0, 1.0, 4.0, 1.0, 5.0])
    image = torch.tensor(row).view(1, 1, 1, 5)
    for shift in (0.25, -1.75, 4.5, -0.1):
        moved = Translations()(image, torch.tensor([[0.0, shift]]))
        expected = np.interp(np.arange(5) - shift, np.arange(5), row, period=5)
        assert np.allclose(moved.numpy().ravel(), expected)
        down = Translations()(image.transpose(2, 3), torch.tensor([[shift, 0.0]]))
        assert np.allclose(down.numpy().ravel(), expected)


def test_shifts_without_wrapping_lose_what_leaves():
    image = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    moved = Translations(wrap=False)(image, torch.tensor([[1.0, -1.0]]))
    assert moved[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]


def test_gradients_flow_through_permutations_and_shifts():
    image = torch.rand(2, 1, 4, 4, dtype=torch.float64, generator=generator(0, "test"), requires_grad=True)
    turn = torch.tensor([[1.0], [6.0]])
    assert torch.autograd.gradcheck(lambda x: Dihedral(4)(x, turn), image)
    shift = torch.tensor([[0.3, -1.4], [2.6, 0.2]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Translations(), (image, shift))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize("make", [lambda: CyclicRotations(4), lambda: Dihedral(4), lambda: CyclicRotations(8), Flips, Scales])
def test_what_is_kept_inside_a_torch_context_serves_outside_it(make):
    """The first call may come inside jvp, vmap or inference mode; the next one trains, is copied and is pickled."""

    def calls(group, fibres, params):
        act = group.act if not isinstance(group, Scales) else lambda f, p: group.act(f, p)[0]
        return act(fibres, params), group(fibres[:, :, 0], params), group.is_exact(params, (6, 6))

    def first_in_jvp(group, fibres, params):
        moved, tangent = torch.func.jvp(lambda f: calls(group, f, params)[0], (fibres,), (fibres,))
        assert torch.allclose(moved, tangent)  # linear

    def first_in_inference(group, fibres, params):
        with torch.inference_mode():
            calls(group, fibres, params)

    def first_in_vmap(group, fibres, params):
        torch.func.vmap(lambda f, p: calls(group, f[None], params[:1])[0], in_dims=(0, 0))(fibres, params)

    for first in (first_in_jvp, first_in_inference, first_in_vmap):
        group = make()
        params = group.elements()
        length = len(params)
        fibres = torch.rand(length, 2, length, 6, 6, generator=generator(0, "test"))
        if first is first_in_jvp and group.name in ("scales", "c8"):
            continue  # grid_sample has no forward mode
        first(group, fibres, params)
        fibres.requires_grad_()
        calls(group, fibres, params)[0].sum().backward()
        assert torch.isfinite(fibres.grad).all()
        again = pickle.loads(pickle.dumps(copy.deepcopy(group)))
        assert torch.equal(again(fibres[:, :, 0], params), group(fibres[:, :, 0], params))


def test_draws_are_whole_uniform_and_the_generators_own():
    for group, size, count in ((Dihedral(4), (6, 6), 8), (Translations(), (4, 5), 20)):
        drawn = group.sample(4000, generator(0, "test"), size)
        assert torch.equal(drawn, group.sample(4000, generator(0, "test"), size))
        assert not torch.equal(drawn, group.sample(4000, generator(1, "test"), size))
        assert drawn.dtype == torch.float32
        counts = drawn.unique(dim=0, return_counts=True)[1].double()
        assert len(counts) == count
        # Chi-squared with count - 1 degrees of freedom: mean count - 1, variance 2 (count - 1).
        chi = ((counts - 4000 / count) ** 2 / (4000 / count)).sum()
        assert chi < count - 1 + 5 * math.sqrt(2 * (count - 1))


def test_oblong_images_take_half_turns_only():
    image = torch.rand(2, 1, 4, 6)
    for group in (CyclicRotations(4), Dihedral(4), CyclicRotations(8)):
        half = torch.full((2, 1), group.order / (2 if group.name[0] == "c" else 4))
        assert torch.equal(group(image, half), image.flip(2, 3))
        assert group.is_exact(half, (4, 6)).all()
        with pytest.raises(GeomsslError, match="square"):
            group(image, torch.ones(2, 1))
        assert not group.is_exact(torch.ones(2, 1), (4, 6)).any()
    assert torch.equal(Flips()(image, torch.ones(2, 1)), image.flip(3))
    assert torch.equal(CyclicRotations(2)(image, torch.ones(2, 1)), image.flip(2, 3))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: CyclicRotations(4)(torch.rand(2, 1, 4, 4), torch.full((2, 1), 4.0)), "0 to 3"),
        (lambda: CyclicRotations(4)(torch.rand(2, 1, 4, 4), torch.full((2, 1), -1.0)), "0 to 3"),
        (lambda: CyclicRotations(4)(torch.rand(2, 1, 4, 4), torch.zeros(2, 2)), "columns element"),
        (lambda: CyclicRotations(4)(torch.rand(2, 1, 4, 4), torch.zeros(3, 1)), "one row an image"),
        (lambda: CyclicRotations(4)(torch.rand(2, 4, 4), torch.zeros(2, 1)), r"\(n, C, H, W\)"),
        (lambda: CyclicRotations(4)(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, 1)), "float"),
        (lambda: CyclicRotations(4).act(torch.rand(2, 1, 3, 4, 4), torch.zeros(2, 1)), r"\(n, C, 4, H, W\)"),
        (lambda: Translations().act(torch.rand(2, 3, 4, 4), torch.zeros(2, 2)), r"\(n, C, G, H, W\)"),
        (lambda: CyclicRotations(0), "from 1"),
        (lambda: Dihedral(2.5), "from 1"),
        (lambda: Translations().elements(), "size"),
        (lambda: Translations(wrap=False).elements((4, 4)), "infinitely"),
        (lambda: Scales((1.25, 1.5)), "1.0 among them"),
        (lambda: Scales((1.0, 1.5, 1.5)), "differ"),
        (lambda: Scales().act(torch.rand(1, 1, 4, 4, 4), torch.zeros(1, 1)), r"\(n, C, 6, H, W\)"),
    ],
)
def test_bad_input_is_one_line(call, words):
    with pytest.raises(GeomsslError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_scales_match_where_the_product_is_in_the_list():
    origin = Scales().matches()  # 1, 1.25, 1.33, 1.5, 1.66, 1.75
    assert origin[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert origin[1].tolist() == [-1, 0, -1, -1, 2, -1]  # 1 -> 1.25 and 1.33 -> 1.66, not 1.25 -> 1.5
    geometric = Scales((1.0, 2.0, 4.0)).matches()
    assert geometric.tolist() == [[0, 1, 2], [-1, 0, 1], [-1, -1, 0]]
    assert Scales((1.0, 0.5)).matches().tolist() == [[0, 1], [-1, 0]]
    assert Scales((1.0, 1.25, 1.5), tolerance=0.05).matches()[1].tolist() == [-1, 0, 1]


def test_scales_act_on_matched_pairs_and_mask_the_rest():
    """f(i, u) = phi(u / s_i) is what an equivariant layer gives on a blob, and Γ_s f what it gives on the larger blob."""
    factors = (1.0, 1.5, 2.25)
    scales = Scales(factors)
    y, x = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")

    def response(image_scale):
        return torch.stack([torch.exp(-(x**2 + y**2) * (s / image_scale) ** 2 / 60) for s in factors]).view(1, 1, 3, 41, 41)

    moved, mask = scales.act(response(1.0), torch.ones(1, 1))
    assert mask.tolist() == [[False, True, True]]
    assert moved[:, :, 0].abs().max() == 0
    enlarged = torch.exp(-(x**2 + y**2) / 1.5**2 / 60)  # f(0, u / 1.5)
    assert torch.allclose(moved[0, 0, 1], enlarged, atol=0.02)
    assert torch.allclose(moved[0, 0, 2], torch.exp(-(x**2 + y**2) / 60), atol=0.02)
    still, all_of_them = scales.act(response(1.0), torch.zeros(1, 1))
    assert torch.equal(still, response(1.0))
    assert all_of_them.all()
    image = torch.rand(1, 1, 9, 9)
    assert scales.is_exact(scales.elements(), (9, 9)).tolist() == [True, False, False]
    assert torch.equal(scales(image, scales.identity()), image)
