"""The action probe: its artifact, its words, what it compares with, and what it refuses."""

import json

import pytest
import torch

from geomssl import artifact, encoders
from geomssl.config import parse
from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes.action import Options, probe
from geomssl.probes.fitted import fit_action
from geomssl.probes.subject import Subject
from geomssl.seeding import generator, seeded
from geomssl.transforms import CyclicRotations


def subject(name="c4-cnn", n=200, widths=(3, 4, 6), dtype=torch.float32, seed=0, **parts):
    with seeded(seed, "test-action"):
        encoder = encoders.build(name, in_channels=1, widths=widths)
    pixels = torch.randint(0, 256, (n, 1, 9, 9), generator=generator(0, "test-action-images"), dtype=torch.uint8)
    return Subject(encoder, Resident("noise", "test", pixels, None), dtype=dtype, provenance={"run": name}, **parts)


def test_the_artifact_is_whole_and_survives_the_disk(tmp_path):
    found = probe(subject(), Options(resamples=200))
    table = found.table("elements").columns
    assert table["element"] == ["90°", "180°", "270°"]
    assert min(table["r2_held_out"]) > 0.9999
    assert found.metric("r2_held_out").value == min(table["r2_held_out"])
    assert found.metric("r2_held_out").interval is not None
    assert (found.metric("r2_held_out").n, found.metric("r2_train").n) == (100, 100)
    assert max(table["permutation"]) < 1e-2
    assert max(table["agreement"]) < 1e-2
    assert found.metric("group_law").value < 1e-2
    assert found.metric("multiplicity_residual").value < 1e-2
    assert found.headline.startswith("Turning the image (c4): an affine action on the fibres exists")
    assert "it is the declared regular one" in found.headline
    assert "no representation" not in found.headline
    assert len(found.table("law")) == 16
    assert found.table("law").columns["gh"][6] == "270°"
    assert found.table("irreps").columns["multiplicity"] == pytest.approx([6, 6, 6], abs=1e-2)
    assert found.provenance == {"run": "c4-cnn", "action": "regular"}
    again = artifact.load(found.save(tmp_path))
    assert again.to_json() == found.to_json()
    assert again.table("irreps").columns == found.table("irreps").columns
    json.dumps(found.to_json(), allow_nan=False)


def test_the_figures_are_those_of_fit_action():
    made = subject("cnn", dtype=torch.float64)
    found = probe(made, Options(seed=2, resamples=200)).table("elements").columns
    images = made.images(torch.arange(200))
    c4 = CyclicRotations(4)
    with torch.no_grad():
        pairs = [made.encoder.fibres(x).mean((3, 4)).flatten(1) for x in (images, c4(images, torch.full((200, 1), 3.0)))]
    expected = fit_action(*pairs, seed=2, resamples=200)
    assert found["r2_held_out"][2] == pytest.approx(expected.r2_held_out, rel=1e-9)
    assert found["low"][2] == pytest.approx(expected.interval.low, rel=1e-9)
    assert found["r2_null"][2] == pytest.approx(expected.r2_null, rel=1e-9)


def test_an_ordinary_network_is_said_to_have_it_in_part_or_not():
    found = probe(subject("cnn"), Options(resamples=200))
    assert "only in part" in found.headline or "no affine action" in found.headline
    assert found.metric("r2_held_out").value < 0.95
    law = found.metric("group_law").value
    assert law > 0.1
    if "only in part" in found.headline:
        assert f"its matrices are no representation (they miss the group law by {law:.2g})" in found.headline
    assert found.provenance["action"] == "trivial"
    assert found.metric("agreement").value > 0.1


def test_an_invariant_vector_is_called_trivial():
    found = probe(subject(), Options(layer="h", resamples=200))
    assert found.metric("r2_identity").value > 0.999
    assert any("trivially" in note for note in found.notes)
    assert found.table("irreps").columns["multiplicity"] == pytest.approx([6, 0, 0], abs=1e-2)


def test_every_place_may_be_kept():
    found = probe(subject(widths=(2, 2, 2)), Options(space="keep", resamples=200))
    assert any("every place kept and flattened to d = 72" in note for note in found.notes)
    assert found.metric("agreement").value < 0.05
    with pytest.raises(GeomsslError, match="at most 4096"):
        probe(subject("cnn", widths=(2, 2, 1024)), Options(space="keep"))


def test_wrapped_shifts_of_maps_are_held_to_the_spatial_action():
    found = probe(subject("cnn", widths=(2, 2, 2), n=60), Options(transform="translations", space="keep", draws=3))
    assert found.provenance["action"] == "spatial"
    assert found.metric("group_law").value is None
    assert [t.name for t in found.tables] == ["elements", "r2", "spectrum"]


def test_too_few_images_warn_and_leave_the_law_out():
    found = probe(subject(n=20, widths=(3, 4, 24)), Options(resamples=200))
    assert "few against d = 96" in found.notes[0]
    assert any("No group law" in note for note in found.notes)
    assert found.metric("group_law").value is None


def test_z_needs_a_projector_and_is_measured_with_one():
    with pytest.raises(GeomsslError, match="projector"):
        probe(subject(), Options(layer="z"))
    with seeded(0, "test-action-projector"):
        projector = torch.nn.Linear(6, 5)
    found = probe(subject(projector=projector), Options(layer="z", resamples=200))
    assert "projections z" in found.headline
    assert found.metric("r2_held_out").value > 0.999


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: probe(subject(n=5), Options()), "at least 8"),
        (lambda: probe(subject(), Options(transform="c5x")), "unknown transform"),
        (lambda: parse(Options, {"tranform": "c4"}, "options"), "'transform'"),
        (lambda: parse(Options, {"held_out": 2}, "options"), "held_out = 2"),
    ],
)
def test_bad_input_is_one_line(call, said):
    with pytest.raises(GeomsslError) as caught:
        call()
    assert said in str(caught.value)


def test_every_option_is_described():
    assert all(field.description for field in Options.model_fields.values())
