"""How much a file may cost before anybody decodes it: bytes on disk, voxels and bytes that its header declares.

A header of 352 bytes can ask for all the memory of a machine, and 1.6 MB of gzip can hold 1.7 thousand million voxels.
So every reader first asks the disk how large the file is, then the header how large the image is, and refuses what
exceeds a ``Budget`` before it allocates or inflates anything. Whoever has larger sound files raises a limit by name, in
the environment: ``FIDUCIAL_MAX_VOXELS``, ``FIDUCIAL_MAX_VOXEL_BYTES`` and so on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

from transforms.errors import DataError, UsageError

_PREFIX = "FIDUCIAL_MAX_"


@dataclass(frozen=True)
class Budget:
    """Upper limits for one image.

    Attributes:
        file_bytes: size on disk; of all files together where an image is a folder.
        voxels: number of values that the header declares, channels included.
        voxel_bytes: bytes of these values as stored, uncompressed. Reading needs two to three times as much.
        metadata_bytes: header extensions, text headers, and the metadata of one node of a store.
        files: files of a store.
    """

    file_bytes: int = 8 * 2**30
    voxels: int = 2**30
    voxel_bytes: int = 4 * 2**30
    metadata_bytes: int = 16 * 2**20
    files: int = 2**18

    @classmethod
    def of_environment(cls) -> Self:
        """Return the default limits, each replaced by its environment variable (``FIDUCIAL_MAX_VOXELS`` ...) if set.

        Raises:
            UsageError: a variable that is no positive whole number.
        """
        chosen = {}
        for field in fields(cls):
            name = variable(field.name)
            text = os.environ.get(name, "").strip()
            if not text:
                continue
            if not text.isdecimal() or int(text) < 1:
                raise UsageError(f"environment variable {name}", f"found {text!r}, expected a whole number", "set it")
            chosen[field.name] = int(text)
        return cls(**chosen)


def variable(limit: str) -> str:
    """Return the environment variable that raises a limit."""
    return _PREFIX + limit.upper()


def check_file_size(size: int, where: str, budget: Budget) -> None:
    """Raise a ``DataError`` where ``size`` bytes on disk exceed the budget."""
    if size > budget.file_bytes:
        raise DataError(
            where,
            f"the file has {size} bytes, more than the budget of {budget.file_bytes}",
            f"check the file; if it is sound, raise {variable('file_bytes')}",
        )


def check_metadata_size(size: int, where: str, budget: Budget, what: str = "the header") -> None:
    """Raise a ``DataError`` where ``size`` bytes of metadata exceed the budget."""
    if size > budget.metadata_bytes:
        raise DataError(
            where,
            f"{what} has {size} bytes, more than the budget of {budget.metadata_bytes}",
            f"check the file; if it is sound, raise {variable('metadata_bytes')}",
        )


def check_declared(shape: Sequence[int], itemsize: int, where: str, budget: Budget) -> int:
    """Return the bytes of an image of ``shape`` (channels included) with ``itemsize`` bytes per value.

    Raises:
        DataError: more voxels or more bytes than the budget.
    """
    voxels = math.prod(shape)  # Python's integers do not overflow, whatever the header declares
    for count, unit, limit in ((voxels, "voxels", "voxels"), (voxels * itemsize, "bytes of voxels", "voxel_bytes")):
        if count > getattr(budget, limit):
            raise DataError(
                where,
                f"the header declares {count} {unit}, more than the budget of {getattr(budget, limit)}",
                f"correct the header, or crop or resample the image; if it is sound, raise {variable(limit)}",
            )
    return voxels * itemsize
