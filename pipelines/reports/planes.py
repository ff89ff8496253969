"""Volumes side by side in the three planes through their middle: a picture that a radiologist can judge at once."""

from __future__ import annotations

import io
from collections.abc import Mapping

import nibabel as nib
import numpy as np

from pipelines.reports.overlay import grey_window, to_grey, upright

PLANES = ("sagittal", "coronal", "axial")  # by the axis of a RAS volume that they are perpendicular to


def three_planes(
    volumes: Mapping[str, np.ndarray],
    affine: np.ndarray,
    title: str,
    windows: Mapping[str, tuple[float, float]] | None = None,
) -> bytes:
    """Return a PNG: one row per plane through the middle, one column per volume.

    Args:
        volumes: name -> (X, Y, Z), all on one grid.
        affine: of the grid, for the orientation and the voxel sizes.
        title: above all.
        windows: name -> what is black and what is white; the 1st and the 99.5th percentile for a volume without one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(volumes), 9.4), dpi=90, facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PLANES), len(volumes), squeeze=False)
    for column, (name, volume) in enumerate(volumes.items()):
        upright_head = nib.as_closest_canonical(nib.Nifti1Image(volume.astype(np.float32), affine))
        voxels, spacing = np.asarray(upright_head.dataobj), upright_head.header.get_zooms()
        window = (windows or {}).get(name) or grey_window(voxels)
        for axis, plane in enumerate(PLANES):
            across, up = (mm for index, mm in enumerate(spacing) if index != axis)
            picture = to_grey(upright(np.take(voxels, voxels.shape[axis] // 2, axis)), window)
            axes[axis, column].imshow(picture, aspect=up / across)
            axes[axis, column].set_title(f"{name}, {plane}", color="white", fontsize=9)
            axes[axis, column].set_axis_off()
    figure.suptitle(title, color="white", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="black")
    return buffer.getvalue()
