"""What the page says about differences between runs: every run against the first one, case by case."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pipelines.metrics.comparison import compare_runs
from pipelines.reports.ranking import better
from pipelines.reports.report_data import RunData
from transforms.errors import DataError

_COLUMNS = {
    "label": "label",
    "metric": "metric",
    "n": "n",
    "subjects": "n_subjects",
    "mean A": "mean_a",
    "mean B": "mean_b",
    "B - A": "difference",
    "95 % from": "ci95_low",
    "95 % to": "ci95_high",
    "p": "p",
    "p (Holm)": "p_holm",
    "only in A": "n_only_a",
    "only in B": "n_only_b",
}


def paired_panel(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return the paired statistics of every run against the first as a panel (``panels.panel_of``).

    Only metrics that say how good a result is are tested, so that Holm's correction does not count volumes. Runs that
    cannot be compared case by case are named in the text, with the reason.
    """
    first, *others = runs
    tables, reasons = [], []
    for other in others:
        metrics = [metric for metric in first.metrics if metric in other.metrics and better(metric) is not None]
        try:
            rows = compare_runs(first.rows, other.rows, metrics)
        except DataError as problem:
            reasons.append(f"{other.name} cannot be compared with {first.name} case by case: {problem.what}.")
            continue
        cells = [[row[key] for key in _COLUMNS.values()] for row in rows]
        tables.append({"title": f"A: {first.name}, B: {other.name}", "columns": list(_COLUMNS), "rows": cells})
    text = (
        "B - A is the mean difference case by case, with its 95 % interval (BCa bootstrap over subjects); p is of "
        "Wilcoxon's signed-rank test over subjects, corrected by Holm within each table. Cases with a value in one run "
        "only are counted in the last columns and in no mean."
    )
    return {"title": "Paired differences", "text": " ".join([*([text] if tables else []), *reasons]), "tables": tables}
