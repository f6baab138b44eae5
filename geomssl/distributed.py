"""One training in several processes under torchrun: rows gathered with their gradient, means over ranks, one voice for all."""

from __future__ import annotations

import inspect
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from geomssl.device import device
from geomssl.errors import GeomsslError

# how long the others wait for rank 0 while it writes and probes; torchrun sees a dead process at once, whatever this is
PATIENCE = timedelta(hours=1)
HALF = (torch.bfloat16, torch.float16)
_store: Any = None


def world() -> int:
    """The number of processes of this training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0. Rank 0 alone writes and prints."""
    return dist.get_rank() if world() > 1 else 0


def shard(n: int) -> slice:
    """The rows of a batch of n that belong to this process: n / world in a row, in the order of the ranks."""
    own = n // world()
    return slice(rank() * own, (rank() + 1) * own)


class _Gather(torch.autograd.Function):
    """Rows of every process; the gradient is the SUM over processes of what each sends back to this one's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rows = rows.contiguous()
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole)
        return whole[shard(len(whole))]


def gather(rows: Tensor) -> Tensor:
    """The rows (n, ...) of every process, in the order of the ranks: (n world, ...). Differentiable; alone, the identity.

    Each process computes the whole loss L of the joined batch from them. The backward pass sums the gradients that the
    processes send to a row, world · dL/drow, and the mean over processes that DistributedDataParallel takes of the weights'
    gradients gives dL/dw: exactly one process's gradient on the joined batch. Every process must pass as many rows. Half
    precision travels as float32, so that the sum is not rounded.
    """
    if world() == 1:
        return rows
    return _Gather.apply(rows.float() if rows.dtype in HALF else rows).to(rows.dtype)


def mean(values: Tensor) -> Tensor:
    """The mean over the processes, on all of them."""
    return total(values) / world() if world() > 1 else values


def total(values: Tensor) -> Tensor:
    """The sum over the processes, on all of them."""
    if world() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values


def parallel(module: nn.Module, unused: bool) -> DistributedDataParallel:
    """The module with gradients that are means over the processes; unused: its loss misses some parameter.

    Nothing but gradients is exchanged in a step: running statistics stay each process's own until average_statistics.
    """
    # torch 2.13 has renamed the flag
    flags = inspect.signature(DistributedDataParallel).parameters
    quiet: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in flags else "broadcast_buffers": False}
    return DistributedDataParallel(module, find_unused_parameters=unused, gradient_as_bucket_view=True, **quiet)


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in one exchange for each number type."""
    if world() > 1:
        _average([p.grad for p in parameters if p.grad is not None])


def average_statistics(module: nn.Module) -> None:
    """Replace the running statistics of norms by their mean over the processes; all else is equal already."""
    if world() > 1:
        _average([b for name, b in module.named_buffers() if name.endswith(("running_mean", "running_var"))])


@torch.no_grad()
def _average(tensors: list[Tensor]) -> None:
    for dtype in {t.dtype: None for t in tensors}:
        alike = [t for t in tensors if t.dtype == dtype]
        joined = mean(torch.cat([t.reshape(-1) for t in alike]))
        for tensor, part in zip(alike, joined.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def wait() -> None:
    """Until every process is here."""
    if world() > 1:
        dist.barrier()


def check_batch(batch_size: int) -> None:
    """Raise GeomsslError unless every process gets as many images of a batch, and at least one."""
    if batch_size < world():
        raise GeomsslError(
            f"{world()} processes for a batch of {batch_size}", f"at most {batch_size} processes (--nproc-per-node)",
            reason="too-many-processes",
        )
    if batch_size % world():
        nearest = batch_size // world() * world()
        raise GeomsslError(
            f"batch_size = {batch_size} for {world()} processes", f"a multiple of {world()}, such as {nearest}",
            reason="bad-value",
        )


@contextmanager
def session(name: str) -> Iterator[torch.device]:
    """The device of this process; joins the others where torchrun started several (gloo on the CPU, nccl on cuda).

    name: auto, cpu, cuda, ... as device.device() takes it; with several processes each takes the GPU of its local rank.
    Of an error only the first process to meet one speaks; the others exit with 2 in silence. A process that is lost ends
    the job for all: the others get a GeomsslError (reason "lost-rank").
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield device(name)
        return
    global _store
    _store, number, size = next(rendezvous("env://"))
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        chosen = _own_device(name)
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store, rank=number, world_size=size, timeout=PATIENCE)
        yield chosen
        wait()
        dist.destroy_process_group()
    except BaseException as error:
        # torchrun now ends the others, and this one while it speaks
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _first():
            raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 2) from None
        if _broken(error):
            raise _lost() from error
        raise
    signal.signal(signal.SIGTERM, before)


def _own_device(name: str) -> torch.device:
    chosen = device(name)
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if chosen.type == "cpu":
        return chosen
    if str(chosen) != "cuda":
        raise GeomsslError(f"--device {name} with several processes", "cpu, or cuda without a number", reason="no-device")
    there = torch.cuda.device_count()
    if local >= there:
        raise GeomsslError(
            f"process {local + 1} on a machine with {there} GPUs", f"--nproc-per-node {there}, or --device cpu",
            reason="no-device",
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _first() -> bool:
    """True for one process of the job only: the first that asks. The store lives in torchrun and outlives every rank."""
    try:
        return _store.add(f"geomssl/spoken/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", 1) == 1
    except (RuntimeError, ValueError):
        return os.environ["RANK"] == "0"


def _broken(error: BaseException) -> bool:
    """Is this what a collective says when a peer is gone?"""
    said = str(error)
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or any(word in said for word in ("gloo", "closed by peer", "reset by peer"))
    )


def _lost() -> GeomsslError:
    return GeomsslError(
        f"a rank was lost: one of {os.environ.get('WORLD_SIZE')} processes ended early",
        "all of them alive; the checkpoint keeps the last whole epoch, --resume continues it", reason="lost-rank",
    )


def _terminated(number: int, frame: Any) -> None:
    """SIGTERM is how torchrun ends the processes that are left when one is lost."""
    raise _lost()
