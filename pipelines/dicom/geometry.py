"""The gate: do these slices make one regular volume? A grid in RAS mm, or a refusal that names the defect.

Readers accept series with a slice missing, a slice twice or a tilted gantry without a word, and every lesion then lies
somewhere else than in the patient. Here the positions and orientations of the headers are the only truth (slice
numbers, thickness and the nominal spacing are not), and a series that is no regular volume is refused by the name of
what is wrong. Pure functions on header values; ``DEFECTS`` lists all names, those of pixels and files included.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from transforms.errors import DataError

DEFECTS = {
    "missing slice": "restore the series: send it again from the archive, all slices",
    "uneven gaps": "reconstruct the series with one slice distance, or --dicom_allow_resampling True",
    "duplicate slice": "remove the copies, or send the series again from the archive",
    "several volumes": "give one volume (one echo, one time point, one b-value)",
    "tilted gantry": "reconstruct the series without tilt, or --dicom_allow_resampling True",
    "mixed orientation": "give one orientation per series; localisers are not volumes",
    "mixed spacing": "give one pixel spacing and one matrix per series",
    "mixed frame of reference": "give slices that were acquired in one position of the patient",
    "mixed series": "give one series per Series Instance UID: one study, one modality, one kind of object",
    "different patients": "give images of one patient; if they are, correct the headers in the archive",
    "geometry missing": "give images with position, orientation and pixel spacing in patient coordinates",
    "impossible geometry": "send the series again from the archive; its header is damaged",
    "single slice": "give the complete series",
    "multi-frame": "convert the enhanced object to single-frame images, one file per slice",
    "wrong modality": "give a series of the modality that the bundle was trained for",
    "not a plain image": "give greyscale images of one sample per pixel, no localisers or screen captures",
    "rescale": "send the series again from the archive with its rescale slope and intercept",
    "padding value": "correct the padding value in the headers of the series",
    "pixel format": "give 8 or 16 bit integer pixels, stored from the lowest bit",
    "truncated pixels": "send the series again from the archive",
    "compressed pixels": "decompress first (gdcmconv --raw), or ask the archive for Explicit VR Little Endian",
    "broken file": "send the series again from the archive",
}
COSINE_TOLERANCE = 1e-3  # headers carry at least four digits
POSITION_TOLERANCE = 0.05  # of the shortest voxel edge: rounded headers stay below, a lost slice is a whole edge
TILT_TOLERANCE = 0.1  # of a pixel, from the first slice to the last


@dataclass(frozen=True)
class Plane:
    """Where one slice lies, as its header says (DICOM's LPS, mm).

    Attributes:
        name: what to call the slice in an error.
        rows, columns: the matrix.
        spacing: distance between rows, distance between columns (the order of PixelSpacing).
        orientation: direction of a row, direction of a column, as six cosines.
        position: centre of the first pixel.
        frame_of_reference: coordinates of different frames cannot be compared.
    """

    name: str
    rows: int
    columns: int
    spacing: tuple[float, float]
    orientation: tuple[float, float, float, float, float, float]
    position: tuple[float, float, float]
    frame_of_reference: str = ""


@dataclass(frozen=True, eq=False)
class Grid:
    """A volume of slices in their order along the normal.

    Attributes:
        shape: columns, rows, slices.
        affine: 4 x 4, index (column, row, slice) to RAS mm.
        order: index of the plane of every slice.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]
    order: tuple[int, ...]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel in mm."""
        a, b, c = (float(np.linalg.norm(self.affine[:3, axis])) for axis in range(3))
        return a, b, c


def refuse(defect: str, what: str, why: str) -> NoReturn:
    """Raise the ``DataError`` of a defect, by its name in ``DEFECTS``."""
    raise DataError(f"{what}: {defect}", why, DEFECTS[defect])


def check_planes(planes: Sequence[Plane], what: str) -> None:
    """Refuse planes that are no stack of parallel slices of one matrix, even if resampled.

    Args:
        planes: of one series, in any order.
        what: the series, for the error message.

    Raises:
        DataError: single slice, geometry that is impossible, mixed spacing, orientation or frame of reference.
    """
    if len(planes) < 2:
        refuse("single slice", what, f"{len(planes)} image, expected at least 2")
    for plane in planes:
        _check_plane(plane, what)
    first = planes[0]
    matrices = Counter(f"{plane.columns} x {plane.rows} pixels in" for plane in planes)
    if len(matrices) > 1:
        refuse("mixed spacing", what, ", ".join(f"{name} {n} images" for name, n in matrices.most_common()))
    edge = min(first.spacing)
    for plane in planes[1:]:
        if not np.allclose(
            plane.spacing, first.spacing, rtol=0, atol=POSITION_TOLERANCE * edge / max(first.columns, 1)
        ):
            both = f"{_mm(first.spacing)} in {first.name}, {_mm(plane.spacing)} in {plane.name}"
            refuse("mixed spacing", what, both)
    for plane in planes[1:]:
        if not np.allclose(plane.orientation, first.orientation, rtol=0, atol=COSINE_TOLERANCE):
            turned = _turned_by(first, plane)
            refuse("mixed orientation", what, f"{plane.name} is turned by {turned:.3g} degrees against {first.name}")
    frames = Counter(plane.frame_of_reference for plane in planes)
    if len(frames) > 1:
        counts = ", ".join(str(n) for _, n in frames.most_common())
        refuse("mixed frame of reference", what, f"{len(frames)} frames of reference, in {counts} images")


def grid_of(planes: Sequence[Plane], what: str) -> Grid:
    """Return the regular grid of a series' planes.

    Args:
        planes: in any order.
        what: the series, for the error message.

    Raises:
        DataError: as ``check_planes``; several volumes, duplicate slice, missing slice, uneven gaps, tilted gantry.
    """
    check_planes(planes, what)
    across, down, normal = axes(planes)
    positions = np.array([plane.position for plane in planes])
    order = stacked(planes, what)
    along = positions[order] @ normal
    gaps = np.diff(along)
    edge = min(*planes[0].spacing, float(gaps.min()))
    tilt = _tilt_reason(positions[order], normal, min(planes[0].spacing))
    uneven = float(gaps.max() - gaps.min()) > 2 * POSITION_TOLERANCE * edge
    if tilt:
        refuse("tilted gantry", what, tilt + (f"; and the gaps are {_counted(gaps)} mm" if uneven else ""))
    if uneven:
        _refuse_gaps(gaps, [planes[index].name for index in order], what)
    step = (positions[order[-1]] - positions[order[0]]) / (len(order) - 1)
    strayed = np.linalg.norm(positions[order] - positions[order[0]] - np.outer(range(len(order)), step), axis=1)
    if strayed.max() > 2 * POSITION_TOLERANCE * edge:
        worst = planes[order[int(strayed.argmax())]].name
        refuse("impossible geometry", what, f"{worst} lies {strayed.max():.3g} mm off the line of the other slices")
    row_distance, column_distance = planes[0].spacing
    affine = lps_affine(across * column_distance, down * row_distance, step, positions[order[0]])
    return Grid((planes[0].columns, planes[0].rows, len(order)), affine, tuple(order))


def axes(planes: Sequence[Plane]) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Return the unit vectors along a row, along a column and normal to both (LPS), of checked planes."""
    across, down = np.array(planes[0].orientation, dtype=float).reshape(2, 3)
    across = across / np.linalg.norm(across)
    down = down - (down @ across) * across  # cosines are rounded: exactly perpendicular again
    down = down / np.linalg.norm(down)
    return across, down, np.cross(across, down)


def stacked(planes: Sequence[Plane], what: str) -> list[int]:
    """Return the indices of the planes in their order along the normal, each position once.

    Raises:
        DataError: several volumes (every position equally often), duplicate slice.
    """
    normal = axes(planes)[2]
    along = np.array([plane.position for plane in planes]) @ normal
    order = [int(index) for index in np.argsort(along, kind="stable")]
    same = np.diff(along[order]) <= POSITION_TOLERANCE * min(planes[0].spacing)
    if same.any():
        stack = np.concatenate([[0], np.cumsum(~same)])
        counts = Counter(Counter(stack.tolist()).values())
        if len(counts) == 1 and len(set(stack.tolist())) > 1:
            times = next(iter(counts))
            refuse(
                "several volumes", what, f"{len(planes)} images at {len(set(stack.tolist()))} positions, {times} each"
            )
        at = int(np.argmax(same))
        both = f"{planes[order[at]].name} and {planes[order[at + 1]].name}"
        refuse("duplicate slice", what, f"{both} lie at the same position; {int(same.sum())} such pairs")
    return order


def lps_affine(
    across: NDArray[np.float64], down: NDArray[np.float64], step: NDArray[np.float64], origin: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the RAS affine of index steps and an origin in DICOM's LPS (mm): x and y change sign."""
    affine = np.eye(4)
    affine[:3] = np.column_stack([across, down, step, origin])
    affine[:2] *= -1
    return affine + 0.0  # no negative zero


def _check_plane(plane: Plane, what: str) -> None:
    values = (*plane.spacing, *plane.orientation, *plane.position)
    if (
        not all(math.isfinite(value) for value in values)
        or min(plane.spacing) <= 0
        or min(plane.rows, plane.columns) < 1
    ):
        refuse(
            "impossible geometry",
            what,
            f"{plane.name}: matrix {plane.columns} x {plane.rows}, spacing {_mm(plane.spacing)}, "
            f"position {_mm(plane.position)}",
        )
    across, down = np.array(plane.orientation).reshape(2, 3)
    lengths = float(np.linalg.norm(across)), float(np.linalg.norm(down))
    if max(abs(length - 1) for length in lengths) > COSINE_TOLERANCE or abs(float(across @ down)) > COSINE_TOLERANCE:
        why = f"axes of length {lengths[0]:.4g} and {lengths[1]:.4g} with product {float(across @ down):.3g}"
        refuse("impossible geometry", what, f"{plane.name}: {why}, expected unit vectors at right angles")


def _refuse_gaps(gaps: NDArray[np.float64], names: Sequence[str], what: str) -> NoReturn:
    """Tell a lost slice (a gap that is a multiple of the usual one) from a series made with several distances."""
    usual = Counter(gaps.round(2).tolist()).most_common(1)[0][0]
    multiples = gaps / usual if usual > 0 else gaps
    whole = np.abs(multiples - multiples.round()) < 0.05
    lost = int((multiples.round() - 1).sum())
    if whole.all() and lost > 0:
        at = int(gaps.argmax())
        between = f"between {names[at]} and {names[at + 1]}"
        refuse("missing slice", what, f"{lost} missing; {gaps[at]:.4g} mm {between}, expected {usual:.4g} mm")
    refuse("uneven gaps", what, f"slice distances of {_counted(gaps)} mm")


def _tilt_reason(positions: NDArray[np.float64], normal: NDArray[np.float64], pixel: float) -> str:
    span = positions[-1] - positions[0]
    shift = span - (span @ normal) * normal
    drift = float(np.linalg.norm(shift))
    if drift <= TILT_TOLERANCE * pixel:
        return ""
    angle = math.degrees(math.atan2(drift, float(span @ normal)))
    return f"slices are shifted against each other by {angle:.3g} degrees, {drift:.3g} mm from first to last"


def _turned_by(one: Plane, other: Plane) -> float:
    a, b = (np.array(plane.orientation).reshape(2, 3) for plane in (one, other))
    first, second = (np.vstack([m, np.cross(m[0], m[1])]) for m in (a, b))
    return math.degrees(math.acos(float(np.clip((np.trace(first @ second.T) - 1) / 2, -1, 1))))


def _counted(gaps: NDArray[np.float64]) -> str:
    counts = sorted(Counter(gaps.round(2).tolist()).items())
    listed = ", ".join(f"{gap:.4g} ({count}x)" for gap, count in counts[:4])
    return listed + (f" and {len(counts) - 4} others" if len(counts) > 4 else "")


def _mm(values: Sequence[float]) -> str:
    return " x ".join(f"{value:.6g}" for value in values) + " mm"
