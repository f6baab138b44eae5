"""Capture and forms: what layers give in one pass, names by patterns, and how features of any kind are read."""

import pytest
import torch
from torch import nn

from geomssl.encoders.capture import Capture, matching, submodule
from geomssl.encoders.forms import Form, form
from geomssl.errors import GeomsslError

X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.again = self.shared
        self.double().eval()

    def forward(self, x):
        return self.shared(self.shared(self.stem(x)).relu()).mean(dim=(2, 3))


def test_one_pass_gives_every_layer_and_leaves_no_hook():
    net = Net()
    output, seen = Capture(net, ["stem.0", "stem", "shared", "unused"])(X)
    assert torch.equal(output, net(X))
    assert set(seen) == {"stem.0", "stem", "shared"}
    assert torch.equal(seen["stem.0"], net.stem[0](X))
    # a layer used twice is read at its last call
    assert torch.equal(seen["shared"], net.shared(net.shared(net.stem(X)).relu()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@torch.no_grad()
def test_what_a_later_layer_overwrites_in_place_is_kept_as_it_was():
    net, passes = Net(), []
    capture = Capture(net, ["stem.1", "stem.2"])
    handle = net.stem[0].register_forward_hook(lambda *_: passes.append(1))
    first, again = capture(X)[1], capture(X)[1]
    assert len(passes) == 3  # the first call repeats its pass, with copies; the next need not
    handle.remove()
    for seen in (first, again):
        assert torch.equal(seen["stem.1"], net.stem[1](net.stem[0](X)))
        assert float(seen["stem.1"].min()) < 0
        assert torch.equal(seen["stem.2"], seen["stem.1"].relu())


def test_what_enters_a_layer():
    net = Net()
    assert torch.equal(Capture(net, ["stem.1"], before=True).one(X), net.stem[0](X))


def test_hooks_leave_after_an_error():
    net = Net()
    with pytest.raises(RuntimeError):
        Capture(net, ["shared"])(X[:, :1])
    assert not net.shared._forward_hooks


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_gradients_and_forward_tangents_pass_through():
    net = Net()
    capture = Capture(net, ["stem.1"])
    x = X.clone().requires_grad_()
    capture(x)[1]["stem.1"].sum().backward()
    assert x.grad.norm() > 0
    tangent = torch.ones_like(X)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, tangent)
        moved = torch.autograd.forward_ad.unpack_dual(capture(dual)[1]["stem.1"]).tangent
    step = 1e-6
    measured = (net.stem[1](net.stem[0](X + step * tangent)) - net.stem[1](net.stem[0](X))) / step
    assert torch.allclose(moved, measured, atol=1e-6)


def test_patterns_mean_layers_in_the_order_of_the_module_each_once():
    net = Net()
    assert matching(net, ["all"]) == ["stem", "stem.0", "stem.1", "stem.2", "shared", "unused"]
    assert matching(net, ["stem.?", "stem.0"]) == ["stem.0", "stem.1", "stem.2"]
    assert matching(net, ["s*"]) == ["stem", "stem.0", "stem.1", "stem.2", "shared"]
    assert matching(net, ["again"]) == ["again"]
    assert submodule(net, "stem.1") is net.stem[1]


def one(*shape):
    return torch.zeros(2, *shape)


@pytest.mark.parametrize(
    ("shape", "grids", "expected"),
    [
        ((5,), [], Form("vector")),
        ((4, 6, 6), [], Form("map", (6, 6))),
        ((4, 4, 6, 6), [], Form("fibres", (6, 6))),
        ((6, 6, 12), [], Form("channels-last", (6, 6))),
        ((6, 6, 6), [], Form("map", (6, 6))),
        ((16, 7), [], Form("tokens", (4, 4))),
        ((17, 7), [], Form("tokens", (4, 4), 1)),
        ((69, 7), [], Form("tokens", (8, 8), 5)),
        ((13, 7), [(3, 4)], Form("tokens", (3, 4), 1)),
        ((16, 7), [(3, 4), (2, 8)], Form("tokens", (2, 8))),
        ((3, 7), [], None),
        ((2, 2, 2, 2, 2), [], None),
    ],
)
def test_forms(shape, grids, expected):
    assert form(one(*shape), 2, (16, 16), grids) == expected


def test_what_is_no_feature_of_the_images_has_no_form():
    assert form({"logits": X}, 2, (8, 8)) is None
    assert form(one(5), 3, (8, 8)) is None
    assert form(one(5).long(), 2, (8, 8)) is None
    assert form(torch.zeros(2), 2, (8, 8)) is None


def test_every_form_puts_its_places_last():
    maps = torch.rand(2, 5, 3, 4)
    assert torch.equal(Form("channels-last", (3, 4)).placed(maps.movedim(1, -1)), maps)
    extra = torch.rand(2, 2, 5)
    tokens = torch.cat([extra, maps.flatten(2).transpose(1, 2)], dim=1)
    read = Form("tokens", (3, 4), 2)
    assert torch.equal(read.placed(tokens), maps)
    assert torch.equal(read.apart(tokens), extra.flatten(1))


def test_a_tensor_that_a_library_wraps_with_its_type_is_read():
    class Typed:
        def __init__(self, tensor):
            self.tensor = tensor

    class Wrapping(nn.Module):
        def forward(self, x):
            return Typed(2 * x)

    net = nn.ModuleDict({"body": Wrapping()})
    net.forward = lambda x: net["body"](x).tensor
    assert torch.equal(Capture(net, ["body"]).one(X), 2 * X)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: matching(Net(), ["stam"]), "'stem'"),
        (lambda: matching(Net(), ["layer*"]), "layer*"),
        (lambda: Capture(Net(), ["unused"]).one(X), "never ran"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
