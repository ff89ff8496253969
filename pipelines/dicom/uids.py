"""Unique identifiers that follow from content: the same result written twice is the same DICOM object, byte for byte.

An archive takes two objects of one SOP Instance UID for the same object, and two UIDs for two results. So a UID here is
a digest of what it names: sent again after a network failure, a result does not appear twice in the study. The form is
``2.25.`` and a UUID as a decimal number (DICOM PS3.5, B.2), the UUID of version 8, made from SHA-256 (RFC 9562, 5.8).
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Collection
from typing import Any

from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.uid import UID
from pydicom.valuerep import DA, TM

LIBRARY_ROOT = "1.2.826.0.1.3680043.10.511.3."  # what highdicom draws at random stands below it
PENDING = LIBRARY_ROOT + "1"  # stands for a UID until the content that it will follow from is complete
UNDATED = datetime.datetime(1970, 1, 1)  # says "not stated"
_DATES = {"InstanceCreationDate", "ContentDate", "SeriesDate", "Date"}
_TIMES = {"InstanceCreationTime", "ContentTime", "SeriesTime", "Time"}
_DATETIMES = {"ContributionDateTime", "ObservationDateTime", "DateTime"}


def content_uid(*parts: str | bytes) -> str:
    """Return the UID of a sequence of texts or bytes; ``("ab", "c")`` and ``("a", "bc")`` are different content."""
    digest = hashlib.sha256()
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "big") + content)
    bits = int.from_bytes(digest.digest()[:16], "big")
    bits = bits & ~(0xF << 76) | (8 << 76)  # version 8
    bits = bits & ~(0x3 << 62) | (2 << 62)  # variant of RFC 9562
    return f"2.25.{bits}"


def settle(result: Dataset, moment: datetime.datetime, kept: Collection[str], *seed: str) -> None:
    """Put ``moment`` and content UIDs into ``result`` wherever the library put the clock and random UIDs; in place.

    The UIDs are numbered in the order in which they occur, and the digest is that of the object with the numbers in
    their place, so it depends on nothing that is not content.

    Args:
        result: an object of highdicom, complete.
        moment: what to write for every date and time of making.
        kept: UIDs of the sources, which may have been made by the same library.
        seed: further texts that the UIDs depend on.
    """
    _set_moment(result, moment)
    numbers: dict[str, int] = {}
    drawn = _drawn(result, kept)
    for element in drawn:
        element.value = UID(f"{LIBRARY_ROOT}{numbers.setdefault(str(element.value), len(numbers) + 1)}")
    digest = dataset_digest(result)
    for element in drawn:
        element.value = UID(content_uid(*seed, digest, str(element.value)))
    result.file_meta.MediaStorageSOPInstanceUID = result.SOPInstanceUID


def dataset_digest(dataset: Dataset) -> str:
    """Return the sha256 of a data set's elements: the same for the same values, however they are stored."""
    return hashlib.sha256(json.dumps(_plain(dataset), ensure_ascii=False).encode()).hexdigest()


def _plain(dataset: Dataset) -> list[Any]:
    rows: list[Any] = []
    for element in dataset:
        if element.VR == "SQ":
            value: Any = [_plain(item) for item in element.value or []]
        elif isinstance(element.value, bytes):
            value = hashlib.sha256(element.value).hexdigest()
        else:
            value = str(element.value)
        rows.append([str(element.tag), element.VR, value])
    return rows


def _drawn(dataset: Dataset, kept: Collection[str]) -> list[DataElement]:
    """Return the elements, at any depth and in their order, whose UID the library drew."""
    found: list[DataElement] = []
    for element in dataset:
        if element.VR == "SQ":
            found += [below for item in element.value or [] for below in _drawn(item, kept)]
        elif element.VR == "UI" and str(element.value).startswith(LIBRARY_ROOT) and str(element.value) not in kept:
            found.append(element)
    return found


def _set_moment(dataset: Dataset, moment: datetime.datetime) -> None:
    for element in dataset:
        if element.VR == "SQ":
            for item in element.value or []:
                _set_moment(item, moment)
        elif element.keyword in _DATES:
            element.value = DA(moment.date())
        elif element.keyword in _TIMES:
            element.value = TM(moment.time().replace(microsecond=0))
        elif element.keyword in _DATETIMES:
            element.value = f"{moment:%Y%m%d%H%M%S}"
