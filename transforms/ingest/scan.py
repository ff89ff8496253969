"""NIfTI as an ``ImageFile``; the checks themselves are in ``transforms.nifti``."""

from __future__ import annotations

import numpy as np

from transforms.ingest.image import ImageFile, Request
from transforms.nifti import read_stored


def read(request: Request) -> ImageFile:
    """Read a ``.nii`` or ``.nii.gz``: voxels (x, y, z) or (x, y, z, c), scaled by the header."""
    header, voxels = read_stored(
        request.path, request.where, request.budget, lambda: request.drained(request.path.parent, [request.path])
    )
    values = voxels[..., 0] if header.channels == 1 else voxels
    native = np.asarray(values, dtype=values.dtype.newbyteorder("="))
    axes = "xyz" if header.channels == 1 else "xyzc"
    return ImageFile(header.path, "nifti", native, axes, header.affine, header.spacing, "mm")
