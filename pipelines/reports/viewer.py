"""A case to click through in three planes, as one page without any other file: nilearn's viewer, made offline."""

from __future__ import annotations

import re
from importlib.util import find_spec

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from pipelines.reports.gallery import AGREE, DIFFERENCES, CaseArrays, difference_codes, sampled_window

LONGEST_AXIS = 128  # voxels of the viewer; its page grows with the volume, about 2 MB at 100 x 118 x 103
MISSING = "nilearn is not installed, so no case can be clicked through: pip install 'fiducial[demo]'."
_LINK = re.compile(r"<link\b[^>]*>", re.DOTALL)  # nilearn's page asks GitHub for its icon


def viewer_available() -> bool:
    """Return whether nilearn is installed."""
    return find_spec("nilearn") is not None


def viewer_page(case: CaseArrays) -> tuple[str, tuple[int, int, int]] | None:
    """Return a page (HTML) with the image and the difference of truth and prediction, and by what each axis is reduced.

    Longer axes than ``LONGEST_AXIS`` are reduced in blocks: the image by its mean, the difference by its largest code,
    so that no error disappears. None for an image of one slice, or without any labelled voxel.
    """
    from matplotlib.colors import ListedColormap
    from nilearn.plotting import view_img

    codes = difference_codes(case.truth, case.prediction)
    if min(case.image.shape) == 1 or not codes.any():
        return None
    factors = (f0, f1, f2) = tuple(-(-size // LONGEST_AXIS) for size in case.image.shape)
    blocks = _blocks(case.image, factors).mean(axis=(1, 3, 5))
    errors = _blocks(codes, factors).max(axis=(1, 3, 5))
    affine = np.diag([*(mm * factor for mm, factor in zip(case.spacing_mm, factors, strict=True)), 1.0])
    cut = [index // factor * affine[i, i] for i, (index, factor) in enumerate(zip(case.slices, factors, strict=True))]
    low, high = sampled_window(case.image)
    view = view_img(
        nib.Nifti1Image(errors.astype(np.float32), affine),
        bg_img=nib.Nifti1Image(np.clip(blocks, low, high).astype(np.float32), affine),
        cut_coords=cut,
        cmap=ListedColormap([colour for _, colour in DIFFERENCES.values()]),
        symmetric_cmap=False,
        vmin=AGREE - 0.5,
        vmax=max(DIFFERENCES) + 0.5,
        threshold=AGREE - 0.5,
        resampling_interpolation="nearest",
        colorbar=False,
        black_bg=True,
        dim=0,
        opacity=0.7,
        title=None,
    )
    return _LINK.sub("", view.get_standalone()), (f0, f1, f2)


def _blocks(array: NDArray, factors: tuple[int, ...]) -> NDArray:
    """Return a volume as (X/f, f, Y/f, f, Z/f, f), its last voxels repeated where the size does not divide."""
    padded = np.pad(array, [(0, -size % factor) for size, factor in zip(array.shape, factors, strict=True)], "edge")
    shape = [n for size, factor in zip(padded.shape, factors, strict=True) for n in (size // factor, factor)]
    return padded.reshape(shape)
