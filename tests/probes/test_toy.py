"""Turned one-hot images against tents computed by hand and numpy's rank; what the command says and refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from geomssl import artifact
from geomssl.cli import main
from geomssl.commands.toy import rotated, rotation_rank, rotations
from geomssl.errors import GeomsslError


def tents(pixel: tuple[int, int], angles: list[float], size: int) -> np.ndarray:
    """Bilinear copies of a one-hot image, pixel by pixel: the tent of the distance from where each pixel comes from."""
    centre, found = (size - 1) / 2, np.zeros((len(angles), size, size))
    for k, degrees in enumerate(angles):
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        for row in range(size):
            for column in range(size):
                # up is minus row; turning the image anticlockwise looks a pixel up clockwise
                x, up = column - centre, centre - row
                source = centre - (-s * x + c * up), centre + (c * x + s * up)
                found[k, row, column] = np.prod([max(0.0, 1 - abs(a - b)) for a, b in zip(source, pixel, strict=True)])
    return found.reshape(len(angles), -1)


def test_copies_are_the_tents_and_their_rank_is_that_of_the_covariance() -> None:
    size, pixel, draws = 9, (2, 5), torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for reach in (20.0, 90.0, 360.0):
        expected = tents(pixel, (reach * draws).tolist(), size)
        assert np.abs(rotated(pixel, reach * draws, size).numpy() - expected).max() < 1e-12
        covariance = np.cov(expected.T)
        assert rotation_rank(reach, pixel, draws, size) == np.linalg.matrix_rank(covariance, tol=1e-13, hermitian=True)


def test_no_range_no_rank_and_quarter_turns_have_three() -> None:
    draws = torch.rand(30, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert rotation_rank(0.0, (1, 2), draws, 8) == 0
    # four one-hot images, centred
    quarters = (draws * 4).floor() / 4
    assert rotation_rank(360.0, (1, 2), quarters, 8) == 3
    # the lit pixel at the centre of an odd image stays where it is, and shades with the angle alone
    assert rotation_rank(360.0, (4, 4), quarters, 9) == 0


def test_the_artifact_holds_the_mean_and_spread_over_runs() -> None:
    found = rotations((0.0, 45.0, 360.0), images=40, size=12, runs=3, seed=2)
    columns = found.table("rotations").columns
    runs = np.array([columns[f"run_{k}"] for k in range(3)])
    assert columns["rank"] == pytest.approx(runs.mean(axis=0).tolist())
    assert columns["std"] == pytest.approx(runs.std(axis=0, ddof=1).tolist())
    assert columns["rank"][0] == 0 < columns["rank"][1] < columns["rank"][2] <= 39
    assert found.metric("rank_45").value == columns["rank"][1]
    assert rotations((0.0, 45.0, 360.0), images=40, size=12, runs=3, seed=2) == found
    assert rotations((45.0,), images=40, size=12, runs=3, seed=3).metric("rank_45") != found.metric("rank_45")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"ranges": (400.0,)}, "0 to 360"), ({"ranges": ()}, "0 to 360"), ({"images": 1}, "--images 1; expected at least 2"),
     ({"runs": 0}, "--runs 0"), ({"size": 1}, "--size 1"), ({"tau": 0.0}, "threshold > 0")],
)
def test_bad_numbers_are_one_line(options: dict, said: str) -> None:
    with pytest.raises(GeomsslError, match=said):
        rotations(**{"ranges": (90.0,), "images": 10, "size": 6, "runs": 1, **options})


def test_the_command_saves_an_artifact_and_tells_it(tmp_path, capsys) -> None:
    words = ["toy", "rotations", "--range", "0", "--range", "90", "--images", "30", "--size", "10", "--runs", "2", "--quiet"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "toy-rotations of toy: 30 turns of a 10x10" in capsys.readouterr().out
    (place,) = artifact.find(tmp_path)
    assert artifact.load(place).table("rotations").columns["range"] == [0.0, 90.0]
    assert (place / "rotations.svg").stat().st_size > 1000
    assert main([*words, "--json", "--out", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["probe"] == "toy-rotations"
    assert main(["toy", "rotations", "--images", "1", "--quiet", "--out", str(tmp_path)]) == 2
    assert "--images 1; expected at least 2" in capsys.readouterr().err
