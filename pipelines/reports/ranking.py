"""Which cases a reader should look at first: the worst ones, by the first metric that says how good a result is."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Better = Literal["higher", "lower", "near zero"]

_WORDS: dict[Better, re.Pattern[str]] = {  # the first that knows a word decides
    "near zero": re.compile(r"error|difference|bias"),
    "lower": re.compile(r"hd\d*|hausdorff|assd|asd|mae|mse|nrmse|rmse|brier|ece|distance|missed"),
    "higher": re.compile(
        r"dice|iou|jaccard|nsd|f1|sensitivity|precision|recall|specificity|accuracy|auc|pq|sq|rq|aji|ap|map|"
        r"similarity|ssim|msssim|psnr|fsim|mi|nmi"
    ),
}


def better(metric: str) -> Better | None:
    """Return which values of a metric are good ones, by the words of its name; None where it only describes a case."""
    words = re.split(r"[_\W]+", metric.lower())
    if any(word == "n" or word in ("tp", "fp", "fn") for word in words):
        return None
    return next((way for way, known in _WORDS.items() if any(known.fullmatch(word) for word in words)), None)


@dataclass(frozen=True)
class Ranked:
    """A case and how bad it is.

    Attributes:
        case: its id.
        value: mean of the ranking metric over the labels that have a value; None where none has.
        why: the labels' values as text, ``lesion missed`` or ``liver 0.912``.
    """

    case: str
    value: float | None
    why: str


def ranking_metric(metrics: Iterable[str]) -> str | None:
    """Return the metric to rank by: the first of which high values are good, else the first that is judged at all."""
    judged = {metric: better(metric) for metric in metrics}
    for wanted in ("higher", "lower", "near zero"):
        for metric, direction in judged.items():
            if direction == wanted:
                return metric
    return None


def rank_cases(rows: Sequence[Mapping[str, Any]], metric: str | None, then: str | None = None) -> list[Ranked]:
    """Return the cases, the worst first; those without any value (empty in truth and prediction) last.

    Args:
        rows: per case and label, as ``summarise`` takes them.
        metric: of ``ranking_metric``; None keeps the order of the rows.
        then: decides between cases with equal values; after it, their names do.
    """
    by_case: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_case.setdefault(str(row["case"]), []).append(row)
    ranked = [Ranked(case, _mean(own, metric), _why(own, metric)) for case, own in by_case.items()]
    if metric is None:
        return ranked
    return sorted(
        ranked, key=lambda r: (_badness(r.value, metric), _badness(_mean(by_case[r.case], then), then), r.case)
    )


def second_metric(metrics: Sequence[str], first: str | None) -> str | None:
    """Return the metric that decides between equal values of ``first``: the next that is judged."""
    return next((metric for metric in metrics if metric != first and better(metric) is not None), None)


def _mean(rows: Sequence[Mapping[str, Any]], metric: str | None) -> float | None:
    values = [float(row[metric]) for row in rows if metric is not None and row.get(metric) is not None]
    return statistics.mean(values) if values else None


def _badness(value: float | None, metric: str | None) -> float:
    """Return a number that is the smaller the worse a value is."""
    if value is None or metric is None:
        return math.inf
    direction = better(metric)
    return value if direction == "higher" else -value if direction == "lower" else -abs(value)


def _why(rows: Sequence[Mapping[str, Any]], metric: str | None) -> str:
    words = []
    for row in rows:
        status, value = row.get("status"), row.get(metric) if metric else None
        if status in ("missed", "false_alarm", "empty"):
            words.append(f"{row['label']} {str(status).replace('_', ' ')}")
        elif value is not None:
            words.append(f"{row['label']} {float(value):.3f}")
    return ", ".join(words)
