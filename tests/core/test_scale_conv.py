"""The Hermite basis against scipy, HermiteConv2d against sums written out, its symmetries, and filters made once a step."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import eval_hermitenorm
from torch import nn

from geomssl.encoders.group_conv import GroupConv2d
from geomssl.encoders.hermite import HermiteConv2d, fibres_first, hermite, hermite_basis
from geomssl.errors import GeomsslError
from geomssl.transforms.groups import CyclicRotations

SCALES = (1.0, 1.25, 1.33, 1.5, 1.66, 1.75)
C4 = CyclicRotations(4)
PLACES = {"translation": 1, "rotation": 4, "scale": 3}


def make(group="scale", seed=0, kernel=5, orders=2, **options):
    torch.manual_seed(seed)
    return HermiteConv2d(2, 3, kernel, orders, group, (1.0, 1.3, 1.7), **options).double()


def noise(conv, size=7, n=2, seed=1):
    shape = (n, 2, size, size) if conv.lifting else (n, 2, conv.places, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


def test_polynomials_are_scipys():
    x = torch.linspace(-6, 6, 41, dtype=torch.float64)
    for n in range(12):
        expected = torch.from_numpy(eval_hermitenorm(n, x.numpy()))
        assert torch.allclose(hermite(n, x), expected, rtol=1e-12, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(("size", "orders"), [(7, 3), (7, 7), (11, 11), (11, 3), (15, 3)])
@pytest.mark.parametrize("scales", [(1.0,), SCALES, (0.9, 1.27)])
def test_the_basis_is_the_formula(size, orders, scales):
    found = hermite_basis(size, orders, scales)
    expected = np.zeros((orders**2, len(scales), size, size))
    for index, scale in enumerate(scales):
        half = int(size * scale / max(scales)) // 2
        for n in range(orders):
            for m in range(orders):
                for y in range(-half, half + 1):
                    for x in range(-half, half + 1):
                        value = eval_hermitenorm(n, y / scale) * eval_hermitenorm(m, x / scale)
                        value *= math.exp(-(x * x + y * y) / (2 * scale * scale)) / scale**2
                        expected[n * orders + m, index, size // 2 + y, size // 2 + x] = value
    expected /= np.sqrt((expected[:, scales.index(min(scales))] ** 2).sum(axis=(1, 2)))[:, None, None, None]
    assert found.dtype == torch.float64
    assert np.allclose(found.numpy(), expected, rtol=1e-11, atol=1e-13)


def test_a_wide_filter_weighs_the_same_at_every_scale():
    # Sums over pixels, by Poisson's formula: of exp(-t^2 / 2 s^2) / s, sqrt(2 pi); of exp(-t^2), sqrt(pi) (1 + 2 exp(-pi^2)).
    expected = torch.tensor(2 * math.pi / (math.sqrt(math.pi) * (1 + 2 * math.exp(-math.pi**2))), dtype=torch.float64)
    sums = hermite_basis(41, 1, (1.0, 1.5, 2.0)).sum(dim=(2, 3))[0]
    assert torch.allclose(sums, expected.expand(3), rtol=1e-7)


def test_turned_copies_are_turned_bit_for_bit():
    basis = hermite_basis(7, 3, turns=4)
    assert basis.shape == (9, 4, 7, 7)
    for k in range(4):
        assert torch.equal(basis[:, k], torch.rot90(basis[:, 0], k, (1, 2)))
    assert not torch.equal(basis[1, 1], torch.rot90(basis[1, 0], -1, (0, 1)))


def written_out(conv, x):
    """The sums of the docstring with one plain conv2d for every pair of fibres, from the weight and the basis alone."""
    basis = hermite_basis(conv.kernel_size, conv.orders, conv.scales, 4 if conv.group == "rotation" else 1)
    weight, places = conv.weight.detach(), conv.places
    out = []
    for g in range(places):
        total = 0.0
        for h in range(1 if conv.lifting else places):
            r = (h - g) % places if conv.group == "rotation" else h - g
            if conv.mixing == "full":
                if r < 0:
                    continue
                coefficients = weight[:, :, r]
            elif conv.lifting or h == g:
                coefficients = weight
            else:
                continue
            filters = sum(coefficients[:, :, b, None, None] * basis[b, g] for b in range(len(basis)))
            total = total + F.conv2d(x if conv.lifting else x[:, :, h], filters, None, conv.stride, conv.padding)
        out.append(total)
    return torch.stack(out, dim=2)


MODES = [
    (group, lifting, mixing)
    for group in PLACES
    for lifting, mixing in ((True, "none"), (False, "none"), (False, "full"))
]


@pytest.mark.parametrize(("group", "lifting", "mixing"), MODES)
@pytest.mark.parametrize("stride", [1, 2])
def test_it_is_the_sum_of_its_docstring(group, lifting, mixing, stride):
    conv = make(group, lifting=lifting, mixing=mixing, stride=stride, padding=2)
    # the buffer was float32 when it was made
    conv.basis = hermite_basis(5, 2, conv.scales, 4 if group == "rotation" else 1).flatten(2).transpose(0, 1).contiguous()
    x = noise(conv)
    y = conv(x)
    assert y.shape == (2, 3, PLACES[group], 7 if stride == 1 else 4, 7 if stride == 1 else 4)
    assert torch.allclose(y, written_out(conv, x), atol=1e-12)


@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize("mixing", ["none", "full"])
@pytest.mark.parametrize(("size", "stride", "exact"), [(7, 1, True), (8, 1, True), (7, 2, True), (8, 2, False)])
def test_turns_are_exact_where_the_grid_turns(lifting, mixing, size, stride, exact):
    conv = make("rotation", lifting=lifting, mixing=mixing, stride=stride, padding=2)
    x = noise(conv, size)
    y = conv(x)
    for g in (1, 2, 3):
        params = torch.full((2, 1), float(g))
        turned = conv(C4(x, params) if lifting else C4.act(x, params))
        error = relative(turned, C4.act(y, params))
        assert error < 1e-12 if exact else error > 0.3
        assert relative(turned, C4.act(y, C4.inverse(params))) > 0.3 or g == 2


def test_a_shared_pixel_is_the_same_at_every_fibre():
    conv = make("scale", kernel=1, orders=1)
    x = noise(conv)
    expected = torch.einsum("ncghw,oc->noghw", x, conv.weight[:, :, 0])
    assert torch.allclose(conv(x), expected, atol=1e-12)


def test_nothing_is_copied_between_layers():
    conv = make(lifting=True, padding=2)
    y = conv(noise(conv)).relu()
    assert fibres_first(y).data_ptr() == y.data_ptr()
    assert fibres_first(y).is_contiguous()


@pytest.mark.parametrize(("group", "lifting", "mixing"), MODES)
def test_collecting_is_the_transpose_of_expanding(group, lifting, mixing):
    conv = make(group, lifting=lifting, mixing=mixing)
    filters = conv.expand(conv.weight)
    other = torch.randn(filters.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose((filters * other).sum(), (conv.weight * conv.collect(other)).sum(), rtol=1e-12)


@pytest.mark.parametrize("lifting", [True, False])
def test_collecting_is_the_transpose_of_turning(lifting):
    torch.manual_seed(0)
    conv = GroupConv2d(2, 3, 3, C4, lifting=lifting).double()
    filters = conv.expand(conv.weight)
    other = torch.randn(filters.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert torch.allclose((filters * other).sum(), (conv.weight * conv.collect(other)).sum(), rtol=1e-12)


def test_gradients_by_finite_differences():
    torch.manual_seed(0)
    conv = HermiteConv2d(1, 1, 5, 2, "scale", (1.0, 1.3, 1.7), padding=2, mixing="full").double()
    x = torch.randn(1, 1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    # gradcheck writes through .data, which PyTorch does not count
    assert torch.autograd.gradcheck(lambda x, _: conv(x), (x, conv.weight))


def test_the_second_derivative_of_a_quadratic_is_its_gradient_elsewhere():
    # |conv(x)|^2 is v' A v in the weight v, so its gradient is 2 A v and its Hessian times v the gradient at v.
    conv = make("scale", mixing="full", padding=2)
    x, v = noise(conv), torch.randn_like(conv.weight)
    (gradient,) = torch.autograd.grad(conv(x).square().sum(), conv.weight, create_graph=True)
    (product,) = torch.autograd.grad((gradient * v).sum(), conv.weight)
    with torch.no_grad():
        conv.weight.copy_(v)
    (elsewhere,) = torch.autograd.grad(conv(x).square().sum(), conv.weight)
    assert torch.allclose(product, elsewhere, rtol=1e-10)


@pytest.fixture(params=["hermite", "turned"])
def counted(request, monkeypatch):
    """A layer in training mode, and the list that grows with every expansion."""
    torch.manual_seed(0)
    conv = make("rotation", padding=2) if request.param == "hermite" else GroupConv2d(2, 3, 3, C4, bias=False).double()
    calls, real = [], conv.expand
    monkeypatch.setattr(conv, "expand", lambda w: calls.append(1) or real(w))
    return conv.train(), torch.randn(2, 2, 4, 5, 5, dtype=torch.float64), calls


def test_the_calls_of_a_step_share_one_expansion_and_its_gradient(counted):
    conv, x, calls = counted
    (conv(x).square().sum() + conv(2 * x).sum()).backward()
    assert len(calls) == 1
    shared = conv.weight.grad.clone()
    conv.zero_grad()
    conv(x).square().sum().backward()
    conv(2 * x).sum().backward()
    assert len(calls) == 3
    assert torch.allclose(conv.weight.grad, shared, rtol=1e-12)


def test_two_backward_passes_through_one_expansion(counted):
    conv, x, calls = counted
    first, second = conv(x).square().sum(), conv(2 * x).sum()
    first.backward()
    second.backward()
    assert len(calls) == 1
    apart = conv.weight.grad.clone()
    conv.zero_grad()
    (conv(x).square().sum() + conv(2 * x).sum()).backward()
    assert torch.allclose(conv.weight.grad, apart, rtol=1e-12)


@pytest.mark.parametrize("how", ["step", "data", "assigned", "loaded", "no gradient"])
def test_what_is_kept_follows_the_weight(counted, how):
    conv, x, _ = counted
    before = conv(x)
    other = torch.randn(conv.weight.shape, dtype=torch.float64)
    if how == "step":
        before.sum().backward()
        torch.optim.SGD(conv.parameters(), lr=1.0).step()
    elif how == "data":
        conv.weight.data.copy_(other)
    elif how == "assigned":
        conv.weight = nn.Parameter(other)
    elif how == "loaded":
        conv.load_state_dict({"weight": other})
    else:
        conv.requires_grad_(False)
        conv.weight.data.copy_(other)
    fresh = copy.deepcopy(conv)
    fresh.refresh()
    assert torch.equal(conv(x), fresh(x))
    assert not torch.allclose(conv(x), before)


@torch.no_grad()
def test_eval_mode_keeps_them_and_no_file_holds_them(counted):
    conv, x, calls = counted
    conv.eval()
    assert torch.equal(conv(x), conv(x))
    assert len(calls) == 1
    assert list(conv.state_dict()) == ["weight"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_it_works_inside_transforms():
    conv = make("scale", padding=2).eval()
    x, t = noise(conv), noise(conv, seed=5)
    _, tangent = torch.func.jvp(conv, (x,), (t,))
    assert torch.allclose(tangent, conv(t), atol=1e-12)
    assert torch.allclose(torch.func.vmap(conv)(x[None])[0], conv(x), atol=1e-12)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: hermite_basis(6, 3), "an odd number of pixels"),
        (lambda: hermite_basis(7, 3, SCALES, turns=4), "one scale at 1 or 4 turns"),
        (lambda: hermite_basis(3, 3, SCALES), "did you mean '5'"),
        (lambda: make("rotation")(torch.zeros(1, 2, 3, 7, 7, dtype=torch.float64)), "(N, 2, 4, H, W)"),
        (lambda: make("scale", lifting=True)(torch.zeros(1, 3, 7, 7, dtype=torch.float64)), "(N, 2, H, W)"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
