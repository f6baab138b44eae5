"""Precision, memory layout, compiling, and data that changes: what runs, what is refused, and in which words."""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_samples as samples

from geomssl import checkpoint, device, training
from geomssl.cli import main
from geomssl.errors import GeomsslError

SHORT = {"epochs": 2, "batch_size": 512}


def trainer(folder, name="run.pt", case="", **more):
    return training.start(samples.recipe(case, **SHORT | more), folder / name, samples.CPU)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_resumes_and_keeps_float32_weights(tmp_path, precision):
    """fp16 with its loss scale in the checkpoint. On the CPU both run (torch 2.13), bf16 and fp16 by emulation."""
    case = "simclr norms in the head"
    whole = trainer(tmp_path, "whole.pt", case, precision=precision, batch_size=128)
    whole.run()
    trainer(tmp_path, "parts.pt", case, precision=precision, batch_size=128).run(stop_after=1)
    training.resume(tmp_path / "parts.pt", samples.CPU, [samples.SMOOTH]).run()
    one, two = checkpoint.load(tmp_path / "whole.pt"), checkpoint.load(tmp_path / "parts.pt")
    assert same(one["weights"], two["weights"])
    assert one["scaler"] == two["scaler"]
    assert all(w.dtype == torch.float32 for w in one["weights"].values() if w.is_floating_point())
    if precision == "bf16":
        assert one["scaler"] == {}
    else:
        skipped = math.log2(65536 / one["scaler"]["scale"])
        assert one["scaler"]["_growth_tracker"] <= one["step"] - skipped < one["step"]
        assert one["scaler"]["_growth_tracker"] > 0
    full = trainer(tmp_path, "full.pt", case, batch_size=128).run()
    assert [row["loss"] for row in full] != [row["loss"] for row in one["history"]]
    assert [row["loss"] for row in full] == pytest.approx([row["loss"] for row in one["history"]], rel=0.02)


def test_a_gradient_that_overflows_skips_its_step_and_halves_the_scale(tmp_path):
    made = trainer(tmp_path, case="simclr nt-xent", precision="fp16")
    made.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    made.learner.train()

    def weights():
        return torch.cat([p.detach().flatten() for m in (made.learner.encoder, made.learner.objective) for p in m.parameters()])

    start = weights()
    made._step(made._batch(torch.arange(512), 0, 0))
    before = weights()
    assert not torch.equal(start, before)
    assert made.scaler.get_scale() == 1024
    next(made.learner.encoder.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    made._step(made._batch(torch.arange(512), 0, 0))
    assert made.scaler.get_scale() == 512
    assert torch.equal(weights(), before)


@pytest.mark.parametrize(("precision", "where"), [("tf32", "cpu"), ("bf16", "cuda"), ("tf32", "cuda")])
def test_a_precision_that_the_device_lacks_is_one_line(monkeypatch, precision, where):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(GeomsslError, match=f"precision = {precision} on {where}, which lacks it; expected float32") as caught:
        device.precision(precision, torch.device(where))
    assert caught.value.reason == "no-precision"


def test_tf32_is_off_unless_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    kept = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        for name in ("float32", "tf32", "float32"):
            assert device.precision(name, torch.device("cuda")) is None
            assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is (name == "tf32")
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = kept


def test_a_device_that_does_not_cast_is_found_out(monkeypatch):
    """autocast warns and goes on in float32 where a type is not supported: that is not taken for the precision."""

    class Idle:
        def __init__(self, *_, **__): ...
        def __enter__(self):
            warnings.warn("this type is not supported, disabling autocast", stacklevel=1)
        def __exit__(self, *_): ...

    monkeypatch.setattr(torch, "autocast", Idle)
    with pytest.raises(GeomsslError, match="bf16 on cpu"):
        device.precision("bf16", samples.CPU)


@pytest.mark.parametrize(
    ("encoder", "objective"), [("cnn", "ciper"), ("c4-cnn", "hssl"), ("mlp", "hssl"), ("c4-cnn", "simclr")]
)
def test_channels_last_is_the_same_training(tmp_path, encoder, objective):
    chosen = {"encoder": {"name": encoder}, "objective": {"name": objective}}
    made = [trainer(tmp_path, f"{n}.pt", channels_last=n, **chosen) for n in (False, True)]
    batches = [m._batch(torch.arange(64), 0, 0) for m in made]
    name = next(iter(batches[0].views))
    torch.testing.assert_close(batches[0].views[name].images, batches[1].views[name].images, rtol=0, atol=0)
    losses = []
    for m, batch in zip(made, batches, strict=True):
        assert batch.views[name].images.is_contiguous(memory_format=m.layout)
        m.learner.train()
        losses.append(m._step(batch)[0].total.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    filters = [p for p in made[1].learner.encoder.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in filters)


def test_channels_last_and_compile_may_change_on_resume_and_precision_may_not(tmp_path):
    trainer(tmp_path).run(stop_after=1)
    assert training.resume(tmp_path / "run.pt", samples.CPU, [{"channels_last": True}]).layout == torch.channels_last
    changed = {"precision": "bf16", "micro_batch": 64, "channels_last": True}
    with pytest.raises(GeomsslError, match=r'micro_batch = 64 \(was null\), precision = "bf16" \(was "float32"\)'):
        training.resume(tmp_path / "run.pt", samples.CPU, [changed])


def test_a_compiled_encoder_is_the_same_training(tmp_path, monkeypatch):
    """With dynamo's own backend that runs the captured graph as it is: the capture is what is ours, not the kernels."""
    compile_ = torch.compile
    calls = []

    def captured(function, **how):
        calls.append(function.__name__)
        return compile_(function, backend="eager", **how)

    monkeypatch.setattr(torch, "compile", captured)
    monkeypatch.setattr(device, "compiler", lambda where: None)
    chosen = {"objective": {"name": "hssl"}, "encoder": {"name": "c4-cnn"}, "epochs": 1}
    plain, compiled = (trainer(tmp_path, f"{n}.pt", compile=n, **chosen) for n in (False, True))
    assert calls == ["fibres", "forward"]
    plain.run()
    compiled.run()
    one, two = (checkpoint.load(tmp_path / f"{n}.pt")["weights"] for n in (False, True))
    assert one.keys() == two.keys()
    assert same(one, two)


def test_where_compiling_cannot_work_it_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    def broken(function, **how):
        def run(*_):
            raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found\nand many lines more")
        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(GeomsslError, match="compile = true fails: .*: No working C.* found; expected") as caught:
        trainer(tmp_path, compile=True)
    assert caught.value.reason == "no-compiler"
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run.pt").exists()


def test_lars_trains(tmp_path):
    history = trainer(tmp_path, case="supervised", optim={"name": "lars", "lr": 5.0}, epochs=3).run()
    assert history[-1]["loss"] < history[0]["loss"]
    assert training.resume(tmp_path / "run.pt", samples.CPU, [samples.SMOOTH]).epoch == 3


def test_other_images_are_refused_on_resume(tmp_path):
    made = trainer(tmp_path)
    made.run(stop_after=1)
    state = checkpoint.load(tmp_path / "run.pt")
    assert state["data"] == {"train": made.source.fingerprint, "val": made.val.fingerprint}
    state["data"]["train"] = "0" * 12
    checkpoint.save(tmp_path / "run.pt", {k: v for k, v in state.items() if k not in ("format", "kind")})
    with pytest.raises(GeomsslError, match=f"train has fingerprint {made.source.fingerprint} .was 000000000000.") as caught:
        training.resume(tmp_path / "run.pt", samples.CPU)
    assert caught.value.reason == "changed-data"
    # a run of an earlier version did not know its images
    del state["data"]
    checkpoint.save(tmp_path / "run.pt", {k: v for k, v in state.items() if k not in ("format", "kind")})
    assert training.resume(tmp_path / "run.pt", samples.CPU).epoch == 1


def test_data_that_change_under_way_stop_the_run_at_the_next_epoch(tmp_path):
    made = trainer(tmp_path)

    def changed():
        raise GeomsslError("a.png changed", "the file that was read", reason="changed-data")

    def after(t):
        if t.epoch == 1:
            t.source.check = changed

    with pytest.raises(GeomsslError, match=r"a\.png changed"):
        made.run(after_epoch=after)
    assert checkpoint.load(tmp_path / "run.pt")["epoch"] == 1


def test_nothing_to_train_is_said(tmp_path, monkeypatch):
    from geomssl import data

    load = data.load_config

    def unlabelled(config, split):
        source = load(config, split)
        source.labels, source.classes = None, ()
        return source

    monkeypatch.setattr(data, "load_config", unlabelled)
    with pytest.raises(GeomsslError, match="objective frozen on a data set without labels"):
        trainer(tmp_path, objective={"name": "frozen"})


def test_the_flags(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--precision", "bf16", "--channels-last", "--micro-batch", "600", "--epochs", "1", "--batch-size", "512",
             "--encoder", "training_samples:Smooth"]
    assert main(["train", *flags, "--device", "cpu"]) == 0
    config = checkpoint.load(tmp_path / "run.pt")["config"]
    assert (config["precision"], config["channels_last"], config["micro_batch"]) == ("bf16", True, 600)
    assert main(["train", "--precision", "tf32", "--device", "cpu", "--out", "no.pt"]) == 2
    assert "precision = tf32 on cpu, which lacks it" in capsys.readouterr().err
