"""What the headers of a series must say before anything is made of it: one patient, one series, plain images, a place.

Pure checks on header values; where the slices lie to one another is the matter of ``geometry``.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydicom.uid import UID

from pipelines.dicom.geometry import Plane, refuse
from pipelines.dicom.series import IMAGE_CLASSES, Image, Series, is_localiser, text_of

_GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns")
_NUMBERS = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}


def planes_of(series: Series) -> list[Plane]:
    """Return where the slices of a series lie, in the order of its images.

    Raises:
        DataError: duplicate slice (one image in two files), different patients, mixed series, multi-frame, not a plain
            image, wrong modality, geometry missing, impossible geometry (values that are no numbers).
    """
    _refuse_copies(series)
    _refuse_mixture(series)
    return [_plane(image, series.what) for image in series.images]


def refuse_compressed(series: Series, decodable: Sequence[UID]) -> None:
    """Raise a ``DataError`` that names the transfer syntax unless every image is stored in one of ``decodable``."""
    for image in series.images:
        syntax = image.header.file_meta.TransferSyntaxUID
        if syntax not in decodable:
            named = syntax.name if syntax != syntax.name else "unknown"
            refuse("compressed pixels", f"{series.what}, {image.name}", f"transfer syntax {named} ({syntax})")


def _refuse_mixture(series: Series) -> None:
    """Refuse what shares a Series Instance UID and is not one series: some exports number every patient alike."""
    for image in series.images[1:]:
        for keyword in ("PatientID", "PatientName", "PatientBirthDate"):
            if text_of(image.header, keyword) != text_of(series.header, keyword):
                refuse("different patients", series.what, f"{image.name} has another {keyword} than the first")
        for keyword in ("StudyInstanceUID", "Modality", "SOPClassUID"):
            if text_of(image.header, keyword) != text_of(series.header, keyword):
                refuse("mixed series", series.what, f"{image.name} has another {keyword} than the first")


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
    if is_localiser(header):
        refuse("not a plain image", what, "a localiser")
    if str(header.get("BurnedInAnnotation", "")).upper() == "YES":
        refuse("not a plain image", what, "texts are burned into its pixels")
    expected = IMAGE_CLASSES.get(UID(str(header.SOPClassUID)))
    if expected is None:
        refuse("not a plain image", what, f"an object of class {UID(str(header.SOPClassUID)).name}")
    if expected != header.get("Modality"):
        refuse("wrong modality", what, f"modality {header.get('Modality')!s:.16} in an image of class {expected}")
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
