"""Cohorts of generated heads on disk: one folder per subject, whole or not there at all, the same bytes every time."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from pipelines.phantoms.head import HeadSubject, check_modalities, head_subject
from pipelines.phantoms.lesions import DEFAULT_LESIONS, LesionPrior
from pipelines.phantoms.signal import TISSUE_SD
from transforms.errors import ResourceError, UsageError


def write_head_cohort(
    folder: str | Path,
    subjects: int = 12,
    spacing_mm: Sequence[float] = (2.0, 2.0, 2.0),
    seed: int = 0,
    modalities: Sequence[str] = ("flair", "t1", "t2"),
    source: str = "auto",
    skull: bool = True,
    lesions: LesionPrior = DEFAULT_LESIONS,
    tissue_sd: float = TISSUE_SD,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a cohort as ``<folder>/<subject>/{<modality>,lesion,brain}.nii.gz``, and ``bone.nii.gz`` beside a ``ct``.

    Images are int16 (CT in HU), masks uint8, all in mm. Two calls with the same arguments write the same bytes. The
    folder appears complete or not at all.

    Args:
        folder: must not exist, or be empty.
        subjects: how many, named head_000, head_001, ...
        spacing_mm: voxel size, as in ``head_anatomy``.
        seed: of the cohort.
        modalities: any of ``t1``, ``t2``, ``flair``, ``ct``.
        source: ``mni152``, ``ellipsoid`` or ``auto``.
        skull: False leaves the brain alone in air.
        lesions: how much lesion, and how bright.
        tissue_sd: relative standard deviation over subjects of every property of every tissue.
        progress: called with (subjects written, subjects in all) after each subject.

    Returns:
        The subjects' folders.

    Raises:
        UsageError: the folder is not empty or an argument is out of its range.
        ResourceError: the files cannot be written.
    """
    check_modalities(modalities)

    def write(cohort: Path, index: int) -> None:
        subject = head_subject(seed, index, spacing_mm, modalities, source, skull, lesions, tissue_sd)
        bone = {"bone": subject.bone} if "ct" in subject.images else {}
        write_volumes(cohort / subject.subject, {**subject.images, **_masks(subject), **bone}, subject.affine)

    return write_cohort(folder, subjects, write, progress)


def write_pair_cohort(
    folder: str | Path,
    subjects: int = 12,
    spacing_mm: Sequence[float] = (2.0, 2.0, 2.0),
    seed: int = 0,
    contrasts: Sequence[str] = ("t1", "t2", "flair"),
    source: str = "auto",
    lesions: LesionPrior = DEFAULT_LESIONS,
    tissue_sd: float = TISSUE_SD,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write pairs of MRI and CT as ``<folder>/<subject>/<contrast>/{mri,ct,lesion,brain,bone}.nii.gz``, clean.

    Each MR contrast of a subject makes a pair with the subject's CT. There is neither noise nor bias: the pairs are the
    reference for a fusion, and what a scanner spoils is added later, at a chosen severity.

    Args:
        contrasts: any of ``t1``, ``t2``, ``flair``.

    For the others, the result and the errors see ``write_head_cohort``.
    """
    check_modalities(contrasts)
    if "ct" in contrasts:
        raise UsageError("head pairs, contrasts", "ct is there in every pair", "leave it out")

    def write(cohort: Path, index: int) -> None:
        modalities = (*contrasts, "ct")
        subject = head_subject(seed, index, spacing_mm, modalities, source, True, lesions, tissue_sd, clean=True)
        for contrast in contrasts:
            pair = {"mri": subject.images[contrast], "ct": subject.images["ct"]}
            volumes: dict[str, NDArray[Any]] = {**pair, **_masks(subject), "bone": subject.bone}
            write_volumes(cohort / subject.subject / contrast, volumes, subject.affine)

    return write_cohort(folder, subjects, write, progress)


def write_cohort(
    folder: str | Path,
    subjects: int,
    write: Callable[[Path, int], None],
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Let ``write(folder, index)`` write every subject; the folder appears complete or not at all.

    Raises:
        UsageError: the folder is not empty, or there are no subjects.
        ResourceError: the files cannot be written.
    """
    folder = Path(folder)
    if subjects < 1:
        raise UsageError(
            f"head cohort {folder}, subjects {subjects}", "a cohort needs at least one", "ask for 1 or more"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(
            f"head cohort {folder}", "it exists and is not an empty folder", "remove it or choose another folder"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            partial = Path(scratch, "cohort")
            for index in range(subjects):
                write(partial, index)
                if progress:
                    progress(index + 1, subjects)
            os.replace(partial, folder)
    except OSError as error:
        raise ResourceError(
            f"head cohort {folder}", f"cannot write: {error}", "check disk space and permissions"
        ) from error
    return sorted(folder.iterdir())


def _masks(subject: HeadSubject) -> dict[str, NDArray[np.uint8]]:
    return {"lesion": subject.lesion, "brain": subject.brain}


def write_volumes(folder: Path, volumes: Mapping[str, NDArray[Any]], affine: NDArray[np.float64]) -> None:
    """Write ``<folder>/<name>.nii.gz``: images (float32 of whole numbers) as int16, masks as uint8; no time stamps."""
    folder.mkdir(parents=True)
    for name, array in volumes.items():
        image = nib.Nifti1Image(array.astype(np.int16) if array.dtype == np.float32 else array, affine)
        image.header.set_xyzt_units("mm")
        with open(folder / f"{name}.nii.gz", "wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed:
            packed.write(image.to_bytes())
