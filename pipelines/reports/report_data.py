"""From the files of a run to plain values: what a report shows, and in words what it cannot show.

A run folder has ``record.json`` and ``metrics/``; a metrics folder by itself (``--output_dir``, an ensemble, merged
folds) is enough. What is absent is a note in the report, never a crash: old runs stay readable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.metrics.summary import metric_names
from pipelines.reports.ranking import Ranked, rank_cases, ranking_metric, second_metric
from pipelines.reports.tables import read_per_case_csv
from transforms.errors import DataError, FiducialError, UsageError

CASES_FILE = "cases.json"
OWN_FILES = ("summary.json", CASES_FILE)
"""The JSON files in ``metrics/`` that have a section of their own; every other one becomes a panel."""
SUMMARY_KEYS = ("n_cases", "n_subjects", "labels", "mean_over_labels")


@dataclass(frozen=True)
class CaseFiles:
    """Where a case's image, truth and prediction are, and where its largest error is.

    Attributes:
        case: its id.
        image, reference, prediction: files; they may be gone.
        channel: of a four-dimensional image, or None.
        label_values: label id per value in the reference file; empty = the values are the ids.
        slices: per axis of the file, the slice with the most wrong voxels.
        wrong_voxels: in each of these slices.
    """

    case: str
    image: Path
    reference: Path
    prediction: Path
    channel: int | None
    label_values: Mapping[int, int]
    slices: tuple[int, ...]
    wrong_voxels: tuple[int, ...]


@dataclass(frozen=True)
class RunData:
    """What is known of a run.

    Attributes:
        name: for headings; the run folder's name.
        metrics_dir: where the results are.
        summary: of ``summary.json``, None where the run was not evaluated.
        rows: of ``per_case.csv``.
        metrics: names of the columns that are metrics.
        ranked_by: the metric of ``ranking``, or None.
        ranking: the cases, the worst first.
        record: of ``record.json``; empty where there is none.
        labels: id, name and colour of every label, as far as known.
        cases: files per case.
        panels: further JSON files in ``metrics/`` by name.
        notes: what is missing or damaged, in words.
    """

    name: str
    metrics_dir: Path
    summary: Mapping[str, Any] | None
    rows: Sequence[Mapping[str, Any]]
    metrics: Sequence[str]
    ranked_by: str | None
    ranking: Sequence[Ranked]
    record: Mapping[str, Any]
    labels: Sequence[Mapping[str, Any]]
    cases: Mapping[str, CaseFiles]
    panels: Mapping[str, Any]
    notes: Sequence[str]


def load_run(folder: str | Path) -> RunData:
    """Return what is known of a run, given by its folder or by its ``metrics`` folder.

    Raises:
        UsageError: there is neither a record nor a result in it.
        DataError: ``summary.json`` or ``per_case.csv`` is damaged: numbers are never guessed.
    """
    run, metrics_dir = _folders(Path(folder).resolve())
    notes: list[str] = []
    summary = _summary(metrics_dir / "summary.json") if (metrics_dir / "summary.json").is_file() else None
    rows = _rows(metrics_dir / "per_case.csv", notes) if summary else []
    metrics = metric_names(rows) if rows else []
    record = _optional(run / "record.json", "the run's record", notes)
    if summary is None:
        notes.append("This run has no results yet: `fiducial evaluate` writes them.")
    if rows and summary and summary["n_cases"] != len({row["case"] for row in rows}):
        notes.append(
            f"summary.json is of {summary['n_cases']} cases, per_case.csv is of another number: evaluate again."
        )
    labels, cases = _case_files(metrics_dir, notes if rows else [])
    ranked_by = ranking_metric(metrics)
    return RunData(
        name=run.name,
        metrics_dir=metrics_dir,
        summary=summary,
        rows=rows,
        metrics=metrics,
        ranked_by=ranked_by,
        ranking=rank_cases(rows, ranked_by, second_metric(metrics, ranked_by)),
        record=record,
        labels=labels or record.get("contract", {}).get("labels", []),
        cases=cases,
        panels=_panels(metrics_dir, notes),
        notes=notes,
    )


def report_folder(run: str | Path) -> Path:
    """Return where the report of one run goes by itself: ``report`` beside its ``metrics``."""
    return _folders(Path(run).resolve())[0] / "report"


def _folders(folder: Path) -> tuple[Path, Path]:
    """Return the run's folder and its metrics folder."""
    if (folder / "summary.json").is_file() or (folder / "per_case.csv").is_file():
        return folder.parent, folder
    if (folder / "metrics" / "summary.json").is_file() or (folder / "record.json").is_file():
        return folder, folder / "metrics"
    raise UsageError(
        f"{folder}: no run",
        "neither record.json nor metrics/summary.json is there",
        "name a run's folder (runs/<bundle>/<run>) or its metrics folder",
    )


def _summary(path: Path) -> dict[str, Any]:
    summary = _read(path)
    lacking = [key for key in SUMMARY_KEYS if not isinstance(summary, Mapping) or key not in summary]
    if lacking:
        raise DataError(f"file {path}: no summary", f"it does not say {', '.join(lacking)}", "evaluate again")
    return summary


def _rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        notes.append("There is no per_case.csv beside summary.json: no table of cases, no distributions, no pictures.")
        return []
    return [{key: value for key, value in row.items() if key != "fold"} for row in read_per_case_csv(path)]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise DataError(
            f"file {path}", f"it cannot be read: {problem}", "evaluate again, or restore the file"
        ) from None


def _optional(path: Path, what: str, notes: list[str]) -> dict[str, Any]:
    """Return a JSON object, empty and noted where it is absent or damaged."""
    if not path.is_file():
        notes.append(f"There is no {path.name}: {what} cannot be shown.")
        return {}
    try:
        return dict(_read(path))
    except (FiducialError, TypeError, ValueError):
        notes.append(f"{path.name} is damaged: {what} cannot be shown.")
        return {}


def _case_files(metrics_dir: Path, notes: list[str]) -> tuple[list[dict[str, Any]], dict[str, CaseFiles]]:
    """Return label table and files of the cases; those of merged folds stand with each fold."""
    own = metrics_dir / CASES_FILE
    sources = [own] if own.is_file() else sorted(metrics_dir.parent.glob(f"fold*/metrics/{CASES_FILE}"))
    if not sources:
        notes.append(f"There is no {CASES_FILE} beside the results, so no pictures: evaluate again to get them.")
    labels: list[dict[str, Any]] = []
    cases: dict[str, CaseFiles] = {}
    for source in sources:
        content = _optional(source, "pictures of its cases", notes)
        try:
            table = [{key: label[key] for key in ("id", "name", "colour")} for label in content.get("labels", [])]
            values = {int(value): int(label) for value, label in content.get("label_values", [])}
            entries = dict(content.get("cases", {}))
        except (KeyError, TypeError, ValueError):
            notes.append(f"{CASES_FILE} is damaged: pictures of its cases cannot be shown.")
            continue
        labels = labels or table
        for case, entry in entries.items():
            try:
                cases[case] = _files_of(case, entry, source.parent, values)
            except (KeyError, TypeError, ValueError):
                notes.append(f"{CASES_FILE} does not say where the files of case {case} are: no picture of it.")
    return labels, cases


def _files_of(case: str, entry: Mapping[str, Any], folder: Path, label_values: Mapping[int, int]) -> CaseFiles:
    image, reference, prediction = (folder / entry[key] for key in ("image", "reference", "prediction"))
    error = entry["largest_error"]
    slices, wrong = (tuple(int(n) for n in error[key]) for key in ("slices", "wrong_voxels"))
    return CaseFiles(case, image, reference, prediction, entry.get("channel"), label_values, slices, wrong)


def _panels(metrics_dir: Path, notes: list[str]) -> dict[str, Any]:
    panels = {}
    for path in sorted(metrics_dir.glob("*.json")):
        if path.name not in OWN_FILES:
            try:
                panels[path.stem] = _read(path)
            except DataError:
                notes.append(f"{path.name} is damaged: its panel is left out.")
    return panels
