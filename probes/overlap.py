"""How well predicted regions lie over the true ones: intersection over union, accuracies, and their intervals over images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from geomssl.errors import GeomsslError
from geomssl.probes.assurance import interval, resampled_sums, summed

NAMES = ("miou", "mean_accuracy", "overall_accuracy")
RESAMPLES = 2000


def counts(predicted: Tensor, true: Tensor, regions: int) -> Tensor:
    """Pixels of every image and region, int64 (n, 3, K): predicted rightly, true, predicted. true -1 counts nowhere.

    predicted, true: int64 (n, H, W). Raises GeomsslError for other shapes and for regions outside -1..K-1.
    """
    if predicted.shape != true.shape or true.dim() != 3:
        raise GeomsslError(f"{tuple(predicted.shape)} against {tuple(true.shape)}", "two tensors (n, H, W)", reason="bad-shape")
    if true.numel() and not (int(true.min()) >= -1 and max(int(true.max()), int(predicted.max())) < regions):
        raise GeomsslError(f"regions {int(true.min())} to {int(true.max())}", f"-1 to {regions - 1}", reason="bad-value")
    named = true >= 0
    found = torch.zeros(len(true), 3, regions + 1, dtype=torch.long)
    # pixels that do not count go to a region of their own, which is cut off
    for row, (region, where) in enumerate(((true, named & (predicted == true)), (true, named), (predicted, named))):
        place = torch.where(where, region, regions).flatten(1)
        found[:, row].scatter_add_(1, place, torch.ones((), dtype=torch.long).expand_as(place))
    return found[:, :, :regions]


def scores(sums: Tensor, whole: Tensor | None = None) -> Tensor:
    """mIoU, mean accuracy and overall accuracy, float64 (..., 3), from counts summed over images (..., 3, K).

        IoU_k = right_k / (true_k + predicted_k - right_k),   accuracy_k = right_k / true_k,   overall = sum right / sum true

    mIoU is the mean over regions that are true or predicted somewhere, mean accuracy over those that are true somewhere. NaN
    where there is no pixel. whole (3, K): counts from which `sums` were resampled; a region that a resample lacks keeps its
    value of the whole, so that every resample has the mean over the same regions.
    """
    each, true = _each(sums)
    if whole is not None:
        each = torch.where(each.isnan(), _each(whole)[0], each)
    right = sums.double()[..., 0, :]
    return torch.cat([each.nanmean(dim=-1), (right.sum(dim=-1) / true.sum(dim=-1))[..., None]], dim=-1)


def _each(sums: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and accuracy of every region, (..., 2, K), NaN where it has no pixel; and the true pixels (..., K)."""
    right, true, predicted = sums.double().unbind(dim=-2)
    union = true + predicted - right
    found = [torch.where(below > 0, right / below, torch.nan) for below in (union, true)]
    return torch.stack(found, dim=-2), true


@dataclass(frozen=True)
class Scored:
    """values, low, high (3,) each, in the order of NAMES; sums (3, K) over all images; drawn (resamples, 3)."""

    values: Tensor
    low: Tensor
    high: Tensor
    sums: Tensor
    drawn: Tensor


def scored(found: Tensor, unit: Tensor, seed: int) -> Scored:
    """Scores of counts (n, 3, K), with percentile bootstrap intervals over units: the pixels of an image stay together.

    unit: int64 (n,), what is drawn; an image each, or objects of several images. The same seed draws the same units, so that
    two encoders can be compared draw by draw. NaN bounds where there are fewer than two units.
    """
    units = summed(found.flatten(1), unit)
    sums = units.sum(dim=0).view(found.shape[1:])
    values = scores(sums)
    nothing = torch.full_like(values, torch.nan)
    if len(units) < 2:
        return Scored(values, nothing, nothing, sums, nothing[None])
    drawn = scores(resampled_sums(units, seed, RESAMPLES).unflatten(1, found.shape[1:]), sums)
    low, high = interval(drawn, 0.95)
    return Scored(values, low, high, sums, drawn)
