"""Planted leaks between the parts of a split, in the cohort of the lesion bundle."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

from planted import Proof
from proof_labels import cohort, found_in, lesion_of
from proof_network import fusion, lesion

from pipelines.manifests import Case, FileEntry, Manifest
from pipelines.manifests.digest import file_digest
from pipelines.preflight import Finding, Inspection
from pipelines.preflight.splits import RULES


def of_split(split: str) -> Case:
    return next(case for case in cohort().cases if case.split == split)


def with_case(changed: Case) -> Manifest:
    return replace(cohort(), cases=tuple(changed if case.id == changed.id else case for case in cohort().cases))


def same_subject() -> Inspection:
    """A validation case of a subject that trains, written with a capital and a blank more."""
    subject = f"{of_split('train').subject.upper()} "
    return replace(lesion(), cohort=with_case(replace(of_split("validation"), subject=subject)))


def same_file() -> Inspection:
    """A validation case with the very image of a training case."""
    return replace(lesion(), cohort=with_case(replace(of_split("validation"), images=of_split("train").images)))


def same_voxels() -> Inspection:
    """A validation case with the images of a training case, compressed anew: other files, the same voxels."""
    trains, validates = of_split("train"), of_split("validation")
    return lesion_of("copied", with_case(replace(trains, id=validates.id, subject=validates.subject, split="validation",
                                                 images={k: _again(e) for k, e in trains.images.items()})))  # fmt: skip


def _again(entry: FileEntry) -> FileEntry:
    source = cohort().root / entry.path
    copy = Path(source).with_name(f"again_{source.name}")
    copy.write_bytes(gzip.compress(gzip.decompress(source.read_bytes()), compresslevel=1, mtime=1))
    path = copy.relative_to(cohort().root).as_posix()
    return replace(entry, path=path, sha256=file_digest(copy), size=copy.stat().st_size)


def splits(inspection: Inspection, name: str = "") -> list[Finding]:
    """Run the checks that do not ask for a comparison."""
    names = [name] if name else [rule.name for rule in RULES if rule.name != "compared runs"]
    return [
        finding
        for rule in RULES
        if rule.name in names and inspection.task in rule.tasks
        for finding in found_in(inspection, "R13", rule.name, RULES)
    ]


PROOFS: list[Proof] = [
    Proof(
        "R13", "subjects, files, voxels and classes of the parts of the split, digests of compared runs",
        "splits by file order: slices of one core in training and validation",
        lambda: [*splits(same_subject()), *splits(same_file()), *splits(same_voxels())],
        lambda: [*splits(lesion()), *splits(fusion())],
    ),
]  # fmt: skip
