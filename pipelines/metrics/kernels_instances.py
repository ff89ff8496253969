"""Compiled kernel of the contingency table: how often does each pair of ids occur in two maps?

Along a row neighbours mostly carry the same pair. The maps are compared with themselves one voxel earlier, in pieces
that stay in the cache, and only where something changes is a pair looked up in a hash table: the time is little more
than that of reading both maps once. Only :mod:`pipelines.metrics.contingency` calls it, and only where Numba is there.
"""

from __future__ import annotations

import numpy as np

from pipelines.metrics.jit import njit
from pipelines.metrics.kernels import ONE, lowest

# Odd multipliers that spread ids over all bits of a word: the fractions of the golden ratio and of roots of primes.
SPREAD_A, SPREAD_B, SPREAD_C = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBB67AE8584CAA73B),
    np.uint64(0x3C6EF372FE94F82B),
)
GATHER = np.uint64(0x0102040810204080)
"""Times eight bytes of 0 or 1, this leaves them as the eight highest bits, the first byte lowest."""


@njit(cache=True, nogil=True)
def slot_of(first, second, voxels, a, b):  # type: ignore[no-untyped-def]
    """Return where the pair (a, b) stands in the table, or the empty slot where it belongs. Sizes are powers of 2."""
    last = np.uint64(len(voxels) - 1)
    mixed = a * SPREAD_A + b * SPREAD_B
    mixed = (mixed ^ (mixed >> np.uint64(32))) * SPREAD_C
    slot = (mixed >> np.uint64(32)) & last
    while voxels[slot] != 0 and (first[slot] != a or second[slot] != b):
        slot = (slot + ONE) & last
    return slot


@njit(cache=True, nogil=True)
def mark_changes(p, p_before, r, r_before, changes):  # type: ignore[no-untyped-def]
    """Set ``changes`` to 1 where one of two stretches differs from the one before it, else to 0."""
    for i in range(len(p)):
        changes[i] = ((p[i] ^ p_before[i]) | (r[i] ^ r_before[i])) != 0


@njit(cache=True, nogil=True)
def positions_of(changes, n, offset, found):  # type: ignore[no-untyped-def]
    """Write where the first ``n`` bytes are 1, plus ``offset``, and return how many are.

    ``changes`` is 0 from there on and a multiple of 64 long: 64 bytes become one word, and a word is left bit by bit.
    """
    eight, filled = changes.view(np.uint64), 0
    for w in range((n + 63) // 64):
        word = np.uint64(0)
        for k in range(8):
            word |= ((eight[8 * w + k] * GATHER) >> np.uint64(56)) << np.uint64(8 * k)
        while word != 0:
            found[filled] = offset + 64 * w + lowest(word)
            word &= word - ONE
            filled += 1
    return filled


@njit(cache=True, nogil=True)
def add_runs(predicted, referenced, keep, begin, ends, first, second, voxels):  # type: ignore[no-untyped-def]
    """Add the runs from ``begin`` to the first of ``ends``, from there to the next ... and return the new pairs."""
    new = 0
    for i in range(len(ends)):
        a, b = np.uint64(predicted[begin]), np.uint64(referenced[begin])
        if len(keep) > 0 and keep[begin] == 0:
            a = b = np.uint64(0)
        slot = slot_of(first, second, voxels, a, b)
        if voxels[slot] == 0:
            first[slot], second[slot] = a, b
            new += 1
        voxels[slot] += ends[i] - begin
        begin = ends[i]
    return new


@njit(cache=True, nogil=True)
def count_pairs(predicted, referenced, keep, piece):  # type: ignore[no-untyped-def]
    """Return every pair of ids that occurs, in no order, and its voxels: three arrays; (0, 0) may be among them.

    ``predicted`` and ``referenced`` (n,) share an unsigned dtype. ``keep`` (n,) of uint8: where it is 0 the pair is
    (0, 0); an empty ``keep`` keeps all. ``piece``: voxels that are looked through at a time, a multiple of 64.
    """
    n = len(predicted)
    size, used, begin = 4096, 0, 0
    first, second, voxels = np.empty(size, np.uint64), np.empty(size, np.uint64), np.zeros(size, np.int64)
    changes, ends = np.empty(piece, np.uint8), np.empty(piece + 1, np.int64)
    for start in range(1, n + 1, piece):
        stop = min(start + piece, n)
        now, before = slice(start, stop), slice(start - 1, stop - 1)
        changes[stop - start :] = 0
        mark_changes(predicted[now], predicted[before], referenced[now], referenced[before], changes)
        if len(keep) > 0:
            for i in range(start, stop):
                changes[i - start] |= keep[i] != keep[i - 1]
        n_ends = positions_of(changes, stop - start, start, ends)
        if start + piece > n:
            ends[n_ends] = n
            n_ends += 1
        if 2 * (used + n_ends) > size:
            # At most half full, whatever the piece adds.
            while 2 * (used + n_ends) > size:
                size *= 2
            old = first, second, voxels
            first, second, voxels = np.empty(size, np.uint64), np.empty(size, np.uint64), np.zeros(size, np.int64)
            for i in range(len(old[2])):
                if old[2][i] != 0:
                    slot = slot_of(first, second, voxels, old[0][i], old[1][i])
                    first[slot], second[slot], voxels[slot] = old[0][i], old[1][i], old[2][i]
        if n_ends > 0:
            used += add_runs(predicted, referenced, keep, begin, ends[:n_ends], first, second, voxels)
            begin = ends[n_ends - 1]
    filled = np.flatnonzero(voxels)
    return first[filled], second[filled], voxels[filled]
