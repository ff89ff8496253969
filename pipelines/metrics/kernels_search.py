"""Compiled searches in masks of one bit per voxel: nearest neighbours and connected components.

The layout is that of :mod:`pipelines.metrics.kernels`; the nearest voxel of a row is a count of zero bits.
"""

from __future__ import annotations

import numpy as np

from pipelines.metrics.jit import njit
from pipelines.metrics.kernels import ALL, ONE, TOP, highest, lowest, popcount

NOTHING = 1 << 30


@njit(cache=True, nogil=True)
def nearest_in_row(words, start, nw, x, step2, room):  # type: ignore[no-untyped-def]
    """Return the signed offset to the nearest set bit of a row, or NOTHING; beyond ``room`` in mm^2 it may miss one.

    The row is ``nw`` of the ``words``, from ``start``: a view of it would cost more than the search.
    """
    w, bit = x >> 6, np.uint64(x & 63)
    best = NOTHING
    own = words[start + w]
    word = own >> bit
    if word != 0:
        best = lowest(word)
    else:
        for v in range(w + 1, nw):
            gap = 64 * v - x
            if gap * gap * step2 >= room:
                break
            if words[start + v] != 0:
                best = gap + lowest(words[start + v])
                break
    word = own << (TOP - bit)
    if word != 0:
        left = highest(word)
        return -left if left < best else best
    for v in range(w - 1, -1, -1):
        gap = x - 64 * v - 63
        if gap >= best or gap * gap * step2 >= room:
            break
        if words[start + v] != 0:
            left = gap + highest(words[start + v])
            return -left if left < best else best
    return best


@njit(cache=True, nogil=True)
def nearest_squared(query, target, dz, dy, row_mm2, step_mm, bound_mm2, first, last, out):  # type: ignore[no-untyped-def]
    """Write the squared distance in mm^2 from each bit of ``query`` in planes ``first`` to ``last`` to the nearest of
    ``target``: exact below ``bound_mm2``, infinite from there on, -1 where the given rows do not decide.

    The rows (``dz``, ``dy``, squared distance ``row_mm2``) come in ascending order: the search ends with the first row
    that is farther than what was found. The last bit found bounds the next search from above. Where one search has
    failed its neighbours would too: the next few are left undecided without an attempt.
    """
    nz, ny, nw = query.shape
    step2 = step_mm[2] * step_mm[2]
    words = target.ravel()
    filled, skip, known = 0, 0, False
    pz, py, px = 0, 0, 0
    for z in range(first, last):
        for y in range(ny):
            for w in range(nw):
                word = query[z, y, w]
                while word != 0:
                    x = 64 * w + lowest(word)
                    word &= word - ONE
                    if skip > 0:
                        skip -= 1
                        out[filled] = -1.0
                        filled += 1
                        continue
                    best, found = bound_mm2, False
                    if known:
                        a, b, c = (z - pz) * step_mm[0], (y - py) * step_mm[1], float(x - px)
                        previous = a * a + b * b + c * c * step2
                        if previous < best:
                            best, found = previous, True
                    decided = False
                    for r in range(len(row_mm2)):
                        if row_mm2[r] >= best:
                            decided = True
                            break
                        zz, yy = z + dz[r], y + dy[r]
                        if zz < 0 or zz >= nz or yy < 0 or yy >= ny:
                            continue
                        offset = nearest_in_row(words, (zz * ny + yy) * nw, nw, x, step2, best - row_mm2[r])
                        if offset != NOTHING:
                            here = row_mm2[r] + float(offset) * float(offset) * step2
                            if here < best:
                                best, found, known = here, True, True
                                pz, py, px = zz, yy, x + offset
                    if decided:
                        out[filled] = best if found else np.inf
                    else:
                        out[filled] = -1.0
                        skip = 15
                    filled += 1


@njit(cache=True, nogil=True)
def runs_of(mask):  # type: ignore[no-untyped-def]
    """Return the runs of set bits (start, stop) in order, and where each row's runs begin (rows + 1)."""
    nz, ny, nw = mask.shape
    runs, filled = np.empty((1024, 2), np.int32), 0
    begin = np.zeros(nz * ny + 1, np.int64)
    for row in range(nz * ny):
        begin[row] = filled
        z, y, is_open = row // ny, row % ny, False
        for w in range(nw):
            word = mask[z, y, w]
            if word == 0 and not is_open:
                continue
            # A set bit of `change` is where a run starts or stops.
            change = word ^ ((word << ONE) | (ONE if is_open else np.uint64(0)))
            while change != 0:
                x = 64 * w + lowest(change)
                change &= change - ONE
                if is_open:
                    runs[filled, 1] = x
                    filled += 1
                else:
                    if filled == len(runs):
                        runs = np.concatenate((runs, np.empty_like(runs)))
                    runs[filled, 0] = x
                is_open = not is_open
    begin[nz * ny] = filled
    return runs[:filled], begin


@njit(cache=True, nogil=True)
def components(mask, other, planes):  # type: ignore[no-untyped-def]
    """Return size and overlap with ``other``, in voxels, of each component (neighbours by face, edge or corner)."""
    ny = mask.shape[1]
    runs, begin = runs_of(mask)
    parent = np.arange(len(runs))
    for row in range(len(begin) - 1):
        if begin[row] == begin[row + 1]:
            continue
        z, y = row // ny, row % ny
        for k in range(4 if planes else 1):
            # The rows before this one that touch it: (0, -1), then in the plane before (-1, -1), (-1, 0), (-1, 1).
            dz, dy = (0, -1) if k == 0 else (-1, k - 2)
            if z + dz < 0 or y + dy < 0 or y + dy >= ny:
                continue
            j, end = begin[row + dz * ny + dy], begin[row + dz * ny + dy + 1]
            i = begin[row]
            while i < begin[row + 1] and j < end:
                if runs[j, 0] <= runs[i, 1] and runs[i, 0] <= runs[j, 1]:
                    a, b = i, j
                    while parent[a] != a:
                        parent[a] = parent[parent[a]]
                        a = parent[a]
                    while parent[b] != b:
                        parent[b] = parent[parent[b]]
                        b = parent[b]
                    parent[max(a, b)] = min(a, b)
                if runs[i, 1] < runs[j, 1]:
                    i += 1
                else:
                    j += 1
    sizes, covered = np.zeros(len(runs), np.int64), np.zeros(len(runs), np.int64)
    roots = 0
    for row in range(len(begin) - 1):
        for i in range(begin[row], begin[row + 1]):
            a = i
            if parent[i] == i:
                # The first run of a component comes before all others: number components in that order, as negatives.
                parent[i] = -1 - roots
                roots += 1
            while parent[a] >= 0:
                a = parent[a]
            number = -1 - parent[a]
            sizes[number] += runs[i, 1] - runs[i, 0]
            for w in range(runs[i, 0] >> 6, ((runs[i, 1] - 1) >> 6) + 1):
                low, high = max(runs[i, 0] - 64 * w, 0), min(runs[i, 1] - 1 - 64 * w, 63)
                span = (ALL >> np.uint64(63 - (high - low))) << np.uint64(low)
                covered[number] += popcount(other[row // ny, row % ny, w] & span)
    return sizes[:roots], covered[:roots]
