"""Is this DICOM? Asked of every input of ``predict``, also without the extra: nothing of it is imported."""

from __future__ import annotations

import importlib.util
import zipfile
from pathlib import Path

from pipelines.manifests.discover import IMAGE_ENDINGS
from transforms.errors import UsageError

_NEEDED = ("pydicom", "highdicom", "pynetdicom")


def is_dicom(path: str | Path) -> bool:
    """Return whether a path is a DICOM file (PS3.10), a folder with one at any depth, or a zip file.

    Raises:
        UsageError: a folder with NIfTI images beside DICOM: one of them would be left out in silence.
    """
    path = Path(path)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        found = any(begins_as_dicom(file) for file in files)
        nifti = sum(file.name.lower().endswith(IMAGE_ENDINGS) for file in files)
        if found and nifti:
            raise UsageError(f"input {path}", f"DICOM, and {nifti} NIfTI files", "give a folder with one of them")
        return found
    return path.is_file() and (begins_as_dicom(path) or (path.suffix.lower() == ".zip" and zipfile.is_zipfile(path)))


def begins_as_dicom(path: Path) -> bool:
    """Return whether a file has the four letters behind 128 bytes that every DICOM file has."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def require_extra() -> None:
    """Raise a ``UsageError`` where the packages for DICOM are not installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError("DICOM: not installed", f"missing {', '.join(missing)}", "pip install 'fiducial[dicom]'")
