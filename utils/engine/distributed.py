"""Several processes on one training (torchrun): who this process is, its share of a batch, and the collectives used.

Every process computes the losses of the whole batch from gathered embeddings, so the same value everywhere; gradients are
then averaged over the processes by DistributedDataParallel. The adjoint of `gather_batch` and `sum_over_processes` adds the
gradients of all processes, which that average turns into the gradient of one process with the whole batch.
"""

import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce

TIMEOUT = timedelta(hours=2)  # the others wait while the main process clusters


def start() -> None:
    """Join the process group that torchrun describes; without torchrun, or when joined already, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # NCCL communicates through the current device
        # One backend per kind of tensor, so that run.device: cpu works on a machine with GPUs
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=TIMEOUT)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, 0 for the main one."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and speaks."""
    return rank() == 0


def own_share(count: int) -> slice:
    """Return the part of 0..count-1 that this process works on: contiguous, as even as possible, in the order of the ranks."""
    return slice(count * rank() // world(), count * (rank() + 1) // world())


def from_main(make: Callable[[], Any]) -> Any:
    """Return what `make` gives in the main process, in all of them; tensors in it must be on the CPU."""
    box = [make() if is_main() else None]
    if world() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_batch(rows: Tensor) -> Tensor:
    """Join the equal shares (b, D) of all processes to the batch (B, D); differentiable."""
    if world() == 1:
        return rows
    parts = [torch.zeros_like(rows)] * world()
    parts[rank()] = rows
    return sum_over_processes(torch.cat(parts))


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes; differentiable."""
    return values if world() == 1 else all_reduce(values)


def add_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place and outside of autograd."""
    if world() > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def gather_shares(rows: Tensor, count: int) -> Tensor:
    """Join the shares of `own_share(count)`, (n, D) with n differing by at most one, to (count, D)."""
    if world() == 1:
        return rows
    whole = rows.new_zeros(count, *rows.shape[1:])
    whole[own_share(count)] = rows
    return add_over_processes(whole)


@torch.no_grad()
def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors, such as running statistics, with the main process's, in place and in the same order everywhere."""
    if world() > 1:
        for values in tensors:
            dist.broadcast(values, src=0)
