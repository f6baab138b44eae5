"""What a readout asks and from which images it learns: factors, halves whose objects are apart, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes.question import ask, described, halves
from geomssl.probes.subject import Subject
from geomssl.transforms.base import Parameter


def source(n: int = 48, split: str = "test", labels: Tensor | None = None, **factors: Tensor) -> Resident:
    """n black images; sequence of 4, objects of 8 images, a session that goes round, and an angle."""
    row = torch.arange(n)
    given = {"object": row // 8, "sequence": row // 4, "session": row // 4 % 3, "angle": row * 37.0 % 360} | factors
    found = Resident(
        "toys", split, torch.zeros(n, 1, 8, 8, dtype=torch.uint8), row // 8 % 2 if labels is None else labels,  # type: ignore[arg-type]
        factors={name: values.float() for name, values in given.items()},
    )
    found.parameters = (
        Parameter("session", "", "index", 0.0, 0.0, 2.0), Parameter("angle", "degrees", "periodic", 0.0, 0.0, 360.0),
    )
    return found


@pytest.fixture
def subject(make_subject: Callable[..., Subject]) -> Subject:
    return make_subject(source=source(), train=source(80, "train"))


def test_a_factor_is_what_the_data_set_says(subject: Subject) -> None:
    parameter, values = described(subject, "session", "own")
    assert (parameter.kind, values.dtype) == ("index", torch.int64)
    parameter, values = described(subject, "angle", "train")
    assert (parameter.kind, parameter.unit, values.dtype, len(values)) == ("periodic", "degrees", torch.float64, 80)
    # not described: whole numbers name things, others measure
    subject.source.factors["height"] = torch.linspace(0, 1, 48)  # type: ignore[index]
    assert described(subject, "object", "own")[0].kind == "index"
    assert described(subject, "height", "own")[0].kind == "continuous"


def test_halves_keep_objects_whole_and_every_class_on_both_sides() -> None:
    toys, rows = source(), torch.arange(48)
    objects = toys.factors["object"]
    for name in ("session", "label"):
        values = toys.labels if name == "label" else toys.factors[name].long()
        assert values is not None
        first, word = halves(values, True, toys, rows, 0)
        assert word == "objects"
        assert not set(objects[first].tolist()) & set(objects[~first].tolist())
        assert set(values[first].tolist()) == set(values[~first].tolist()) == set(values.tolist())
        assert abs(int(first.sum()) - 24) <= 8
    # an object cannot be on both sides of itself: whole sequences then, and single images where there are none
    first, word = halves(objects.long(), True, toys, rows, 0)
    assert word == "sequences"
    assert not set(toys.factors["sequence"][first].tolist()) & set(toys.factors["sequence"][~first].tolist())
    assert halves(rows // 2, True, toys, rows, 0)[1] == "images"
    other = halves(toys.factors["session"].long(), True, toys, rows, 1)[0]
    assert not torch.equal(other, halves(toys.factors["session"].long(), True, toys, rows, 0)[0])


def test_within_learns_from_the_measured_split_alone(subject: Subject) -> None:
    rows = torch.arange(48)
    found = ask(subject, "session", rows, None, 0, within=True)
    assert found.part == "own"
    assert sorted([*found.train.tolist(), *found.test.tolist()]) == rows.tolist()
    assert torch.equal(found.known, subject.source.factors["session"].long()[found.train])
    assert any("whole objects apart" in line for line in found.about)
    assert len(ask(subject, "session", rows, 12, 0, within=True).train) == 12
    plain = ask(subject, "session", rows, None, 0, within=False)
    assert (plain.part, len(plain.train), plain.test.tolist()) == ("train", 80, rows.tolist())
    assert plain.unit is not None
    assert plain.unit.tolist() == (rows // 8).tolist()


def test_what_cannot_be_asked_is_one_line(make_subject: Callable[..., Subject]) -> None:
    rows = torch.arange(48)
    toys = {"source": source(), "train": source(80, "train")}
    with pytest.raises(GeomsslError, match="factor 'sesion' of toys; .*did you mean 'session'"):
        ask(make_subject(**toys), "sesion", rows, None, 0, False)
    with pytest.raises(GeomsslError, match="with the one value 3; expected a factor of at least two values"):
        ask(make_subject(**toys | {"source": source(angle=torch.full((48,), 3.0))}), "angle", rows, None, 0, False)
    with pytest.raises(GeomsslError, match=r"2 of 5 values of session in toys/test, such as 3, without a sample .*--within"):
        ask(make_subject(**toys | {"source": source(session=rows % 5)}), "session", rows, None, 0, False)
    with pytest.raises(GeomsslError, match="1 of 48 values of object with a single image|48 of 48 values"):
        ask(make_subject(**toys | {"source": source(object=rows)}), "object", rows, None, 0, True)
    with pytest.raises(GeomsslError, match="4 images to measure that share one value of angle"):
        ask(make_subject(**toys | {"source": source(angle=(rows > 3).float())}), "angle", rows[:4], None, 0, False)
