"""Between a hospital's DICOM and a bundle: series to case folders of NIfTI, predictions back to DICOM.

A bundle knows NIfTI cases and nothing of DICOM. ``as_case_folders`` chooses the series that the weights' contract asks
for, takes them through the gate and writes them as cases called by digests; ``write_back`` makes of every prediction a
segmentation, parametric maps and a report that refer to the series. Which sequence an MR series is, is read from its
description, and where that does not say it, it must be given: a T1 taken for a FLAIR would be segmented without a word.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.processing import resample_from_to
from numpy.typing import NDArray

from pipelines.dicom.geometry import DEFECTS, refuse
from pipelines.dicom.objects import Origin, to_bytes
from pipelines.dicom.parametric import QUANTITIES, parametric_map, values_of_map
from pipelines.dicom.privacy import without_names
from pipelines.dicom.report import measurement_report
from pipelines.dicom.segmentation import (
    SegmentCode,
    code_of,
    codes_from_raw,
    dicom_segmentation,
    labels_of_segmentation,
)
from pipelines.dicom.series import Series, find_series, line_of
from pipelines.dicom.volume import Volume, read_volume
from pipelines.files import write_atomically, write_json
from pipelines.inference.output import uncertainty_inside, volumes
from pipelines.manifests.model import Label
from transforms.errors import BundleError, DataError, UsageError
from transforms.ingest_checks import GRID_TOLERANCE
from transforms.nifti import read_header, read_label, read_voxels

_LOG = logging.getLogger(__name__)
_MODALITIES = {"ct": "CT", "pet": "PT", "pt": "PT"}
_ANY_MR = {"mri", "mr"}
_SEQUENCES = {
    **dict.fromkeys(("flair", "t2flair", "t2-flair"), "flair"),
    **dict.fromkeys(("t1", "t1w", "t1n", "mprage"), "t1"),
    **dict.fromkeys(("t1ce", "t1c", "t1gd", "t1post"), "t1ce"),
    **dict.fromkeys(("t2", "t2w"), "t2"),
    **dict.fromkeys(("pd", "pdw"), "pd"),
}
_CONTRAST = re.compile(r"(?<![a-z])(ce|gd|gad\w*|post|contrast|km|dotarem|\+c)(?![a-z])|t1c(?![a-z])|t1ce|t1gd")


@dataclass(frozen=True, eq=False)
class DicomCase:
    """A case and where it came from: its name, and the volume (without voxels) that results go back to."""

    name: str
    volume: Volume


@dataclass(frozen=True, eq=False)
class DicomCases:
    """What ``as_case_folders`` wrote.

    Attributes:
        folder: the case folders, as ``items_from_path`` reads them.
        cases: in the order of their names.
        names: texts of the headers that identify somebody; for ``without_names``.
        lines: one line per series of the source, what became of it included.
    """

    folder: Path
    cases: tuple[DicomCase, ...]
    names: frozenset[str]
    lines: tuple[str, ...]


def as_case_folders(
    source: str | Path,
    contract_modalities: Sequence[str],
    work_dir: str | Path,
    *,
    optional: Sequence[str] = (),
    chosen: Mapping[str, str] | None = None,
    allow_resampling: bool = False,
) -> DicomCases:
    """Write the series of a source that a contract asks for as case folders of NIfTI.

    With one modality every fitting series is a case; with several, every study is one, of series on one grid.

    Args:
        source: folder, file or zip file of DICOM.
        contract_modalities: the weights' modalities in the order of their channels.
        work_dir: folder for the cases and for what a zip file holds.
        optional: modalities that may be missing.
        chosen: key of the series (``Series.key``) by modality, where the headers do not tell.
        allow_resampling: interpolate tilted or unevenly spaced stacks, and series on other grids than the first's.

    Raises:
        DataError: every defect of ``geometry.DEFECTS``; no series of the modalities; series of a case that differ in
            grid or frame of reference.
        UsageError: a sequence that cannot be told, two series for one modality, a chosen series that is not there.
    """
    work = Path(work_dir)
    found = find_series(source, work / "unpacked")
    with without_names(found.names):
        studies = _assigned(found.series, contract_modalities, optional, dict(chosen or {}))
        used = {series.key: name for study in studies for name, series in study.items()}
        lines = tuple(f"{line_of(s)}  {used.get(s.key, 'not used')}" for s in found.series)
        cases = [_write_case(study, work / "cases", allow_resampling) for study in studies]
    return DicomCases(work / "cases", tuple(sorted(cases, key=lambda case: case.name)), found.names, lines)


def write_back(
    predictions: str | Path,
    cases: DicomCases,
    out: str | Path,
    labels: Sequence[Label],
    origin: Origin,
    codes: Mapping[str, SegmentCode] | None = None,
) -> list[Path]:
    """Write the predictions of cases as DICOM: ``<out>/<case>/segmentation.dcm``, a map per file, ``measurements.dcm``.

    ``volumes.json`` beside them holds the same numbers. A segmentation is decoded again before it is written, and must
    be the label map on the source's slices, voxel by voxel.

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
        BundleError: a segmentation that does not hold the label map.
    """
    written: list[Path] = []
    with without_names(cases.names):
        for case in cases.cases:
            folder = Path(out) / case.name
            for name, content in _results(Path(predictions), case, labels, origin, codes).items():
                if isinstance(content, bytes):
                    write_atomically(folder / name, content)
                else:
                    write_json(folder / name, content)
                written.append(folder / name)
    return written


@dataclass(frozen=True, eq=False)
class DicomRequest:
    """A bundle that DICOM can be given to, all that does not depend on a study found out and in order.

    Attributes:
        bundle, variants: as for ``run_bundle``.
        overrides: of the bundle's keys.
        options: our own, ``dicom_`` taken off.
        name: the bundle's.
        contract: of its weights.
        labels: its label table; empty where there is none.
        codes: of labels, by name, as given.
    """

    bundle: str
    variants: Sequence[str]
    overrides: Mapping[str, Any]
    options: Mapping[str, Any]
    name: str
    contract: Mapping[str, Any]
    labels: Sequence[Label]
    codes: Mapping[str, SegmentCode]


def check_request(bundle: str, overrides: Mapping[str, Any], variants: Sequence[str] = ()) -> DicomRequest:
    """Return what predictions on DICOM need of a bundle, before there is a study: see ``predict_dicom``.

    Raises:
        FiducialError: no such bundle, option or weights, or a label without a code.
    """
    from pipelines.manifests.selection import labels_of
    from pipelines.runner import bundle_parser

    theirs = {key: value for key, value in overrides.items() if not key.startswith("dicom_")}
    ours = _own_options({key: value for key, value in overrides.items() if key.startswith("dicom_")})
    codes = _code_file(ours["codes"])
    with bundle_parser(bundle, "inference", theirs, variants) as parser:
        contract = parser.get_parsed_content("contract")
        name = str(parser.get("bundle_name") or Path(bundle).name)
    labels = labels_of(contract) if "labels" in contract else []
    for label in labels:
        if label.id != 0:
            code_of(label, codes)
    return DicomRequest(bundle, variants, theirs, ours, name, contract, labels, codes)


def predict_dicom(
    bundle: str,
    source: str | Path,
    out: str | Path,
    overrides: Mapping[str, Any],
    variants: Sequence[str] = (),
    say: Callable[[str], object] = _LOG.info,
) -> list[Path]:
    """Run a bundle's inference on DICOM; results are DICOM. Images in between lie in a temporary folder.

    Args:
        bundle: name or path.
        source: folder, file or zip file of DICOM.
        out: folder of the results.
        overrides: of the bundle, and ours: ``dicom_series`` (``flair=0b04b64f,t1=...``), ``dicom_allow_resampling``,
            ``dicom_keep_identity``, ``dicom_codes`` (a JSON file of codes by label name).
        variants: configuration files laid over the bundle's.
        say: called with one line per series of the source.

    Returns:
        The files written.

    Raises:
        FiducialError: as ``check_request``, ``as_case_folders``, the bundle and ``write_back``.
    """
    from pipelines.runner import run_bundle

    request = check_request(bundle, overrides, variants)
    contract, options = request.contract, request.options
    with tempfile.TemporaryDirectory(prefix="fiducial-") as temporary:
        work = Path(temporary)
        cases = as_case_folders(
            source,
            contract["modalities"],
            work,
            optional=contract.get("optional_modalities", ()),
            chosen=options["series"],
            allow_resampling=options["allow_resampling"],
        )
        for line in cases.lines:
            say(line)
        inputs = {"input": str(cases.folder), "output_dir": str(work / "predictions")}
        run_bundle(bundle, "inference", {**request.overrides, **inputs}, variants)  # sees digests, no names
        origin = Origin(request.name, _weights(work / "predictions"), options["keep_identity"])
        return write_back(work / "predictions", cases, out, request.labels, origin, request.codes)


def sequence_of(series: Series) -> str | None:
    """Return the sequence that an MR series' description or protocol names (flair, t1, t1ce, t2, pd), or None."""
    header = series.header
    texts = [str(header.get(keyword, "") or "").casefold() for keyword in ("SeriesDescription", "ProtocolName")]
    for text in texts:
        if "flair" in text or "dark fluid" in text or "dark-fluid" in text:
            return "flair"
        weighted = {
            name for name in ("t1", "t2", "pd") if re.search(rf"(?<![a-z0-9]){name}(w|-?weighted)?(?![0-9*])", text)
        }
        if "mprage" in text or "mp2rage" in text or "bravo" in text:
            weighted.add("t1")
        if re.search(r"t2[ _-]?(\*|star)", text):
            weighted.discard("t2")
        if len(weighted) == 1:
            sequence = weighted.pop()
            return "t1ce" if sequence == "t1" and _CONTRAST.search(text) else sequence
    return None


def _assigned(
    series: Sequence[Series], modalities: Sequence[str], optional: Sequence[str], chosen: dict[str, str]
) -> list[dict[str, Series]]:
    """Return per case the series of every modality that it has."""
    by_key = {one.key: one for one in series}
    for name, key in chosen.items():
        if name not in modalities or key not in by_key:
            raise UsageError(
                f"series {key!r} for modality {name!r}: not there",
                f"modalities {', '.join(modalities)}; series {', '.join(sorted(by_key))}",
                "write modality=key as the list of series gives it",
            )
    usable = [one for one in series if not _is_localiser(one)]
    studies: dict[str, dict[str, list[Series]]] = {}
    for name in modalities:
        fitting = (
            [by_key[chosen[name]]]
            if name in chosen
            else [one for one in usable if _fits(one, name, modalities) and one.key not in chosen.values()]
        )
        for one in fitting:
            studies.setdefault(one.study, {}).setdefault(name, []).append(one)
    required = [name for name in modalities if name not in optional]
    if not studies:
        _refuse_without(usable or series, modalities)
    if len(modalities) == 1:
        return [{modalities[0]: one} for found in studies.values() for one in found[modalities[0]]]
    assigned = []
    for found in studies.values():
        missing = [name for name in required if name not in found]
        if missing:
            present = ", ".join(f"{name} ({one.key})" for name, ones in found.items() for one in ones)
            raise DataError(
                f"study with {present}: wrong modality", f"no series for {missing[0]}", DEFECTS["wrong modality"]
            )
        for name, ones in found.items():
            if len(ones) > 1:
                keys = ", ".join(one.key for one in ones)
                raise UsageError(
                    f"modality {name}: {len(ones)} series", f"series {keys}", f"choose one: {name}={ones[0].key}"
                )
        assigned.append({name: found[name][0] for name in modalities if name in found})
    return assigned


def _fits(series: Series, name: str, modalities: Sequence[str]) -> bool:
    lower = name.casefold()
    if series.modality != _MODALITIES.get(lower, "MR"):
        return False
    if lower in _MODALITIES or lower in _ANY_MR:
        return True
    wanted, found = _SEQUENCES.get(lower), sequence_of(series)
    return wanted is not None and wanted == found


def _refuse_without(series: Sequence[Series], modalities: Sequence[str]) -> None:
    """Say why no series fits: another modality, another sequence, or a sequence that the headers do not tell."""
    wanted = {_MODALITIES.get(name.casefold(), "MR") for name in modalities}
    there = [one for one in series if one.modality in wanted]
    listed = ", ".join(f"{one.key} ({one.modality}{_said(one)})" for one in series[:8])
    if not there:
        refuse("wrong modality", "input", f"found {listed}; the weights need {', '.join(modalities)}")
    untold = [one for one in there if one.modality == "MR" and sequence_of(one) is None]
    if untold:
        raise UsageError(
            f"{untold[0].what}: its sequence cannot be told",
            f"the description names none of the known ones; found {listed}",
            f"say which series it is: --dicom_series {modalities[0]}={untold[0].key}",
        )
    refuse("wrong modality", "input", f"found {listed}; the weights need {', '.join(modalities)}")


def _said(series: Series) -> str:
    sequence = sequence_of(series) if series.modality == "MR" else None
    return f", {sequence}" if sequence else ""


def _is_localiser(series: Series) -> bool:
    kinds = {str(kind).upper() for kind in series.header.get("ImageType") or []}
    return "LOCALIZER" in kinds or series.modality in {"SEG", "SR", "PR", "RTSTRUCT"}


def _write_case(study: Mapping[str, Series], folder: Path, allow_resampling: bool) -> DicomCase:
    names = list(study)
    first = read_volume(study[names[0]], allow_resampling)
    case = f"series-{first.series.key}"
    reference = nib.Nifti1Image(first.voxels, first.affine)
    for name in names:
        volume = first if name == names[0] else read_volume(study[name], allow_resampling)
        image = reference if volume is first else _on_grid(volume, first, reference, allow_resampling)
        for reason in filter(None, [volume.resampled]):
            _LOG.warning("%s: resampled; %s", volume.series.what, reason)
        if volume.padding[0]:
            _LOG.info("%s: %d padding voxels set to %g", volume.series.what, *volume.padding)
        write_atomically(folder / case / f"{name}.nii.gz", _nifti(image))
    return DicomCase(case, first.without_voxels())


def _on_grid(volume: Volume, first: Volume, reference: Any, allow_resampling: bool) -> Any:
    what = volume.series.what
    if volume.series.frame_of_reference != first.series.frame_of_reference:
        why = f"its frame of reference is not that of {first.series.what}"
        refuse("mixed frame of reference", what, f"{why}; register the images first")
    image = nib.Nifti1Image(volume.voxels, volume.affine)
    if image.shape == reference.shape and np.abs(image.affine - reference.affine).max() <= GRID_TOLERANCE:
        return reference.__class__(volume.voxels, first.affine)
    if not allow_resampling:
        raise DataError(
            f"{what}: its grid is not that of {first.series.what}",
            f"shape {volume.voxels.shape}, expected {first.voxels.shape}"
            if volume.voxels.shape != first.voxels.shape
            else f"the affine differs by {np.abs(image.affine - reference.affine).max():.3g}",
            "--dicom_allow_resampling True (they share a frame of reference), or give series on one grid",
        )
    _LOG.warning("%s: resampled on the grid of %s", what, first.series.what)
    return resample_from_to(image, reference, order=1, cval=float(volume.voxels.min()))


def _nifti(image: Any) -> bytes:
    result = nib.Nifti1Image(np.asarray(image.dataobj, dtype=np.float32), image.affine)
    result.set_sform(image.affine, code=1)
    result.set_qform(None, code=0)
    result.header.set_xyzt_units("mm")
    return gzip.compress(result.to_bytes(), compresslevel=1, mtime=0)


def _results(
    predictions: Path, case: DicomCase, labels: Sequence[Label], origin: Origin, codes: Mapping[str, SegmentCode] | None
) -> dict[str, bytes | dict[str, Any]]:
    volume = case.volume
    maps = {}
    for name in QUANTITIES:
        path = predictions / f"{case.name}_{name}.nii.gz"
        if path.is_file():
            _refuse_other_grid(path, case)
            maps[name] = read_voxels(path, case=case.name, key=name)
    files: dict[str, bytes | dict[str, Any]] = {}
    for name, values in maps.items():
        result = parametric_map(values, volume, name, origin)
        if not np.array_equal(values_of_map(result, volume), volume.to_slices(values)):
            raise BundleError(
                f"case {case.name}: the map {name} is not what was predicted", "it differs", "report this"
            )
        files[f"{name}.dcm"] = to_bytes(result)
    path = predictions / f"{case.name}.nii.gz"
    if path.is_file():
        _refuse_other_grid(path, case)
        files |= _segmentation_files(read_label(path, case=case.name), maps, case, labels, origin, codes)
    if not files:
        raise DataError(f"case {case.name}: no prediction", f"neither {path.name} nor a map", "run the bundle again")
    return files


def _segmentation_files(
    prediction: NDArray[Any],
    maps: Mapping[str, NDArray[Any]],
    case: DicomCase,
    labels: Sequence[Label],
    origin: Origin,
    codes: Mapping[str, SegmentCode] | None,
) -> dict[str, bytes | dict[str, Any]]:
    volume = case.volume
    segmentation = dicom_segmentation(prediction, volume, labels, origin, codes)
    numbers = np.zeros(256, np.uint8)
    for number, label in enumerate((label for label in labels if label.id != 0), start=1):
        numbers[label.id] = number
    differing = int((labels_of_segmentation(segmentation, volume) != numbers[volume.to_slices(prediction)]).sum())
    if differing:
        raise BundleError(f"case {case.name}: segmentation", f"{differing} voxels differ when read back", "report this")
    table = {label.id: label.name for label in labels}
    spacing = tuple(float(np.linalg.norm(volume.affine[:3, axis])) for axis in range(3))
    measured = volumes(prediction, spacing, table)
    inside = {row["id"]: row for row in uncertainty_inside(prediction, maps, table)} if maps else {}
    rows = [{**row, **inside.get(row["id"], {})} for row in measured]
    report = measurement_report(segmentation, volume, labels, rows, origin, codes)
    record = {
        "case": case.name,
        "spacing_mm": spacing,
        "labels": rows,
        "resampled": volume.resampled,
        "padding_voxels": volume.padding[0],
        "weights": list(origin.weights),
    }
    files = {"segmentation.dcm": to_bytes(segmentation), "measurements.dcm": to_bytes(report)}
    return {**files, "volumes.json": record}


def _refuse_other_grid(path: Path, case: DicomCase) -> None:
    header = read_header(path, case=case.name)
    difference = np.abs(header.affine - case.volume.affine).max()
    if header.shape != case.volume.voxels.shape or difference > GRID_TOLERANCE:
        raise DataError(
            f"case {case.name}: {path.name} is on another grid than the series",
            f"shape {header.shape}, expected {case.volume.voxels.shape}; affines differ by {difference:.3g}",
            "write predictions on the grid of the image that came in",
        )


def _weights(predictions: Path) -> tuple[str, ...]:
    """Return the digests of the weights that predictions name in their JSON."""
    digests: set[str] = set()
    for path in predictions.glob("*.json"):
        weights = json.loads(path.read_text()).get("weights", [])
        digests |= {entry["sha256"] for entry in (weights if isinstance(weights, list) else [weights])}
    return tuple(sorted(digests))


def _own_options(given: Mapping[str, Any]) -> dict[str, Any]:
    known = {"dicom_series": "", "dicom_allow_resampling": False, "dicom_keep_identity": False, "dicom_codes": ""}
    for key in given:
        if key not in known:
            raise UsageError(f"option {key}", "unknown", f"choose one of {', '.join(known)}")
    values = {key[len("dicom_") :]: given.get(key, default) for key, default in known.items()}
    for key in ("allow_resampling", "keep_identity"):
        if not isinstance(values[key], bool):
            raise UsageError(f"option dicom_{key}", f"found {values[key]!r}", "write True or False")
    text = values["series"]
    pairs = [
        pair.partition("=") for pair in (text if isinstance(text, (list, tuple)) else str(text).split(",")) if pair
    ]
    values["series"] = {name.strip(): key.strip() for name, _, key in pairs}
    return values


def _code_file(path: str) -> dict[str, SegmentCode]:
    if not path:
        return {}
    try:
        raw = json.loads(Path(path).read_text())
    except (OSError, ValueError) as problem:
        raise UsageError(f"code table {path}", str(problem), "give a JSON file") from None
    return codes_from_raw(raw if isinstance(raw, dict) else {"": None})
