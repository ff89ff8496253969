"""Predictions back to DICOM: of every case a segmentation, parametric maps and a report that refer to its series.

What is written is decoded again first and must be what was predicted, voxel by voxel. ``result.json`` beside the
objects holds the same numbers, what was done to the images on their way in, and the weights; it is written last.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.dicom.cases import DicomCase, DicomCases
from pipelines.dicom.objects import Origin, to_bytes
from pipelines.dicom.parametric import QUANTITIES, parametric_map, values_of_map
from pipelines.dicom.privacy import without_names
from pipelines.dicom.report import measurement_report
from pipelines.dicom.segmentation import SegmentCode, dicom_segmentation, labels_of_segmentation
from pipelines.files import write_atomically, write_json
from pipelines.inference.output import uncertainty_inside, volumes
from pipelines.manifests.model import Label
from transforms.errors import BundleError, DataError
from transforms.ingest_checks import GRID_TOLERANCE
from transforms.nifti import read_header, read_label, read_voxels

Maps = Mapping[str, NDArray[Any]]


def write_back(
    predictions: str | Path,
    cases: DicomCases,
    out: str | Path,
    labels: Sequence[Label],
    origin: Origin,
    codes: Mapping[str, SegmentCode] | None = None,
) -> list[Path]:
    """Write the predictions of cases as DICOM: ``<out>/<case>/segmentation.dcm``, ``measurements.dcm``, ``<map>.dcm``.

    Args:
        predictions: folder with ``<case>.nii.gz`` (label map) and ``<case>_<map>.nii.gz`` for maps in ``QUANTITIES``.
        cases: as ``as_case_folders`` returned them.
        out: a folder per case is made in it.
        labels: the label table of the weights.
        origin: who made the predictions.
        codes: of labels, by name.

    Returns:
        The files written.

    Raises:
        DataError: no prediction for a case, or one on another grid.
        UsageError: a label without a code.
        BundleError: an object that does not hold what was predicted.
    """
    written: list[Path] = []
    with without_names(cases.names):
        for case in cases.cases:
            folder = Path(out) / case.name
            objects, record = _results(Path(predictions), case, labels, origin, codes)
            for name, content in objects.items():
                write_atomically(folder / name, content)
                written.append(folder / name)
            write_json(folder / "result.json", record)
            written.append(folder / "result.json")
    return written


def weights_named(predictions: Path) -> tuple[str, ...]:
    """Return the digests of the weights that predictions name in their JSON."""
    digests: set[str] = set()
    for path in predictions.glob("*.json"):
        weights = json.loads(path.read_text()).get("weights", [])
        digests |= {entry["sha256"] for entry in (weights if isinstance(weights, list) else [weights])}
    return tuple(sorted(digests))


def _results(
    predictions: Path, case: DicomCase, labels: Sequence[Label], origin: Origin, codes: Mapping[str, SegmentCode] | None
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Return the DICOM files of a case by name, and its record."""
    maps = {}
    for name in QUANTITIES:
        path = predictions / f"{case.name}_{name}.nii.gz"
        if path.is_file():
            _refuse_other_grid(path, case)
            maps[name] = read_voxels(path, case=case.name, key=name)
    objects = {f"{name}.dcm": _map_object(name, values, case, origin) for name, values in maps.items()}
    record: dict[str, Any] = {
        "case": case.name,
        "series": dict(case.series),
        "spacing_mm": _spacing(case),
        "notes": list(case.notes),
        "maps": {name: {"mean": float(v.mean()), "max": float(v.max())} for name, v in maps.items()},
        "weights": list(origin.weights),
    }
    path = predictions / f"{case.name}.nii.gz"
    if path.is_file():
        _refuse_other_grid(path, case)
        prediction = read_label(path, case=case.name)
        rows = _measured(prediction, maps, case, labels)
        objects |= _segmentation_objects(prediction, rows, case, labels, origin, codes)
        record["labels"] = rows
    if not objects:
        raise DataError(f"case {case.name}: no prediction", f"neither {path.name} nor a map", "run the bundle again")
    return objects, record


def _measured(prediction: NDArray[Any], maps: Maps, case: DicomCase, labels: Sequence[Label]) -> list[dict[str, Any]]:
    table = {label.id: label.name for label in labels}
    rows = volumes(prediction, _spacing(case), table)
    inside = {row["id"]: row for row in uncertainty_inside(prediction, maps, table)} if maps else {}
    return [{**row, **inside.get(row["id"], {})} for row in rows]


def _map_object(name: str, values: NDArray[Any], case: DicomCase, origin: Origin) -> bytes:
    result = parametric_map(values, case.volume, name, origin)
    if not np.array_equal(values_of_map(result, case.volume), case.volume.to_slices(values)):
        raise BundleError(f"case {case.name}: the map {name} is not what was predicted", "it differs", "report this")
    return to_bytes(result)


def _segmentation_objects(
    prediction: NDArray[Any],
    measured: Sequence[Mapping[str, Any]],
    case: DicomCase,
    labels: Sequence[Label],
    origin: Origin,
    codes: Mapping[str, SegmentCode] | None,
) -> dict[str, bytes]:
    volume = case.volume
    segmentation = dicom_segmentation(prediction, volume, labels, origin, codes)
    numbers = np.zeros(256, np.uint8)
    for number, label in enumerate((label for label in labels if label.id != 0), start=1):
        numbers[label.id] = number
    differing = int((labels_of_segmentation(segmentation, volume) != numbers[volume.to_slices(prediction)]).sum())
    if differing:
        raise BundleError(f"case {case.name}: segmentation", f"{differing} voxels differ when read back", "report this")
    report = measurement_report(segmentation, volume, labels, measured, origin, codes)
    return {"segmentation.dcm": to_bytes(segmentation), "measurements.dcm": to_bytes(report)}


def _spacing(case: DicomCase) -> tuple[float, ...]:
    return tuple(float(np.linalg.norm(case.volume.affine[:3, axis])) for axis in range(3))


def _refuse_other_grid(path: Path, case: DicomCase) -> None:
    header = read_header(path, case=case.name)
    difference = np.abs(header.affine - case.volume.affine).max()
    if header.shape != case.volume.voxels.shape or difference > GRID_TOLERANCE:
        raise DataError(
            f"case {case.name}: {path.name} is on another grid than the series",
            f"shape {header.shape}, expected {case.volume.voxels.shape}; affines differ by {difference:.3g}",
            "write predictions on the grid of the image that came in",
        )
