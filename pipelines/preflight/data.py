"""Masks that nobody drew, and cases that nobody sees.

A mask made by a threshold fails in ways a look at numbers shows: it keeps the same share of every image, or encloses a
brain no head can hold. A case that drops out on the way from the manifest to the training is not missed by a loss.

    R09  implausible automatic masks      R14  cases and files that are missing or were dropped
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.manifests import Manifest, case_items
from pipelines.preflight.chains import centred
from pipelines.preflight.finding import CannotRun, Finding, Severity
from pipelines.preflight.inspection import Inspection, as_dictionary
from pipelines.preflight.rule import Rule

FEWEST_FOR_SPREAD = 10  # cases from which on equal shares of the foreground are no coincidence
STEP = 2  # every n-th voxel of each axis, where masks are compared
WHOLE = 0.999  # a mask of every voxel was not cut by a threshold


@dataclass(frozen=True)
class Volumes:
    """How much an automatic mask holds in one case.

    Attributes:
        case, subject: names.
        mask: what it is: ``foreground``, ``brain`` or ``bone``.
        ml: its volume.
        share: of the whole image (0 to 1), where that is known.
    """

    case: str
    subject: str
    mask: str
    ml: float
    share: float | None = None


@dataclass(frozen=True)
class Tally:
    """What became of the cases of a split.

    Attributes:
        split: its name.
        declared: case ids in the manifest.
        processed: case ids that training or validation will see.
    """

    split: str
    declared: tuple[str, ...]
    processed: tuple[str, ...]


# --- judging --------------------------------------------------------------------------------------------------------


def share_findings(
    volumes: Sequence[Volumes], limits: Mapping[str, float], likeness: Mapping[str, float] | None = None
) -> list[Finding]:
    """R09: judge whether a mask keeps the same share of every image, as a quantile does by construction.

    One case per subject counts, for the contrasts of one head have one mask; masks of every voxel do not.

    Args:
        volumes: of some cases.
        limits: ``share_points``: smallest standard deviation of the share over at least ten subjects; ``likeness``.
        likeness: by mask, the median Dice of one subject's mask with those of others. Above the limit all subjects
            have one shape, as phantoms of one anatomy or cohorts in the space of an atlas, and so one share.
    """
    findings = []
    for mask in dict.fromkeys(each.mask for each in volumes):
        some = {v.subject: v for v in volumes if v.mask == mask and v.share is not None and v.share < WHOLE}
        shares = np.array([100 * v.share for v in some.values() if v.share is not None])
        one_shape = (likeness or {}).get(mask, 0.0) > limits["likeness"]
        if len(shares) >= FEWEST_FOR_SPREAD and float(shares.std()) < limits["share_points"] and not one_shape:
            findings.append(
                _implausible(
                    f"the {mask} mask keeps the same share of every image",
                    f"{shares.mean():.2f} % with a standard deviation of {shares.std():.2f} points "
                    f"over {len(shares)} subjects",
                    f"a standard deviation of {limits['share_points']:g} points or more",
                    "a threshold at a quantile, which keeps its share whatever the image shows",
                    "Choose a threshold that looks at the image (Otsu), or give masks.",
                    [v.case for v in some.values()],
                )
            )
    return findings


def brain_findings(volumes: Sequence[Volumes], limits: Mapping[str, float]) -> list[Finding]:
    """R09: judge the volumes of brain and bone.

    Args:
        volumes: of some cases, those of ``brain`` and ``bone``.
        limits: ``brain_low`` and ``brain_high`` in mL.
    """
    brains = {v.case: v.ml for v in volumes if v.mask == "brain"}
    bones = {v.case: v.ml for v in volumes if v.mask == "bone"}
    low, high = limits["brain_low"], limits["brain_high"]
    findings = []
    wrong = sorted(
        (case for case, ml in brains.items() if not low <= ml <= high),
        key=lambda case: -max(low / max(brains[case], 1e-3), brains[case] / high),
    )
    if wrong:
        findings.append(
            _implausible(
                f"the brain mask of case {wrong[0]} has the volume of no brain",
                f"{brains[wrong[0]]:.0f} mL, {len(wrong)} of {len(brains)} cases",
                f"{low:g} to {high:g} mL",
                "a scan that holds a part of the head, a wrong voxel size, or a mask that leaked",
                "Look at the mask; give one in the manifest, or leave the case out.",
                wrong,
            )
        )
    larger = sorted(
        (case for case, ml in bones.items() if ml > brains.get(case, np.inf)),
        key=lambda case: brains[case] - bones[case],
    )
    if larger:
        findings.append(
            _implausible(
                f"the bone mask of case {larger[0]} is larger than its brain mask",
                f"{bones[larger[0]]:.0f} mL of bone, {brains[larger[0]]:.0f} mL of brain",
                "less bone than brain",
                "a threshold too low, metal, or a CT that is not in HU",
                "Look at the mask and at the units of the CT; give masks in the manifest.",
                larger,
            )
        )
    return findings


def tally_findings(tallies: Sequence[Tally]) -> list[Finding]:
    """R14: judge whether every declared case is processed, and no other."""
    findings = []
    for tally in tallies:
        dropped = [case for case in tally.declared if case not in tally.processed]
        added = [case for case in tally.processed if case not in tally.declared]
        if dropped or added or len(tally.declared) != len(tally.processed):
            findings.append(
                _missing(
                    f"split {tally.split} does not hold the cases of the manifest",
                    f"{len(tally.processed)} processed, {len(dropped)} dropped, {len(added)} not in the manifest",
                    f"{len(tally.declared)} cases, as in the manifest",
                    "a filter or a failed read that nobody reported",
                    "Process every case, or take it out of the manifest by a new import.",
                    dropped or added or list(tally.processed),
                )
            )
    return findings


def file_findings(
    absent: Sequence[tuple[str, str]], unreadable: Sequence[tuple[str, str, str]], n: int
) -> list[Finding]:
    """R14: judge the files of a cohort.

    Args:
        absent: (case, path) of files that do not exist.
        unreadable: (case, path, why) of files that cannot be read or have another size than recorded.
        n: files in the manifest.
    """
    findings = []
    for some, state in ((list(absent), "missing"), ([(case, path) for case, path, _ in unreadable], "unreadable")):
        if some:
            why = "" if state == "missing" else f", {unreadable[0][2]}"
            findings.append(
                _missing(
                    f"{some[0][1]} is {state}",
                    f"{len(some)} of {n} files are {state}{why}",
                    f"{n} files",
                    "files were moved, deleted or cut short after the import",
                    "Restore the files, or say with --data_root where they are.",
                    [case for case, _ in some],
                    files=[path for _, path in some],
                )
            )
    return findings


def left_out_findings(left_out: Mapping[str, Sequence[str]]) -> list[Finding]:
    """R14: report the cases that the import left out because a file was missing; ``left_out``: keys by case."""
    if not left_out:
        return []
    keys = sorted({key for some in left_out.values() for key in some})
    return [
        _missing(
            "cases were left out when the cohort was imported",
            f"{len(left_out)} cases without {', '.join(keys)}",
            "none",
            "the importer was told to skip incomplete cases",
            "Add the files and import again, if these cases should count.",
            list(left_out),
            severity="warn",
        )
    ]


def _implausible(what: str, measured: str, threshold: str, cause: str, fix: str, cases: Sequence[str]) -> Finding:
    return Finding("R09", "error", what, measured, threshold, cause, fix, "data", tuple(cases))


def _missing(
    what: str,
    measured: str,
    threshold: str,
    cause: str,
    fix: str,
    cases: Sequence[str],
    severity: Severity = "error",
    files: Sequence[str] = (),
) -> Finding:
    evidence = {"files": list(files)} if files else {}
    return Finding(
        "R14", severity, what, measured, threshold, cause, fix, "data", tuple(dict.fromkeys(cases)), evidence
    )


# --- pieces of a bundle ---------------------------------------------------------------------------------------------


def check_masks(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R09 over the masks of every training case that came from no file."""
    train = inspection.need("train")
    given = {str(item["case"]): item for item in train.data}
    names = {"foreground": "foreground"}
    if inspection.task == "fusion":
        names |= {"mask": "brain", "bone": "bone"}
    volumes: list[Volumes] = []
    masks: dict[str, dict[str, np.ndarray]] = {}
    for prepared in train.cases:
        case = as_dictionary(prepared)
        item = given.get(str(case["case"]), {})
        for key, name in names.items():
            # a foreground is the brain mask where a cohort brings one, see ForegroundMaskd
            source = "mask" if key == "foreground" and inspection.task != "fusion" else key
            if key in case and item.get(source) is None:
                volumes.append(_volume(case, key, name, inspection.cohort))
                masks.setdefault(name, {})[volumes[-1].subject] = case[key]
    likeness = {name: _likeness(list(some.values())) for name, some in masks.items() if len(some) >= FEWEST_FOR_SPREAD}
    return [*share_findings(volumes, limits, likeness), *brain_findings(volumes, limits)]


def _likeness(masks: Sequence[Any]) -> float:
    """Return the median Dice of the first mask (1, *spatial) with the others, their middles on each other."""
    thin = [np.asarray(mask[(slice(None), *(slice(None, None, STEP),) * (mask.ndim - 1))]) > 0 for mask in masks]
    others = [centred(mask.astype(np.uint8), thin[0].shape[1:]) > 0 for mask in thin[1:]]
    return float(np.median([2 * (thin[0] & o).sum() / max(1, thin[0].sum() + o.sum()) for o in others]))


def _volume(case: Mapping[str, Any], key: str, name: str, cohort: Manifest | None) -> Volumes:
    """Measure one mask; its share is that of the image before it was cropped, as far as the manifest knows it."""
    mask = np.asarray(case[key])
    who = str(case["case"]), str(case.get("subject", case["case"]))
    affine = case.get(f"{key}_affine")
    if affine is None:
        if name in ("brain", "bone"):
            raise CannotRun(f"the {name} mask of case {who[0]} has no affine, so its volume is not known")
        return Volumes(*who, name, float("nan"), float(np.count_nonzero(mask) / mask.size))
    voxel_ml = abs(float(np.linalg.det(np.asarray(affine, dtype=np.float64)[:3, :3]))) / 1000
    ml = float(np.count_nonzero(mask) * voxel_ml)
    declared = {each.id: each for each in cohort.cases}.get(who[0]) if cohort is not None else None
    whole = None if declared is None else float(np.prod(declared.shape) * np.prod(declared.spacing)) / 1000
    return Volumes(*who, name, ml, min(1.0, ml / whole) if whole else None)


def check_cases(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R14 from the manifest over the items to the prepared cases of training and validation."""
    cohort: Manifest = inspection.need("cohort")
    fold = inspection.config.get("fold")
    tallies = []
    for split, dataset in (("train", inspection.need("train")), ("validation", inspection.validation)):
        if dataset is not None and len(dataset.cases) == getattr(dataset, "n_cases", len(dataset.cases)):
            declared = tuple(str(item["case"]) for item in case_items(cohort, split, fold=fold))
            processed = tuple(str(as_dictionary(case)["case"]) for case in dataset.cases)
            tallies.append(Tally(split, declared, processed))
    left_out = {each.case: each.missing for each in cohort.left_out}
    return [*tally_findings(tallies), *left_out_findings(left_out)]


def check_files(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R14 over every file of the cohort: there, of the recorded size, and open to this process."""
    cohort: Manifest = inspection.need("cohort")
    absent: list[tuple[str, str]] = []
    unreadable: list[tuple[str, str, str]] = []
    entries = [(case.id, entry) for case in cohort.cases for entry in case.files().values()]
    for case, entry in entries:
        path = cohort.root / entry.path
        if not path.is_file():
            absent.append((case, entry.path))
        elif why := _unreadable(path, entry.size):
            unreadable.append((case, entry.path, why))
    return file_findings(absent, unreadable, len(entries))


def _unreadable(path: Path, size: int) -> str:
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as problem:
        return str(problem.strerror)
    found = path.stat().st_size
    return "" if found == size else f"{found} bytes instead of {size}"


RULES: tuple[Rule, ...] = (
    Rule(
        "R09",
        "automatic masks are plausible",
        check_masks,
        {"share_points": 0.5, "likeness": 0.9, "brain_low": 700.0, "brain_high": 2200.0},
        of_data=True,
    ),
    Rule("R14", "every case of the manifest is processed", check_cases),
    Rule("R14", "every file of the manifest is there", check_files),
)
