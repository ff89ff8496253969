"""``fiducial predict`` on DICOM: check the bundle, series to cases, run it, results back to DICOM.

Images in between lie in a temporary folder under names made of digests, so a bundle, its logs and its errors never see
who they are of. All that does not depend on a study is checked first: it must not fail every study of a watched folder.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.dicom.cases import Allowed, as_case_folders
from pipelines.dicom.objects import Origin
from pipelines.dicom.results import weights_named, write_back
from pipelines.dicom.segmentation import SegmentCode, code_of, codes_from_raw
from pipelines.manifests.digest import file_digest
from pipelines.manifests.model import Label
from pipelines.manifests.selection import labels_of
from pipelines.names import nearest
from pipelines.runner import bundle_parser, run_bundle
from transforms.errors import BundleError, UsageError

_LOG = logging.getLogger(__name__)
_OURS = {"series": "", "allow_resampling": False, "register": False, "keep_identity": False, "codes": ""}


@dataclass(frozen=True, eq=False)
class DicomRequest:
    """A bundle that DICOM can be given to, all that does not depend on a study found out and in order.

    Attributes:
        bundle, variants: as for ``run_bundle``.
        overrides: of the bundle's keys.
        options: our own, ``dicom_`` taken off.
        name: the bundle's.
        contract: of its weights.
        weights: sha256 of their files.
        labels: its label table; empty where there is none.
        codes: of labels, by name, as given.
    """

    bundle: str
    variants: Sequence[str]
    overrides: Mapping[str, Any]
    options: Mapping[str, Any]
    name: str
    contract: Mapping[str, Any]
    weights: tuple[str, ...]
    labels: Sequence[Label]
    codes: Mapping[str, SegmentCode]


def check_request(bundle: str, overrides: Mapping[str, Any], variants: Sequence[str] = ()) -> DicomRequest:
    """Return what predictions on DICOM need of a bundle, before there is a study: see ``predict_dicom``.

    Raises:
        FiducialError: no such bundle, option or weights, or a label without a code.
    """
    theirs = {key: value for key, value in overrides.items() if not key.startswith("dicom_")}
    given = {key: value for key, value in overrides.items() if key.startswith("dicom_")}
    ours = _own_options({key.removeprefix("dicom_"): value for key, value in given.items()})
    codes = _code_file(ours["codes"])
    with bundle_parser(bundle, "inference", theirs, variants) as parser:
        contract = parser.get_parsed_content("contract")
        weights = tuple(sorted(file_digest(Path(path)) for path in parser.get_parsed_content("weights")))
        name = str(parser.get("bundle_name") or Path(bundle).name)
    labels = labels_of(contract) if "labels" in contract else []
    for label in labels:
        if label.id != 0:
            code_of(label, codes)
    return DicomRequest(bundle, variants, theirs, ours, name, contract, weights, labels, codes)


def predict_dicom(
    request: DicomRequest,
    source: str | Path,
    out: str | Path,
    say: Callable[[str], object] = _LOG.info,
    scratch: str | Path | None = None,
) -> list[Path]:
    """Run a bundle's inference on DICOM; results are DICOM.

    Args:
        request: as ``check_request`` returns it.
        source: folder, file or zip file of DICOM.
        out: folder of the results.
        say: called with one line per series of the source, and one per thing done to the images.
        scratch: where the temporary folder is made; None takes the system's.

    Returns:
        The files written.

    Raises:
        FiducialError: as ``as_case_folders``, the bundle and ``write_back``.
    """
    for library in ("highdicom", "pydicom"):
        logging.getLogger(library).setLevel(logging.ERROR)  # they tell every module that they copy
    contract, options = request.contract, request.options
    with tempfile.TemporaryDirectory(prefix="fiducial-", dir=scratch) as temporary:
        work = Path(temporary)
        cases = as_case_folders(
            source,
            contract["modalities"],
            work,
            optional=contract.get("optional_modalities", ()),
            chosen=options["series"],
            allowed=Allowed(options["allow_resampling"], options["register"]),
        )
        for line in cases.lines + tuple(note for case in cases.cases for note in case.notes):
            say(line)
        inputs = {"input": str(cases.folder), "output_dir": str(work / "predictions")}
        run_bundle(request.bundle, "inference", {**request.overrides, **inputs}, request.variants)
        used = weights_named(work / "predictions")
        if used != request.weights:
            raise BundleError(
                f"bundle {request.name}: its weights have changed",
                "the newest run is not the one that was newest at the start",
                "start again, with --run_name or --checkpoint",
            )
        origin = Origin(request.name, used, options["keep_identity"])
        return write_back(work / "predictions", cases, out, request.labels, origin, request.codes)


def _own_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return our options with their defaults; ``series`` as a table of keys by modality.

    Raises:
        UsageError: an unknown option, or a value of another form.
    """
    for key in given:
        if key not in _OURS:
            known = [f"dicom_{name}" for name in _OURS]
            raise UsageError(f"option dicom_{key}", "unknown", nearest(f"dicom_{key}", known))
    values = {**_OURS, **given}
    for key, default in _OURS.items():
        if isinstance(default, bool) and not isinstance(values[key], bool):
            raise UsageError(f"option dicom_{key}", f"found {values[key]!r}", "write True or False")
    text = values["series"]
    listed = text if isinstance(text, (list, tuple)) else str(text).split(",")
    pairs = [str(pair).partition("=") for pair in listed if pair]
    if any(not (name.strip() and key.strip()) for name, _, key in pairs):
        raise UsageError("option dicom_series", f"found {text!r}", "write modality=key, separated by commas")
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
