"""Lesion-wise detection: was each lesion found, whatever its size?

A lesion is a connected component. Voxel-wise Dice hides a missed small lesion behind a well-drawn large one; here each
component counts once. The matching rule: a component of one mask is a true positive when at least ``minimum_overlap``
of its voxels, and at least one, lie in the other mask. It is applied to either mask in turn, so a prediction that
merges two lesions still detects both, and a large component that only grazes a lesion is a false positive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.distances import Components, covered_components
from pipelines.metrics.inputs import as_mask, check_same_grid
from transforms.errors import UsageError


def lesion_detection(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing_mm: Sequence[float],
    connectivity: int | None = None,
    minimum_overlap: float = 0.1,
) -> dict[str, float | int | None]:
    """Count the connected components of two masks that find each other.

    Args:
        prediction: mask (X, Y) or (X, Y, Z), bool or 0/1.
        reference: mask of the same shape.
        spacing_mm: voxel size along each axis, in mm.
        connectivity: the largest number of axes along which two neighbouring voxels may differ; 1 joins faces (6
            neighbours in 3D), None joins faces, edges and corners (26 in 3D, 8 in 2D).
        minimum_overlap: share of a component's voxels, 0 to 1, that the other mask has to cover; one voxel at least.

    Returns:
        ``n_reference``, ``n_predicted``: components; ``tp_reference``, ``tp_predicted``: those that are covered;
        ``sensitivity`` = tp_reference / n_reference, None without a reference lesion;
        ``precision`` = tp_predicted / n_predicted, None without a predicted component;
        ``f1`` = 2 precision sensitivity / (precision + sensitivity), 0 when only one mask is empty or nothing matches,
        None when both are empty;
        ``largest_missed_ml``: volume of the largest lesion that was not detected, 0 when all were, None without a
        reference lesion and in 2D.

    Raises:
        DataError: different shapes, not 2D or 3D, a spacing that is not positive, a mask that is not binary.
        UsageError: ``connectivity`` or ``minimum_overlap`` out of range.
    """
    check_same_grid(prediction, reference, spacing_mm)
    ndim = np.ndim(reference)
    if not 0 <= minimum_overlap <= 1 or not (connectivity is None or 1 <= connectivity <= ndim):
        raise UsageError(
            f"lesion detection: connectivity {connectivity}, minimum_overlap {minimum_overlap}",
            f"connectivity is 1 to {ndim} in {ndim}D (or None for all), minimum_overlap is 0 to 1",
            "correct the argument",
        )
    predicted_mask, reference_mask = as_mask(prediction, "prediction", ""), as_mask(reference, "reference", "")
    return detection_scores(
        covered_components(reference_mask, predicted_mask, connectivity),
        covered_components(predicted_mask, reference_mask, connectivity),
        spacing_mm,
        minimum_overlap,
    )


def detection_scores(
    reference: Components, predicted: Components, spacing_mm: Sequence[float], minimum_overlap: float = 0.1
) -> dict[str, float | int | None]:
    """Return what :func:`lesion_detection` returns, from the components of the two masks."""
    found, confirmed = _detected(reference, minimum_overlap), _detected(predicted, minimum_overlap)
    sensitivity = float(found.mean()) if found.size else None
    precision = float(confirmed.mean()) if confirmed.size else None
    largest_missed_ml = None
    if len(spacing_mm) == 3 and found.size:
        largest_missed_ml = float(reference.sizes[~found].max(initial=0) * np.prod(spacing_mm) / 1000)
    return {
        "n_reference": int(found.size),
        "n_predicted": int(confirmed.size),
        "tp_reference": int(found.sum()),
        "tp_predicted": int(confirmed.sum()),
        "sensitivity": sensitivity,
        "precision": precision,
        "f1": _f1(sensitivity, precision),
        "largest_missed_ml": largest_missed_ml,
    }


def _detected(components: Components, minimum_overlap: float) -> NDArray[np.bool_]:
    # A quotient is rounded correctly: 7 of 100 equals 0.07. The product 0.07 * 100 is 7.000000000000001.
    return (components.covered > 0) & (components.covered / components.sizes >= minimum_overlap)


def _f1(sensitivity: float | None, precision: float | None) -> float | None:
    if sensitivity is None and precision is None:
        return None
    if not sensitivity or not precision:
        return 0.0
    return 2 * precision * sensitivity / (precision + sensitivity)
