"""Passes over the rows of a matrix, compiled for CPUs by Numba, and what compiled kernels share.

Kernels work on a range of rows, clouds or blocks and release the interpreter, so that `torch.get_num_threads()` threads share the
work. Sums are taken by blocks of rows, whatever the number of threads.
"""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from numba import njit
from torch import Tensor

BLOCK = 64  # rows that are summed one after the other
PARTS = 6  # of the work of a kernel, per thread
compiled = njit(cache=True, nogil=True, error_model="numpy")


def share(count: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) on contiguous parts of 0..count-1, several per thread, of which each takes the next one when it is free.

    Torch's own threads go on spinning for a while after their last operation, so that a thread of ours may have half a core.
    """
    threads = max(1, min(torch.get_num_threads(), count))
    if threads == 1:
        return work(0, count)
    number = min(count, PARTS * threads)
    edges = [count * part // number for part in range(number + 1)]
    left = deque(zip(edges, edges[1:]))

    def work_off() -> None:
        while True:
            try:
                part = left.popleft()
            except IndexError:
                return
            work(*part)

    others = [_pool(threads - 1).submit(work_off) for _ in range(threads - 1)]
    work_off()
    for other in others:
        if not other.cancel():
            other.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def activate(rows: Tensor, scale: Tensor, offset: Tensor, slope: float) -> Tensor:
    """As `neighbour_ops.activate`."""
    out = torch.empty_like(rows)
    arrays = [values.numpy() for values in (rows, scale, offset, out)]
    share(len(rows), lambda start, stop: _activate(*arrays, arrays[0].dtype.type(slope), start, stop))
    return out


def activation_sums(grad: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, slope: float) -> tuple[Tensor, Tensor, Tensor]:
    """As `neighbour_ops.activation_sums`."""
    own, blocks = torch.empty_like(rows), -(-len(rows) // BLOCK)
    sums = rows.new_zeros(2, blocks, rows.shape[1])
    arrays = [values.numpy() for values in (grad.contiguous(), rows, mean, scale, offset, own, *sums)]
    share(blocks, lambda start, stop: _activation_sums(*arrays, arrays[0].dtype.type(slope), start, stop))
    return own, *sums.sum(1)


def squares(rows: Tensor, mean: Tensor) -> Tensor:
    """Sum of (rows - mean)^2 over the rows (M, C), (C,)."""
    blocks = -(-len(rows) // BLOCK)
    sums = rows.new_zeros(blocks, rows.shape[1])
    arrays = [values.numpy() for values in (rows, mean, sums)]
    share(blocks, lambda start, stop: _squares(*arrays, start, stop))
    return sums.sum(0)


def subtract_affine(values: Tensor, rows: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """Subtract scale rows + offset from values (M, C) in place, and return them."""
    arrays = [each.numpy() for each in (values, rows, scale, offset)]
    share(len(values), lambda start, stop: _subtract_affine(*arrays, start, stop))
    return values


@compiled
def _activate(rows, scale, offset, out, slope, start, stop):
    for row in range(start, stop):
        for channel in range(rows.shape[1]):
            value = rows[row, channel] * scale[channel] + offset[channel]
            out[row, channel] = value if value > 0 else value * slope


@compiled
def _activation_sums(grad, rows, mean, scale, offset, own, first, second, slope, start, stop):
    for block in range(start, stop):
        for row in range(block * BLOCK, min(len(rows), (block + 1) * BLOCK)):
            for channel in range(rows.shape[1]):  # several loops: with one array to write to, each is vector code
                value = rows[row, channel] * scale[channel] + offset[channel]
                own[row, channel] = grad[row, channel] if value > 0 else grad[row, channel] * slope
            for channel in range(rows.shape[1]):
                first[block, channel] += own[row, channel]
            for channel in range(rows.shape[1]):
                second[block, channel] += own[row, channel] * (rows[row, channel] - mean[channel])
            for channel in range(rows.shape[1]):
                own[row, channel] *= scale[channel]


@compiled
def _squares(rows, mean, sums, start, stop):
    for block in range(start, stop):
        for row in range(block * BLOCK, min(len(rows), (block + 1) * BLOCK)):
            for channel in range(rows.shape[1]):
                difference = rows[row, channel] - mean[channel]
                sums[block, channel] += difference * difference


@compiled
def _subtract_affine(values, rows, scale, offset, start, stop):
    for row in range(start, stop):
        for channel in range(rows.shape[1]):
            values[row, channel] -= rows[row, channel] * scale[channel] + offset[channel]
