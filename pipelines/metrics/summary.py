"""From one row per case and label to a table that can be defended.

Subjects, not cases, are drawn at random from a population: two scans of one person are not two observations. The
interval is therefore a BCa bootstrap over subjects (Efron 1987), each drawn with all its cases. What has no value is
counted beside the mean, and a NaN is refused, never averaged away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.statistics import bca_interval, draw_subjects, resampled_means
from transforms.errors import DataError

IDENTITY = ("case", "subject", "label", "status")
"""The columns that say what a row is about; every other column is a metric: a number or None."""

COUNTED = {"n_missed": "missed", "n_empty": "empty", "n_false_alarm": "false_alarm"}


def status_of(n_predicted: int, n_reference: int) -> str:
    """Return the status of a row with so many predicted and reference voxels, or instances."""
    if n_reference:
        return "both" if n_predicted else "missed"
    return "false_alarm" if n_predicted else "empty"


def summarise(rows: Sequence[Mapping[str, Any]], n_resamples: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Summarise every metric for every label, with a bootstrap 95 % interval of the mean over subjects.

    Args:
        rows: one per case and label, all with the same keys: ``case``, ``subject``, ``label``, ``status`` where the
            task has one ("both", "missed", "false_alarm", "empty"), and metrics: a finite number, or None (no value).
        n_resamples: bootstrap resamples.
        seed: of the bootstrap; the order of the rows does not matter.

    Returns:
        ``n_cases``, ``n_subjects``, ``bootstrap``, ``labels[label][metric]`` and ``mean_over_labels[metric]``. An entry
        has ``n`` (values), ``n_missed``, ``n_empty``, ``n_false_alarm`` (rows with that status), ``mean``, ``median``,
        ``ci95_low``, ``ci95_high``. Without a value the last four are None; so is the interval of fewer than two
        subjects. ``mean_over_labels`` sums the counts, and averages mean and median over the labels that have a value;
        its interval draws the same subjects for every label, and leaves a label out of a resample that has none of it.

    Raises:
        DataError: no rows, different keys, no name of a case, subject or label, a case and label twice, a metric that
            is NaN, infinite or no number.
    """
    metrics = metric_names(rows)
    subjects = sorted({str(row["subject"]) for row in rows})
    draws = draw_subjects(len(subjects), n_resamples, seed)
    by_label: dict[str, dict[str, dict[str, Any]]] = {}
    over_labels: dict[str, dict[str, Any]] = {}
    names = sorted({str(row["label"]) for row in rows})
    of_label = {name: [row for row in rows if str(row["label"]) == name] for name in names}
    for metric in metrics:
        resampled = []
        for name in names:
            entry, means = _summarise_metric(of_label[name], metric, subjects, draws)
            by_label.setdefault(name, {})[metric] = entry
            resampled.append(means)
        with_value = {str(row["subject"]) for row in rows if row[metric] is not None}
        entries = [by_label[name][metric] for name in names]
        over_labels[metric] = _average_labels(entries, resampled, len(with_value), len(subjects))
    return {
        "n_cases": len({str(row["case"]) for row in rows}),
        "n_subjects": len(subjects),
        "bootstrap": {"unit": "subject", "method": "BCa", "n_resamples": n_resamples, "seed": seed},
        "labels": by_label,
        "mean_over_labels": over_labels,
    }


def metric_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the metric columns after checking every row (raises DataError as :func:`summarise`)."""
    if not rows:
        raise DataError("metrics: there are no rows", "0 cases, at least 1 expected", "evaluate at least one case")
    metrics = [key for key in rows[0] if key not in IDENTITY]
    seen: set[tuple[str, str]] = set()
    for row in rows:
        _check_keys(row, rows[0])
        identity = (str(row["case"]), str(row["label"]))
        if identity in seen:
            raise DataError(
                f"case {identity[0]}, label {identity[1]}: two rows", "one row expected", "evaluate each case once"
            )
        seen.add(identity)
        for metric in metrics:
            _check_value(row, metric)
    return metrics


def _check_keys(row: Mapping[str, Any], first: Mapping[str, Any]) -> None:
    odd = sorted(set(row) ^ set(first)) or sorted({"case", "subject", "label"} - set(row))
    if odd:
        raise DataError(
            f"case {row.get('case')}, label {row.get('label')}: key {odd[0]} is not in every row",
            f"keys {list(row)}, expected {list(first)} with case, subject and label",
            "write None where a metric has no value",
        )
    unnamed = [key for key in ("case", "subject", "label") if row[key] in (None, "")]
    if unnamed:
        raise DataError(
            f"case {row['case']}, label {row['label']}: {unnamed[0]} is {row[unnamed[0]]!r}",
            "a name is expected; subjects are the unit of the bootstrap",
            "take it from the data manifest",
        )


def _check_value(row: Mapping[str, Any], metric: str) -> None:
    value = row[metric]
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if value is None or (is_number and math.isfinite(float(value))):
        return
    raise DataError(
        f"case {row['case']}, label {row['label']}: {metric} is {value!r}",
        "a finite number is expected, or None where there is no value",
        "look at this case's image, reference and prediction",
    )


def _summarise_metric(
    rows: Sequence[Mapping[str, Any]], metric: str, subjects: Sequence[str], draws: NDArray[np.float64]
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Return the entry of one label and metric, and its mean: of all, without each subject, in every resample.

    A mean is NaN where no value was drawn.
    """
    values: dict[str, list[float]] = {subject: [] for subject in subjects}
    for row in rows:
        if row[metric] is not None:
            values[str(row["subject"])].append(float(row[metric]))
    of_subject = list(values.values())
    pooled = [value for of_one in of_subject for value in of_one]
    n_with_value = sum(bool(of_one) for of_one in of_subject)
    entry: dict[str, Any] = {"n": len(pooled)}
    entry |= {count: sum(row.get("status") == status for row in rows) for count, status in COUNTED.items()}
    if not pooled:
        return entry | _statistics(None, None), np.full(1 + len(subjects) + len(draws), np.nan)
    mean, means = resampled_means(of_subject, draws)
    return entry | _statistics(mean, statistics.median(pooled), means, n_with_value, len(subjects)), means


def _average_labels(
    entries: Sequence[Mapping[str, Any]], resampled: Sequence[NDArray[np.float64]], n_with_value: int, n_subjects: int
) -> dict[str, Any]:
    counts = {key: sum(entry[key] for entry in entries) for key in ("n", *COUNTED)}
    scored = [entry for entry in entries if entry["n"]]
    if not scored:
        return counts | _statistics(None, None)
    means = np.stack(resampled)
    present = np.isfinite(means)
    n_present = present.sum(axis=0)
    averaged = np.where(n_present > 0, np.where(present, means, 0).sum(axis=0) / np.maximum(n_present, 1), np.nan)
    return counts | _statistics(
        statistics.mean(entry["mean"] for entry in scored),
        statistics.mean(entry["median"] for entry in scored),
        averaged,
        n_with_value,
        n_subjects,
    )


def _statistics(
    mean: float | None,
    median: float | None,
    means: NDArray[np.float64] | None = None,
    n_with_value: int = 0,
    n_subjects: int = 0,
) -> dict[str, float | None]:
    """Return the figures; the interval needs two subjects with a value. ``means``: of all, without each, resampled."""
    low = high = None
    if means is not None and n_with_value >= 2:
        low, high = bca_interval(float(means[0]), means[1 : 1 + n_subjects], means[1 + n_subjects :])
    return {"mean": mean, "median": median, "ci95_low": low, "ci95_high": high}
