"""Import of a task of the Medical Segmentation Decathlon: a ``dataset.json``, and 4D files for several modalities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from pipelines.manifests.build import CaseFiles, Progress, build_manifest
from pipelines.manifests.dataset_json import (
    case_name,
    check_count,
    cohort_text,
    dataset_labels,
    modality_table,
    resolve_dataset_json,
    subject_of,
)
from pipelines.manifests.jsonfile import read_json
from pipelines.manifests.model import Label, Manifest, Modality
from pipelines.manifests.splits import SplitPlan
from transforms.errors import DataError


def import_msd(
    dataset_json: str | Path,
    *,
    name: str | None = None,
    licence: str | None = None,
    source: str | None = None,
    task: str | None = None,
    labels: Sequence[str | Label] | None = None,
    case_pattern: str = "{case}",
    include_test: bool = False,
    split: SplitPlan | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Return the manifest of a Decathlon task.

    Several modalities lie in one 4D file per case; each becomes an image with its ``channel``.

    Args:
        dataset_json: the task's ``dataset.json``; file paths start from its folder.
        name, licence, source, task: instead of what ``dataset.json`` states.
        labels: label table instead of the one in ``dataset.json``, for example ``1:whole_tumour=1+2+3``.
        case_pattern: where the subject stands in the case's name, for example ``{subject}_{session}``.
        include_test: take the unlabelled test images too, as split ``test``; the plan then splits the labelled ones.
        split: how to split; by default 70 / 10 / 20 %, stratified by label volume.
        progress: called with cases done, cases in all, case id.

    Raises:
        UsageError: no such file, or a cohort without a name.
        DataError: a ``dataset.json`` that contradicts itself or the files, or a file that cannot be used.
    """
    path = resolve_dataset_json(Path(dataset_json))
    raw, where = read_json(path), str(path)
    text = cohort_text(raw, {"name": name, "licence": licence, "source": source, "task": task}, where)
    modalities = modality_table(raw.get("modality"), f"{where}, key modality")
    table = dataset_labels(raw.get("labels"), labels, f"{where}, key labels")
    training = _list(raw, "training", where)
    check_count(raw, "numTraining", len(training), where)
    cases = [_training_case(entry, index, modalities, case_pattern, where) for index, entry in enumerate(training)]
    if include_test:
        test = _list(raw, "test", where)
        check_count(raw, "numTest", len(test), where)
        cases += [_test_case(entry, index, modalities, case_pattern, where) for index, entry in enumerate(test)]
    return build_manifest(path.parent, cases, text, modalities, table, split or SplitPlan(), progress=progress)


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    entries = raw.get(key)
    if not isinstance(entries, list) or not entries:
        raise DataError(
            f"{where}, key {key}", f"found {str(entries)[:60]}, expected a list of cases", "correct the list"
        )
    return entries


def _training_case(entry: Any, index: int, modalities: Sequence[Modality], case_pattern: str, where: str) -> CaseFiles:
    place = f"{where}, key /training/{index}"
    if not isinstance(entry, Mapping) or not {"image", "label"} <= set(entry):
        raise DataError(place, f"found {str(entry)[:60]}, expected an image and a label", "correct the entry")
    case_id, images = _images(entry["image"], modalities, place)
    return CaseFiles(case_id, subject_of(case_id, case_pattern), images, _below_root(entry["label"], place))


def _test_case(entry: Any, index: int, modalities: Sequence[Modality], case_pattern: str, where: str) -> CaseFiles:
    place = f"{where}, key /test/{index}"
    case_id, images = _images(entry["image"] if isinstance(entry, Mapping) else entry, modalities, place)
    return CaseFiles(case_id, subject_of(case_id, case_pattern), images, split="test")


def _images(path: Any, modalities: Sequence[Modality], place: str) -> tuple[str, dict[str, tuple[str, int | None]]]:
    below = _below_root(path, place)
    case_id = case_name(PurePosixPath(below).name, place)
    if len(modalities) == 1:
        return case_id, {modalities[0].name: (below, None)}
    return case_id, {modality.name: (below, channel) for channel, modality in enumerate(modalities)}


def _below_root(path: Any, place: str) -> str:
    below = PurePosixPath(str(path))
    if not isinstance(path, str) or below.is_absolute() or ".." in below.parts:
        raise DataError(
            place, f"found the path {path!r}, expected one below the folder of dataset.json", "correct the path"
        )
    return below.as_posix()
