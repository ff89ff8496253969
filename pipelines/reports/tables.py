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
        DataError: no such file, or a metric that is no number.
    """
    if not Path(path).is_file():
        raise DataError(f"file {path}", "there is no such file", "evaluate first")
    with Path(path).open(newline="") as file:
        return [{key: _value(key, cell, path) for key, cell in row.items()} for row in csv.DictReader(file)]


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


def format_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as aligned plain text, one line per label and metric; a dash stands for no value."""
    header = ("label", "metric", "n", "missed", "false alarm", "empty", "mean", "95 % interval", "median")
    lines = [header]
    sections = dict(summary["labels"])
    if len(sections) > 1:
        sections["(mean over labels)"] = summary["mean_over_labels"]
    for label, metrics in sections.items():
        lines += [(label, metric, *_cells(entry)) for metric, entry in metrics.items()]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = [
        "  ".join(cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(cells))
        for cells in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    text.insert(1, "-" * len(text[0]))
    bootstrap = summary["bootstrap"]
    text.append(
        f"{summary['n_cases']} cases of {summary['n_subjects']} subjects; interval of the mean: "
        f"{bootstrap['n_resamples']} resamples of subjects, seed {bootstrap['seed']}."
    )
    if "dice" in summary["mean_over_labels"]:
        text.append(
            "missed, false alarm: Dice 0, NSD 0, HD95 the image diagonal; empty in both: counted, not averaged."
        )
    return "\n".join(line.rstrip() for line in text)


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    interval = "-" if entry["ci95_low"] is None else f"{entry['ci95_low']:.3f} to {entry['ci95_high']:.3f}"
    counts = (str(entry[key]) for key in ("n", "n_missed", "n_false_alarm", "n_empty"))
    return (*counts, number(entry["mean"]), interval, number(entry["median"]))
