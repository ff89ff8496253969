"""Compiled kernels for image quality: SSIM of a box of voxels in one pass, and sums of errors.

The weighted window is separable. A tile, ``TILE`` voxels wide and ``STRIP`` rows high, moves along the first axis: four
products of the two images, filtered along the second axis, wait in a ring of planes; from the ring come four output
planes at a time, filtered along the first and the last axis. All of it stays in the second-level cache, in float64, and
no intermediate volume exists. Rows without a voxel of a region are left out.

Arrays are handed on whole, with unsigned offsets: a slice would cost two atomic counts of its references, a signed
offset the test for counting from the end, and either keeps the compiler from using vector instructions.
"""

from __future__ import annotations

import numpy as np

from pipelines.metrics.jit import njit

HALF = 5  # voxels on either side of the centre; shorter windows have zero weights at their ends
WIDTH = 64
TILE = WIDTH - 2 * HALF
STRIP = 8
BLOCK = 24  # planes filtered along the first axis between two moves of the ring
ROW = 4 * WIDTH + 8  # the four products of a row; not a power of two, so that rows do not compete for cache sets
PLANE = STRIP * ROW

U = np.uint64
ONE, TWO, THREE, FOUR, FIVE = U(1), U(2), U(3), U(4), U(5)
SIX, SEVEN, EIGHT, NINE, TEN = U(6), U(7), U(8), U(9), U(10)
ELEVEN, TWELVE, THIRTEEN = U(11), U(12), U(13)
W, R, P, T = U(WIDTH), U(ROW), U(PLANE), U(TILE)


@njit(nogil=True, cache=True, error_model="numpy")
def _multiply(first, f, second, s, plane, p):  # type: ignore[no-untyped-def]
    """x, y, x^2 + y^2 and xy of ``WIDTH`` voxels."""
    for i in range(W):
        x, y = np.float64(first[f + i]), np.float64(second[s + i])
        plane[p + i] = x
        plane[p + W + i] = y
        plane[p + TWO * W + i] = x * x + y * y
        plane[p + THREE * W + i] = x * y


@njit(nogil=True, cache=True, error_model="numpy")
def _load_rows(first, second, shape, z, y, x, n, n_rows, edge, plane, p):  # type: ignore[no-untyped-def]
    """Products of ``n`` voxels from (z, y, x) and of the rows below; 0 outside of the image, where the weight is 0."""
    left, right = max(0, -x), min(n, shape[2] - x)
    whole = x >= 0 and x + WIDTH <= shape[2]
    edge[:] = 0
    for row in range(n_rows):
        start = (z * shape[1] + y + row) * shape[2] + x
        o = p + U(row) * R
        if not (0 <= z < shape[0] and 0 <= y + row < shape[1]):
            for i in range(R):
                plane[o + i] = 0.0
        elif whole:
            _multiply(first, U(start), second, U(start), plane, o)
        else:
            for i in range(U(right - left)):
                edge[U(left) + i] = first[U(start + left) + i]
                edge[W + U(left) + i] = second[U(start + left) + i]
            _multiply(edge, U(0), edge, W, plane, o)


@njit(nogil=True, cache=True, error_model="numpy")
def _filter_rows(a, s, target, t, n, w):  # type: ignore[no-untyped-def]
    """Filter across rows, ``n`` values from 11 rows each."""
    w0, w1, w2, w3, w4, w5 = w[0], w[1], w[2], w[3], w[4], w[5]
    for k in range(n):
        i = s + k
        target[t + k] = (
            w0 * (a[i] + a[i + TEN * R])
            + w1 * (a[i + R] + a[i + NINE * R])
            + w2 * (a[i + TWO * R] + a[i + EIGHT * R])
            + w3 * (a[i + THREE * R] + a[i + SEVEN * R])
            + w4 * (a[i + FOUR * R] + a[i + SIX * R])
            + w5 * a[i + FIVE * R]
        )


@njit(nogil=True, cache=True, error_model="numpy")
def _filter_planes(a, s, target, w):  # type: ignore[no-untyped-def]
    """Filter one row across 14 planes into 4: each value is loaded once for the four windows that need it."""
    w0, w1, w2, w3, w4, w5 = w[0], w[1], w[2], w[3], w[4], w[5]
    for k in range(R):
        i = s + k
        p0, p1, p2, p3, p4 = a[i], a[i + P], a[i + TWO * P], a[i + THREE * P], a[i + FOUR * P]
        p5, p6, p7, p8 = a[i + FIVE * P], a[i + SIX * P], a[i + SEVEN * P], a[i + EIGHT * P]
        p9, p10, p11 = a[i + NINE * P], a[i + TEN * P], a[i + ELEVEN * P]
        p12, p13 = a[i + TWELVE * P], a[i + THIRTEEN * P]
        target[k] = w0 * (p0 + p10) + w1 * (p1 + p9) + w2 * (p2 + p8) + w3 * (p3 + p7) + w4 * (p4 + p6) + w5 * p5
        target[k + R] = w0 * (p1 + p11) + w1 * (p2 + p10) + w2 * (p3 + p9) + w3 * (p4 + p8) + w4 * (p5 + p7) + w5 * p6
        target[k + TWO * R] = (
            w0 * (p2 + p12) + w1 * (p3 + p11) + w2 * (p4 + p10) + w3 * (p5 + p9) + w4 * (p6 + p8) + w5 * p7
        )
        target[k + THREE * R] = (
            w0 * (p3 + p13) + w1 * (p4 + p12) + w2 * (p5 + p11) + w3 * (p6 + p10) + w4 * (p7 + p9) + w5 * p8
        )


@njit(nogil=True, cache=True, error_model="numpy")
def _filter_along(a, target, w):  # type: ignore[no-untyped-def]
    """Filter four rows of four products along the row; values that mix two products are never read."""
    w0, w1, w2, w3, w4, w5 = w[0], w[1], w[2], w[3], w[4], w[5]
    for i in range(FOUR * R - TEN):
        target[i] = (
            w0 * (a[i] + a[i + TEN])
            + w1 * (a[i + ONE] + a[i + NINE])
            + w2 * (a[i + TWO] + a[i + EIGHT])
            + w3 * (a[i + THREE] + a[i + SEVEN])
            + w4 * (a[i + FOUR] + a[i + SIX])
            + w5 * a[i + FIVE]
        )


@njit(nogil=True, cache=True, error_model="numpy")
def _similarity(a, s, c1, c2, out):  # type: ignore[no-untyped-def]
    """SSIM of ``TILE`` voxels, then their contrast-structure term."""
    for k in range(T):
        i = s + k
        mean_x, mean_y = a[i], a[i + W]
        product, squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
        above, below = 2 * (a[i + THREE * W] - product) + c2, a[i + TWO * W] - squares + c2
        share = above / (below * (squares + c1))  # one division serves both
        out[k] = share * (2 * product + c1)
        out[k + T] = share * (squares + c1)


@njit(nogil=True, cache=True)
def _add_selected(codes, c, n, out, bit, lanes, s):  # type: ignore[no-untyped-def]
    """One sum per place in the row, so that the additions of a row do not wait for each other."""
    for i in range(n):
        selected = codes[c + i] & bit
        lanes[s + i] += out[i] if selected else 0.0
    for i in range(n):
        selected = codes[c + i] & bit
        lanes[s + T + i] += out[T + i] if selected else 0.0


@njit(nogil=True, cache=True)
def _any_selected(codes, c, n):  # type: ignore[no-untyped-def]
    seen = np.uint8(0)
    for i in range(n):
        seen |= codes[c + i]
    return seen != 0


@njit(nogil=True, cache=True)
def _close_sums(lanes, sums):  # type: ignore[no-untyped-def]
    """Add up the lanes of each region into ``sums`` (regions, 2) and clear them."""
    for k in range(2 * sums.shape[0]):
        sums[k // 2, k % 2] = lanes[k * TILE : (k + 1) * TILE].sum()
    lanes[:] = 0.0


@njit(nogil=True, cache=True)
def ssim_tiles(first, second, shape, codes, low, high, weights, c1, c2, start, step, sums, maps):  # type: ignore[no-untyped-def]
    """SSIM and contrast-structure of every ``step``-th tile of a box, summed per region.

    Args:
        first: an image of ``shape`` (Z, Y, X), flat, float32 or float64.
        second: the other one.
        shape: three integers.
        codes: uint8, one value per voxel of the box, flat: bit r is set in region r.
        low: first voxel of the box along each axis; windows with weights that are not 0 must lie inside the image.
        high: the voxel after its last along each axis.
        weights: float64 (3, 6): half of the symmetric window of each axis, from its end to its centre.
        c1: constant of the luminance term.
        c2: constant of the contrast-structure term.
        start: the first tile.
        step: from tile to tile.
        sums: float64 (tiles, regions, 2): receives SSIM and contrast-structure.
        maps: float64 (2, voxels of the box): receives both, in rows that hold a voxel of a region; (2, 0) for none.
    """
    depth, height, width = high[0] - low[0], high[1] - low[1], high[2] - low[2]
    plane = np.zeros((STRIP + 2 * HALF) * ROW)
    ring = np.zeros((BLOCK + 2 * HALF) * PLANE)
    edge = np.empty(2 * WIDTH, first.dtype)
    rows, filtered, out = np.zeros(4 * ROW), np.zeros(4 * ROW), np.zeros(2 * TILE)
    across_z, across_y, across_x = weights[0], weights[1], weights[2]
    lanes = np.zeros(sums.shape[1] * 2 * TILE)
    active = np.zeros((depth, STRIP), np.bool_)  # does the row of an output plane hold a region's voxel?
    top, bottom = np.zeros(depth, np.int64), np.zeros(depth, np.int64)  # from and to such rows, of each output plane
    columns = (width + TILE - 1) // TILE
    for tile in range(start, sums.shape[0], step):
        y0, x0 = tile // columns * STRIP, tile % columns * TILE
        ny, nx = min(STRIP, height - y0), min(TILE, width - x0)
        seen = False
        for z in range(depth):
            top[z], bottom[z] = STRIP, 0
            for r in range(ny):
                active[z, r] = _any_selected(codes, U((z * height + y0 + r) * width + x0), U(nx))
                if active[z, r]:
                    top[z], bottom[z], seen = min(top[z], r), r + 1, True
        if not seen:
            continue
        for block in range(-2 * HALF, depth, BLOCK):
            n = min(BLOCK, depth - block)
            for k in range(n):
                z = block + 2 * HALF + k  # counted from HALF planes before the box
                r0, r1 = STRIP, 0
                for user in range(max(0, z - 2 * HALF), min(z, depth - 1) + 1):
                    r0, r1 = min(r0, top[user]), max(r1, bottom[user])
                if r0 < r1:
                    zi, yi, xi = low[0] + z - HALF, low[1] + y0 + r0 - HALF, low[2] + x0 - HALF
                    n_rows, p = r1 - r0 + 2 * HALF, U(r0 * ROW)
                    _load_rows(first, second, shape, zi, yi, xi, nx + 2 * HALF, n_rows, edge, plane, p)
                    _filter_rows(plane, p, ring, U((2 * HALF + k) * PLANE) + p, U((r1 - r0) * ROW), across_y)
            for k in range(0, n, 4):
                z0, z1 = max(0, block + k), min(block + k + 4, depth)
                for r in range(ny):
                    wanted = False
                    for z in range(z0, z1):
                        wanted |= active[z, r]
                    if not wanted:
                        continue
                    _filter_planes(ring, U(k * PLANE + r * ROW), rows, across_z)
                    _filter_along(rows, filtered, across_x)
                    for z in range(z0, z1):
                        if active[z, r]:
                            _similarity(filtered, U((z - block - k) * ROW), c1, c2, out)
                            c = (z * height + y0 + r) * width + x0
                            for g in range(sums.shape[1]):
                                _add_selected(codes, U(c), U(nx), out, np.uint8(1 << g), lanes, U(g * 2 * TILE))
                            if maps.shape[1]:
                                for i in range(nx):
                                    maps[0, c + i], maps[1, c + i] = out[i], out[TILE + i]
            for i in range(2 * HALF * PLANE):
                ring[i] = ring[i + n * PLANE]
        _close_sums(lanes, sums[tile])


@njit(nogil=True, cache=True)
def _differences(first, second, f, n, out):  # type: ignore[no-untyped-def]
    for i in range(n):
        difference = np.float64(first[f + i]) - np.float64(second[f + i])
        out[i] = abs(difference)
        out[T + i] = difference * difference


@njit(nogil=True, cache=True)
def error_planes(first, second, shape, codes, low, high, start, step, sums):  # type: ignore[no-untyped-def]
    """Absolute and squared differences in every ``step``-th plane of a box, summed per region.

    The arguments are those of :func:`ssim_tiles`; ``sums`` is float64 (planes, regions, 2).
    """
    depth, height, width = high[0] - low[0], high[1] - low[1], high[2] - low[2]
    out, lanes = np.zeros(2 * TILE), np.zeros(sums.shape[1] * 2 * TILE)
    for z in range(start, depth, step):
        for y in range(height):
            for x in range(0, width, TILE):
                n, c = U(min(TILE, width - x)), U((z * height + y) * width + x)
                if _any_selected(codes, c, n):
                    f = ((low[0] + z) * shape[1] + low[1] + y) * shape[2] + low[2] + x
                    _differences(first, second, U(f), n, out)
                    for g in range(sums.shape[1]):
                        _add_selected(codes, c, n, out, np.uint8(1 << g), lanes, U(g * 2 * TILE))
        _close_sums(lanes, sums[z])
