"""From a cohort, or from bare files, to the items that a bundle's transform chain takes.

The contract of trained weights decides: which modalities in which order, which labels. A cohort that does not fit it is
refused, never bent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.manifests.load import case_items, load_manifest
from pipelines.manifests.model import Label, Manifest
from pipelines.manifests.names import nearest
from transforms.errors import DataError, UsageError

IMAGE_ENDINGS = (".nii.gz", ".nii")
NOT_IMAGES = ("label", "lesion", "mask", "brain", "seg", "gt")


def chosen_modalities(manifest: Manifest, modalities: str | Sequence[str]) -> list[str]:
    """Return the modalities to train on, in the order of the channels; ``all`` is every one of the manifest.

    Raises:
        UsageError: a name that the manifest does not have, named twice, or none at all.
    """
    known = [modality.name for modality in manifest.modalities]
    chosen = known if modalities == "all" else [modalities] if isinstance(modalities, str) else list(modalities)
    for name in chosen:
        if name not in known:
            raise UsageError(
                f"modality {name!r}", f"cohort {manifest.name} has {', '.join(known)}", nearest(name, known)
            )
    if len(set(chosen)) != len(chosen) or not chosen:
        raise UsageError(f"modalities {chosen}", "each must be named once", "correct modalities")
    return chosen


def contract_labels(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the label table as JSON values, for the contract of the weights.

    Raises:
        DataError: the ids are not 0, 1, 2, ... (they are the network's output channels).
    """
    ids = [label.id for label in manifest.labels]
    if ids != list(range(len(ids))):
        raise DataError(
            f"manifest {manifest.path or manifest.name}: label ids {ids}",
            f"a network's output channels need {list(range(len(ids)))}",
            "import the cohort with ids in sequence, for instance --label-name 1:lesion=255",
        )
    return [{**asdict(label), "values": list(label.values)} for label in manifest.labels]


def labels_of(contract: Mapping[str, Any]) -> list[Label]:
    """Return the label table of a contract."""
    return [Label(**{**label, "values": tuple(label["values"])}) for label in contract["labels"]]


def reference_items(
    manifest: Manifest, split: str, contract: Mapping[str, Any], fold: int | None = None
) -> list[dict[str, Any]]:
    """Return the items of a split for evaluation: the truth stands under ``reference`` and keeps its own grid.

    Raises:
        DataError: no case in the split, a case without truth, or another label table than the weights'.
        UsageError: the cohort lacks a modality of the weights.
    """
    theirs = {label.id: label.name for label in manifest.labels}
    ours = {label.id: label.name for label in labels_of(contract)}
    if theirs != ours:
        raise DataError(
            f"manifest {manifest.path or manifest.name}: labels {theirs}",
            f"the weights were trained for {ours}",
            "evaluate on a cohort with the same label table",
        )
    items = case_items(
        manifest,
        split,
        modalities=chosen_modalities(manifest, contract["modalities"]),
        fold=fold,
        label_key="reference",
    )
    if not items:
        raise DataError(
            f"manifest {manifest.path or manifest.name}: split {split} is empty",
            "0 cases to evaluate",
            "choose another --split, or import the cohort with a share for it",
        )
    for item in items:
        if item.get("reference") is None:
            raise DataError(
                f"case {item['case']}: key label is missing in split {split}",
                "a prediction can only be measured against a truth",
                "give its label file, or use predict",
            )
    return items


def prediction_items(
    source: str | Path, manifest: str | Path, split: str, contract: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return the items to predict: of a file or folder if one is given, else of the manifest's split.

    Raises:
        DataError: nothing to predict.
        UsageError: files that cannot be told apart by their names.
    """
    if source:
        return items_from_path(source, contract["modalities"], contract["optional_modalities"])
    cohort = load_manifest(manifest)
    items = case_items(cohort, split, modalities=chosen_modalities(cohort, contract["modalities"]))
    if not items:
        raise DataError(f"manifest {manifest}: split {split} is empty", "0 cases to predict", "choose another --split")
    return [{key: value for key, value in item.items() if key != "label"} for item in items]


def items_from_path(
    source: str | Path, modalities: Sequence[str], optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Return the items of a NIfTI file, of a case's folder, or of a folder of either.

    How a file is recognised: with one modality, every image is a case. With several, a file belongs to the modality
    whose name it ends with (``FLAIR.nii.gz``, ``sub-01_flair.nii.gz``) or, in nnU-Net's way, whose index (``case_0001.nii.gz``);
    what stands before is the case, or else the folder's name. Label maps and masks (by name) are passed over.

    Args:
        source: file or folder.
        modalities: the weights' modalities in the order of their channels.
        optional: those that may be missing.

    Raises:
        DataError: the path does not exist, holds no image, or a case lacks a required modality.
        UsageError: two files for one modality of one case.
    """
    path = Path(source)
    if not path.exists():
        raise DataError(f"input {path}: no such file or folder", "nothing to predict", "check --input")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.name.lower().endswith(IMAGE_ENDINGS))
    cases: dict[str, dict[str, Path]] = {}
    for file in files:
        found = _recognise(file, path if path.is_dir() else path.parent, modalities)
        if found is None:
            continue
        case, modality = found
        other = cases.setdefault(case, {}).get(modality)
        if other is not None:
            raise UsageError(
                f"case {case}: two files for modality {modality}", f"{other} and {file}", "leave one of them"
            )
        cases[case][modality] = file
    if not cases:
        raise DataError(
            f"input {path}: no image found",
            f"expected NIfTI files named by {', '.join(modalities)} or _0000 ...",
            "rename the files, or make a manifest with `fiducial manifest import`",
        )
    return [_item(case, found, modalities, optional) for case, found in sorted(cases.items())]


def _item(case: str, found: Mapping[str, Path], modalities: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in modalities if name not in found and name not in optional]
    if missing:
        raise DataError(
            f"case {case}: modality {missing[0]} is missing",
            f"found {', '.join(sorted(found))}; the weights need {', '.join(modalities)}",
            "add the file; only a bundle trained with optional_modalities can do without",
        )
    return {"case": case, "image": [str(found[name].resolve()) if name in found else None for name in modalities]}


def _recognise(file: Path, top: Path, modalities: Sequence[str]) -> tuple[str, str] | None:
    """Return (case, modality) of an image file, or None where its name says that it is none."""
    stem = (
        file.name[: -len(next(e for e in IMAGE_ENDINGS if file.name.lower().endswith(e)))]
        if "." in file.name
        else file.name
    )
    folder = "_".join(file.parent.relative_to(top).parts) or top.resolve().name
    for modality in sorted(modalities, key=len, reverse=True):
        names = (modality.lower(), f"{list(modalities).index(modality):04d}")
        for name in names:
            if stem.lower() == name:
                return folder, modality
            if stem.lower().endswith((f"_{name}", f"-{name}")):
                return stem[: -len(name) - 1], modality
    if len(modalities) == 1 and not any(word in stem.lower().replace("-", "_").split("_") for word in NOT_IMAGES):
        return stem, modalities[0]
    return None
