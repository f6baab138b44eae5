"""reconstructions: errors by hand, decoders that leak or copy, pairs of a data set, and who is refused."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from geomssl.commands.probing import SKIPPED
from geomssl.data.base import Resident
from geomssl.encoders import build
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.objectives.base import Batch, View
from geomssl.objectives.reconstruction import Reconstruction
from geomssl.probes.reconstructions import Options, others, probe
from geomssl.probes.subject import Subject
from geomssl.seeding import generator, seeded

SMALL = {"half": 5, "projector": (8, 6), "width": 8, "heads": 2, "depth": 2}


class Pixels(Encoder):
    """Fibres are the image itself."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.dim = 1, 1

    def fibres(self, images):
        return images[:, :, None]

    def pool(self, fibres):
        return fibres.mean(dim=(2, 3, 4))


def subject_of(source, encoder=None, **config):
    encoder = build("cnn", in_channels=1, widths=(4, 4, 6)) if encoder is None else encoder
    with seeded(0, "test-reconstructions"):
        objective = Reconstruction(Reconstruction.Config(**{**SMALL, **config}), encoder, 0, 1)
        objective.complete(encoder, 8, source)
    return Subject(encoder, source, objective=objective, batch_size=16, provenance={"run": "r", "objective": "reconstruction"})


def values(artifact):
    return {m.name: m.value for m in artifact.metrics}


@pytest.fixture
def source(make_subject):
    return make_subject().source


def test_the_error_is_the_objectives_own_term_on_the_same_views(source):
    subject = subject_of(source, policy="equivariant")
    found, views = probe(subject, Options(seed=4)), {}
    for number, spec in enumerate(subject.objective.views):
        params = subject.view_params(torch.arange(60), "own", (spec.policy, 4, number))
        views[spec.name] = View(spec.policy(subject.images(torch.arange(60)), params), params, spec.policy)
    with torch.no_grad():
        losses = subject.objective(subject.encoder, Batch(views, None, torch.arange(60), torch.empty(60, 0)))
    one, two = (views[v].images.double() for v in ("1", "2"))
    constant = float((two - two.mean(dim=0)).square().mean())
    expected = {
        "mse": float(losses.terms["reconstruction"]), "mse_mean_image": constant,
        "mse_view_1": float((one - two).square().mean()), "r2": 1 - float(losses.terms["reconstruction"]) / constant,
    }  # fmt: skip
    assert {key: values(found)[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    for metric in found.metrics:
        assert metric.n == 60
        assert metric.interval.low <= metric.value <= metric.interval.high


@pytest.mark.parametrize(("leaks", "still"), [(True, "rise_other_view_1"), (False, "rise_other_view_2")])
def test_a_decoder_that_sees_view_2_alone_is_caught(source, leaks, still):
    """Half of a view, painted from view 2 itself (a leak) or from view 1, which shows the same here."""
    subject = subject_of(source, Pixels(), policy="none")
    subject.objective.painted = lambda maps: 0.5 * maps.chunk(2)[1 if leaks else 0][:, :, 0]
    found, images = values(probe(subject, Options())), subject.images(torch.arange(60)).double()
    assert found[still] == 1
    moved = ({"rise_other_view_1", "rise_other_view_2"} - {still}).pop()
    swapped = others(60, generator(0, "reconstructions-others"))
    own, other = (0.5 * images - images).square().mean(), (0.5 * images[swapped] - images).square().mean()
    assert found[moved] == pytest.approx(float(other / own), rel=1e-6)
    assert found["mse_view_1"] == 0


def test_a_painting_without_error_has_no_rise(source):
    subject = subject_of(source, Pixels(), policy="none")
    subject.objective.painted = lambda maps: maps.chunk(2)[0][:, :, 0]
    found = probe(subject, Options())
    assert values(found)["r2"] == 1
    assert values(found)["rise_other_view_1"] is None
    assert next(m.reason for m in found.metrics if m.name == "rise_other_view_1") == "a painting without error"


def test_none_keeps_its_own():
    for n in (2, 3, 17):
        found = others(n, torch.Generator().manual_seed(n))
        assert (found != torch.arange(n)).all()
        assert found.sort().values.tolist() == list(range(n))


def test_pairs_of_the_data_set_are_those_of_the_measured_split(source):
    things = torch.arange(60) // 4
    paired = Resident("toys", "test", source.images(torch.arange(60)), things, [str(k) for k in range(15)])
    subject = subject_of(paired, Pixels(), policy="none", positives="object")
    subject.objective.painted = lambda maps: maps.chunk(2)[0][:, :, 0]
    table = next(t for t in probe(subject, Options()).tables if t.name == "images")
    images = subject.images(torch.arange(60)).double()
    apart = torch.cdist(images.flatten(1), images.flatten(1)).square() / 64
    for row, error in enumerate(table.columns["mse_view_1"]):
        # view 1 and view 2 are two draws among the other three of the object
        own = slice(row // 4 * 4, row // 4 * 4 + 4)
        assert (apart[own, own] - error).abs().min() < 1e-6
    assert max(table.columns["mse_view_1"]) > 0


def test_the_picture_shows_what_was_measured(source):
    subject = subject_of(source, policy="none")
    found = probe(subject, Options(show=3, side=8))
    sheet = torch.from_numpy(np.array(Image.open(io.BytesIO(found.files["paintings.png"])).convert("L"))).long()
    assert sheet.shape == (32, 24)
    images = (subject.images(torch.tensor([0, 30, 59])) * 255).round()[:, 0]
    for row in (0, 8):
        assert torch.equal(sheet[row : row + 8].view(8, 3, 8).permute(1, 0, 2), images.long())


def test_others_are_refused_by_a_reason_that_probe_all_leaves_out(make_subject):
    for objective in (None, nn.Identity()):
        with pytest.raises(GeomsslError, match="expected a run of objective reconstruction") as caught:
            probe(make_subject(objective=objective), Options())
        assert caught.value.reason in SKIPPED
    with pytest.raises(GeomsslError, match="at least 2"):
        probe(subject_of(make_subject(n=1).source), Options())
