"""What the ``dataset.json`` files of the Medical Segmentation Decathlon and of nnU-Net have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.manifests.build import CohortText
from pipelines.manifests.folder import match_pattern
from pipelines.manifests.labels import label_colour, label_table
from pipelines.manifests.model import Label, Modality
from transforms.errors import DataError, UsageError

NIFTI_ENDINGS = (".nii.gz", ".nii")


def modality_table(channels: Any, where: str) -> list[Modality]:
    """Return the modalities of a table such as ``{"0": "FLAIR", "1": "T1w"}`` in the order of its numbers.

    Raises:
        DataError: no table, numbers that are not 0, 1, 2, ..., or a name given twice.
    """
    table = channels if isinstance(channels, Mapping) else {}
    names = [str(table.get(str(index), "")).strip() for index in range(len(table))]
    if not names or not all(names) or len(set(names)) != len(names):
        raise DataError(
            where,
            f"the modality table is {channels}, expected different names under the keys 0, 1, 2, ...",
            "correct the table in dataset.json",
        )
    return [Modality(name, "HU" if name.upper() == "CT" else "a.u.") for name in names]


def dataset_labels(stored: Any, chosen: Sequence[str | Label] | None, where: str) -> tuple[Label, ...]:
    """Return the label table that the user chose, or else that of ``dataset.json`` (name to value, or value to name).

    Raises:
        DataError: no table, a label made of several values (nnU-Net's regions), or nnU-Net's ignore label.
    """
    if chosen is not None:
        return label_table(chosen)
    if not isinstance(stored, Mapping) or not stored:
        raise DataError(where, f"the label table is {stored}, expected names and values", "correct it in dataset.json")
    names: dict[int, str] = {}
    for left, right in stored.items():
        if isinstance(right, list):
            raise DataError(
                f"{where}, label {left!r}",
                f"it is a region of the values {right}, which overlap with other labels",
                "choose labels that do not overlap, for example 1:whole_tumour=1+2+3",
            )
        value, name = (left, right) if str(left).isdecimal() else (right, left)
        if not str(value).isdecimal() or int(value) in names:
            raise DataError(
                where, f"label {left!r}: {right!r}, expected a name and a value of its own", "correct the table"
            )
        if str(name).lower() == "ignore":
            raise DataError(
                f"{where}, label {name!r}",
                "voxels to be ignored cannot be told from a class in a manifest",
                "choose the labels yourself and say what that value means, for example 0:background=0+3",
            )
        names[int(value)] = str(name).replace("/", "_").replace("\\", "_")
    return label_table([Label(value, name, label_colour(value), (value,)) for value, name in names.items()])


def cohort_text(raw: Mapping[str, Any], given: Mapping[str, str | None], where: str) -> CohortText:
    """Return name, licence, source and task as given, or else as ``dataset.json`` states them, or else "not stated".

    Raises:
        UsageError: no name.
    """
    stored = {
        "name": raw.get("name"),
        "licence": raw.get("licence") or raw.get("license"),
        "source": raw.get("reference") or raw.get("description"),
        "task": "segmentation",
    }
    text = {key: given.get(key) or str(stored[key] or "").strip() or "not stated" for key in stored}
    if text["name"] == "not stated":
        raise UsageError(f"{where}: name", "dataset.json states none and none is given", "give one with --name")
    return CohortText(**text)


def check_count(raw: Mapping[str, Any], key: str, found: int, where: str) -> None:
    """Raise a ``DataError`` unless ``dataset.json`` declares as many cases under ``key`` as were found."""
    declared = raw.get(key, found)
    if declared != found:
        raise DataError(
            f"{where}, key {key}",
            f"dataset.json declares {declared} cases, {found} were found",
            "restore the missing files, or correct the number",
        )


def case_name(file_name: str, where: str) -> str:
    """Return the file's name without its NIfTI ending.

    Raises:
        DataError: another ending.
    """
    for ending in NIFTI_ENDINGS:
        if file_name.endswith(ending) and file_name != ending:
            return file_name.removesuffix(ending)
    raise DataError(
        f"{where}, file {file_name!r}", f"expected one of the endings {NIFTI_ENDINGS}", "convert it to .nii.gz"
    )


def subject_of(case_id: str, case_pattern: str) -> str:
    """Return the subject in a case id, by a pattern such as ``{subject}_{session}``; the whole id under ``{case}``.

    Raises:
        UsageError: the pattern does not fit.
    """
    values = match_pattern(case_pattern, case_id)
    if values is None:
        raise UsageError(
            f"case pattern {case_pattern!r}",
            f"it does not fit case {case_id!r}",
            "write for example {subject}_{session}",
        )
    return values.get("subject", case_id)


def resolve_dataset_json(path: Path) -> Path:
    """Return the resolved path of a ``dataset.json``.

    Raises:
        UsageError: there is none.
    """
    if not path.is_file():
        raise UsageError(str(path), "there is no such dataset.json", "give the path of the data set's own dataset.json")
    return path.resolve()
