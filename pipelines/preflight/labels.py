"""Is there a truth to learn from, and does it reach the loss?

A class that nobody has drawn (R05), an ignore value that is not in the labels (R06), and patches without one valid
voxel (R07). Label tables (R12) and partial annotation (R17) belong to the family: ``tables``, ``annotation``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.preflight import annotation, tables
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection, as_dictionary
from pipelines.preflight.label_counts import (
    MOST_VOXELS,
    WITH_CLASSES,
    Tally,
    all_cases,
    annotated_in,
    foreground_names,
    ignored_value,
    is_balanced,
    losses_of,
    tallies_of,
    thinned,
    unlabelled_ids,
    value_shares,
)
from pipelines.preflight.rule import Rule
from pipelines.training.datasets import crop_window


def classes_without_truth(
    split: str, tallies: Sequence[Tally], names: Mapping[int, str], limits: Mapping[str, float]
) -> list[Finding]:
    """Find classes of a split without a voxel (error), with hardly any, or in too few cases (warn).

    Args:
        split: its name.
        tallies: of all its cases.
        names: foreground class id -> name.
        limits: ``share`` of the voxels in which the class was looked for; ``cases`` (or all, of a smaller split).
    """
    findings = []
    for class_id, name in names.items():
        looked = [tally for tally in tallies if tally.has(class_id)]
        voxels = sum(tally.voxels.get(class_id, 0) for tally in looked)
        total = sum(tally.total for tally in looked)
        present = sum(tally.voxels.get(class_id, 0) > 0 for tally in looked)
        wanted = min(int(limits["cases"]), len(tallies))
        what = f"class {class_id} ({name}) in split {split}"
        if voxels == 0:
            findings.append(
                _r05(
                    "error",
                    f"{what} has no voxel",
                    f"0 voxels in {len(tallies)} cases, annotated in {len(looked)}",
                    "1 or more",
                )
            )
        elif voxels < limits["share"] * total or present < wanted:
            measured = f"{voxels} voxels ({voxels / total:.4%}), in {present} of {len(looked)} cases"
            findings.append(
                _r05(
                    "warn",
                    f"{what} is hardly there",
                    measured,
                    f"{limits['share']:.2%} or more, in {wanted} or more cases",
                )
            )
    return findings


def _r05(severity: Any, what: str, measured: str, threshold: str) -> Finding:
    return Finding(
        rule="R05",
        severity=severity,
        what=what,
        measured=measured,
        threshold=threshold,
        cause="the label files do not hold this class, its value is another, or the split has taken its cases away",
        fix="correct the label table, move cases into this split, or take the class out",
        source="data",
    )


def check_training_classes(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R05 in every training case."""
    return _check_classes(inspection, "train", inspection.need("train"), limits)


def check_validation_classes(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R05 in every validation case."""
    return _check_classes(inspection, "validation", inspection.need("validation"), limits)


def _check_classes(inspection: Inspection, split: str, dataset: Any, limits: Mapping[str, float]) -> list[Finding]:
    names = foreground_names(inspection)
    return classes_without_truth(split, tallies_of(all_cases(dataset, split), list(names)), names, limits)


def ignored_wrongly(
    shares: Mapping[int, float],
    ignored: int | None,
    labelled: float,
    balanced: bool,
    limits: Mapping[str, float],
) -> list[Finding]:
    """Find a loss that learns from voxels that nobody has labelled, or from next to nothing but background.

    Args:
        shares: label value -> share of the voxels of the patches, 0 to 1.
        ignored: label value that the loss leaves out.
        labelled: share of the voxels that somebody has labelled, 0 to 1.
        balanced: the loss weighs the classes, or has a term over the classes (Dice and its kin).
        limits: ``background``, ``labelled``.
    """
    findings = []
    if labelled < limits["labelled"] and (ignored is None or not shares.get(ignored)):
        what = "no value is ignored" if ignored is None else f"the ignored value {ignored} is in no label"
        findings.append(_r06(what, f"{labelled:.1%} of the voxels labelled", limits))
    entering = {value: share for value, share in shares.items() if value != ignored}
    total = sum(entering.values())
    background = entering.get(0, 0.0) / total if total else 0.0
    if background >= limits["background"] and not balanced and not findings:
        findings.append(
            _r06(
                "the loss sees hardly anything but background, and nothing balances the classes",
                f"{background:.1%} background, no class weights and no term over the classes",
                limits,
            )
        )
    return findings


def _r06(what: str, measured: str, limits: Mapping[str, float]) -> Finding:
    return Finding(
        rule="R06",
        severity="error",
        what=f"loss: {what}",
        measured=measured,
        threshold=f"what is not labelled is ignored (below {limits['labelled']:.0%} labelled); "
        f"background below {limits['background']:.0%}, or classes balanced",
        cause="ignore_index is not the value that stands for 'not labelled' in the label files",
        fix="set ignore_index to the value of unlabelled voxels, or weigh the classes",
    )


def check_ignored(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R06 for every loss of the plan, on patches as training draws them."""
    losses = losses_of(inspection)
    unknown = unlabelled_ids(inspection)
    if not unknown and all(is_balanced(loss) for loss in losses.values()):
        return []  # everything is labelled, and every class counts: no share of the background can be too large
    shares = patch_shares(inspection.need("train"), int(limits["patches"]))
    labelled = 1.0
    if unknown:
        whole = value_shares([case["label"] for case in inspection.training_cases if "label" in case])
        labelled = 1.0 - sum(whole.get(value, 0.0) for value in unknown)
    return [
        finding
        for loss in losses.values()
        for finding in ignored_wrongly(shares, ignored_value(loss), labelled, is_balanced(loss), limits)
    ]


def patches_without_truth(
    patches: Sequence[tuple[str, float]], whole: Mapping[str, float], limits: Mapping[str, float]
) -> list[Finding]:
    """Find patches without one valid voxel: their loss is 0 / 0, or a constant.

    Args:
        patches: case and share of valid voxels of each patch.
        whole: case -> share of valid voxels.
        limits: ``case``: below, a case is listed.
    """
    empty = [case for case, share in patches if share == 0]
    if not empty:
        return []
    none = sorted(case for case, share in whole.items() if share == 0)
    few = sorted(case for case, share in whole.items() if 0 < share < limits["case"])
    worst = sorted(set(empty), key=lambda case: (whole.get(case, 0), -empty.count(case)))
    return [
        Finding(
            rule="R07",
            severity="error",
            what=f"{len(empty)} of {len(patches)} patches have no valid voxel; {len(none)} cases have none at all, "
            f"{len(few)} less than {limits['case']:.0%}",
            measured=f"{len(empty) / len(patches):.1%} of the patches",
            threshold="0",
            cause="patches are drawn without a look at the labels, or cases without labels are in the training",
            fix="draw patches around labelled voxels, and take the cases without any out of the training",
            source="data",
            cases=tuple(worst),
            evidence={"without": none, "few": few},
        )
    ]


def check_patches(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R07 on the windows that the training draws in its first epoch."""
    dataset = inspection.need("train")
    ignored = {value for value in map(ignored_value, losses_of(inspection).values()) if value is not None}
    ignored |= unlabelled_ids(inspection)
    patches, whole = [], {}
    labels = {str(case["case"]): case for case in map(as_dictionary, dataset.cases)}
    if all(_wholly_labelled(case, ignored) for case in labels.values()):
        return []
    for name, window in windows_of(dataset, int(limits["patches"])):
        case = labels[name]
        partial = not _wholly_labelled(case, ignored)
        if partial and name not in whole:
            whole[name] = float(valid_voxels(thinned(case["label"]), annotated_in(case), ignored).mean())
        patch = case["label"][(slice(None), *window)]
        patches.append((name, float(valid_voxels(patch, annotated_in(case), ignored).mean()) if partial else 1.0))
    return patches_without_truth(patches, whole, limits)


def _wholly_labelled(case: Mapping[str, Any], ignored: Collection[int]) -> bool:
    return not ignored and annotated_in(case) is None and not np.issubdtype(case["label"].dtype, np.floating)


def valid_voxels(label: np.ndarray, annotated: frozenset[int] | None, ignored: Collection[int]) -> np.ndarray:
    """Return where a label (C, *spatial) says something, (*spatial) boolean: finite, not ignored, in any channel."""
    values = np.asarray(label)
    if annotated is not None and not annotated - {0}:
        return np.zeros(values.shape[1:], bool)
    valid = np.isfinite(values) if np.issubdtype(values.dtype, np.floating) else np.ones(values.shape, bool)
    if ignored:
        valid &= ~np.isin(values, list(ignored))
    return np.asarray(valid.any(axis=0))


def windows_of(dataset: Any, count: int) -> Iterator[tuple[str, tuple[slice, ...]]]:
    """Yield case and window, inside of the case, of the first samples that a ``PatchDataset`` draws."""
    if not hasattr(dataset, "crop_size"):
        raise CannotRun("the training draws no patches")
    for index in range(count):
        draw = np.random.default_rng([dataset.seed, 1, index, 0])
        case = dataset.cases[int(draw.integers(len(dataset.cases)))]
        shape = case.array("label").shape[1:]
        window = crop_window(dataset._centre(case, draw), dataset.crop_size, shape, dataset.margin)
        # the random chain keeps the middle of the crop
        kept = zip(window, dataset.margin, shape, strict=True)
        yield str(case.values["case"]), tuple(slice(max(w.start + m, 0), min(w.stop - m, n)) for w, m, n in kept)


def patch_shares(dataset: Any, count: int) -> dict[int, float]:
    """Return label value -> share of the voxels of patches as the training draws them."""
    cases = {str(case["case"]): case["label"] for case in map(as_dictionary, dataset.cases)}
    patches = [cases[name][(slice(None), *window)] for name, window in windows_of(dataset, count)]
    return value_shares([thinned(patch, MOST_VOXELS // 20) for patch in patches])


_CLASSES = {"share": 0.0001, "cases": 3.0}
_IGNORED = {"background": 0.8, "labelled": 0.5, "patches": 100.0}

RULES: tuple[Rule, ...] = (
    Rule("R05", "classes of the training", check_training_classes, _CLASSES, tasks=WITH_CLASSES, of_data=True),
    Rule("R05", "classes of the validation", check_validation_classes, _CLASSES, tasks=WITH_CLASSES, of_data=True),
    Rule("R06", "ignored voxels", check_ignored, _IGNORED, tasks=WITH_CLASSES),
    Rule("R07", "patches without truth", check_patches, {"patches": 500.0, "case": 0.01}, tasks=WITH_CLASSES),
    *tables.RULES,
    *annotation.RULES,
)
