"""The data manifest as immutable values, and its two-way translation to plain JSON.

A manifest names a cohort: every file with its digest, the label table, and the split, drawn once and stored. Its
own digest leaves out where the files lie, so that one cohort on two machines is one cohort.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipelines.manifests.digest import canonical_digest

SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class FileEntry:
    """A file: ``path`` relative to the manifest's root (POSIX), digest, size in bytes, channel of a 4D file or None."""

    path: str
    sha256: str
    size: int
    channel: int | None = None


@dataclass(frozen=True)
class Modality:
    """An input of the network: its unit (``HU``, ``a.u.``, ``1``), and whether a case may lack it."""

    name: str
    unit: str = "a.u."
    optional: bool = False


@dataclass(frozen=True)
class Label:
    """A class: ``values`` are the numbers in the label files that mean it, ``colour`` is ``#rrggbb``."""

    id: int
    name: str
    colour: str
    values: tuple[int, ...]
    roi: str | None = None


@dataclass(frozen=True)
class Case:
    """One study: its files on one grid of ``shape`` voxels of ``spacing`` mm, and the split of its subject."""

    id: str
    subject: str
    split: str
    images: Mapping[str, FileEntry]
    spacing: tuple[float, ...]
    shape: tuple[int, ...]
    label: FileEntry | None = None
    masks: Mapping[str, FileEntry] = field(default_factory=dict)
    fold: int | None = None
    annotated: tuple[int, ...] | None = None

    def files(self) -> dict[str, FileEntry]:
        """Return every file under the JSON pointer of its place in the case, e.g. ``images/flair``."""
        label = {} if self.label is None else {"label": self.label}
        images = {f"images/{name}": entry for name, entry in self.images.items()}
        return images | label | {f"masks/{role}": entry for role, entry in self.masks.items()}


@dataclass(frozen=True)
class Splits:
    """How the stored split was made."""

    scheme: str
    seed: int | None = None
    fractions: tuple[float, float, float] | None = None
    folds: int | None = None


@dataclass(frozen=True)
class LeftOut:
    """A case that the importer was told to skip, and the keys whose files it lacks."""

    case: str
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """A cohort. ``root`` is the absolute folder of its files; ``path`` the JSON file it was read from, if any."""

    name: str
    licence: str
    source: str
    task: str
    modalities: tuple[Modality, ...]
    labels: tuple[Label, ...]
    cases: tuple[Case, ...]
    splits: Splits
    root: Path
    left_out: tuple[LeftOut, ...] = ()
    path: Path | None = None
    schema_version: int = SCHEMA_VERSION

    @cached_property
    def digest(self) -> str:
        """The sha256 of the canonical JSON without ``root``."""
        raw = manifest_to_raw(self)
        del raw["root"]
        return canonical_digest(raw)

    def label_values(self) -> dict[int, int]:
        """Return the label id for every value that may occur in a label file."""
        return {value: label.id for label in self.labels for value in label.values}


def manifest_to_raw(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as JSON values; what is absent has no key. ``root`` is absolute."""
    return {
        "schema_version": manifest.schema_version,
        "name": manifest.name,
        "licence": manifest.licence,
        "source": manifest.source,
        "task": manifest.task,
        "root": manifest.root.as_posix(),
        "modalities": [{"name": m.name, "unit": m.unit, "optional": m.optional} for m in manifest.modalities],
        "labels": [
            _present(id=label.id, name=label.name, colour=label.colour, values=list(label.values), roi=label.roi)
            for label in manifest.labels
        ],
        "splits": _present(
            scheme=manifest.splits.scheme,
            seed=manifest.splits.seed,
            fractions=_floats(manifest.splits.fractions),
            folds=manifest.splits.folds,
        ),
        "left_out": [{"case": left.case, "missing": list(left.missing)} for left in manifest.left_out],
        "cases": [_case_to_raw(case) for case in manifest.cases],
    }


def manifest_from_raw(raw: Mapping[str, Any], root: Path, path: Path | None = None) -> Manifest:
    """Return the manifest that validated JSON values describe, its files under the absolute folder ``root``."""
    splits = raw["splits"]
    return Manifest(
        name=raw["name"],
        licence=raw["licence"],
        source=raw["source"],
        task=raw["task"],
        modalities=tuple(Modality(**modality) for modality in raw["modalities"]),
        labels=tuple(Label(**{**label, "values": tuple(label["values"])}) for label in raw["labels"]),
        cases=tuple(_case_from_raw(case) for case in raw["cases"]),
        splits=Splits(splits["scheme"], splits.get("seed"), _fractions(splits.get("fractions")), splits.get("folds")),
        root=root,
        left_out=tuple(LeftOut(left["case"], tuple(left["missing"])) for left in raw.get("left_out", ())),
        path=path,
        schema_version=raw["schema_version"],
    )


def _case_to_raw(case: Case) -> dict[str, Any]:
    return _present(
        id=case.id,
        subject=case.subject,
        split=case.split,
        fold=case.fold,
        spacing=_floats(case.spacing),
        shape=list(case.shape),
        images={name: _file_to_raw(entry) for name, entry in case.images.items()},
        label=None if case.label is None else _file_to_raw(case.label),
        masks={role: _file_to_raw(entry) for role, entry in case.masks.items()},
        annotated=_list(case.annotated),
    )


def _case_from_raw(raw: Mapping[str, Any]) -> Case:
    return Case(
        id=raw["id"],
        subject=raw["subject"],
        split=raw["split"],
        fold=raw.get("fold"),
        spacing=tuple(float(size) for size in raw["spacing"]),
        shape=tuple(raw["shape"]),
        images={name: FileEntry(**entry) for name, entry in raw["images"].items()},
        label=FileEntry(**raw["label"]) if "label" in raw else None,
        masks={role: FileEntry(**entry) for role, entry in raw["masks"].items()},
        annotated=tuple(raw["annotated"]) if "annotated" in raw else None,
    )


def _file_to_raw(entry: FileEntry) -> dict[str, Any]:
    return _present(path=entry.path, sha256=entry.sha256, size=entry.size, channel=entry.channel)


def _present(**values: Any) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _floats(values: tuple[float, ...] | None) -> list[float] | None:
    """JSON writes 0 and 0.0 differently; a digest must not."""
    return None if values is None else [float(value) for value in values]


def _list(values: tuple[Any, ...] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _fractions(values: list[float] | None) -> tuple[float, float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]), float(values[2]))
