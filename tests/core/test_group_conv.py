"""GroupConv2d: equivariance at every element, a naive sum over group and plane, the kept filters, and gradients."""

import copy
import io
import itertools

import pytest
import torch
from torch import nn

from geomssl.encoders.group_conv import GroupConv2d
from geomssl.errors import GeomsslError
from geomssl.transforms.groups import CyclicRotations, Dihedral, Flips

GROUPS = [CyclicRotations(4), Dihedral(4)]
NAMES = [g.name for g in GROUPS]


def make(group, lifting, kernel=3, seed=0, dtype=torch.float64, **kwargs):
    torch.manual_seed(seed)
    conv = GroupConv2d(2, 3, kernel, group, lifting=lifting, **kwargs).to(dtype)
    if conv.bias is not None:
        nn.init.normal_(conv.bias)
    return conv


def noise(conv, size, n=2, seed=1, dtype=torch.float64):
    shape = (n, conv.in_channels, size, size) if conv.lifting else (n, conv.in_channels, conv.order, size, size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def moved(group, features, g):
    params = group.elements()[g].expand(len(features), 1)
    return group.act(features, params) if features.dim() == 5 else group(features, params)


def relative(a, b):
    return float((a - b).detach().norm() / b.detach().norm())


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (3, 0), (2, 1), (4, 1), (5, "same"), (1, 0)])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("size", [6, 7])
def test_it_commutes_with_every_element_and_with_no_other(group, lifting, kernel, padding, mode, size):
    conv = make(group, lifting, kernel, padding=padding, padding_mode=mode)
    x = noise(conv, size)
    y = conv(x)
    for g in range(group.order):
        turned = conv(moved(group, x, g))
        assert relative(turned, moved(group, y, g)) < 1e-12
        for wrong in set(range(group.order)) - {g}:
            # A 1x1 filter lifts to the same map at every orientation.
            if kernel > 1 or not lifting:
                bias = conv.bias.view(-1, 1, 1, 1)
                assert relative(turned - bias, moved(group, y, wrong) - bias) > 0.5


@pytest.mark.parametrize(("size", "exact"), [(7, True), (9, True), (8, False), (10, False)])
def test_stride_two_is_exact_at_odd_sizes_only(size, exact):
    conv = make(CyclicRotations(4), True, 3, stride=2, padding=1, bias=False)
    x = noise(conv, size)
    error = relative(conv(moved(conv.group, x, 1)), moved(conv.group, conv(x), 1))
    assert error < 1e-12 if exact else error > 0.5


def naive(conv, x):
    """The sum of the docstring, term by term, with matrices for the group and coordinates about the filter's centre."""
    mirrors = (0, 1) if conv.order == 8 else (0,)
    matrices = []
    for m in mirrors:
        for k in range(4):
            # Offsets (down, right): a mirror turns right into left; a quarter turn anticlockwise sends right to up.
            mirror = torch.tensor([[1, 0], [0, -1 if m else 1]])
            quarter = torch.tensor([[0, -1], [1, 0]])
            matrices.append(torch.linalg.matrix_power(quarter, k) @ mirror)
    find = {tuple(m.flatten().tolist()): i for i, m in enumerate(matrices)}
    inverse = [m.T for m in matrices]
    k, p = conv.kernel_size, conv.padding
    x = x if x.dim() == 5 else x.unsqueeze(2)
    size = x.shape[-1] + 2 * p - k + 1
    out = torch.zeros(len(x), conv.out_channels, conv.order, size, size, dtype=x.dtype)
    padded = nn.functional.pad(x.flatten(1, 2), (p, p, p, p)).unflatten(1, x.shape[1:3])
    for g, o, h in itertools.product(range(conv.order), range(conv.out_channels), range(conv.weight.shape[2])):
        source = find[tuple((inverse[g] @ matrices[h]).flatten().tolist())] if conv.weight.shape[2] > 1 else 0
        for dy, dx in itertools.product(range(k), range(k)):
            doubled = inverse[g] @ torch.tensor([2 * dy - k + 1, 2 * dx - k + 1])
            wy, wx = ((doubled + k - 1) // 2).tolist()
            for c in range(conv.in_channels):
                window = padded[:, c, h, dy : dy + size, dx : dx + size]
                out[:, o, g] += conv.weight[o, c, source, wy, wx] * window
    return out + conv.bias.view(1, -1, 1, 1, 1)


@pytest.mark.parametrize("group", GROUPS, ids=NAMES)
@pytest.mark.parametrize("lifting", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (2, 0)])
def test_it_is_the_sum_over_group_and_plane(group, lifting, kernel, padding):
    conv = make(group, lifting, kernel, padding=padding)
    x = noise(conv, 5, n=1)
    with torch.no_grad():
        assert torch.allclose(conv(x), naive(conv, x), atol=1e-12)


def test_a_pass_calls_conv2d_once(monkeypatch):
    calls = []
    real = nn.functional.conv2d
    monkeypatch.setattr(nn.functional, "conv2d", lambda *a, **k: calls.append(1) or real(*a, **k))
    conv = make(Dihedral(4), False, padding=1)
    conv(noise(conv, 5))
    assert calls == [1]


@pytest.mark.parametrize("lifting", [True, False])
def test_outputs_keep_the_variance_of_what_comes_in(lifting):
    torch.manual_seed(0)
    conv = GroupConv2d(16, 64, 3, CyclicRotations(4), lifting=lifting)
    x = torch.randn(8, 16, 12, 12) if lifting else torch.randn(8, 16, 4, 12, 12)
    # He: a ReLU of unit normals has second moment 1/2, and the layer after it variance 1.
    assert 0.9 < float(conv(x.relu()).detach().pow(2).mean()) < 1.1


def test_gradients_of_input_weight_and_bias():
    conv = make(Dihedral(4), False, 2, padding=1)
    x = noise(conv, 3, n=1).requires_grad_()

    def run(x, weight, bias):
        return torch.func.functional_call(conv, {"weight": weight, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(run, (x, conv.weight, conv.bias))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_the_tangent_of_a_pass_is_the_pass_of_the_tangent():
    conv = make(CyclicRotations(4), False, padding=1).eval()
    x, t = noise(conv, 5), noise(conv, 5, seed=9)
    _, out = torch.func.jvp(conv, (x,), (t,))
    assert torch.allclose(out, conv(t) - conv(torch.zeros_like(t)), atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_it_compiles_as_one_graph(training):
    conv = make(CyclicRotations(4), False, padding=1).train(training)
    x = noise(conv, 5)
    with torch.no_grad():
        assert torch.equal(torch.compile(conv, backend="eager", fullgraph=True)(x), conv(x))


class TestKeptFilters:
    @pytest.fixture
    def conv(self):
        return make(CyclicRotations(4), False, padding=1).eval()

    def expanded(self, conv, monkeypatch):
        calls = []
        real = conv.expand
        monkeypatch.setattr(conv, "expand", lambda w: calls.append(1) or real(w))
        return calls

    @torch.no_grad()
    def test_are_made_once_in_eval_mode(self, conv, monkeypatch):
        calls = self.expanded(conv, monkeypatch)
        x = noise(conv, 5)
        first = conv(x)
        assert torch.equal(conv(x), first)
        assert calls == [1]
        conv.train()(x)
        conv(x)
        assert len(calls) == 3

    def test_are_not_kept_where_a_gradient_must_reach_the_weight(self, conv):
        x = noise(conv, 5)
        with torch.no_grad():
            conv(x)
        for _ in range(2):
            conv.zero_grad()
            conv(x).square().sum().backward()
            assert float(conv.weight.grad.norm()) > 0

    @pytest.mark.parametrize("how", ["in place", "load", "data", "dtype", "optimizer", "assigned"])
    def test_follow_the_weight(self, conv, how):
        x = noise(conv, 5)
        conv.bias = None
        with torch.no_grad():
            before = conv(x)
        other = torch.randn(conv.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        if how == "in place":
            with torch.no_grad():
                conv.weight.copy_(other)
        elif how == "load":
            conv.load_state_dict({"weight": other})
        elif how == "data":
            conv.weight.data = other
        elif how == "assigned":
            conv.weight = nn.Parameter(other)
        elif how == "optimizer":
            conv.weight.grad = conv.weight.detach() - other
            torch.optim.SGD(conv.parameters(), lr=1.0).step()
        else:
            other = conv.weight.detach().clone()
            with torch.no_grad():
                assert conv.float()(x.float()).dtype == torch.float32
                assert torch.allclose(conv.double()(x), before, atol=1e-5)
            return
        fresh = make(CyclicRotations(4), False, padding=1, bias=False)
        fresh.load_state_dict({"weight": other})
        with torch.no_grad():
            assert torch.allclose(conv(x), fresh(x), atol=1e-12)
            assert not torch.allclose(conv(x), before)

    @torch.no_grad()
    def test_are_not_in_copies_files_or_states(self, conv):
        x = noise(conv, 5)
        y = conv(x)
        twin = copy.deepcopy(conv)
        twin.weight.mul_(2)
        assert torch.equal(conv(x), y)
        assert not torch.allclose(twin(x), y)
        assert set(conv.state_dict()) == {"weight", "bias"}
        file = io.BytesIO()
        torch.save(conv, file)
        file.seek(0)
        assert torch.equal(torch.load(file, weights_only=False)(x), y)

    def test_survive_a_swap_of_weights_for_one_call(self, conv):
        x = noise(conv, 5)
        with torch.no_grad():
            y = conv(x)
            doubled = {"weight": 2 * conv.weight, "bias": 2 * conv.bias}
            assert torch.allclose(torch.func.functional_call(conv, doubled, (x,)), 2 * y)
            assert torch.equal(conv(x), y)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: GroupConv2d(1, 1, 3, Flips()), "flips"),
        (lambda: GroupConv2d(1, 1, 3, CyclicRotations(8)), "c8"),
        (lambda: GroupConv2d(1, 1, 4, CyclicRotations(4), padding="same"), "odd kernel"),
        (lambda: GroupConv2d(1, 1, 3, CyclicRotations(4), padding_mode="reflect"), "reflect"),
        (lambda: GroupConv2d(2, 1, 3, CyclicRotations(4))(torch.zeros(1, 2, 5, 5)), "(N, 2, 4, H, W)"),
        (lambda: GroupConv2d(2, 1, 3, CyclicRotations(4), lifting=True)(torch.zeros(1, 3, 5, 5)), "(N, 2, H, W)"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
