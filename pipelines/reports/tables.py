"""Results as tables: one row per case and label for a spreadsheet, the summary as JSON and as text for the terminal."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.files import write_atomically, write_json
from pipelines.metrics.summary import IDENTITY, metric_names
from transforms.errors import DataError

MEAN_OVER_LABELS = "(mean over labels)"


def write_per_case_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write the rows as CSV: floats with all their digits, None as an empty cell. Appears whole or not at all.

    Raises:
        DataError: as :func:`summarise`.
        ResourceError: the file cannot be written.
    """
    metric_names(rows)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(Path(path), buffer.getvalue().encode())


def read_per_case_csv(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows that :func:`write_per_case_csv` wrote: numbers as numbers, an empty cell as None.

    Raises:
        DataError: no such file, a row with more or fewer cells than the head, or a metric that is no number.
    """
    if not Path(path).is_file():
        raise DataError(f"file {path}", "there is no such file", "evaluate first")
    with Path(path).open(newline="") as file:
        head, *lines = [line for line in csv.reader(file) if line] or [[]]
    for number, line in enumerate(lines, start=1):
        if len(line) != len(head):
            raise DataError(
                f"file {path}: row {number} has {len(line)} cells", f"the head has {len(head)}", "evaluate again"
            )
    return [{key: _value(key, cell, path) for key, cell in zip(head, line, strict=True)} for line in lines]


def _value(column: str, cell: str, path: str | Path) -> Any:
    if column in IDENTITY:
        return cell
    if cell == "":
        return None
    try:
        return int(cell) if cell.lstrip("-").isdigit() else float(cell)
    except ValueError as error:
        raise DataError(f"file {path}: {column} is {cell!r}", "a number is expected", "evaluate again") from error


def write_summary_json(summary: Mapping[str, Any], path: str | Path) -> None:
    """Write a summary as JSON: floats with all their digits, None as null. Appears whole or not at all.

    Raises:
        DataError: a value is NaN or infinite.
        ResourceError: the file cannot be written.
    """
    try:
        write_json(Path(path), summary)
    except ValueError as error:
        raise DataError(f"file {path}: not written", str(error), "find the metric without a finite value") from error


def summary_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the summary as rows: label, metric, counts, mean, interval, median."""
    sections = dict(summary["labels"])
    if len(sections) > 1:
        sections[MEAN_OVER_LABELS] = summary["mean_over_labels"]
    return [
        {"label": label, "metric": metric, **entry}
        for label, metrics in sections.items()
        for metric, entry in metrics.items()
    ]


def format_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as aligned plain text, one line per label and metric; a dash stands for no value."""
    header = ("label", "metric", "n", "missed", "false alarm", "empty", "mean", "95 % interval", "median")
    text = aligned(header, [_cells(row) for row in summary_rows(summary)])
    bootstrap = summary["bootstrap"]
    text.append(
        f"{summary['n_cases']} cases of {summary['n_subjects']} subjects; interval of the mean: "
        f"{bootstrap['method']} bootstrap, {bootstrap['n_resamples']} resamples of subjects, seed {bootstrap['seed']}."
    )
    if "dice" in summary["mean_over_labels"]:
        text.append(
            "missed, false alarm: Dice 0, NSD 0, HD95 the image diagonal; empty in both: counted, not averaged."
        )
    return "\n".join(text)


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], n_words: int = 2) -> list[str]:
    """Return the lines of a plain table with a rule below its header: ``n_words`` columns to the left, then numbers."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(
            cell.ljust(width) if column < n_words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    return [text[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *text[1:]]


def format_value(value: float | None, style: str = ".3f") -> str:
    """Return a number for the terminal; a dash stands for no value."""
    return "-" if value is None else f"{value:{style}}"


def format_interval(entry: Mapping[str, Any], style: str = ".3f") -> str:
    """Return an entry's 95 % interval for the terminal."""
    if entry["ci95_low"] is None:
        return "-"
    return f"{entry['ci95_low']:{style}} to {entry['ci95_high']:{style}}"


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    counts = (str(row[key]) for key in ("n", "n_missed", "n_false_alarm", "n_empty"))
    figures = (format_value(row["mean"]), format_interval(row), format_value(row["median"]))
    return (row["label"], row["metric"], *counts, *figures)
