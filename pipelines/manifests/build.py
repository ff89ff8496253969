"""From the files of every case to a manifest: the part that all importers share.

Every file is read to its end before it may enter a manifest: grids, finite voxels and label values are checked here, so
that a training run is never the first to meet a broken file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipelines.manifests.digest import file_digest
from pipelines.manifests.model import Case, FileEntry, Label, LeftOut, Manifest, Modality, manifest_to_raw
from pipelines.manifests.splits import SplitPlan, apply_plan, volume_strata
from pipelines.manifests.validate import validate_manifest
from transforms.errors import DataError
from transforms.nifti import NiftiHeader, check_same_grid, check_voxels, read_header, read_label

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class CaseFiles:
    """The files of a case before they are read: POSIX paths below the root, images with their channel or None."""

    id: str
    subject: str
    images: Mapping[str, tuple[str, int | None]]
    label: str | None = None
    masks: Mapping[str, str] = field(default_factory=dict)
    split: str | None = None


@dataclass(frozen=True)
class CohortText:
    """What a manifest says about its cohort in words."""

    name: str
    licence: str
    source: str
    task: str


def build_manifest(
    root: Path,
    case_files: Sequence[CaseFiles],
    text: CohortText,
    modalities: Sequence[Modality],
    labels: Sequence[Label],
    plan: SplitPlan,
    left_out: Sequence[LeftOut] = (),
    progress: Progress | None = None,
) -> Manifest:
    """Read and check every file, split the subjects, and return the validated manifest.

    Args:
        root: folder that all paths start from.
        case_files: the cases; one whose ``split`` is given keeps it, outside the plan.
        text: name, licence, source and task.
        modalities, labels: the tables.
        plan: how to split; strata are tertiles of the label volume where there are labels.
        left_out: what the importer was told to skip.
        progress: called after every case with the number done, the number of cases, and the case id.

    Raises:
        DataError: a file that cannot be used, grids that differ, label values outside the table, leakage.
        UsageError: a plan that does not fit the subjects.
    """
    table = {value: label.id for label in labels for value in label.values}
    measured: list[tuple[Case, float | None]] = []
    for done, files in enumerate(sorted(case_files, key=lambda files: files.id), start=1):
        measured.append(_read_case(root, files, table))
        if progress is not None:
            progress(done, len(case_files), files.id)
    fixed = {files.id: files.split for files in case_files if files.split is not None}
    free = [(case, volume) for case, volume in measured if case.id not in fixed]
    split, folds, record = apply_plan(volume_strata(_volume_by_subject(free)), plan)
    manifest = Manifest(
        **vars(text),
        modalities=tuple(modalities),
        labels=tuple(labels),
        cases=tuple(_place(case, fixed.get(case.id), split, folds) for case, _ in measured),
        splits=record,
        root=root,
        left_out=tuple(sorted(left_out, key=lambda left: left.case)),
    )
    validate_manifest(manifest_to_raw(manifest), f"cohort {text.name!r}")
    return manifest


def _place(case: Case, fixed: str | None, split: Mapping[str, str], folds: Mapping[str, int]) -> Case:
    placed = split[case.subject] if fixed is None else fixed
    fold = None if placed == "test" else folds.get(case.subject)
    return Case(**{**vars(case), "split": placed, "fold": fold})


def _volume_by_subject(cases: Sequence[tuple[Case, float | None]]) -> dict[str, float | None]:
    volumes: dict[str, list[float]] = {case.subject: [] for case, _ in cases}
    for case, volume in cases:
        if volume is not None:
            volumes[case.subject].append(volume)
    return {subject: math.fsum(parts) / len(parts) if parts else None for subject, parts in volumes.items()}


def _read_case(root: Path, files: CaseFiles, table: Mapping[int, int]) -> tuple[Case, float | None]:
    """Return the case (its split still to come) and its label volume in mL, None without a label."""
    header = _check_images(root, files)
    for role, path in files.masks.items():
        _check_on_grid(root / path, header, files.id, f"masks/{role}")
        check_voxels(root / path, case=files.id, key=f"masks/{role}")
    volume = None
    if files.label is not None:
        _check_on_grid(root / files.label, header, files.id, "label")
        ids = read_label(root / files.label, table, case=files.id, key="label")
        volume = float(np.count_nonzero(ids)) * abs(float(np.linalg.det(header.affine[:3, :3]))) / 1000
    digests: dict[str, FileEntry] = {}
    case = Case(
        id=files.id,
        subject=files.subject,
        split="",
        images={name: _entry(root, path, channel, digests) for name, (path, channel) in files.images.items()},
        spacing=tuple(round(size, 6) for size in header.spacing),
        shape=header.shape,
        label=None if files.label is None else _entry(root, files.label, None, digests),
        masks={role: _entry(root, path, None, digests) for role, path in files.masks.items()},
    )
    return case, volume


def _check_images(root: Path, files: CaseFiles) -> NiftiHeader:
    """Check the images' grids, channels and voxels, each file once; return the header of the first."""
    headers: dict[str, NiftiHeader] = {}
    for name, (path, _) in files.images.items():
        if path in headers:
            continue
        key = f"images/{name}"
        header = read_header(root / path, case=files.id, key=key)
        check_same_grid(next(iter(headers.values()), header), header, key, files.id)
        used = sum(other == path for other, _ in files.images.values())
        if header.channels != used:
            raise DataError(
                f"{root / path} (case {files.id}, key {key})",
                f"the file has {header.channels} channels, the modality table names {used} in it",
                "correct the modality table, or split the file into one per modality",
            )
        check_voxels(root / path, case=files.id, key=key)
        headers[path] = header
    return next(iter(headers.values()))


def _check_on_grid(path: Path, reference: NiftiHeader, case: str, key: str) -> None:
    check_same_grid(reference, read_header(path, case=case, key=key), key, case)


def _entry(root: Path, path: str, channel: int | None, known: dict[str, FileEntry]) -> FileEntry:
    if path not in known:
        known[path] = FileEntry(path, file_digest(root / path), (root / path).stat().st_size)
    return FileEntry(path, known[path].sha256, known[path].size, channel)
