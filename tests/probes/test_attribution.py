"""Attribution methods against closed forms on linear networks, and against a ReLU with a hand-written gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.errors import GeomsslError
from geomssl.probes.attribution import METHODS, Settings, attribution, infidelity, map_layer, max_sensitivity
from geomssl.seeding import generator

SIDE = 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "test-attribution"))


class Linear(nn.Module):
    """f(x) = W x + b on images."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(torch.tensor([0.3, -0.2, 0.5]))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.flatten(1).T + self.bias


class Net(nn.Module):
    """A small network whose ReLUs are called in that style; all styles compute the same function."""

    def __init__(self, style: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 5, 3, padding=1)
            self.head = nn.Linear(5, 3)
        self.relu = nn.ReLU(inplace=style == "in place")
        self.other = nn.ReLU()
        self.style = style

    def act(self, x: Tensor, second: bool = False) -> Tensor:
        if self.style in ("reused", "in place"):
            return self.relu(x)
        if self.style == "modules":
            return (self.other if second else self.relu)(x)
        if self.style == "by hand":
            return Guided.apply(x)
        if self.style == "deconvolution by hand":
            return Deconvolved.apply(x)
        return {"method": x.relu, "function": lambda: F.relu(x), "torch": lambda: torch.relu(x),
                "written": lambda: x.clone().relu_()}[self.style]()

    def forward(self, images: Tensor) -> Tensor:
        a = self.first(images)
        # pre-activation: a goes through a ReLU and past it, so that its gradient is a sum
        b = a + self.second(self.act(a.clone() if self.style == "in place" else a))
        return self.head(self.act(b, True).mean(dim=(2, 3)))


class Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * (x > 0) * (gradient > 0)


class Deconvolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(min=0)


STYLES = ("modules", "reused", "in place", "method", "function", "torch", "written")
IMAGES, TARGETS = drawn(4, 2, SIDE, SIDE), torch.tensor([0, 2, 1, 0])


def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    x = images.clone().requires_grad_(True)
    return torch.autograd.grad(model(x).gather(1, targets[:, None]).sum(), x)[0]


def test_on_a_linear_network_every_method_is_its_weights() -> None:
    weight = drawn(3, 2, SIDE, SIDE, seed=1)
    model, w = Linear(weight), weight[TARGETS]
    settings = Settings(baseline=0.25, window=1)
    for method, expected in [
        ("saliency", w.abs()), ("input-x-gradient", w * IMAGES), ("integrated-gradients", w * (IMAGES - 0.25)),
    ]:
        torch.testing.assert_close(attribution(method, model, IMAGES, TARGETS, settings), expected, rtol=1e-4, atol=1e-5)
    # a square of one pixel covers both channels: each carries the change of the sum
    one = attribution("occlusion", model, IMAGES, TARGETS, settings)
    torch.testing.assert_close(one, (w * (IMAGES - 0.25)).sum(dim=1, keepdim=True).expand_as(one), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("method", "by_hand"), [("guided-backprop", "by hand"), ("deconvolution", "deconvolution by hand")])
def test_every_relu_is_reached_however_it_is_called(style: str, method: str, by_hand: str) -> None:
    expected = gradient(Net(by_hand), IMAGES, TARGETS)
    torch.testing.assert_close(attribution(method, Net(style), IMAGES, TARGETS), expected)
    assert not torch.allclose(expected, gradient(Net("modules"), IMAGES, TARGETS), atol=1e-4)


@pytest.mark.parametrize("style", STYLES)
def test_plain_gradients_do_not_depend_on_the_style(style: str) -> None:
    expected = gradient(Net("modules"), IMAGES, TARGETS)
    torch.testing.assert_close(attribution("saliency", Net(style), IMAGES, TARGETS), expected.abs())


def test_integrated_gradients_are_complete() -> None:
    model = Net("method")
    found = attribution("integrated-gradients", model, IMAGES, TARGETS, Settings(steps=200))
    change = (model(IMAGES) - model(torch.zeros_like(IMAGES))).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)), change.detach(), rtol=2e-2, atol=2e-3)


def test_gradcam_in_closed_form() -> None:
    maps = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2))
    model = nn.Sequential(maps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    a = maps(IMAGES)
    weights = model[3].weight[TARGETS] / 9
    expected = torch.einsum("nc,nchw->nhw", weights, a)[:, None].relu()
    expected = F.interpolate(expected, (SIDE, SIDE), mode="bilinear", align_corners=False)
    torch.testing.assert_close(attribution("gradcam", model, IMAGES, TARGETS), expected.detach())
    assert map_layer(model, IMAGES[:1]) is maps
    named = attribution("gradcam", model, IMAGES, TARGETS, Settings(layer="0.0"))
    assert named.shape == (4, 1, SIDE, SIDE)
    with pytest.raises(GeomsslError, match="did you mean '0.2'"):
        attribution("gradcam", model, IMAGES, TARGETS, Settings(layer="0.22"))
    with pytest.raises(GeomsslError, match="relu, which is called 2 times"):
        map_layer(Net("reused"), IMAGES[:1], "relu")
    assert map_layer(Net("reused"), IMAGES[:1]).out_channels == 5
    with pytest.raises(GeomsslError, match="without a layer that gives maps"):
        attribution("gradcam", Linear(drawn(3, 2, SIDE, SIDE)), IMAGES, TARGETS)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_stays_as_it_is(method: str) -> None:
    model = Net("in place").train()
    model.relu.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = IMAGES.clone()
    found = attribution(method, model, images, TARGETS)
    assert found.shape in {(4, 2, SIDE, SIDE), (4, 1, SIDE, SIDE)}
    assert torch.isfinite(found).all()
    assert not found.requires_grad
    assert model.training
    assert model.relu.inplace
    assert type(model.relu) is nn.ReLU
    assert torch.equal(images, IMAGES)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    assert sum(hooks) == 1


def test_infidelity_by_hand_and_nothing_left_for_the_true_weights() -> None:
    weight = drawn(3, 2, SIDE, SIDE, seed=1)
    model, w = Linear(weight), weight[TARGETS]
    assert float(infidelity("a", model.double(), IMAGES.double(), TARGETS, 7 * w.double()).max()) < 1e-13
    model.float()
    # of another map a: the residual of regressing <I, w> on <I, a>
    other = drawn(4, 2, SIDE, SIDE, seed=5)
    found = infidelity("a", model, IMAGES, TARGETS, other, samples=30, noise=0.2, seed=3)
    change = 0.2 * torch.randn(4 * 30, 2, SIDE, SIDE, generator=generator(3, "infidelity-a")).double().unflatten(0, (4, 30))
    said, did = ((change * m.double()[:, None]).sum(dim=(2, 3, 4)) for m in (other, w))
    scale = (said * did).mean(dim=1) / said.square().mean(dim=1)
    torch.testing.assert_close(found, (scale[:, None] * said - did).square().mean(dim=1), rtol=1e-3, atol=1e-6)
    blank = infidelity("a", model, IMAGES, TARGETS, torch.zeros_like(other), samples=30, noise=0.2, seed=3)
    torch.testing.assert_close(blank, did.square().mean(dim=1), rtol=1e-3, atol=1e-6)


def test_sensitivity_of_a_linear_network() -> None:
    model = Linear(drawn(3, 2, SIDE, SIDE, seed=1))
    assert float(max_sensitivity("saliency", model, IMAGES, TARGETS).max()) == 0
    found = max_sensitivity("input-x-gradient", model, IMAGES, TARGETS, samples=6, radius=0.1, seed=2)
    draws = 2 * torch.rand(4 * 6, 2, SIDE, SIDE, generator=generator(2, "sensitivity-input-x-gradient")) - 1
    w = model.weight.detach()[TARGETS]
    moved = (0.1 * draws.unflatten(0, (4, 6)) * w[:, None]).flatten(2).norm(dim=2).amax(dim=1)
    torch.testing.assert_close(found, (moved / (w * IMAGES).flatten(1).norm(dim=1)).double(), rtol=1e-4, atol=1e-6)
    more = max_sensitivity("input-x-gradient", model, IMAGES, TARGETS, samples=6, radius=0.1, seed=2)
    assert torch.equal(found, more)


def test_what_cannot_be_done_is_one_line() -> None:
    for method, model, said in [
        ("integrated-gradient", Net("modules"), "did you mean 'integrated-gradients'"),
        ("guided-backprop", Linear(drawn(3, 2, SIDE, SIDE)), "calls no ReLU"),
        ("deconvolution", Linear(drawn(3, 2, SIDE, SIDE)), "calls no ReLU"),
    ]:
        with pytest.raises(GeomsslError, match=said):
            attribution(method, model, IMAGES, TARGETS)
    with pytest.raises(GeomsslError, match="window 9 on images of 6 pixels"):
        attribution("occlusion", Net("modules"), IMAGES, TARGETS, Settings(window=9))
