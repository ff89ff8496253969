"""Do the figures of instances agree with one another, and are the instances single cells? Rules on instance tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.preflight.finding import Finding

Limits = Mapping[str, float]


def instance_consistency(rows: Sequence[Mapping[str, Any]], limits: Limits) -> list[Finding]:
    """R44: recognition quality and F1 contradict each other, or the number of instances is wrong.

    Args:
        rows: of ``pipelines.metrics.instance_metrics``, or figures of a whole validation, each with ``label``, ``rq``,
            ``f1_50``, ``n_predicted`` and ``n_reference``; a class that is in neither map has no figures.
    """
    findings = []
    for row in rows:
        name, predicted, truth = row["label"], row["n_predicted"], row["n_reference"]
        if row["rq"] is not None and abs(row["rq"] - row["f1_50"]) > limits["rq_f1"]:
            findings.append(
                Finding(
                    "R44", "warn", f"{name}: two figures of the same matches disagree",
                    f"RQ {row['rq']:.3f}, F1 at IoU 0.5 {row['f1_50']:.3f}", f"within {limits['rq_f1']:g}",
                    "the two are counted with different matchings or thresholds",
                    "match once, with match_iou 0.5, and take both from it",
                )
            )  # fmt: skip
        if truth and not limits["fewest"] <= predicted / truth <= limits["most"]:
            few = predicted < truth
            findings.append(
                Finding(
                    "R44", "warn", f"{name}: {'too few' if few else 'too many'} instances",
                    f"{predicted} predicted, {truth} true ({predicted / truth:.2f})",
                    f"{limits['fewest']:g} to {limits['most']:g} times as many",
                    "neighbours that are not separated" if few else "instances that are split, or noise",
                    "correct markers and smallest size of the post-processing on validation images",
                )
            )  # fmt: skip
    return findings
