"""wrap: maps, vectors and named layers of any module as an Encoder."""

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
    with pytest.raises(RuntimeError):
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


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: encoders.wrap(Net(), layer="stam"), "'stem'"),
        (lambda: encoders.wrap(lambda x: x), "torch.nn.Module"),
        (lambda: encoders.wrap(Net(), layer="unused")(X), "never ran"),
        (lambda: encoders.wrap(nn.Flatten(2))(X), "tokens"),
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
