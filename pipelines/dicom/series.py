"""The series in a folder or a zip file: every file looked at once, nothing decoded, one line per series.

A folder from an archive holds several series, localisers, reports and whatever else somebody put there. Files that are
no DICOM are counted, not guessed at; a zip file is unpacked under numbers, within a budget, so that neither its names
nor its size can do harm. A series is called by a digest of its UID: descriptions are free text of the hospital.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset
from pydicom.filereader import read_file_meta_info
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, MediaStorageDirectoryStorage

from pipelines.dicom.detect import begins_as_dicom
from pipelines.dicom.geometry import DEFECTS, Plane, refuse
from pipelines.dicom.privacy import names_in, quiet_reading
from transforms.errors import DataError
from transforms.ingest_budget import Budget, check_file_size, variable

ATTEMPTED_FILES = 2**16  # of one study
COMPRESSION_LIMIT = 200  # of a member of a zip file: slices compress by 2 to 10, a bomb by 1000
_UNDEFLATED = {DeflatedExplicitVRLittleEndian}  # inflating has no limit in the reader
_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_NUMBERS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


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
    def frame_of_reference(self) -> str:
        """UID of the coordinates that the positions are given in."""
        return str(self.header.get("FrameOfReferenceUID", ""))

    @property
    def what(self) -> str:
        """What an error calls the series."""
        return f"series {self.key} ({self.modality})"


@dataclass(frozen=True, eq=False)
class Found:
    """The series of a source, the names in their headers, and how many files were passed over as no DICOM images."""

    series: tuple[Series, ...]
    names: frozenset[str]
    passed_over: int


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
            file, one image in two files.
    """
    source, budget = Path(source), budget or Budget.of_environment()
    if source.is_dir():
        paths = sorted(path for path in source.rglob("*") if path.is_file() and not path.is_symlink())
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
            image = _image(path, f"file {number} of {len(paths)} (by path)") if begins_as_dicom(path) else None
            if image is None:
                passed_over += 1
            else:
                groups.setdefault(str(image.header.SeriesInstanceUID), []).append(image)
        names = names_in(image.header for images in groups.values() for image in images)
    if not groups:
        raise DataError(
            "input: no DICOM image found", f"{passed_over} files, none of them one", "give a folder of DICOM"
        )
    series = [Series(digest_key(uid), tuple(sorted(images, key=_rank))) for uid, images in groups.items()]
    for one in series:
        _refuse_copies(one)
    return Found(tuple(sorted(series, key=lambda one: one.key)), names, passed_over)


def line_of(series: Series) -> str:
    """Return a series in one line: key, modality, images, matrix, and nothing that somebody typed."""
    header = series.header
    matrix = f"{header.get('Columns', '?')} x {header.get('Rows', '?')}"
    return f"{series.key}  {series.modality:<3} {len(series.images):>5} images  {matrix}"


def planes_of(series: Series) -> list[Plane]:
    """Return where the slices of a series lie, in the order of its images.

    Raises:
        DataError: multi-frame, not a plain image, geometry missing, impossible geometry (values that are no numbers).
    """
    return [_plane(image, series.what) for image in series.images]


def refuse_compressed(series: Series, decodable: Sequence[UID]) -> None:
    """Raise a ``DataError`` that names the transfer syntax unless every image is stored in one of ``decodable``."""
    for image in series.images:
        syntax = image.header.file_meta.TransferSyntaxUID
        if syntax not in decodable:
            named = syntax.name if syntax != syntax.name else "unknown"
            refuse("compressed pixels", f"{series.what}, {image.name}", f"transfer syntax {named} ({syntax})")


def unpacked(archive: Path, folder: Path, budget: Budget) -> Iterator[Path]:
    """Unpack a zip file into ``folder`` under running numbers; yield the files.

    Raises:
        DataError: no zip file, encrypted, damaged (CRC), more files or bytes than the budget, inflating too much.
    """
    where, again = "input: the zip file", "send the archive again"
    check_file_size(archive.stat().st_size, where, budget)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [member for member in opened.infolist() if not member.is_dir()]
            total = sum(member.file_size for member in members)
            if len(members) > min(budget.files, ATTEMPTED_FILES) or total > budget.file_bytes:
                raise DataError(
                    where,
                    f"{len(members)} files and {total} bytes, more than the budget of "
                    f"{min(budget.files, ATTEMPTED_FILES)} files and {budget.file_bytes} bytes",
                    f"give one study at a time, or raise {variable('file_bytes')}",
                )
            for number, member in enumerate(members, start=1):
                if member.flag_bits & 1:
                    raise DataError(f"{where}, member {number}", "it is encrypted", "unpack it first")
                if member.file_size > COMPRESSION_LIMIT * max(member.compress_size, 1):
                    ratio = member.file_size / max(member.compress_size, 1)
                    raise DataError(f"{where}, member {number}", f"it inflates {ratio:.0f} times", "unpack it first")
                path = folder / f"{number:06d}.dcm"
                with opened.open(member) as packed, path.open("wb") as file:
                    while block := packed.read(2**20):  # never more than the size declared, and its CRC is compared
                        file.write(block)
                yield path
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zipfile.LargeZipFile) as problem:
        raise DataError(where, f"it is damaged or of an unknown kind ({type(problem).__name__})", again) from None
    except Exception as problem:
        if isinstance(problem, (DataError, OSError)):
            raise
        raise DataError(where, f"it cannot be unpacked ({type(problem).__name__})", again) from None


def check_amount(paths: Sequence[Path], budget: Budget) -> None:
    """Raise a ``DataError`` where files are more, or together larger, than the budget."""
    if len(paths) > min(budget.files, ATTEMPTED_FILES):
        raise DataError(
            f"input: {len(paths)} files",
            f"more than the budget of {min(budget.files, ATTEMPTED_FILES)}",
            "give one study at a time",
        )
    check_file_size(sum(path.stat().st_size for path in paths), "input: all files together", budget)


def _image(path: Path, where: str) -> Image | None:
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
        header = pydicom.dcmread(path, stop_before_pixels=True)
        if "Rows" not in header:
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


def _refuse_copies(series: Series) -> None:
    uids: dict[str, Image] = {}
    for image in series.images:
        other = uids.setdefault(str(image.header.SOPInstanceUID), image)
        if other is not image:
            refuse("duplicate slice", series.what, f"{image.name} is there in two files with one SOP Instance UID")


def _plane(image: Image, series: str) -> Plane:
    header, what = image.header, f"{series}, {image.name}"
    frames = str(header.get("NumberOfFrames") or 1)
    if frames != "1" or "SharedFunctionalGroupsSequence" in header or "PerFrameFunctionalGroupsSequence" in header:
        refuse("multi-frame", what, f"{frames} frames in one file")
    if int(header.get("SamplesPerPixel", 1) or 1) != 1:
        refuse("not a plain image", what, f"{header.SamplesPerPixel} samples per pixel")
    kinds = [str(kind).upper() for kind in header.get("ImageType") or []]
    if "LOCALIZER" in kinds:
        refuse("not a plain image", what, "a localiser")
    missing = [keyword for keyword in _GEOMETRY if keyword not in header or header[keyword].value in (None, "", [])]
    if missing:
        refuse("geometry missing", what, f"no {', '.join(missing)}")
    values: dict[str, tuple[float, ...]] = {}
    for keyword, length in _NUMBERS.items():
        try:
            values[keyword] = tuple(float(number) for number in header[keyword].value)
        except (TypeError, ValueError):
            values[keyword] = ()
        if len(values[keyword]) != length:
            refuse("impossible geometry", what, f"{keyword} is no list of {length} numbers")
    a, b, c, d, e, f = values["ImageOrientationPatient"]
    x, y, z = values["ImagePositionPatient"]
    row_distance, column_distance = values["PixelSpacing"]
    return Plane(
        image.name,
        int(header.Rows),
        int(header.Columns),
        (row_distance, column_distance),
        (a, b, c, d, e, f),
        (x, y, z),
        str(header.get("FrameOfReferenceUID", "")),
    )
