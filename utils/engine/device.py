"""Choice of the torch device and of the number of CPU threads."""

import ctypes
import os
import sys

import torch

from utils.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def select_device(name: str = "auto") -> torch.device:
    """Turn "auto" (CUDA if there is one, else CPU), "cpu", "cuda" (the first) or "cuda:N" into a device; else raise a UserError.

    Under torchrun, "auto" and "cuda" give each process of a machine its own device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name == "cpu":
        return torch.device("cpu")
    kind, _, index = name.partition(":")
    if kind != "cuda" or (name != "cuda" and not index.isdecimal()):
        raise UserError(f"run.device must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise UserError(f"run.device is {name!r}, but torch {torch.__version__} sees {count} CUDA devices: use auto or cpu")
    return torch.device("cuda", int(index or 0))


def keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks for the next step instead of giving them back to the system.

    A training step frees and allocates the same large arrays again and again; touching fresh pages each time cost a sixth of a
    step on the CPU. Elsewhere than on Linux with glibc nothing happens.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it takes
            libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def peak_mib(device: torch.device) -> int | None:
    """Return the most memory that this process has held so far, in MiB: on a GPU by torch, else on the host; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    if sys.platform == "win32":
        return None
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**20)


def set_threads(threads: int | None) -> None:
    """Limit torch's CPU threads to a number >= 1, else a UserError; None keeps torch's choice."""
    if threads is not None:
        if threads < 1:
            raise UserError(f"the number of threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
