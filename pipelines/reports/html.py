"""The page: values in, one HTML text out that needs no other file and no network.

Templates stand in ``templates/``; what comes from data is escaped, because a case may be called ``<script>``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from pipelines.reports.charts import distribution, training_charts
from pipelines.reports.findings import findings_panel
from pipelines.reports.gallery import DIFFERENCES, PANEL_PX, PANELS, PlanePicture
from pipelines.reports.paired import paired_panel
from pipelines.reports.panels import Panel, panel_of
from pipelines.reports.report_data import RunData
from pipelines.reports.tables import summary_rows

MOST_ROWS = 3000  # of the table of cases; a page with more is slow, and the CSV beside it has them all
COUNTS = ("n", "n_missed", "n_false_alarm", "n_empty")


@dataclass(frozen=True)
class GalleryCase:
    """A case of the gallery: its place in the ranking (1 = worst), what is known, and its pictures or why not.

    Attributes:
        case, why: id, and the labels' values in words.
        wrong_voxels: on the shown slices, per axis of the file.
        pictures: one strip per plane.
        problem: why there is no picture, or empty.
        viewer: a page to click through, or None.
        reduced: by what the viewer's axes are reduced.
    """

    rank: int
    case: str
    why: str
    pictures: Sequence[PlanePicture]
    problem: str = ""
    viewer: str | None = None
    reduced: tuple[int, int, int] = (1, 1, 1)


@dataclass(frozen=True)
class Shown:
    """A run as the page shows it: its data, its gallery, and notes about pictures and panels."""

    data: RunData
    gallery: Sequence[GalleryCase]
    notes: Sequence[str]


def render(runs: Sequence[Shown]) -> str:
    """Return the report of one or several runs as HTML; several are also compared."""
    several = [run.data for run in runs] if len(runs) > 1 else []
    template = page_environment().get_template("report.html.j2")
    return template.render(
        title=", ".join(run.data.name for run in runs),
        runs=[_context(number, run) for number, run in enumerate(runs, start=1)],
        side_by_side=side_by_side(several) if several else None,
        paired=panel_of("paired", paired_panel(several)) if several else None,
        panels_of_pictures=PANELS,
        panel_px=PANEL_PX,
        differences=list(DIFFERENCES.values()),
        version=version("fiducial"),
    )


def format_number(value: Any) -> str:
    """Return a number for a reader: whole numbers as they are, others with three decimals, a dash for no value."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or value == 0:
        return str(int(value))
    return f"{value:.3f}" if 0.001 <= abs(value) < 10000 else f"{value:.3g}"


def side_by_side(runs: Sequence[RunData]) -> dict[str, Any]:
    """Return ``names``, ``sources`` that differ, and rows: label, metric, and one summary entry (or None) per run."""
    tables = [{(r["label"], r["metric"]): r for r in summary_rows(run.summary)} if run.summary else {} for run in runs]
    keys = list(dict.fromkeys(key for table in tables for key in table))
    sources = [run.summary.get("source", {}) if run.summary else {} for run in runs]
    differing = [
        key for key in ("cohort", "manifest_digest", "split", "fold") if len({repr(s.get(key)) for s in sources}) > 1
    ]
    cases = [{str(row["case"]) for row in run.rows} for run in runs]
    return {
        "names": [run.name for run in runs],
        "differing": differing,
        "same_cases": all(own == cases[0] for own in cases),
        "rows": [{"label": label, "metric": m, "entries": [t.get((label, m)) for t in tables]} for label, m in keys],
    }


def record_rows(record: Mapping[str, Any], summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return what a reader needs to trust and to repeat the run, as pairs (what, value), absent entries left out."""
    source = (summary or {}).get("source", {})
    outcome = record.get("outcome", {})
    machine = record.get("machine", {})
    pairs: list[tuple[str, Any]] = [
        ("evaluated on", _evaluated_on(summary)),
        ("digest of the evaluated data", source.get("manifest_digest")),
        ("digest of the weights", _listed(source.get("weights_sha256"))),
        ("trained on", record.get("cohort")),
        ("digest of the training data", record.get("manifest_digest")),
        ("seed", record.get("seed")),
        ("command", " ".join(str(word) for word in record.get("command", []))),
        ("started", record.get("started")),
        ("hardware", ", ".join(str(gpu) for gpu in record.get("gpus", [])) or ("no GPU" if record else None)),
        ("machine", _words(machine, tuple(machine))),
        ("platform", record.get("platform")),
        ("python", record.get("python")),
        ("versions", ", ".join(f"{name} {number}" for name, number in record.get("versions", {}).items())),
        ("commit", record.get("commit")),
        ("digest of the code", record.get("code_digest")),
        ("epochs, steps, minutes", _words(outcome, ("epochs", "steps", "minutes"))),
        ("best validation", _words(outcome, ("best_metric", "best_epoch"))),
        ("skipped steps (loss not finite)", outcome.get("skipped_steps")),
        ("cases left out while training", _bad_cases(outcome) if outcome else None),
    ]
    return [(what, format_number(value)) for what, value in pairs if value not in (None, "", [])]


def _context(number: int, run: Shown) -> dict[str, Any]:
    data = run.data
    panels, notes = _panels(data)
    findings, noted = _findings(data)
    notes += noted
    ranks = {entry.case: entry.rank for entry in run.gallery}
    shown = list(data.rows)
    if len(shown) > MOST_ROWS:
        order = {ranked.case: place for place, ranked in enumerate(data.ranking)}
        shown = sorted(shown, key=lambda row: order[str(row["case"])])[:MOST_ROWS]
    return {
        "prefix": f"run{number}",
        "data": data,
        "summary_rows": summary_rows(data.summary) if data.summary else [],
        "counts": COUNTS,
        "evaluated_on": _evaluated_on(data.summary),
        "bootstrap": (data.summary or {}).get("bootstrap", {}),
        "distributions": [chart for chart in (distribution(m, data.rows) for m in data.metrics) if chart],
        "columns": ["case", "label", *(["status"] if data.rows and "status" in data.rows[0] else []), *data.metrics],
        "rows": shown,
        "n_rows": len(data.rows),
        "ranks": ranks,
        "gallery": run.gallery,
        "labels": [label for label in data.labels if label.get("id", 0) != 0],
        "training": training_charts(data.record.get("outcome", {})),
        "panels": panels,
        "record": record_rows(data.record, data.summary),
        "resumed": [_resumed(entry) for entry in data.record.get("resumed", [])],
        "findings": findings,
        "notes": [*data.notes, *run.notes, *notes],
    }


def _panels(data: RunData) -> tuple[list[Panel], list[str]]:
    panels, notes = [], []
    for name, content in data.panels.items():
        try:
            panels.append(panel_of(name, content))
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            notes.append(f"{name}.json is not a panel as it should be ({type(problem).__name__}: {problem}).")
    return panels, notes


def _findings(data: RunData) -> tuple[Panel | None, list[str]]:
    try:
        content = findings_panel(data.record)
        return None if content is None else panel_of("findings", content), []
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        return None, [f"The findings in record.json cannot be shown ({type(problem).__name__}: {problem})."]


def _resumed(entry: Mapping[str, Any]) -> str:
    despite = "; ".join(f"{kind}: {', '.join(texts)}" for kind, texts in entry.get("despite", {}).items())
    return f"{entry.get('at', 'at an unknown time')}, {'despite ' + despite if despite else 'nothing had changed'}"


def _bad_cases(outcome: Mapping[str, Any]) -> str:
    phases = [*outcome.get("phases", []), outcome]
    found = [f"{case} ({times} times)" for phase in phases for case, times in (phase.get("bad_cases") or {}).items()]
    return ", ".join(found) or "none"


def _evaluated_on(summary: Mapping[str, Any] | None) -> str:
    return _words((summary or {}).get("source", {}), ("cohort", "split", "fold", "folds"))


def _words(values: Mapping[str, Any], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {format_number(values[key])}" for key in keys if values.get(key) is not None)


def _listed(value: Any) -> str | None:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _exact(value: Any) -> str:
    """Return a value with all its digits, as JSON writes it; no text for None."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


@lru_cache(maxsize=1)
def page_environment() -> Environment:
    """Return the templates of all pages, which escape whatever they are given."""
    environment = Environment(
        loader=PackageLoader("pipelines.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = format_number
    environment.filters["exact"] = _exact
    return environment
