"""Modes: after a look in eval mode every module is as it was, also one whose train() does more than set a flag."""

import pytest
import torch
from torch import nn

from geomssl import modes
from geomssl.encoders import build
from geomssl.objectives.decoder import token_grid
from geomssl.probes.fullgrad import fullgrad


class Merging(nn.Linear):
    """As adapters do it: the low-rank part is added to the weight in eval mode and taken off in training mode."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.extra, self.merged = nn.Parameter(torch.full((4, 4), 0.5)), False

    def train(self, mode: bool = True) -> "Merging":
        if self.merged == mode:
            self.weight.data += -self.extra.data if mode else self.extra.data
            self.merged = not mode
        return super().train(mode)


class Holding(nn.Sequential):
    """A module that keeps its first part in eval mode whatever is asked for."""

    def train(self, mode: bool = True) -> "Holding":
        super().train(mode)
        self[0].eval()
        return self


def made() -> nn.Sequential:
    model = nn.Sequential(Merging(), Holding(nn.BatchNorm1d(4), nn.Dropout()), nn.ReLU(), nn.Linear(4, 2)).train()
    # a mode of its own that no train() explains
    model[3].eval()
    return model


def test_every_module_has_its_own_mode_and_its_own_weights_again() -> None:
    model = made()
    before, weight = [m.training for m in model.modules()], model[0].weight.clone()
    assert before == [True, True, True, False, True, True, False]
    with modes.evaluating(model):
        assert not any(m.training for m in model.modules())
        assert model[0].merged
    assert [m.training for m in model.modules()] == before
    assert not model[0].merged
    assert torch.equal(model[0].weight, weight)


def test_they_come_back_after_an_error_and_eval_mode_stays() -> None:
    model = made()
    before = [m.training for m in model.modules()]
    with pytest.raises(RuntimeError), modes.evaluating(model):
        raise RuntimeError
    assert [m.training for m in model.modules()] == before
    with modes.evaluating(model.eval()):
        pass
    assert not any(m.training for m in model.modules())
    assert model[0].merged


def test_fullgrad_leaves_a_merging_layer_unmerged() -> None:
    model = made()
    fullgrad(nn.Sequential(nn.Flatten(), model).train(), torch.rand(3, 1, 2, 2), torch.tensor([0, 1, 1]))
    assert not model[0].merged


def test_a_frozen_part_stays_frozen_when_the_decoder_looks_at_the_encoder() -> None:
    encoder = build("cnn", in_channels=3).train()
    part = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    part.eval()
    token_grid(encoder, 3, 16)
    assert encoder.training
    assert not part.training
