"""The operations of `models/kernels/neighbour_ops.py`, compiled for CPUs by Numba.

Threads share the clouds; a cloud is always summed in one order, so results do not depend on their number.
"""

import numpy as np
import torch
from torch import Tensor

from models.kernels.rows_numba import BLOCK, activate, activation_sums, compiled, share  # noqa: F401  # activation is operations too

SPARE_CANDIDATES = 4
MOST_COLUMN_BITS = 12  # of 32; more columns leave too few bits to tell distances apart


def smallest(distances: Tensor, offsets: Tensor, k: int) -> Tensor:
    """As `neighbour_ops.smallest`, equal entries by column.

    NumPy partitions 32-bit integers with vector code: keys that hold the upper bits of an entry and its column give a few
    candidates more than k, of which the exact entries choose. A row whose candidates end at a key that its k-th entry shares,
    so that another column might belong to them, is searched as a whole. NaN counts as infinite.

    Args:
        distances: float32 or float64; offsets: added to a row before its keys are cut, since floats are densest near zero.
    """
    rows, columns = distances.shape
    index = torch.empty(rows, k, dtype=torch.long)
    arrays = [distances.numpy(), index.numpy()]
    count, bits = k + SPARE_CANDIDATES, (columns - 1).bit_length()

    def work(start: int, stop: int) -> None:
        if count >= columns or bits > MOST_COLUMN_BITS:
            return _search_rows(*arrays, start, stop)
        keys = np.empty((stop - start, columns), np.int32)
        _make_keys(arrays[0], offsets.numpy(), keys, start, bits)
        keys.partition(count - 1, axis=1)
        return _settle(*arrays, keys, count, start, bits)

    share(rows, work)
    return index


def neighbour_max(u: Tensor, rows: Tensor, points: int, tied: Tensor) -> tuple[Tensor, Tensor]:
    """As `neighbour_ops.neighbour_max`."""
    u, best = u.contiguous(), torch.empty_like(u, memory_format=torch.contiguous_format)
    winner = torch.empty(u.shape, dtype=torch.int32 if u.numel() < 2**31 else torch.int64)
    arrays = [values.numpy() for values in (u, rows, best, winner)]
    share(len(u), lambda start, stop: _neighbour_max(*arrays, start, stop))
    if tied.any():
        lowest = rows.amin(1)
        best = torch.where(tied, u[lowest], best)
        own = (lowest * u.shape[1])[:, None] + torch.arange(u.shape[1])
        winner = torch.where(tied, own.to(winner.dtype), winner)
    return best, winner


def edge_squares(u: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """As `neighbour_ops.edge_squares`."""
    blocks = -(-len(u) // BLOCK)
    sums = u.new_zeros(blocks, u.shape[1])
    arrays = [values.numpy() for values in (u.contiguous(), v.contiguous(), rows, sums)]
    share(blocks, lambda start, stop: _edge_squares(*arrays, start, stop))
    return sums.sum(0, dtype=torch.float64)


def edge_gradients(
    own: Tensor, winner: Tensor, u: Tensor, v: Tensor, level: Tensor | None, slope: Tensor | None, rows: Tensor, points: int
) -> tuple[Tensor, Tensor]:
    """As `neighbour_ops.edge_gradients`."""
    own, near = own.contiguous(), torch.empty_like(own, memory_format=torch.contiguous_format)
    clouds = len(own) // points
    arrays = [values.view(clouds, -1).numpy() for values in (own, winner, near)]
    share(clouds, lambda start, stop: _scatter(*arrays, start, stop))
    if level is not None:
        arrays = [values.numpy() for values in (u.contiguous(), v.contiguous(), level, slope, rows, near, own)]
        share(clouds, lambda start, stop: _pull_all(*arrays, start * points, stop * points))
    return near, own


@compiled
def _make_keys(distances, offsets, keys, start, bits):
    low = (1 << bits) - 1
    scratch = np.empty(distances.shape[1], np.float32)
    raw = scratch.view(np.int32)
    for row in range(keys.shape[0]):
        for column in range(keys.shape[1]):
            value = distances[start + row, column]
            scratch[column] = value + offsets[start + row] if value == value else np.inf
        for column in range(keys.shape[1]):
            ordered = raw[column] ^ ((raw[column] >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
            keys[row, column] = (ordered & ~low) | column


@compiled
def _settle(distances, index, keys, count, start, bits):
    low, k = (1 << bits) - 1, index.shape[1]
    columns, values = np.empty(count, np.int32), np.empty(count, distances.dtype)
    for row in range(keys.shape[0]):
        worst = last = keys[row, 0] & ~low
        for slot in range(count):
            columns[slot] = keys[row, slot] & low
            value = distances[start + row, columns[slot]]
            values[slot] = value if value == value else np.inf
            worst = max(worst, keys[row, slot] & ~low)
        for slot in range(count):
            rank = 0
            for other in range(count):
                before = values[other] < values[slot]
                rank += before | ((values[other] == values[slot]) & (columns[other] < columns[slot]))
            if rank < k:
                index[start + row, rank] = columns[slot]
            if rank == k - 1:
                last = keys[row, slot] & ~low
        if last >= worst:  # columns that are no candidates may have a key as low
            _search(distances, index, start + row)


@compiled
def _search_rows(distances, index, start, stop):
    for row in range(start, stop):
        _search(distances, index, row)


@compiled
def _search(distances, index, row):
    k = index.shape[1]
    values = np.empty(k, distances.dtype)
    for column in range(distances.shape[1]):
        value = distances[row, column]
        value = value if value == value else np.inf
        place = min(column, k)
        while place > 0 and value < values[place - 1]:
            place -= 1
            if place < k - 1:
                values[place + 1] = values[place]
                index[row, place + 1] = index[row, place]
        if place < k:
            values[place] = value
            index[row, place] = column


@compiled
def _neighbour_max(u, rows, best, winner, start, stop):
    channels = u.shape[1]
    order = np.empty(rows.shape[1], np.int64)
    for point in range(start, stop):
        for slot in range(len(order)):  # sorted, so that the lowest row wins a tie
            row, place = rows[point, slot], slot
            while place > 0 and order[place - 1] > row:
                order[place] = order[place - 1]
                place -= 1
            order[place] = row
        for channel in range(channels):
            best[point, channel] = u[order[0], channel]
            winner[point, channel] = order[0]
        for row in order[1:]:
            for channel in range(channels):
                value = u[row, channel]
                wins = value > best[point, channel] or value != value
                best[point, channel] = value if wins else best[point, channel]
                winner[point, channel] = row if wins else winner[point, channel]
        for channel in range(channels):
            winner[point, channel] = winner[point, channel] * channels + channel


@compiled
def _scatter(own, winner, near, start, stop):
    places = near.reshape(-1)
    for cloud in range(start, stop):
        near[cloud] = 0
        for place in range(own.shape[1]):
            places[winner[cloud, place]] += own[cloud, place]


@compiled
def _edge_squares(u, v, rows, sums, start, stop):
    for block in range(start, stop):
        for point in range(block * BLOCK, min(len(u), (block + 1) * BLOCK)):
            for slot in range(rows.shape[1]):
                row = rows[point, slot]
                for channel in range(u.shape[1]):
                    edge = u[row, channel] + v[point, channel]
                    sums[block, channel] += edge * edge


@compiled
def _pull_all(u, v, level, slope, rows, near, own, start, stop):
    k = u.dtype.type(rows.shape[1])
    base, total = np.empty_like(level), np.empty_like(level)
    for point in range(start, stop):
        for channel in range(len(level)):  # several loops: with one array to write to, each is vector code
            base[channel] = level[channel] + slope[channel] * v[point, channel]
        total[:] = 0
        for slot in range(rows.shape[1]):
            row = rows[point, slot]
            for channel in range(len(level)):
                near[row, channel] -= base[channel] + slope[channel] * u[row, channel]
            for channel in range(len(level)):
                total[channel] += u[row, channel]
        for channel in range(len(level)):
            own[point, channel] -= k * base[channel] + slope[channel] * total[channel]
