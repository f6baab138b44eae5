"""Prediction of a transformation from h(x) - h(view): the augmentation's parameters, or a data set's factors (C2, C4, C7)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from geomssl.data.base import Source
from geomssl.distributed import gather
from geomssl.encoders.base import Encoder
from geomssl.errors import GeomsslError
from geomssl.heads import regressor
from geomssl.losses import wide
from geomssl.objectives.base import Batch, Losses, Objective, ViewSpec, encoded
from geomssl.objectives.pairs import PairSettings, change, changed, factor, factors_of, partners
from geomssl.transforms import policy
from geomssl.transforms.base import Parameter


class PredictionSettings(PairSettings):
    """What is predicted, and from which views."""

    policy: str = Field("ciper", description="augmentation policy of both views; its parameters are predicted")
    predictor: int = Field(512, ge=1, description="hidden width of the predictor")
    categories: tuple[str, ...] = Field((), description="factors of the view that are classified, such as session")
    continuous: tuple[str, ...] = Field((), description="factors whose change from the image to its view is regressed")


class Prediction(NamedTuple):
    """total = regression + classification; a term that has nothing to predict is None."""

    total: Tensor
    regression: Tensor | None
    classification: Tensor | None


class Predictive(Objective):
    """L = MSE(p(h(x) - h(x_t)), r_t), the mean over both views (Xu and Triesch, Eq. 1); the predictive-only model (C2).

    r_t: the parameters of the augmentation in the policy's fixed order, and the change of each continuous factor from the
    image to its view (the short way round where the data set says that it is periodic), each standardised over the joined
    batch; those that do not act on the images (hue on one channel) are left out. A category adds the cross-entropy of the
    view's value, one class for each value of the training split. Eq. 1 is printed with a minus sign; the loss is the plain
    mean squared error.
    The un-augmented anchor is encoded too, in one pass with both views: three images a sample.
    """

    class Config(PredictionSettings):
        name: Literal["predictive"] = "predictive"

    config: PredictionSettings
    acting: Tensor
    predictor: nn.Sequential

    def __init__(self, config: PredictionSettings, encoder: Encoder, classes: int, channels: int) -> None:
        super().__init__()
        self.config = config
        drawn = policy(config.policy)
        acting = [i for i, acts in enumerate(drawn.active(channels)) if acts]
        _check(config, bool(acting), channels)
        self.register_buffer("acting", torch.tensor(acting, dtype=torch.long), persistent=False)
        self.factors = (*factors_of(config.continuous), *config.categories)
        self.views = (ViewSpec("plain", policy("none")), ViewSpec("1", drawn), ViewSpec("2", drawn))
        self.classes: list[int] = []
        self.changes: tuple[tuple[Parameter, ...], ...] = ()
        self._make_heads(encoder)
        if not config.categories:
            self._make_predictor(encoder)

    def _make_heads(self, encoder: Encoder) -> None:
        """Heads that are drawn before the predictor."""

    def _make_predictor(self, encoder: Encoder) -> None:
        outward = len(self.acting) + len(factors_of(self.config.continuous)) + sum(self.classes)
        self.predictor = regressor((encoder.dim, self.config.predictor, outward))

    def complete(self, encoder: Encoder, size: int, source: Source | None) -> None:
        config = self.config
        plain, first, second = self.views
        one, two = partners(config, source)
        self.views = (plain, first._replace(partner=one), second._replace(partner=two))
        self.changes = tuple(change(source, name) for name in config.continuous)
        for k, name in enumerate(config.categories):
            values = factor(source, name).unique()
            self.register_buffer(f"values_{k}", values, persistent=False)
            self.classes.append(len(values))
        if config.categories:
            self._make_predictor(encoder)

    def forward(self, encoder: Encoder, batch: Batch) -> Losses:
        (h0, h1, h2), own = encoded(encoder, *(batch.views[name].images for name in ("plain", "1", "2")))
        found = self.prediction(h0, h1, h2, batch)
        return Losses(found.total, terms(found), own)

    def prediction(self, h0: Tensor, h1: Tensor, h2: Tensor, batch: Batch) -> Prediction:
        """The loss of h (N, D) of the joined batch: of the anchor and of both views."""
        predicted = wide(self.predictor(torch.cat([h0 - h1, h0 - h2])))
        regressed = len(self.acting) + len(factors_of(self.config.continuous))
        regression = classification = None
        if regressed:
            wanted = torch.cat([standardise(gather(self._continuous(batch, name))) for name in ("1", "2")])
            regression = F.mse_loss(predicted[:, :regressed], wanted.to(predicted))
        if self.classes:
            logits = predicted[:, regressed:].split(self.classes, dim=1)
            parts = [F.cross_entropy(part, self._category(batch, k)) for k, part in enumerate(logits)]
            classification = torch.stack(parts).sum()
        total = torch.stack([part for part in (regression, classification) if part is not None]).sum()
        return Prediction(total, regression, classification)

    def _continuous(self, batch: Batch, view: str) -> Tensor:
        """Regression targets (N, M) of this process's rows, before they are standardised."""
        params = batch.views[view].params[:, self.acting]
        moved = [changed(batch.factors, batch.views[view].factors, by).to(params) for by in self.changes]
        return torch.cat([params, *moved], dim=1)

    def _category(self, batch: Batch, k: int) -> Tensor:
        """Which of the k-th category's values each view of the joined batch has, view 1 first; long (2N,)."""
        values, name = self.get_buffer(f"values_{k}"), self.config.categories[k]
        shown = torch.cat([gather(batch.views[view].factors[name]) for view in ("1", "2")])
        return torch.searchsorted(values, shown)


def standardise(params: Tensor) -> Tensor:
    """(r - mean) / std of each column over the batch; a column without variance becomes zero."""
    centred = params - params.mean(dim=0)
    return centred / centred.square().mean(dim=0).sqrt().clamp(min=1e-6)


def terms(found: Prediction) -> dict[str, Tensor]:
    """Detached, by name; the two parts only where there are two."""
    parts = {"regression": found.regression, "classification": found.classification}
    several = all(part is not None for part in parts.values())
    return {"prediction": found.total.detach()} | {k: v.detach() for k, v in parts.items() if several and v is not None}


def _check(config: PredictionSettings, acting: bool, channels: int) -> None:
    name = getattr(config, "name", "predictive")
    if not (acting or config.categories or config.continuous):
        given = f"{name} with policy {config.policy!r} on {channels} channel{'s' if channels > 1 else ''}"
        raise GeomsslError(given, "a policy with parameters to predict, or factors", reason="bad-value")
    both = sorted(set(config.categories) & set(config.continuous))
    if both:
        raise GeomsslError(f"{name}: {both[0]} in categories and in continuous", "one of the two", reason="bad-value")
    if config.positives == "image" and (config.categories or config.continuous):
        raise GeomsslError(
            f"{name}: factors to predict between views of one image, where none changes", "positives = next or object",
            reason="bad-value",
        )
