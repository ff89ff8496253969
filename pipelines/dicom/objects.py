"""What all results share: who made them, from which weights, when, for whom; and their bytes."""

from __future__ import annotations

import datetime
import io
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pydicom
from highdicom.content import AlgorithmIdentificationSequence
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes

from pipelines.dicom.privacy import identify, quiet_reading, refuse_identity
from pipelines.dicom.series import Series
from pipelines.dicom.uids import PENDING, UNDATED, content_uid, settle

MAKER = "Fiducial"
SCHEME = "99FIDUCIAL"  # quantities that no standard has a code for
FIRST_SERIES_NUMBER = 9000  # of results, away from the scanner's


@dataclass(frozen=True)
class Origin:
    """Where a result comes from.

    Attributes:
        bundle: its name.
        weights: sha256 of every file of weights.
        keep_identity: copy the patient and study of the source. Without it a result has their attributes empty.
        moment: date and time of the result; None takes the study's with identity, and 1970-01-01 without: a result
            says when it was made only where somebody wants that equal results are different objects.
    """

    bundle: str
    weights: tuple[str, ...] = ()
    keep_identity: bool = False
    moment: datetime.datetime | None = None

    @property
    def seed(self) -> tuple[str, ...]:
        """What the UIDs of results depend on beside their content."""
        return (self.bundle, *self.weights)

    def algorithm(self) -> AlgorithmIdentificationSequence:
        """Return the bundle and its weights as DICOM describes algorithms."""
        parameters = {"weights": " ".join(digest[:12] for digest in self.weights)} if self.weights else None
        return AlgorithmIdentificationSequence(
            self.bundle[:64], codes.DCM.ArtificialIntelligence, software_version(), MAKER, parameters
        )


def software_version() -> str:
    """Return the version of this software, as installed."""
    try:
        return version("fiducial")
    except PackageNotFoundError:
        return "unknown"


def equipment(origin: Origin) -> dict[str, Any]:
    """Return the arguments of the General Equipment module and of the identifiers, for any object of highdicom."""
    return {
        "series_instance_uid": PENDING + ".1",
        "sop_instance_uid": PENDING + ".2",
        "instance_number": 1,
        "manufacturer": MAKER,
        "manufacturer_model_name": origin.bundle[:64],
        "software_versions": software_version(),
        "device_serial_number": content_uid(*origin.seed)[5:21],
    }


def finished(result: Dataset, origin: Origin, series: Series, description: str) -> Dataset:
    """Return ``result`` with its final UIDs, moment and identity.

    Args:
        result: an object of highdicom made from cleaned headers; changed in place.
        origin: where it comes from.
        series: that it was made from.
        description: of the new series.

    Raises:
        DataError: it names somebody although the identity is not kept.
    """
    header = series.header
    result.SeriesDescription = description[:64]
    kept = {str(header.StudyInstanceUID), str(header.SeriesInstanceUID), series.frame_of_reference}
    kept |= {str(image.header.SOPInstanceUID) for image in series.images}
    settle(result, _moment(origin, header), kept, *origin.seed, str(header.SeriesInstanceUID))
    if origin.keep_identity:
        identify(result, header)
    else:
        result.PatientIdentityRemoved = "YES"
        result.DeidentificationMethod = f"{MAKER}: made without the patient's attributes"
        refuse_identity(result, description)
    return result


def to_bytes(result: Dataset) -> bytes:
    """Return the DICOM file (PS3.10) of a result."""
    buffer = io.BytesIO()
    with quiet_reading():
        pydicom.dcmwrite(buffer, result, enforce_file_format=True)
    return buffer.getvalue()


def concept(value: str, meaning: str) -> CodedConcept:
    """Return a code of this software's own scheme."""
    return CodedConcept(value, SCHEME, meaning)


def _moment(origin: Origin, header: Dataset) -> datetime.datetime:
    if origin.moment is not None:
        return origin.moment.replace(tzinfo=None)
    if not origin.keep_identity:
        return UNDATED
    day, time = str(header.get("StudyDate", "") or ""), str(header.get("StudyTime", "") or "")[:6].ljust(6, "0")
    try:
        return datetime.datetime.strptime(day + time, "%Y%m%d%H%M%S")
    except ValueError:
        return UNDATED
