"""The rules that watch a run: while it trains, when it validates, and at its end.

Every rule is a pure function of a history (losses, validations, rates, times) that returns findings, so it serves every
task. ``pipelines.training.watchdogs`` collects the histories of a run and asks; ``WATCHED`` has the limits.
"""

from pipelines.preflight.watch.ending import best_weights, missing_artefacts, silent_curves
from pipelines.preflight.watch.histories import ClassVoxels, Validated, settled_epoch
from pipelines.preflight.watch.instances import instance_consistency
from pipelines.preflight.watch.learning import (
    data_wait,
    early_stopping,
    followed_schedule,
    non_finite_steps,
    not_learning,
    overfitting,
    starved_classes,
    took_steps,
)
from pipelines.preflight.watch.table import LIMITS, WATCHED
from pipelines.preflight.watch.validation import (
    Saturation,
    changed_samples,
    collapse,
    frozen_metric,
    implausible_fusion,
    not_above_trivial,
    one_sided_errors,
    same_sample,
    saturated_output,
    saturation_of,
    worse_than_plain,
)

__all__ = [
    "LIMITS",
    "WATCHED",
    "ClassVoxels",
    "Saturation",
    "Validated",
    "best_weights",
    "changed_samples",
    "collapse",
    "data_wait",
    "early_stopping",
    "followed_schedule",
    "frozen_metric",
    "implausible_fusion",
    "instance_consistency",
    "missing_artefacts",
    "non_finite_steps",
    "not_above_trivial",
    "not_learning",
    "one_sided_errors",
    "overfitting",
    "same_sample",
    "saturated_output",
    "saturation_of",
    "settled_epoch",
    "silent_curves",
    "starved_classes",
    "took_steps",
    "worse_than_plain",
]
