"""The explain probe: its tables and words on modules whose fault is known."""

import json

import pytest
import torch
from PIL import Image
from torch import nn

from geomssl import artifact, data, encoders
from geomssl.config import parse
from geomssl.data.base import Resident
from geomssl.encoders.group_conv import GroupConv2d
from geomssl.encoders.wrap import wrap
from geomssl.errors import GeomsslError
from geomssl.probes.effect import Effect
from geomssl.probes.equivariance import equivariance_error
from geomssl.probes.explain import Options, probe
from geomssl.probes.inputs import pictures
from geomssl.probes.repair import Repair
from geomssl.probes.subject import Subject
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations, Rotate

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
    assert "the one repair, 'layer1: at stride 1, then pooled evenly', lowers the error, " in found.headline
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
    (said,) = [note for note in found.notes if note.startswith("layer1 ")]
    share, change = found.metric("aliasing"), found.metric("best_change")
    aliases = f"{share.value:.2g} [{share.interval.low:.2g}, {share.interval.high:.2g}] of the energy aliases"
    assert said == (
        "layer1 (convolution 3x3, stride 2, 16x16 to 8x8): must break, since stride 2 on 16x16 leaves 1 pixel over at the far "
        f"end; up to here 90° needs H ≡ 1 mod 2, 17 would do; {aliases}; repair 'at stride 1, then pooled evenly': change "
        f"{change.value:+.2g} [{change.interval.low:.2g}, {change.interval.high:.2g}], which shows a cause."
    )
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
    assert any("their own turned selves" in note for note in found.notes)


def test_under_shifts_the_paddings_and_strides_are_tried_strongest_first():
    with seeded(0, "test-explain-plain"):
        net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    found = probe(subject(net), Options(transform="translations", repairs=2, resamples=100))
    assert found.provenance["action"] == "spatial"
    assert [where.endswith("at once") for where in found.table("repairs").columns["layer"]] == [False, False, True, True]
    assert any("Repairs that were not measured by themselves: 2 (--repairs 2)" in note for note in found.notes)
    every = probe(subject(net), Options(transform="translations", resamples=100))
    tried = every.table("repairs").columns
    assert sorted(zip(tried["layer"], tried["repair"], strict=True)) == [
        ("0", "circular padding"), ("2", "average instead of max"), ("2", "max at stride 1, then blurred"),
        ("2 layers at once", "all repairs of padding"), ("3", "circular padding"), ("3 layers at once", "all repairs"),
    ]
    change = tried["change"][:4]
    assert change == sorted(change)
    assert tried["cause"][4:] == ["padding", "all"]
    last = every.metric("all_change")
    assert (last.value, last.interval.low) == (tried["change"][-1], tried["low"][-1])
    assert f"All repairs at once (3 layers): {tried['total_before'][-1]:.3g} to {tried['total_after'][-1]:.3g}" in " ".join(
        every.notes
    )
    assert "zero padding at the border" in column(every, "must_break")["0"]


def test_repairs_that_were_not_measured_are_said_to_wait():
    found = probe(subject(OffGrid()), Options(repairs=0, resamples=100))
    assert "by grid (layer1); no repair was measured (error" in found.headline
    assert any("repair 'at stride 1, then pooled evenly' was not measured." in note for note in found.notes)
    assert len(found.table("repairs")) == 0


def test_a_repair_that_rounds_is_no_cause():
    def changed(by):
        return Effect(Repair((), "", "", {}), "", 1.0, 1.0 + by, by - 1e-9, by + 1e-9)

    assert [changed(by).sure for by in (-1e-2, -1e-7, 0, 1e-7, 1e-2)] == [-1, 0, 0, 0, 1]


def test_a_transformer_names_its_patches_and_its_positions():
    vit = built("vit-small", size=16, patch=8, width=24, depth=1, heads=2)
    found = probe(subject(vit), Options(transform="translations", resamples=100))
    assert found.table("layers").columns["what"][:2] == ["convolution", "position"]
    assert dict(zip(*(found.table("repairs").columns[k][:2] for k in ("layer", "repair")), strict=True)) == {
        "patch_embed.proj": "blurred, then at its stride", "pos_embed": "the same at all places (its mean)",
    }
    assert any("adds what depends on the place" in note for note in found.notes)


def test_what_only_resamples_is_said_to_have_no_rule():
    with seeded(0, "test-explain-plain"):
        net = nn.Sequential(nn.Conv2d(1, 3, 3, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, padding=1))
    found = probe(subject(net), Options(transform="zoom", draws=2, repairs=3, resamples=100))
    assert "the rules of exactness do not speak of it" in found.headline
    assert set(found.table("repairs").columns["cause"]) == {"padding", "stride", "all"}
    assert found.metric("must_break").value == 0


class OffGridThrice(OffGrid):
    """The sentence of the issue: stride 2 at layer3 of images of 32x32."""

    def __init__(self):
        super().__init__()
        with seeded(0, "test-explain-thrice"):
            self.layer2, self.layer3 = (GroupConv2d(3, 3, 3, C4, stride=2, padding=1) for _ in range(2))

    def fibres(self, images):
        return self.layer3(self.layer2(self.layer1(self.stem(images).relu()).relu()).relu())


def test_causes_that_hide_each_other_are_shown_by_repairing_all_of_them():
    found = probe(subject(OffGridThrice(), source(size=32)), Options(images="fields", n=16, resamples=100))
    assert any("layer3 (" in n and "90° needs H ≡ 1 mod 8, 33 would do" in n for n in found.notes)
    tried = found.table("repairs").columns
    assert tried["layer"][-1] == "3 layers at once"
    assert min(tried["total_after"][:-1]) > 0.3
    assert tried["total_after"][-1] < 1e-12
    assert found.headline.endswith(f"all repairs at once lower it, {found.metric('total').value:.3g} to "
                                   f"{tried['total_after'][-1]:.3g}.")


class Mean(nn.Module):
    def forward(self, x):
        return x.mean((2, 3))


def test_rendered_pictures_move_as_their_formulas_do():
    found = probe(
        subject(Mean(), source(size=21)), Options(images="fields", transform="rotate(10..10 by 1)", n=8, resamples=100)
    )
    drawn, rows = pictures("fields", 8, 1, 21, 0.25, False, 0), torch.arange(8)
    x, turned = (
        drawn.images(rows, *how, dtype=torch.float64).mean((2, 3)) for how in ((), (Rotate(), torch.full((8, 1), 10.0)))
    )
    by_hand = ((turned - x).square().sum() / (x - x.mean(0)).square().sum()).sqrt()
    assert found.metric("total").value == pytest.approx(float(by_hand), rel=1e-9)
    assert [found.provenance[key] for key in ("images", "n", "images_sha256")] == ["fields", 8, None]
    assert not any("--images fields takes that away" in note for note in found.notes)
    natural = probe(subject(Mean(), source(size=21)), Options(transform="rotate(10..10 by 1)", resamples=100))
    assert any("--images fields takes that away" in note for note in natural.notes)
    assert natural.provenance["images"] == "data"


def test_phantoms_and_periodic_fields_are_exact_for_networks_that_are():
    turned = probe(subject(OffGrid(), source(size=21)), Options(images="phantoms", n=8, resamples=100))
    assert turned.metric("total").value < 1e-12
    circular = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular")
    shifted = probe(subject(circular, source(size=16)), Options(images="fields", transform="translations", n=8, resamples=100))
    assert shifted.metric("total").value < 1e-7


def test_a_data_set_of_formulas_and_a_folder_are_taken_as_they_are(tmp_path):
    for which in ("a", "b"):
        (tmp_path / which).mkdir()
        for i in range(4):
            pixels = torch.randint(0, 256, (9, 9, 3), generator=generator(i, which), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / which / f"{i}.png")
    folder = data.load(f"folder:{tmp_path}", "train", size=9)
    with seeded(0, "test-explain-folder"):
        net = wrap(nn.Sequential(nn.Conv2d(3, 2, 3, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 3, padding=1)), in_channels=3)
    found = probe(Subject(net, folder), Options(resamples=100))
    assert (found.metric("total").n, found.provenance["images"]) == (len(folder), "data")
    fields = data.load("fields", "test", size=20, n=10, channels=3)
    assert probe(Subject(net, fields), Options(resamples=100, n=6)).provenance["images"] == "fields"


def test_what_moves_no_pixels_is_no_matter_of_grids():
    found = probe(subject(OffGrid()), Options(transform="brightness(0.2)", draws=2, resamples=100))
    assert "it moves no pixels, so that no grid has to break it; there was no padding" in found.headline
    assert len(found.table("repairs")) == 0


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
        (lambda: probe(subject(OffGrid()), Options(images="fields", n=1)), "at least 2"),
        (lambda: probe(subject(OffGrid()), Options(images="phantoms", transform="c4")), "larger bandwidth"),
        (lambda: parse(Options, {"images": "photos"}, "options"), "'fields'"),
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
