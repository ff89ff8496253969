"""DICOM series small enough to derive by hand, with somebody's name in every place where one may stand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian

CT, MR = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.4"
STUDY, SERIES, FRAME = "1.2.3.4.1", "1.2.3.4.2", "1.2.3.4.3"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
PLANTED = {
    "PatientName": "Grimsby^Aurelia^Mabel",
    "PatientID": "PID7749301",
    "PatientBirthDate": "19510714",
    "PatientAddress": "Thistlewood Lane 14",
    "OtherPatientIDs": "ALT5510022",
    "InstitutionName": "Saint Ethelburga Infirmary",
    "InstitutionAddress": "Quillfeather Street",
    "StationName": "STNXQ41",
    "ReferringPhysicianName": "Ploughright^Osbert",
    "PerformingPhysicianName": "Wetherspool^Una",
    "OperatorsName": "Dunnock^Piers",
    "AccessionNumber": "ACC0098123",
    "StudyID": "STU55120",
    "StudyDate": "20210309",
    "StudyTime": "101112",
    "SeriesDescription": "t1 for Grimsby",
    "StudyDescription": "Head Aurelia",
    "ImageComments": "seen by Dunnock",
    "PatientComments": "Thistlewood",
}
NAMES = [
    "Grimsby",
    "Aurelia",
    "Mabel",
    "PID7749301",
    "19510714",
    "Thistlewood",
    "ALT5510022",
    "Ethelburga",
    "Quillfeather",
    "STNXQ41",
    "Ploughright",
    "Osbert",
    "Wetherspool",
    "Dunnock",
    "ACC0098123",
    "STU55120",
    "20210309",
]
Change = Callable[[int, Dataset], None]


def stored_pixels(slices: int = 5, rows: int = 6, columns: int = 4) -> np.ndarray:
    """Stored integers (slice, row, column): 100 slice + 10 row + column, so that every voxel says where it is."""
    k, r, c = np.meshgrid(np.arange(slices), np.arange(rows), np.arange(columns), indexing="ij")
    return 100 * k + 10 * r + c


def header(
    number: int,
    position: Sequence[float],
    orientation: Sequence[float] = AXIAL,
    spacing: Sequence[float] = (2.0, 0.5),
    modality: str = "CT",
    signed: bool = True,
    bits: int = 16,
    syntax: str = ExplicitVRLittleEndian,
) -> Dataset:
    """One image without pixels; ``spacing`` is between rows, then between columns."""
    image = Dataset()
    image.file_meta = FileMetaDataset()
    image.file_meta.TransferSyntaxUID = UID(syntax)
    image.file_meta.MediaStorageSOPClassUID = UID(CT if modality == "CT" else MR)
    image.file_meta.MediaStorageSOPInstanceUID = UID(f"{SERIES}.{number}")
    image.file_meta.ImplementationClassUID = UID("1.2.3.4.9")
    image.SOPClassUID, image.SOPInstanceUID = image.file_meta.MediaStorageSOPClassUID, UID(f"{SERIES}.{number}")
    image.StudyInstanceUID, image.SeriesInstanceUID, image.FrameOfReferenceUID = STUDY, SERIES, FRAME
    image.Modality, image.SeriesNumber, image.InstanceNumber = modality, 3, number
    image.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    for keyword, value in PLANTED.items():
        setattr(image, keyword, value)
    block = image.private_block(0x0029, "GRIMSBY MAKER", create=True)
    block.add_new(0x01, "LO", "Aurelia private")
    image.PatientSex, image.SliceThickness = "F", 3.0
    image.ImagePositionPatient, image.ImageOrientationPatient = list(position), list(orientation)
    image.PixelSpacing = list(spacing)
    image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
    image.BitsAllocated, image.BitsStored, image.HighBit = (8 if bits <= 8 else 16), bits, bits - 1
    image.PixelRepresentation = int(signed)
    if modality == "CT":
        image.RescaleSlope, image.RescaleIntercept = 2, -1000
    return image


def write_series(
    folder: Path,
    pixels: np.ndarray | None = None,
    orientation: Sequence[float] = AXIAL,
    gap: float = 3.0,
    origin: Sequence[float] = (-10.0, 20.0, 30.0),
    step: Sequence[float] | None = None,
    change: Change | None = None,
    **options: object,
) -> Path:
    """Write one file per slice into ``folder``; slice k lies at origin + k step (the normal times ``gap``).

    ``change(k, image)`` may spoil an image before it is written.
    """
    pixels = stored_pixels() if pixels is None else pixels
    across, down = np.array(orientation).reshape(2, 3)
    towards = np.cross(across, down) * gap if step is None else np.array(step)
    folder.mkdir(parents=True, exist_ok=True)
    for k, values in enumerate(pixels):
        position = (np.array(origin) + k * towards).round(9).tolist()
        image = header(k + 1, position, orientation, **options)  # type: ignore[arg-type]
        image.Rows, image.Columns = values.shape
        kind = ("i" if image.PixelRepresentation else "u") + str(image.BitsAllocated // 8)
        image.PixelData = values.astype(f"<{kind}").tobytes()
        image["PixelData"].VR = "OW"
        if change is not None:
            change(k, image)
        # file names as exports have them: the patient's
        pydicom.dcmwrite(folder / f"GRIMSBY_AURELIA_{k:03d}.dcm", image, enforce_file_format=True)
    return folder


def write_image(folder: Path, image: nib.Nifti1Image, modality: str, uid: str, change: Change | None = None) -> Path:
    """Write a NIfTI image (whole numbers; CT in HU) as a series of its own, every voxel where its affine puts it."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ image.affine  # RAS to LPS
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    across, down = affine[:3, 0] / sizes[0], affine[:3, 1] / sizes[1]

    def as_series(k: int, header: Dataset) -> None:
        header.SeriesInstanceUID = uid
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{k + 1}"
        if modality == "CT":
            header.RescaleSlope, header.RescaleIntercept = 1, 0
        if change is not None:
            change(k, header)

    voxels = np.rint(image.get_fdata()).astype(int).transpose(2, 1, 0)
    return write_series(
        folder, voxels, [*across, *down], step=affine[:3, 2], origin=affine[:3, 3], modality=modality,
        spacing=(sizes[1], sizes[0]), change=as_series,
    )  # fmt: skip


def spoil(folder: Path, change: Change) -> None:
    """Change the images of a series that is written, in the order of its slices."""
    for k, path in enumerate(sorted(folder.iterdir())):
        image = pydicom.dcmread(path)
        change(k, image)
        pydicom.dcmwrite(path, image, enforce_file_format=True)


def set_in(which: int | None, **values: object) -> Change:
    """Return a change that sets attributes of slice ``which`` (None: of all)."""

    def change(k: int, image: Dataset) -> None:
        for keyword, value in values.items():
            if which is None or k == which:
                setattr(image, keyword, value)

    return change


def without(*keywords: str) -> Change:
    """Return a change that takes attributes away."""

    def change(k: int, image: Dataset) -> None:
        for keyword in keywords:
            delattr(image, keyword)

    return change


def encoded(syntax: str) -> Change:
    """Return a change that puts bytes of a compressed syntax in the place of the pixels."""

    def change(k: int, image: Dataset) -> None:
        image.file_meta.TransferSyntaxUID = UID(syntax)
        image.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8 not looked at \xff\xd9"])

    return change
