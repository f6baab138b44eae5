"""Several processes: two real ones under torchrun do exactly what one does on the joined batch; a lost one ends the job."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import training_ranks
import training_samples as samples

from geomssl import checkpoint, distributed, training
from geomssl.errors import GeomsslError

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """The folder that two processes wrote, and what each told."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = str(Path(training_ranks.__file__))
    done = subprocess.run([*TORCHRUN, worker, str(folder)], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder, [torch.load(folder / f"{rank}.saved", weights_only=False) for rank in (0, 1)]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def alone():
    return training_ranks.every_case([False])


def apart(a, b):
    """The largest difference of two results, against the largest gradient; gradients must be missing in both or neither."""
    assert a["gradients"].keys() == b["gradients"].keys()
    assert a["figures"].keys() == b["figures"].keys()
    found = [abs(float(a["figures"][k] - b["figures"][k])) for k in a["figures"]]
    for name, gradient in a["gradients"].items():
        other = b["gradients"][name]
        assert (gradient is None) == (other is None), name
        if gradient is not None:
            found.append(float((gradient - other).abs().max() / gradient.abs().max().clamp(min=1e-3)))
    return max(found)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("case", samples.CASES)
def test_two_processes_have_the_loss_and_the_gradients_of_one(ranks, alone, case, cached):
    for told in ranks[1]:
        assert apart(alone[case, False], told["cases"][case, cached]) < 1e-9
    moved = [g for g in alone[case, False]["gradients"].values() if g is not None]
    assert all(g.abs().max() > 0 for g in moved)


@pytest.mark.parametrize("name", training_ranks.WHOLE)
def test_two_processes_train_what_one_trains(ranks, tmp_path, monkeypatch, double, name):
    """Also where one process resumes what two began: ciper's first epoch had two, its second has one."""
    folder = ranks[0]
    chosen = samples.recipe(training_ranks.WHOLE[name], **training_ranks.TRAINED)
    training.start(chosen, tmp_path / "one.pt", samples.CPU).run()
    if name == "ciper":
        layer = {"encoder": {"name": chosen.encoder.name}}
        training.resume(folder / f"{name}.pt", samples.CPU, [layer]).run()
    one, two = checkpoint.load(tmp_path / "one.pt"), checkpoint.load(folder / f"{name}.pt")
    assert two["epoch"] == 2
    assert one["weights"].keys() == two["weights"].keys()
    for key, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][key], weight, rtol=1e-8, atol=1e-10)
    for mine, theirs in zip(one["history"], two["history"], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(theirs[k] == pytest.approx(mine[k], rel=1e-9) for k in mine if k != "seconds")


def test_rank_0_alone_writes_and_probes_and_all_keep_the_same_weights(ranks):
    """With train-mode BatchNorm, too: running statistics are averaged, and a person is told that they are per process."""
    folder, told = ranks
    assert [t["seen"] for t in told] == [[0, 1], []]
    assert all(t["spread"] < 1e-6 for t in told)
    assert all("statistics per process" in t["notes"][0] for t in told)
    assert checkpoint.load(folder / "norms.pt")["history"][0]["micro_batch"] == 100
    assert {p.name for p in folder.glob("*.pt")} == {"simclr.pt", "ciper.pt", "supervised.pt", "norms.pt"}


def test_a_batch_that_the_processes_cannot_share_is_refused(ranks, monkeypatch):
    assert ranks[1][0]["refused"] == "batch_size = 129 for 2 processes; expected a multiple of 2, such as 128"
    monkeypatch.setattr(distributed, "world", lambda: 16)
    with pytest.raises(GeomsslError, match="16 processes for a batch of 12; expected at most 12 processes") as caught:
        training.start(samples.recipe("ciper"), "never.pt", samples.CPU)
    assert caught.value.reason == "too-many-processes"


def test_a_detached_gather_would_be_seen(ranks, alone, monkeypatch):
    """The tolerance above can fail: without the others' share of the gradient the result is far away."""
    case = "simclr nt-xent"
    made = samples.learner(case)
    whole = samples.batch(made)
    halves = [slice(0, 6), slice(6, 12)]
    total = {}
    for own in halves:
        made.zero_grad()
        z = [made.objective.projector(made.encoder(whole.views[v].images)) for v in ("1", "2")]
        kept = [torch.cat([rows[s] if s == own else rows[s].detach() for s in halves]) for rows in z]
        from geomssl.losses import info_nce

        info_nce(*kept, 2.0, "nt-xent", symmetric=True).backward()
        for name, p in made.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad / 2
    true = alone[case, False]["gradients"]["encoder.second.weight"]
    assert (total["encoder.second.weight"] - true).norm() > 0.1 * true.norm()


def processes_of(parent):
    """Rank to process id, of the children of torchrun."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) == parent:
                words = (entry / "environ").read_bytes().split(b"\0")
                found |= {int(w[5:]): int(entry.name) for w in words if w.startswith(b"RANK=")}
        except (OSError, IndexError):
            continue
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_lost_rank_ends_the_job_with_one_line(tmp_path):
    """Rank 0 is the one that is killed: another must speak."""
    flags = ["--objective", "supervised", "--encoder", "mlp", "--set", "encoder.widths=[32, 16]", "--epochs", "100000",
             "--batch-size", "512", "--device", "cpu", "--out", "run.pt"]
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "geomssl", "train", *flags], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= 2:
            break
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(processes_of(process.pid)[0], signal.SIGKILL)
    out, said = process.communicate(timeout=60)
    ours = [line for line in said.splitlines() if line.startswith("geomssl: ") and ": note:" not in line]
    assert ours == [
        "geomssl: a rank was lost: one of 2 processes ended early; expected all of them alive; the checkpoint keeps the last "
        "whole epoch, --resume continues it [lost-rank]"
    ]
    assert "exitcode  : 2" in said
    assert process.returncode == 1
    assert out == ""
    assert checkpoint.load(tmp_path / "run.pt")["epoch"] >= 2


def test_one_process_speaks_of_what_all_meet(ranks):
    assert {told["voice"] for told in ranks[1]} == {"spoke", 2}
