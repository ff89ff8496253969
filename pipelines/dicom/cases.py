"""From a hospital's DICOM to what a bundle reads: case folders of NIfTI, called by digests, and the way back to DICOM.

The series that the weights ask for are chosen (``choice``), taken through the gate (``geometry``) and written on one
grid, that of the first modality. What was done to them beside copying (padding filled, slices or series resampled, a CT
registered) is kept with the case and goes into its result. Predictions on these cases: ``results``.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from pipelines.dicom.choice import Case, choose
from pipelines.dicom.geometry import refuse
from pipelines.dicom.privacy import without_names
from pipelines.dicom.series import find_series, line_of
from pipelines.dicom.volume import Volume, read_volume
from pipelines.files import write_atomically
from transforms.errors import DataError, UsageError
from transforms.ingest_checks import GRID_TOLERANCE
from transforms.registration import register_ct

_SAMPLED = 24  # points per axis at which the overlap of two volumes is measured


@dataclass(frozen=True, eq=False)
class DicomCase:
    """A case and where it came from.

    Attributes:
        name: of the case.
        volume: of the first modality, without voxels; results go back to it.
        series: key of the series of every modality.
        notes: what was done to the images beside copying them.
    """

    name: str
    volume: Volume
    series: Mapping[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class DicomCases:
    """What ``as_case_folders`` wrote.

    Attributes:
        folder: the case folders, as ``items_from_path`` reads them.
        cases: in the order of their names.
        names: texts of the headers that identify somebody; for ``without_names``.
        lines: one line per series of the source, what became of it included, and one for what is no series.
    """

    folder: Path
    cases: tuple[DicomCase, ...]
    names: frozenset[str]
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Allowed:
    """What may be done to images that do not fit as they are.

    Attributes:
        resampling: interpolate tilted or unevenly spaced stacks, and series on other grids than the first's.
        registration: register a CT in another frame of reference to the MRI (rigid, mutual information).
    """

    resampling: bool = False
    registration: bool = False


def as_case_folders(
    source: str | Path,
    contract_modalities: Sequence[str],
    work_dir: str | Path,
    *,
    optional: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
    allowed: Allowed | None = None,
) -> DicomCases:
    """Write the series of a source that a contract asks for as case folders of NIfTI.

    Args:
        source: folder, file or zip file of DICOM.
        contract_modalities: the weights' modalities in the order of their channels.
        work_dir: folder for the cases and for what a zip file holds.
        optional: modalities that may be missing.
        chosen: key of the series (``Series.key``) by modality, where the headers do not tell.
        allowed: what may be done to images that do not fit; None allows nothing.

    Raises:
        DataError: every defect of ``geometry.DEFECTS``; no series of the modalities; series of a case that differ in
            grid, frame of reference or patient.
        UsageError: as ``choose``; a registration of anything but a CT to an MRI.
    """
    work = Path(work_dir)
    found = find_series(source, work / "unpacked")
    with without_names(found.names):
        chosen_cases = choose(found.series, contract_modalities, optional, chosen or {})
        used = {series.key: name for case in chosen_cases for name, series in case.items()}
        lines = [f"{line_of(series)}  {used.get(series.key, 'not used')}" for series in found.series]
        if found.passed_over or found.links:
            lines.append(f"{found.passed_over} files are no DICOM images; {found.links} links are not followed")
        cases = [_write_case(case, work / "cases", allowed or Allowed()) for case in chosen_cases]
    return DicomCases(work / "cases", tuple(sorted(cases, key=lambda case: case.name)), found.names, tuple(lines))


def _write_case(case: Case, folder: Path, allowed: Allowed) -> DicomCase:
    names, notes = list(case), []
    first = read_volume(case[names[0]], allowed.resampling)
    name = f"series-{first.series.key}"
    for modality in names:
        volume = first if modality == names[0] else read_volume(case[modality], allowed.resampling)
        if volume.resampled:
            notes.append(f"{modality}: resampled; {volume.resampled}")
        if volume.padding[0]:
            notes.append(f"{modality}: {volume.padding[0]} padding voxels set to {volume.padding[1]:g}")
        pair = (names[0], modality)
        voxels, done = (volume.voxels, "") if volume is first else _on_grid(volume, first, pair, allowed)
        notes += [f"{modality}: {done}"] if done else []
        write_atomically(folder / name / f"{modality}.nii.gz", _nifti(voxels, first.affine))
    keys = {modality: series.key for modality, series in case.items()}
    return DicomCase(name, first.without_voxels(), keys, tuple(notes))


def _on_grid(
    volume: Volume, first: Volume, modalities: tuple[str, str], allowed: Allowed
) -> tuple[NDArray[np.float32], str]:
    """Return the voxels of a series on the grid of the case's first, and what was done to bring them there."""
    what, where = volume.series.what, first.series.what
    frames = {volume.series.frame_of_reference, first.series.frame_of_reference}
    if len(frames) > 1 or "" in frames:  # no frame given: nothing says that positions can be compared
        return _registered(volume, first, modalities, allowed)
    if volume.voxels.shape == first.voxels.shape and np.abs(volume.affine - first.affine).max() <= GRID_TOLERANCE:
        return volume.voxels, ""
    if not allowed.resampling:
        raise DataError(
            f"{what}: its grid is not that of {where}",
            f"shape {volume.voxels.shape}, expected {first.voxels.shape}"
            if volume.voxels.shape != first.voxels.shape
            else f"the affine differs by {np.abs(volume.affine - first.affine).max():.3g}",
            "--dicom_allow_resampling True (they share a frame of reference), or give series on one grid",
        )
    share = overlap(first, volume)
    if share == 0:
        refuse("mixed frame of reference", what, f"no voxel of {where} lies in it, although their frame is one")
    image, grid = nib.Nifti1Image(volume.voxels, volume.affine), (first.voxels.shape, first.affine)
    moved = resample_from_to(image, grid, order=1, cval=float(volume.voxels.min()))
    return np.asarray(moved.dataobj, np.float32), f"resampled on the grid of {where}, of which it covers {share:.1%}"


def _registered(
    volume: Volume, first: Volume, modalities: tuple[str, str], allowed: Allowed
) -> tuple[NDArray[np.float32], str]:
    what, where = volume.series.what, first.series.what
    if not allowed.registration:
        raise DataError(
            f"{what}: mixed frame of reference",
            f"its frame of reference is not that of {where}, or not given: their positions cannot be compared",
            "--dicom_register True for a CT beside an MRI, or give series of one frame",
        )
    if (first.series.modality, volume.series.modality) != ("MR", "CT"):
        raise UsageError(
            f"--dicom_register: {modalities[1]} to {modalities[0]}",
            f"{volume.series.modality} to {first.series.modality}, expected a CT to an MRI",
            "register the images before, and give them one frame of reference",
        )
    voxels, quality = register_ct(first.voxels, volume.voxels, first.affine, volume.affine, where=f"{where} and {what}")
    before, after = quality.mutual_information_before, quality.mutual_information_after
    moved = f"{quality.motion_mm:.1f} mm and {quality.rotation_deg:.1f} degrees"
    return voxels, f"registered to {where}, {moved}; mutual information {before:.3f} nats before, {after:.3f} after"


def overlap(first: Volume, other: Volume) -> float:
    """Return the share of the first volume's grid that lies inside of the other volume, by their affines."""
    points = [np.linspace(0, size - 1, min(size, _SAMPLED)) for size in first.voxels.shape]
    index = np.stack(np.meshgrid(*points, indexing="ij"), -1).reshape(-1, 3)
    to_other = np.linalg.inv(other.affine) @ first.affine
    at = index @ to_other[:3, :3].T + to_other[:3, 3]
    inside = ((at >= -0.5) & (at <= np.array(other.voxels.shape) - 0.5)).all(axis=1)
    return float(inside.mean())


def _nifti(voxels: NDArray[Any], affine: NDArray[np.float64]) -> bytes:
    image = nib.Nifti1Image(voxels.astype(np.float32, copy=False), affine)
    image.set_sform(affine, code=1)
    image.set_qform(None, code=0)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)
