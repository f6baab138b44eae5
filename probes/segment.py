"""segment: which region every pixel belongs to, read by a small decoder from the encoder's map, frozen or trained along."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from geomssl.artifact import Artifact, Figure, Interval, Metric, Table
from geomssl.errors import GeomsslError
from geomssl.probes import elsewhere, pictures
from geomssl.probes import subject as subjects
from geomssl.probes.assurance import interval
from geomssl.probes.decoders import Kind
from geomssl.probes.linear import check_frozen, train_sample
from geomssl.probes.overlap import NAMES, Scored, counts, scored
from geomssl.probes.segmenter import Masks, Schedule, fit, predictions
from geomssl.probes.subject import Subject

TITLES = {
    "miou": "mean intersection over union", "mean_accuracy": "accuracy of a pixel, mean over regions",
    "overall_accuracy": "accuracy of a pixel",
}
FEW = "fewer than two of them, or a resample without a named pixel"


class Options(subjects.Options):
    """Settings of the segmentation probe."""

    to: str | None = Field(None, description="another data set with masks, NAME or NAME:PATH  [default: the measured one]")
    to_set: tuple[str, ...] = Field(
        (), description="a setting of the data set of --to, NAME.KEY=VALUE, such as ade20k.val=0.1; repeat for several"
    )
    decoder: Kind = Field("hypernetwork", description="what reads the map: weights made for each patch, or a linear classifier")
    frozen: bool = Field(True, description="keep the encoder as it is, in eval mode; else a copy of it learns along")
    steps: int = Field(300, ge=1, description="training steps of the decoder")
    step_images: int = Field(16, ge=1, description="images of a training step")
    rate: float = Field(3e-3, gt=0, description="learning rate of the decoder; an encoder that learns along has a tenth of it")
    train_n: int | None = Field(None, ge=2, description="training images to use; all of them when not given")
    beside: bool = Field(True, description="measure the random encoder too")
    show: int = Field(6, ge=0, le=24, description="images in the picture of masks and predictions")
    side: int = Field(64, ge=8, le=256, description="pixels of a tile in the picture")


@dataclass(frozen=True)
class Reading:
    """What one encoder, or always the same region (chance), says of the test images; shown: of those in the picture."""

    key: str
    name: str
    scored: Scored
    shown: Tensor


def probe(subject: Subject, options: Options) -> Artifact:
    """Intersection over union and accuracies of pixels on the measured split, the random encoder and chance beside."""
    check_frozen(subject.encoder)
    if options.to is not None:
        subject = elsewhere.carried(subject, options.to, options.to_set)
    elif options.to_set:
        raise GeomsslError(f"--to-set {options.to_set[0]} without --to", "--to NAME", reason="no-target")
    regions = _regions(subject)
    rows, known = subject.choose(options), train_sample(subject, options.train_n, options.seed)
    unit, word = _units(subject, rows)
    readings = [_read(subject, "h", "encoder", rows, known, unit, options)]
    twin = subject.random_twin() if options.beside else None
    if twin is not None:
        check_frozen(twin.encoder)
        readings.append(_read(twin, "random", "random encoder", rows, known, unit, options))
    readings.append(_chance(subject, rows, known, unit, options))
    notes = _remarks(subject, options, twin is None)
    values = readings[0].scored.values
    others = "; ".join(f"{r.name} {float(r.scored.values[0]):.3f}" for r in readings[1:])
    state = "frozen" if options.frozen else "fine-tuned"
    return Artifact(
        probe="segment",
        title="Segmentation by a small decoder",
        headline=(
            f"A {options.decoder} decoder on the {state} encoder reaches a mean intersection over union of "
            f"{float(values[0]):.3f} ({others}), and {float(values[2]):.1%} of the named pixels of {len(rows)} test images."
        ),
        definition=(
            "IoU_k = right / (true + predicted - right) in pixels of region k, summed over all test images; mIoU: its mean "
            "over regions that are true or predicted somewhere. mean_accuracy: right / true, mean over regions that are true "
            "somewhere. overall_accuracy: right / true over all pixels. Pixels without a name count nowhere. The decoder is "
            "trained on the training split with pixelwise cross-entropy; its last step counts. Chance: always the most "
            "frequent region of the training masks."
        ),
        metrics=_metrics(readings, len(rows), word),
        tables=[_scores(readings, len(rows), len(known)), _each(readings, regions)],
        figures=[
            Figure(
                "scores", "bar", "Regions read from the features", f"Bars: 95 % intervals, bootstrap over {word}.", "scores",
                "measure", "value", "features", "low", "high", x_label="measure", y_label="value",
            ),
            *([_picture_figure(readings, _shown(rows, options.show))] if options.show else []),
        ],
        notes=notes, options=options.model_dump(mode="json"), provenance=subject.provenance,
        files={"masks.png": _picture(subject, readings, _shown(rows, options.show), options.side)} if options.show else {},
    )


def _regions(subject: Subject) -> list[str]:
    found = list(subject.source.regions)
    if not found:
        raise GeomsslError(
            f"segmentation of {subject.source.name}, which has no masks", "a data set with masks: views, pets, ade20k",
            reason="no-masks",
        )
    return found


def _units(subject: Subject, rows: Tensor) -> tuple[Tensor, str]:
    """What the bootstrap draws: whole objects where the data set tells them, whose images are alike; else images."""
    if "object" not in subject.source.factors:
        return torch.arange(len(rows)), "images"
    return subject.source.factors["object"].cpu()[rows].unique(return_inverse=True)[1], "objects"


def _read(
    subject: Subject, key: str, name: str, rows: Tensor, known: Tensor, unit: Tensor, options: Options
) -> Reading:
    """A decoder trained on that encoder, and what it says of the test images."""
    regions = len(subject.source.regions)
    how = Schedule(options.steps, options.step_images, options.rate, options.frozen, options.decoder, options.seed)
    model = fit(subject, known, regions, how)
    found: list[Tensor] = []
    shown: list[Tensor] = []
    wanted = _shown(rows, options.show)
    for chunk, predicted in predictions(subject, model, rows):
        found.append(counts(predicted, subject.source.masks(chunk), regions))
        shown.append(predicted[torch.isin(chunk, wanted)])
    return Reading(key, name, scored(torch.cat(found), unit, options.seed), torch.cat(shown))


def _shown(rows: Tensor, show: int) -> Tensor:
    """Which images stand in the picture: evenly spaced, since neighbours may be frames of one sequence."""
    return rows[torch.linspace(0, len(rows) - 1, min(show, len(rows))).round().long()]


def _chance(subject: Subject, rows: Tensor, known: Tensor, unit: Tensor, options: Options) -> Reading:
    regions = len(subject.source.regions)
    assert subject.train is not None
    masks, often = Masks(subject.train, known, 0), torch.zeros(regions, dtype=torch.long)
    for chunk in torch.arange(len(known)).split(256):
        true = masks[chunk]
        often += true[true >= 0].bincount(minlength=regions)
    if not int(often.sum()):
        raise GeomsslError("training masks without one named pixel", "masks that name pixels", reason="no-masks")
    found = []
    for chunk in rows.split(256):
        true = subject.source.masks(chunk)
        found.append(counts(torch.full_like(true, int(often.argmax())), true, regions))
    return Reading("chance", "chance", scored(torch.cat(found), unit, options.seed), torch.empty(0))


def _remarks(subject: Subject, options: Options, alone: bool) -> list[str]:
    notes = []
    if options.decoder == "hypernetwork":
        notes.append("The hypernetwork decoder sees the picture itself as well: what the features add is the gain over the "
                     "random encoder.")
    if not options.frozen:
        notes.append("The encoder learnt along with the decoder: a start for training, no property of its features.")
    if options.beside and alone:
        notes.append("No random encoder beside it: how this encoder is initialised is not known.")
    if subject.source.split == "train":
        notes.append("These are training images: the decoder has seen them, and the scores say little.")
    return notes


def _bounds(low: float, high: float, method: str) -> tuple[Interval | None, str | None]:
    known = math.isfinite(low) and math.isfinite(high)
    return (Interval(low, high, method), None) if known else (None, FEW)


def _metrics(readings: list[Reading], n: int, word: str) -> list[Metric]:
    metrics = []
    for reading in readings:
        for k, name in enumerate(NAMES):
            bounds, reason = _bounds(
                float(reading.scored.low[k]), float(reading.scored.high[k]), f"percentile bootstrap over {word}, 95 %"
            )
            metrics.append(Metric(
                name if reading.key == "h" else f"{name}_{reading.key}", float(reading.scored.values[k]), n, bounds, reason,
                better="higher" if reading.key == "h" else None, about=f"{TITLES[name]}, {reading.name}",
            ))
    random = next((r for r in readings if r.key == "random"), None)
    if random is not None:
        main = readings[0].scored
        low, high = interval(main.drawn - random.scored.drawn, 0.95)
        for k, name in enumerate(NAMES):
            bounds, reason = _bounds(float(low[k]), float(high[k]), f"percentile bootstrap over {word}, paired, 95 %")
            metrics.append(Metric(
                f"{name}_gain_over_random", float(main.values[k] - random.scored.values[k]), n, bounds, reason, better="higher",
                about=f"{TITLES[name]}: the encoder's minus the random encoder's, same test images",
            ))
    return metrics


def _scores(readings: list[Reading], n: int, trained: int) -> Table:
    cells = [(r, k, name) for r in readings for k, name in enumerate(NAMES)]

    def bound(values: Tensor, k: int) -> float | None:
        return float(values[k]) if math.isfinite(float(values[k])) else None

    return Table(
        "scores", "Scores by features",
        {
            "measure": [name for _, _, name in cells], "features": [r.name for r, _, _ in cells],
            "value": [float(r.scored.values[k]) for r, k, _ in cells],
            "low": [bound(r.scored.low, k) for r, k, _ in cells], "high": [bound(r.scored.high, k) for r, k, _ in cells],
            "n": [n] * len(cells), "trained_on": [trained] * len(cells),
        },
        "low and high: 95 % intervals.",
    )


def _each(readings: list[Reading], regions: list[str]) -> Table:
    """Every region: how much of the pictures it is, and how well each encoder finds it."""
    true = readings[0].scored.sums[1]
    columns: dict[str, list[float | str | None]] = {"region": list(regions), "share": (true / true.sum()).tolist()}
    for reading in readings[:-1]:
        right, own, predicted = reading.scored.sums
        for name, below in (("iou", own + predicted - right), ("accuracy", own)):
            pairs = zip(right.tolist(), below.tolist(), strict=True)
            label = name if reading.key == "h" else f"{name}_{reading.key}"
            columns[label] = [a / b if b else None for a, b in pairs]
    return Table("regions", "Every region", columns, "share: of the named pixels of the test images. Empty: no such pixel.")


def _palette(regions: int) -> Tensor:
    """A colour (K + 1, 3) for each region; black, the last, for pixels without a name."""
    import matplotlib

    if regions <= 20:
        colours = torch.tensor(matplotlib.colormaps["tab20"].colors[:regions])  # type: ignore[attr-defined]
    else:
        # steps of the golden section round the colour circle: neighbours differ
        hues = (torch.arange(regions) * 0.6180339887498949) % 1
        colours = torch.from_numpy(matplotlib.colormaps["hsv"](hues.numpy())[:, :3])
    return torch.cat([colours.float(), torch.zeros(1, 3)])


def _picture(subject: Subject, readings: list[Reading], rows: Tensor, side: int) -> bytes:
    """A row for each image: the image, its mask, and what every encoder says."""
    images = pictures.squares(subject.images(rows), side).expand(-1, 3, -1, -1)
    painted = [subject.source.masks(rows), *(r.shown for r in readings[:-1])]
    palette = _palette(len(subject.source.regions))
    tiles = [images]
    for masks in painted:
        near = F.interpolate(masks[:, None].double(), (side, side), mode="nearest-exact")[:, 0].long()
        # -1 is the last colour
        tiles.append(palette[near].permute(0, 3, 1, 2))
    return pictures.png(pictures.grid(torch.stack(tiles, dim=1).flatten(0, 1), len(tiles)))


def _picture_figure(readings: list[Reading], rows: Tensor) -> Figure:
    columns = ["image", "mask", *(r.name for r in readings[:-1])]
    return Figure(
        "masks", "image", "Masks and predictions",
        f"From left to right: {', '.join(columns)}; one colour a region, black without a name. "
        f"Images {', '.join(str(i) for i in rows.tolist())} of the split.",
        file="masks.png",
    )
