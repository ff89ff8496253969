"""Which predicted instance is which reference instance: unique pairs, the best assignment, AJI's pairs, ranked hits."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from pipelines.metrics.contingency import Contingency


def unique_partner_iou(table: Contingency) -> NDArray[np.float64]:
    """Return, for each predicted instance, the IoU with the one reference instance above 0.5; 0 without, (P,).

    Instances of a map do not overlap, so two of them cannot both share more than half of their union with a third
    (Kirillov et al. 2019, section 4.1): no assignment problem has to be solved.
    """
    iou = table.iou
    best = np.zeros(table.predicted_ids.size)
    above = iou > 0.5
    best[table.predicted_index[above]] = iou[above]
    return best


def best_assignment(table: Contingency, minimum_iou: float) -> NDArray[np.int64]:
    """Return the pairs, as positions in the table, of the one-to-one assignment with the largest sum of IoU.

    Only pairs with an IoU above ``minimum_iou`` may be assigned; an instance may stay alone. Solved exactly on the
    sparse graph (Jonker and Volgenant 1987). Of several equally good assignments, which one is taken is not defined.
    """
    iou = table.iou
    pairs = np.flatnonzero(iou > minimum_iou)
    rows, row_of_pair = np.unique(table.reference_index[pairs], return_inverse=True)
    n, n_columns = rows.size, table.predicted_ids.size
    if not n:
        return pairs
    # The solver wants every row matched and no weight 0: each row gets a partner of its own that stands for "alone".
    graph = coo_array(
        (
            np.concatenate([2 - iou[pairs], np.full(n, 2.0)]),
            (
                np.concatenate([row_of_pair, np.arange(n)]),
                np.concatenate([table.predicted_index[pairs], n_columns + np.arange(n)]),
            ),
        ),
        shape=(n, n_columns + n),
    ).tocsr()
    matched_row, matched_column = min_weight_full_bipartite_matching(graph)
    partner = np.full(n, -1)
    partner[matched_row] = matched_column
    return pairs[partner[row_of_pair] == table.predicted_index[pairs]]


def aggregated_overlap(table: Contingency) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the voxels of intersection and of union that AJI and AJI+ divide.

    AJI (Kumar et al. 2017, algorithm 1): each reference instance takes the predicted one with the largest IoU, whether
    or not another has taken it; equal IoU: the larger overlap, then the smaller id. The union also has the reference
    instances without any overlap and the predicted ones that nobody took. AJI+ (Graham et al. 2019): the same with the
    one-to-one assignment of the largest sum of IoU, so that no predicted instance is counted twice.
    """
    order = np.lexsort((-table.intersection, -table.iou, table.reference_index))
    _, first = np.unique(table.reference_index[order], return_index=True)
    return _overlap(table, order[first]), _overlap(table, best_assignment(table, 0.0))


def _overlap(table: Contingency, chosen: NDArray[Any]) -> tuple[int, int]:
    """Return summed intersection and union of the chosen pairs, all other instances added to the union."""
    alone = np.ones(table.predicted_ids.size, bool), np.ones(table.reference_ids.size, bool)
    alone[0][table.predicted_index[chosen]] = False
    alone[1][table.reference_index[chosen]] = False
    rest = table.predicted_sizes[alone[0]].sum() + table.reference_sizes[alone[1]].sum()
    return int(table.intersection[chosen].sum()), int(table.union[chosen].sum() + rest)


def average_precision(scores: NDArray[np.float64], hits: NDArray[np.bool_], n_reference: int) -> float | None:
    """Return the AP of ranked predictions: mean precision at the recalls 0, 0.01 to 1 (Lin et al. 2014).

    Precision at a recall is the largest one at that recall or a higher one, 0 where that recall is never reached.
    Predictions with equal scores enter together: no order of ids decides. Without any score there is no ranking:
    :func:`instance_figures` then has ``ap_count`` only.

    Args:
        scores: (P,) confidences; any monotonic scale.
        hits: (P,) whether each prediction matches a reference instance.
        n_reference: reference instances.

    Returns:
        0 to 1; 0 when there are predictions but nothing to find, None when there is neither.
    """
    if not n_reference:
        return 0.0 if scores.size else None
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True)[: scores.size])
    found = np.cumsum(hits[order])[last_of_tie]
    precision = found / (last_of_tie + 1)
    envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    # Whole numbers: found / n_reference >= k / 100 without rounding.
    return float(envelope[np.searchsorted(100 * found, np.arange(101) * n_reference)].mean())
