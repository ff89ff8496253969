"""A study for the lesion bundle: a series per modality of a subject of the tiny cohort."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
from bundle_runs import MODALITIES
from generated_series import set_in, write_image

OPTIONS = {"run_name": "r", "device_name": "cpu"}


def study_of(cohort: Path, folder: Path, subject: str = "c") -> Path:
    """Write a subject's NIfTI as a DICOM study with a series per modality, on the same grid."""
    for number, modality in enumerate(MODALITIES, start=1):
        image = nib.load(cohort / subject / f"{modality}.nii.gz")
        described = set_in(None, SeriesDescription=f"ax {modality} for Grimsby")
        write_image(folder / f"Grimsby {modality}", image, "MR", f"1.2.5.{number}", described)
    return folder
