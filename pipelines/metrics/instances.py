"""Were the cells found one by one, and how well is each one drawn? Instances are matched class by class.

All follows from one sparse table of overlaps per image; :mod:`pipelines.metrics.instance_counts` turns what the
matching leaves behind into PQ, AJI, AP, F1 and the count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipelines.metrics.contingency import Contingency, classes_of_map, contingency
from pipelines.metrics.instance_counts import InstanceCounts, instance_figures
from pipelines.metrics.matching import aggregated_overlap, best_assignment, unique_partner_iou
from transforms.errors import DataError, UsageError

Classes = Mapping[int, int] | ArrayLike


def instance_metrics(
    prediction: ArrayLike,
    reference: ArrayLike,
    labels: Mapping[int, str] | None = None,
    predicted_classes: Classes | None = None,
    reference_classes: Classes | None = None,
    scores: Mapping[int, float] | None = None,
    match_iou: float = 0.5,
    thresholds: Sequence[float] = (0.5, 0.75),
    mask: ArrayLike | None = None,
    case: str = "",
) -> list[dict[str, Any]]:
    """Return one row per class with the figures of :func:`instance_figures`, as :func:`summarise` takes them.

    The arguments are those of :func:`count_instances` and :func:`instance_figures`, and so are the errors.
    """
    counts = count_instances(
        prediction, reference, labels, predicted_classes, reference_classes, scores, match_iou, mask, case
    )
    return [{"label": name, **instance_figures(of_class, thresholds)} for name, of_class in counts.items()]


def count_instances(
    prediction: ArrayLike,
    reference: ArrayLike,
    labels: Mapping[int, str] | None = None,
    predicted_classes: Classes | None = None,
    reference_classes: Classes | None = None,
    scores: Mapping[int, float] | None = None,
    match_iou: float = 0.5,
    mask: ArrayLike | None = None,
    case: str = "",
) -> dict[str, InstanceCounts]:
    """Match the instances of one image, class by class: instances of different classes never match.

    Args:
        prediction: instance ids (X, Y) or (X, Y, Z), whole numbers in any order and with gaps, 0 is background.
        reference: the same for the truth; equal ids mean nothing.
        labels: class to name; 0 is background and skipped. None: one class, named "instance".
        predicted_classes: class of each instance, as a mapping of id to class, or as a class map of the same shape
            in which every instance has one class. May be left out when there is one class.
        reference_classes: likewise. Entries of ids that are not in the image are ignored.
        scores: confidence of each predicted instance, for AP by ranking.
        match_iou: IoU that a pair has to exceed to count in PQ. From 0.5 on such a pair is unique (Kirillov et al.
            2019, section 4.1); below, the assignment with the largest sum of IoU, hence the largest PQ, is taken.
        mask: bool or 0/1, same shape; where it is 0 nothing counts. An instance that lies outside does not exist.
        case: named in errors.

    Returns:
        The counts of each class, in the order of ``labels``; the classes that are in neither map too.

    Raises:
        DataError: maps as in :func:`contingency`; an instance without a class or score, a class that ``labels`` does
            not have, a score that is not finite.
        UsageError: no class in ``labels``; several but no classes of the instances; ``match_iou`` not in [0, 1).
    """
    names = {label: name for label, name in (labels or {1: "instance"}).items() if label != 0}
    unclassified = len(names) > 1 and (predicted_classes is None or reference_classes is None)
    if not names or unclassified or not 0 <= match_iou < 1:
        raise UsageError(
            f"instances: labels {labels}, match_iou {match_iou}",
            "one class besides background, or the class of every instance; match_iou at least 0 and below 1",
            "correct the argument",
        )
    table = contingency(prediction, reference, mask, case)
    of_predicted = _classes(table.predicted_ids, predicted_classes, prediction, names, "predicted", case)
    of_reference = _classes(table.reference_ids, reference_classes, reference, names, "reference", case)
    ranks = None if scores is None else _scores(table.predicted_ids, scores, case)
    return {
        name: _count(
            table.select(of_predicted == label, of_reference == label),
            match_iou,
            None if ranks is None else ranks[of_predicted == label],
        )
        for label, name in names.items()
    }


def _count(table: Contingency, match_iou: float, scores: NDArray[np.float64] | None) -> InstanceCounts:
    unique_iou = unique_partner_iou(table)
    if match_iou >= 0.5:
        matched_iou = np.where(unique_iou > match_iou, unique_iou, 0)
    else:
        matched_iou = np.zeros(unique_iou.size)
        chosen = best_assignment(table, match_iou)
        matched_iou[table.predicted_index[chosen]] = table.iou[chosen]
    aji, aji_plus = aggregated_overlap(table)
    return InstanceCounts(table.reference_ids.size, unique_iou, matched_iou, aji, aji_plus, scores)


def _classes(
    ids: NDArray[np.integer[Any]],
    classes: Classes | None,
    instances: ArrayLike,
    names: Mapping[int, str],
    which: str,
    case: str,
) -> NDArray[np.int64]:
    """Return the class of each instance, (N,), every one of them in ``names``."""
    if classes is None:
        return np.full(ids.size, next(iter(names)))
    of_id = classes if isinstance(classes, Mapping) else classes_of_map(instances, classes, case)
    for i in ids:
        if of_id.get(int(i)) not in names:
            raise DataError(
                f"case {case or 'unnamed'}: {which} instance {i} has the class {of_id.get(int(i))}",
                f"one of {sorted(names)} is expected",
                "add the class to the labels, or take the instance out of the map",
            )
    return np.array([of_id[int(i)] for i in ids], np.int64)


def _scores(ids: NDArray[np.integer[Any]], scores: Mapping[int, float], case: str) -> NDArray[np.float64]:
    for i in ids:
        score = scores.get(int(i))
        if score is None or not math.isfinite(score):
            raise DataError(
                f"case {case or 'unnamed'}: predicted instance {i} has the score {score}",
                "a finite number is expected for every predicted instance",
                "give all scores, or none",
            )
    return np.array([scores[int(i)] for i in ids], np.float64)
