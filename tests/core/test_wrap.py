"""wrap: maps, vectors and named layers of any module as an Encoder."""

import types

import pytest
import torch
from torch import nn

from geomssl import encoders
from geomssl.errors import GeomsslError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.shared = nn.Conv2d(4, 4, 3, padding=1)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.shared(self.shared(self.stem(x)).relu())
        return self.head(x.mean(dim=(2, 3)))


X = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def test_vectors_become_fibres_at_one_place():
    net = Net()
    encoder = encoders.wrap(net)
    assert encoder.fibres(X).shape == (2, 5, 1, 1, 1)
    assert torch.equal(encoder(X), net(X))
    assert (encoder.dim, encoder.default_action, encoder.group) == (5, "trivial", None)


def test_maps_become_fibres_with_one_orientation():
    net = Net()
    encoder = encoders.wrap(net, layer="stem")
    assert torch.equal(encoder.fibres(X), net.stem(X)[:, :, None])
    assert torch.allclose(encoder(X), net.stem(X).mean(dim=(2, 3)))
    assert (encoder.dim, encoder.default_action) == (4, "spatial")


def test_a_layer_used_twice_is_read_at_its_last_call_and_no_hook_stays():
    net = Net()
    encoder = encoders.wrap(net, layer="shared")
    assert torch.equal(encoder.fibres(X)[:, :, 0], net.shared(net.shared(net.stem(X)).relu()))
    assert not net.shared._forward_hooks


def test_no_hook_stays_after_an_error():
    net = Net()
    encoder = encoders.wrap(net, layer="shared", in_channels=2)
    with pytest.raises(GeomsslError):
        encoder.fibres(X[:, :2])
    assert not net.shared._forward_hooks


def test_gradients_and_tangents_pass_through():
    encoder = encoders.wrap(Net(), layer="stem")
    x = X.clone().requires_grad_()
    encoder(x).sum().backward()
    assert x.grad.norm() > 0


def test_fibres_and_encoders_stay_as_they_are():
    inner = encoders.build("c4-cnn", in_channels=3, widths=(2, 2, 3))
    assert encoders.wrap(inner) is inner
    again = encoders.wrap(inner, layer="convs.2")
    assert again.fibres(X).shape == (2, 3, 4, 2, 2)


class Patches(nn.Module):
    """A class token, two registers, then one token a patch: the grid of oblong images is known by the convolution alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 5, 2, stride=2)
        self.block = nn.Identity()
        self.extra = nn.Parameter(torch.randn(1, 3, 5))

    def forward(self, x):
        patches = self.embed(x).flatten(2).transpose(1, 2)
        return self.block(torch.cat([self.extra.expand(len(x), -1, -1), patches], dim=1))[:, 0]


def test_patch_tokens_become_fibres_on_their_grid_and_those_before_them_are_left_out():
    net = Patches()
    for size in ((6, 6), (4, 8), (8, 4)):
        x = torch.rand(2, 3, *size)
        encoder = encoders.wrap(net, layer="block")
        assert torch.equal(encoder.fibres(x)[:, :, 0], net.embed(x))
        assert torch.allclose(encoder(x), net.embed(x).mean(dim=(2, 3)))
        assert (encoder.dim, encoder.default_action) == (5, "spatial")
    assert encoders.wrap(net).fibres(X).shape == (2, 5, 1, 1, 1)


def test_maps_with_channels_last_are_turned():
    class Last(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    assert torch.equal(encoders.wrap(Last()).fibres(X)[:, :, 0], X)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: encoders.wrap(Net(), layer="stam"), "'stem'"),
        (lambda: encoders.wrap(lambda x: x), "torch.nn.Module"),
        (lambda: encoders.wrap(Net(), layer="unused")(X), "never ran"),
        (lambda: encoders.wrap(nn.Flatten(2))(X), "gives (2, 3, 36)"),
        (lambda: encoders.wrap(Net())(X[:, :1]), "(N, 3, H, W)"),
        (lambda: encoders.wrap(Net()).dim, "a pass over at least one image"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dictionary_is_refused_by_its_type():
    class Dict(nn.Module):
        def forward(self, x):
            return {"logits": x}

    with pytest.raises(GeomsslError, match="a dict"):
        encoders.wrap(Dict())(X)


class Typed(nn.Module):
    """As a layer of e2cnn or escnn, which asserts the size of its input's type."""

    def __init__(self):
        super().__init__()
        self.in_type = types.SimpleNamespace(size=3)

    def forward(self, x):
        assert x.shape[1] == self.in_type.size
        return x


def test_images_of_other_channels_are_one_line_and_other_faults_stay_faults():
    with pytest.raises(GeomsslError, match="images of 1 channels for Sequential; expected 3, as its first convolution takes"):
        encoders.wrap(nn.Sequential(nn.Conv2d(3, 4, 3)), in_channels=1)(torch.rand(2, 1, 8, 8))
    with pytest.raises(GeomsslError, match="images of 1 channels for Typed; expected 3"):
        encoders.wrap(Typed(), in_channels=1)(torch.rand(2, 1, 8, 8))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        encoders.wrap(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(5, 2)), in_channels=1)(torch.rand(2, 1, 8, 8))
