"""Golden runs: four CPU steps of every objective through the trainer, on digits, against the losses that were recorded.

They say that a training has changed, not whether it was right: the equations are tested beside this file.
"""

import pytest
import torch

from geomssl import training
from geomssl.recipe import build

ENCODER = {"name": "cnn", "widths": [4, 8, 8]}
SETTINGS = {
    "simclr": {}, "supervised": {}, "predictive": {}, "ciper": {}, "essl": {"predictor": [16]}, "vicreg": {},
    "sie": {"half": 8, "projector": [16, 8]},
    "reconstruction": {"half": 8, "projector": [16, 8], "width": 16, "heads": 2, "depth": 2},
}
NAMES = tuple(SETTINGS)
GOLDEN = {
    "simclr": [6.92703, 6.92302],
    "supervised": [2.38834, 2.38819],
    "predictive": [1.06697, 0.96881],
    "ciper": [8.09357, 7.97318],
    "essl": [7.57617, 7.53772],
    "vicreg": [22.88562, 22.03989],
    "sie": [36.37999, 34.08482],
    "reconstruction": [29.49159, 25.40612],
}


def run(name):
    """The mean loss of each of two epochs of two steps."""
    settings = {"epochs": 2, "batch_size": 512, "seed": 3, "encoder": ENCODER, "optim": {"name": "sgd", "lr": 0.01}}
    trainer = training.Trainer(
        build([settings | {"objective": {"name": name} | SETTINGS[name]}]), "never.pt", torch.device("cpu")
    )
    trainer.save = lambda: None
    return [round(row["loss"], 5) for row in trainer.run()]


@pytest.mark.parametrize("name", NAMES)
def test_the_losses_are_those_that_were_recorded(name):
    # another processor rounds sums otherwise, and two steps of SGD carry that on
    found = run(name)
    assert found == pytest.approx(GOLDEN[name], rel=2e-4)
    assert found[1] < found[0]
