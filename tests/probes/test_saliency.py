"""The saliency probe: the classifier it explains, the artifact, and what it says when something is missing."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from geomssl.data.base import Resident
from geomssl.encoders import build
from geomssl.errors import GeomsslError
from geomssl.probes.attribution import METHODS
from geomssl.probes.linear import fit
from geomssl.probes.saliency import Length, Options, fullgrad, probe
from geomssl.probes.subject import Subject
from geomssl.reports.compare import plates, questions
from geomssl.seeding import seeded


def test_probe_explains_the_classifier_of_the_linear_probe(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options())
    known = torch.arange(200)
    classifier = fit(subject.features(known, "h", "train"), subject.train.labels)  # type: ignore[union-attr, arg-type]
    logits = classifier.logits(subject.features(torch.arange(60)))
    table = found.table("images").columns
    torch.testing.assert_close(torch.tensor(table["value"]), logits.amax(dim=1).float(), rtol=1e-3, atol=1e-3)
    assert table["explained"] == [str(int(c)) for c in classifier.classes[logits.argmax(dim=1)]]
    assert table["label"] == [str(int(c)) for c in subject.source.labels]  # type: ignore[union-attr]
    assert found.metric("residual_max").value < 1e-5  # type: ignore[operator]
    assert found.metric("residual_max").value == max(table["residual"])
    json.dumps(found.to_json(), allow_nan=False)
    layers = found.table("layers").columns
    assert sum(layers["share"]) == pytest.approx(1)
    assert layers["part"][0] == "input"
    assert layers["share"][0] == pytest.approx(found.metric("input_share").value)
    for value, at_input, biases, size, residual in zip(
        *(table[k] for k in ("value", "input_term", "bias_terms", "sum_of_sizes", "residual")), strict=True
    ):
        assert abs(value - at_input - biases) == pytest.approx(residual * size, abs=1e-9)


def test_target_label_explains_the_true_class(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(), Options(target="label"))
    table = found.table("images").columns
    assert table["explained"] == table["label"]
    few = probe(make_subject(), Options()).table("images").columns
    assert few["explained"] != few["label"]


def test_the_picture_holds_each_image_above_its_map(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options(show=10, side=16))
    picture = Image.open(io.BytesIO(found.files["maps.png"])).convert("RGB")
    assert picture.size == (5 * 16, 2 * 2 * 16)
    labels = subject.source.labels
    firsts = [int((labels == c).nonzero()[0, 0]) for c in range(10)]  # type: ignore[union-attr]
    for place, i in enumerate(firsts):
        left, top = 16 * (place % 5), 32 * (place // 5)
        expected = subject.images(torch.tensor([i]))[0, 0].mul(255).round()
        tile = torch.tensor([[picture.getpixel((left + 2 * x, top + 2 * y))[0] for x in range(8)] for y in range(8)])
        assert torch.equal(tile.float(), expected)


def test_batches_do_not_change_the_maps(make_subject: Callable[..., Subject]) -> None:
    one, other = (probe(make_subject(batch_size=b), Options()) for b in (7, 60))
    a, b = one.table("images").columns, other.table("images").columns
    torch.testing.assert_close(torch.tensor(a["bias_terms"]), torch.tensor(b["bias_terms"]), rtol=1e-3, atol=1e-3)
    assert one.table("layers").columns["part"] == other.table("layers").columns["part"]


def test_probe_is_deterministic(make_subject: Callable[..., Subject]) -> None:
    assert probe(make_subject(), Options()) == probe(make_subject(), Options())


def test_without_labels_the_length_of_h_is_explained(make_subject: Callable[..., Subject]) -> None:
    source = make_subject().source
    bare = Resident(source.name, source.split, source.images(torch.arange(60)), None)
    subject = make_subject(source=bare, train=None)
    found = probe(subject, Options(show=3))
    length = subject.features(torch.arange(60)).norm(dim=1)
    torch.testing.assert_close(torch.tensor(found.table("images").columns["value"]), length, rtol=1e-4, atol=1e-5)
    assert found.metric("residual_max").value < 1e-5  # type: ignore[operator]
    assert "length of h" in found.headline


def test_length_is_homogeneous_even_at_zero() -> None:
    h = torch.zeros(2, 3)
    h[1] = torch.tensor([3.0, 4.0, 0.0])
    assert Length()(h).tolist() == [[pytest.approx(0, abs=1e-18)], [5.0]]
    images = torch.zeros(2, 3, 1, 1)
    images[1, :, 0, 0] = h[1]
    found = fullgrad(nn.Sequential(nn.Flatten(), Length()), images)
    assert torch.isfinite(found.saliency).all()
    assert found.input_term.tolist() == pytest.approx([0.0, 5.0])


def test_a_function_that_hides_a_constant_is_reported(make_subject: Callable[..., Subject]) -> None:
    class Hiding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x + 1.0

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient

    subject = make_subject()
    plain = subject.encoder.pool
    subject.encoder.pool = lambda fibres: Hiding.apply(plain(fibres))
    found = probe(subject, Options())
    assert found.metric("residual_max").value > 1e-2  # type: ignore[operator]
    assert any("leave out" in note for note in found.notes)


def test_what_cannot_be_explained_is_refused(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(GeomsslError, match="no training split"):
        probe(make_subject(train=None), Options())
    subject = make_subject(known=200)
    subject.train.labels = subject.train.labels.clamp(max=4)  # type: ignore[union-attr]
    with pytest.raises(GeomsslError, match="classes that the training split does not have"):
        probe(subject, Options(target="label"))
    subject = make_subject()
    subject.encoder.body[1].weight.fill_(float("nan"))
    with pytest.raises(GeomsslError, match="NaN"):
        probe(subject, Options())


def test_many_images_are_capped_and_said(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(n=300, known=60), Options())
    assert len(found.table("images")) == 256
    assert any("256 images, drawn from 300" in note for note in found.notes)
    assert len(probe(make_subject(n=300, known=60), Options(n=280)).table("images")) == 280


@pytest.mark.parametrize("method", [m for m in METHODS if m != "fullgrad"])
def test_other_methods_by_name(make_subject: Callable[..., Subject], method: str) -> None:
    subject = make_subject(n=40)
    found = probe(subject, Options(method=method, judged=6, steps=20))
    table = found.table("images").columns
    whole = probe(subject, Options(judged=0)).table("images").columns
    assert table["explained"] == whole["explained"]
    assert table["value"] == pytest.approx(whole["value"], rel=1e-4, abs=1e-4)
    assert method in found.headline
    assert 0 <= found.metric("infidelity").value <= 1.0001  # type: ignore[operator]
    assert found.metric("infidelity").n == found.metric("max_sensitivity").n == 6
    assert Image.open(io.BytesIO(found.files["maps.png"])).size == (5 * 64, 2 * 2 * 64)
    assert {m.name for m in found.metrics} >= {"infidelity", "max_sensitivity"}
    assert any("never negative" in note for note in found.notes) == (method in ("saliency", "gradcam"))
    json.dumps(found.to_json(), allow_nan=False)
    if method == "integrated-gradients":
        classifier = fit(subject.features(torch.arange(200), "h", "train"), subject.train.labels)  # type: ignore[union-attr, arg-type]
        base = classifier.logits(subject.encoder(torch.zeros(1, 1, 8, 8)))[0]
        for value, explained, total, size, residual in zip(
            *(table[k] for k in ("value", "explained", "sum", "sum_of_sizes", "residual")), strict=True
        ):
            column = classifier.classes.tolist().index(int(explained))
            assert abs(value - float(base[column]) - total) / size == pytest.approx(residual, abs=1e-4)
        finer = probe(subject, Options(method=method, judged=0, steps=400)).metric("residual_max").value
        assert finer < found.metric("residual_max").value  # type: ignore[operator]


def test_fullgrad_is_judged_too_and_seeded(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject(n=40)
    one, again, other = (probe(subject, Options(judged=10, seed=seed)) for seed in (0, 0, 1))
    assert one.metric("infidelity") == again.metric("infidelity") != other.metric("infidelity")
    interval = one.metric("max_sensitivity").interval
    assert interval.low <= one.metric("max_sensitivity").value <= interval.high  # type: ignore[union-attr, operator]
    assert {m.name for m in probe(subject, Options(judged=0)).metrics} == {"residual_max", "residual_median", "input_share"}


@pytest.mark.parametrize("name", ["cnn", "c4-cnn", "mlp"])
def test_methods_on_the_encoders_of_this_house(make_subject: Callable[..., Subject], name: str) -> None:
    encoder = build(name, in_channels=1, **({"size": 8} if name == "mlp" else {"widths": (8, 8, 12)}))
    subject = make_subject(n=8, encoder=encoder, projector=None, known=100)
    for method in ("guided-backprop", "occlusion", "gradcam"):
        options = Options(method=method, judged=0, show=2)
        if (name, method) == ("mlp", "gradcam"):
            with pytest.raises(GeomsslError, match="without a layer that gives maps"):
                probe(subject, options)
            continue
        found = probe(subject, options)
        assert max(found.table("images").columns["sum_of_sizes"]) > 0


def test_bad_options_are_one_line(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(GeomsslError, match="did you mean 'gradcam'"):
        Options(method="grad-cam")
    with pytest.raises(GeomsslError, match="did you mean 'body.5'"):
        probe(make_subject(n=8), Options(method="gradcam", layer="body.55", judged=0))


def test_two_encoders_are_shown_on_the_same_images(make_subject: Callable[..., Subject]) -> None:
    """Side by side in a report: with equal options the pictures hold the same images in the same places."""
    with seeded(5, "test-encoder"):
        other = type(make_subject().encoder)()
    options = Options(show=10, judged=0, target="label", n=40)
    first, second = (probe(subject, options) for subject in (make_subject(), make_subject(encoder=other)))
    assert first.table("images").columns["index"] == second.table("images").columns["index"]
    assert first.figures[0].caption == second.figures[0].caption
    sheets = [np.array(Image.open(io.BytesIO(found.files["maps.png"])).convert("RGB")) for found in (first, second)]
    assert (sheets[0][:64] == sheets[1][:64]).all()
    assert (sheets[0][64:128] != sheets[1][64:128]).any()
    _, (question,) = questions([first, dataclasses.replace(second, provenance={"run": "other"})])
    plate = next(p for p in plates(question, ["small", "other"]) if p.name == "maps")
    assert [panel.title for panel in plate.panels] == ["small", "other"]
