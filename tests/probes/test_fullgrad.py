"""FullGrad: exact completeness on many kinds of network, and terms and maps against derivations by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from geomssl.encoders.base import Normalise
from geomssl.errors import GeomsslError
from geomssl.probes.saliency import fullgrad

EXACT = 1e-12


@pytest.fixture(autouse=True)
def _initialised() -> None:
    torch.manual_seed(0)


def images(n: int = 5, channels: int = 2, size: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, every parameter and running statistic away from its default."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.double().parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        for name, buffer in model.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand(buffer.shape, generator=draw, dtype=torch.float64))
    return model.eval()


class Reused(nn.Module):
    """Modules called twice, in another order than they are held, with in-place additions and functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        for _ in range(2):
            out = self.norm(self.body(x))
            out += x
            x = self.act(out)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Tokens(nn.Module):
    """A small transformer: patches, a class token, positions, attention, GELU, LayerNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        t = self.patches(x).flatten(2).transpose(1, 2)
        t = torch.cat([self.token.expand(len(t), -1, -1), t], dim=1) + self.positions
        n = self.norm(t)
        t = t + self.attention(n, n, n, need_weights=False)[0]
        t = t + F.scaled_dot_product_attention(t, t, t)
        return self.mlp(self.norm(t)[:, 0])


class Functional(nn.Module):
    """No modules that matter: a constant channel, a GELU and a softmax as functions, a maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 3, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x - 0.3, torch.full_like(x[:, :1], 0.7)], dim=1)
        x = F.gelu(F.conv2d(x, self.weight, padding=1))
        return (x.flatten(2).softmax(dim=2) * x.flatten(2)).amax(dim=2) + 0.1


def one_d() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(128, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6, bias=False),
        nn.BatchNorm1d(6, affine=False), nn.Tanh(), nn.Linear(6, 3),
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        Normalise(0.4, 0.3), nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(24, 3),
    )


def smooth() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3), nn.Hardswish(inplace=True), nn.Dropout(0.5),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3), nn.Sigmoid(),
    )


@pytest.mark.parametrize("make", [conv_net, one_d, smooth, Reused, Tokens, Functional])
def test_the_parts_add_up_to_the_output(make: Callable[[], nn.Module]) -> None:
    model, x, targets = shaken(make()), images(), torch.tensor([0, 1, 2, 1, 0])
    found = fullgrad(model, x, targets)
    with torch.no_grad():
        expected = model(x).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found.value, expected)
    assert found.residual.max() < EXACT
    total = found.input_term + found.bias_terms.sum(dim=1)
    torch.testing.assert_close(total, expected, rtol=1e-9, atol=1e-12)
    assert found.bias_terms.abs().sum(dim=1).mean() > 1e-2
    assert found.saliency.shape == (5, 8, 8)
    assert torch.isfinite(found.saliency).all()
    assert (found.saliency >= 0).all()


def test_float32_is_exact_to_its_own_rounding() -> None:
    found = fullgrad(shaken(conv_net()).float(), images().float(), torch.zeros(5, dtype=torch.long))
    assert found.residual.max() < 1e-5
    assert found.saliency.dtype == torch.float32


def test_bias_terms_of_a_relu_network_are_gradients_with_respect_to_its_biases() -> None:
    """Srinivas and Fleuret's own definition: <df/db, b>, by autograd on the bias parameters, one image at a time."""
    model = shaken(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)))
    x = images()
    found = fullgrad(model, x, torch.full((5,), 2))
    biases = [model[0].bias, model[2].bias, model[5].bias]  # type: ignore[index]
    for i in range(5):
        gradients = torch.autograd.grad(model(x[i : i + 1])[0, 2], biases)  # type: ignore[arg-type]
        expected = torch.stack([(g * b).sum() for g, b in zip(gradients, biases, strict=True)])
        torch.testing.assert_close(found.bias_terms[i], expected.detach())


def test_batch_norm_has_the_bias_that_its_statistics_imply() -> None:
    model = shaken(nn.Sequential(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 2, bias=False)))
    norm, x = model[0], images()  # type: ignore[index]
    found = fullgrad(model, x, torch.ones(5, dtype=torch.long))
    bias = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = model[2].weight[1].view(2, 8, 8)  # type: ignore[index]
    torch.testing.assert_close(found.bias_terms[:, 0], (weight * bias[:, None, None]).sum().detach().expand(5))
    assert found.layers == ("0",)


def test_normalising_the_input_is_a_bias_at_the_input() -> None:
    model = nn.Sequential(Normalise(0.4, 0.25), nn.Flatten(), nn.Linear(128, 1, bias=False)).double()
    x = images()
    found = fullgrad(model, x)
    weight = model[2].weight.view(2, 8, 8).detach()  # type: ignore[index]
    torch.testing.assert_close(found.input_term, (x * weight).flatten(1).sum(dim=1) / 0.25)
    torch.testing.assert_close(found.bias_terms[:, 0], -(0.4 / 0.25) * weight.sum().expand(5))


def test_a_network_without_biases_has_only_its_input() -> None:
    model = shaken(nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                                 nn.Linear(36, 3, bias=False)))
    for x in (images(), images().float()):
        found = fullgrad(model.to(x.dtype), x, torch.zeros(5, dtype=torch.long))
        assert found.layers == ()
        torch.testing.assert_close(found.input_term, found.value, rtol=1e-5, atol=1e-6)


def scaled(values: Tensor) -> Tensor:
    """|v| between its minimum and maximum over one image, summed over channels; one image at a time."""
    return torch.stack([((v - v.min()) / (v.max() - v.min())).sum(dim=0) for v in values.abs()])


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity()])
def test_the_map_is_built_as_stated(act: nn.Module) -> None:
    """A convolution with stride 2: the input's map at full size, the bias's enlarged from 4x4, by hand."""
    model = shaken(nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), act, nn.Flatten(), nn.Linear(48, 2, bias=False)))
    x = images()
    conv, weight = model[0], model[3].weight[0].view(3, 4, 4)  # type: ignore[index]
    with torch.no_grad():
        y = conv(x)
        gradient = weight * ((y > 0) | isinstance(act, nn.Identity))
        at_input = F.conv_transpose2d(gradient, conv.weight, stride=2) * x
        at_bias = gradient * conv.bias[:, None, None]
    small = scaled(at_bias)
    large = F.interpolate(small[:, None], size=(8, 8), mode="bilinear", align_corners=False)[:, 0]
    found = fullgrad(model, x, torch.zeros(5, dtype=torch.long))
    torch.testing.assert_close(found.saliency, scaled(at_input) + large)


def test_fibres_with_an_orientation_axis_keep_their_place() -> None:
    class Lifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm3d(2)

        def forward(self, x: Tensor) -> Tensor:
            lifted = torch.stack([x.rot90(k, (2, 3)) for k in range(4)], dim=2)
            return self.norm(lifted).relu().amax(dim=2).mean(dim=(2, 3))

    found = fullgrad(shaken(Lifted()), images(), torch.zeros(5, dtype=torch.long))
    assert found.residual.max() < EXACT
    assert found.layers == ("norm",)


def test_images_do_not_see_each_other() -> None:
    model, x, targets = shaken(conv_net()), images(), torch.tensor([0, 1, 2, 1, 0])
    whole = fullgrad(model, x, targets)
    alone = [fullgrad(model, x[i : i + 1], targets[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(whole.saliency, torch.cat([a.saliency for a in alone]))
    torch.testing.assert_close(whole.bias_terms, torch.cat([a.bias_terms for a in alone]))


def test_the_model_is_left_as_it_was() -> None:
    model = conv_net().double().train()
    model[2].eval()  # type: ignore[index]
    model[1].weight.requires_grad_(False)  # type: ignore[index]
    modes = [m.training for m in model.modules()]
    learning = [p.requires_grad for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = images()
    before = x.clone()
    first = fullgrad(model, x, torch.zeros(5, dtype=torch.long))
    with torch.no_grad(), pytest.raises(GeomsslError):
        fullgrad(model, x, torch.full((5,), 7))
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == learning
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(x, before)
    assert torch.equal(first.saliency, fullgrad(model, x, torch.zeros(5, dtype=torch.long)).saliency)


def test_a_module_that_keeps_something_is_not_left_with_leftovers() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 128))
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is None:
                self.kept = self.weight.detach() * 2
            return F.linear(x.flatten(1), self.kept) + 1.0

    model = Keeping().double()
    assert fullgrad(model, images(), torch.zeros(5, dtype=torch.long)).residual.max() < EXACT
    assert model.kept is not None
    model.kept.data_ptr()
    assert torch.isfinite(model(images())).all()


class Offset(torch.autograd.Function):
    """x + 1, written so that nothing can look inside."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x + 1.0

    @staticmethod
    def setup_context(ctx: object, inputs: object, output: object) -> None:
        pass

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def jvp(ctx: object, tangent: Tensor) -> Tensor:
        return tangent.view_as(tangent)


def test_what_cannot_be_seen_shows_in_the_residual() -> None:
    class Hidden(nn.Module):
        def __init__(self, child: nn.Module | None) -> None:
            super().__init__()
            self.child = child

        def forward(self, x: Tensor) -> Tensor:
            return Offset.apply(x.flatten(1).sum(dim=1, keepdim=True))

    sums = images().flatten(1).sum(dim=1)
    torch.testing.assert_close(fullgrad(Hidden(nn.Identity()), images()).residual, 1 / sums)
    # as a module of its own it is one function, whatever is inside
    assert fullgrad(Hidden(None), images()).residual.max() < EXACT


def test_features_that_do_not_lie_image_by_image_show_in_the_residual() -> None:
    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return (x.flatten(1).T + 1.0).T.sum(dim=1, keepdim=True)

    found = fullgrad(Across(), images())
    assert found.layers == ()
    torch.testing.assert_close(found.residual, 128 / images().flatten(1).sum(dim=1))


def test_a_model_that_reads_a_layer_by_a_hook_of_its_own_is_complete() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(2, 3, 8), nn.Flatten())
            self.seen: Tensor | None = None
            self.body[0].register_forward_hook(lambda m, i, o: setattr(self, "seen", o))
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.body(x)
            assert self.seen is not None
            return self.last(self.seen.flatten(1))

    found = fullgrad(shaken(Read()), images(), torch.zeros(5, dtype=torch.long))
    assert found.residual.max() < EXACT
    assert found.layers == ("body.0", "last")


def test_what_is_written_in_place_is_followed() -> None:
    """Into the input, into a feature whose returned value nobody reads, and into what the input still needs."""

    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(128, 3)

        def forward(self, x: Tensor) -> Tensor:
            x.sub_(0.3)
            h = x.flatten(1) * 2
            h.add_(-1.0)
            F.elu(h, inplace=True)
            h += x.flatten(1)
            return self.last(h)

    x = images()
    before = x.clone()
    found = fullgrad(shaken(Writing()), x, torch.zeros(5, dtype=torch.long))
    assert found.residual.max() < EXACT
    assert found.layers == ("sub", "add", "elu", "last")
    assert torch.equal(x, before)


def test_what_comes_back_unwritten_is_left_alone() -> None:
    """`contiguous` gives back its own input, which relu still needs as it is."""

    class Same(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(128, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last((x - 0.3).flatten(1).relu().contiguous())

    found = fullgrad(shaken(Same()), images(), torch.zeros(5, dtype=torch.long))
    assert found.residual.max() < EXACT
    assert found.layers == ("sub", "last")


def test_a_repeated_module_has_a_name_for_every_call() -> None:
    found = fullgrad(shaken(Reused()), images(), torch.zeros(5, dtype=torch.long))
    assert found.layers == ("stem", "norm", "body", "norm (2)", "body (2)", "norm (3)", "head")


def test_a_constant_network_is_all_bias() -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.full((len(x), 1), 3.0, dtype=x.dtype) + 0 * x.flatten(1).sum(dim=1, keepdim=True)

    found = fullgrad(Constant(), images())
    assert found.residual.max() < EXACT
    torch.testing.assert_close(found.bias_terms.sum(dim=1), torch.full((5,), 3.0, dtype=torch.float64))
    assert (found.saliency == 0).all()


@pytest.mark.parametrize(
    ("x", "targets", "what"),
    [
        (torch.zeros(2, 3), None, "images of shape"),
        (torch.full((2, 2, 8, 8), math.nan), torch.zeros(2, dtype=torch.long), "finite images"),
        (torch.zeros(2, 2, 8, 8), None, "without targets"),
        (torch.zeros(2, 2, 8, 8), torch.tensor([0, 3]), "outside 0..2"),
        (torch.zeros(2, 2, 8, 8), torch.tensor([0]), "targets"),
    ],
)
def test_bad_input_is_refused(x: Tensor, targets: Tensor | None, what: str) -> None:
    with pytest.raises(GeomsslError, match=what):
        fullgrad(shaken(conv_net()).float(), x, targets)
