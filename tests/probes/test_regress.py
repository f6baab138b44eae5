"""regress: planted relations are read, noise is not, R² and its pairs are what they say, splits are apart."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes.changes import encode, factor_pairs, r2
from geomssl.probes.fitting import held_out
from geomssl.probes.regress import Options, probe
from geomssl.probes.regressor import DECAYS, fit, projected
from geomssl.probes.subject import Subject
from geomssl.transforms.base import Parameter, Transform

DOUBLE = torch.float64
QUICK = Options(steps=120)


def explained(predicted: Tensor, wanted: Tensor) -> float:
    errors, deviations = r2(predicted, wanted)
    return 1 - float(errors.sum() / deviations.sum())


def parts(features: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Training, held-out and test rows of one draw; the test targets come last."""
    return features[:600], targets[:600], features[600:750], targets[600:750], features[750:], targets[750:]


def test_a_planted_linear_relation_is_read_whole() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 6, generator=draw)
    y = (x @ torch.randn(6, 2, generator=draw)).double() * 100 + 1e4
    *given, wanted = parts(x, y)
    assert explained(fit(*given).predicted, wanted) > 0.99


def test_a_relation_that_no_linear_map_has_is_read_too() -> None:
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(1))
    *given, wanted = parts(x, (x[:, :1] * x[:, 1:]).double())
    assert explained(fit(*given).predicted, wanted) > 0.9
    linear = torch.linalg.lstsq(torch.cat([given[0], torch.ones(600, 1)], dim=1).double(), given[1]).solution
    assert explained(torch.cat([given[4], torch.ones(250, 1)], dim=1).double() @ linear, wanted) < 0.1


def test_noise_is_not_read() -> None:
    draw = torch.Generator().manual_seed(2)
    *given, wanted = parts(torch.randn(1000, 8, generator=draw), torch.randn(1000, 2, generator=draw).double())
    fitted = fit(*given)
    assert -0.1 < explained(fitted.predicted, wanted) < 0.03
    assert fitted.losses[DECAYS.index(fitted.decay)] == min(fitted.losses)


def test_the_fit_is_seeded_and_does_not_depend_on_units() -> None:
    draw = torch.Generator().manual_seed(3)
    x, y = torch.randn(400, 5, generator=draw), torch.randn(400, 1, generator=draw).double()
    args = x[:200], y[:200], x[200:300], y[200:300], x[300:]
    once = fit(*args, steps=30)
    state = torch.get_rng_state()
    assert torch.equal(fit(*args, steps=30).predicted, once.predicted)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(fit(*args, seed=1, steps=30).predicted, once.predicted)
    scaled = fit(*(8 * v for v in args), steps=30)
    assert torch.allclose(scaled.predicted, 8 * once.predicted, atol=1e-4)


def test_test_rows_do_not_reach_the_fit() -> None:
    draw = torch.Generator().manual_seed(4)
    x, y = torch.randn(300, 3, generator=draw), torch.randn(300, 1, generator=draw).double()
    known = x[:150], y[:150], x[150:200], y[150:200]
    whole = fit(*known, x[200:], steps=20).predicted
    other = torch.cat([x[200:250], 50 * x[250:]])
    assert torch.allclose(fit(*known, other, steps=20).predicted[:50], whole[:50], atol=1e-6)


def test_a_feature_that_is_dark_in_training_does_not_spoil_the_rest() -> None:
    """One training image in 600 has a trace of it, every tenth test image has it whole: a thousand standard deviations."""
    x = torch.randn(1000, 3, generator=torch.Generator().manual_seed(5))
    dark = torch.zeros(1000, 5)
    dark[0], dark[750::10] = 0.02, 1.0
    *given, wanted = parts(torch.cat([x, dark], dim=1), (x[:, :1] - x[:, 1:2]).double())
    assert explained(fit(*given).predicted, wanted) > 0.9


def test_r2_is_scikit_learns() -> None:
    from sklearn.metrics import r2_score

    draw = torch.Generator().manual_seed(5)
    wanted, predicted = torch.randn(50, 1, generator=draw, dtype=DOUBLE), torch.randn(50, 1, generator=draw, dtype=DOUBLE)
    assert explained(predicted, wanted) == pytest.approx(r2_score(wanted.numpy(), predicted.numpy()), abs=1e-12)
    assert explained(wanted, wanted) == 1
    assert explained(wanted.mean().expand(50, 1), wanted) == pytest.approx(0, abs=1e-12)


def test_angles_close_and_categories_are_one_hot() -> None:
    angle = Parameter("turn", "degrees", "periodic", 0.0, 0.0, 360.0)
    index = Parameter("element", "", "index", 0.0, 0.0, 3.0)
    values, targets = encode(torch.tensor([[350.0, 3.0], [-10.0, 0.0], [710.0, 1.0]]), [angle, index])
    assert torch.allclose(values[0, :2], values[1, :2])
    assert torch.allclose(values[0, :2], values[2, :2])
    assert values[:, 2:].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0]]
    assert [(t.kind, t.columns) for t in targets] == [("angle", slice(0, 2)), ("category", slice(2, 6))]
    with pytest.raises(GeomsslError, match="100 values"):
        encode(torch.zeros(2, 1), [Parameter("shift", "", "index", 0.0, 0.0, 99.0)])


class Scene(nn.Module):
    """Features that are the number written into the image's first pixel, twice."""

    dim, in_channels, group = 2, 1, None

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :1].repeat(1, 2)


def knowing(n: int, objects: int, seed: int, split: str = "train") -> Resident:
    """Images whose first pixel is their factor `place`; the rest is noise."""
    draw = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (n, 1, 4, 4), generator=draw, dtype=torch.uint8)
    factors = {
        "place": pixels[:, 0, 0, 0].float(), "noise": torch.rand(n, generator=draw),
        "object": torch.arange(n).remainder(objects).float(),
    }
    source = Resident("known", split, pixels, None, (), factors)  # type: ignore[arg-type]
    source.parameters = (
        Parameter("place", "", "continuous", 0.0, 0.0, 255.0), Parameter("noise", "", "continuous", 0.0, 0.0, 1.0),
        Parameter("object", "", "index", 0.0, 0.0, objects - 1.0),
    )
    return source


def test_factors_of_pairs_are_read_where_the_features_have_them() -> None:
    """h holds `place` and nothing else: its change has R² near 1, that of `noise` none, nor has anything once shuffled."""
    subject = Subject(Scene(), knowing(300, 15, 1, "test"), train=knowing(900, 30, 0), untrained=None)
    found = probe(subject, Options(steps=200))
    table = found.table("r2").columns
    value = dict(zip(zip(table["parameter"], table["features"], strict=True), table["r2"], strict=True))
    assert set(table["parameter"]) == {"place", "noise"}
    assert value["place", "encoder"] > 0.98
    assert value["noise", "encoder"] < 0.05
    assert value["place", "encoder, pairs shuffled"] < 0.05
    assert found.metric("r2_place").interval is not None
    assert "objects" in found.metric("r2_place").interval.method  # type: ignore[union-attr]
    assert any("random encoder" in note for note in found.notes)
    points = found.table("predicted").columns
    assert {f.name for f in found.figures} == {"r2", "predicted_place", "predicted_noise"}
    pairs, _ = factor_pairs(subject, torch.arange(len(subject.source)), "own", 0)
    change = dict(zip(pairs.first.tolist(), pairs.values[:, 0].tolist(), strict=True))
    assert points["true place"] == pytest.approx([change[i] for i in points["index"]], abs=1e-4)
    off = torch.tensor(points["predicted place"]) - torch.tensor(points["true place"])
    assert off.abs().mean() < 0.2 * torch.tensor(points["true place"]).std()


def test_every_image_is_paired_once_with_another_of_its_object() -> None:
    source = knowing(100, 7, 0)
    subject = Subject(Scene(), source, train=source)
    pairs, targets = factor_pairs(subject, torch.arange(0, 100, 2), "own", 0)
    assert pairs.second is not None
    assert sorted(pairs.first.tolist()) == sorted(pairs.second.tolist()) == list(range(0, 100, 2))
    assert (pairs.first != pairs.second).all()
    assert torch.equal(source.factors["object"][pairs.first], source.factors["object"][pairs.second])
    change = source.factors["place"][pairs.second] - source.factors["place"][pairs.first]
    assert torch.equal(pairs.values[:, targets[0].columns][:, 0], change.double())
    lone = knowing(8, 8, 0)
    with pytest.raises(GeomsslError, match="no two of one object"):
        factor_pairs(Subject(Scene(), lone, train=lone), torch.arange(8), "own", 0)


def testheld_out_pairs_share_no_object_with_the_others() -> None:
    unit = torch.arange(60) % 10
    held = held_out(unit, 0.2, 0)
    assert int(held.sum()) == 12
    assert not set(unit[held].tolist()) & set(unit[~held].tolist())
    assert 0 < int(held_out(torch.arange(2), 0.01, 0).sum()) < 2


class Flip(Transform):
    """Turns an image to its negative where its one binary parameter is 1."""

    name = "negative"
    parameters = (Parameter("on", "", "binary", 0.0, 0.0, 1.0),)

    def sample(self, n: int, generator: torch.Generator, size: tuple[int, int]) -> Tensor:
        return (torch.rand(n, 1, generator=generator) < 0.5).float()

    def __call__(self, images: Tensor, params: Tensor) -> Tensor:
        return torch.where(params[:, :, None, None].to(images) > 0, 1 - images, images)


def test_a_flip_has_an_accuracy_beside_its_r2(make_subject: Callable[..., Subject]) -> None:
    found = probe(make_subject(n=200, known=400, policy=Flip()), QUICK)
    table = found.table("accuracy").columns
    assert table["parameter"] == ["on"]
    assert table["accuracy"][0] > 0.97
    assert abs(table["majority"][0] - 0.5) < 0.15
    assert table["low"][0] <= table["accuracy"][0] <= table["high"][0]
    assert [f.name for f in found.figures] == ["r2"]
    assert found.metric("r2_on").value > 0.8  # type: ignore[operator]
    assert found.metric("r2_mean_null").value < 0.05  # type: ignore[operator]
    assert found.metric("r2_on_gain_over_pixels").interval is not None
    json.dumps(found.to_json(), allow_nan=False)


def test_probe_is_deterministic_and_reads_the_named_transform(make_subject: Callable[..., Subject]) -> None:
    options = Options(steps=20, transform="rotate(±30)")
    found = probe(make_subject(), options)
    assert found == probe(make_subject(), options)
    assert set(found.table("r2").columns["parameter"]) == {"angle"}
    assert math.isfinite(found.metric("r2_mean_random").value)  # type: ignore[arg-type]


def test_the_encoder_alone_has_the_same_figures(make_subject: Callable[..., Subject]) -> None:
    options = {"steps": 20, "transform": "rotate(±30)"}
    whole, alone = (probe(make_subject(), Options(**options, beside=b)) for b in (True, False))
    for name in ("r2_mean", "r2_angle", "r2_mean_null"):
        assert alone.metric(name) == whole.metric(name)
    assert set(alone.table("r2").columns["features"]) == {"encoder", "encoder, pairs shuffled"}


def test_what_cannot_be_regressed_is_said(make_subject: Callable[..., Subject]) -> None:
    with pytest.raises(GeomsslError, match="continuous factors"):
        probe(make_subject(), Options(of="factors"))
    with pytest.raises(GeomsslError, match="no training split"):
        probe(make_subject(train=None), QUICK)
    with pytest.raises(GeomsslError, match="no parameters"):
        probe(make_subject(), Options(transform="none"))
    subject = make_subject()
    with pytest.raises(GeomsslError, match="pairs to train"):
        probe(make_subject(known=2), QUICK)
    subject.encoder.train()
    with pytest.raises(GeomsslError, match="training mode"):
        probe(subject, QUICK)


def test_wide_pixels_are_projected_onto_directions_that_keep_distances() -> None:
    draw = torch.Generator().manual_seed(0)
    wide = torch.randn(20, 4000, generator=draw)
    found = projected(wide, 0)
    assert found.shape == (20, 1024)
    assert (torch.pdist(found) / torch.pdist(wide) - 1).abs().max() < 0.12
    assert torch.equal(projected(wide[:, :64], 0), wide[:, :64])
