"""A linear layer on several inputs that count as one; called by the encoders of clouds and meshes."""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F


def linear_of_parts(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply weight (C_out, C_in) and bias (C_out,) to rows (M, C_in), given as parts (M, C_i) whose concatenation is never built."""
    pieces = weight.split([part.shape[1] for part in parts], dim=1)
    rows = F.linear(parts[0], pieces[0], bias)
    for part, piece in zip(parts[1:], pieces[1:]):
        rows.addmm_(part.to(rows.dtype), piece.T.to(rows.dtype))  # autocast leaves operations in place alone
    return rows
