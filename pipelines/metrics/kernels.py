"""Compiled kernels on masks of one bit per voxel.

A label map is read once; what it leaves behind per label is a box of 64-bit words (Z, Y, W): bit b of word w is voxel
64 w + b of a row, with one empty row around the box and one empty word at either end of a row. Neighbours are then
shifts, 64 voxels at a time. Only :mod:`pipelines.metrics.packing` and :mod:`pipelines.metrics.packed` call these
functions, and only where Numba is there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from pipelines.metrics.jit import njit

ONE, ALL, TOP = np.uint64(1), np.uint64(0xFFFFFFFFFFFFFFFF), np.uint64(63)


@intrinsic
def popcount(context: Any, word: Any) -> Any:
    """Number of set bits of a uint64."""
    return types.int64(types.uint64), lambda context, builder, signature, args: builder.ctpop(args[0])


@intrinsic
def lowest(context: Any, word: Any) -> Any:
    """Position of the lowest set bit of a uint64 that is not zero."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], context.get_constant(types.boolean, True))

    return types.int64(types.uint64), build


@intrinsic
def highest(context: Any, word: Any) -> Any:
    """Number of zero bits above the highest set bit of a uint64 that is not zero."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ctlz(args[0], context.get_constant(types.boolean, True))

    return types.int64(types.uint64), build


@njit(cache=True, nogil=True)
def pack_rows(values, labels, keep, use_keep, first, last):  # type: ignore[no-untyped-def]
    """Return the words that are not empty in rows ``first`` to ``last``: place (row, word, slot of the label) and bits.

    ``values`` (rows, n) and ``labels`` share an unsigned dtype; 0 is no label. With ``use_keep``, voxels where ``keep``
    is 0 count as 0.
    """
    n = values.shape[1]
    zero = values.dtype.type(0)
    place, bits, filled = np.empty((1024, 3), np.int32), np.empty(1024, np.uint64), 0
    words, touched = np.zeros(len(labels), np.uint64), np.empty(len(labels), np.int64)
    for row in range(first, last):
        line = values[row]
        something = zero
        for i in range(n):
            something |= line[i]
        if something == 0:
            continue
        for word in range((n + 63) // 64):
            start = 64 * word
            stop = min(start + 64, n)
            value = line[start]
            differs = zero
            for i in range(start, stop):
                differs |= line[i] ^ value
            kept = stop - start
            if use_keep:
                kept = 0
                for i in range(start, stop):
                    kept += keep[row, i] != 0
            if kept == 0 or (differs == 0 and value == 0):
                continue
            n_touched, i = 0, start
            uniform = differs == 0 and kept == stop - start
            while i < stop:
                value = line[i] if not use_keep or keep[row, i] else zero
                end = stop
                if not uniform:
                    end = i + 1
                    while end < stop and (line[end] if not use_keep or keep[row, end] else zero) == value:
                        end += 1
                if value != 0:
                    for slot in range(len(labels)):
                        if labels[slot] == value:
                            if words[slot] == 0:
                                touched[n_touched] = slot
                                n_touched += 1
                            words[slot] |= (ALL >> np.uint64(64 - (end - i))) << np.uint64(i - start)
                            break
                i = end
            if filled + n_touched > len(bits):
                size = 2 * len(bits) + n_touched
                place = np.concatenate((place, np.empty((size - len(bits), 3), np.int32)))
                bits = np.concatenate((bits, np.empty(size - len(bits), np.uint64)))
            for t in range(n_touched):
                slot = touched[t]
                place[filled, 0], place[filled, 1], place[filled, 2] = row, word, slot
                bits[filled] = words[slot]
                words[slot] = 0
                filled += 1
    return place[:filled], bits[:filled]


@njit(cache=True, nogil=True)
def measure(place, bits, rows_per_plane, counts, boxes):  # type: ignore[no-untyped-def]
    """Add up voxels per slot and widen its box: first and last plane, row and word (slots, 3, 2)."""
    for i in range(len(bits)):
        slot = place[i, 2]
        counts[slot] += popcount(bits[i])
        z = place[i, 0] // rows_per_plane
        position = (z, place[i, 0] - z * rows_per_plane, np.int64(place[i, 1]))
        for axis in range(3):
            boxes[slot, axis, 0] = min(boxes[slot, axis, 0], position[axis])
            boxes[slot, axis, 1] = max(boxes[slot, axis, 1], position[axis])


@njit(cache=True, nogil=True)
def scatter(place, bits, rows_per_plane, origins, strides, flat):  # type: ignore[no-untyped-def]
    """Write the words into the boxes of their slots, which lie one after the other in ``flat``."""
    for i in range(len(bits)):
        slot = place[i, 2]
        z = place[i, 0] // rows_per_plane
        y = place[i, 0] - z * rows_per_plane
        flat[origins[slot] + z * strides[slot, 0] + y * strides[slot, 1] + place[i, 1]] = bits[i]


@njit(cache=True, nogil=True)
def count_common(first, second):  # type: ignore[no-untyped-def]
    """Return the number of bits set in both boxes, and in at least one."""
    both = either = 0
    a, b = first.ravel(), second.ravel()
    for i in range(len(a)):
        both += popcount(a[i] & b[i])
        either += popcount(a[i] | b[i])
    return both, either


@njit(cache=True, nogil=True)
def edges(mask, planes, outside):  # type: ignore[no-untyped-def]
    """Return the voxels of ``mask`` with a face neighbour outside (``outside``: the neighbours themselves), and the
    number per plane. ``planes`` False: neighbours in the plane only."""
    nz, ny, nw = mask.shape
    found, counts = np.zeros_like(mask), np.zeros(nz, np.int64)
    for z in range(nz):
        for y in range(ny):
            for w in range(nw):
                own = ~mask[z, y, w] if outside else mask[z, y, w]
                if own == 0:
                    continue
                flip = ALL if outside else np.uint64(0)
                left = (mask[z, y, w - 1] ^ flip) >> TOP if w > 0 else flip >> TOP
                right = (mask[z, y, w + 1] ^ flip) << TOP if w + 1 < nw else flip << TOP
                inner = ((own << ONE) | left) & ((own >> ONE) | right)
                if y > 0:
                    inner &= mask[z, y - 1, w] ^ flip
                if y + 1 < ny:
                    inner &= mask[z, y + 1, w] ^ flip
                if planes:
                    if z > 0:
                        inner &= mask[z - 1, y, w] ^ flip
                    if z + 1 < nz:
                        inner &= mask[z + 1, y, w] ^ flip
                edge = own & ~inner
                found[z, y, w] = edge
                counts[z] += popcount(edge)
    return found, counts


@njit(cache=True, nogil=True)
def cells(mask, planes, weights):  # type: ignore[no-untyped-def]
    """Return the cells of 2 x 2 x 2 voxels that a surface crosses, their number per plane, and their codes in order.

    A cell has the position of its first voxel; its code is the sum of ``weights[4 dz + 2 dy + dx]`` over its voxels in
    the mask. ``planes`` False: cells of 2 x 2.
    """
    nz, ny, nw = mask.shape
    found, counts = np.zeros_like(mask), np.zeros(nz, np.int64)
    codes, filled = np.empty(1024, np.uint8), 0
    corner = np.zeros(8, np.uint64)
    depth = 2 if planes else 1
    occupied = np.zeros((nz, ny), np.bool_)
    for z in range(nz):
        for y in range(ny):
            for w in range(nw):
                occupied[z, y] |= mask[z, y, w] != 0
    for z in range(nz - depth + 1):
        for y in range(ny - 1):
            if not (
                occupied[z, y] or occupied[z, y + 1] or occupied[z + depth - 1, y] or occupied[z + depth - 1, y + 1]
            ):
                continue
            for w in range(nw):
                some, every = np.uint64(0), ALL
                for row in range(2 * depth):
                    here = mask[z + row // 2, y + row % 2, w]
                    after = mask[z + row // 2, y + row % 2, w + 1] << TOP if w + 1 < nw else np.uint64(0)
                    corner[2 * row] = here
                    corner[2 * row + 1] = (here >> ONE) | after
                    some |= here | corner[2 * row + 1]
                    every &= here & corner[2 * row + 1]
                word = some & ~every
                if word == 0:
                    continue
                found[z, y, w] = word
                counts[z] += popcount(word)
                if filled + 64 > len(codes):
                    codes = np.concatenate((codes, np.empty(len(codes), np.uint8)))
                while word != 0:
                    bit = np.uint64(lowest(word))
                    word &= word - ONE
                    code = 0
                    for c in range(4 * depth):
                        code += weights[c] * np.int64((corner[c] >> bit) & ONE)
                    codes[filled] = code
                    filled += 1
    return found, counts, codes[:filled]


@njit(cache=True, nogil=True)
def coordinates(mask, n):  # type: ignore[no-untyped-def]
    """Return the positions (n, 3) of the set bits in the box, in order."""
    found, filled = np.empty((n, 3), np.int32), 0
    for z in range(mask.shape[0]):
        for y in range(mask.shape[1]):
            for w in range(mask.shape[2]):
                word = mask[z, y, w]
                while word != 0:
                    found[filled, 0], found[filled, 1], found[filled, 2] = z, y, 64 * w + lowest(word)
                    word &= word - ONE
                    filled += 1
    return found


@njit(cache=True, nogil=True)
def paint_balls(centres, mask, dz, dy, reach):  # type: ignore[no-untyped-def]
    """Return the voxels of ``mask`` within a ball around one of the ``centres``.

    The ball is given by rows: offset ``dz``, ``dy``, and how far it reaches along the row to either side.
    """
    nz, ny, nw = mask.shape
    band = np.zeros_like(mask)
    for z in range(nz):
        for y in range(ny):
            for w in range(nw):
                word = centres[z, y, w]
                while word != 0:
                    x = 64 * w + lowest(word)
                    word &= word - ONE
                    for r in range(len(dz)):
                        zz, yy = z + dz[r], y + dy[r]
                        if zz < 0 or zz >= nz or yy < 0 or yy >= ny:
                            continue
                        start, last = max(x - reach[r], 0), min(x + reach[r], 64 * nw - 1)
                        for v in range(start >> 6, (last >> 6) + 1):
                            low, high = max(start - 64 * v, 0), min(last - 64 * v, 63)
                            span = (ALL >> np.uint64(63 - (high - low))) << np.uint64(low)
                            band[zz, yy, v] |= span & mask[zz, yy, v]
    return band
