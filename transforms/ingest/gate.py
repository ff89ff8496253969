"""The gate: from a path to an image that is proven sound, or a refusal in three lines.

The order is fixed, cheap before expensive: size on disk; what the header declares against the budget; every byte read,
to the checksum where the format has one; the digest of the manifest; data type, axes, affine, spacing; finite values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transforms.errors import DataError, FiducialError
from transforms.ingest.image import ImageFile, Kind, Request
from transforms.ingest_budget import Budget
from transforms.ingest_checks import check_finite, check_range, check_real, label_ids
from transforms.ingest_stream import check_digest, named, reading

ENDINGS: Mapping[str, Kind] = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".png": "png",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".npz": "npz",
    ".zarr": "zarr",
}
# Imported when a file asks for it: a data set of scans need not wait for Zarr.
_READERS: Mapping[Kind, str] = {
    "nifti": "transforms.ingest.scan",
    "nrrd": "transforms.ingest.nrrd",
    "png": "transforms.ingest.png",
    "tiff": "transforms.ingest.tiff",
    "npz": "transforms.ingest.npz",
    "zarr": "transforms.ingest.store",
}


def read_image(
    path: str | Path,
    part: str | None = None,
    *,
    budget: Budget | None = None,
    sha256: str | None = None,
    sparse: bool = False,
    case: str = "",
    key: str = "",
) -> ImageFile:
    """Read an image of any known format through every check.

    Args:
        path: NIfTI, NRRD, PNG, TIFF or NPZ file, or the folder of a Zarr array or OME-Zarr group, known by its ending.
        part: which array of an NPZ archive or of a Zarr group; may be left out where there is only one, and means the
            finest resolution of an OME-Zarr image.
        budget: limits; by default ``Budget.of_environment()``.
        sha256: digest that the image must have (``ingest_stream.content_digest``). Only this detects a changed byte in
            formats without a checksum: uncompressed NIfTI, NRRD and TIFF, LZW, raw and Blosc chunks.
        sparse: take a chunk that a Zarr store does not have for its fill value, instead of refusing it as missing.
        case: case id for the message.
        key: what the image is in that case, for the message.

    Raises:
        DataError: the image cannot be used; the message names file, case and key, what was found and what to do.
        ResourceError: an image within the budget does not fit into the memory.
    """
    file, where = Path(path), named(path, case, key)

    def drained(root: Path, files: list[Path]) -> None:
        if sha256 is not None:
            check_digest(files, root, sha256, where)

    kind = _kind(file, where)
    request = Request(file, where, part, budget or Budget.of_environment(), sparse, drained)
    image = _guarded(import_module(_READERS[kind]).read, request)
    check_real(image.voxels.dtype, where)
    check_finite(image.voxels, where)
    check_range(image.voxels, where)
    return image


def read_label_image(
    path: str | Path, value_to_id: Mapping[int, int] | None = None, part: str | None = None, **options: Any
) -> tuple[ImageFile, NDArray[np.integer[Any]]]:
    """Read a label map of any known format; return the image and its label ids (uint8, or int16), of the same shape.

    Args:
        path, part, options: as for ``read_image``.
        value_to_id: label id for every value that may occur, 0 included; None keeps the values. The values of a picture
            with a palette are its indices.

    Raises:
        DataError: as ``read_image``; values that are no integers, unknown to ``value_to_id``, or beyond int16.
    """
    image = read_image(path, part, **options)
    where = named(path, options.get("case", ""), options.get("key", ""))
    return image, label_ids(image.voxels, value_to_id, where)


def _kind(path: Path, where: str) -> Kind:
    name = path.name.lower()
    for ending, kind in sorted(ENDINGS.items(), key=lambda item: -len(item[0])):
        if name.endswith(ending):
            return kind
    raise DataError(
        where, f"unknown ending, expected one of {', '.join(ENDINGS)}", "convert the image, or give it its true ending"
    )


def _guarded(read: Callable[[Request], ImageFile], request: Request) -> ImageFile:
    """Call a reader; whatever a library raises over bytes that nobody foresaw is a refusal, too."""
    try:
        with reading(request.where):
            return read(request)
    except FiducialError:
        raise
    except (Exception, RecursionError) as error:
        raise DataError(
            request.where,
            f"the file cannot be decoded: {type(error).__name__}: {error}",
            "open it with the program that wrote it and save it again",
        ) from error
