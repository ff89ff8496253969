"""Two runs side by side, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.reports.tables import aligned, format_interval, format_value

_HEADER = ("label", "metric", "n", "subjects", "A", "B", "B - A", "95 % interval", "p", "p (Holm)")


def format_comparison(rows: Sequence[Mapping[str, Any]], name_a: str = "A", name_b: str = "B") -> str:
    """Return what :func:`compare_runs` returns as aligned plain text; a dash stands for no value."""
    text = aligned(_HEADER, [_cells(row) for row in rows])
    text.append(
        f"A: {name_a}; B: {name_b}. Interval: paired bootstrap of subjects (BCa); p: Wilcoxon signed-rank test."
    )
    one_sided = [row for row in rows if row["n_only_a"] or row["n_only_b"]]
    text += [
        f"{row['label']}, {row['metric']}: no pair in {row['n_only_a']} cases with a value in A only, "
        f"{row['n_only_b']} in B only."
        for row in one_sided
    ]
    return "\n".join(text)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        row["label"],
        row["metric"],
        str(row["n"]),
        str(row["n_subjects"]),
        format_value(row["mean_a"]),
        format_value(row["mean_b"]),
        format_value(row["difference"], "+.3f"),
        format_interval(row, "+.3f"),
        format_value(row["p"], ".3g"),
        format_value(row["p_holm"], ".3g"),
    )
