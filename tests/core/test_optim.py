"""Optimizers: LARS against its equation, written out here in float64, and what it leaves alone."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from geomssl.optim import LARS, learning_rate

LR, WD, M, ETA = 0.4, 1e-2, 0.9, 2e-3


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double()


def gradients(net, step):
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(p.shape, generator=draw, dtype=torch.float64) for p in net.parameters()]


def by_hand(weights, given, rates):
    """v <- m v + r (g + wd w), w <- w - lr v; vectors: v <- m v + g. Plain numbers and lists, no tensor arithmetic."""
    shapes = [w.dim() for w in weights]
    flat = [w.flatten().tolist() for w in weights]
    speed = [[0.0] * len(w) for w in flat]
    for grads, lr in zip(given, rates, strict=True):
        for i, g in enumerate(g.flatten().tolist() for g in grads):
            w, ratio, decay = flat[i], 1.0, 0.0
            if shapes[i] > 1:
                norm_w, norm_g = (sum(x * x for x in values) ** 0.5 for values in (w, g))
                ratio, decay = ETA * norm_w / (norm_g + WD * norm_w), WD
            speed[i] = [M * v + ratio * (a + decay * b) for v, a, b in zip(speed[i], g, w, strict=True)]
            flat[i] = [b - lr * v for b, v in zip(w, speed[i], strict=True)]
    return [torch.tensor(w, dtype=torch.float64).view(like.shape) for w, like in zip(flat, weights, strict=True)]


@pytest.mark.parametrize("rates", [(LR, LR, LR), (LR / 3, 2 * LR / 3, LR)])
def test_the_first_three_steps_of_lars_are_its_equation(rates):
    """Constant and warming up: the rate multiplies the velocity and is not remembered by it."""
    net = model()
    start = [p.detach().clone() for p in net.parameters()]
    optimizer = LARS.build(LARS.Config(lr=LR, weight_decay=WD, momentum=M, trust=ETA), net.parameters())
    given = [gradients(net, step) for step in range(3)]
    for grads, lr in zip(given, rates, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(net.parameters(), grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for p, wanted in zip(net.parameters(), by_hand(start, given, rates), strict=True):
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-12, atol=1e-14)


def test_lars_steps_do_not_depend_on_the_gradients_scale_and_biases_are_not_decayed():
    """What adaptation is for: without decay, a gradient a thousand times larger moves filters as far, and biases further."""
    moved = []
    for scale in (1.0, 1000.0):
        net = model()
        before = [p.detach().clone() for p in net.parameters()]
        optimizer = LARS.build(LARS.Config(lr=LR, weight_decay=0), net.parameters())
        for p, g in zip(net.parameters(), gradients(net, 0), strict=True):
            p.grad = g * scale
        optimizer.step()
        moved.append([p.detach() - b for p, b in zip(net.parameters(), before, strict=True)])
    for small, large in zip(*moved, strict=True):
        torch.testing.assert_close(large, small * (1 if small.dim() > 1 else 1000))
    net = model()
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = LARS.build(LARS.Config(lr=LR, weight_decay=0.5), net.parameters())
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, b in zip(net.parameters(), before, strict=True):
        assert torch.equal(p.detach(), b) == (p.dim() == 1)


def test_lars_state_is_plain_and_continues():
    """Two steps, a state through load_state_dict, a third step: the same as three."""
    whole, parts = model(), model()
    straight, first = (LARS.build(LARS.Config(), net.parameters()) for net in (whole, parts))
    for step in range(3):
        if step == 2:
            kept = first.state_dict()
            first = LARS.build(LARS.Config(), parts.parameters())
            first.load_state_dict(kept)
        for net, optimizer in ((whole, straight), (parts, first)):
            for p, g in zip(net.parameters(), gradients(net, step), strict=True):
                p.grad = g.clone()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_warm_up_and_cosine():
    rates = [learning_rate(2.0, t, 100, 10) for t in range(101)]
    assert rates[:10] == pytest.approx([2.0 * (t + 1) / 10 for t in range(10)])
    assert rates[10] == 2.0
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in pairwise(rates[10:]))
