"""Import of an nnU-Net raw data set: ``imagesTr/CASE_0000.nii.gz``, ``labelsTr/CASE.nii.gz`` and ``dataset.json``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipelines.manifests.build import CaseFiles, Progress, build_manifest
from pipelines.manifests.dataset_json import (
    NIFTI_ENDINGS,
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

_CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")


def import_nnunet(
    folder: str | Path,
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
    """Return the manifest of an nnU-Net raw data set (``DatasetNNN_Name``).

    Args:
        folder: the data set, with ``dataset.json``, ``imagesTr`` and ``labelsTr``.
        name, licence, source, task: instead of what ``dataset.json`` states; the name is the folder's by default.
        labels: label table instead of the one in ``dataset.json``; needed where that has regions or an ignore label.
        case_pattern: where the subject stands in the case's name, for example ``{subject}_{session}``.
        include_test: take ``imagesTs`` too, as split ``test``; the plan then splits the labelled cases only.
        split: how to split; by default 70 / 10 / 20 %, stratified by label volume.
        progress: called with cases done, cases in all, case id.

    Raises:
        UsageError: no such data set, or a text that nobody states.
        DataError: regions, an ignore label, another file format, files that do not fit together or cannot be used.
    """
    path = resolve_dataset_json(Path(folder) / "dataset.json")
    raw, where = read_json(path), str(path)
    root = path.parent
    if "dataset" in raw:
        raise DataError(
            f"{where}, key dataset", "it lists files elsewhere, expected imagesTr and labelsTr", "copy them there"
        )
    ending = raw.get("file_ending", ".nii.gz")
    if ending not in NIFTI_ENDINGS:
        raise DataError(
            f"{where}, key file_ending", f"found {ending!r}, expected one of {NIFTI_ENDINGS}", "convert to .nii.gz"
        )
    given = {"name": name or raw.get("name") or root.name, "licence": licence, "source": source, "task": task}
    text = cohort_text(raw, given, where)
    modalities = modality_table(raw.get("channel_names", raw.get("modality")), f"{where}, key channel_names")
    table = dataset_labels(raw.get("labels"), labels, f"{where}, key labels")
    images = _images_by_case(root, "imagesTr", ending, modalities)
    label_files = _label_files(root, ending)
    _check_pairs(root, images, label_files, ending)
    check_count(raw, "numTraining", len(images), where)
    cases = [
        CaseFiles(case, subject_of(case, case_pattern), files, label_files[case]) for case, files in images.items()
    ]
    if include_test:
        tests = _images_by_case(root, "imagesTs", ending, modalities)
        cases += [CaseFiles(case, subject_of(case, case_pattern), files, split="test") for case, files in tests.items()]
    return build_manifest(root, cases, text, modalities, table, split or SplitPlan(), progress=progress)


def _images_by_case(
    root: Path, folder: str, ending: str, modalities: Sequence[Modality]
) -> dict[str, dict[str, tuple[str, int | None]]]:
    """Return the images by case and modality; the channel is the number at the end of the file's name."""
    names: dict[str, dict[int, str]] = {}
    for file_name in _file_names(root, folder, ending):
        match = _CHANNEL.fullmatch(file_name.removesuffix(ending))
        if match is None:
            raise DataError(
                f"{root / folder / file_name}", "the name carries no channel", f"rename it to CASE_0000{ending}"
            )
        names.setdefault(match["case"], {})[int(match["channel"])] = f"{folder}/{file_name}"
    for case, channels in names.items():
        if sorted(channels) != list(range(len(modalities))):
            raise DataError(
                f"{root / folder} (case {case})",
                f"found the channels {sorted(channels)}, expected 0 to {len(modalities) - 1} as in channel_names",
                "add the missing files, or correct channel_names in dataset.json",
            )
    return {
        case: {modality.name: (channels[index], None) for index, modality in enumerate(modalities)}
        for case, channels in names.items()
    }


def _label_files(root: Path, ending: str) -> dict[str, str]:
    names = _file_names(root, "labelsTr", ending)
    return {case_name(file_name, str(root / "labelsTr")): f"labelsTr/{file_name}" for file_name in names}


def _file_names(root: Path, folder: str, ending: str) -> list[str]:
    if not (root / folder).is_dir():
        raise DataError(str(root / folder), "there is no such folder", "give an nnU-Net raw data set")
    files = [path.name for path in (root / folder).iterdir() if path.name.endswith(ending)]
    if not files:
        raise DataError(str(root / folder), f"no file ends in {ending}", "correct file_ending in dataset.json")
    return sorted(name for name in files if not name.startswith("."))


def _check_pairs(
    root: Path, images: dict[str, dict[str, tuple[str, int | None]]], labels: dict[str, str], ending: str
) -> None:
    for folder, lacking in (
        ("labelsTr", sorted(set(images) - set(labels))),
        ("imagesTr", sorted(set(labels) - set(images))),
    ):
        if lacking:
            stem = lacking[0] if folder == "labelsTr" else f"{lacking[0]}_0000"
            raise DataError(
                f"{root / folder / (stem + ending)} (case {lacking[0]})",
                f"the file does not exist; {len(lacking)} cases have no file in {folder}",
                "add the files, or remove the cases",
            )
