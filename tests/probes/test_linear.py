"""The linear probe: classifier, neighbours and intervals against independent implementations, and the artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes.linear import Options, fit, nearest_neighbours, probe, wilson
from geomssl.probes.subject import Subject


def clouds(n: int, seed: int, classes: int = 3, d: int = 5, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Gaussian clouds around fixed centres, with one dimension in other units and one that never varies."""
    centres = 2 * torch.randn(classes, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    features = centres[labels] + spread * torch.randn(n, d, generator=draw, dtype=torch.float64)
    features[:, 0] *= 1e4
    return torch.cat([features, torch.full((n, 1), 7.0, dtype=torch.float64)], dim=1), labels


def test_fit_is_at_the_minimum_of_its_own_objective() -> None:
    """The gradient of the stated objective, written here anew, vanishes at the solution."""
    features, labels = clouds(90, 0)
    strength = 1e-2
    found = fit(features, labels, strengths=[strength])
    std, mean = features.std(dim=0, correction=0), features.mean(dim=0)
    x = (features - mean)[:, :5] / std[:5]
    weight = (found.weight[:, :5] * std[:5]).requires_grad_()
    bias = (found.bias + found.weight @ mean).requires_grad_()
    loss = F.cross_entropy(x @ weight.T + bias, labels) + strength / 2 * (weight**2).sum()
    assert found.converged
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-5
    assert (found.weight[:, 5] == 0).all()


def test_two_classes_are_fitted_as_well_as_three() -> None:
    features, labels = clouds(200, 1, classes=2, spread=0.5)
    found = fit(features, labels + 4)
    assert found.weight.shape == (2, 6)
    assert found.classes.tolist() == [4, 5]
    assert (found.predict(features) == labels + 4).double().mean() > 0.95
    torch.testing.assert_close(found.logits(features).sum(dim=1), torch.zeros(200, dtype=torch.float64), atol=1e-9, rtol=0)


def test_labels_with_gaps_come_back_as_they_were() -> None:
    features, labels = clouds(90, 2, spread=0.3)
    assert (fit(features, labels * 10 + 3).predict(features) == labels * 10 + 3).all()


def test_module_gives_the_logits() -> None:
    features, labels = clouds(60, 0)
    found = fit(features, labels)
    torch.testing.assert_close(found.module()(features), found.logits(features))
    assert not any(p.requires_grad for p in found.module().parameters())


def test_regularisation_is_chosen_on_the_held_out_part() -> None:
    """Among many noise dimensions the strong penalty wins; where it can only answer the majority, the weak one does."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noisy = torch.cat([labels[:, None] * 0.8 + torch.randn(60, 1, generator=draw), torch.randn(60, 80, generator=draw)], dim=1)
    assert fit(noisy, labels, strengths=[1e-5, 1.0]).strength == 1.0
    rare = (torch.arange(60) % 4 == 0).long()
    clean = rare[:, None] + 0.1 * torch.randn(60, 2, generator=draw)
    found = fit(clean, rare, strengths=[1e6, 1e-5])
    assert (found.strength, found.held_out) == (1e-5, 1.0)
    assert fit(torch.ones(60, 2), labels, strengths=[1e-5, 1.0]).strength == 1.0


def test_fit_is_deterministic_and_does_not_depend_on_units() -> None:
    features, labels = clouds(90, 3)
    first, again = fit(features, labels), fit(features, labels)
    assert torch.equal(first.weight, again.weight)
    scaled = fit(features * 1e-3 + 5.0, labels)
    assert torch.equal(scaled.predict(features * 1e-3 + 5.0), first.predict(features))


def test_collapsed_features_predict_one_class_and_do_not_amplify_rounding() -> None:
    labels = torch.arange(40) % 2
    rounding = 3.0 * (1 + 1e-8 * (labels[:, None] * 2 - 1) * torch.ones(40, 4, dtype=torch.float64))
    assert len(fit(rounding, labels).predict(rounding).unique()) == 1


def test_one_class_and_nan_are_refused() -> None:
    with pytest.raises(GeomsslError, match="at least 2 classes"):
        fit(torch.randn(5, 2), torch.zeros(5, dtype=torch.long))
    with pytest.raises(GeomsslError, match="finite"):
        fit(torch.full((5, 2), math.nan), torch.arange(5))


@pytest.mark.parametrize("k", [1, 4, 20])
def test_neighbours_agree_with_scikit_learn(k: int) -> None:
    from sklearn.neighbors import KNeighborsClassifier

    features, labels = clouds(150, 4)
    queries, _ = clouds(70, 5)
    expected = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(features.numpy(), labels.numpy())
    assert nearest_neighbours(features, labels, queries, k).tolist() == expected.predict(queries.numpy()).tolist()


def test_neighbours_look_at_directions_not_at_lengths() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 100.0]])
    queries = torch.tensor([[50.0, 10.0], [0.1, 0.2]])
    assert nearest_neighbours(known, torch.tensor([3, 8]), queries, 1).tolist() == [3, 8]


def test_equal_votes_go_to_the_smallest_label() -> None:
    known = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert nearest_neighbours(known, torch.tensor([9, 2]), known[:1], 2).tolist() == [2]


@pytest.mark.parametrize("k", [0, 4])
def test_a_number_of_neighbours_that_cannot_be_is_refused(k: int) -> None:
    with pytest.raises(GeomsslError, match="1 to 3"):
        nearest_neighbours(torch.eye(3), torch.arange(3), torch.eye(3), k)


@pytest.mark.parametrize(("correct", "n"), [(0, 10), (3, 10), (10, 10), (250, 360)])
def test_wilson_solves_its_quadratic(correct: int, n: int) -> None:
    """The bounds are the p0 with |p - p0| = z sqrt(p0 (1 - p0) / n)."""
    low, high = wilson(correct, n)
    z = 1.959963984540054
    for bound in (low, high):
        assert abs(correct / n - bound) == pytest.approx(z * math.sqrt(max(0, bound * (1 - bound)) / n), abs=1e-9)
    assert low <= correct / n <= high
    assert low < high


def test_probe_compares_with_pixels_and_with_the_random_encoder(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(), Options(k=5))
    rows = found.table("accuracy").columns
    assert list(dict.fromkeys(rows["features"])) == ["encoder", "projector", "random encoder", "raw pixels"]
    for name, value, low, high in zip(rows["classifier"], rows["accuracy"], rows["low"], rows["high"], strict=True):
        assert name in ("linear", "kNN")
        assert 0 <= low <= value <= high <= 1
    value = {(f, c): a for f, c, a in zip(rows["features"], rows["classifier"], rows["accuracy"], strict=True)}
    assert value["raw pixels", "linear"] > 0.7
    for name in ("random", "pixels"):
        gain = found.metric(f"linear_gain_over_{name}")
        other = "random encoder" if name == "random" else "raw pixels"
        assert gain.value == pytest.approx(value["encoder", "linear"] - value[other, "linear"])
        assert gain.interval is not None
        assert gain.interval.low <= gain.value <= gain.interval.high  # type: ignore[operator]
    assert found.metric("chance").value < 0.3  # type: ignore[operator]
    classes = found.table("classes").columns
    assert sum(a * n for a, n in zip(classes["accuracy"], classes["n"], strict=True)) / 60 == pytest.approx(
        found.metric("linear").value
    )
    json.dumps(found.to_json(), allow_nan=False)


def test_pixel_accuracy_is_that_of_the_functions_on_the_test_split(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    train, test = (
        s.images(torch.arange(len(s))).flatten(1).double() / 255 for s in (subject.train, subject.source)  # type: ignore[arg-type, union-attr]
    )
    fitted = fit(train, subject.train.labels)  # type: ignore[union-attr, arg-type]
    expected = (fitted.predict(test) == subject.source.labels).double().mean()
    assert probe(subject, Options()).metric("linear_pixels").value == pytest.approx(float(expected))


def test_the_random_row_is_that_of_the_untrained_encoder(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    twin = subject.random_twin()
    assert twin is not None
    fitted = fit(twin.features(torch.arange(200), "h", "train"), subject.train.labels)  # type: ignore[union-attr, arg-type]
    expected = (fitted.predict(twin.features(torch.arange(60))) == subject.source.labels).double().mean()
    found = probe(make_subject(), Options())
    assert found.metric("linear_random").value == pytest.approx(float(expected))
    assert found.metric("linear_random").value != found.metric("linear").value


def test_test_labels_do_not_reach_the_classifier(make_subject: Callable[..., Subject]) -> None:
    """Permuted test labels bring the accuracy to chance: nothing was fitted to them."""
    subject = make_subject()
    source = subject.source
    shuffled = source.labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]  # type: ignore[index]
    wrong = Resident(source.name, source.split, source.images(torch.arange(60)), shuffled, source.classes)
    found = probe(make_subject(source=wrong), Options())
    assert found.metric("linear_pixels").value < 0.3  # type: ignore[operator]


def test_probe_is_deterministic(make_subject: Callable[..., Subject]) -> None:
    assert probe(make_subject(), Options()) == probe(make_subject(), Options())


def test_an_encoder_that_still_learns_is_refused(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    subject.encoder.train()
    with pytest.raises(GeomsslError, match="training mode"):
        probe(subject, Options())
    subject = make_subject()
    subject.encoder.body[1].weight.requires_grad_(True)
    with pytest.raises(GeomsslError, match=r"body\.1\.weight that still learns"):
        probe(subject, Options())


def test_what_is_missing_is_said(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(untrained=None, projector=None), Options(k=500))
    assert any("No random encoder" in note for note in found.notes)
    assert any("k = 200" in note for note in found.notes)
    assert not any(m.name == "linear_gain_over_random" for m in found.metrics)
    source = make_subject().source
    unlabelled = Resident(source.name, source.split, source.images(torch.arange(60)), None)
    for parts, what in (({"source": unlabelled}, "no labels"), ({"train": None}, "no training split")):
        with pytest.raises(GeomsslError, match=what):
            probe(make_subject(**parts), Options())
