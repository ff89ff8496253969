"""Where voxels are: what headers say, whether the files of a case say the same, and whether a pair lies on each other.

Headers are read, not voxels, so that every case is looked at. What the ingest gate refuses (a spacing of zero, a
spacing that the affine contradicts) becomes a finding here, one for all cases at once, instead of the first refusal.

    R10  shapes, affines, spacings, fields of view, missing slices      R11  registration of MRI and CT
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from pipelines.manifests import Manifest
from pipelines.preflight.chains import steps_of
from pipelines.preflight.finding import CannotRun, Finding, Severity, Source
from pipelines.preflight.inspection import Inspection, spread
from pipelines.preflight.rule import Rule
from transforms.errors import DataError
from transforms.fusion import CT, MRI
from transforms.nifti import read_header
from transforms.registration_check import (
    LARGEST_OFFSET_MM,
    SMALLEST_OUTLINE_DICE,
    RegistrationCheckd,
    RegistrationFigures,
    registration_figures,
)

HEAD_TASKS = ("segmentation", "fusion")
PAIRS = 3  # to measure the registration of: seconds each
SLICE_STEP = 4  # of the voxels in a slice that are looked at


@dataclass(frozen=True, eq=False)
class Grid:
    """What the header of one file says.

    Attributes:
        case, key: which file, e.g. ``images/flair``.
        shape: voxels along the three axes.
        affine: 4 x 4, voxel index to mm.
        sform, qform: affines with their codes (what they refer to), or None where the header does not set them.
    """

    case: str
    key: str
    shape: tuple[int, ...]
    affine: np.ndarray
    sform: tuple[np.ndarray, int] | None = None
    qform: tuple[np.ndarray, int] | None = None

    @property
    def spacing(self) -> np.ndarray:
        """The voxel size in mm along the three axes, from the affine."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


# --- judging --------------------------------------------------------------------------------------------------------


def case_findings(grids: Sequence[Grid], limits: Mapping[str, float]) -> list[Finding]:
    """R10: judge whether the files of each case lie on one grid, that of its first file.

    Args:
        grids: of all cases.
        limits: ``affine``: largest difference of an element of two affines (mm, or mm per voxel).
    """
    first: dict[str, Grid] = {}
    shapes: list[tuple[Grid, Grid]] = []
    affines: list[tuple[float, Grid, Grid]] = []
    for grid in grids:
        reference = first.setdefault(grid.case, grid)
        difference = float(np.abs(grid.affine - reference.affine).max())
        if grid.shape != reference.shape:
            shapes.append((grid, reference))
        elif difference > limits["affine"]:
            affines.append((difference, grid, reference))
    findings = []
    if shapes:
        grid, reference = shapes[0]
        findings.append(
            _found(
                f"{grid.key} and {reference.key} have different shapes",
                f"{grid.shape} and {reference.shape} voxels",
                "one shape",
                "a file of another scan, or one that was resampled alone",
                f"Resample {grid.key} onto the grid of {reference.key}.",
                [pair[0].case for pair in shapes],
            )
        )
    if affines:
        affines.sort(key=lambda each: -each[0])
        difference, grid, reference = affines[0]
        findings.append(
            _found(
                f"{grid.key} and {reference.key} have different affines",
                f"largest difference {difference:.4g}",
                f"<= {limits['affine']:g}",
                "a header that was lost or rewritten by one tool",
                f"Write the affine of {reference.key} into {grid.key} if the voxels agree, else resample it.",
                [each[1].case for each in affines],
            )
        )
    return findings


def declared_findings(
    grids: Sequence[Grid], declared: Mapping[str, Sequence[float]], limits: Mapping[str, float]
) -> list[Finding]:
    """R10: judge spacings against those that the manifest declares.

    Args:
        grids: of all cases.
        declared: mm along the axes, by case.
        limits: ``spacing``: largest difference in mm.
    """
    wrong = [
        (float(np.abs(grid.spacing - np.asarray(declared[grid.case])).max()), grid)
        for grid in grids
        if grid.case in declared
    ]
    wrong = sorted((each for each in wrong if each[0] > limits["spacing"]), key=lambda each: -each[0])
    if not wrong:
        return []
    grid = wrong[0][1]
    identity = np.array_equal(grid.affine, np.eye(4))
    return [
        _found(
            f"{grid.key} has {'an identity affine' if identity else 'another spacing than the manifest declares'}",
            f"{_mm(grid.spacing)} in the header",
            f"{_mm(declared[grid.case])} in the manifest, within {limits['spacing']:g} mm",
            "the file was saved without its geometry" if identity else "a header that was edited after the import",
            "Write the true affine into the file, then import the cohort again.",
            [each[1].case for each in wrong],
        )
    ]


def form_findings(grids: Sequence[Grid], limits: Mapping[str, float]) -> list[Finding]:
    """R10: judge whether sform and qform agree: some tools read the one, others the other.

    Where both refer to the same space they have to agree; where they refer to different ones (a scanner's and an
    atlas's), left and right must still be the same.

    Args:
        grids: of all cases.
        limits: ``forms_mm``: by how much a corner of the volume may move from the one to the other.
    """
    found = []
    for grid in grids:
        if grid.sform is None or grid.qform is None:
            continue
        (sform, s_code), (qform, q_code) = grid.sform, grid.qform
        turned = nibabel.aff2axcodes(sform) != nibabel.aff2axcodes(qform)
        moved = _corner_shift(sform, qform, grid.shape)
        if moved > limits["forms_mm"] and (turned or s_code == q_code):
            found.append((turned, moved, grid))
    if not found:
        return []
    found.sort(key=lambda each: (not each[0], -each[1]))
    turned, moved, grid = found[0]
    axes = ["".join(nibabel.aff2axcodes(form[0])) for form in (grid.sform, grid.qform) if form is not None]
    return [
        _found(
            f"sform and qform of {grid.key} disagree",
            f"a corner of the volume moves by {moved:.3g} mm, axes {axes[0]} and {axes[1]}",
            f"<= {limits['forms_mm']:g} mm, the same axes",
            "one of the two was rewritten, so that tools place the image differently",
            "Find out which is right and write it into both.",
            [each[2].case for each in found],
            severity="error" if turned else "warn",
        )
    ]


def view_findings(grids: Sequence[Grid], limits: Mapping[str, float]) -> list[Finding]:
    """R10: judge the field of view of heads in the plane of the slices (the axial plane of an isotropic volume).

    Args:
        grids: one image per case.
        limits: ``view_low`` and ``view_high`` in mm.
    """
    wrong = []
    for grid in grids:
        axes = in_plane_axes(grid)
        view = [float(grid.shape[axis] * grid.spacing[axis]) for axis in axes]
        if min(view) < limits["view_low"] or max(view) > limits["view_high"]:
            wrong.append((max(limits["view_low"] / min(view), max(view) / limits["view_high"]), view, grid))
    if not wrong:
        return []
    wrong.sort(key=lambda each: -each[0])
    _, view, grid = wrong[0]
    return [
        _found(
            f"{grid.key} has an unlikely field of view for a head",
            f"{view[0]:.0f} x {view[1]:.0f} mm in the plane of the slices",
            f"{limits['view_low']:g} to {limits['view_high']:g} mm",
            "a wrong voxel size, or an image that was cropped",
            "Check the voxel size against the scanner's; acknowledge it where the images were cropped.",
            [each[2].case for each in wrong],
            severity="warn",
        )
    ]


def window_findings(
    grids: Sequence[Grid], spacing_mm: Sequence[float], patch_size: Sequence[int], limits: Mapping[str, float]
) -> list[Finding]:
    """R10: judge whether volumes fill the window of the network once they have its spacing.

    A head is a little smaller than many a window, and is padded with air: what counts is a window that is mostly air.

    Args:
        grids: one image per case.
        spacing_mm: of the network; 0 keeps the image's own.
        patch_size: voxels of the window, along right, anterior, superior.
        limits: ``filled``: smallest share of the window along each axis (1 = no padding at all).
    """
    small = []
    for grid in grids:
        canonical = nibabel.orientations.io_orientation(grid.affine)[:, 0].astype(int)
        own = np.empty(3)
        size = np.empty(3)
        for axis, world in enumerate(canonical):
            own[world], size[world] = grid.spacing[axis], grid.shape[axis]
        target = np.where(np.asarray(spacing_mm) > 0, spacing_mm, own)
        voxels = np.round(size * own / target)
        share = voxels / np.asarray(patch_size)
        if share.min() < limits["filled"]:
            small.append((float(share.min()), voxels.astype(int).tolist(), grid))
    if not small:
        return []
    small.sort(key=lambda each: each[0])
    share, voxels, grid = small[0]
    return [
        _found(
            f"{grid.key} is much smaller than the window of the network",
            f"{' x '.join(map(str, voxels))} voxels at {_mm(spacing_mm)}",
            f"at least {100 * limits['filled']:g} % of the window, {' x '.join(map(str, patch_size))} voxels",
            "a window or a spacing for another kind of image, or a wrong voxel size",
            "Choose a smaller patch_size or a finer spacing.",
            [each[2].case for each in small],
            source="configuration",
        )
    ]


def missing_slices(image: np.ndarray) -> list[tuple[int, int]]:
    """Return (axis, index) of every slice of an image (C, *spatial) that is constant between slices that are not.

    Only the channels that have any contrast count, and each of them has to be constant there.
    """
    found = []
    channels = [channel for channel in image if float(channel.max()) > float(channel.min())]
    for axis in range(image.ndim - 1):
        flat = np.ones(image.shape[1 + axis], bool) if channels else np.zeros(0, bool)
        for channel in channels:
            others = tuple(other for other in range(channel.ndim) if other != axis)
            flat &= channel.max(axis=others) == channel.min(axis=others)
        varied = np.flatnonzero(~flat)
        if varied.size:
            inner = np.flatnonzero(flat[varied[0] : varied[-1]]) + varied[0]
            found += [(axis, int(index)) for index in inner]
    return found


def slice_findings(missing: Mapping[str, Sequence[tuple[int, int]]]) -> list[Finding]:
    """R10: judge slices that hold nothing; ``missing``: by case, see ``missing_slices``."""
    cases = sorted((case for case, some in missing.items() if some), key=lambda case: -len(missing[case]))
    if not cases:
        return []
    axis, index = missing[cases[0]][0]
    return [
        _found(
            "an image has empty slices between others",
            f"{len(missing[cases[0]])} in case {cases[0]}, the first at {index} along axis {axis}",
            "none",
            "slices that were lost on the way and filled with one value",
            "Convert the series again from its source, or leave the case out.",
            cases,
        )
    ]


def registration_findings(figures: Mapping[str, RegistrationFigures], limits: Mapping[str, float]) -> list[Finding]:
    """R11: judge whether MRI and CT of each pair lie on each other.

    Args:
        figures: by case.
        limits: ``dice`` of the outlines of the head, ``offset_mm`` of the peak of the mutual information.
    """
    wrong = {
        case: each
        for case, each in figures.items()
        if each.outline_dice < limits["dice"] or each.offset_length_mm > limits["offset_mm"]
    }
    if not wrong:
        return []
    cases = sorted(wrong, key=lambda case: (-wrong[case].offset_length_mm, wrong[case].outline_dice))
    worst = wrong[cases[0]]
    return [
        Finding(
            "R11",
            "error",
            "MRI and CT are misregistered",
            f"Dice of the head outlines {worst.outline_dice:.3f}, mutual information peaks "
            f"{worst.offset_length_mm:.1f} mm away, in case {cases[0]}",
            f"Dice >= {limits['dice']:g}, peak within {limits['offset_mm']:g} mm",
            "the pair was never registered, or its registration failed",
            "Train with --register True, or leave the cases out.",
            "data",
            tuple(cases),
        )
    ]


def in_plane_axes(grid: Grid) -> tuple[int, int]:
    """Return the two axes in which slices lie: all but the coarsest, or, of an isotropic volume, the most vertical."""
    spacing = grid.spacing
    if spacing.max() > 1.5 * np.sort(spacing)[1]:
        through = int(np.argmax(spacing))
    else:
        through = int(np.argmax(np.abs(grid.affine[2, :3]) / spacing))
    first, second = (axis for axis in range(3) if axis != through)
    return first, second


def _corner_shift(one: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    corners = np.array(np.meshgrid(*((0, size - 1) for size in shape), indexing="ij")).reshape(3, -1)
    moved = (one - other)[:3, :3] @ corners + (one - other)[:3, 3:]
    return float(np.linalg.norm(moved, axis=0).max())


def _mm(spacing: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{float(size):.4g}" for size in spacing) + " mm"


def _found(
    what: str,
    measured: str,
    threshold: str,
    cause: str,
    fix: str,
    cases: Sequence[str],
    severity: Severity = "error",
    source: Source = "data",
) -> Finding:
    return Finding("R10", severity, what, measured, threshold, cause, fix, source, tuple(dict.fromkeys(cases)))


# --- files and pieces of a bundle -----------------------------------------------------------------------------------


def read_grids(cohort: Manifest, first_alone: bool = False) -> tuple[list[Grid], list[tuple[str, str, DataError]]]:
    """Return the grids of the NIfTI files of a cohort that exist, and (case, key, refusal) of those not accepted.

    With ``first_alone``, only the first image of each case is read.
    """
    grids: list[Grid] = []
    refused: list[tuple[str, str, DataError]] = []
    for case in cohort.cases:
        for key, entry in list(case.files().items())[: 1 if first_alone else None]:
            path = cohort.root / entry.path
            if path.is_file() and path.name.endswith((".nii", ".nii.gz")):
                try:
                    grids.append(_grid(path, case.id, key))
                except DataError as refusal:
                    refused.append((case.id, key, refusal))
    return grids, refused


def _grid(path: Path, case: str, key: str) -> Grid:
    header = read_header(path, case=case, key=key)
    raw: Any = nibabel.load(path).header
    sform, s_code = raw.get_sform(coded=True)
    qform, q_code = raw.get_qform(coded=True)
    return Grid(
        case,
        key,
        header.shape,
        np.asarray(header.affine),
        None if sform is None or s_code == 0 else (sform, int(s_code)),
        None if qform is None or q_code == 0 else (qform, int(q_code)),
    )


def refused_findings(refused: Sequence[tuple[str, str, DataError]]) -> list[Finding]:
    """R10: what the ingest gate refuses, one finding per reason; ``refused``: (case, key, refusal)."""
    by_reason: dict[str, list[tuple[str, str, DataError]]] = {}
    for each in refused:
        by_reason.setdefault(each[2].why, []).append(each)
    return [
        _found(
            f"the header of {some[0][1]} is refused",
            why,
            "a header that the ingest gate accepts",
            "a conversion that lost the geometry",
            some[0][2].fix,
            [case for case, _, _ in some],
        )
        for why, some in by_reason.items()
    ]


def check_headers(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R10 over the headers of every file of the cohort."""
    cohort: Manifest = inspection.need("cohort")
    grids, refused = _need_grids(cohort)
    return [
        *refused_findings(refused),
        *case_findings(grids, limits),
        *declared_findings(grids, {case.id: case.spacing for case in cohort.cases}, limits),
        *form_findings(grids, limits),
    ]


def check_view(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R10 over the fields of view of the first image of every case."""
    return view_findings(_need_grids(inspection.need("cohort"), first_alone=True)[0], limits)


def check_window(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R10 over every case at the spacing of the network."""
    contract = inspection.need("contract")
    if len(contract.get("patch_size", ())) != 3 or len(contract.get("spacing", ())) != 3:
        raise CannotRun("the contract names no patch_size and spacing in three dimensions")
    grids, _ = _need_grids(inspection.need("cohort"), first_alone=True)
    return window_findings(grids, contract["spacing"], contract["patch_size"], limits)


def check_slices(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R10 over prepared training cases: a resampling to the same or a coarser grid keeps an empty slice empty."""
    inspection.need("train")
    return slice_findings(
        {str(case["case"]): _missing_in(case["image"]) for case in inspection.training_cases if case["image"].ndim == 4}
    )


def check_registration(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R11: nothing where the preparation refuses a misregistered pair, for it has seen them all; else a few pairs."""
    train = inspection.need("train")
    checks = [each for each in steps_of(getattr(train, "preparation", None)) if isinstance(each, RegistrationCheckd)]
    refusing = inspection.extra.get("registration_check") == "raise" or any(c.action == "raise" for c in checks)
    strict = all(c.smallest_dice >= limits["dice"] and c.largest_offset_mm <= limits["offset_mm"] for c in checks)
    if refusing and strict:
        return []
    figures = {}
    for case in spread(train.cases, PAIRS):
        image, name = np.asarray(case["image"]), str(case["case"])
        if image.ndim != 4 or len(image) != 2:
            raise CannotRun(f"case {name} is no pair of volumes: its image has shape {image.shape}")
        spacing = _spacing(case, name)
        try:
            figures[name] = registration_figures(image[MRI], image[CT], spacing, f"case {name}")
        except DataError as refusal:
            raise CannotRun(f"case {name}: {refusal.why}") from refusal
    return registration_findings(figures, limits)


def _spacing(case: Mapping[str, Any], name: str) -> list[float]:
    affine = case.get("image_affine")
    if affine is None:
        raise CannotRun(f"case {name} has no affine")
    return [float(mm) for mm in np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)]


def _missing_in(image: np.ndarray) -> list[tuple[int, int]]:
    """Look at every slice, but at every n-th voxel of it along each of its axes; confirm what seems empty."""
    suspects = set()
    for axis in range(3):
        window = tuple(slice(None) if other == axis else slice(None, None, SLICE_STEP) for other in range(3))
        suspects |= {each for each in missing_slices(np.asarray(image[(slice(None), *window)])) if each[0] == axis}
    return sorted(
        (axis, index)
        for axis, index in suspects
        if all(float(c.max()) == float(c.min()) for c in np.take(np.asarray(image), index, axis=1 + axis))
    )


def _need_grids(cohort: Manifest, first_alone: bool = False) -> tuple[list[Grid], list[tuple[str, str, DataError]]]:
    grids, refused = read_grids(cohort, first_alone)
    if not grids and not refused:
        raise CannotRun("the cohort holds no NIfTI file")
    return grids, refused


RULES: tuple[Rule, ...] = (
    Rule(
        "R10",
        "files of a case on one grid, as declared",
        check_headers,
        {"affine": 1e-3, "spacing": 1e-3, "forms_mm": 1.0},
        of_data=True,
    ),
    Rule(
        "R10",
        "field of view of a head",
        check_view,
        {"view_low": 150.0, "view_high": 350.0},
        tasks=HEAD_TASKS,
        of_data=True,
    ),
    Rule("R10", "volumes fill the window", check_window, {"filled": 0.5}, tasks=HEAD_TASKS),
    Rule("R10", "no slice is missing", check_slices, of_data=True),
    Rule(
        "R11",
        "MRI and CT lie on each other",
        check_registration,
        {"dice": SMALLEST_OUTLINE_DICE, "offset_mm": LARGEST_OFFSET_MM},
        tasks=("fusion",),
        of_data=True,
    ),
)
