"""Whether the metric kernels are compiled by Numba, and Numba's names for them.

Every metric has two paths with equal values: kernels of Numba (``HAVE_NUMBA``), and vectorised NumPy and SciPy. The
second is taken where Numba cannot be imported, or with ``FIDUCIAL_NUMBA=0`` in the environment. A module with kernels
is imported only where ``HAVE_NUMBA`` is true: interpreted loops over voxels are not a path.
"""

from __future__ import annotations

import os

HAVE_NUMBA = os.environ.get("FIDUCIAL_NUMBA", "1") != "0"
"""True where the kernels of Numba are used; a test may set it to False in the module that asks."""

if HAVE_NUMBA:
    try:
        from numba import njit
    except ImportError:
        HAVE_NUMBA = False

__all__ = ["HAVE_NUMBA", "njit"]
