"""Pictures of the worst cases: image, truth, prediction and difference on the slice of largest error, in three planes.

Each plane is a strip of five panels: the whole slice with a frame, then what is inside of the frame four times. The
frame surrounds the errors of that slice, because a lesion of three voxels cannot be seen on a whole head.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from numpy.typing import NDArray

from pipelines.reports.overlay import grey_window, paint, to_grey, upright
from pipelines.reports.report_data import CaseFiles
from transforms.errors import DataError

PANEL_PX = 168  # width and height of a panel
GAP_PX = 3
PANELS = ("slice", "image", "truth", "prediction", "difference")
AGREE, MISSED, FALSE_ALARM, WRONG_LABEL = 1, 2, 3, 4
DIFFERENCES = {
    AGREE: ("agreement", "#3fbf5a"),
    MISSED: ("missed", "#19b5fe"),
    FALSE_ALARM: ("false alarm", "#ff2fd0"),
    WRONG_LABEL: ("wrong label", "#ffe100"),
}
PLANES = ("sagittal", "coronal", "axial")


@dataclass(frozen=True)
class CaseArrays:
    """A case in RAS+ order: image (X, Y, Z), label maps of its shape, voxel size in mm, chosen slice per axis."""

    image: NDArray[np.float32]
    truth: NDArray[np.int32]
    prediction: NDArray[np.int32]
    spacing_mm: tuple[float, ...]
    slices: tuple[int, ...]


@dataclass(frozen=True)
class PlanePicture:
    """A strip of ``PANELS``: name of the plane, slice index in RAS+ order, JPEG as a data address, size in pixels."""

    plane: str
    index: int
    data: str
    width: int
    height: int


def difference_codes(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return per voxel 0 (background in both), ``AGREE``, ``MISSED``, ``FALSE_ALARM`` or ``WRONG_LABEL``."""
    codes = np.zeros(truth.shape, np.uint8)
    codes[(truth == prediction) & (truth != 0)] = AGREE
    codes[(truth != 0) & (prediction == 0)] = MISSED
    codes[(truth == 0) & (prediction != 0)] = FALSE_ALARM
    codes[(truth != 0) & (prediction != 0) & (truth != prediction)] = WRONG_LABEL
    return codes


def largest_error_slices(
    truth: NDArray[np.integer], prediction: NDArray[np.integer]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return, per axis, the slice with the most wrong voxels, and how many they are.

    Where nothing is wrong: the slice with the most labelled voxels; where nothing is labelled either: the middle one.
    """
    wrong = truth != prediction
    shown = wrong if wrong.any() else truth != 0
    slices, counts = [], []
    for axis in range(truth.ndim):
        others = tuple(a for a in range(truth.ndim) if a != axis)
        per_slice = shown.sum(axis=others)
        index = int(per_slice.argmax()) if per_slice.any() else truth.shape[axis] // 2
        slices.append(index)
        counts.append(int(plane_of(wrong, axis, index).sum()))
    return tuple(slices), tuple(counts)


def sampled_window(image: NDArray[np.floating]) -> tuple[float, float]:
    """Return black and white as ``grey_window``, measured on every n-th voxel of a large volume."""
    return grey_window(image[tuple(slice(None, None, 1 + size // 100) for size in image.shape)])


def plane_of(array: NDArray[Any], axis: int, index: int) -> NDArray[Any]:
    """Return a view of one slice; ``numpy.take`` would copy the whole volume where its memory is not in order."""
    return array[(slice(None),) * axis + (index,)]


def load_arrays(files: CaseFiles) -> CaseArrays:
    """Read a case's three files; a 2D image becomes one slice, a 4D image its channel (the first where none is named).

    Raises:
        DataError: a file is gone, cannot be read, or is not on the image's grid. Names the case and the key, no path:
            folders are called by names of patients sometimes, and a report travels.
    """
    image = _open(files.image, files.case, "image")
    voxels = np.nan_to_num(_volume(image, files.channel or 0, files.case, "image").astype(np.float32))
    labels = []
    for key, path in (("reference", files.reference), ("prediction", files.prediction)):
        label = _whole_numbers(_volume(_open(path, files.case, key), 0, files.case, key))
        if label.shape != voxels.shape:
            raise _unreadable(files.case, key, f"shape {label.shape}, the image has {voxels.shape}")
        labels.append(label)
    if files.label_values:
        labels[0] = _with_ids(labels[0], files.label_values)
    orientation = nib.io_orientation(image.affine)
    slices = (*files.slices, 0, 0, 0)[:3]
    turned = [nib.orientations.apply_orientation(array, orientation) for array in (voxels, *labels)]
    spacing, chosen = [0.0] * 3, [0] * 3
    sizes = nib.affines.voxel_sizes(image.affine)
    for axis, (target, direction) in enumerate(orientation.astype(int)):
        index = min(slices[axis], voxels.shape[axis] - 1)
        spacing[target] = float(sizes[axis])
        chosen[target] = index if direction == 1 else voxels.shape[axis] - 1 - index
    return CaseArrays(turned[0], turned[1], turned[2], tuple(spacing), tuple(chosen))


def case_pictures(case: CaseArrays, colours: Mapping[int, str]) -> list[PlanePicture]:
    """Return one strip per plane; a single one for an image of one slice.

    Args:
        case: of ``load_arrays``.
        colours: ``#rrggbb`` per label id.
    """
    window = sampled_window(case.image)
    flat = [axis for axis in range(3) if case.image.shape[axis] == 1]
    pictures = []
    for axis in flat[:1] or range(3):
        index = case.slices[axis]
        image, truth, prediction = (
            upright(plane_of(array, axis, index)) for array in (case.image, case.truth, case.prediction)
        )
        difference = difference_codes(truth, prediction)
        across, up = (size for a, size in enumerate(case.spacing_mm) if a != axis)
        strip = _strip(to_grey(image, window), truth, prediction, difference, colours, (up, across))
        name = "image" if flat else PLANES[axis]
        pictures.append(PlanePicture(name, index, jpeg_address(strip), strip.shape[1], strip.shape[0]))
    return pictures


def jpeg_address(picture: NDArray[np.floating]) -> str:
    """Return RGB (rows, columns, 3) in [0, 1] as a JPEG inside of a ``data:`` address."""
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    rgb = np.ascontiguousarray(np.rint(255 * picture)).astype(np.uint8)
    imsave(buffer, rgb, format="jpg", pil_kwargs={"quality": 85, "subsampling": 0})
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _strip(
    grey: NDArray[np.float32],
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    difference: NDArray[np.integer],
    colours: Mapping[int, str],
    pixel_mm: tuple[float, float],
) -> NDArray[np.float32]:
    box = zoom_box(difference, pixel_mm)
    inside = grey[box]
    shades = {code: colour for code, (_, colour) in DIFFERENCES.items()}
    zoomed = [
        inside,
        paint(inside, truth[box], colours),
        paint(inside, prediction[box], colours),
        paint(inside, difference[box], shades),
    ]
    whole = fit(grey, pixel_mm, PANEL_PX)
    _draw_frame(whole, box, grey.shape[:2], pixel_mm)
    panels = [whole, *(fit(panel, pixel_mm, PANEL_PX) for panel in zoomed)]
    gap = np.ones((PANEL_PX, GAP_PX, 3), np.float32)
    return np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=1)


def zoom_box(difference: NDArray[np.integer], pixel_mm: tuple[float, float]) -> tuple[slice, slice]:
    """Return the part of a slice to enlarge: a square (mm) around its errors, else around its labels, else all of it.

    It is at least 30 % as wide as the shorter side of the slice, and never reaches beyond the slice.
    """
    wrong = difference > AGREE
    shown = wrong if wrong.any() else difference > 0
    if not shown.any():
        return slice(None), slice(None)
    extents = [np.flatnonzero(shown.any(axis=1 - axis)) for axis in range(2)]
    sides_mm = [size * mm for size, mm in zip(difference.shape, pixel_mm, strict=True)]
    side_mm = max(1.5 * (hits[-1] - hits[0] + 1) * mm for hits, mm in zip(extents, pixel_mm, strict=True))
    side_mm = max(side_mm, 0.3 * min(sides_mm))
    box = []
    for hits, mm, size in zip(extents, pixel_mm, difference.shape, strict=True):
        length = min(max(round(side_mm / mm), 1), size)
        start = min(max(round((hits[0] + hits[-1] + 1 - length) / 2), 0), size - length)
        box.append(slice(start, start + length))
    return box[0], box[1]


def fit(rgb: NDArray[np.float32], pixel_mm: tuple[float, float], size: int) -> NDArray[np.float32]:
    """Return a picture (rows, columns, 3) scaled to true proportions into a black square of ``size`` pixels.

    Enlarged by whole voxels, reduced by the mean of the voxels: small labels fade, they do not disappear.
    """
    rows, columns, (top, left) = _placed(rgb.shape[:2], pixel_mm, size)
    finer = [max(1, -(-have // want)) for have, want in zip(rgb.shape[:2], (rows, columns), strict=True)]
    picks = [
        ((np.arange(want * k) + 0.5) * have / (want * k)).astype(int)
        for have, want, k in zip(rgb.shape[:2], (rows, columns), finer, strict=True)
    ]
    sampled = rgb[picks[0]][:, picks[1]]
    scaled = sampled.reshape(rows, finer[0], columns, finer[1], 3).mean(axis=(1, 3))
    square = np.zeros((size, size, 3), np.float32)
    square[top : top + rows, left : left + columns] = scaled
    return square


def _placed(shape: tuple[int, ...], pixel_mm: tuple[float, float], size: int) -> tuple[int, int, tuple[int, int]]:
    """Return rows, columns and the top left corner of a picture inside of a square panel."""
    height, width = shape[0] * pixel_mm[0], shape[1] * pixel_mm[1]
    scale = size / max(height, width)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return rows, columns, ((size - rows) // 2, (size - columns) // 2)


def _draw_frame(
    panel: NDArray[np.float32], box: tuple[slice, slice], shape: tuple[int, ...], pixel_mm: tuple[float, float]
) -> None:
    rows, columns, corner = _placed(shape, pixel_mm, panel.shape[0])
    edges = []
    for part, have, want, start in zip(box, shape, (rows, columns), corner, strict=True):
        first, last, _ = part.indices(have)
        edges.append((start + int(first * want / have), start + max(int(last * want / have) - 1, 0)))
    (top, bottom), (left, right) = edges
    yellow = np.array([0.94, 0.89, 0.26], np.float32)
    panel[[top, bottom], left : right + 1] = yellow
    panel[top : bottom + 1, [left, right]] = yellow


def _open(path: Path, case: str, key: str) -> nib.spatialimages.SpatialImage:
    if not path.is_file():
        raise DataError(f"case {case}: its {key} is gone", "metrics/cases.json says where it was", "put it back")
    try:
        return nib.load(path)
    except (OSError, ImageFileError) as problem:
        raise _unreadable(case, key, type(problem).__name__) from problem


def _volume(image: nib.spatialimages.SpatialImage, channel: int, case: str, key: str) -> NDArray[np.floating]:
    """Return (X, Y, Z) of an image with two to four axes."""
    shape = image.shape
    try:
        if len(shape) == 2:
            return np.asarray(image.dataobj)[..., None]
        if len(shape) == 3:
            return np.asarray(image.dataobj)
        return np.asarray(image.dataobj[..., channel]).reshape(shape[:3])
    except Exception as problem:  # whatever a damaged stream makes nibabel, gzip or zlib raise
        raise _unreadable(case, key, type(problem).__name__) from problem


def _whole_numbers(values: NDArray[Any]) -> NDArray[np.int32]:
    return (values if values.dtype.kind in "iu" else np.rint(values)).astype(np.int32)


def _with_ids(values: NDArray[np.int32], table: Mapping[int, int]) -> NDArray[np.int32]:
    ids = np.zeros_like(values)
    for value, label in table.items():
        ids[values == value] = label
    return ids


def _unreadable(case: str, key: str, why: str) -> DataError:
    return DataError(f"case {case}: its {key} cannot be shown", why, "see metrics/cases.json for the file")
