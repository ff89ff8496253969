"""Compiled kernel for the definition "surface": distances from points to the nearest of a few triangles each.

Only :mod:`pipelines.metrics.surface` calls it, and only where Numba is there.
"""

from __future__ import annotations

import numpy as np

from pipelines.metrics.jit import njit


@njit(cache=True, nogil=True)
def squared_to_segment(px, py, pz, x, y, z):  # type: ignore[no-untyped-def]
    """Return the squared distance from a point to the segment between the origin and (x, y, z)."""
    length2 = x * x + y * y + z * z
    share = 0.0
    if length2 > 0:
        share = min(max((px * x + py * y + pz * z) / length2, 0.0), 1.0)
    gx, gy, gz = px - share * x, py - share * y, pz - share * z
    return gx * gx + gy * gy + gz * gz


@njit(cache=True, nogil=True)
def nearest_triangles(points, triangles, near, out):  # type: ignore[no-untyped-def]
    """Write the distance from each of ``points`` (n, 3) to the nearest of its ``near`` (n, k) ``triangles``."""
    for i in range(len(points)):
        best = np.inf
        for k in range(near.shape[1]):
            t = near[i, k]
            ax, ay, az = triangles[t, 0, 0], triangles[t, 0, 1], triangles[t, 0, 2]
            ux, uy, uz = triangles[t, 1, 0] - ax, triangles[t, 1, 1] - ay, triangles[t, 1, 2] - az
            vx, vy, vz = triangles[t, 2, 0] - ax, triangles[t, 2, 1] - ay, triangles[t, 2, 2] - az
            wx, wy, wz = points[i, 0] - ax, points[i, 1] - ay, points[i, 2] - az
            uu, uv, vv = ux * ux + uy * uy + uz * uz, ux * vx + uy * vy + uz * vz, vx * vx + vy * vy + vz * vz
            uw, vw = ux * wx + uy * wy + uz * wz, vx * wx + vy * wy + vz * wz
            # Barycentric coordinates of the foot of the perpendicular, times the determinant.
            determinant = uu * vv - uv * uv
            a, b = vv * uw - uv * vw, uu * vw - uv * uw
            if a > 0 and b > 0 and a + b < determinant:
                height = wx * (uy * vz - uz * vy) + wy * (uz * vx - ux * vz) + wz * (ux * vy - uy * vx)
                best = min(best, height * height / determinant)
            else:
                best = min(best, squared_to_segment(wx, wy, wz, ux, uy, uz))
                best = min(best, squared_to_segment(wx, wy, wz, vx, vy, vz))
                best = min(best, squared_to_segment(wx - ux, wy - uy, wz - uz, vx - ux, vy - uy, vz - uz))
        out[i] = np.sqrt(best)
