"""scale_error: features that move exactly with scale score nothing, wrong ones do, and unmatched factors are not judged."""

import pytest
import torch
from torch import nn

from geomssl import encoders
from geomssl.data.base import Resident
from geomssl.data.rendered import Fields
from geomssl.encoders.hermite import HermiteConv2d
from geomssl.errors import GeomsslError
from geomssl.probes.equivariance import Options, probe
from geomssl.probes.inputs import pictures as drawn
from geomssl.probes.scales import scale_error
from geomssl.probes.subject import Subject
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


def subject(**options):
    torch.manual_seed(0)
    chosen = {"group": "scale", "scales": GEOMETRIC.factors, "widths": (2, 2, 3), "size": None, **options}
    encoder = encoders.build("hssl-mnist", in_channels=1, **chosen)
    pixels = torch.randint(0, 256, (6, 1, 33, 33), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Subject(encoder, Resident("noise", "test", pixels, None), dtype=torch.float64)


def test_the_command_measures_what_scale_error_does():
    made = subject()
    settings = {"images": "fields", "n": 5, "seed": 3, "references": 4, "resamples": 200}
    options = Options(transform="scales(1, 1.25, 1.5625)", layer=("fibres", "h"), **settings)
    found = probe(made, options)
    expected = scale_error(
        made.encoder, drawn("fields", 5, 1, 33, 0.25, False, 3), GEOMETRIC, boundary="none", seed=3, resamples=200
    )
    table = found.table("elements").columns
    here = [k for k, layer in enumerate(table["layer"]) if layer == "fibres"]
    assert [table["element"][k] for k in here] == ["×1.25", "×1.562"]
    assert [table["total"][k] for k in here] == pytest.approx(expected.total.tolist(), rel=1e-9)
    assert min(table["total"]) > 0.05
    # nothing is resampled that the declaration does not itself read so, so that the bounds are the interval
    assert [table["resampling"][k] for k in here] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert found.provenance["action"] == "matched scales, trivial"
    assert any("fibres stand for the factors 1, 1.25, 1.5625" in note for note in found.notes)


def test_on_the_images_of_a_data_set_what_resampling_does_is_added():
    table = probe(subject(), Options(transform="scales", references=4, resamples=200)).table("elements").columns
    assert min(table["resampling"]) > 1e-3
    assert all(high > total for high, total in zip(table["bound_high"], table["total"], strict=True))


def test_enlargements_of_an_encoder_without_scales_are_held_to_move_its_maps():
    found = probe(subject(group="translation"), Options(transform="scales", references=0, resamples=200))
    assert found.provenance["action"] == "spatial"


def test_factors_that_are_not_the_encoders_are_one_line():
    with pytest.raises(GeomsslError, match=r"stand for 1, 1.25, 1.5625; expected --transform scales"):
        probe(subject(), Options(transform="scales(1, 1.5)"))
