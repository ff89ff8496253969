"""Compiled kernels of the contingency table: how often does each pair of ids occur in two maps?

Along a row neighbours mostly carry the same pair. Both maps are compared with themselves one voxel earlier, 64 voxels
per step, and only where something changes is a pair looked up in a hash table: the time is little more than that of
reading both maps once. The pairs, few by then, are put in order by counting their digits, not by comparing.
Only :mod:`pipelines.metrics.contingency` calls these functions, and only where Numba is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import errors
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

from pipelines.metrics.jit import njit
from pipelines.metrics.kernels import ONE, highest, lowest, popcount

# Odd multipliers whose products spread ids over the high bits of a word: fractions of the golden ratio, of a root.
SPREAD_A, SPREAD_B = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
PIECE = 1 << 13
"""Voxels that are looked through at a time: their ids, and the places of their changes, stay in the innermost cache."""
AT_ONCE = 8
"""Changes that are written down for every word, needed or not: cheaper than asking for each whether it is the last."""
DIGIT_BITS = 11
FIRST_SLOTS = 8192


@intrinsic
def changes_of_64(context: Any, ids: Any, start: Any) -> Any:
    """Word whose bit k is 1 where ``ids[start + k]`` differs from the id before it; ``start`` at least 1.

    Written as one comparison of two vectors, which a compiler makes of no loop: it becomes four instructions with
    AVX-512, and means the same on every processor whose words begin with the lowest byte. Strides are not looked at:
    ``ids`` is contiguous or does not compile.
    """
    if ids.layout != "C":
        raise errors.TypingError(f"ids are read 64 at a time: a contiguous array is expected, not {ids}")

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        element = make_array(ids)(context, builder, args[0]).data
        vector = ir.VectorType(ir.IntType(ids.dtype.bitwidth), 64)
        here = builder.gep(element, [args[1]])
        before = builder.gep(here, [ir.Constant(ir.IntType(64), -1)])
        loaded = [
            builder.load(builder.bitcast(place, vector.as_pointer()), align=ids.dtype.bitwidth // 8)
            for place in (here, before)
        ]
        return builder.bitcast(builder.icmp_unsigned("!=", *loaded), ir.IntType(64))

    return types.uint64(ids, types.intp), build


@njit(cache=True, nogil=True)
def changes_in_piece(predicted, referenced, keep, start, stop, found):  # type: ignore[no-untyped-def]
    """Write the places in [start, stop) where one of the maps differs from the voxel before; return how many.

    ``found`` has room for as many places as there are voxels, and 64 more.
    """
    filled, whole = 0, start + (stop - start) // 64 * 64
    for begin in range(start, whole, 64):
        word = changes_of_64(predicted, begin) | changes_of_64(referenced, begin)
        if len(keep) > 0:
            word |= changes_of_64(keep, begin)
        n = popcount(word)
        for k in range(AT_ONCE):
            found[filled + k] = begin + lowest(word)
            word &= word - ONE
        for k in range(AT_ONCE, n):
            found[filled + k] = begin + lowest(word)
            word &= word - ONE
        filled += n
    for i in range(whole, stop):
        change = predicted[i] != predicted[i - 1] or referenced[i] != referenced[i - 1]
        if change or (len(keep) > 0 and keep[i] != keep[i - 1]):
            found[filled] = i
            filled += 1
    return filled


@njit(cache=True, nogil=True)
def add(table, a, b, voxels):  # type: ignore[no-untyped-def]
    """Count ``voxels`` of the pair (a, b) and return 1 if it is new, else 0.

    ``table`` (a power of 2, 4) of uint64: the pair, its voxels, and nothing, so that a row never lies in two lines of
    the cache. An empty row reads as the pair (0, 0), whose count nobody wants.
    """
    size, new = np.uint64(len(table)), 0
    slot = (a * SPREAD_A + b * SPREAD_B) >> np.uint64(highest(size) + 1)
    while ((table[slot, 0] ^ a) | (table[slot, 1] ^ b)) != 0:
        if table[slot, 2] == 0:
            table[slot, 0], table[slot, 1] = a, b
            new = 1
            break
        slot = (slot + ONE) & (size - ONE)
    table[slot, 2] += np.uint64(voxels)
    return new


@njit(cache=True, nogil=True)
def with_room(table, pairs):  # type: ignore[no-untyped-def]
    """Return the table, or a larger copy of it if ``pairs`` pairs would fill more than half."""
    size = len(table)
    while 2 * pairs > size:
        size *= 2
    if size == len(table):
        return table
    larger = np.zeros((size, 4), np.uint64)
    for row in range(len(table)):
        if table[row, 2] != 0:
            add(larger, table[row, 0], table[row, 1], table[row, 2])
    return larger


@njit(cache=True, nogil=True)
def count_pairs(predicted, referenced, keep):  # type: ignore[no-untyped-def]
    """Return every pair of ids that occurs, in no order, and its voxels: (K,) uint64, uint64, int64; never (0, 0).

    ``predicted`` and ``referenced`` (n,) share an unsigned dtype. ``keep`` (n,) of uint8: where it is 0 the pair is
    (0, 0); an empty ``keep`` keeps all.
    """
    n, used, begin = len(predicted), 0, 0
    table, ends = np.zeros((FIRST_SLOTS, 4), np.uint64), np.empty(PIECE + 64, np.int64)
    for start in range(1, n + 1, PIECE):
        stop = min(start + PIECE, n)
        n_ends = changes_in_piece(predicted, referenced, keep, start, stop, ends)
        if start + PIECE > n:  # the last run ends with the map
            ends[n_ends] = n
            n_ends += 1
        table = with_room(table, used + n_ends)
        for end in ends[:n_ends]:
            a, b = np.uint64(predicted[begin]), np.uint64(referenced[begin])
            if len(keep) > 0 and keep[begin] == 0:
                a = b = np.uint64(0)
            used += add(table, a, b, end - begin)
            begin = end
    first, second, voxels = np.empty(used, np.uint64), np.empty(used, np.uint64), np.empty(used, np.int64)
    filled = 0
    for row in range(len(table)):
        if (table[row, 0] | table[row, 1]) != 0:
            first[filled], second[filled], voxels[filled] = table[row, 0], table[row, 1], table[row, 2]
            filled += 1
    return first, second, voxels


@njit(cache=True, nogil=True)
def sorted_by(ids, order):  # type: ignore[no-untyped-def]
    """Return the positions ``order`` sorted by their ids, equal ones as they came: by one digit after the other."""
    every, shift = np.uint64(0), np.uint64(0)
    for i in range(len(ids)):
        every |= ids[i]
    last_digit = np.uint64((1 << DIGIT_BITS) - 1)
    while shift < 64 and (every >> shift) != 0:
        place = np.zeros((1 << DIGIT_BITS) + 1, np.int64)
        for i in order:
            place[((ids[i] >> shift) & last_digit) + ONE] += 1
        for digit in range(1, len(place)):
            place[digit] += place[digit - 1]
        after = np.empty_like(order)
        for i in order:
            digit = (ids[i] >> shift) & last_digit
            after[place[digit]] = i
            place[digit] += 1
        order = after
        shift += np.uint64(DIGIT_BITS)
    return order


@njit(cache=True, nogil=True)
def distinct_ids(ids, voxels, order):  # type: ignore[no-untyped-def]
    """Return the ids in ascending order, 0 always first, the voxels of each, and where each pair's id stands."""
    distinct, sizes = np.zeros(len(ids) + 1, np.uint64), np.zeros(len(ids) + 1, np.int64)
    index, last = np.empty(len(ids), np.int64), 0
    for i in order:
        if ids[i] != distinct[last]:
            last += 1
            distinct[last] = ids[i]
        index[i] = last
        sizes[last] += voxels[i]
    return distinct[: last + 1], sizes[: last + 1], index


@njit(cache=True, nogil=True)
def tabulate(first, second, voxels):  # type: ignore[no-untyped-def]
    """Return the parts of a contingency table, background left out, of what :func:`count_pairs` returns.

    Ids of the first map (P,) and of the second (R,), their voxels, and of the pairs, ordered by first and second id,
    the two positions among the ids and the shared voxels, (K,) each.
    """
    by_second = sorted_by(second, np.arange(len(second)))
    second_ids, second_sizes, second_index = distinct_ids(second, voxels, by_second)
    order = sorted_by(first, by_second)
    first_ids, first_sizes, first_index = distinct_ids(first, voxels, order)
    pairs, n = np.empty((3, len(order)), np.int64), 0
    for i in order:
        if first_index[i] > 0 and second_index[i] > 0:
            pairs[0, n], pairs[1, n], pairs[2, n] = first_index[i] - 1, second_index[i] - 1, voxels[i]
            n += 1
    ids = first_ids[1:], second_ids[1:], first_sizes[1:], second_sizes[1:]
    return ids, (pairs[0, :n], pairs[1, :n], pairs[2, :n])
