"""scale_error: features that move exactly with scale score nothing, wrong ones do, and unmatched factors are not judged."""

import pytest
import torch
from torch import nn

from geomssl.data.rendered import Fields
from geomssl.encoders.hermite import HermiteConv2d
from geomssl.errors import GeomsslError
from geomssl.probes.scales import scale_error
from geomssl.transforms.groups import Scales

GEOMETRIC = Scales((1.0, 1.25, 1.5625))


def pictures(n=3, size=33):
    return Fields(n, 1, size, 0.15, seed=2)


def lifted(kernel, factors=GEOMETRIC.factors):
    torch.manual_seed(0)
    conv = HermiteConv2d(1, 3, kernel, 2, "scale", factors, lifting=True, padding=kernel // 2)
    # No mean: what a cut filter makes of the mean of a picture is another error.
    return nn.Sequential(Shift(), conv).double()


class Shift(nn.Module):
    def forward(self, x):
        return x - 0.5


class Copies(nn.Module):
    """The picture itself at each scale, times the given numbers: moves exactly where neighbours have the same number."""

    def __init__(self, *numbers):
        super().__init__()
        self.numbers = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))

    def forward(self, x):
        return x[:, :, None] * self.numbers.view(1, 1, -1, 1, 1)


def test_equal_copies_move_exactly():
    found = scale_error(Copies(1.0, 1.0, 1.0), pictures(), GEOMETRIC)
    assert found.total.shape == (2,)
    assert float(found.total.max()) < 0.01
    assert not found.exact.any()


def test_the_error_of_unequal_copies_by_closed_form():
    # Under 1.25 the pairs are 1 -> 1.25 and 1.25 -> 1.5625. With numbers (a, b, b) only the first is wrong: f(T x) = b T x, and
    # a T x is declared, so total^2 = (b - a)^2 V / (a^2 V + b^2 V), whatever V and apart from means.
    class Centred(Copies):
        def forward(self, x):
            return super().forward(x - 0.5)

    a, b = 1.0, 1.5
    found = scale_error(Centred(a, b, b), pictures(), GEOMETRIC, torch.tensor([[1.0]]))
    # Denominators are about the mean over the images, numerators are not.
    x = pictures().images(torch.arange(3), GEOMETRIC, torch.ones(3, 1), dtype=torch.float64) - 0.5
    about = float((x - x.mean(dim=0)).square().sum() / x.square().sum())
    expected = ((b - a) ** 2 / (a**2 + b**2) / about) ** 0.5
    assert float(found.total) == pytest.approx(expected, rel=0.05)


def test_unmatched_factors_are_not_judged():
    # Under 1.5625 only 1 -> 1.5625 is matched, so what stands at 1.25 is free; and of three maps one is judged.
    free = scale_error(Copies(1.0, 7.0, 1.0), pictures(), GEOMETRIC, torch.tensor([[2.0]]), boundary="none")
    assert float(free.total) < 0.05
    assert float(free.kept) == pytest.approx(1 / 3)
    assert float(scale_error(Copies(1.0, 7.0, 1.0), pictures(), GEOMETRIC, torch.tensor([[1.0]])).total) > 0.3


def test_larger_filters_err_less_and_another_order_of_scales_errs_more():
    small, large = (float(scale_error(lifted(k), pictures(), GEOMETRIC).total.max()) for k in (5, 13))
    assert large < 0.02 < small
    turned_round = scale_error(lifted(13), pictures(), Scales((1.5625, 1.25, 1.0)))
    assert float(turned_round.total.max()) > 0.2


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: scale_error(Copies(1.0, 1.0), pictures(), GEOMETRIC), "one map a scale"),
        (lambda: scale_error(lifted(41), pictures(), GEOMETRIC), "boundary none"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
