"""Training: resuming is bit for bit, a kill keeps the last whole epoch, a loss that is not finite stops the run."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

from geomssl import checkpoint, data, training
from geomssl.errors import GeomsslError
from geomssl.optim import learning_rate
from geomssl.recipe import build

SMALL = {"epochs": 4, "batch_size": 128}
OBJECTIVES = {
    "simclr": {},
    "hssl": {"encoder": {"name": "c4-cnn"}},
    "ciper": {"encoder": {"name": "cnn", "coordinates": True}},
    "supervised": {},
    "frozen": {},
}
CPU = torch.device("cpu")


def recipe(objective="simclr", **more):
    return build([SMALL | OBJECTIVES[objective] | {"objective": {"name": objective}} | more])


def same(a, b):
    """Every tensor and number equal, bit for bit; times aside."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize(("objective", "optimizer"), [*((name, "sgd") for name in OBJECTIVES), ("ciper", "adamw")])
def test_two_and_two_epochs_are_four(tmp_path, objective, optimizer):
    chosen = recipe(objective, optim={"name": optimizer, "warmup_epochs": 1})
    training.start(chosen, tmp_path / "whole.pt", CPU).run()
    training.start(chosen, tmp_path / "parts.pt", CPU).run(stop_after=2)
    assert checkpoint.load(tmp_path / "parts.pt")["epoch"] == 2
    training.resume(tmp_path / "parts.pt", CPU).run()
    whole, parts = checkpoint.load(tmp_path / "whole.pt"), checkpoint.load(tmp_path / "parts.pt")
    assert whole["epoch"] == 4
    assert same(whole, parts)
    lines = (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3, 4]


def test_the_seed_decides_everything(tmp_path):
    first, again, other = (
        training.start(recipe(epochs=1, seed=seed), tmp_path / f"{i}.pt", CPU).run()
        for i, seed in enumerate((0, 0, 1))
    )
    assert same(first, again)
    assert first[0]["loss"] != other[0]["loss"]


def test_after_epoch_sees_every_epoch_and_changes_nothing(tmp_path):
    """Whatever it does to modes, flags and global generators, the training goes on as without it."""
    seen = []

    def meddle(trainer):
        assert not any(module.training for module in trainer.learner.modules())
        assert not torch.is_grad_enabled()
        assert checkpoint.load(trainer.out)["epoch"] == trainer.epoch == len(trainer.history)
        seen.append(trainer.epoch)
        trainer.learner.requires_grad_(False).train()
        torch.manual_seed(7)
        random.seed(7)

    chosen = recipe("supervised", epochs=2)
    watched = training.start(chosen, tmp_path / "watched.pt", CPU)
    before = torch.get_rng_state(), random.getstate()
    watched.run(stop_after=1, after_epoch=meddle)
    watched = training.resume(tmp_path / "watched.pt", CPU)
    watched.run(after_epoch=meddle)
    assert seen == [0, 1, 2]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    training.start(chosen, tmp_path / "alone.pt", CPU).run()
    assert same(checkpoint.load(tmp_path / "watched.pt"), checkpoint.load(tmp_path / "alone.pt"))


def test_frozen_leaves_the_encoder_alone(tmp_path):
    chosen = recipe("frozen", epochs=1)
    trainer = training.start(chosen, tmp_path / "f.pt", CPU)
    before = {k: v.clone() for k, v in trainer.learner.encoder.state_dict().items()}
    classifier = trainer.learner.classifier.weight.clone()
    trainer.run()
    assert same(before, trainer.learner.encoder.state_dict())
    assert not torch.equal(classifier, trainer.learner.classifier.weight)


def test_the_online_classifier_sends_no_gradient_to_the_encoder(tmp_path):
    trainer = training.start(recipe("simclr"), tmp_path / "s.pt", CPU)
    batch = training.make_batch(trainer.source, torch.arange(8), trainer.learner.objective, CPU, 0, 0, 0)
    _, classifier_loss, _ = trainer.learner(batch)
    classifier_loss.backward()
    assert all(p.grad is None for p in trainer.learner.encoder.parameters())
    assert trainer.learner.classifier.weight.grad is not None


def test_every_epoch_visits_every_image_in_an_order_of_its_own():
    orders = [training.epoch_order(50, seed, epoch) for seed in (0, 1) for epoch in range(4)]
    assert all(torch.equal(o.sort().values, torch.arange(50)) for o in orders)
    assert len({tuple(o.tolist()) for o in orders}) == 8


@pytest.mark.parametrize("objective", ["simclr", "hssl", "ciper", "supervised"])
def test_gradients_reach_exactly_the_objectives_own_parameters(tmp_path, objective):
    trainer = training.start(recipe(objective), tmp_path / "s.pt", CPU)
    batch = training.make_batch(trainer.source, torch.arange(16), trainer.learner.objective, CPU, 0, 0, 0)
    losses, _, _ = trainer.learner(batch)
    losses.total.backward()
    reached = {name for name, p in trainer.learner.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in trainer.learner.named_parameters() if not name.startswith("classifier")}


def test_views_depend_on_the_step_and_not_on_the_device_or_the_batch_order():
    source = data.load("digits", "train")
    objective = training.initialise(recipe("simclr"), 1, 8, 10).objective
    a = training.make_batch(source, torch.arange(8), objective, CPU, 0, 1, 2)
    b = training.make_batch(source, torch.arange(8), objective, CPU, 0, 1, 2)
    c = training.make_batch(source, torch.arange(8), objective, CPU, 0, 1, 3)
    assert torch.equal(a.views["1"].images, b.views["1"].images)
    assert not torch.equal(a.views["1"].params, c.views["1"].params)
    assert not torch.equal(a.views["1"].params, a.views["2"].params)


def test_schedule():
    rates = [learning_rate(1.0, t, 100, 10) for t in range(101)]
    assert rates[:10] == pytest.approx([(t + 1) / 10 for t in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0.0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = training.start(recipe("supervised"), tmp_path / "s.pt", CPU)
    trainer.run(stop_after=1)
    good = (tmp_path / "s.pt").read_bytes()
    forward, calls = trainer.learner.objective.forward, []

    def poisoned(encoder, batch):
        losses = forward(encoder, batch)
        calls.append(1)
        return losses._replace(total=losses.total * float("nan")) if len(calls) == 3 else losses

    trainer.learner.objective.forward = poisoned
    with pytest.raises(GeomsslError, match=r"the loss is nan at step 11, epoch 2, learning rate .*s.pt \(epoch 1\)"):
        trainer.run()
    assert (tmp_path / "s.pt").read_bytes() == good


def test_weights_that_are_not_finite_never_reach_the_checkpoint(tmp_path):
    """The last step of an epoch may spoil the weights after its loss was still finite."""
    trainer = training.start(recipe("supervised", batch_size=1000), tmp_path / "s.pt", CPU)
    trainer.optimizers["model"].step = lambda: next(trainer.learner.encoder.parameters()).data.fill_(float("inf"))
    with pytest.raises(GeomsslError, match="a weight is not finite at step 1, epoch 1"):
        trainer.run()
    assert all(w.isfinite().all() for w in checkpoint.load(tmp_path / "s.pt")["weights"].values())


def test_an_absurd_learning_rate_never_reaches_the_checkpoint(tmp_path):
    chosen = recipe("simclr", optim={"name": "sgd", "lr": 1e30}, batch_size=512)
    with pytest.raises(GeomsslError, match="the loss is nan at step 2") as caught:
        training.start(chosen, tmp_path / "s.pt", CPU).run()
    assert caught.value.reason == "diverged"
    state = checkpoint.load(tmp_path / "s.pt")
    assert all(w.isfinite().all() for w in state["weights"].values())


def test_what_does_not_fit_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(GeomsslError, match="more than one fibre along the group"):
        training.start(build([{"objective": {"name": "hssl"}, "encoder": {"name": "cnn"}}]), tmp_path / "a.pt", CPU)
    with pytest.raises(GeomsslError, match="batch_size = 5000 on 1078 training images"):
        training.start(recipe(batch_size=5000), tmp_path / "a.pt", CPU)
    with pytest.raises(GeomsslError, match=r"ending in .pt"):
        training.start(recipe(), tmp_path / "a.ckpt", CPU)
    assert not (tmp_path / "a.pt").exists()


def test_existing_runs_are_kept_and_changed_recipes_refused(tmp_path):
    training.start(recipe(), tmp_path / "s.pt", CPU).run(stop_after=1)
    with pytest.raises(GeomsslError, match="exists; expected another --out, --resume"):
        training.start(recipe(), tmp_path / "s.pt", CPU)
    with pytest.raises(GeomsslError, match=r"epochs = 9 \(was 4\), optim.lr = 0.7 \(was 0.03\)"):
        training.resume(tmp_path / "s.pt", CPU, [{"epochs": 9, "optim": {"lr": 0.7}}])
    assert training.resume(tmp_path / "s.pt", CPU, [{"epochs": 4}]).epoch == 1


def test_a_checkpoint_never_imports_user_code(tmp_path):
    training.start(recipe("supervised", epochs=1), tmp_path / "s.pt", CPU).run()
    state = checkpoint.load(tmp_path / "s.pt")
    state["config"]["encoder"]["name"] = "evil_module:Encoder"
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    checkpoint.save(tmp_path / "s.pt", {k: v for k, v in state.items() if k not in ("format", "kind")})
    command = [sys.executable, "-m", "geomssl", "train", "--resume", "s.pt"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert "your own code" in found.stderr
    assert not (tmp_path / "sprung").exists()


def spawn(folder, *more):
    flags = ["train", "--objective", "supervised", "--epochs", "500", "--batch-size", "512", "--out", "run.pt", *more]
    return subprocess.Popen(
        [sys.executable, "-m", "geomssl", *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a shell that runs the tests in its background passes on that Ctrl-C is to be ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_epoch(folder, epoch, process):
    """Until the metrics name that epoch."""
    metrics = folder / "run" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and len(metrics.read_text().splitlines()) >= epoch:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the run never reached its first epochs")


@pytest.mark.parametrize("delay", [random.Random(0).uniform(0, 0.3), random.Random(1).uniform(0, 0.3)])
def test_kill_9_leaves_a_whole_checkpoint_that_resumes(tmp_path, delay):
    process = spawn(tmp_path)
    wait_for_epoch(tmp_path, 2, process)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = checkpoint.load(tmp_path / "run.pt")
    assert state["epoch"] >= 2
    trainer = training.resume(tmp_path / "run.pt", CPU)
    trainer.run(stop_after=1)
    straight = training.start(trainer.recipe, tmp_path / "straight.pt", CPU)
    straight.run(stop_after=state["epoch"] + 1)
    assert same(straight.learner.state_dict(), trainer.learner.state_dict())


def test_ctrl_c_is_130_and_keeps_the_last_epoch(tmp_path):
    process = spawn(tmp_path)
    wait_for_epoch(tmp_path, 1, process)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip() == "geomssl: interrupted; the last whole checkpoint is kept"
    assert checkpoint.load(tmp_path / "run.pt")["epoch"] >= 1


def test_a_full_disk_keeps_the_last_epoch(tmp_path):
    """RLIMIT_FSIZE stops the second checkpoint midway, as a full disk does."""
    training.start(recipe("supervised"), tmp_path / "run.pt", CPU).run(stop_after=1)
    before = (tmp_path / "run.pt").read_bytes()
    code = (
        "import resource, signal, sys; from geomssl.cli import main; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2); sys.exit(main(['train', '--resume', 'run.pt']))"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 2
    assert "cannot write run.pt: File too large; expected room" in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert (tmp_path / "run.pt").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"run.pt", "run"}
