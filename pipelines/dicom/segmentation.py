"""A label map as a DICOM Segmentation: one coded segment per label, on the slices of the source series.

BINARY, which every viewer reads; the segments are coded in SNOMED CT, so that a lesion is a lesion in any archive. A
label without a code is refused: codes are found by the label's name, or given in a table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from highdicom.content import PlanePositionSequence
from highdicom.seg import SegmentAlgorithmTypeValues, Segmentation, SegmentationTypeValues, SegmentDescription
from highdicom.sr.coding import CodedConcept
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code

from pipelines.dicom.objects import FIRST_SERIES_NUMBER, Origin, equipment, finished
from pipelines.dicom.privacy import cleaned
from pipelines.dicom.uids import content_uid
from pipelines.dicom.volume import Volume
from pipelines.manifests.model import Label
from pipelines.names import nearest
from transforms.errors import BundleError, UsageError

_ABNORMAL, _ANATOMY = codes.cid7150.MorphologicallyAbnormalStructure, codes.cid7150.AnatomicalStructure
_TISSUE, _SUBSTANCE = codes.cid7150.Tissue, codes.cid7150.BodySubstance


@dataclass(frozen=True)
class SegmentCode:
    """What a segment is: its category (CID 7150), its type (CID 7151), and where, as (value, scheme, meaning)."""

    category: Code
    kind: Code
    site: Code | None = None


def _table() -> dict[str, SegmentCode]:
    brain, found, parts = codes.cid7153.Brain, codes.cid7159, codes.cid7153
    abnormal = {
        "lesion": found.Lesion,
        "white matter lesion": found.Lesion,
        "ms lesion": found.Lesion,
        "stroke lesion": found.Lesion,
        "enhancing lesion": found.EnhancingLesion,
        "enhancing tumour": found.EnhancingLesion,
        "enhancing tumor": found.EnhancingLesion,
        "tumour": found.Neoplasm,
        "tumor": found.Neoplasm,
        "neoplasm": found.Neoplasm,
        "oedema": found.Edema,
        "edema": found.Edema,
        "necrosis": found.Necrosis,
        "haemorrhage": found.Hemorrhage,
        "hemorrhage": found.Hemorrhage,
    }
    anatomy = {
        "brain": brain,
        "hippocampus": parts.Hippocampus,
        "ventricle": parts.BrainVentricle,
        "cerebellum": parts.Cerebellum,
        "brain stem": parts.BrainStem,
        "skull": codes.SCT.Skull,
    }
    tissue = {
        "white matter": codes.SCT.WhiteMatter,
        "grey matter": codes.SCT.GrayMatter,
        "gray matter": codes.SCT.GrayMatter,
        "bone": codes.SCT.Bone,
    }
    fluids = {"csf": codes.SCT.CerebrospinalFluid, "cerebrospinal fluid": codes.SCT.CerebrospinalFluid}
    groups = (
        (_ABNORMAL, abnormal, brain),
        (_ANATOMY, anatomy, None),
        (_TISSUE, tissue, None),
        (_SUBSTANCE, fluids, None),
    )
    return {name: SegmentCode(category, kind, site) for category, kinds, site in groups for name, kind in kinds.items()}


CODES = _table()  # the findings are those of the brain, as the bundles are


def code_of(label: Label, given: Mapping[str, SegmentCode] | None = None) -> SegmentCode:
    """Return the code of a label: the one given for its name, else that of its name or of its ROI role in ``CODES``.

    Raises:
        UsageError: there is none.
    """
    known = {_spelt(name): code for name, code in (CODES | dict(given or {})).items()}
    for name in (label.name, label.roi or ""):
        if _spelt(name) in known:
            return known[_spelt(name)]
    raise UsageError(
        f"label {label.name!r}: no SNOMED code is known",
        "a DICOM segment must say what it is",
        f"give its code in the code table; {nearest(_spelt(label.name), CODES)}",
    )


def codes_from_raw(raw: Mapping[str, Any]) -> dict[str, SegmentCode]:
    """Return a code table from JSON: ``{name: {"category": [value, scheme, meaning], "type": [...], "site": [...]}}``.

    Raises:
        UsageError: an entry of another form.
    """
    table = {}
    for name, entry in raw.items():
        parts = {key: entry.get(key) for key in ("category", "type", "site")} if isinstance(entry, Mapping) else {}
        for key, part in parts.items():
            whole = (
                isinstance(part, Sequence) and len(part) == 3 and all(isinstance(text, str) and text for text in part)
            )
            if not (whole or (key == "site" and part is None)):
                parts = {}
                break
        if not parts:
            form = '{"category": [value, scheme, meaning], "type": [...], "site": [...]}'
            raise UsageError(f"code table: entry {name!r}", f"expected {form}, site may be left out", "correct it")
        site = None if parts["site"] is None else _code(parts["site"])
        table[str(name)] = SegmentCode(_code(parts["category"]), _code(parts["type"]), site)
    return table


def dicom_segmentation(
    prediction: NDArray[Any],
    volume: Volume,
    labels: Sequence[Label],
    origin: Origin,
    given: Mapping[str, SegmentCode] | None = None,
) -> Dataset:
    """Return a label map as a DICOM Segmentation (BINARY, one segment per foreground label) on the source's slices.

    Every label has its segment, also where the map has none of it: an empty segment says "looked for and not found".

    Args:
        prediction: (columns, rows, slices) of label ids, on the volume's grid.
        volume: the series it was made from.
        labels: the label table; id 0 is the background.
        origin: who made it.
        given: codes by label name, before those of ``CODES``.

    Raises:
        UsageError: a label without a code.
        BundleError: values that no label has.
        DataError: another shape than the volume's.
    """
    foreground = [label for label in labels if label.id != 0]
    unknown = set(np.unique(prediction).tolist()) - {label.id for label in labels} - {0}
    if unknown:
        raise BundleError(
            f"{volume.series.what}: values {sorted(unknown)} in the label map",
            f"the label table has {[label.id for label in labels]}",
            "this is a defect of the bundle's postprocessing: report it",
        )
    slices = volume.to_slices(prediction)
    masks = np.stack([slices == label.id for label in foreground], axis=-1).astype(np.uint8)
    sources = [cleaned(header) for header in volume.sources]
    result = Segmentation(
        sources,
        masks,
        SegmentationTypeValues.BINARY,
        [_segment(number, label, volume, origin, given) for number, label in enumerate(foreground, start=1)],
        series_number=FIRST_SERIES_NUMBER,
        content_label="SEGMENTATION",
        content_description=f"{origin.bundle} segmentation"[:64],
        plane_positions=[
            PlanePositionSequence("PATIENT", [float(x) for x in source.ImagePositionPatient]) for source in sources
        ],
        omit_empty_frames=bool(masks.any()),
        **equipment(origin),
    )
    return finished(result, origin, volume.series, f"{origin.bundle} segmentation")


def tracking_uid(label: Label, volume: Volume, origin: Origin) -> str:
    """Return the UID by which a segment and its measurements are known as one finding."""
    return content_uid("finding", *origin.seed, str(volume.series.header.SeriesInstanceUID), str(label.id), label.name)


def labels_of_segmentation(result: Dataset, volume: Volume) -> NDArray[np.uint8]:
    """Return the label map (source slice, row, column) that a segmentation holds: segment number as value.

    Raises:
        BundleError: its segments overlap, or its frames are not those of the volume's source images.
    """
    segmentation = result if isinstance(result, Segmentation) else Segmentation.from_dataset(result)
    uids = [str(header.SOPInstanceUID) for header in volume.sources]
    try:
        labels = segmentation.get_pixels_by_source_instance(
            uids, combine_segments=True, ignore_spatial_locations=True, assert_missing_frames_are_empty=True
        )
    except (RuntimeError, ValueError, KeyError) as problem:
        raise BundleError(
            f"{volume.series.what}: the segmentation cannot be read as a label map of the series",
            f"{type(problem).__name__}: its segments overlap, or refer to other images",
            "report this",
        ) from None
    return np.asarray(labels, dtype=np.uint8)


def _segment(
    number: int, label: Label, volume: Volume, origin: Origin, given: Mapping[str, SegmentCode] | None
) -> SegmentDescription:
    code = code_of(label, given)
    return SegmentDescription(
        number,
        label.name[:64],
        code.category,
        code.kind,
        SegmentAlgorithmTypeValues.AUTOMATIC,
        origin.algorithm(),
        tracking_uid=tracking_uid(label, volume, origin),
        tracking_id=f"{label.name} {volume.series.key}"[:64],
        anatomic_regions=None if code.site is None else [CodedConcept.from_code(code.site)],
    )


def _code(texts: Any) -> Code:
    value, scheme, meaning = texts
    return Code(value, scheme, meaning)


def _spelt(name: str) -> str:
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()
