"""An image as any of the readers returns it, and what a reader is asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from transforms.ingest_budget import Budget

Kind = Literal["nifti", "nrrd", "png", "tiff", "npz", "zarr"]
SPATIAL = "zyx"


@dataclass(frozen=True)
class Request:
    """One image to read.

    Attributes:
        path: file or folder.
        where: path, case and key for the first line of a message.
        part: name of an array in an archive, path of an array in a store, or None for the only or the finest one.
        budget: limits of the file.
        sparse: a chunk that a store does not have stands for the fill value; otherwise it is missing.
        drained: a reader calls it with the folder and the files that make up the image, once their bytes are proven
            complete and before their values are looked at.
    """

    path: Path
    where: str
    part: str | None
    budget: Budget
    sparse: bool
    drained: Callable[[Path, list[Path]], None]


@dataclass(frozen=True, eq=False)
class ImageFile:
    """An image that has passed every check of the gate.

    Attributes:
        path: file or folder, with the part of it that was read, for messages.
        kind: format.
        voxels: real numbers, all finite, native byte order; of the stored data type unless the format scales them.
        axes: one letter per axis of ``voxels``: x, y and z in space, c for channels, t for time; empty where the format
            names none (NPZ, and Zarr without OME metadata). Scans are "xyz" or "xyzc"; pictures "yx", "yxc", "zyx" ...
        affine: (n + 1, n + 1) float64, from the index along the n axes in space, in the order of ``axes``, to ``unit``;
            for scans the world is RAS+. None where the format says nothing about it.
        spacing: voxel size along the axes in space, in ``unit``; None where the format says nothing about it. The
            resolution of PNG and TIFF is for printers and is not taken for one.
        unit: "mm" for scans, else as the file names it; empty where it names none.
    """

    path: str
    kind: Kind
    voxels: NDArray[Any]
    axes: str = ""
    affine: NDArray[np.float64] | None = None
    spacing: tuple[float, ...] | None = None
    unit: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes along the axes in space; all axes where the format names none."""
        if not self.axes:
            return self.voxels.shape
        return tuple(n for n, axis in zip(self.voxels.shape, self.axes, strict=True) if axis in SPATIAL)
