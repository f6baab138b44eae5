"""The embedding probe: its measures against definitions, the state it must leave alone, and the artifact."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from geomssl.data.base import Resident
from geomssl.errors import GeomsslError
from geomssl.probes import pictures
from geomssl.probes.embed import (
    Options,
    continuity,
    label_agreement,
    pacmap_map,
    pca_map,
    probe,
    trustworthiness,
)
from geomssl.probes.subject import Subject
from geomssl.transforms.base import Parameter


def clusters(n: int = 90, d: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % 3
    draw = torch.Generator().manual_seed(seed)
    return 20 * torch.eye(d)[labels] + torch.randn(n, d, generator=draw), labels


def by_hand(features: Tensor, mapped: Tensor, k: int) -> float:
    """Trustworthiness from its definition, one pair at a time."""
    n = len(features)

    def order(points: Tensor, i: int) -> list[int]:
        return sorted((j for j in range(n) if j != i), key=lambda j: float((points[i] - points[j]).norm()))

    penalty = 0
    for i in range(n):
        rank = {j: r + 1 for r, j in enumerate(order(features, i))}
        penalty += sum(max(0, rank[j] - k) for j in order(mapped, i)[:k])
    return 1 - 2 * penalty / (n * k * (2 * n - 3 * k - 1))


def test_trustworthiness_and_continuity_are_their_definitions() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(25, 4, generator=draw, dtype=torch.float64)
    mapped = features[:, :2] ** 3
    assert trustworthiness(features, mapped, 3) == pytest.approx(by_hand(features, mapped, 3), abs=1e-12)
    assert continuity(features, mapped, 3) == pytest.approx(by_hand(mapped, features, 3), abs=1e-12)
    assert trustworthiness(features, mapped, 3) != pytest.approx(continuity(features, mapped, 3), abs=1e-3)
    assert trustworthiness(features, 5 * features + 1, 3) == 1.0


@pytest.mark.parametrize("k", [0, 13])
def test_a_k_of_half_the_images_is_refused(k: int) -> None:
    with pytest.raises(GeomsslError, match="n / 2"):
        trustworthiness(torch.randn(25, 2), torch.randn(25, 2), k)


def test_label_agreement_by_hand() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0], [10.0], [11.0]])
    labels = torch.tensor([0, 0, 1, 1, 1])
    assert label_agreement(points, labels, 1).tolist() == [1, 1, 0, 1, 1]
    assert label_agreement(points, labels, 2).tolist() == [0.5, 0.5, 0, 1, 1]


def test_pca_map_has_the_largest_variances_and_ignores_a_turn_of_the_features() -> None:
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(50, 5, generator=draw, dtype=torch.float64) * torch.tensor([5.0, 3, 1, 1, 1]) + 7
    found = pca_map(features)
    expected = np.linalg.eigvalsh(np.cov(features.numpy().T, bias=True))[::-1][:2]
    np.testing.assert_allclose(found.var(dim=0, correction=0).numpy(), expected, rtol=1e-9)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=draw, dtype=torch.float64)).Q
    torch.testing.assert_close(pca_map(features @ turn), found)
    assert pca_map(features[:, :1]).shape == (50, 2)


def test_pacmap_separates_clusters_and_repeats_itself() -> None:
    features, labels = clusters()
    first = pacmap_map(features, 3)
    assert torch.equal(first, pacmap_map(features, 3))
    assert not torch.equal(first, pacmap_map(features, 4))
    assert label_agreement(first, labels, 5).mean() == 1


def test_pacmap_leaves_the_process_as_it_was() -> None:
    import faiss
    import numba

    features, _ = clusters()
    engine = __import__("pacmap").pacmap
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    try:
        before = torch.get_num_threads(), faiss.omp_get_max_threads(), numba.get_num_threads(), engine._RANDOM_STATE
        pacmap_map(features, 0)
        assert (torch.get_num_threads(), faiss.omp_get_max_threads(), numba.get_num_threads(), engine._RANDOM_STATE) == before
        assert torch.equal(torch.get_rng_state(), states[0])
        assert np.random.get_state()[1].tolist() == states[1]
        assert random.getstate() == states[2]
    finally:
        torch.set_num_threads(threads)


def test_whatever_pacmap_changes_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PaCMAP that reseeds everything it can reach and asks for other threads, as its versions do in turn."""
    import numba

    engine = __import__("pacmap").pacmap

    class Careless:
        def __init__(self, **options: object) -> None:
            engine._RANDOM_STATE = 77

        def fit_transform(self, rows: np.ndarray) -> np.ndarray:  # type: ignore[type-arg]
            np.random.seed(0), torch.manual_seed(0), random.seed(0)
            return rows[:, :2]

    asked: list[int] = []
    monkeypatch.setattr(engine, "PaCMAP", Careless)
    monkeypatch.setattr(engine, "_RANDOM_STATE", None)
    monkeypatch.setattr(numba, "get_num_threads", lambda: 5)
    monkeypatch.setattr(numba, "set_num_threads", asked.append)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    pacmap_map(clusters()[0], 0)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1]
    assert random.getstate() == states[2]
    assert engine._RANDOM_STATE is None
    assert asked[-1] == 5


def test_pacmap_does_not_depend_on_the_global_generators() -> None:
    features, _ = clusters()
    np.random.seed(1)
    first = pacmap_map(features, 0)
    np.random.seed(2)
    assert torch.equal(pacmap_map(features, 0), first)


def test_pacmap_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    pacmap_map(clusters()[0], 0)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_equal_features_share_their_place() -> None:
    features, _ = clusters()
    repeated = torch.cat([features, features[:20], features[:20]])
    found = pacmap_map(repeated, 0)
    assert torch.equal(found[90:110], found[:20])
    assert torch.equal(found[110:], found[:20])
    assert torch.isfinite(found).all()


def test_features_that_cannot_be_mapped_are_refused() -> None:
    features, _ = clusters()
    for bad, what in (
        (torch.ones(90, 4), "all equal"),
        (features[:20], "at least 30"),
        (features[:20].repeat(5, 1), "20 different features"),
        (torch.full((90, 4), math.nan), "finite"),
    ):
        with pytest.raises(GeomsslError, match=what):
            pacmap_map(bad)


def test_probe_writes_a_map_with_a_tile_a_row(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options(seeds=2))
    table = found.table("map").columns
    assert len(table["x"]) == 60
    assert all(math.isfinite(v) for key in ("x", "y", "pca_x", "pca_y") for v in table[key])
    figure = found.figures[0]
    sheet = np.asarray(Image.open(io.BytesIO(found.files[str(figure.sprite)])))
    side = sheet.shape[1] // figure.sprite_columns
    images = subject.images(torch.arange(60))
    for i in (0, 7, 8, 59):
        row, column = divmod(i, figure.sprite_columns)
        tile = sheet[row * side : (row + 1) * side, column * side : (column + 1) * side]
        expected = images[i, 0].repeat_interleave(side // 8, 0).repeat_interleave(side // 8, 1)
        np.testing.assert_array_equal(tile, expected.mul(255).round().numpy().astype(np.uint8))
    metric = found.metric("trustworthiness")
    assert metric.interval is not None
    assert metric.interval.low <= metric.value <= metric.interval.high  # type: ignore[operator]
    labels = subject.source.labels
    same = (labels[:, None] == labels[None]).double().fill_diagonal_(0)  # type: ignore[index]
    assert found.metric("label_agreement_chance").value == pytest.approx(float(same.sum()) / (60 * 59))
    expected_agreement = label_agreement(subject.features(torch.arange(60)), labels).mean()  # type: ignore[arg-type]
    assert found.metric("label_agreement_features").value == pytest.approx(float(expected_agreement))
    json.dumps(found.to_json(), allow_nan=False)
    assert found == probe(make_subject(), Options(seeds=2))


def test_trustworthiness_of_the_probe_is_that_of_the_drawn_map(make_subject: Callable[..., Subject]) -> None:
    subject = make_subject()
    found = probe(subject, Options(seeds=2, seed=4))
    table = found.table("map").columns
    mapped = torch.tensor([table["x"], table["y"]], dtype=torch.float64).T
    features = subject.features(torch.arange(60))
    expected = pacmap_map(features, 4)
    torch.testing.assert_close(mapped, expected, rtol=1e-5, atol=1e-5)
    assert found.metric("trustworthiness").value == trustworthiness(features, expected)
    assert probe(subject, Options(seeds=1)).metric("trustworthiness").reason == "one seed"


def test_probe_refuses_what_it_cannot_map(make_subject: Callable[..., Subject]) -> None:
    class Constant(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return torch.ones(len(images), 5)

    for subject, options, what in (
        (make_subject(n=20), Options(), "20 images"),
        (make_subject(), Options(n=10), "--n 10"),
        (make_subject(), Options(k=30), "--k 30"),
        (make_subject(encoder=Constant()), Options(), "all equal"),
        (make_subject(projector=None), Options(layer="z"), "without a projector"),
    ):
        with pytest.raises(GeomsslError, match=what):
            probe(subject, options)


def test_without_labels_there_is_one_colour(make_subject: Callable[..., Subject]) -> None:
    source = make_subject().source
    bare = Resident(source.name, source.split, source.images(torch.arange(60)), None)
    found = probe(make_subject(source=bare), Options(seeds=1))
    assert found.figures[0].series is None
    assert "label" not in found.table("map").columns


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (2, 40)])
def test_a_sheet_of_2000_images_stays_small(channels: int, size: int) -> None:
    smooth = torch.rand(2000, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.interpolate(smooth, (size, size), mode="bilinear")
    data, columns = pictures.sprite(images)
    assert columns == 45
    assert len(data) <= pictures.LIMIT
    width, height = Image.open(io.BytesIO(data)).size
    assert width % columns == 0
    assert width == height


def test_points_are_coloured_by_a_factor(make_subject: Callable[..., Subject]) -> None:
    """A category as it is, a number in eight ranges of what the data set declares, so that two maps share their colours."""
    subject = make_subject()
    angle = torch.linspace(1, 359, 60)
    subject.source.factors.update(session=(torch.arange(60) % 3).float(), angle=angle)  # type: ignore[attr-defined]
    subject.source.parameters = (Parameter("angle", "degrees", "periodic", 0.0, 0.0, 360.0),)
    found = probe(subject, Options(seeds=1, colour="angle"))
    assert [f.series for f in found.figures] == ["angle", "angle"]
    assert found.table("map").columns["angle"] == [f"{45 * (v // 45):.3g} to {45 * (v // 45 + 1):.3g}" for v in angle.tolist()]
    plain = probe(subject, Options(seeds=1, colour="session"))
    assert plain.table("map").columns["session"] == [str(i % 3) for i in range(60)]
    assert plain.table("map").columns["x"] == found.table("map").columns["x"]
    assert plain.metric("label_agreement_chance").value == pytest.approx(19 / 59)
    with pytest.raises(GeomsslError, match="did you mean 'session'"):
        probe(subject, Options(seeds=1, colour="sesion"))
