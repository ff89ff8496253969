"""Segmentation metrics per case and label, in mm and mL, with a declared policy for empty masks.

Each label of a case has a status: "both" (reference and prediction have it), "missed" (only the reference),
"false_alarm" (only the prediction), "empty" (neither). Missed and false alarm get the worst value, Dice 0, NSD 0 and
the image diagonal as HD95: leaving them out would reward a network for finding less. Empty has no value (None) and is
counted. Another policy has to be asked for by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.distances import LabelPair, label_pairs, within
from pipelines.metrics.inputs import as_maps, check_choice, check_labels, check_lengths, kept_voxels
from pipelines.metrics.lesions import detection_scores
from pipelines.metrics.summary import status_of
from pipelines.metrics.surface import surface_distances
from pipelines.metrics.threads import run, thread_count

DEFINITIONS = ("voxel", "surface")
EMPTY_POLICIES = ("worst", "exclude", "perfect")
GROUPS = ("distance", "nsd", "boundary", "lesion")
OVERLAP = ("dice", "iou", "precision", "recall", "volume_similarity")
DISTANCE = ("hd_mm", "hd95_mm", "asd_mm", "assd_mm")


@dataclass(frozen=True)
class _Options:
    spacing_mm: tuple[float, ...]
    tolerances_mm: tuple[float, ...]
    boundary_mm: float
    definition: str
    empty_policy: str
    groups: frozenset[str]
    diagonal_mm: float
    threads_of_label: int


def segmentation_metrics(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    nsd_tolerance_mm: float | Sequence[float] = 1.0,
    case: str = "",
    *,
    definition: str = "voxel",
    empty_policy: str = "worst",
    evaluation_mask: NDArray[Any] | None = None,
    ignore_label: int | None = None,
    multilabel: bool = False,
    groups: Collection[str] = GROUPS,
    boundary_width_mm: float | None = None,
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Compare a prediction with a reference, label by label.

    Which number is which, by ``definition``; compute_* are functions of MONAI 1.6.1, whose values these equal to 1e-6:

    ===========  ===============================================  ==================================================
    key          "voxel" (the default: comparable with MONAI)     "surface" (closest to the truth)
    ===========  ===============================================  ==================================================
    hd_mm        compute_hausdorff_distance                       largest distance, of at least a voxel's face of area
    hd95_mm      the same with percentile=95                      within it lies 95 % of the area
    asd_mm       compute_average_surface_distance                 mean over the area, prediction to reference
    assd_mm      the same with symmetric=True                     mean over the area of both surfaces
    nsd          compute_surface_dice, use_subvoxels=True         share of the area of both within the tolerance
    ===========  ===============================================  ==================================================

    In "voxel", distances are those between edge voxels, the ones with a face neighbour outside the mask; of the two
    directions ``hd_mm`` and ``hd95_mm`` take the larger, linearly interpolated percentile, ``assd_mm`` pools them.
    ``nsd`` is the published surface Dice (Nikolov et al. 2018, arXiv:1809.04430): cells of 2 x 2 x 2 voxels weighted
    by their area. "surface" measures between smooth surfaces, see :mod:`pipelines.metrics.surface`; the larger of the
    two directions again. The default is "voxel" because published figures are mostly of that kind, and figures can be
    compared only within one definition.

    Args:
        prediction: label map (X, Y) or (X, Y, Z) of whole numbers, any dtype; with ``multilabel`` one mask of 0 and 1
            per channel, (K, X, Y) or (K, X, Y, Z), which may overlap.
        reference: the same kind, of the same shape.
        spacing_mm: voxel size along each spatial axis, in mm.
        labels: value to name; 0 is background and not compared, a value that is not named is not compared either. With
            ``multilabel`` channel to name, 0 being a channel like any other.
        nsd_tolerance_mm: distance up to which a piece of surface counts as right, in mm; of several the first is
            ``nsd``.
        case: the case's name, for error messages.
        definition: "voxel" or "surface".
        empty_policy: "worst": missed and false alarm get the worst value, empty has none; "perfect": as "worst", and
            empty gets the best value, as in the BraTS challenges; "exclude": a value only where both masks have voxels,
            as MONAI's NaN. ``status`` says which it was in every case; ``lesion_`` keys keep their own policy.
        evaluation_mask: where nonzero, (X, Y) or (X, Y, Z), voxels count; elsewhere both maps are taken as background,
            as MONAI does. An object cut by the mask has a surface there.
        ignore_label: value of the reference that is unknown: as if outside of the evaluation mask.
        multilabel: prediction and reference are stacks of masks.
        groups: what to compute beside overlap and volume: "distance", "nsd", "boundary", "lesion".
        boundary_width_mm: of the bands that boundary IoU compares; None: the (first) tolerance of the NSD.
        threads: that work at once, 1 or more; None: ``NUMBA_NUM_THREADS``, or every core.

    Returns:
        One row per foreground label, in the order of ``labels``: ``label``, ``status``, ``dice`` = 2 |P and R| / (|P| +
        |R|), ``iou``, ``precision``, ``recall``, ``volume_similarity`` = 1 - ||P| - |R|| / (|P| + |R|) (Taha and
        Hanbury 2015); ``hd_mm``, ``hd95_mm``, ``asd_mm``, ``assd_mm``; ``nsd`` and, for each further tolerance t,
        ``nsd_{t}mm``; ``boundary_iou`` (Cheng et al. 2021, arXiv:2103.16562: IoU of the parts of the masks within the
        width of their boundaries, at least their edge voxels); ``volume_reference_ml``, ``volume_prediction_ml``,
        ``volume_error_ml`` (prediction - reference; None in 2D, where there is only an area), and what
        :func:`pipelines.metrics.lesions.lesion_detection` returns, each key with ``lesion_`` before it.

    Raises:
        DataError: different shapes, not 2D or 3D, a spacing that is not positive, a value that is not a whole number, a
            mask that is not 0 and 1, an evaluation mask of another shape.
        UsageError: no foreground label, a negative tolerance or width, an unknown definition, policy or group, a
            channel that is not there, ``ignore_label`` among the labels or with ``multilabel``, no thread.
    """
    tolerances = tuple(np.atleast_1d(np.asarray(nsd_tolerance_mm, float)).tolist())
    check_lengths("tolerance", tolerances)
    width_mm = tolerances[0] if boundary_width_mm is None else float(boundary_width_mm)
    check_lengths("boundary width", [width_mm])
    check_choice("definition", definition, DEFINITIONS)
    check_choice("empty_policy", empty_policy, EMPTY_POLICIES)
    for group in groups:
        check_choice("group", group, GROUPS)
    foreground = check_labels(labels, ignore_label, multilabel)
    maps, values = as_maps(prediction, reference, spacing_mm, foreground, multilabel, case)
    keep = kept_voxels(evaluation_mask, ignore_label, maps[1][0], case)
    threads = thread_count(threads)
    spacing = tuple(float(s) for s in spacing_mm)
    pairs = label_pairs(*maps, values, keep, spacing, threads)
    options = _Options(
        spacing,
        tolerances,
        width_mm,
        definition,
        empty_policy,
        frozenset(groups),
        float(np.linalg.norm(np.multiply(maps[0][0].shape, spacing))),
        max(threads // len(pairs), 1),
    )
    rows = run(lambda pair: _compare(pair, options), pairs, threads)
    return [{"label": name, **row} for name, row in zip(foreground.values(), rows, strict=True)]


def _compare(pair: LabelPair, options: _Options) -> dict[str, Any]:
    n_prediction, n_reference = pair.n_prediction, pair.n_reference
    status = status_of(n_prediction, n_reference)
    row: dict[str, Any] = {"status": status}
    row |= _scores(pair, options) if status == "both" else _without_overlap(status, options)
    row["volume_reference_ml"] = _volume_ml(n_reference, options.spacing_mm)
    row["volume_prediction_ml"] = _volume_ml(n_prediction, options.spacing_mm)
    row["volume_error_ml"] = _volume_ml(n_prediction - n_reference, options.spacing_mm)
    if "lesion" in options.groups:
        lesions = detection_scores(*pair.components(), options.spacing_mm)
        row |= {f"lesion_{key}": value for key, value in lesions.items()}
    return row


def _without_overlap(status: str, options: _Options) -> Mapping[str, float | None]:
    """Return the value of every metric where a mask is empty."""
    good: dict[str, float] = dict.fromkeys(OVERLAP, 1.0)
    bad: dict[str, float] = dict.fromkeys(OVERLAP, 0.0)
    if "distance" in options.groups:
        good |= dict.fromkeys(DISTANCE, 0.0)
        bad |= dict.fromkeys(DISTANCE, options.diagonal_mm)
    others = _nsd_keys(options) if "nsd" in options.groups else ()
    others += ("boundary_iou",) if "boundary" in options.groups else ()
    good, bad = good | dict.fromkeys(others, 1.0), bad | dict.fromkeys(others, 0.0)
    if options.empty_policy == "exclude" or (status == "empty" and options.empty_policy == "worst"):
        return dict.fromkeys(bad)
    return good if status == "empty" else bad


def _scores(pair: LabelPair, options: _Options) -> dict[str, float]:
    """Return every metric of two masks that both have voxels."""
    both, n_prediction, n_reference = pair.n_both, pair.n_prediction, pair.n_reference
    total = n_prediction + n_reference
    overlaps = (2 * both / total, both / (total - both), both / n_prediction, both / n_reference)
    row = dict(zip(OVERLAP, (*overlaps, 1 - abs(n_prediction - n_reference) / total), strict=True))
    distance, nsd = "distance" in options.groups, "nsd" in options.groups
    if options.definition == "surface" and (distance or nsd):
        elements = surface_distances(*pair.masks(), options.spacing_mm, options.threads_of_label)
        row |= _area_distances(elements, options.spacing_mm) if distance else {}
        row |= _surface_dice(elements, options) if nsd else {}
    else:
        if distance:
            row |= _voxel_distances(pair.edge_distances())
        if nsd:
            cells = pair.cell_distances(options.spacing_mm, max(options.tolerances_mm))
            row |= _surface_dice(cells, options)
    if "boundary" in options.groups:
        common, either = pair.boundary_overlap(options.boundary_mm)
        row["boundary_iou"] = common / either
    return row


def _voxel_distances(distances: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    values = (
        max(np.float32(d.max()) for d in distances),
        max(_percentile_of_torch(d, 95) for d in distances),
        distances[0].mean(),
        sum(d.sum() for d in distances) / sum(d.size for d in distances),
    )
    return dict(zip(DISTANCE, map(float, values), strict=True))


def _percentile_of_torch(distances: NDArray[np.float64], percent: float) -> float:
    """Return the percentile as ``torch.quantile`` has it: rank, neighbours and interpolation in single precision."""
    values = distances.astype(np.float32)
    rank = np.float32(percent / 100) * np.float32(values.size - 1)
    below, above = int(np.floor(rank)), min(int(np.ceil(rank)), values.size - 1)
    values.partition((below, above))
    weight, low, high = rank - np.float32(below), values[below], values[above]
    return float(low + weight * (high - low) if weight < 0.5 else high - (high - low) * (np.float32(1) - weight))


def _area_distances(elements: Sequence[NDArray[np.float64]], spacing_mm: Sequence[float]) -> dict[str, float]:
    areas, distances = elements[0::2], elements[1::2]
    integrals = [float(a @ d) for a, d in zip(areas, distances, strict=True)]
    # One voxel decides over as much surface as its largest face: less than that is noise, and a maximum collects it.
    face = float(np.prod(sorted(spacing_mm)[1:]))
    within = [_within(a, d, (a.sum() - face, 0.95 * a.sum())) for a, d in zip(areas, distances, strict=True)]
    hd95 = max(of_95 for _, of_95 in within)
    values = (
        max(hd95, *(largest for largest, _ in within)),
        hd95,
        integrals[0] / areas[0].sum(),
        sum(integrals) / sum(a.sum() for a in areas),
    )
    return dict(zip(DISTANCE, map(float, values), strict=True))


def _within(areas: NDArray[np.float64], distances: NDArray[np.float64], parts: Sequence[float]) -> NDArray[np.float64]:
    """Return, for each part of the area, the smallest distance within which that much of it lies."""
    order = np.argsort(distances)
    return distances[order[np.searchsorted(np.cumsum(areas[order]), parts)]]


def _surface_dice(elements: Sequence[NDArray[np.float64]], options: _Options) -> dict[str, float]:
    areas, distances = elements[0::2], elements[1::2]
    total = sum(a.sum() for a in areas)
    values = [
        float(sum(a[within(d, t)].sum() for a, d in zip(areas, distances, strict=True)) / total)
        for t in options.tolerances_mm
    ]
    return dict(zip(_nsd_keys(options), values, strict=True))


def _nsd_keys(options: _Options) -> tuple[str, ...]:
    return ("nsd", *(f"nsd_{t:g}mm" for t in options.tolerances_mm[1:]))


def _volume_ml(n_voxels: int, spacing_mm: tuple[float, ...]) -> float | None:
    return float(n_voxels * np.prod(spacing_mm) / 1000) if len(spacing_mm) == 3 else None
