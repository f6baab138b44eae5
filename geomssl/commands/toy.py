"""geomssl toy: small worlds in which a claim of a paper can be seen, without data and without training."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from geomssl.errors import GeomsslError

if TYPE_CHECKING:
    from torch import Tensor

    from geomssl.artifact import Artifact

# A singular value below this share of the largest is rounding of float64 (500 images of 1,024 pixels: some 2e-13).
TAU = 1e-10


def rotated(pixel: tuple[int, int], angles: Tensor, size: int) -> Tensor:
    """A one-hot image (size, size) turned by angles (n,) in degrees: (n, size size), float64.

    Bilinear, zeros outside, about the centre, as transforms.Rotate: entry p is the tent max(0, 1 - |dy|) max(0, 1 - |dx|) of
    the step (dy, dx) from the lit pixel (row, column) to where p comes from; a few entries around its new place are lit.
    """
    import torch

    from geomssl.transforms import Rotate

    images = torch.zeros(1, 1, size, size, dtype=torch.float64)
    images[0, 0, pixel[0], pixel[1]] = 1
    return Rotate(180)(images.expand(len(angles), -1, -1, -1), angles[:, None]).flatten(1)


def rotation_rank(max_degrees: float, pixel: tuple[int, int], draws: Tensor, size: int = 32, tau: float = TAU) -> int:
    """Rank of the covariance of turned copies of a one-hot image, with angles max_degrees * draws.

        rank = number of singular values >= tau sigma_1 of the centred copies (n, size^2), by a float64 SVD

    draws: (n,) in [0, 1). The singular values of the centred copies are the roots of the covariance's eigenvalues, and have
    the same rank. At most min(n - 1, size^2); 0 where all copies are equal. Source: Cosentino et al. 2022, App. E, Fig. 10.
    """
    import torch

    from geomssl.probes.estimators import count

    found = rotated(pixel, max_degrees * draws.double(), size)
    if bool((found == found[0]).all()):
        return 0
    # pixels that stay dark add no direction
    found = found[:, (found != 0).any(dim=0)]
    return count(torch.linalg.svdvals(found - found.mean(dim=0)), tau, relative=True)


def rotations(
    ranges: tuple[float, ...], images: int = 500, size: int = 32, runs: int = 5, tau: float = TAU, seed: int = 0
) -> Artifact:
    """Fig. 10: the rank against the range of angles, mean and standard deviation over runs (a random pixel each).

    ranges: degrees; angles are uniform in [0, range). Raises GeomsslError for ranges outside 0 to 360 and numbers too small.
    """
    import torch

    from geomssl import __version__
    from geomssl.artifact import Artifact, Figure, Metric, Table
    from geomssl.progress import track
    from geomssl.seeding import generator

    if not ranges or any(not 0 <= r <= 360 for r in ranges):
        raise GeomsslError(f"ranges {list(ranges)}", "angles from 0 to 360 degrees", reason="bad-value")
    for name, value, least in (("images", images, 2), ("size", size, 2), ("runs", runs, 1)):
        if value < least:
            raise GeomsslError(f"--{name} {value}", f"at least {least}", reason="bad-value")
    ranks = torch.zeros(len(ranges), runs, dtype=torch.float64)
    for run in track(range(runs), "toy rotations"):
        draw = generator(seed, "toy-rotations", run)
        row, column = torch.randint(size, (2,), generator=draw).tolist()
        angles = torch.rand(images, generator=draw, dtype=torch.float64)
        for k, reach in enumerate(ranges):
            ranks[k, run] = rotation_rank(reach, (row, column), angles, size, tau)
    mean = ranks.mean(dim=1)
    spread = ranks.std(dim=1) if runs > 1 else torch.zeros(len(ranges), dtype=torch.float64)
    rising = int((ranks.diff(dim=0) >= 0).all(dim=0).sum())
    reason = f"mean of {runs} runs; their standard deviation is in the table" if runs > 1 else "one run"
    return Artifact(
        probe="toy-rotations",
        title="Rank of turned one-hot images against the range of angles",
        headline=(
            f"{images} turns of a {size}x{size} one-hot image by up to {ranges[-1]:g} degrees have a covariance of rank "
            f"{float(mean[-1]):.1f} on average ({runs} runs), by up to {ranges[0]:g} degrees {float(mean[0]):.1f}; the rank "
            f"never falls as the range grows in {rising} of {runs} runs."
        ),
        definition=(
            f"Rank of the covariance of {images} copies of a one-hot image of {size}x{size} pixels (a new pixel each run), "
            "each turned about the centre by an angle uniform in [0, range): bilinear, zeros outside: a pixel in a corner "
            f"leaves the frame. Singular values of the centred copies at least {tau:g} of the largest count; float64. The same "
            "draws serve every range of a run, scaled."
        ),
        metrics=[
            Metric(f"rank_{reach:g}", float(mean[k]), runs, reason=reason, unit="dimensions", about=f"range {reach:g} degrees")
            for k, reach in enumerate(ranges)
        ],
        tables=[Table(
            "rotations", "Rank by range of angles",
            {
                "range": list(ranges), "rank": mean.tolist(), "std": spread.tolist(),
                "low": (mean - spread).tolist(), "high": (mean + spread).tolist(),
                **{f"run_{run}": ranks[:, run].long().tolist() for run in range(runs)},
            },
            "low, high: one standard deviation over runs, from pixel to pixel.",
        )],
        figures=[Figure(
            "rotations", "line", "Rank of the covariance of turned one-hot images",
            "The wider the range, the more directions a linear map must drop to be invariant. Bars: one standard deviation.",
            "rotations", "range", "rank", low="low", high="high", x_label="range of angles / degrees", y_label="rank",
        )],
        notes=[
            "Bilinear interpolation: with nearest neighbours the images are one-hot and the rank counts the pixels of an arc.",
            f"No rank can exceed {min(images - 1, size * size)}: {images} centred images of {size * size} pixels.",
        ],
        options={"ranges": list(ranges), "images": images, "size": size, "runs": runs, "tau": tau, "seed": seed},
        provenance={
            "run": "toy", "seed": seed, "dtype": "float64", "device": "cpu", "command": " ".join(["geomssl", *sys.argv[1:]]),
            "versions": {"geomssl": __version__, "torch": torch.__version__},
        },
    )


@click.group()
def toy() -> None:
    """Small worlds in which a claim of a paper can be seen, without data and without training.

    \b
    Example:
      geomssl toy rotations
    """


@toy.command("rotations")
@click.option("--range", "ranges", multiple=True, type=float, metavar="DEGREES",
              help="a range of angles; repeat for several  [default: 0, 30, ..., 360]")
@click.option("--images", default=500, show_default=True, help="turned copies of an image")
@click.option("--size", default=32, show_default=True, help="side of the image in pixels")
@click.option("--runs", default=5, show_default=True, help="random pixels")
@click.option("--tau", default=TAU, show_default=True, help="singular values of at least this share of the largest count")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="seed of every draw")
@click.option("--out", default="geomssl-artifacts", show_default=True, metavar="DIR", help="folder for the artifact")
@click.option("--json", "as_json", is_flag=True, help="print the artifact as JSON")
@click.option("--quiet", is_flag=True, help="no progress")
def _rotations(
    ranges: tuple[float, ...], images: int, size: int, runs: int, tau: float, seed: int, out: str, as_json: bool, quiet: bool
) -> None:
    """Rank of the covariance of turned one-hot images against the range of angles (Cosentino et al. 2022, Fig. 10).

    \b
    Example:
      geomssl toy rotations --out toy
    """
    import json
    from pathlib import Path

    from geomssl import files
    from geomssl.commands.probing import describe
    from geomssl.progress import shown

    files.check(Path(out) / "artifact")
    with shown(not quiet):
        found = rotations(ranges or tuple(30.0 * k for k in range(13)), images, size, runs, tau, seed)
    where = found.save(out)
    click.echo(json.dumps(found.to_json(), indent=1) if as_json else describe(found, where))
