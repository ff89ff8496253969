"""Manifests read, checked against the disk, written, and turned into the items of a transform chain."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pipelines.files import write_json
from pipelines.manifests.digest import file_digest
from pipelines.manifests.discover import MASK_ROLE
from pipelines.manifests.jsonfile import read_json
from pipelines.manifests.model import SPLITS, Case, FileEntry, Manifest, manifest_from_raw, manifest_to_raw
from pipelines.manifests.validate import validate_manifest
from pipelines.names import nearest
from transforms.errors import DataError, UsageError

CHECKS = ("size", "sha256", "none")
BRAIN_ALONE: Mapping[str, str] = {"mask": MASK_ROLE}


def load_manifest(
    path: str | Path, check: Literal["size", "sha256", "none"] = "size", root: str | Path | None = None
) -> Manifest:
    """Return the manifest in a JSON file, validated, its files looked up.

    Args:
        path: the JSON file.
        check: ``size``: every file exists with the recorded size; ``sha256``: its digest too; ``none``: no look.
        root: folder of the files where it differs from the one written in the manifest (the digest stays the same).

    Raises:
        UsageError: no such manifest or ``check``.
        DataError: not JSON, not a manifest, cases or splits that contradict each other, files absent or changed.
    """
    path = Path(path)
    if check not in CHECKS:
        raise UsageError(f"check {check!r}", f"expected one of {CHECKS}", nearest(str(check), CHECKS))
    if not path.is_file():
        raise UsageError(
            f"manifest {path}", "there is no such file", "check the path, or make a manifest with an importer"
        )
    raw = read_json(path)
    validate_manifest(raw, str(path))
    folder = (path.parent / raw["root"] if root is None else Path(root)).resolve()
    manifest = manifest_from_raw(raw, folder, path.resolve())
    if check != "none":
        _check_files(manifest, with_digest=check == "sha256")
    return manifest


def write_manifest(manifest: Manifest, path: str | Path, absolute_root: bool = False) -> Manifest:
    """Validate and write a manifest (the same bytes for the same cohort), whole or not at all.

    Args:
        manifest: the cohort.
        path: the JSON file.
        absolute_root: write the folder of the files as an absolute path, not relative to the manifest's folder.

    Returns:
        The manifest, with ``path`` set.

    Raises:
        DataError: the manifest is not valid.
        ResourceError: the file cannot be written.
    """
    path = Path(path).resolve()
    raw = manifest_to_raw(manifest)
    if not absolute_root:
        raw["root"] = Path(os.path.relpath(manifest.root, path.parent)).as_posix()
    validate_manifest(raw, str(path))
    write_json(path, raw)
    return replace(manifest, path=path)


def case_items(
    manifest: Manifest,
    split: str,
    *,
    modalities: Sequence[str] | None = None,
    fold: int | None = None,
    label_key: str = "label",
    masks: Mapping[str, str] = BRAIN_ALONE,
) -> list[dict[str, Any]]:
    """Return one item per case of a split, as the transform chain takes them.

    Args:
        manifest: the cohort.
        split: ``train``, ``validation`` or ``test``.
        modalities: channels of the image, in this order; the manifest's where None.
        fold: use the stored folds: ``validation`` is the non-test cases of this fold, ``train`` those of the others.
        label_key: key of the label map.
        masks: key -> role of a mask in the manifest.

    Returns:
        Dictionaries with ``case``, ``subject``, ``image`` (absolute paths, None for an optional modality that is
        missing), ``channels`` (index on the fourth axis, or None), ``label_key`` and the keys of ``masks`` where
        there are such files, ``digests`` (sha256 under the same keys), ``label_values`` ([source value, label id]
        pairs), and ``annotated`` (label ids) where the case is annotated in part.

    Raises:
        UsageError: no such split, modality or fold.
        DataError: the training split is empty.
    """
    names = [modality.name for modality in manifest.modalities]
    wanted = names if modalities is None else list(modalities)
    for name in wanted:
        if name not in names:
            raise UsageError(f"modality {name!r}", f"{_title(manifest)} has {names}", nearest(name, names))
    cases = _cases_of(manifest, split, fold)
    if split == "train" and not cases:
        raise DataError(
            f"{_title(manifest)}, split train",
            f"it is empty: {len(manifest.cases)} cases are all in other splits",
            "import the cohort with training cases, or use it for evaluation only",
        )
    return [_item(manifest, case, wanted, label_key, masks) for case in cases]


def _cases_of(manifest: Manifest, split: str, fold: int | None) -> list[Case]:
    if split not in SPLITS:
        raise UsageError(f"split {split!r}", f"expected one of {SPLITS}", nearest(split, SPLITS))
    _check_fold(manifest, fold)
    if fold is None or split == "test":
        return [case for case in manifest.cases if case.split == split]
    held_out = split == "validation"
    return [case for case in manifest.cases if case.split != "test" and (case.fold == fold) == held_out]


def _check_fold(manifest: Manifest, fold: int | None) -> None:
    folds = manifest.splits.folds or 0
    if fold is not None and not 0 <= fold < folds:
        stored = f"folds 0 to {folds - 1}" if folds else "no folds"
        raise UsageError(
            f"fold {fold}", f"{_title(manifest)} stores {stored}", "choose a stored fold, or import with more"
        )


def _item(
    manifest: Manifest, case: Case, modalities: Sequence[str], label_key: str, masks: Mapping[str, str]
) -> dict[str, Any]:
    images = [case.images.get(name) for name in modalities]
    item: dict[str, Any] = {
        "case": case.id,
        "subject": case.subject,
        "image": [None if entry is None else str(manifest.root / entry.path) for entry in images],
        "channels": [None if entry is None else entry.channel for entry in images],
        "label_values": [[value, label] for value, label in sorted(manifest.label_values().items())],
        "digests": {"image": [None if entry is None else entry.sha256 for entry in images]},
    }
    files = {label_key: case.label, **{key: case.masks.get(role) for key, role in masks.items()}}
    for key, file in files.items():
        if file is not None:
            item[key] = str(manifest.root / file.path)
            item["digests"][key] = file.sha256
    if case.annotated is not None:
        item["annotated"] = list(case.annotated)
    return item


def _title(manifest: Manifest) -> str:
    return f"manifest {manifest.path or manifest.name}"


def _check_files(manifest: Manifest, with_digest: bool) -> None:
    """Raise unless every file is there as recorded; each file is looked at once."""
    entries = list(_unique_files(manifest))
    missing = [(case, key, entry) for case, key, entry in entries if not (manifest.root / entry.path).is_file()]
    if missing:
        case, key, entry = missing[0]
        raise DataError(
            f"{manifest.root / entry.path} (case {case.id}, key {key})",
            f"the file does not exist: {len(missing)} of the {len(entries)} files of {_title(manifest)} are missing, "
            "this is the first",
            "restore the files, or load the manifest with the root where they are",
        )
    for case, key, entry in entries:
        _check_file(manifest.root / entry.path, entry, f"case {case.id}, key {key}", with_digest)


def _check_file(path: Path, entry: FileEntry, where: str, with_digest: bool) -> None:
    fix = "restore the recorded file, or import the cohort again: it is a new version with a new digest"
    size = path.stat().st_size
    if size != entry.size:
        raise DataError(f"{path} ({where})", f"the file has {size} bytes, the manifest records {entry.size}", fix)
    if with_digest and (digest := _digest(path, where)) != entry.sha256:
        raise DataError(f"{path} ({where})", f"the file's sha256 is {digest}, the manifest records {entry.sha256}", fix)


def _digest(path: Path, where: str) -> str:
    try:
        return file_digest(path)
    except OSError as error:
        raise DataError(
            f"{path} ({where})", f"the file cannot be read: {error.strerror}", "check its rights"
        ) from error


def _unique_files(manifest: Manifest) -> Iterator[tuple[Case, str, FileEntry]]:
    seen: set[FileEntry] = set()
    for case in manifest.cases:
        for key, entry in case.files().items():
            bare = replace(entry, channel=None)
            if bare not in seen:
                seen.add(bare)
                yield case, key, entry
