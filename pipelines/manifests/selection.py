"""From a cohort, or from bare files, to the items that a bundle's transform chain takes.

The contract of trained weights decides: which modalities in which order, which labels. A cohort that does not fit it is
refused, never bent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.manifests.discover import MASK_ROLE, items_from_path
from pipelines.manifests.load import case_items, load_manifest
from pipelines.manifests.model import Label, Manifest
from pipelines.names import nearest
from transforms.errors import DataError, UsageError


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


def foreground_source(manifest: Manifest) -> str:
    """Return where the foreground comes from: ``mask`` if every case of the cohort has a brain mask, ``auto`` if none.

    It belongs to the contract: intensities normalised inside a brain mask and inside the whole head are not the same.

    Raises:
        DataError: some cases have a brain mask and others have not.
    """
    without = [case.id for case in manifest.cases if MASK_ROLE not in case.masks]
    if without and len(without) < len(manifest.cases):
        raise DataError(
            f"manifest {manifest.path or manifest.name}: case {without[0]} has no mask {MASK_ROLE}",
            f"{len(manifest.cases) - len(without)} of {len(manifest.cases)} cases have one",
            "give every case a brain mask, or import the cohort without masks",
        )
    return "auto" if without else "mask"


def contract_items(
    manifest: Manifest, split: str, contract: Mapping[str, Any], fold: int | None = None, label_key: str = "label"
) -> list[dict[str, Any]]:
    """Return the items of a split as the contract wants them: its modalities, its kind of foreground.

    Raises:
        DataError: a brain mask is needed and missing; the training split is empty.
        UsageError: the cohort lacks a modality of the contract.
    """
    modalities = chosen_modalities(manifest, contract["modalities"])
    items = case_items(manifest, split, modalities=modalities, fold=fold, label_key=label_key)
    return [_with_foreground(item, contract["foreground"]) for item in items]


def pair_items(
    manifest: Manifest, split: str, contract: Mapping[str, Any], fold: int | None = None
) -> list[dict[str, Any]]:
    """Return the items of a split for a fusion: two modalities, and the masks of brain and bone where there are any.

    Raises:
        UsageError: the cohort lacks a modality of the contract.
        DataError: the split is empty.
    """
    modalities = chosen_modalities(manifest, contract["modalities"])
    items = case_items(manifest, split, modalities=modalities, fold=fold, masks={"mask": MASK_ROLE, "bone": "bone"})
    _refuse_empty(items, manifest, split)
    return items


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
    items = contract_items(manifest, split, contract, fold, label_key="reference")
    _refuse_empty(items, manifest, split)
    for item in items:
        if item.get("reference") is None:
            raise DataError(
                f"case {item['case']}: key label is missing in split {split}",
                "a prediction can only be measured against a truth",
                "give its label file, or use predict",
            )
    return items


def prediction_items(
    source: str | Path, manifest: str | Path, split: str, contract: Mapping[str, Any], root: str | None = None
) -> list[dict[str, Any]]:
    """Return the items to predict: of a file or folder if one is given, else of the manifest's split.

    Args:
        source: file or folder, or an empty text.
        manifest: the cohort to take where there is no source.
        split: of the manifest.
        contract: of the weights.
        root: where the cohort's files lie, if not where the manifest says.

    Raises:
        DataError: nothing to predict, or a brain mask is needed and missing.
        UsageError: files that cannot be told apart by their names.
    """
    if source:
        items = items_from_path(source, contract["modalities"], contract["optional_modalities"])
        return [_with_foreground(item, contract["foreground"]) for item in items]
    cohort = load_manifest(manifest, root=root)
    items = contract_items(cohort, split, contract)
    _refuse_empty(items, cohort, split)
    return [{key: value for key, value in item.items() if key != "label"} for item in items]


def _refuse_empty(items: Sequence[Mapping[str, Any]], manifest: Manifest, split: str) -> None:
    if not items:
        raise DataError(
            f"manifest {manifest.path or manifest.name}: split {split} is empty",
            "0 cases, at least 1 expected",
            "choose another --split, or import the cohort with a share for it",
        )


def _with_foreground(item: Mapping[str, Any], foreground: str) -> dict[str, Any]:
    if foreground == "auto":
        return {key: value for key, value in item.items() if key != "mask"}
    if item.get("mask") is None:
        raise DataError(
            f"case {item['case']}: key mask is missing",
            "the network was trained on images normalised inside a brain mask",
            f"add it beside the images as {MASK_ROLE}.nii.gz (or <case>_{MASK_ROLE}.nii.gz)",
        )
    return dict(item)
