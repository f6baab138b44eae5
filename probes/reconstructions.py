"""reconstructions: what a decoder paints of view 2 beside view 2 itself, and how much of it stands on view 1."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.objectives.pairs import partners
from geomssl.objectives.reconstruction import Reconstruction
from geomssl.probes import checks, pictures
from geomssl.probes import subject as subjects
from geomssl.probes.assurance import METHOD, bootstrap_mean, bootstrap_ratio
from geomssl.probes.subject import Subject
from geomssl.progress import track
from geomssl.seeding import generator

MOST = 1024
# key: (what is painted or held against view 2, what it says)
KINDS = {
    "mse": ("painted", "from both views, as in training"),
    "mse_mean_image": ("mean image", "the mean of all views 2, the best constant"),
    "mse_view_1": ("view 1", "view 1 as it is"),
    "mse_other_view_1": ("other view 1", "painted with the keys and values of another image's view 1"),
    "mse_other_view_2": ("other view 2", "painted with the queries of another image's view 2"),
}


class Options(subjects.Options):
    """Settings of the probe of reconstructions."""

    show: int = Field(10, ge=1, le=40, description="images in the picture")
    side: int = Field(64, ge=8, le=256, description="pixels of a tile in the picture")


def squared_errors(painted: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared error of each image over its pixels and channels, (n,) float64, of (n, C, H, W) both."""
    return (painted.double() - wanted.double()).square().flatten(1).mean(dim=1)


def others(n: int, draw: torch.Generator) -> Tensor:
    """Another row for each of n, (n,): one circle through all of them in a drawn order, so that none keeps its own."""
    order = torch.randperm(n, generator=draw)
    found = torch.empty_like(order)
    found[order] = order.roll(1)
    return found


def probe(subject: Subject, options: Options) -> Artifact:
    """The error of the painting beside the mean image and view 1, and what it becomes with another image's view 1 or view 2.

    Raises GeomsslError (no-decoder) for a run of another objective than reconstruction.
    """
    objective = subject.objective
    if not isinstance(objective, Reconstruction):
        raise GeomsslError(
            f"reconstructions of {subject.provenance.get('objective', 'a model without an objective')}",
            "a run of objective reconstruction", reason="no-decoder",
        )
    subject.need(2, "a comparison of reconstructions")
    notes: list[str] = []
    if options.n is None and len(subject.source) > MOST:
        notes.append(f"{MOST} images, drawn from {len(subject.source)}; --n asks for more.")
        options = options.model_copy(update={"n": MOST})
    rows = subject.choose(options)
    (maps1, first), (maps2, second) = _views(subject, objective, rows, options.seed)
    swapped = others(len(rows), generator(options.seed, "reconstructions-others"))
    painted = _painted(subject, objective, maps1, maps2)
    on_others = _painted(subject, objective, maps1[swapped], maps2)
    asked_by_others = _painted(subject, objective, maps1, maps2[swapped])
    held = [painted, second.mean(dim=0, keepdim=True).expand_as(second), first, on_others, asked_by_others]
    errors = {key: squared_errors(image, second) for key, image in zip(KINDS, held, strict=True)}
    checks.matrix(torch.stack(list(errors.values())), "errors of reconstructions")
    if subject.source.split == "train":
        notes.append("These are training images: the decoder has seen them.")
    shown = torch.linspace(0, len(rows) - 1, min(options.show, len(rows))).round().long()
    tiles = [pictures.squares(images[shown], options.side) for images in (first, second, painted, on_others)]
    metrics = _metrics(errors, options.seed)
    return Artifact(
        probe="reconstructions",
        title="View 2, painted from view 1",
        headline=_headline(metrics, len(rows)),
        definition=(
            "mse: mean over images and pixels of (painted - view 2)^2, pixels in [0, 1]. r2 = 1 - mse / mse of the mean image. "
            "rise_other_view_1 = mse with the keys and values of another image's view 1 / mse: 1 where the painting does not "
            "depend on view 1, that is, where view 2 leaks into its own reconstruction or only a mean is painted; "
            "rise_other_view_2: the same with the queries of another image's view 2. Each image meets one other, drawn once."
        ),
        metrics=metrics,
        tables=[_summary(metrics), _table(rows, errors)],
        figures=[
            Figure(
                "paintings", "image", "Views and paintings",
                "From the top: view 1, view 2, what was painted of it, and what is painted with the view 1 of another image. "
                f"Images {', '.join(str(int(i)) for i in rows[shown])}.", file="paintings.png",
            ),
            Figure(
                "errors", "bar", "Error against view 2", "Bars: 95 % intervals over images.", "summary", "what", "mse",
                low="low", high="high", x_label="", y_label="mean squared error",
            ),
        ],
        notes=notes, options=options.model_dump(mode="json"), provenance=subject.provenance,
        files={"paintings.png": pictures.png(pictures.grid(torch.cat(tiles), len(shown)))},
    )


def _views(
    subject: Subject, objective: Reconstruction, rows: Tensor, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Fibres and images (n, C, size, size) of each view, of the measured split, drawn as in training."""
    source, found = subject.source, []
    for number, (spec, partner) in enumerate(zip(objective.views, partners(objective.config, source), strict=True)):
        shown = rows if partner is None else partner(rows, generator(seed, "reconstructions-partner", number))
        view = (spec.policy, seed, number)
        pixels = subject.features(shown, "pixels", view=view).unflatten(1, (source.channels, source.size, source.size))
        found.append((subject.features(shown, "fibres", view=view), pixels))
    return found[0], found[1]


@torch.no_grad()
def _painted(subject: Subject, objective: Reconstruction, maps1: Tensor, maps2: Tensor) -> Tensor:
    """Paintings (n, C, size, size) on the CPU, batch by batch."""
    objective.to(subject.device, subject.dtype).eval()
    parts = list(zip(maps1.split(subject.batch_size), maps2.split(subject.batch_size), strict=True))
    return torch.cat([objective.painted(torch.cat(pair).to(subject.device)).cpu() for pair in track(parts, "paintings")])


def _metrics(errors: dict[str, Tensor], seed: int) -> list[Metric]:
    """The five errors, the share of variance explained, and the two rises."""
    n, own, constant = len(errors["mse"]), errors["mse"], errors["mse_mean_image"]
    low, high = bootstrap_mean(torch.stack(list(errors.values()), dim=1), seed)
    found = [
        Metric(
            key, float(values.mean()), n, Interval(float(low[k]), float(high[k]), "percentile bootstrap over images, 95 %"),
            better="lower" if key == "mse" else None, about=f"{KINDS[key][0]}: {KINDS[key][1]}",
        )
        for k, (key, values) in enumerate(errors.items())
    ]
    explained = _ratio(own, constant, seed)
    r2 = None if explained is None else (1 - explained[0], 1 - explained[2], 1 - explained[1])
    found.append(_compared("r2", r2, n, "views 2 that are all alike", "share of the pixels' variance painted", "higher"))
    for which in ("1", "2"):
        rise = _ratio(errors[f"mse_other_view_{which}"], own, seed)
        about = f"error with another image's view {which} over the error with its own"
        better: Literal["higher"] | None = "higher" if which == "1" else None
        found.append(_compared(f"rise_other_view_{which}", rise, n, "a painting without error", about, better))
    return found


def _headline(metrics: list[Metric], n: int) -> str:
    value = {m.name: m.value for m in metrics}
    r2, rise = value["r2"], value["rise_other_view_1"]
    share = "" if r2 is None else f", {r2:.0%} of the pixels' variance explained"
    more = "" if rise is None else f"; with another image's view 1 the error is {rise:.3g} times as large"
    return f"View 2 of {n} images is painted with a mean squared error of {value['mse']:.3g}{share}{more}."


def _ratio(above: Tensor, below: Tensor, seed: int) -> tuple[float, float, float] | None:
    """(sum above / sum below, low, high), or None where that is not defined."""
    low, high = bootstrap_ratio(above[:, None], below[:, None], seed)
    if not bool(torch.isfinite(low + high).all()):
        return None
    return float(above.sum() / below.sum()), float(low[0]) ** 2, float(high[0]) ** 2


def _compared(
    name: str, found: tuple[float, float, float] | None, n: int, why: str, about: str, better: Literal["higher"] | None
) -> Metric:
    if found is None:
        return Metric(name, None, n, reason=why, better=better, about=about)
    value, low, high = found
    bounds = Interval(low, high, f"{METHOD}, the other images held fixed, 95 %")
    return Metric(name, value, n, bounds, better=better, about=about)


def _summary(metrics: list[Metric]) -> Table:
    kept = [m for m in metrics if m.name in KINDS]
    return Table(
        "summary", "Errors against view 2",
        {
            "what": [KINDS[m.name][0] for m in kept], "mse": [m.value for m in kept],
            "low": [m.interval.low if m.interval else None for m in kept],
            "high": [m.interval.high if m.interval else None for m in kept], "n": [m.n for m in kept],
        },
        "low and high: 95 % intervals.",
    )


def _table(rows: Tensor, errors: dict[str, Tensor]) -> Table:
    return Table(
        "images", "Every image", {"index": rows.tolist(), **{key: values.tolist() for key, values in errors.items()}},
        "mean squared errors against its own view 2",
    )
