"""Does a split keep apart what has to be apart (R13)? Subjects, files, voxels, classes; and do compared runs share one?

The manifest's own validation refuses the first two; they are here for cohorts that were put together otherwise, and
because a subject may be written in two ways and an image may be stored twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.manifests import Manifest
from pipelines.manifests.digest import canonical_digest
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection, as_dictionary
from pipelines.preflight.label_counts import WITH_CLASSES, Tally, all_cases, foreground_names, tallies_of
from pipelines.preflight.rule import Rule

_r13 = partial(Finding, "R13", "error", source="data")
PLACES_LOOKED_AT = 20_000  # voxels of an image that tell whether it is another


@dataclass(frozen=True)
class Place:
    """Where a case stands: its subject, its part of the split, and the digests of its images by key."""

    case: str
    subject: str
    part: str
    images: Mapping[str, str] = field(default_factory=dict)


def places_of(cohort: Manifest, fold: int | None = None) -> list[Place]:
    """Return the place of every case; with a ``fold``, its cases validate and those of the others train."""
    return [
        Place(
            case.id,
            case.subject,
            case.split if fold is None or case.split == "test" else ("validation" if case.fold == fold else "train"),
            {name: entry.sha256 for name, entry in case.images.items()},
        )
        for case in cohort.cases
    ]


def split_digest(cohort: Manifest, fold: int | None = None) -> str:
    """Return the sha256 of who stands where: the same for the same split, whatever else the manifest says."""
    return canonical_digest(sorted([place.subject, place.case, place.part] for place in places_of(cohort, fold)))


def subjects_in_two_parts(places: Sequence[Place]) -> list[Finding]:
    """Find subjects in two parts of a split; case and blanks of their names do not tell two subjects apart."""
    return _in_two_parts(
        [(place.subject.strip().casefold(), "", place) for place in places],  # a page of findings names no subject
        "one subject",
        "cases of one subject were split as if they were strangers",
        "put all cases of a subject into one part of the split, or import again",
    )


def files_in_two_parts(places: Sequence[Place]) -> list[Finding]:
    """Find image files with the same bytes in two parts of a split."""
    return _in_two_parts(
        [(digest, name, place) for place in places for name, digest in place.images.items()],
        "image file",
        "a file was copied under another subject's name",
        "remove the copy, or give both cases one subject and import again",
    )


def voxels_in_two_parts(places: Sequence[Place], digests: Mapping[str, str]) -> list[Finding]:
    """Find prepared images with the same voxels in two parts of a split, although their files differ.

    Args:
        places: of the cases.
        digests: case -> digest of its voxels.
    """
    return _in_two_parts(
        [(digests[place.case], "image", place) for place in places if place.case in digests],
        "content of the",
        "an image was stored again, with another header or compression, under another subject's name",
        "remove the copy, or give both cases one subject and import again",
    )


def _in_two_parts(entries: Sequence[tuple[Hashable, str, Place]], kind: str, cause: str, fix: str) -> list[Finding]:
    owners: dict[Hashable, list[tuple[str, Place]]] = {}
    for key, shown, place in entries:
        owners.setdefault(key, []).append((shown, place))
    leaks = [found for found in owners.values() if len({place.part for _, place in found}) > 1]
    if not leaks:
        return []
    shown, first = leaks[0][0]
    other = next(place for _, place in leaks[0] if place.part != first.part)
    pairs = tuple(dict.fromkeys(place.case for found in leaks for _, place in found))
    named = f"{kind} {shown}".strip()
    what = f"{named} is in {first.part} (case {first.case}) and in {other.part} (case {other.case})"
    return [
        _r13(what, f"{len(leaks)} in two parts", "0: what is validated was never trained on", cause, fix, cases=pairs)
    ]


def missing_classes(parts: Mapping[str, Sequence[Tally]], names: Mapping[int, str]) -> list[Finding]:
    """Find classes that one part of a split has and another has not.

    Args:
        parts: train, validation, ...: the tallies of its cases.
        names: foreground class id -> name.
    """
    findings = []
    for class_id, name in names.items():
        count = {
            part: sum(tally.has(class_id) and tally.voxels.get(class_id, 0) > 0 for tally in tallies)
            for part, tallies in parts.items()
            if tallies
        }
        lacking = [part for part, cases in count.items() if cases == 0]
        if lacking and len(lacking) < len(count):
            findings.append(
                _r13(
                    f"class {class_id} ({name}) is missing from {' and '.join(lacking)}",
                    ", ".join(f"{part}: {cases} cases" for part, cases in count.items()),
                    "1 case or more in every part",
                    "a rare class, split without stratification",
                    "import again with another seed or larger shares, or move a subject that has the class",
                )
            )
    return findings


def compared_on_other_splits(digests: Mapping[str, str]) -> list[Finding]:
    """Find runs that are compared with one another although they were not split alike.

    Args:
        digests: run -> digest of its split, or of its manifest; the first is this run's.
    """
    first, *others = digests
    other = [name for name in others if digests[name] != digests[first]]
    if not other:
        return []
    return [
        _r13(
            f"{first} is compared with {', '.join(other)}, which had another split",
            "; ".join(f"{name}: {digests[name][:12]}" for name in (first, *other)),
            "one digest",
            "the cohort was imported again between the runs",
            "train and measure all of them on one manifest",
            source="configuration",
        )
    ]


def content_digest(image: np.ndarray) -> str:
    """Return a digest of the voxels of an image (C, *spatial), of evenly spaced ones where there are many."""
    step = max(1, int(np.ceil((image.size / PLACES_LOOKED_AT) ** (1 / image.ndim))))
    some = np.ascontiguousarray(image[(slice(None), *[slice(None, None, step)] * (image.ndim - 1))])
    return hashlib.sha256(repr(image.shape).encode() + some.tobytes()).hexdigest()


def _fold(inspection: Inspection) -> int | None:
    return inspection.config.get("fold")


def check_leakage(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R13: subjects and files of the manifest."""
    places = places_of(inspection.need("cohort"), _fold(inspection))
    return [*subjects_in_two_parts(places), *files_in_two_parts(places)]


def check_content(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R13: the voxels of the prepared training and validation images, where their files tell nothing."""
    places, digests = [], {}
    for part, dataset in (("train", inspection.need("train")), ("validation", inspection.need("validation"))):
        for case in map(as_dictionary, all_cases(dataset, part)):
            if "image" not in case:
                raise CannotRun("the prepared cases have no image")
            name = str(case.get("case", ""))
            places.append(Place(name, name, part))
            digests[name] = content_digest(case["image"])
    return voxels_in_two_parts(places, digests)


def check_classes(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R13: classes that training has and validation has not, or the other way round."""
    names = foreground_names(inspection)
    sets = {"train": inspection.need("train"), "validation": inspection.need("validation")}
    parts = {part: tallies_of(all_cases(dataset, part), list(names)) for part, dataset in sets.items()}
    return missing_classes(parts, names)


def check_compared(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R13: the runs that this one is compared with (``compare_with``: folders of metrics), by their manifests."""
    cohort = inspection.need("cohort")
    folders = inspection.config.get("compare_with") or []
    if not folders:
        raise CannotRun("this run is compared with no other")
    folders = [folders] if isinstance(folders, (str, Path)) else folders
    digests = {"this run": cohort.digest}
    for folder in folders:
        digests[str(folder)] = _manifest_digest(Path(folder))
    return compared_on_other_splits(digests)


def _manifest_digest(folder: Path) -> str:
    """Return the manifest's digest that the results in a folder of metrics, or a run's record, were made with."""
    for file in (folder / "summary.json", folder / "record.json"):
        if file.is_file():
            content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            digest = content.get("manifest_digest") or (content.get("source") or {}).get("manifest_digest")
            if digest:
                return str(digest)
    raise CannotRun(f"{folder} does not say which manifest it was made with")


RULES: tuple[Rule, ...] = (
    Rule("R13", "subjects and files", check_leakage),
    Rule("R13", "voxels", check_content, of_data=True),
    Rule("R13", "classes of the split", check_classes, tasks=WITH_CLASSES, of_data=True),
    Rule("R13", "compared runs", check_compared),
)
