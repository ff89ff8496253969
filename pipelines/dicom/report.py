"""The volumes of a segmentation as a DICOM Structured Report (TID 1500): numbers that an archive can search.

Each label has one measurement group that refers to its segment: the finding, the volume in mL, and the means of the
maps of uncertainty. A label that was looked for and not found has a volume of 0 mL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import highdicom as hd
import numpy as np
from highdicom.sr.coding import CodedConcept
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipelines.dicom.objects import FIRST_SERIES_NUMBER, MAKER, Origin, concept, equipment, finished
from pipelines.dicom.parametric import QUANTITIES
from pipelines.dicom.privacy import cleaned
from pipelines.dicom.segmentation import SegmentCode, code_of, tracking_uid
from pipelines.dicom.uids import content_uid
from pipelines.dicom.volume import Volume
from pipelines.manifests.model import Label

MILLILITRE = CodedConcept("mL", "UCUM", "mL")
_PROCEDURES = {"CT": codes.cid100.CTUnspecifiedBodyRegion, "MR": codes.cid100.MRIUnspecifiedBodyRegion}


def measurement_report(
    segmentation: Dataset,
    volume: Volume,
    labels: Sequence[Label],
    measured: Sequence[Mapping[str, Any]],
    origin: Origin,
    given: Mapping[str, SegmentCode] | None = None,
) -> Dataset:
    """Return an SR (Comprehensive 3D, TID 1500) of the measurements of a segmentation.

    Args:
        segmentation: as ``dicom_segmentation`` returns it, finished.
        volume: the series that both are made from.
        labels: the label table.
        measured: per label: ``id``, ``volume_ml``, and ``mean_<map>`` for every map in ``QUANTITIES`` there is.
        origin: who made it.
        given: codes by label name.
    """
    rows = {int(row["id"]): row for row in measured}
    foreground = [label for label in labels if label.id != 0]
    groups = [
        _group(number, label, rows[label.id], segmentation, volume, origin, given)
        for number, label in enumerate(foreground, start=1)
    ]
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        content_uid("device", *origin.seed), name=MAKER, manufacturer_name=MAKER, model_name=origin.bundle[:64]
    )
    observer = hd.sr.ObserverContext(codes.DCM.Device, device)
    report = hd.sr.MeasurementReport(
        hd.sr.ObservationContext(observer_device_context=observer),
        procedure_reported=_PROCEDURES.get(volume.series.modality, codes.cid100.ImagingProcedure),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    evidence = [cleaned(header) for header in volume.sources]
    result = hd.sr.Comprehensive3DSR(
        [*evidence, _as_evidence(segmentation)],
        report[0],
        series_number=FIRST_SERIES_NUMBER + 1,
        is_complete=True,
        is_final=False,
        is_verified=False,
        **equipment(origin),
    )
    return finished(result, origin, volume.series, f"{origin.bundle} measurements")


def volumes_of_report(result: Dataset) -> dict[str, float]:
    """Return the volume in mL of every tracking identifier of a report."""
    volumes: dict[str, float] = {}
    for group in _items(result, codes.DCM.MeasurementGroup):
        name = next(iter(_items(group, codes.DCM.TrackingIdentifier))).TextValue
        for number in _items(group, codes.SCT.Volume):
            volumes[str(name)] = float(number.MeasuredValueSequence[0].NumericValue)
    return volumes


def _group(
    number: int,
    label: Label,
    row: Mapping[str, Any],
    segmentation: Dataset,
    volume: Volume,
    origin: Origin,
    given: Mapping[str, SegmentCode] | None,
) -> hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations:
    code = code_of(label, given)
    measurements = [_number(codes.SCT.Volume, row["volume_ml"], MILLILITRE)]
    for name, quantity in QUANTITIES.items():
        if row.get(f"mean_{name}") is not None:
            measurements.append(
                _number(concept(quantity.code, quantity.meaning), row[f"mean_{name}"], codes.UCUM.NoUnits, mean=True)
            )
    return hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
        hd.sr.TrackingIdentifier(
            uid=tracking_uid(label, volume, origin), identifier=f"{label.name} {volume.series.key}"[:64]
        ),
        referenced_segment=hd.sr.ReferencedSegment(
            segmentation.SOPClassUID,
            segmentation.SOPInstanceUID,
            number,
            source_series=hd.sr.SourceSeriesForSegmentation(str(volume.series.header.SeriesInstanceUID)),
        ),
        finding_type=code.kind,
        finding_category=code.category,
        finding_sites=None if code.site is None else [hd.sr.FindingSite(code.site)],
        algorithm_id=hd.sr.AlgorithmIdentification(
            origin.bundle[:64], str(segmentation.SoftwareVersions), family=codes.DCM.ArtificialIntelligence
        ),
        measurements=measurements,
    )


def _number(
    name: Code | CodedConcept, value: float, unit: Code | CodedConcept, mean: bool = False
) -> hd.sr.Measurement:
    # the value representation DS holds sixteen characters
    rounded = float(np.format_float_scientific(value, precision=8)) if value else 0.0
    return hd.sr.Measurement(name, rounded, unit, derivation=codes.SCT.Mean if mean else None)


def _as_evidence(segmentation: Dataset) -> Dataset:
    """Return the segmentation's identifiers, patient and study empty as in the other evidence."""
    evidence = cleaned(segmentation)
    evidence.Modality = "SEG"
    return evidence


def _items(dataset: Dataset, code: Code) -> list[Dataset]:
    found = []
    for item in dataset.get("ContentSequence", []):
        name = item.get("ConceptNameCodeSequence")
        if name and (name[0].get("CodeValue"), name[0].get("CodingSchemeDesignator")) == (
            code.value,
            code.scheme_designator,
        ):
            found.append(item)
        found += _items(item, code)
    return found
