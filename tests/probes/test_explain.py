"""The explain probe: its tables and words on modules whose fault is known."""

import json

import pytest
import torch
from torch import nn

from geomssl import artifact, encoders
from geomssl.config import parse
from geomssl.data.base import Resident
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.encoders.wrap import wrap
from geomssl.errors import GeomsslError
from geomssl.probes.equivariance import equivariance_error
from geomssl.probes.explain import Options, probe
from geomssl.probes.subject import Subject
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations

C4 = CyclicRotations(4)


def source(n=24, size=16):
    pixels = torch.randint(0, 256, (n, 1, size, size), generator=generator(0, "test-explain"), dtype=torch.uint8)
    return Resident("noise", "test", pixels, None)


def subject(module, data=None, dtype=torch.float64):
    encoder = module if isinstance(module, encoders.base.Encoder) else wrap(module, in_channels=1)
    return Subject(encoder, data or source(), dtype=dtype, provenance={"run": "r"})


def built(name, **options):
    with seeded(0, "test-explain-encoder"):
        return encoders.build(name, in_channels=1, **options)


class OffGrid(encoders.base.Encoder):
    """A C4 network of three layers, the second of which strides off the grid at even sizes."""

    in_channels, dim, group = 1, 3, C4

    def __init__(self):
        super().__init__()
        with seeded(0, "test-explain-off-grid"):
            self.stem = GroupConv2d(1, 3, 3, C4, lifting=True, padding=1)
            self.layer1 = GroupConv2d(3, 3, 3, C4, stride=2, padding=1)
            self.layer2 = GroupConv2d(3, 3, 3, C4, padding=1)

    def fibres(self, images):
        return self.layer2(self.layer1(self.stem(images).relu()).relu())

    def pool(self, fibres):
        return fibres.mean((2, 3, 4))


def column(found, name, table="layers"):
    return dict(zip(found.table("layers").columns["layer"], found.table(table).columns[name], strict=True))


def test_the_fault_is_named_metered_and_shown_by_its_repair(tmp_path):
    found = probe(subject(OffGrid()), Options(resamples=300))
    assert "it must break at 1 of 3 layers, by grid (layer1)" in found.headline
    assert "'layer1: at stride 1, then pooled evenly' lowers the error most" in found.headline
    table = found.table("layers").columns
    assert column(found, "must_break") == {
        "stem": None, "relu after stem": None, "layer1": "stride 2 on 16x16 leaves 1 pixel over at the far end",
        "relu after layer1": None, "layer2": None,
    }
    assert (column(found, "sizes")["layer1"], column(found, "nearest_size")["layer1"]) == ("H ≡ 1 mod 2", 17)
    assert column(found, "aliasing")["layer1"] > 0.1
    assert column(found, "change")["layer1"] == found.metric("best_change").value < -0.3
    assert found.metric("best_change").interval.high < 0
    assert found.table("repairs").columns["total_after"][0] < 1e-12
    assert any("for H ≡ 1 mod 2; 17 would do (read again at that size)" in note for note in found.notes)
    assert found.metric("must_break").value == 1
    again = artifact.load(found.save(tmp_path))
    assert again.to_json() == found.to_json()
    assert again.table("layers").columns == table
    json.dumps(found.to_json(), allow_nan=False)


def test_its_total_is_that_of_equivariance_error_over_all_elements():
    made = subject(OffGrid())
    found = probe(made, Options(resamples=100))
    expected = equivariance_error(made.encoder, made.images(torch.arange(24)), C4, C4.elements()[1:])
    pooled = (expected.numerators.sum() / expected.denominators.sum()).sqrt()
    assert found.metric("total").value == pytest.approx(float(pooled), rel=1e-12)
    assert found.table("repairs").columns["total_before"][0] == found.metric("total").value


def test_a_size_that_fits_and_an_exact_network_have_nothing_to_repair():
    odd = probe(subject(OffGrid(), source(size=17)), Options(resamples=100))
    exact = probe(subject(built("c4-cnn", widths=(2, 3, 4))), Options(resamples=100))
    for found in (odd, exact):
        assert "nothing in the module has to break it; there was no padding, stride or pooling to repair" in found.headline
        assert found.metric("total").value < 1e-10
        assert found.metric("best_change").value is None
        assert len(found.table("repairs")) == 0
    assert any("fit 90° for H ≡ 1 mod 2; 17 does" in note for note in odd.notes)
    assert any("fit 90° at every size" in note for note in exact.notes)


def test_an_ordinary_network_breaks_by_its_filters_which_no_repair_touches():
    found = probe(subject(built("cnn", widths=(2, 3, 4))), Options(resamples=100))
    assert "by filters" in found.headline
    assert "no padding, stride or pooling to repair" in found.headline
    assert column(found, "not_repaired")["convs.1"] == "other filters would be other weights"
    assert any("GroupConv2d" in note for note in found.notes)


def test_under_shifts_the_paddings_and_strides_are_tried_strongest_first():
    with seeded(0, "test-explain-plain"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    found = probe(subject(net), Options(transform="translations", repairs=2, resamples=100))
    assert found.provenance["action"] == "spatial"
    assert len(found.table("repairs")) == 2
    assert any("Repairs that were not measured: 2 (--repairs 2)" in note for note in found.notes)
    every = probe(subject(net), Options(transform="translations", resamples=100))
    tried = every.table("repairs").columns
    assert sorted(zip(tried["layer"], tried["repair"], strict=True)) == [
        ("0", "circular padding"), ("2", "average instead of max"), ("2", "max at stride 1, then blurred"),
        ("3", "circular padding"),
    ]
    change = every.table("repairs").columns["change"]
    assert change == sorted(change)
    assert set(every.table("repairs").columns["cause"]) == {"padding", "pooling"}
    assert "zero padding at the border" in column(every, "must_break")["0"]


def test_a_transformer_names_its_patches_and_its_positions():
    vit = built("vit-small", size=16, patch=8, width=24, depth=1, heads=2)
    found = probe(subject(vit), Options(transform="translations", resamples=100))
    assert found.table("layers").columns["what"][:2] == ["convolution", "position"]
    assert dict(zip(found.table("repairs").columns["layer"], found.table("repairs").columns["repair"], strict=True)) == {
        "patch_embed.proj": "blurred, then at its stride", "pos_embed": "the same at all places (its mean)",
    }
    assert any("adds what depends on the place" in note for note in found.notes)


def test_what_only_resamples_is_said_to_have_no_rule():
    with seeded(0, "test-explain-plain"):
        net = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    found = probe(subject(net), Options(transform="zoom", draws=2, repairs=3, resamples=100))
    assert "the rules of exactness do not speak of it" in found.headline
    assert set(found.table("repairs").columns["cause"]) == {"padding", "stride"}
    assert found.metric("must_break").value == 0


def test_a_named_layer_is_explained_by_the_calls_before_it():
    found = probe(subject(OffGrid()), Options(layer="stem", resamples=100))
    assert found.table("layers").columns["layer"] == ["stem"]
    h = probe(subject(OffGrid()), Options(layer="h", resamples=100))
    assert h.provenance["action"] == "trivial"


def test_functional_layers_have_names_that_differ():
    class Plain(nn.Module):
        def forward(self, x):
            for _ in range(2):
                x = nn.functional.max_pool2d(x, 2)
            return x

    found = probe(subject(Plain()), Options(resamples=100))
    assert found.table("layers").columns["layer"] == ["max-pool", "max-pool #2"]


def test_a_module_that_takes_one_size_only_is_said_to():
    class OneSize(nn.Module):
        def __init__(self):
            super().__init__()
            with seeded(0, "test-explain-one"):
                self.conv, self.head = nn.Conv2d(1, 2, 3, 2, 1), nn.Linear(2 * 64, 5)

        def forward(self, x):
            return self.head(self.conv(x).flatten(1))

    found = probe(subject(OneSize()), Options(resamples=100))
    assert any("does not take images of that size" in note for note in found.notes)
    assert any("weighs each of 8x8 places by itself" in note for note in found.notes)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: probe(subject(OffGrid(), source(n=1)), Options()), "at least 2"),
        (lambda: probe(subject(OffGrid()), Options(transform="c5x")), "c5x"),
        (lambda: probe(subject(OffGrid()), Options(layer="stm")), "'stem'"),
        (lambda: parse(Options, {"repair": 3}, "options"), "'repairs'"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_is_described():
    assert all(field.description for field in Options.model_fields.values())
