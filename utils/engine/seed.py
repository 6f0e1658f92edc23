"""Seeding of every random generator, and generators derived from a seed and a use."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and every CUDA device) with an integer in [0, 2**32), the range of NumPy's generator."""
    random.seed(seed)
    np.random.seed(seed)  # a ValueError outside that range
    torch.manual_seed(seed)  # seeds the CUDA generators as well


def set_deterministic(enabled: bool) -> None:
    """Ask torch for deterministic kernels; call it before the first CUDA operation.

    Operations without a deterministic kernel only warn, so that a GPU run never stops half way. CPU runs are
    bit-reproducible for a fixed number of threads either way.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS refuses deterministic mode without it
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # else every new tensor is filled: 4 % of a step on a CPU
    torch.backends.cudnn.benchmark = not enabled


def derive_seed(seed: int, *keys: int | str) -> int:
    """Hash a seed and keys into a new seed in [0, 2**63), the same in every process and on every machine.

    Args:
        keys: integers or strings that name the use, e.g. ("augment", epoch, index); 1 and "1" differ.
    Raises:
        ValueError: if the seed or a key is neither an integer nor a string.
    """
    for key in (seed, *keys):
        if isinstance(key, bool) or not isinstance(key, (int, str, np.integer)):
            raise ValueError(f"seed keys must be integers or strings, got {key!r} of type {type(key).__name__}")
    plain = [key if isinstance(key, str) else int(key) for key in (seed, *keys)]
    digest = hashlib.sha256(json.dumps(plain).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(seed: int, *keys: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """Return a torch generator that depends on the seed and the keys of `derive_seed` alone, not on what was drawn before."""
    return torch.Generator(device=device).manual_seed(derive_seed(seed, *keys))


@dataclass(frozen=True)
class BatchGenerator:
    """Draws numbers (b, ...) for a whole batch of `size` rows and keeps those of this process, so that the share does not matter.

    Attributes:
        generator: source of the numbers, on the device they are wanted on.
        rows: of the whole batch that this process keeps; None keeps all (b is then the size of the batch).
        size: rows of the whole batch, if `rows` is given.
    """

    generator: torch.Generator
    rows: slice | None = None
    size: int | None = None

    @property
    def device(self) -> torch.device:
        """Where the numbers are drawn."""
        return self.generator.device

    def rand(self, *shape: int) -> torch.Tensor:
        """Uniform numbers in [0, 1)."""
        return self._draw(torch.rand, shape)

    def randn(self, *shape: int) -> torch.Tensor:
        """Standard normal numbers."""
        return self._draw(torch.randn, shape)

    def randint(self, high: int, *shape: int) -> torch.Tensor:
        """Integers in 0..high-1."""
        return self._draw(partial(torch.randint, high), shape)

    def _draw(self, draw: Callable[..., torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        whole = shape if self.rows is None else (self.size, *shape[1:])
        values = draw(whole, generator=self.generator, device=self.device)
        return values if self.rows is None else values[self.rows]
