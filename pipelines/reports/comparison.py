"""Two runs side by side, as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HEADER = ("label", "metric", "n", "subjects", "A", "B", "B - A", "95 % interval", "p", "p (Holm)")


def format_comparison(rows: Sequence[Mapping[str, Any]], name_a: str = "A", name_b: str = "B") -> str:
    """Return what :func:`compare_runs` returns as aligned plain text; a dash stands for no value."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    text = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    text.insert(1, "-" * len(text[0]))
    text.append(
        f"A: {name_a}; B: {name_b}. Interval: paired bootstrap of subjects (BCa); p: Wilcoxon signed-rank test."
    )
    one_sided = [row for row in rows if row["n_only_a"] or row["n_only_b"]]
    text += [
        f"{row['label']}, {row['metric']}: no pair in {row['n_only_a']} cases with a value in A only, "
        f"{row['n_only_b']} in B only."
        for row in one_sided
    ]
    return "\n".join(line.rstrip() for line in text)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    def number(value: float | None, style: str = ".3f") -> str:
        return "-" if value is None else f"{value:{style}}"

    interval = "-" if row["ci95_low"] is None else f"{row['ci95_low']:+.3f} to {row['ci95_high']:+.3f}"
    means = (number(row["mean_a"]), number(row["mean_b"]), number(row["difference"], "+.3f"))
    return (
        row["label"],
        row["metric"],
        str(row["n"]),
        str(row["n_subjects"]),
        *means,
        interval,
        number(row["p"], ".3g"),
        number(row["p_holm"], ".3g"),
    )
