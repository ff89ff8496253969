"""Import of a folder whose paths follow patterns such as ``{subject}/{session}/FLAIR.nii.gz``."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pipelines.manifests.build import CaseFiles, CohortText, Progress, build_manifest
from pipelines.manifests.labels import label_table
from pipelines.manifests.model import Label, LeftOut, Manifest, Modality
from pipelines.manifests.splits import SplitPlan
from pipelines.names import nearest
from transforms.errors import DataError, UsageError

PLACEHOLDERS = ("subject", "session", "case")
_PLACEHOLDER = re.compile(r"\{(.*?)\}")
Identity = tuple[tuple[str, str], ...]


def import_folder(
    root: str | Path,
    images: Mapping[str, str],
    label: str | None = None,
    masks: Mapping[str, str] | None = None,
    labels: Sequence[str | Label] = (),
    *,
    name: str,
    licence: str,
    source: str,
    task: str = "segmentation",
    units: Mapping[str, str] | None = None,
    optional: Sequence[str] = (),
    missing: Literal["error", "skip"] = "error",
    split: SplitPlan | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Return the manifest of the NIfTI files under ``root`` that the patterns name.

    A pattern is a path below ``root`` with the placeholders ``{subject}``, ``{session}`` and ``{case}``; each stands
    for characters other than a slash, as many as fit. Without any, the folder is one case, called by the cohort's name.
    Files that no pattern names are no error.

    Args:
        root: folder of the cohort.
        images: pattern by modality; their order is the order of the network's channels.
        label: pattern of the label map.
        masks: pattern by role, for example ``brain``.
        labels: label table, as ``1:lesion`` or ``1:whole_tumour=1+2+3+4``.
        name, licence, source, task: what the manifest says about the cohort.
        units: unit by modality (``HU``); ``a.u.`` where not given.
        optional: modalities, mask roles, or ``label``, that a case may lack.
        missing: a case that lacks a required file is an error, or is skipped and listed in the manifest's ``left_out``.
        split: how to split; by default 70 / 10 / 20 %, stratified by label volume.
        progress: called with cases done, cases in all, case id.

    Raises:
        UsageError: options that contradict each other.
        DataError: no case found, a required file missing, or a file that cannot be used.
    """
    folder = Path(root).resolve()
    if missing not in ("error", "skip"):
        raise UsageError(f"missing {missing!r}", "expected error or skip", nearest(missing, ("error", "skip")))
    patterns = {f"images/{modality}": pattern for modality, pattern in images.items()}
    patterns |= {} if label is None else {"label": label}
    patterns |= {f"masks/{role}": pattern for role, pattern in (masks or {}).items()}
    table = label_table(labels)
    _check_options(folder, images, label, masks or {}, table, units or {}, optional)
    may_lack = {key for key in patterns if key.removeprefix("images/").removeprefix("masks/") in optional}
    found = _find_cases(folder, patterns)
    cases, left_out = [], []
    for identity, files in sorted(found.items()):
        case_id, subject = _names(identity, name)
        lacking = [key for key in patterns if key not in files and key not in may_lack]
        if not lacking:
            cases.append(_case_files(case_id, subject, files))
        elif missing == "skip":
            left_out.append(LeftOut(case_id, tuple(lacking)))
        else:
            _refuse_missing(folder, case_id, identity, lacking, patterns)
    if not cases:
        raise DataError(
            str(folder),
            f"no complete case matches the patterns {patterns} ({len(left_out)} were left out as incomplete)",
            "check the patterns: they start below the root, and {subject} stands for one part of the path",
        )
    modalities = [Modality(m, (units or {}).get(m, "a.u."), m in optional) for m in images]
    text = CohortText(name, licence, source, task)
    return build_manifest(folder, cases, text, modalities, table, split or SplitPlan(), left_out, progress)


def match_pattern(pattern: str, path: str) -> dict[str, str] | None:
    """Return what the placeholders of ``pattern`` stand for in ``path``, or None where the path is another.

    Raises:
        UsageError: a placeholder that is not one of ``PLACEHOLDERS``.
    """
    match = _compiled(pattern).fullmatch(path)
    return None if match is None else match.groupdict()


def _compiled(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts: list[str] = []
    for index, part in enumerate(_PLACEHOLDER.split(pattern)):
        if index % 2 == 0:
            parts.append(re.escape(part))
        elif part not in PLACEHOLDERS:
            raise UsageError(f"pattern {pattern!r}", f"unknown placeholder {part!r}", nearest(part, PLACEHOLDERS))
        else:
            parts.append(f"(?P={part})" if part in seen else f"(?P<{part}>[^/]+)")
            seen.add(part)
    return re.compile("".join(parts))


def _check_options(
    folder: Path,
    images: Mapping[str, str],
    label: str | None,
    masks: Mapping[str, str],
    table: Sequence[Label],
    units: Mapping[str, str],
    optional: Iterable[str],
) -> None:
    if not folder.is_dir():
        raise UsageError(f"root {folder}", "there is no such folder", "give the folder that holds the images")
    if not images:
        raise UsageError("images", "no modality is given", "write for example flair={subject}/FLAIR.nii.gz")
    if label is not None and len(table) == 1:
        raise UsageError("labels", "a label pattern is given and no label", "name its values, for example 1:lesion")
    for option, names, valid in (
        ("units", units, {*images}),
        ("optional", optional, {*images, *masks, *(["label"] if label else [])}),
    ):
        for name in names:
            if name not in valid:
                raise UsageError(f"{option} {name!r}", "there is no such key", nearest(name, valid))
    placeholders = {key: frozenset(_compiled(pattern).groupindex) for key, pattern in images.items()}
    first = next(iter(placeholders))
    for key, names in placeholders.items():
        if names != placeholders[first]:
            raise UsageError(
                f"pattern of {key!r}",
                f"it has the placeholders {sorted(names)}, that of {first!r} has {sorted(placeholders[first])}",
                "use the same placeholders in the pattern of every modality",
            )
    for key, pattern in (("label", label), *masks.items()):
        extra = set() if pattern is None else set(_compiled(pattern).groupindex) - placeholders[first]
        if extra:
            raise UsageError(
                f"pattern of {key!r}", f"the images' patterns lack its placeholders {sorted(extra)}", "use theirs only"
            )


def _find_cases(folder: Path, patterns: Mapping[str, str]) -> dict[Identity, dict[str, str]]:
    """Return, for every case that an image or label pattern names, the path by key."""
    paths = _files_below(folder)
    by_key: dict[str, dict[Identity, str]] = {key: {} for key in patterns}
    for key, pattern in patterns.items():
        compiled = _compiled(pattern)
        for path in paths:
            if match := compiled.fullmatch(path):
                by_key[key][tuple(sorted(match.groupdict().items()))] = path
    full = next(frozenset(_compiled(pattern).groupindex) for pattern in patterns.values())
    identities = {
        identity
        for key, matches in by_key.items()
        for identity in matches
        if not key.startswith("masks/") and {name for name, _ in identity} == full
    }
    return {identity: _files_of(identity, by_key) for identity in identities}


def _files_of(identity: Identity, by_key: Mapping[str, Mapping[Identity, str]]) -> dict[str, str]:
    """A file whose pattern has fewer placeholders than the images' (one mask per subject) serves all cases it fits."""
    files: dict[str, str] = {}
    for key, matches in by_key.items():
        names = {name for match in matches for name, _ in match}
        path = matches.get(tuple((name, value) for name, value in identity if name in names))
        if path is not None:
            files[key] = path
    return files


def _files_below(folder: Path) -> list[str]:
    """Return the paths of all files, links followed, each real folder visited once."""
    visited: set[str] = set()
    paths: list[str] = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if os.path.realpath(os.path.join(parent, name)) not in visited)
        visited.update(os.path.realpath(os.path.join(parent, name)) for name in folders)
        paths += [Path(parent, name).relative_to(folder).as_posix() for name in names]
    return sorted(paths)


def _names(identity: Identity, cohort: str) -> tuple[str, str]:
    """Return case id and subject."""
    values = dict(identity)
    if not values:
        return cohort, cohort
    case_id = values.get("case") or "_".join(values[name] for name in ("subject", "session") if name in values)
    return case_id, values.get("subject", case_id)


def _case_files(case_id: str, subject: str, files: Mapping[str, str]) -> CaseFiles:
    def below(prefix: str) -> dict[str, str]:
        return {key.removeprefix(prefix): path for key, path in files.items() if key.startswith(prefix)}

    images = {modality: (path, None) for modality, path in below("images/").items()}
    return CaseFiles(case_id, subject, images, files.get("label"), below("masks/"))


def _refuse_missing(
    folder: Path, case_id: str, identity: Identity, lacking: Sequence[str], patterns: Mapping[str, str]
) -> None:
    expected = patterns[lacking[0]].format(**dict(identity))
    raise DataError(
        f"{folder / expected} (case {case_id}, key {lacking[0]})",
        f"the file does not exist; the case lacks {list(lacking)}",
        "add the file, declare the key optional, or choose to skip incomplete cases",
    )
