"""The units of a sweep: train or resume, measure what is missing, one after the other or several processes side by side."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Literal

import click

from geomssl import artifact, checkpoint, files
from geomssl.artifact import Artifact
from geomssl.commands.scheduled import Scheduled
from geomssl.config import parse
from geomssl.errors import GeomsslError, unknown
from geomssl.registry import resolve
from geomssl.sweep import Named, Probe, State, Unit, look, named
from geomssl.sweep_table import Outcome, Value


@dataclass(frozen=True)
class Asked:
    """What is collected from every unit, and on which device it runs."""

    metrics: tuple[str, ...]
    probes: tuple[Probe, ...]
    split: Literal["train", "val", "test"]
    device: str


def run(unit: Unit, asked: Asked) -> Outcome:
    """Train what is not trained, measure what is not measured, and collect. Raises what goes wrong."""
    from geomssl import device, training

    where = device.device(asked.device)
    state = look(unit)
    if state.epoch is None or state.epoch < unit.recipe.epochs:
        trainer = (
            training.start(unit.recipe, unit.path, where) if state.epoch is None
            else training.resume(unit.path, where, unit.layers)
        )
        scheduled = Scheduled()
        scheduled.catch_up(trainer)
        trainer.run(after_epoch=scheduled)
        state = look(unit)
    return collect(unit, asked, state, measure=True)


def collect(unit: Unit, asked: Asked, state: State, measure: bool) -> Outcome:
    """The values that were asked for, from the history and from artifacts of these weights on that split.

    measure: make the artifacts that are missing; else raises GeomsslError (reason "no-artifact").
    """
    assert state.checkpoint is not None
    found: dict[str, Artifact] = {}
    subject: Any = None
    digest = checkpoint.digest(unit.path) if asked.probes else ""
    for probe in asked.probes:
        there = _measured(unit, probe, asked.split, digest)
        if there is None:
            if not measure:
                raise GeomsslError(f"{unit.path} without {probe.name}", "a measured run", reason="no-artifact")
            subject = subject or _subject(unit, asked)
            module = resolve("probe", probe.name)
            there = module.probe(subject, parse(module.Options, probe.options, f"options of {probe.name}"))
            there.save(checkpoint.folder(unit.path))
        found[probe.label] = there
    history = state.checkpoint["history"]
    last = history[-1] if history else {}
    values = {}
    for metric in asked.metrics:
        one = named(metric)
        source = _on_its_way(unit, one, state.checkpoint) if one.when else found.get(one.label)
        value = _of_history(one.name, last) if source is None else _of_probe(one.name, source)
        if value is not None:
            values[metric] = value
    return Outcome(values, None, int(state.epoch or 0))


def _on_its_way(unit: Unit, wanted: Named, state: Mapping[str, Any]) -> Artifact:
    """What a scheduled probe left at that epoch of the training. Raises GeomsslError where it left nothing."""
    epoch = wanted.epoch(unit.recipe)
    # by its step, since a run has one schedule, and its options may have more defaults by now
    step = state["step"] * epoch // state["epoch"]
    there = list((checkpoint.folder(unit.path) / wanted.label).glob(f"[!.]*@{step}/artifact.json"))
    if len(there) != 1:
        expected = "what its training measured on its way: another --out, to train it anew"
        raise GeomsslError(f"{unit.path} without {wanted.label} of epoch {epoch}", expected, reason="no-artifact")
    return artifact.load(there[0].parent)


def _measured(unit: Unit, probe: Probe, split: str, digest: str) -> Artifact | None:
    """The artifact of that probe, if it is there, whole, and of this checkpoint and split."""
    place = artifact.place(checkpoint.folder(unit.path), probe.name, probe.options)
    if not (place / "artifact.json").is_file():
        return None
    try:
        found = artifact.load(place)
    except GeomsslError:
        return None
    of = found.provenance
    return found if of.get("checkpoint_sha256") == digest and of.get("split") == split else None


def _subject(unit: Unit, asked: Asked) -> Any:
    from geomssl import device
    from geomssl.probes import load

    subject = load.from_checkpoint(unit.path, split=asked.split, repeated=unit.layers, device=device.device(asked.device))
    subject.provenance["command"] = " ".join(["geomssl", *sys.argv[1:]])
    return subject


def _of_probe(name: str, found: Artifact) -> Value | None:
    """A metric of an artifact; None where the probe gives a reason for having none."""
    metric = found.metric(name)
    return None if metric.value is None else Value(metric.value, metric.unit, metric.better)


def _of_history(name: str, last: Mapping[str, Any]) -> Value:
    """A figure of the last line of a run's history."""
    numbers = {key: float(value) for key, value in last.items() if isinstance(value, int | float)}
    if name not in numbers:
        raise unknown("metric of train", name, numbers)
    return Value(numbers[name], better="higher" if "accuracy" in name else None)


def guarded(work: Callable[[], Outcome], unit: Unit) -> Outcome:
    """The outcome, or the one line that says what went wrong; a fault leaves its traceback in the unit's folder."""
    try:
        return work()
    except GeomsslError as error:
        return Outcome({}, f"{error} [{error.reason}]")
    except Exception as error:
        log = checkpoint.folder(unit.path) / "fault.log"
        said = (str(error).splitlines() or [""])[0]
        try:
            files.write(log, traceback.format_exc())
        except GeomsslError:
            return Outcome({}, f"fault: {type(error).__name__}: {said} [fault]")
        return Outcome({}, f"fault: {type(error).__name__}: {said}; the traceback is in {log} [fault]")


def one_by_one(units: Sequence[Unit], asked: Asked) -> Iterator[tuple[Unit, Outcome]]:
    """Every unit in this process."""
    for unit in units:
        yield unit, guarded(lambda unit=unit: run(unit, asked), unit)  # type: ignore[misc]


def side_by_side(units: Sequence[Unit], asked: Asked, jobs: int) -> Iterator[tuple[Unit, Outcome]]:
    """A process for every unit, at most `jobs` at once, so that one that is killed takes no other with it.

    The processor's threads are shared out; on a machine with several GPUs and --device auto or cuda, so are those.
    """
    import torch

    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // jobs)
    gpus = torch.cuda.device_count() if asked.device in ("auto", "cuda") else 0
    waiting, slots = list(units), list(range(jobs))
    running: dict[Any, tuple[Any, Any, Unit, int]] = {}
    try:
        while waiting or running:
            while waiting and slots:
                unit, slot = waiting.pop(0), slots.pop(0)
                mine = dataclasses.replace(asked, device=f"cuda:{slot % gpus}") if gpus > 1 else asked
                ours, theirs = context.Pipe(duplex=False)
                named = (unit.cell, unit.seed, unit.path, unit.layers)
                process = context.Process(target=_child, args=(theirs, *named, mine, threads), daemon=True)
                # Ctrl-C reaches all processes of a terminal: the children leave it to their parent, which ends them
                heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
                try:
                    process.start()
                finally:
                    signal.signal(signal.SIGINT, heard)
                theirs.close()
                running[process.sentinel] = (process, ours, unit, slot)
            for ended in connection.wait(list(running)):
                process, ours, unit, slot = running.pop(ended)
                process.join()
                slots.append(slot)
                try:
                    outcome = ours.recv()
                except EOFError:
                    outcome = Outcome({}, f"its process ended with code {process.exitcode} [killed]")
                yield unit, outcome
    finally:
        for process, _, _, _ in running.values():
            process.terminate()
            process.join()


def _child(
    pipe: Any, cell: str, seed: int, path: Path, layers: tuple[Mapping[str, Any], ...], asked: Asked, threads: int
) -> None:
    """One unit in a process of its own, which ends when its parent does.

    The recipe is built anew: settings of the user's own code have no module that a pickle could name.
    """
    import torch

    from geomssl.recipe import build

    threading.Thread(target=_follow_parent, daemon=True).start()
    torch.set_num_threads(threads)
    unit = Unit(cell, seed, path, build(layers), layers)
    pipe.send(guarded(lambda: run(unit, asked), unit))


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def told(unit: Unit, outcome: Outcome, folder: Path) -> None:
    """A failure at once, on stderr."""
    if outcome.failed:
        click.echo(f"{unit.path.relative_to(folder)}: failed: {outcome.failed}", err=True)
