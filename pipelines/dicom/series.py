"""The series in a folder or a zip file: every file looked at once, nothing decoded, one line per series.

A folder from an archive holds several series, localisers, reports and whatever else somebody put there. Files that are
no DICOM, and links, are counted, not guessed at. A series is called by a digest of its UID: descriptions are free text
of the hospital. What the headers of a series must say to be used: ``headers``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import (
    UID,
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    MediaStorageDirectoryStorage,
    MRImageStorage,
    PositronEmissionTomographyImageStorage,
)

from pipelines.dicom.archive import file_limit, unpacked
from pipelines.dicom.detect import begins_as_dicom
from pipelines.dicom.geometry import DEFECTS, refuse
from pipelines.dicom.privacy import names_in, quiet_reading
from transforms.errors import DataError
from transforms.ingest_budget import Budget, check_file_size, check_metadata_size

# the classes that are volumes when stacked, and the modality that each must have
IMAGE_CLASSES = {CTImageStorage: "CT", MRImageStorage: "MR", PositronEmissionTomographyImageStorage: "PT"}
_UNDEFLATED = {DeflatedExplicitVRLittleEndian}  # inflating has no limit in the reader


@dataclass(frozen=True, eq=False)
class Image:
    """One file of a series and its header (without pixels)."""

    path: Path
    header: Dataset

    @property
    def name(self) -> str:
        """What an error calls it: its instance number, else the end of its UID. Paths may carry names."""
        number = str(self.header.get("InstanceNumber") or "").strip()
        return f"image {number}" if number.isdigit() else f"image ...{str(self.header.SOPInstanceUID)[-8:]}"


@dataclass(frozen=True, eq=False)
class Series:
    """The images of one Series Instance UID, in the order of their instance numbers and UIDs.

    Attributes:
        key: eight hexadecimal digits, a digest of the UID.
        images: at least one.
    """

    key: str
    images: tuple[Image, ...]

    @property
    def header(self) -> Dataset:
        """The first image's header."""
        return self.images[0].header

    @property
    def modality(self) -> str:
        """DICOM's code: CT, MR, PT ..."""
        return str(self.header.get("Modality", "") or "?")

    @property
    def study(self) -> str:
        """Study Instance UID."""
        return str(self.header.StudyInstanceUID)

    @property
    def patient(self) -> tuple[str, str]:
        """Patient ID and birth date, empty where the header has none; to compare, never to show."""
        return text_of(self.header, "PatientID"), text_of(self.header, "PatientBirthDate")

    @property
    def is_plain(self) -> bool:
        """Whether it is made of images that can be slices: no localiser, report, segmentation or screen capture."""
        return str(self.header.SOPClassUID) in IMAGE_CLASSES and not is_localiser(self.header)

    @property
    def frame_of_reference(self) -> str:
        """UID of the coordinates that the positions are given in."""
        return str(self.header.get("FrameOfReferenceUID", ""))

    @property
    def what(self) -> str:
        """What an error calls the series."""
        return f"series {self.key} ({self.modality})"


@dataclass(frozen=True, eq=False)
class Found:
    """What a source holds.

    Attributes:
        series: in the order of their keys.
        names: texts in the headers that identify somebody.
        passed_over: how many files are no DICOM images.
        links: how many symbolic links were not followed.
    """

    series: tuple[Series, ...]
    names: frozenset[str]
    passed_over: int
    links: int


def digest_key(uid: str) -> str:
    """Return the short name of a UID: eight hexadecimal digits."""
    return hashlib.sha256(uid.encode()).hexdigest()[:8]


def find_series(source: str | Path, work: str | Path, budget: Budget | None = None) -> Found:
    """Return the series in a folder, a file or a zip file; their order is that of their keys.

    Args:
        source: folder (searched to its depths), one DICOM file, or a zip file.
        work: folder for what a zip file holds; must stay as long as the series are used.
        budget: limits of files; None takes those of the environment.

    Raises:
        DataError: no such path, no DICOM image in it, more files or bytes than the budget, a damaged zip file or DICOM
            file.
    """
    source, budget = Path(source), budget or Budget.of_environment()
    links = 0
    if source.is_dir():
        entries = sorted(source.rglob("*"))
        links = sum(path.is_symlink() for path in entries)
        paths = [path for path in entries if path.is_file() and not path.is_symlink()]
    elif source.is_file() and source.suffix.lower() == ".zip":
        paths = list(unpacked(source, Path(work), budget))
    elif source.is_file():
        paths = [source]
    else:
        raise DataError("input: no such file or folder", "nothing to read", "check the path")
    check_amount(paths, budget)
    groups: dict[str, list[Image]] = {}
    passed_over = 0
    with quiet_reading():
        for number, path in enumerate(paths, start=1):
            where = f"file {number} of {len(paths)} (by path)"
            image = _image(path, where, budget) if begins_as_dicom(path) else None
            if image is None:
                passed_over += 1
            else:
                groups.setdefault(str(image.header.SeriesInstanceUID), []).append(image)
        names = names_in(image.header for images in groups.values() for image in images)
    if not groups:
        raise DataError(
            "input: no DICOM image found",
            f"{passed_over} files, none of them one; {links} links, which are not followed",
            "give a folder of DICOM files (PS3.10)",
        )
    series = [Series(digest_key(uid), tuple(sorted(images, key=_rank))) for uid, images in groups.items()]
    return Found(tuple(sorted(series, key=lambda one: one.key)), names, passed_over, links)


def line_of(series: Series) -> str:
    """Return a series in one line: key, modality, images and their numbers, matrix, and nothing that somebody typed.

    The numbers show what the gate cannot see: a series that lacks slices at an end begins late or stops early.
    """
    header = series.header
    matrix = f"{header.get('Columns', '?')} x {header.get('Rows', '?')}"
    numbers = [_rank(image)[0] for image in series.images]
    counted = f"{len(series.images):>5} images ({min(numbers)} to {max(numbers)})"
    return f"{series.key}  {series.modality:<3} {counted}  {matrix}"


def check_amount(paths: Sequence[Path], budget: Budget) -> None:
    """Raise a ``DataError`` where files are more, or together larger, than the budget."""
    if len(paths) > file_limit(budget):
        raise DataError(
            f"input: {len(paths)} files",
            f"more than the budget of {file_limit(budget)}",
            "give one study at a time",
        )
    check_file_size(sum(path.stat().st_size for path in paths), "input: all files together", budget)


def _image(path: Path, where: str, budget: Budget) -> Image | None:
    """Return a file's header, or None for a directory of files (DICOMDIR) and for objects without a matrix.

    Whatever a reader raises on damaged bytes is one refusal: the error itself may quote the file.
    """
    try:
        meta = read_file_meta_info(path)
        syntax = UID(meta.TransferSyntaxUID)
        if meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
            return None
        if syntax in _UNDEFLATED or syntax == ExplicitVRBigEndian:
            refuse("compressed pixels", where, f"transfer syntax {syntax.name} ({syntax})")
        header = pydicom.dcmread(path, stop_before_pixels=True, defer_size=budget.metadata_bytes)
        for raw in header.values():
            if isinstance(raw, RawDataElement) and raw.value is None:  # larger than that: not read
                check_metadata_size(raw.length, where, budget, "an element of the header")
        if "Rows" not in header:
            if meta.get("MediaStorageSOPClassUID") in IMAGE_CLASSES:  # the reader takes a cut header for a short one
                raise KeyError("Rows")
            return None
        for keyword in ("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID"):
            if not str(header[keyword].value or ""):
                raise KeyError(keyword)
        for element in header:  # decodes every value: what is broken shows here, not in the middle of the work
            _ = element.value
    except DataError:
        raise
    except Exception as problem:
        missing = f", {problem.args[0]}" if isinstance(problem, KeyError) and str(problem.args[0]).isalpha() else ""
        raise DataError(
            f"{where}: broken file",
            f"the header cannot be read ({type(problem).__name__}{missing})",
            DEFECTS["broken file"],
        ) from None
    return Image(path, header)


def _rank(image: Image) -> tuple[int, str]:
    number = str(image.header.get("InstanceNumber") or "0").strip()
    return int(number) if number.lstrip("-").isdigit() else 0, str(image.header.SOPInstanceUID)


def text_of(header: Dataset, keyword: str) -> str:
    """Return an attribute as text without blanks at its ends, empty where there is none."""
    return str(header.get(keyword) or "").strip()


def is_localiser(header: Dataset) -> bool:
    """Return whether an image shows where other images lie, and is no slice of a volume."""
    return "LOCALIZER" in {str(kind).upper() for kind in header.get("ImageType") or []}
