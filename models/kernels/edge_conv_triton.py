"""The reductions of `models/kernels/neighbour_ops.py` as Triton kernels for CUDA, for `model.edge_conv: triton`.

The interpreter and the compiler have run them; no card has yet, which `pytest -m gpu` would change.

No kernel adds atomically: what the backward pass scatters is gathered from sorted lists in a fixed order, so that results
repeat bit for bit, with or without `torch.use_deterministic_algorithms`. Offsets are 64-bit. A neighbour outside the
points is never read: it makes the maximum NaN and adds nothing to a sum.
"""

from functools import partial

import torch
import triton
from torch import Tensor
from triton import language as tl

from models.kernels import neighbour_ops
from models.kernels.neighbour_ops import activate, activation_sums, edge_squares  # noqa: F401  # also operations

TILE = 1024  # elements of one program of the maximum
MAX_CHANNELS = 128  # of one program
ENTRIES = 32  # list entries that one program of the sum reads at a time


def neighbour_max(u: Tensor, rows: Tensor, points: int, tied: Tensor) -> tuple[Tensor, Tensor]:
    """As `neighbour_ops.neighbour_max`, with integer slots 0..k-1 in `rows` as winners (M, C)."""
    count, channels = u.shape
    k = rows.shape[1]
    best = torch.empty_like(u, memory_format=torch.contiguous_format)
    slot = torch.empty(u.shape, dtype=torch.uint8 if k <= 256 else torch.int32, device=u.device)
    block = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    grid = (triton.cdiv(count, TILE // block), triton.cdiv(channels, block))
    with torch.cuda.device_of(u):
        _max_kernel[grid](u.contiguous(), rows.contiguous(), tied, best, slot, count, channels, k, TILE // block, block)
    return best, slot


def neighbour_sum(x: Tensor, rows: Tensor) -> Tensor:
    """Sum the rows of x (M, C) over the neighbours of every point, (M, C)."""
    starts = torch.arange(0, rows.numel() + 1, rows.shape[1], device=x.device)
    return _list_sum(x, rows.contiguous(), starts, 1)


def transposed_sums(own: Tensor, winner: Tensor, x: Tensor | None, rows: Tensor, points: int) -> tuple[Tensor, Tensor | None]:
    """As `neighbour_ops.transposed_sums`, with slots as winners."""
    # An edge is numbered by its place in the flattened rows; a list holds the edges that lead to one point.
    ends, edges = rows.reshape(-1).to(torch.int32 if rows.shape[0] < 2**31 else torch.int64).sort(stable=True)
    starts = torch.searchsorted(ends, torch.arange(rows.shape[0] + 1, dtype=ends.dtype, device=ends.device))
    near = _list_sum(own, edges, starts, rows.shape[1], winner)
    return near, None if x is None else _list_sum(x, edges, starts, rows.shape[1])


edge_gradients = partial(neighbour_ops.edge_gradients, transposed=transposed_sums, total=neighbour_sum)


def check(device: torch.device) -> None:
    """Run every kernel once on two points, so that whatever the Triton toolchain lacks raises here."""
    u = torch.zeros(2, 1, device=device)
    rows = torch.zeros(2, 1, dtype=torch.long, device=device)
    _, winner = neighbour_max(u, rows, 2, torch.zeros(1, dtype=torch.bool, device=device))
    transposed_sums(u, winner, u, rows, 2)


def _list_sum(x: Tensor, entries: Tensor, starts: Tensor, k: int, slots: Tensor | None = None) -> Tensor:
    """(M, C) sums of x (M, C) at rows entry // k, over M lists of int64 entries: list i begins at starts[i] (M + 1,).

    With slots (M, C), only where slots[entry // k] is entry % k.
    """
    count, channels = x.shape
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    block = min(MAX_CHANNELS, triton.next_power_of_2(channels))
    x = x.contiguous()
    with torch.cuda.device_of(x):
        _list_sum_kernel[count, triton.cdiv(channels, block)](
            x, entries, starts, x if slots is None else slots, out, count, channels, k, slots is not None, ENTRIES, block)
    return out


@triton.jit
def _max_kernel(u, rows, tied, best, slot, count, channels, K: tl.constexpr, POINTS: tl.constexpr, BLOCK: tl.constexpr):
    point = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (point < count)[:, None] & (channel < channels)[None, :]
    equal = tl.load(tied + channel, mask=channel < channels, other=0)[None, :] != 0
    top = tl.full((POINTS, BLOCK), float("-inf"), u.dtype.element_ty)
    top_row = tl.full((POINTS, BLOCK), 2**63 - 1, tl.int64)
    top_slot = tl.zeros((POINTS, BLOCK), tl.int32)
    for s in range(K):
        row = tl.load(rows + point * K + s, mask=point < count, other=0)[:, None]
        readable = inside & (row >= 0) & (row < count)
        value = tl.load(u + row * channels + channel[None, :], mask=readable, other=float("nan"))
        larger = ((value > top) | (value != value)) & (equal == 0)
        tie = ((value == top) | equal) & (row < top_row)
        better = larger | tie
        top = tl.where(better, value, top)
        top_row = tl.where(better, row, top_row)
        top_slot = tl.where(better, s, top_slot)
    offset = point[:, None] * channels + channel[None, :]
    tl.store(best + offset, top, mask=inside)
    tl.store(slot + offset, top_slot.to(slot.dtype.element_ty), mask=inside)


@triton.jit
def _list_sum_kernel(x, entries, starts, slots, out, count, channels, K: tl.constexpr, WINNERS: tl.constexpr,
                     ENTRIES: tl.constexpr, BLOCK: tl.constexpr):
    owner = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(starts + owner)
    end = tl.load(starts + owner + 1)
    total = tl.zeros((BLOCK,), x.dtype.element_ty)
    while begin < end:  # no range: Triton 3.6 cannot interpret one between loaded bounds under NumPy 2.4
        place = begin + tl.arange(0, ENTRIES)
        entry = tl.load(entries + place, mask=place < end, other=-1)[:, None]
        source = entry // K
        readable = (entry >= 0) & (source < count) & (channel < channels)[None, :]
        offset = source * channels + channel[None, :]
        if WINNERS:
            readable &= tl.load(slots + offset, mask=readable, other=0).to(tl.int64) == entry % K
        total += tl.sum(tl.load(x + offset, mask=readable, other=0.0), 0)
        begin += ENTRIES
    tl.store(out + owner * channels + channel, total, mask=channel < channels)
