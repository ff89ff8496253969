"""From counts of instances to figures: PQ, AJI, AP, F1 and the count error, of an image or of a cohort.

The counts are additive: of a class in an image, they can be pooled over classes, over images, or both, before any ratio
is taken. A class that is in neither map has no figures and is counted ("empty"); a missed or invented one scores 0 and
stays in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.matching import average_precision
from pipelines.metrics.summary import status_of
from transforms.errors import DataError, UsageError

COCO_THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""0.50, 0.55 to 0.95: the thresholds that mAP[.5:.95] averages (Lin et al. 2014)."""


@dataclass(frozen=True)
class InstanceCounts:
    """What can be added up over classes and images, of P predicted and R reference instances.

    Attributes:
        n_reference: R.
        unique_iou: (P,) IoU of each predicted instance with its only possible partner above 0.5; 0 without one.
        matched_iou: (P,) the same for the matching that PQ uses, at the threshold that was asked for.
        aji: voxels in the intersections and unions of AJI; ``aji_plus``: of AJI+.
        scores: (P,) confidence of each predicted instance, or None when there are none.
    """

    n_reference: int
    unique_iou: NDArray[np.float64]
    matched_iou: NDArray[np.float64]
    aji: tuple[int, int]
    aji_plus: tuple[int, int]
    scores: NDArray[np.float64] | None = None


def pool_counts(counts: Iterable[InstanceCounts]) -> InstanceCounts:
    """Return the counts of several images, or of several classes, as if they were one.

    Raises:
        DataError: some have scores and some do not.
        UsageError: there are none.
    """
    parts = list(counts)
    if not parts:
        raise UsageError("instances: nothing to pool", "0 counts, at least 1 expected", "count one image at least")
    with_scores = [part.scores for part in parts if part.scores is not None]
    if with_scores and len(with_scores) != len(parts):
        raise DataError(
            "instances: counts with scores and without cannot be pooled",
            f"{len(with_scores)} of {len(parts)} have scores",
            "give scores for every image or for none",
        )
    return InstanceCounts(
        sum(part.n_reference for part in parts),
        np.concatenate([part.unique_iou for part in parts]),
        np.concatenate([part.matched_iou for part in parts]),
        (sum(part.aji[0] for part in parts), sum(part.aji[1] for part in parts)),
        (sum(part.aji_plus[0] for part in parts), sum(part.aji_plus[1] for part in parts)),
        np.concatenate(with_scores) if with_scores else None,
    )


def pool_cases(
    cases: Sequence[Mapping[str, InstanceCounts]], thresholds: Sequence[float] = (0.5, 0.75)
) -> dict[str, Any]:
    """Return the figures of a whole cohort, taken from sums over its images instead of averaged image by image.

    Returns:
        ``labels[name]``: figures of one class over all images, with ``n_images_empty``, the images that have the class
        in neither map; ``pooled``: of all classes together; ``mean_over_labels``: the mean of each ratio over the
        classes that occur; ``n_absent``: classes that occur nowhere, which that mean leaves out.

    Raises:
        UsageError: no images, or images with different classes.
        DataError: as :func:`pool_counts`.
    """
    names = list(cases[0]) if cases else []
    if not names or any(set(case) != set(names) for case in cases):
        raise UsageError(
            "instances: images cannot be pooled",
            f"{len(cases)} images, at least one and the same classes in each are expected",
            "count all images with the same labels",
        )
    by_name = {name: pool_counts(case[name] for case in cases) for name in names}
    figures = {name: instance_figures(counts, thresholds) for name, counts in by_name.items()}
    for name, of_class in figures.items():
        of_class["n_images_empty"] = sum(
            case[name].n_reference == 0 and case[name].unique_iou.size == 0 for case in cases
        )
    present = [of_class for of_class in figures.values() if of_class["status"] != "empty"]
    ratios = [key for key, value in (present[0] if present else {}).items() if isinstance(value, float)]
    return {
        "labels": figures,
        "pooled": instance_figures(pool_counts(by_name.values()), thresholds),
        "mean_over_labels": {key: math.fsum(of_class[key] for of_class in present) / len(present) for key in ratios},
        "n_absent": len(figures) - len(present),
    }


def instance_figures(counts: InstanceCounts, thresholds: Sequence[float] = (0.5, 0.75)) -> dict[str, Any]:
    """Turn counts into figures.

    With TP pairs above the matching threshold, FP = n_predicted - TP and FN = n_reference - TP:

    - ``pq`` = sum of the IoU of the pairs / (TP + FP / 2 + FN / 2), ``sq`` = mean IoU of the pairs, ``rq`` =
      TP / (TP + FP / 2 + FN / 2), so that pq = sq * rq (Kirillov et al. 2019, equations 1 and 2). ``sq`` is 0 without a
      pair, so that missing everything never raises a mean.
    - ``precision`` = TP / n_predicted and ``sensitivity`` = TP / n_reference, 0 when only one map has instances.
    - ``aji`` (Kumar et al. 2017, algorithm 1) and ``aji_plus`` (Graham et al. 2019, section III.C): see
      :func:`aggregated_overlap`.
    - ``f1_50``: F1 of the pairs with an IoU above 0.50, for every one of ``thresholds``.
    - ``ap_count_50``, ``map_count_50_95``: TP / (TP + FP + FN), the "average precision" of the 2018 Data Science Bowl,
      StarDist and Cellpose, which needs no scores; and its mean over :data:`COCO_THRESHOLDS`.
    - ``ap_50``, ``map_50_95``, with scores only: AP by ranking, as COCO has it; see :func:`average_precision`. Per
      image it ranks within the image; pool the counts of a cohort first to get the AP that detection papers report.
      A pair counts when its IoU is above a threshold, so that matches are unique. COCO, StarDist and Cellpose also take
      a pair at exactly the threshold; that is the only difference, and small cells do have an IoU of exactly 1/2.
    - ``count_error`` = n_predicted - n_reference and ``absolute_count_error``.

    Returns:
        ``status`` ("both", "missed", "false_alarm", "empty"), ``n_reference``, ``n_predicted``, ``tp`` and the above.
        When both maps are empty, all but the counts and count errors (0) are None.

    Raises:
        UsageError: a threshold outside [0.5, 1).
    """
    if not thresholds or not all(0.5 <= threshold < 1 for threshold in thresholds):
        raise UsageError(
            f"instances: thresholds {tuple(thresholds)}",
            "IoU from 0.5 to below 1: above 0.5 a match is unique",
            "correct the thresholds; match_iou is the threshold of PQ",
        )
    n_predicted, n_reference = counts.unique_iou.size, counts.n_reference
    figures: dict[str, Any] = {
        "status": status_of(n_predicted, n_reference),
        "n_reference": n_reference,
        "n_predicted": n_predicted,
        "tp": int(np.count_nonzero(counts.matched_iou)),
        "count_error": n_predicted - n_reference,
        "absolute_count_error": abs(n_predicted - n_reference),
    }
    total = n_predicted + n_reference
    tp, iou = figures["tp"], math.fsum(counts.matched_iou)
    ratios = {
        "pq": (2 * iou, total),
        "sq": (iou, tp),
        "rq": (2 * tp, total),
        "precision": (tp, n_predicted),
        "sensitivity": (tp, n_reference),
        "aji": counts.aji,
        "aji_plus": counts.aji_plus,
    }
    hits = {threshold: int((counts.unique_iou > threshold).sum()) for threshold in {*thresholds, *COCO_THRESHOLDS}}
    for threshold in thresholds:
        ratios[f"f1_{_percent(threshold)}"] = (2 * hits[threshold], total)
        ratios[f"ap_count_{_percent(threshold)}"] = (hits[threshold], total - hits[threshold])
    figures |= {key: _ratio(*parts, total) for key, parts in ratios.items()}
    figures["map_count_50_95"] = _mean([_ratio(hits[t], total - hits[t], total) for t in COCO_THRESHOLDS])
    if counts.scores is not None:
        ranked = {t: average_precision(counts.scores, counts.unique_iou > t, n_reference) for t in hits}
        figures |= {f"ap_{_percent(threshold)}": ranked[threshold] for threshold in thresholds}
        figures["map_50_95"] = _mean([ranked[t] for t in COCO_THRESHOLDS])
    return figures


def _percent(threshold: float) -> str:
    return f"{100 * threshold:g}"


def _ratio(numerator: float, denominator: float, total: int) -> float | None:
    """Return a quotient; None when there are no instances at all, 0 when only this quotient has nothing to count."""
    if not total:
        return None
    return numerator / denominator if denominator else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None
