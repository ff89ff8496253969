"""Which method is best over many figures at once? Mean ranks over figures and subjects, and paired differences.

Figures have different units and ranges, so they are not averaged: within one figure and one subject the methods are
ranked, and the ranks are. Ranks depend on the company: with another method added, the rest may change places.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from pipelines.metrics.comparison import compare_runs
from pipelines.metrics.statistics import bca_interval, draw_subjects, resampled_means
from transforms.errors import DataError, UsageError

Values = Mapping[str, Mapping[str, Mapping[str, float | None]]]
"""values[figure][method][subject]; None where a figure of a subject has no value for any method."""

MEAN_RANK = "mean_rank"
"""In the rows of :func:`compare_methods`: the rank over all figures, of which the lower is the better one."""

_Ranks = Mapping[str, Mapping[str, Mapping[str, float]]]


def mean_ranks(
    values: Values, higher_is_better: Mapping[str, bool], n_resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Rank the methods within every figure and subject, 1 the best, and average: each figure of a subject counts once.

    Args:
        values: ``values[figure][method][subject]``, finite numbers; every figure with the same methods and subjects.
            None, for all methods of a subject, leaves this figure of this subject out.
        higher_is_better: for every figure, whether a higher value is the better one.
        n_resamples: bootstrap resamples; each draws subjects with all their figures, the same for every method.
        seed: of the bootstrap.

    Returns:
        One row per method, the best first (ties: by name): ``method``, ``mean_rank``, ``ci95_low``, ``ci95_high`` (BCa,
        None below two subjects), ``n`` (ranks), ``n_subjects`` (with a rank) and ``by_figure``, the mean rank in each
        figure (None where it has no value). Equal values share the mean of their ranks.

    Raises:
        DataError: fewer than two methods, figures of different methods or subjects, a value that is no finite number,
            one that only some methods have, or no value at all.
        UsageError: a figure without a direction, or with the name ``mean_rank``.
    """
    ranks, subjects = _ranks(values, higher_is_better)
    draws = draw_subjects(len(subjects), n_resamples, seed)
    rows = []
    for method in next(iter(values.values())):
        own = [[of[method][subject] for of in ranks.values() if subject in of[method]] for subject in subjects]
        mean, means = resampled_means(own, draws)
        n_subjects = sum(map(bool, own))
        row: dict[str, Any] = {"method": method, "mean_rank": mean, "ci95_low": None, "ci95_high": None}
        row |= {"n": sum(map(len, own)), "n_subjects": n_subjects}
        if n_subjects > 1:
            first = 1 + len(subjects)
            row["ci95_low"], row["ci95_high"] = bca_interval(float(means[0]), means[1:first], means[first:])
        row["by_figure"] = {
            figure: statistics.mean(of[method].values()) if of[method] else None for figure, of in ranks.items()
        }
        rows.append(row)
    return sorted(rows, key=lambda row: (row["mean_rank"], row["method"]))


def compare_methods(
    values: Values, higher_is_better: Mapping[str, bool], chosen: str, n_resamples: int = 2000, seed: int = 0
) -> list[dict[str, Any]]:
    """Compare one method with every other one on the same subjects: in mean rank, and in each figure.

    Args:
        values, higher_is_better, n_resamples, seed: as for :func:`mean_ranks`.
        chosen: the method to compare with the others.

    Returns:
        One row per figure, ``mean_rank`` before all, and other method: ``figure``, ``other``, ``n`` (values),
        ``n_subjects``, ``mean_chosen``, ``mean_other``, ``difference`` (mean of chosen - other), ``ci95_low``,
        ``ci95_high``, ``p`` and ``p_holm``, as of :func:`compare_runs`; Holm's correction is over all rows. For
        ``mean_rank``, and for figures of which a lower value is the better one, a difference below 0 is in favour of
        the chosen method.

    Raises:
        DataError: as :func:`mean_ranks`.
        UsageError: as :func:`mean_ranks`, or the chosen method does not exist.
    """
    ranks, _ = _ranks(values, higher_is_better)
    methods = list(next(iter(values.values())))
    if chosen not in methods:
        raise UsageError(
            f"ranks: method {chosen!r}", f"the methods are {', '.join(methods)}", "compare one of these with the others"
        )
    pairs = [(figure, other) for figure in (MEAN_RANK, *values) for other in methods if other != chosen]
    labels = {f"{index:06d}": pair for index, pair in enumerate(pairs)}
    of_other, of_chosen = (
        [
            {**row, "label": label}
            for label, (figure, other) in labels.items()
            for row in _rows(figure, method or other, values, ranks)
        ]
        for method in (None, chosen)
    )
    compared = compare_runs(of_other, of_chosen, ["value"], n_resamples, seed)
    kept = ("difference", "ci95_low", "ci95_high", "p", "p_holm")
    return [
        {
            "figure": labels[row["label"]][0],
            "other": labels[row["label"]][1],
            "n": row["n"],
            "n_subjects": row["n_subjects"],
            "mean_chosen": row["mean_b"],
            "mean_other": row["mean_a"],
            **{key: row[key] for key in kept},
        }
        for row in compared
    ]


def _rows(figure: str, method: str, values: Values, ranks: _Ranks) -> list[dict[str, Any]]:
    """Return one row per value of a method: of a figure, or its ranks in all figures."""
    if figure == MEAN_RANK:
        cells = [(name, subject, rank) for name, of in ranks.items() for subject, rank in of[method].items()]
        return [{"case": f"{subject}/{name}", "subject": subject, "value": rank} for name, subject, rank in cells]
    own = values[figure][method]
    return [{"case": subject, "subject": subject, "value": value} for subject, value in own.items()]


def _ranks(values: Values, higher_is_better: Mapping[str, bool]) -> tuple[_Ranks, list[str]]:
    """Return ranks[figure][method][subject], without the subjects that have no value, and all subjects."""
    methods, subjects = _check(values, higher_is_better)
    ranks: dict[str, dict[str, dict[str, float]]] = {}
    for figure, of_method in values.items():
        ranks[figure] = {method: {} for method in methods}
        for subject in subjects:
            own = _numbers(figure, subject, {method: of_method[method][subject] for method in methods})
            if own:
                places = stats.rankdata(-np.array(own) if higher_is_better[figure] else own)
                for method, place in zip(methods, places, strict=True):
                    ranks[figure][method][subject] = float(place)
    if not any(of[methods[0]] for of in ranks.values()):
        raise DataError("ranks: no figure has a value", f"figures {', '.join(values)}", "evaluate at least one subject")
    return ranks, subjects


def _numbers(figure: str, subject: str, of_method: Mapping[str, float | None]) -> Sequence[float]:
    """Return the values of the methods, or nothing where none has one."""
    numbers = [float(value) for value in of_method.values() if value is not None]
    if len(numbers) in (0, len(of_method)) and all(map(math.isfinite, numbers)):
        return numbers
    odd = [method for method, value in of_method.items() if value is None or not math.isfinite(value)]
    raise DataError(
        f"ranks: subject {subject}: {figure} of {', '.join(odd)} cannot be ranked",
        f"found {', '.join(repr(of_method[method]) for method in odd)}; a finite number is expected, or None for all",
        "give a method that failed the worst value by the policy of the figure, or leave the subject out",
    )


def _check(values: Values, higher_is_better: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """Return the methods, in the given order, and the subjects, sorted."""
    undirected = sorted(values.keys() - higher_is_better.keys())
    if undirected or MEAN_RANK in values:
        raise UsageError(
            f"ranks: figure {(undirected or [MEAN_RANK])[0]}",
            "no word on whether a higher value is the better one" if undirected else "the name is taken",
            "add it to higher_is_better" if undirected else "name the figure otherwise",
        )
    methods = list(next(iter(values.values()), {}))
    if len(methods) < 2:
        raise DataError("ranks: nothing to rank", f"{len(methods)} methods, 2 expected", "evaluate another method")
    subjects = set(next(iter(values.values()))[methods[0]])
    for figure, of_method in values.items():
        for method in dict.fromkeys([*methods, *of_method]):
            if method not in methods or subjects != set(of_method.get(method, ())):
                raise DataError(
                    f"ranks: {figure} of {method}",
                    f"{len(of_method.get(method, ()))} subjects, expected the {len(subjects)} of {methods[0]}",
                    "evaluate every method on the same subjects and figures",
                )
    return methods, sorted(subjects)
