"""The report of one or several runs: ``index.html`` that needs no other file, the cases as CSV, all numbers as JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.files import write_atomically, write_json
from pipelines.progress import progress
from pipelines.reports.gallery import case_pictures, load_arrays
from pipelines.reports.html import GalleryCase, Shown, render
from pipelines.reports.ranking import Ranked
from pipelines.reports.report_data import RunData, load_run, report_folder
from pipelines.reports.viewer import MISSING, viewer_available, viewer_page
from transforms.errors import FiducialError, UsageError

MOST_PICTURES = 24  # cases in the gallery, shared among the runs
MOST_VIEWERS = 2  # of these, cases to click through; each adds about 2 MB to the page
NOT_SHOWN = ("subject",)  # a report travels: it knows cases, not people


def write_report(runs: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the report of runs.

    Args:
        runs: folders of runs, or their ``metrics`` folders.
        output: folder for ``index.html``, ``cases.csv`` and ``report.json``; None = ``report`` beside the metrics of a
            single run.

    Returns:
        The path of ``index.html``.

    Raises:
        UsageError: no run, a run given twice, a folder that is no run, or several runs and no ``output``.
        DataError: the results of a run are damaged.
        ResourceError: the report cannot be written.
    """
    data = _named_apart([load_run(run) for run in runs])
    if not data or len({run.metrics_dir for run in data}) < len(data):
        raise UsageError(f"report of {[str(run) for run in runs]}", "expected runs, each once", "name each run once")
    if output is None and len(data) > 1:
        raise UsageError(f"report of {len(data)} runs", "it belongs to none of them", "name a folder with -o")
    folder = report_folder(runs[0]) if output is None else Path(output).resolve()
    shown = [_shown(run, max(1, MOST_PICTURES // len(data)), max(1, MOST_VIEWERS // len(data))) for run in data]
    write_atomically(folder / "cases.csv", _csv(data).encode())
    write_json(folder / "report.json", {"runs": [_as_json(run) for run in shown]})
    page = folder / "index.html"
    write_atomically(page, render(shown).encode())
    return page


def _named_apart(runs: Sequence[RunData]) -> list[RunData]:
    """Number the runs whose folders have the same name."""
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=f"{run.name} ({names[: i + 1].count(run.name)})")
        for i, run in enumerate(runs)
    ]


def _shown(run: RunData, most_pictures: int, most_viewers: int) -> Shown:
    notes = [MISSING] if run.cases and not viewer_available() else []
    colours = {int(label["id"]): str(label["colour"]) for label in run.labels}
    worst = list(enumerate(run.ranking[:most_pictures], start=1)) if run.cases else []
    gallery: list[GalleryCase] = []
    for rank, ranked in progress(worst, "pictures of the report"):
        wants_viewer = viewer_available() and sum(entry.viewer is not None for entry in gallery) < most_viewers
        gallery.append(_gallery_case(run, rank, ranked, colours, wants_viewer))
    return Shown(run, gallery, notes)


def _gallery_case(run: RunData, rank: int, ranked: Ranked, colours: dict[int, str], wants_viewer: bool) -> GalleryCase:
    if ranked.case not in run.cases:
        return GalleryCase(rank, ranked.case, ranked.why, [], "metrics/cases.json does not know this case's files.")
    try:
        arrays = load_arrays(run.cases[ranked.case])
        pictures = case_pictures(arrays, colours)
        page = viewer_page(arrays) if wants_viewer else None
    except Exception as problem:  # one picture must not cost the whole report; the case is named, with its reason
        return GalleryCase(rank, ranked.case, ranked.why, [], f"No picture: {_reason(problem)}")
    viewer, reduced = page if page is not None else (None, (1, 1, 1))
    return GalleryCase(rank, ranked.case, ranked.why, pictures, "", viewer, reduced)


def _reason(problem: Exception) -> str:
    if isinstance(problem, FiducialError):
        return f"{problem.what}; {problem.why}."
    return f"{type(problem).__name__} while it was drawn."


def _csv(runs: Sequence[RunData]) -> str:
    """Return the rows of all runs, worst case first; a column ``run`` where there are several."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        rank = {ranked.case: number for number, ranked in enumerate(run.ranking, start=1)}
        own = [
            {
                **({"run": run.name} if len(runs) > 1 else {}),
                "rank": rank[str(row["case"])],
                **{key: value for key, value in row.items() if key not in NOT_SHOWN},
            }
            for row in run.rows
        ]
        rows += sorted(own, key=lambda row: row["rank"])
    buffer = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _as_json(run: Shown) -> dict[str, Any]:
    data = run.data
    return {
        "name": data.name,
        "summary": data.summary,
        "ranked_by": data.ranked_by,
        "ranking": [{"case": ranked.case, "value": ranked.value} for ranked in data.ranking],
        "without_picture": {entry.case: entry.problem for entry in run.gallery if entry.problem},
        "record": {key: value for key, value in data.record.items() if key != "contract"},
        "notes": [*data.notes, *run.notes],
    }
