"""An encoder without norms, and every objective on it in float64: what equality to rounding is tested on."""

from dataclasses import replace
from typing import Literal

import torch
from torch import nn

from geomssl import data, training
from geomssl.config import Settings
from geomssl.encoders.base import Encoder
from geomssl.recipe import build

CPU = torch.device("cpu")


class Smooth(Encoder):
    """Two convolutions and tanh, fibres (N, 4, 4, H/2, W/2); no example meets another. dropout: by the global generator."""

    class Config(Settings):
        name: Literal["training_samples:Smooth"] = "training_samples:Smooth"
        dropout: float = 0.0

    def __init__(self, in_channels, config):
        super().__init__()
        self.in_channels, self.dim = in_channels, 4
        self.first = nn.Conv2d(in_channels, 8, 3, stride=2, padding=1)
        self.dropout = nn.Dropout(config.dropout)
        self.second = nn.Conv2d(8, 16, 3, padding=1)

    def fibres(self, images):
        maps = self.dropout(self.first(images.to(self.first.weight.dtype)).tanh())
        return self.second(maps).tanh().unflatten(1, (4, 4))

    def pool(self, fibres):
        return fibres.square().mean(dim=(2, 3, 4))


SMOOTH = {"encoder": {"name": "training_samples:Smooth"}}
OBJECTIVES = {
    **{f"simclr {d}": {"objective": {"name": "simclr", "denominator": d}} for d in ("decoupled", "nt-xent", "pooled")},
    "simclr norms in the head": {"objective": {"name": "simclr", "projector": [8, 6]}},
    "hssl fibres": {"objective": {"name": "hssl"}},
    "hssl inputs": {"objective": {"name": "hssl", "positives": "inputs"}},
    "hssl both, byol": {"objective": {"name": "hssl", "positives": "both", "method": "byol", "predictor": 8}},
    "hssl matched, bilinear": {
        "objective": {"name": "hssl", "positives": "inputs", "draws": "matched", "base": 3, "critic": "bilinear", "beta": 1.0}
    },
    "ciper": {"objective": {"name": "ciper"}},
    "predictive": {"objective": {"name": "predictive"}},
    "essl": {"objective": {"name": "essl", "projector": [8, 6], "predictor": [7]}},
    "vicreg": {"objective": {"name": "vicreg", "projector": [8, 6]}},
    "sie": {"objective": {"name": "sie", "projector": [8, 6], "half": 5}},
    "reconstruction": {
        "objective": {"name": "reconstruction", "projector": [8, 6], "half": 5, "width": 8, "heads": 2, "depth": 2}
    },
    "supervised": {"objective": {"name": "supervised"}},
    "frozen": {"objective": {"name": "frozen"}},
}
FREE = {name: SMOOTH | layer for name, layer in OBJECTIVES.items()}
# BatchNorm that is asked for its running statistics
FROZEN_NORMS = {f"{name}, norms in eval": {"encoder": {"name": "c4-cnn"}} | layer for name, layer in OBJECTIVES.items()}
CASES = FREE | FROZEN_NORMS


def recipe(case, **more):
    return build([{"batch_size": 12} | CASES.get(case, {}) | more])


def learner(case, **more):
    """In float64, with running statistics that are not the identity; norms of the encoder in eval mode."""
    found = training.initialise(recipe(case, **more), 1, 8, 10).double()
    draw = torch.Generator().manual_seed(1)
    for module in found.encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(torch.randn(module.num_features, generator=draw))
            module.running_var.copy_(torch.rand(module.num_features, generator=draw) + 0.5)
    if case in FROZEN_NORMS:
        found.encoder.eval()
    return found


def batch(made, n=12):
    """This process's rows of a batch of n digits, in float64."""
    drawn = training.make_batch(data.load("digits", "train"), torch.arange(n) * 7, made.objective, CPU, 0, 3, 4)
    views = {name: v._replace(images=v.images.double(), params=v.params.double()) for name, v in drawn.views.items()}
    return replace(drawn, views=views, draw=drawn.draw.double())


def gradients(made):
    """Every parameter's gradient by name; None where there is none."""
    return {name: None if p.grad is None else p.grad.clone() for name, p in made.named_parameters()}


def step(made, model=None, cache=None, n=12):
    """Loss, terms and gradients of one backward pass, by name."""
    losses, classifier_loss, correct = (model or made)(batch(made, n), cache)
    (losses.total + classifier_loss).backward()
    if cache is not None:
        cache.replay()
    figures = {"loss": losses.total.detach(), "classifier": classifier_loss.detach(), "correct": correct, **losses.terms}
    return {"figures": figures, "gradients": gradients(made)}
