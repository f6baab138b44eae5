"""Kill -9 at random moments, a full disk, a folder that cannot be written: what is left is whole, and resumes bit for bit.

    python tests/stress/faults.py --kills 60 [--seed 0]         prints counts and exits 1 where anything was lost
    python tests/stress/faults.py --disk                        prints what each command said, as JSON

Every command is a process of its own, forked from this one so that its imports are done, and killed by SIGKILL.
"""

# ruff: noqa: E402
from __future__ import annotations

import os

# forked processes must not inherit a pool of threads that does not live in them
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import contextlib
import io
import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from geomssl import artifact, checkpoint, training
from geomssl.cli import main
from geomssl.recipe import build
from geomssl.registry import names

EPOCHS = 6
SMALL = {
    "encoder.name": '"mlp"', "encoder.widths": "[64, 64]", "encoder.fibres": "4", "objective.policy": '"small"',
    "probes.every": "3", "probes.run": '["bound", "tangent"]', "probes.tangent": "{n = 64, local = 8}",
    "probes.bound": "{n = 128, batch = 64, batches = 2}",
}
TRAIN = ["train", "--quiet", "--device", "cpu", "--epochs", str(EPOCHS), "--batch-size", "256",
         *(flag for key, value in SMALL.items() for flag in ("--set", f"{key}={value}"))]
QUICK = ["--device", "cpu", "--quiet", "--n", "64"]


def start(arguments: list[str], said: Path, before: Callable[[], object] = lambda: None) -> int:
    """Run the command line in a forked process and return its id; its output goes to a file."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        before()
        code = main(arguments)
        sys.stdout.flush()
        os._exit(code)
    except BaseException as error:
        os.write(2, f"did not get as far as the command: {error!r}\n".encode())
        os._exit(99)


def wait(child: int) -> int:
    """Exit code of a process; minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, delay: float) -> bool:
    """SIGKILL after that time; False where the process was done before."""
    end = time.monotonic() + delay
    while time.monotonic() < end:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return True


def silently(arguments: list[str]) -> None:
    """The command in this process; its output only where it fails."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main(arguments)
    assert code == 0, said.getvalue()


class Reference:
    """The training that nothing interrupts: its weights after every epoch, its history, its artifacts and its time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.pt"
        started = time.monotonic()
        silently([*TRAIN, "--out", str(self.path)])
        self.seconds = time.monotonic() - started
        state = checkpoint.load(self.path)
        self.history = [timeless(row) for row in state["history"]]
        self.artifacts = measured(self.path)
        self.weights = {}

        def keep(trainer: training.Trainer) -> None:
            self.weights[trainer.epoch] = {k: v.clone() for k, v in trainer.learner.state_dict().items()}

        recipe = build([state["config"]])
        training.start(recipe, folder / "again.pt", torch.device("cpu")).run(after_epoch=keep)
        assert equal(self.weights[EPOCHS], state["weights"]), "two trainings differ without any fault"


def timeless(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "seconds"}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def measured(path: Path) -> dict[tuple[str, str, int | None], tuple]:
    """Every artifact of a run, read back whole; artifact.load raises for one that is not."""
    found = [artifact.load(folder) for folder in artifact.find(path)]
    return {(a.probe, a.options_hash, a.step): (a.metrics, a.tables, sorted(a.files)) for a in found}


def check(condition: bool, said: str) -> None:
    if not condition:
        raise AssertionError(said)


def check_run(path: Path, reference: Reference, least: int) -> int:
    """The checkpoint is whole, is that of an epoch of the reference, and no older than `least`; its epoch, or -1."""
    if not path.exists():
        check(least < 0, f"{path} is gone")
        return -1
    state = checkpoint.load(path)
    epoch = state["epoch"]
    check(epoch >= least, f"epoch {epoch} after epoch {least}")
    check(equal(state["weights"], reference.weights[epoch]), f"weights of epoch {epoch} differ")
    check([timeless(r) for r in state["history"]] == reference.history[:epoch], f"history of epoch {epoch} differs")
    metrics = path.with_suffix("") / "metrics.jsonl"
    rows = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    check(epoch - 1 <= rows <= epoch, f"{rows} rows of metrics beside epoch {epoch}: the last whole epoch is lost")
    for key, found in measured(path).items():
        check(found == reference.artifacts[key], f"artifact {key} differs")
    return epoch


def litter(folder: Path) -> int:
    return sum(name.endswith((".part", ".old")) for _, dirs, files in os.walk(folder) for name in (*dirs, *files))


def kill_training(folder: Path, reference: Reference, kills: int, draws: random.Random, counts: Counter) -> None:
    """Trainings, each killed again and again and resumed, until that many kills; each ends as the reference does."""
    run, seconds = 0, reference.seconds
    while counts["kills of training"] < kills:
        run += 1
        path = folder / f"killed-{run}" / "run.pt"
        path.parent.mkdir()
        epoch = -1
        while True:
            again = ["train", "--quiet", "--device", "cpu", "--resume", str(path)]
            child = start([*TRAIN, "--out", str(path)] if epoch < 0 else again, folder / "said")
            began = time.monotonic()
            if counts["kills of training"] < kills and kill_after(child, draws.uniform(0, seconds)):
                counts["kills of training"] += 1
            code = wait(child)
            if code == 0 and epoch < 0:
                # the reference was slower: it also loaded what the forked processes find loaded
                seconds = time.monotonic() - began
            check(code in (0, -signal.SIGKILL), f"exit code {code}: {(folder / 'said').read_text()}")
            epoch = check_run(path, reference, epoch)
            counts["checkpoints read after a kill"] += epoch >= 0 and code != 0
            if code == 0:
                break
        check(epoch == EPOCHS, f"ended at epoch {epoch}")
        check(measured(path) == reference.artifacts, "an artifact of the schedule is missing")
        counts["trainings resumed to the end, bit for bit"] += 1
        print(f"{counts['kills of training']} of {kills} kills of training", file=sys.stderr)
        counts["leftovers of writes, ignored"] += litter(path.parent)
        silently(["report", str(path), "-o", str(path.parent / "r.html")])
        shutil.rmtree(path.parent)


def kill_probing(folder: Path, reference: Reference, kills: int, draws: random.Random, counts: Counter) -> None:
    """Probes, features and reports of a finished run, killed; what is found after is whole, and the checkpoint untouched."""
    before, out = reference.path.read_bytes(), folder / "probed"
    commands = {
        **{p: [p, "--checkpoint", str(reference.path), "--out", str(out), *QUICK] for p in ("rank", "bound")},
        "features": ["features", "--checkpoint", str(reference.path), "-o", str(out / "f.npz"), *QUICK],
        "report": ["report", str(reference.path), "-o", str(out / "r.html")],
    }
    seconds, whole = {}, {}
    for name, arguments in commands.items():
        started = time.monotonic()
        silently(arguments)
        seconds[name] = time.monotonic() - started
    whole = measured(out)
    page, arrays = (out / "r.html").read_bytes(), np.load(out / "f.npz")["h"]
    while counts["kills of probing"] < kills:
        name = draws.choice(sorted(commands))
        if draws.random() < 0.5:
            # from nothing, and over what is there
            shutil.rmtree(out, ignore_errors=True)
        there = measured(out)
        child = start(commands[name], folder / "said")
        counts["kills of probing"] += kill_after(child, draws.uniform(0, 1.2 * seconds[name]))
        code = wait(child)
        check(code in (0, -signal.SIGKILL), f"exit code {code}: {(folder / 'said').read_text()}")
        found = measured(out)
        check(all(whole[key] == value for key, value in found.items()), f"{name} left an artifact that differs")
        counts["artifacts gone between two renames"] += len(there.keys() - found.keys())
        if (out / "r.html").exists():
            check((out / "r.html").read_bytes() == page, "half a report")
        if (out / "f.npz").exists():
            check(np.array_equal(np.load(out / "f.npz")["h"], arrays), "half a file of features")
        check(reference.path.read_bytes() == before, "the checkpoint changed")
        print(f"{counts['kills of probing']} of {kills} kills of probing", file=sys.stderr)


def kills(folder: Path, total: int, seed: int) -> Counter:
    """That many kills, two in three of a training, after each of which everything is checked."""
    draws, counts = random.Random(seed), Counter()
    reference = Reference(folder)
    kill_training(folder, reference, -(-2 * total // 3), draws, counts)
    kill_probing(folder, reference, total // 3, draws, counts)
    counts["kills"] = counts["kills of training"] + counts["kills of probing"]
    return counts


def full() -> None:
    """As a full disk: no file grows beyond 1,000 bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def nobody() -> None:
    """Without the right to write what root may always write."""
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


def disk(folder: Path, only: list[str]) -> list[dict[str, object]]:
    """Commands (all, or `only`) on a full disk and on a folder that they may not write: what they said, what they left."""
    run = folder / "run.pt"
    silently([*TRAIN, "--out", str(run), "--stop-after", "1"])
    # what is imported late must be in before the rights are given up; embed's library keeps threads that no fork survives
    probes = [name for name in names("probe") if not only or name in only]
    if "embed" in probes:
        embed = [sys.executable, "-m", "geomssl", "embed", "--checkpoint", str(run), "--out", str(folder / "warm"), *QUICK]
        subprocess.run(embed, check=True, capture_output=True)
    for probe in probes:
        if probe != "embed":
            with contextlib.suppress(AssertionError):
                silently([probe, "--checkpoint", str(run), "--out", str(folder / "warm"), *QUICK])
    silently(["report", str(run), "-o", str(folder / "warm" / "r.html")])
    shutil.rmtree(folder / "warm")
    model = ["--checkpoint", str(run), *QUICK]
    commands = {
        "train": [*TRAIN, "--out", "{out}/new.pt"],
        "resume": ["train", "--quiet", "--device", "cpu", "--resume", "{run}"],
        "features": ["features", *model, "-o", "{out}/f.npz"],
        "safetensors": ["features", *model, "-o", "{out}/f.safetensors"],
        "report": ["report", str(run), "-o", "{out}/r.html"],
        **{probe: [probe, *model, "--out", "{out}"] for probe in probes},
    }
    commands = {name: arguments for name, arguments in commands.items() if not only or name in only}
    found = []
    for fault, before in (("full", full), ("read-only", nobody)):
        for name, arguments in commands.items():
            out = folder / f"{fault}-{name}"
            shutil.copytree(run.with_suffix(""), out / "run")
            shutil.copy(run, out / "run.pt")
            kept = tree(out)
            if fault == "read-only":
                for part in (out, *out.rglob("*")):
                    part.chmod(0o555 if part.is_dir() else 0o444)
            there = [a.replace("{out}", str(out)).replace("{run}", str(out / "run.pt")) for a in arguments]
            _, status, used = os.wait4(start(there, folder / "said", before), 0)
            code, lines = os.waitstatus_to_exitcode(status), (folder / "said").read_text().splitlines()
            left = tree(out)
            found.append({
                "fault": fault, "command": name, "code": code, "said": lines, "cpu": round(used.ru_utime + used.ru_stime, 2),
                "changed": sorted(n for n in kept.keys() & left.keys() if kept[n] != left[n]),
                "left": sorted(left.keys() - kept.keys()), "gone": sorted(kept.keys() - left.keys()),
            })
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", nargs="*", metavar="COMMAND", help="full disks and rights, of all commands or these")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="geomssl-faults-") as where:
        os.chmod(where, 0o755)
        if asked.disk is not None:
            print(json.dumps(disk(Path(where), asked.disk), indent=1))
        else:
            began = time.monotonic()
            for what, count in kills(Path(where), asked.kills, asked.seed).items():
                print(f"{count:5d}  {what}")
            print(f"nothing lost but the current epoch; {time.monotonic() - began:.0f} s, seed {asked.seed}")
