"""What may leave: the attributes of a header that results are made from, and the names that no text may carry.

Results are built from a *cleaned* header: a new data set with nothing but the attributes listed here, so what is not
listed (private tags, comments, names, dates) cannot leak by being forgotten. The names of a study are collected once
from its headers; errors and logs of everything done with it pass through ``without_names``, which takes them out, also
where a library or a path brings them in.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterable, Iterator

import pydicom.config
from pydicom.dataset import Dataset, FileMetaDataset

from transforms.errors import DataError, FiducialError, ResourceError, find_error

REMOVED = "[removed]"
# Geometry, and the identifiers without which a result cannot refer to its source. UIDs are pseudonyms (PS3.15, E.3.9).
_KEPT = [
    "SOPClassUID",
    "SOPInstanceUID",
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "FrameOfReferenceUID",
    "Modality",
    "InstanceNumber",
    "Rows",
    "Columns",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
    "ImageOrientationPatient",
    "ImagePositionPatient",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "SamplesPerPixel",
    "PhotometricInterpretation",
]
# Type 2 of the Patient and General Study modules: must be there, may be empty.
IDENTITY = [
    "PatientName",
    "PatientID",
    "PatientBirthDate",
    "PatientSex",
    "StudyID",
    "StudyDate",
    "StudyTime",
    "AccessionNumber",
    "ReferringPhysicianName",
]
_TEXTS = {"AccessionNumber", "InstitutionName", "InstitutionAddress", "InstitutionalDepartmentName", "StationName"}
_TEXTS |= {"PatientID", "OtherPatientIDs", "PatientBirthName", "PatientAddress", "PatientTelephoneNumbers", "StudyID"}
_TEXTS |= {"PatientBirthDate", "MilitaryRank", "PatientInsurancePlanCodeSequence", "IssuerOfPatientID"}
_TEXTS |= {"RequestingService", "CurrentPatientLocation", "DeviceSerialNumber", "PatientComments", "AdmissionID"}
_SHORTEST = 3  # letters; shorter words are in every sentence


def cleaned(header: Dataset) -> Dataset:
    """Return a new data set with the attributes that a result may be made from; identity is there and empty."""
    result = Dataset()
    for keyword in _KEPT:
        if keyword in header:
            setattr(result, keyword, header[keyword].value)
    for keyword in IDENTITY:
        setattr(result, keyword, "")
    result.file_meta = FileMetaDataset()
    result.file_meta.TransferSyntaxUID = header.file_meta.TransferSyntaxUID
    return result


def identify(result: Dataset, header: Dataset) -> None:
    """Copy the patient and study of ``header`` into a result that goes back into the archive it came from; in place."""
    if "SpecificCharacterSet" in header:
        result.SpecificCharacterSet = header.SpecificCharacterSet
    for keyword in IDENTITY:
        if keyword in header:
            result[keyword] = header[keyword]


def names_in(headers: Iterable[Dataset]) -> frozenset[str]:
    """Return the texts of headers that identify somebody, and their words: persons, numbers, institutions, addresses.

    Person names count at any depth. Descriptions and private elements are not collected: nothing quotes them.
    """
    found: set[str] = set()
    for header in headers:
        _collect(header, found)
    words = {word for text in found for word in re.split(r"[\s^=,;/_\\.]+", text)}
    return frozenset(text for text in found | words if _names_somebody(text))


def _collect(dataset: Dataset, found: set[str]) -> None:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value or []:
                _collect(item, found)
        elif element.VR == "PN" or element.keyword in _TEXTS:
            values = element.value if isinstance(element.value, (list, tuple)) or element.VM > 1 else [element.value]
            found.update(str(value).strip() for value in values if value)


def _names_somebody(text: str) -> bool:
    return len(text) >= _SHORTEST and text.casefold() not in {"none", "anonymous", "anonymized", "removed", "unknown"}


def redacted(text: str, names: Iterable[str]) -> str:
    """Return ``text`` with every name replaced; short names only where they are a word of their own."""
    for name in sorted(names, key=len, reverse=True):
        text = _pattern(name).sub(REMOVED, text)
    return text


def names_found(content: str | bytes, names: Iterable[str]) -> list[str]:
    """Return the names that occur in a text or in the bytes of a file, whatever their case."""
    text = content.decode("latin-1") if isinstance(content, bytes) else content
    return sorted(name for name in names if _pattern(name, isinstance(content, bytes)).search(text))


def _pattern(name: str, as_bytes: bool = False) -> re.Pattern[str]:
    spelt = name.encode().decode("latin-1") if as_bytes else name
    # a name in a path or a person name has other separators than in the header
    body = r"[\s^=,_\-]*".join(re.escape(part) for part in re.split(r"[\s^=,_\-]+", spelt) if part) or re.escape(spelt)
    return re.compile(body if len(name) > 4 else rf"(?<![^\W_]){body}(?![^\W_])", re.IGNORECASE)


@contextlib.contextmanager
def without_names(names: Iterable[str]) -> Iterator[None]:
    """Take ``names`` out of every error that is raised inside, and drop what it was caused by.

    A library's own error quotes the values that it stumbled over; so what is no error of ours becomes a ``DataError``
    that says its kind only.
    """
    names = frozenset(names)
    try:
        yield
    except Exception as problem:
        ours = find_error(problem)
        if ours is not None:
            clean: FiducialError = type(ours)(*(redacted(part, names) for part in (ours.what, ours.why, ours.fix)))
        elif isinstance(problem, (OSError, MemoryError)):
            clean = ResourceError(
                "DICOM: files cannot be read or written", redacted(str(problem), names), "check disk and permissions"
            )
        else:
            clean = DataError(
                "DICOM: the files cannot be used",
                f"{type(problem).__name__} without a reason that can be quoted here",
                "look at the series in a viewer; if it is sound, report this",
            )
        raise clean from None


@contextlib.contextmanager
def quiet_reading() -> Iterator[None]:
    """Let pydicom read without warnings: they quote the values that they are about."""
    settings = pydicom.config.settings
    before = settings.reading_validation_mode
    settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        settings.reading_validation_mode = before


def refuse_identity(result: Dataset, what: str) -> None:
    """Raise a ``DataError`` where a DICOM object has a person's name, a number or place of one, or a private element.

    Args:
        result: a DICOM object that is about to be written.
        what: the result, for the error message.
    """
    for element in result:
        if element.VR == "SQ":
            for item in element.value or []:
                refuse_identity(item, what)
        elif element.value and (
            element.tag.is_private
            or element.VR == "PN"
            or element.keyword in _TEXTS - {"DeviceSerialNumber"}  # ours: the software's
            or element.keyword in {"PatientSex", "StudyDate", "StudyTime"}
        ):
            raise DataError(f"{what}: not de-identified", f"{element.name} has a value", "report this defect")
