"""Segmentation metrics per case and label, in mm and mL, with a declared policy for empty masks.

Each label of a case has a status: "both" (reference and prediction have it), "missed" (only the reference),
"false_alarm" (only the prediction), "empty" (neither). Missed and false alarm get the worst value, Dice 0, NSD 0 and
the image diagonal as HD95: leaving them out would reward a network for finding less. Empty has no value (None) and is
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice
from numpy.typing import NDArray

from pipelines.metrics.lesions import check_same_grid, lesion_detection
from transforms.errors import DataError, UsageError


def segmentation_metrics(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    nsd_tolerance_mm: float = 1.0,
    case: str = "",
) -> list[dict[str, Any]]:
    """Compare a predicted label map with a reference, label by label.

    Dice is 2 |P and R| / (|P| + |R|). HD95 is the larger of the two directed 95th percentiles of the distances between
    edge voxels. NSD (Nikolov et al. 2018, arXiv:1809.04430) is the share of both surfaces, by area, that lies within
    the tolerance of the other one. HD95 and NSD are MONAI's; NSD with ``use_subvoxels=True``, the published definition.

    Args:
        prediction: label map (X, Y) or (X, Y, Z) of whole numbers, any dtype.
        reference: label map of the same shape.
        spacing_mm: voxel size along each axis, in mm.
        labels: value to name; 0 is background and not compared, a value that is not named is not compared either.
        nsd_tolerance_mm: distance up to which a piece of surface counts as right, in mm.
        case: the case's name, for error messages.

    Returns:
        One row per foreground label, in the order of ``labels``: ``label``, ``status``, ``dice``, ``hd95_mm``, ``nsd``,
        ``volume_reference_ml``, ``volume_prediction_ml``, ``volume_error_ml`` (prediction - reference; volumes are None
        in 2D, where there is only an area), and what :func:`pipelines.metrics.lesions.lesion_detection` returns, each
        key with ``lesion_`` before it.

    Raises:
        DataError: different shapes, not 2D or 3D, a spacing that is not positive, a value that is not a whole number.
        UsageError: no foreground label, a negative tolerance.
    """
    check_same_grid(prediction, reference, spacing_mm, case)
    foreground = {value: name for value, name in labels.items() if value != 0}
    if not foreground or not (np.isfinite(nsd_tolerance_mm) and nsd_tolerance_mm >= 0):
        raise UsageError(
            f"segmentation metrics: labels {dict(labels)}, tolerance {nsd_tolerance_mm} mm",
            "expected at least one label other than 0 and a tolerance of 0 mm or more",
            "correct the label table or the tolerance",
        )
    diagonal_mm = float(np.linalg.norm(np.multiply(np.shape(reference), spacing_mm)))
    predicted_map, reference_map = crop_to_joint_box(
        _as_label_map(prediction, "prediction", case), _as_label_map(reference, "reference", case)
    )
    rows = []
    for value, name in foreground.items():
        masks = crop_to_joint_box(predicted_map == value, reference_map == value)
        rows.append({"label": name, **_compare_masks(*masks, tuple(spacing_mm), nsd_tolerance_mm, diagonal_mm)})
    return rows


def crop_to_joint_box(first: NDArray[Any], second: NDArray[Any], margin: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return views of both arrays on the box of their nonzero voxels plus ``margin``; no metric changes by it.

    Two empty arrays shrink to a single voxel.
    """
    occupied = (first != 0) | (second != 0)
    box = []
    for axis in range(occupied.ndim):
        others = tuple(a for a in range(occupied.ndim) if a != axis)
        hits = np.flatnonzero(occupied.any(axis=others))
        box.append(slice(max(hits[0] - margin, 0), hits[-1] + 1 + margin) if hits.size else slice(0, 1))
    return first[tuple(box)], second[tuple(box)]


def _as_label_map(array: NDArray[Any], name: str, case: str) -> NDArray[Any]:
    array = np.asarray(array)
    if array.dtype.kind in "iub":
        return array
    if array.dtype.kind != "f" or not np.array_equal(array, np.trunc(array)):
        raise DataError(
            f"case {case or 'unnamed'}: the {name} is not a label map",
            f"dtype {array.dtype} with values that are not whole numbers",
            "take the argmax of a network's output; resample labels by nearest neighbour",
        )
    return array


def _compare_masks(
    prediction: NDArray[np.bool_],
    reference: NDArray[np.bool_],
    spacing_mm: tuple[float, ...],
    tolerance_mm: float,
    diagonal_mm: float,
) -> dict[str, Any]:
    n_prediction, n_reference = int(np.count_nonzero(prediction)), int(np.count_nonzero(reference))
    status = _status(n_prediction, n_reference)
    dice: float | None = None
    hd95_mm: float | None = None
    nsd: float | None = None
    if status in ("missed", "false_alarm"):
        dice, hd95_mm, nsd = 0.0, diagonal_mm, 0.0
    elif status == "both":
        dice = 2 * int(np.count_nonzero(prediction & reference)) / (n_prediction + n_reference)
        hd95_mm, nsd = _surface_metrics(prediction, reference, spacing_mm, tolerance_mm)
    return {
        "status": status,
        "dice": dice,
        "hd95_mm": hd95_mm,
        "nsd": nsd,
        "volume_reference_ml": _volume_ml(n_reference, spacing_mm),
        "volume_prediction_ml": _volume_ml(n_prediction, spacing_mm),
        "volume_error_ml": _volume_ml(n_prediction - n_reference, spacing_mm),
        **{f"lesion_{key}": value for key, value in lesion_detection(prediction, reference, spacing_mm).items()},
    }


def _status(n_prediction: int, n_reference: int) -> str:
    if n_reference:
        return "both" if n_prediction else "missed"
    return "false_alarm" if n_prediction else "empty"


def _surface_metrics(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing_mm: tuple[float, ...], tolerance_mm: float
) -> tuple[float, float]:
    """Return HD95 in mm and NSD of two masks that both have voxels."""
    y_pred, y = (torch.from_numpy(mask.copy())[None, None] for mask in (prediction, reference))
    hd95_mm = compute_hausdorff_distance(y_pred, y, include_background=True, percentile=95, spacing=spacing_mm)
    nsd = compute_surface_dice(
        y_pred, y, [tolerance_mm], include_background=True, spacing=spacing_mm, use_subvoxels=True
    )
    return hd95_mm.item(), nsd.item()


def _volume_ml(n_voxels: int, spacing_mm: tuple[float, ...]) -> float | None:
    return float(n_voxels * np.prod(spacing_mm) / 1000) if len(spacing_mm) == 3 else None
