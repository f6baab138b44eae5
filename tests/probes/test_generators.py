"""Generators: differences of pixels in closed form, and a pass of values and tangents against two backward passes."""

import copy
import math

import pytest
import torch
from torch import nn

from geomssl.probes.generators import differences, push

DOUBLE = torch.float64


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 12])
def test_central_differences_are_exact_for_polynomials(length):
    place = torch.arange(length, dtype=DOUBLE)
    matrix = differences(length)
    assert (matrix @ place - float(length > 1)).abs().max() < 1e-12
    if length >= 3:
        assert (matrix @ place**2 - 2 * place).abs().max() < 1e-11
    if length == 12:
        assert (matrix @ place**6 - 6 * place**5)[3:-3].abs().max() < 1e-6
        assert (matrix @ place**7 - 7 * place**6)[3:-3].abs().max() > 1


@pytest.mark.parametrize("length", [7, 8])
def test_spectral_differences_are_exact_for_whole_cycles(length):
    turn = 2 * math.pi * torch.arange(length, dtype=DOUBLE) / length
    for k in range(4):
        found = differences(length, "spectral") @ (k * turn).sin()
        assert (found - 2 * math.pi * k / length * (k * turn).cos()).abs().max() < 1e-12


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3).eval(), nn.BatchNorm2d(3, affine=False, eps=0.5).eval(), nn.BatchNorm2d(3).train(),
        nn.BatchNorm2d(3, track_running_stats=False).eval(), nn.Sequential(nn.Flatten(), nn.BatchNorm1d(75)).eval(),
        nn.Conv2d(3, 2, 3, 2, 1), nn.Conv2d(3, 2, 3, bias=False),
    ],
)  # fmt: skip
def test_the_derivative_of_each_linear_layer_is_that_of_two_backward_passes(norm):
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).double()
    for value in (*norm.parameters(), *(b for b in norm.buffers() if b.is_floating_point())):
        value.data.uniform_(0.5, 2)
    images, way = torch.randn(4, 3, 5, 5, dtype=DOUBLE), torch.randn(4, 3, 5, 5, dtype=DOUBLE)
    values, slopes = push(lambda x: [norm(x), norm(x).square()], images, way)
    asked = images.requires_grad_()
    for value, slope, function in zip(values, slopes, (norm, lambda x: norm(x).square()), strict=True):
        out = function(asked)
        u = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, asked, u, create_graph=True)
        torch.testing.assert_close(value, out)
        torch.testing.assert_close(slope, torch.autograd.grad(pulled, u, way)[0])
