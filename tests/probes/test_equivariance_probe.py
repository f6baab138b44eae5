"""The equivariance probe: what its artifact holds, which action it takes, and what it refuses."""

import json
import math

import pytest
import torch
from torch import nn

from geomssl import artifact, encoders
from geomssl.config import parse
from geomssl.data.base import Resident
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.probes.equivariance import Options, equivariance_error, probe
from geomssl.probes.subject import Subject
from geomssl.reports.gate import Rules, evaluate
from geomssl.transforms import CyclicRotations

COLUMNS = [
    "layer", "element", "total", "low", "high", "low_any", "resampling", "bound_low", "bound_high", "bound_low_any", "floor",
    "excess", "action_size", "exact", "degenerate",
]


def source(n=24, size=8, channels=1, constant=None):
    pixels = torch.randint(0, 256, (n, channels, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    if constant is not None:
        pixels.fill_(constant)
    return Resident("noise", "test", pixels, None)


def subject(name="c4-cnn", data=None, dtype=torch.float32, module=None, **options):
    torch.manual_seed(0)
    data = data or source()
    widths = {} if name == "mlp" else {"widths": (2, 3, 4)}
    encoder = module or encoders.build(name, in_channels=1, **{**widths, **options})
    return Subject(encoder, data, dtype=dtype, provenance={"run": name})


def verdict(found, limit=0.01):
    rules = parse(Rules, {"rule": [{"name": "r", "probe": "equivariance", "limit": limit}]}, "rules")
    return evaluate([found], rules)[0]


def test_the_artifact_is_whole_and_survives_the_disk(tmp_path):
    found = probe(subject(), Options())
    table = found.table("elements")
    assert list(table.columns) == COLUMNS
    assert table.columns["element"] == ["90°", "180°", "270°"]
    assert all(table.columns["exact"])
    assert not any(table.columns["degenerate"])
    assert found.metric("total").value == max(table.columns["total"]) < 1e-5
    assert found.metric("total").interval.low == max(table.columns["low_any"])
    assert found.metric("total").interval.high == max(table.columns["high"])
    assert found.metric("total").n == 24
    assert found.metric("chance").value == math.sqrt(2)
    assert found.headline.startswith("Turning the image (c4) moves the fibres as declared: worst error ")
    assert found.options["transform"] == "c4"
    assert found.provenance == {
        "run": "c4-cnn", "action": "regular", "transform": "c4", "images": "data", "n": 24, "layers": ["fibres"],
    }
    for bound, own in (("bound_low", "low"), ("bound_high", "high"), ("bound_low_any", "low_any")):
        assert table.columns[bound] == table.columns[own]
    assert table.columns["resampling"] == [0.0] * 3
    assert any("float32" in note for note in found.notes)
    again = artifact.load(found.save(tmp_path))
    assert again.to_json() == found.to_json()
    assert again.table("elements").columns == table.columns


def test_the_figures_are_those_of_equivariance_error():
    made = subject(dtype=torch.float64)
    found = probe(made, Options(seed=3, resamples=300)).table("elements").columns
    params = CyclicRotations(4).elements()[1:]
    expected = equivariance_error(
        made.encoder, made.images(torch.arange(24)), CyclicRotations(4), params, seed=3, resamples=300
    )
    assert found["action_size"] == pytest.approx(expected.action_size.tolist(), rel=1e-9)
    plain = subject("cnn", dtype=torch.float64)
    found = probe(plain, Options(seed=3, resamples=300)).table("elements").columns
    expected = equivariance_error(
        plain.encoder, plain.images(torch.arange(24)), CyclicRotations(4), params, "spatial", seed=3, resamples=300
    )
    for key, values in (("total", expected.total), ("low", expected.interval.low), ("low_any", expected.low_any)):
        assert found[key] == pytest.approx(values.tolist(), rel=1e-9), key


def test_the_gate_passes_the_c4_network_and_fails_the_plain_one():
    assert verdict(probe(subject(), Options())).verdict == "pass"
    failed = verdict(probe(subject("cnn"), Options()))
    assert (failed.verdict, failed.reason) == ("fail", "above-limit")


@pytest.mark.parametrize(
    ("name", "options", "chosen"),
    [
        ("c4-cnn", {}, "regular"),
        ("c4-cnn", {"transform": "d4"}, "spatial"),
        ("c4-cnn", {"transform": "brightness"}, "trivial"),
        ("c4-cnn", {"layer": "h"}, "trivial"),
        ("c4-cnn", {"action": "trivial"}, "trivial"),
        ("cnn", {}, "spatial"),
        ("cnn", {"transform": "translations", "draws": 3}, "spatial"),
        ("mlp", {}, "trivial"),
    ],
)
def test_the_action_and_why_are_stated(name, options, chosen):
    found = probe(subject(name, **({"size": 8, "widths": (16, 32)} if name == "mlp" else {})), Options(**options))
    assert found.provenance["action"] == chosen
    assert chosen in found.notes[0]
    assert f"the {chosen} action" in found.definition


def test_a_group_that_the_encoder_does_not_declare_is_said_to_be_a_doubtful_declaration():
    notes = " ".join(probe(subject("c4-cnn"), Options(transform="c8")).notes)
    assert "declares c4, not c8" in notes
    assert "may be the declaration's" in notes
    assert "--transform c4 asks for its own" in notes


def test_a_headline_gives_no_verdict_where_nothing_is_merely_permuted():
    found = probe(subject(), Options(transform="rotate", draws=3, references=0))
    assert "no verdict on the model" in found.headline
    mixed = probe(subject("cnn"), Options(transform="c8", references=0))
    assert "of the 3 elements in 7 that can be judged" in mixed.headline
    columns = mixed.table("elements").columns
    exact = [t for t, permutes in zip(columns["total"], columns["exact"], strict=True) if permutes]
    assert f"worst error {max(exact):.2g}" in mixed.headline


def test_shifts_by_the_stride_are_exact_and_the_stride_is_said():
    found = probe(subject("cnn"), Options(transform="translations", step=4))
    assert found.table("elements").columns["exact"] == [True] * 3
    assert any("4 image pixels, as the layers say" in note for note in found.notes)
    odd = probe(subject("cnn", source(size=9)), Options(transform="translations", step=3, draws=4))
    assert not any(odd.table("elements").columns["exact"])
    assert any("The layers do not tell the stride" in note for note in odd.notes)
    assert verdict(odd).verdict == "inconclusive"


def test_what_resamples_is_inconclusive_at_the_gate_and_says_what_the_floor_is():
    found = probe(subject(), Options(transform="rotate", draws=4, references=0))
    assert len(found.table("elements")) == 4
    assert any("not exact" in note and "no bound" in note for note in found.notes)
    assert verdict(found, limit=1.4).reason == "inexact-pair"
    assert found.metric("floor").value > 0


def test_without_an_inverse_the_floor_is_none_with_a_reason():
    found = probe(subject(), Options(transform="simclr", draws=3))
    assert found.metric("floor").value is None
    assert "no inverse" in found.metric("floor").reason
    assert found.table("elements").columns["floor"] == [None] * 3
    assert found.table("elements").columns["element"] == ["draw 1", "draw 2", "draw 3"]
    assert len(found.table("parameters").columns) > 5
    json.dumps(found.to_json(), allow_nan=False)


class Constant(Encoder):
    in_channels, dim = 1, 2

    def __init__(self):
        super().__init__()
        self.value = nn.Parameter(torch.ones(2))

    def fibres(self, images):
        return self.value.view(1, 2, 1, 1, 1).expand(len(images), 2, 1, 4, 4)

    def pool(self, fibres):
        return fibres.mean((2, 3, 4))


def test_a_constant_network_is_degenerate_everywhere_and_never_passes(tmp_path):
    found = probe(subject(module=Constant()), Options())
    assert found.metric("total").value is None
    assert "do not vary" in found.metric("total").reason
    assert found.table("elements").columns["degenerate"] == [True] * 3
    assert "nothing can be told" in found.headline
    assert any("Never a pass" in note for note in found.notes)
    assert verdict(found).reason == "degenerate"
    artifact.load(found.save(tmp_path))


def test_an_action_that_hardly_moves_anything_is_called_out():
    class Pooled(Constant):
        def fibres(self, images):
            mean = images.mean((2, 3), keepdim=True).unsqueeze(2)
            return mean.expand(-1, 2, 1, 4, 4) + 1e-3 * images[:, :, None, ::2, ::2]

    found = probe(subject(module=Pooled()), Options())
    assert any("trivially" in note for note in found.notes)
    trivial = probe(subject(), Options(layer="h"))
    assert any("keeps nothing of the image" in note for note in trivial.notes)


def test_n_and_seed_choose_the_images():
    full, some = probe(subject("cnn"), Options()), probe(subject("cnn"), Options(n=10))
    assert (full.metric("total").n, some.metric("total").n) == (24, 10)
    assert full.options_hash != some.options_hash
    other = probe(subject("cnn"), Options(n=10, seed=1))
    assert other.metric("total").value != some.metric("total").value
    assert probe(subject("cnn"), Options(n=10)).to_json() == some.to_json()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: probe(subject(data=source(n=1)), Options()), "at least 2"),
        (lambda: probe(subject(data=source(size=1)), Options()), "1x1"),
        (lambda: probe(subject(data=source(constant=7)), Options()), "all equal"),
        (lambda: probe(subject(data=source(channels=3)), Options()), "(N, 1, H, W)"),
        (lambda: probe(subject(module=encoders.wrap(nn.Conv2d(3, 2, 3), in_channels=1)), Options()), "3, as its first conv"),
        (lambda: probe(subject(), Options(transform="c5x")), "unknown transform"),
        (lambda: probe(subject(), Options(transform="rotate(90, 180, 270)")), "did you mean 'c4'"),
        (lambda: probe(subject(), Options(transform="none")), "besides the identity"),
        (lambda: probe(subject(), Options(layer="h", action="regular")), "layer fibres"),
        (lambda: probe(subject(), Options(transform="rotate", action="regular")), "a group"),
        (lambda: parse(Options, {"tranform": "c4"}, "options"), "'transform'"),
        (lambda: parse(Options, {"level": 95}, "options"), "level = 95"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_is_described():
    for name in ("transform", "action", "layer", "draws", "step", "level", "resamples", "share"):
        assert Options.model_fields[name].description
