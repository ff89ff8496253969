"""Results and provenance as they may travel: the same numbers, digests for names, no pictures of patients."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.export.privacy import Pseudonyms, case_of, described_cohort, scrubbed, scrubbed_command
from pipelines.export.source import TrainedRun
from pipelines.files import write_json
from pipelines.metrics.summary import metric_names
from pipelines.reports import write_report
from pipelines.reports.ranking import Ranked, rank_cases, ranking_metric, second_metric

NOT_EXPORTED = frozenset(["cases.json"])  # it says where the files of patients are
RECORD_KEYS_OF_FILES = ("manifest",)


def result_files(run: TrainedRun, names: Pseudonyms) -> dict[str, bytes]:
    """Return the files of ``results/``, empty where the run was not evaluated.

    The report has no gallery: a picture of a head is a patient's.
    """
    if run.summary is None:
        return {}
    files = {"results/per_case.csv": _table(pseudonymous_rows(run.rows, names))}
    for path in sorted((run.folder / "metrics").glob("*.json")):
        if path.name not in NOT_EXPORTED:
            content = scrubbed(json.loads(path.read_text(encoding="utf-8")), names)
            files[f"results/{path.name}"] = json_bytes(content)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, run.cohort.name if run.cohort.name.isidentifier() else "run")
        write_json(copy / "record.json", travelling_record(run, names))
        for name, content in files.items():
            (copy / "metrics").mkdir(exist_ok=True)
            (copy / "metrics" / Path(name).name).write_bytes(content)
        page = write_report([copy], Path(scratch, "report"))
        files["results/report.html"] = page.read_bytes()
    return files


def provenance_files(run: TrainedRun, names: Pseudonyms, export: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of ``provenance/``: the run's record and resolved configuration, the cohort, this export."""
    return {
        "provenance/run.json": json_bytes(travelling_record(run, names)),
        "provenance/config.json": json_bytes(scrubbed(run.config, names)),
        "provenance/cohort.json": json_bytes(described_cohort(run.cohort, names)),
        "provenance/export.json": json_bytes(scrubbed(export, names)),
    }


def travelling_record(run: TrainedRun, names: Pseudonyms) -> dict[str, Any]:
    """Return the run's record without names and paths."""
    record = {key: value for key, value in run.record.items() if key not in (*RECORD_KEYS_OF_FILES, "resumed")}
    record["command"] = scrubbed_command([str(word) for word in record.get("command", [])], names)
    if run.record.get("resumed"):
        record["resumed"] = [
            {**entry, "command": scrubbed_command([str(word) for word in entry.get("command", [])], names)}
            for entry in run.record["resumed"]
        ]
    return scrubbed(record, names)


def pseudonymous_rows(rows: Sequence[Mapping[str, Any]], names: Pseudonyms) -> list[dict[str, Any]]:
    """Return the rows of ``per_case.csv`` with digests in place of case and subject."""
    told = []
    for row in rows:
        severity = str(row["case"])[len(case_of(row)) :]
        case, subject = names.cases[case_of(row)], names.subjects[str(row["subject"])]
        told.append({**row, "case": f"{case}{severity}", "subject": subject})
    return told


def worst_cases(run: TrainedRun, names: Pseudonyms, most: int = 5) -> tuple[str | None, list[Ranked]]:
    """Return by which metric, and the worst cases of the evaluation, under their digests."""
    rows = pseudonymous_rows(run.rows, names)
    if not rows:
        return None, []
    metrics = metric_names(rows)
    metric = ranking_metric(metrics)
    return metric, rank_cases(rows, metric, second_metric(metrics, metric))[:most]


def json_bytes(value: Any) -> bytes:
    """Return JSON as it stands in an export."""
    return (json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _table(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
