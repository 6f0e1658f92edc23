"""Memory bank of one modality (Eq. 6): one row per training sample, addressed by sample index."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MemoryBank(nn.Module):
    """Momentum memory m_i <- normalise(eta m_i + (1 - eta) v_i), with v_i normalised first.

    Rows start at zero and are to be filled before use. They are a buffer, without gradients.

    Args:
        num_instances: N, rows of the bank; dim: D, embedding dimension.
        momentum: eta in [0, 1); the paper uses 0.9.
        renormalise: bring rows back to unit norm after an update; Eq. 6 as printed does not.
    """

    def __init__(self, num_instances: int, dim: int, momentum: float = 0.9, renormalise: bool = True) -> None:
        super().__init__()
        self.momentum = momentum
        self.renormalise = renormalise
        self.register_buffer("memory", torch.zeros(num_instances, dim))

    def __len__(self) -> int:
        return self.memory.shape[0]

    def forward(self, index: Tensor) -> Tensor:
        """Return the rows of the given samples: index (B,) int64 -> (B, D)."""
        return self.memory[index]

    @torch.no_grad()
    def fill(self, embeddings: Tensor) -> None:
        """Replace every row by a normalised embedding: (N, D), row i belongs to sample i."""
        self._check_shape(embeddings, len(self))
        self.memory.copy_(F.normalize(embeddings.to(self.memory.dtype), dim=1))

    @torch.no_grad()
    def update(self, index: Tensor, embeddings: Tensor) -> None:
        """Blend a batch into its rows (Eq. 6); the other rows stay as they are.

        Args:
            index: (B,) int64 sample indices in 0..N-1, each at most once (of a repeated one, one row wins).
            embeddings: (B, D) float, any norm; no gradient is kept.
        Raises:
            ValueError: if the shapes do not fit; IndexError on an index outside 0..N-1 (below 0: checked on the CPU).
        """
        if index.dim() != 1:
            raise ValueError(f"index must be (B,), found {tuple(index.shape)}")
        self._check_shape(embeddings, len(index))
        if index.device.type == "cpu" and len(index) and int(index.min()) < 0:
            raise IndexError(f"index must lie in 0..{len(self) - 1}, found {int(index.min())}")
        fresh = F.normalize(embeddings.to(self.memory.dtype), dim=1)
        blended = self.momentum * self.memory[index] + (1 - self.momentum) * fresh
        if not self.renormalise:
            self.memory[index] = blended
            return
        # A row that points exactly away from its new embedding can cancel to zero: then the new embedding is kept.
        vanished = blended.norm(dim=1, keepdim=True) < 1e-6
        self.memory[index] = F.normalize(torch.where(vanished, fresh, blended), dim=1)

    def _check_shape(self, embeddings: Tensor, rows: int) -> None:
        expected = (rows, self.memory.shape[1])
        if tuple(embeddings.shape) != expected:
            raise ValueError(f"embeddings must be (rows, D) = {expected}, found {tuple(embeddings.shape)}")
