"""Is run B better than run A on the same cases, or is the difference what another draw of subjects would give?

Every case is its own control: the difference is taken case by case and summarised over subjects. Runs over different
cases, labels, subjects or metrics are refused by name, since a table of their means would compare nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelines.metrics.statistics import bca_interval, draw_subjects, holm, resampled_means, signed_rank_p
from pipelines.metrics.summary import metric_names
from transforms.errors import DataError

Row = Mapping[str, Any]
_Identity = tuple[str, str]


def compare_runs(
    rows_a: Sequence[Row],
    rows_b: Sequence[Row],
    metrics: Sequence[str] | None = None,
    n_resamples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Compare two runs over the same cases, for every label and metric.

    Args:
        rows_a: of run A, one per case and label, as :func:`summarise` takes them.
        rows_b: of run B; the order does not matter.
        metrics: the metrics to compare; None: all, which then must be the same in both runs.
        n_resamples: paired bootstrap resamples; each draws subjects with all their cases, the same in every row.
        seed: of the bootstrap.

    Returns:
        One row per label (in alphabetical order) and metric: ``label``, ``metric``, ``n`` (cases with a value in both
        runs), ``n_subjects`` (theirs), ``n_only_a``, ``n_only_b``, ``n_neither`` (cases with a value in one run only,
        or in none: they are in no figure, so look at them when they are many), ``mean_a``, ``mean_b`` (over the n
        cases), ``difference`` (mean of B - A), ``ci95_low``, ``ci95_high`` (of the difference, BCa, None below two
        subjects), ``p`` (Wilcoxon's signed-rank test of the mean difference of each subject, two-sided), ``p_holm``
        (corrected for all rows that have a p, Holm 1979). Without a pair the figures are None; p is None below two
        subjects.

    Raises:
        DataError: rows as :func:`summarise` refuses them; cases, labels, subjects or metrics that differ.
    """
    names = _compared_metrics(metric_names(rows_a), metric_names(rows_b), metrics)
    of_a, of_b = _by_identity(rows_a), _by_identity(rows_b)
    _check_same_cases(of_a, of_b)
    subjects = sorted({str(row["subject"]) for row in rows_a})
    draws = draw_subjects(len(subjects), n_resamples, seed)
    compared = []
    for label in sorted({label for _, label in of_a}):
        pairs = [(of_a[key], of_b[key]) for key in sorted(of_a) if key[1] == label]
        compared += [{"label": label, "metric": name, **_compare(pairs, name, subjects, draws)} for name in names]
    tested = [row for row in compared if row["p"] is not None]
    for row, adjusted in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = adjusted
    return compared


def _compared_metrics(of_a: list[str], of_b: list[str], chosen: Sequence[str] | None) -> list[str]:
    if chosen is None and set(of_a) == set(of_b):
        return of_a
    odd = sorted((set(of_a) ^ set(of_b)) if chosen is None else set(chosen) - (set(of_a) & set(of_b)))
    if odd or not chosen:
        raise DataError(
            f"comparison: {', '.join(odd) or 'no metric'} cannot be compared",
            f"run A has {', '.join(of_a)}; run B has {', '.join(of_b)}",
            "name metrics that both runs have, or evaluate both in the same way",
        )
    return list(chosen)


def _by_identity(rows: Sequence[Row]) -> dict[_Identity, Row]:
    return {(str(row["case"]), str(row["label"])): row for row in rows}


def _check_same_cases(of_a: Mapping[_Identity, Row], of_b: Mapping[_Identity, Row]) -> None:
    for name, found in (("A", sorted(of_a.keys() - of_b.keys())), ("B", sorted(of_b.keys() - of_a.keys()))):
        if found:
            listed = "; ".join(f"case {case}, label {label}" for case, label in found[:5])
            raise DataError(
                f"comparison: only run {name} has {listed}" + (f" and {len(found) - 5} more" if found[5:] else ""),
                f"{len(of_a)} rows in run A, {len(of_b)} in run B; both need the same cases and labels",
                "evaluate both runs on the same cases",
            )
    for key, row in sorted(of_a.items()):
        if str(row["subject"]) != str(of_b[key]["subject"]):
            raise DataError(
                f"comparison: case {key[0]}: subject {row['subject']} in run A, {of_b[key]['subject']} in run B",
                "subjects are the unit of the comparison",
                "evaluate both runs with the same data manifest",
            )


def _compare(
    pairs: Sequence[tuple[Row, Row]], metric: str, subjects: Sequence[str], draws: np.ndarray[Any, Any]
) -> dict[str, Any]:
    present = [(a[metric] is not None, b[metric] is not None) for a, b in pairs]
    both = [pair for pair, has in zip(pairs, present, strict=True) if all(has)]
    differences: dict[str, list[float]] = {}
    for a, b in both:
        differences.setdefault(str(a["subject"]), []).append(float(b[metric]) - float(a[metric]))
    row: dict[str, Any] = {
        "n": len(both),
        "n_subjects": len(differences),
        "n_only_a": present.count((True, False)),
        "n_only_b": present.count((False, True)),
        "n_neither": present.count((False, False)),
    }
    row |= dict.fromkeys(("mean_a", "mean_b", "difference", "ci95_low", "ci95_high", "p", "p_holm"))
    if not both:
        return row
    row["mean_a"] = statistics.mean(float(a[metric]) for a, _ in both)
    row["mean_b"] = statistics.mean(float(b[metric]) for _, b in both)
    row["difference"], means = resampled_means([differences.get(subject, []) for subject in subjects], draws)
    if len(differences) < 2:
        return row
    first_resample = 1 + len(subjects)
    row["ci95_low"], row["ci95_high"] = bca_interval(float(means[0]), means[1:first_resample], means[first_resample:])
    row["p"] = signed_rank_p(np.array([statistics.mean(differences[subject]) for subject in sorted(differences)]))
    return row
