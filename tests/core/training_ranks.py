"""What each process of test_distributed.py does under torchrun: gradients of every case, whole trainings, a mistake."""

import os
import sys
from pathlib import Path

import torch
import training_samples as samples

from geomssl import distributed, training
from geomssl.caching import Cache
from geomssl.errors import GeomsslError

TRAINED = {"epochs": 2, "batch_size": 128, "optim": {"name": "sgd", "warmup_epochs": 1}}
WHOLE = {"simclr": "simclr norms in the head", "ciper": "ciper", "supervised": "supervised"}


def every_case(ways=(False, True)):
    """Figures as means over the processes, gradients as DistributedDataParallel leaves them; plain and cached."""
    found = {}
    for case in samples.CASES:
        for cached in ways:
            made = samples.learner(case)
            if cached:
                cache = Cache(made.encoder, made.passes, 5, made.autocast)
                result = samples.step(made, cache=cache)
                distributed.average_gradients(made.parameters())
                result["gradients"] = samples.gradients(made)
            else:
                result = samples.step(made, distributed.parallel(made, unused=False) if distributed.world() > 1 else made)
            result["figures"] = {name: distributed.mean(value) for name, value in result["figures"].items()}
            found[case, cached] = result
    return found


def whole_trainings(folder):
    """Two epochs of each, one of them cut after its first epoch; float64, so that rounding does not grow."""
    for name, case in WHOLE.items():
        trainer = training.start(samples.recipe(case, **TRAINED), folder / f"{name}.pt", samples.CPU)
        trainer.run(stop_after=1 if name == "ciper" else None)


def refused(batch_size):
    try:
        training.start(samples.recipe("ciper", batch_size=batch_size), "never.pt", samples.CPU)
    except GeomsslError as error:
        return str(error)
    return None


def work(folder):
    cases = every_case()
    torch.set_default_dtype(torch.float64)
    whole_trainings(folder)
    torch.set_default_dtype(torch.float32)
    seen = []
    encoder = {"name": "mlp", "widths": [32, 16], "fibres": 4}
    chosen = samples.recipe("", epochs=1, batch_size=512, precision="bf16", micro_batch=100, encoder=encoder)
    norms = training.start(chosen, folder / "norms.pt", samples.CPU)
    norms.run(after_epoch=lambda trainer: seen.append(trainer.epoch))
    weights = torch.cat([value.double().flatten() for value in norms.learner.state_dict().values()])
    return {
        "cases": cases, "seen": seen, "notes": norms.notes, "refused": refused(129),
        "spread": float((weights - distributed.mean(weights)).abs().max()),
    }


def main(folder):
    told = {}
    try:
        with distributed.session("cpu"):
            told = work(folder)
            raise GeomsslError("a mistake that every process meets", "none")
    except GeomsslError:
        told["voice"] = "spoke"
    except SystemExit as silent:
        told["voice"] = silent.code
    torch.save(told, folder / f"{os.environ['RANK']}.saved")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
