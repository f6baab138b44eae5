"""Numbers read linearly: ridge against its normal equations, the two solvers, angles that close, and the artifact."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import t as student
from torch import Tensor, nn

from geomssl.data.base import Resident
from geomssl.probes import classifier, ridge
from geomssl.probes.classifier import proportion, wilson
from geomssl.probes.linear import Options, probe
from geomssl.probes.numbers import absolute_error, decode
from geomssl.probes.subject import Subject
from geomssl.transforms.base import Parameter

DOUBLE = torch.float64
ANGLE = Parameter("angle", "degrees", "periodic", 0.0, 0.0, 360.0)


def planted(n: int, d: int, seed: int = 0, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(98), dtype=DOUBLE)
    x = torch.randn(n, d, generator=draw, dtype=DOUBLE) @ mixing * torch.logspace(-3, 3, d, dtype=DOUBLE) + 5
    y = torch.stack([x[:, 0] * 1e3 - x[:, 1], 100 + x[:, -1]], dim=1)
    y = (y - y.mean(dim=0)) / y.std(dim=0) * torch.tensor([1.0, 40.0], dtype=DOUBLE)
    return x, y + noise * y.std(dim=0) * torch.randn(n, 2, generator=draw, dtype=DOUBLE)


@pytest.mark.parametrize(("n", "d"), [(80, 5), (12, 30)])
def test_ridge_is_at_the_minimum_of_its_own_objective(n: int, d: int) -> None:
    """Tall and wide: the gradient of the stated objective, written here anew, vanishes at the solution."""
    x, y = planted(n, d)
    x = torch.cat([x, torch.full((n, 1), 7.0, dtype=DOUBLE)], dim=1)
    found = ridge.fit(x, y, strengths=[1e-2])
    scale, size = x.std(dim=0, correction=0)[:d], y.std(dim=0, correction=0)
    z, wanted = (x - x.mean(dim=0))[:, :d] / scale, (y - y.mean(dim=0)) / size
    weight = (found.weight[:, :d] * scale / size[:, None]).requires_grad_()
    loss = (z @ weight.T - wanted).square().sum(dim=1).mean() + 1e-2 * weight.square().sum()
    assert torch.autograd.grad(loss, weight)[0].abs().max() < 1e-9
    assert (found.weight[:, d] == 0).all()
    torch.testing.assert_close(found.predict(x).mean(dim=0), y.mean(dim=0))


def test_the_penalty_is_chosen_on_units_apart() -> None:
    """Rows of one unit are copies: rows apart would take the weak penalty, units apart the strong one."""
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(20, 60, generator=draw, dtype=DOUBLE).repeat_interleave(6, dim=0)
    x = x + 1e-3 * torch.randn(120, 60, generator=draw, dtype=DOUBLE)
    y = torch.randn(20, 1, generator=draw, dtype=DOUBLE).repeat_interleave(6, dim=0)
    unit = torch.arange(120) // 6
    assert ridge.fit(x, y, strengths=[1e-5, 1.0], unit=unit).strength == 1.0
    assert ridge.fit(x, y, strengths=[1e-5, 1.0]).strength == 1e-5
    found = ridge.fit(x, y, unit=unit)
    assert min(found.losses) == found.losses[[1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5].index(found.strength)]


def test_the_schedule_ends_where_the_closed_form_is() -> None:
    """Numbers: the same quadratic by SGD and by Cholesky."""
    x, y = planted(600, 4)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    swift = ridge.fit(x, y, solver="sgd")
    exact = ridge.fit(x, y, strengths=[swift.strength])
    assert swift.strength == pytest.approx(4e-6)
    spread = y.std(dim=0)
    assert ((swift.predict(x) - exact.predict(x)) / spread).abs().max() < 0.02
    assert torch.equal(ridge.fit(x, y, solver="sgd").weight, swift.weight)


def test_the_schedule_ends_where_lbfgs_is() -> None:
    """Classes: overlapping clouds have one minimum, which both reach, in any unit."""
    draw = torch.Generator().manual_seed(2)
    labels = torch.arange(600) % 3
    x = torch.randn(600, 4, generator=draw, dtype=DOUBLE) + torch.eye(3, 4, dtype=DOUBLE)[labels]
    for scale in (1.0, 1e3):
        swift = classifier.fit(scale * x, labels, solver="sgd")
        slow = classifier.fit(scale * x, labels, strengths=[swift.strength])
        losses = [float(nn.functional.cross_entropy(c.logits(scale * x), labels)) for c in (swift, slow)]
        assert 0 <= losses[0] - losses[1] < 1e-4
        assert (swift.logits(scale * x).softmax(1) - slow.logits(scale * x).softmax(1)).abs().max() < 0.02
        assert (swift.predict(scale * x) == slow.predict(scale * x)).double().mean() > 0.99


def test_angles_close() -> None:
    values = torch.tensor([0.0, 10.0, 179.0, 181.0, 359.0], dtype=DOUBLE)
    turn = torch.deg2rad(values)
    torch.testing.assert_close(decode(torch.stack([turn.cos(), turn.sin()], dim=1) * 0.3, ANGLE), values)
    said, true = torch.tensor([359.0, 90.0, 10.0, 0.0]), torch.tensor([1.0, 270.0, 350.0, 0.0])
    assert absolute_error(said, true, ANGLE).tolist() == [2, 180, 20, 0]
    length = Parameter("length", "m", "continuous", 0.0, 0.0, 400.0)
    assert absolute_error(said, true, length).tolist() == [358, 180, 340, 0]
    assert decode(torch.tensor([[3.5]]), length).tolist() == [3.5]


def test_the_size_that_counts_is_that_of_the_units() -> None:
    """Copies add nothing: a hundred units of six equal rows count as a hundred rows; units that are all alike count whole."""
    right = torch.arange(100) % 4 > 0
    unit = torch.arange(100).repeat_interleave(6)
    found = proportion(right.repeat_interleave(6), unit, "objects")
    assert found is not None
    shrink = (1.959963984540054 / student.ppf(0.975, 99)) ** 2 * 99 / 100
    low, high = wilson(75 * shrink, 100 * shrink)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
    mixed, plain = proportion(right.repeat(6), torch.arange(600) // 4), proportion(right.repeat(6))
    assert mixed is not None
    assert plain is not None
    assert (plain.low, plain.high) == pytest.approx(wilson(450, 600))
    less = (1.959963984540054 / student.ppf(0.975, 149)) ** 2
    assert (mixed.low, mixed.high) == pytest.approx(wilson(450 * less, 600 * less))
    sure = proportion(torch.ones(60, dtype=torch.bool), torch.arange(60) % 10)
    assert sure is not None
    assert sure.low == pytest.approx(wilson(s := 10 * (1.959963984540054 / student.ppf(0.975, 9)) ** 2, s)[0])
    assert proportion(right, torch.zeros(100)) is None


class Dials(nn.Module):
    """h is the cosine and sine that the first two pixels hold, and their noise."""

    in_channels, dim, group = 1, 3, None

    def forward(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, :3] * 2 - 1


def dials(n: int, seed: int, split: str) -> Resident:
    draw = torch.Generator().manual_seed(seed)
    angle = torch.rand(n, generator=draw) * 360
    pixels = torch.randint(256, (n, 1, 4, 4), generator=draw, dtype=torch.uint8)
    turn = torch.deg2rad(angle)
    pixels[:, 0, 0, 0], pixels[:, 0, 0, 1] = ((turn.cos() + 1) * 127.5).round(), ((turn.sin() + 1) * 127.5).round()
    found = Resident("dials", split, pixels, None, factors={"angle": angle, "object": torch.arange(n).float() // 10})  # type: ignore[arg-type]
    found.parameters = (ANGLE,)
    return found


def test_an_angle_is_read_and_its_error_is_in_degrees() -> None:
    subject = Subject(Dials(), dials(200, 0, "test"), train=dials(300, 1, "train"))
    found = probe(subject, Options(target="angle"))
    assert found.metric("r2").value > 0.999  # type: ignore[operator]
    error = found.metric("error")
    # a pixel's rounding is half of 1/127.5, so an angle is off by at most some half a degree
    assert error.value < 0.5  # type: ignore[operator]
    assert error.unit == "degrees"
    assert "objects" in error.interval.method  # type: ignore[union-attr]
    assert error.interval.low <= error.value <= error.interval.high  # type: ignore[operator, union-attr]
    assert found.metric("error_chance").value == pytest.approx(90, abs=8)
    assert found.metric("error_gain_over_pixels").value == pytest.approx(
        found.metric("error_pixels").value - error.value  # type: ignore[operator]
    )
    points = found.table("predicted").columns
    own = [float(subject.source.factors["angle"][i]) for i in points["index"]]
    assert points["true"] == pytest.approx(own, abs=0.01)
    assert math.fsum(points["predicted"]) / 200 == pytest.approx(sum(own) / 200, abs=2)
    assert {f.name for f in found.figures} == {"r2", "predicted"}
    json.dumps(found.to_json(), allow_nan=False)
    assert found == probe(Subject(Dials(), dials(200, 0, "test"), train=dials(300, 1, "train")), Options(target="angle"))


def test_an_angle_that_the_features_do_not_hold_is_not_read() -> None:
    blind = dials(200, 0, "test")
    blind.factors["angle"] = torch.rand(200, generator=torch.Generator().manual_seed(7)) * 360  # type: ignore[index]
    found = probe(Subject(Dials(), blind, train=dials(300, 1, "train")), Options(target="angle", beside=False))
    assert found.metric("error").value == pytest.approx(90, abs=12)
    assert found.metric("r2").value < 0  # type: ignore[operator]
    inside = probe(Subject(Dials(), dials(200, 0, "test")), Options(target="angle", beside=False, within=True))
    assert inside.metric("r2").value > 0.99  # type: ignore[operator]
    assert inside.metric("r2").n == 100
