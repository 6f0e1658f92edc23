"""Passes over the rows of a matrix, compiled for CPUs by Numba, and what compiled kernels share.

Kernels work on a range of rows, clouds or blocks and release the interpreter, so that `torch.get_num_threads()` threads share the
work. Sums are taken by blocks of rows, whatever the number of threads.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

BLOCK = 64  # rows that are summed one after the other
PARTS = 4  # of the work of a kernel, per thread
TASK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
compiled = njit(cache=True, nogil=True, error_model="numpy")


def share(count: int, work: Callable[[int, int], None]) -> None:
    """Call work(start, stop) on contiguous parts of 0..count-1, several per thread, of which each takes the next one when it is free."""
    threads = max(1, min(torch.get_num_threads(), count))
    number = 1 if threads == 1 else min(count, PARTS * threads)
    edges = [count * part // number for part in range(number + 1)]
    parts = iter(list(zip(edges, edges[1:])))
    failures: list[BaseException] = []

    def take_parts(_: object = None) -> None:
        try:
            for part in iter(lambda: next(parts, None), None):
                work(*part)
        except BaseException as failure:  # nothing is above this in a thread of OpenMP
            failures.append(failure)

    if threads == 1:
        take_parts()
    elif openmp := _openmp():
        openmp.GOMP_parallel(TASK(take_parts), None, threads, 0)
    else:
        wait([_pool(threads).submit(take_parts) for _ in range(threads)])
    if failures:
        raise failures[0]


@cache
def _openmp() -> ctypes.CDLL | None:
    """Return the library whose threads torch uses: others would wait for them, as they keep spinning after their last operation."""
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return ctypes.CDLL(str(found[0])) if found else None


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


def mean_and_variance(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows (M, C), (C,) each, the variance biased; those of blocks, which stay in the cache, are put together."""
    blocks = -(-len(rows) // BLOCK)
    sums, squares = rows.new_zeros(2, blocks, rows.shape[1])
    arrays = [values.numpy() for values in (rows, sums, squares)]
    share(blocks, lambda start, stop: _block_moments(*arrays, start, stop))
    counts = (len(rows) - BLOCK * torch.arange(blocks)).clamp(max=BLOCK).to(rows.dtype)[:, None]
    mean = sums.sum(0) / len(rows)
    return mean, (squares + counts * (sums / counts - mean).square()).sum(0) / len(rows)


def gradient_sums(grad: Tensor, rows: Tensor, mean: Tensor, scale: Tensor, offset: Tensor, slope: float) -> tuple[Tensor, Tensor]:
    """The two sums of `neighbour_ops.activation_sums`."""
    blocks = -(-len(rows) // BLOCK)
    sums = rows.new_zeros(2, blocks, rows.shape[1])
    arrays = [values.numpy() for values in (grad, rows, mean, scale, offset, *sums)]
    share(blocks, lambda start, stop: _gradient_sums(*arrays, arrays[0].dtype.type(slope), start, stop))
    return tuple(sums.sum(1))


def gradient_at_rows(
    grad: Tensor, rows: Tensor, scale: Tensor, offset: Tensor, tilt: Tensor, shift: Tensor, slope: float
) -> Tensor:
    """The gradient at rows (M, C) of `neighbour_ops.activate` less tilt rows + shift, (M, C)."""
    out = torch.empty_like(rows)
    arrays = [values.numpy() for values in (grad, rows, scale, offset, tilt, shift, out)]
    share(len(rows), lambda start, stop: _gradient_at_rows(*arrays, arrays[0].dtype.type(slope), start, stop))
    return out


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
def _block_moments(rows, sums, squares, start, stop):
    mean = np.empty_like(sums[0])
    for block in range(start, stop):
        first, last = block * BLOCK, min(len(rows), (block + 1) * BLOCK)
        for row in range(first, last):
            for channel in range(len(mean)):
                sums[block, channel] += rows[row, channel]
        for channel in range(len(mean)):
            mean[channel] = sums[block, channel] / (last - first)
        for row in range(first, last):
            for channel in range(len(mean)):
                difference = rows[row, channel] - mean[channel]
                squares[block, channel] += difference * difference


@compiled
def _gradient_sums(grad, rows, mean, scale, offset, first, second, slope, start, stop):
    for block in range(start, stop):
        for row in range(block * BLOCK, min(len(rows), (block + 1) * BLOCK)):
            for channel in range(rows.shape[1]):
                value = rows[row, channel] * scale[channel] + offset[channel]
                first[block, channel] += grad[row, channel] if value > 0 else grad[row, channel] * slope
            for channel in range(rows.shape[1]):
                value = rows[row, channel] * scale[channel] + offset[channel]
                pull = grad[row, channel] if value > 0 else grad[row, channel] * slope
                second[block, channel] += pull * (rows[row, channel] - mean[channel])


@compiled
def _gradient_at_rows(grad, rows, scale, offset, tilt, shift, out, slope, start, stop):
    for row in range(start, stop):
        for channel in range(rows.shape[1]):
            value = rows[row, channel] * scale[channel] + offset[channel]
            pull = grad[row, channel] if value > 0 else grad[row, channel] * slope
            out[row, channel] = pull * scale[channel] - (rows[row, channel] * tilt[channel] + shift[channel])
