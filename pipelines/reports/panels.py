"""Optional sections of a report: what lies as JSON in ``metrics/`` beside the files that have their own section.

A file with a ``title`` says itself what to show: ``text``, ``tables`` (title, columns, rows) and ``charts`` (title, x,
``series``: points [x, y] by name, ``diagonal``: also draw y = x). Any other file is shown as it is, key by key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.metrics.calibration import CalibrationCounts, calibration_figures, reliability_curve
from pipelines.reports.charts import Chart, line_chart
from transforms.errors import UsageError


@dataclass(frozen=True)
class PanelTable:
    """A table: its title, names of the columns, and rows of plain values."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Panel:
    """A section: where it comes from, title, text, tables and charts."""

    file: str
    title: str
    text: str
    tables: Sequence[PanelTable]
    charts: Sequence[Chart]


def panel_of(name: str, content: Any) -> Panel:
    """Return the section of ``metrics/<name>.json``.

    Raises:
        KeyError, TypeError, ValueError: a file with a title whose tables or charts do not have the form above.
    """
    file = f"metrics/{name}.json"
    if not (isinstance(content, Mapping) and "title" in content):
        return Panel(file, name.replace("_", " "), "", [_as_it_is(content)], [])
    tables = [
        PanelTable(str(t.get("title", "")), [str(c) for c in t["columns"]], [list(row) for row in t["rows"]])
        for t in content.get("tables", [])
    ]
    charts = [_chart(chart) for chart in content.get("charts", [])]
    text = str(content.get("text", ""))
    return Panel(file, str(content["title"]), text, tables, [chart for chart in charts if chart is not None])


def calibration_panel(counts: Mapping[str, CalibrationCounts], about: str = "") -> dict[str, Any]:
    """Return the content of ``metrics/calibration.json``: figures and reliability curve of every label.

    Args:
        counts: pooled over the cases, by label (``pipelines.metrics.calibration.pool_calibration``).
        about: a sentence on which voxels were counted.

    Raises:
        UsageError: no label.
    """
    if not counts:
        raise UsageError("calibration panel", "0 labels, at least 1 expected", "count the calibration of a label")
    figures = {label: calibration_figures(own) for label, own in counts.items()}
    curves = {label: reliability_curve(own) for label, own in counts.items()}
    names = list(next(iter(figures.values())))
    return {
        "title": "Calibration",
        "text": f"How often a voxel has a label, given its probability; on the diagonal both agree. {about}".rstrip(),
        "charts": [
            {
                "title": "reliability",
                "x": "predicted probability",
                "diagonal": True,
                "series": {
                    label: [[float(p), float(f)] for p, f in zip(curve.probability, curve.frequency, strict=True)]
                    for label, curve in curves.items()
                },
            }
        ],
        "tables": [
            {
                "title": "",
                "columns": ["label", *names],
                "rows": [[label, *(own[name] for name in names)] for label, own in figures.items()],
            }
        ],
    }


def _chart(chart: Mapping[str, Any]) -> Chart | None:
    series = {
        str(name): [(float(x), None if y is None else float(y)) for x, y in points]
        for name, points in chart["series"].items()
    }
    return line_chart(str(chart["title"]), series, str(chart.get("x", "")), bool(chart.get("diagonal", False)))


def _as_it_is(content: Any) -> PanelTable:
    if _is_list(content) and content and all(isinstance(entry, Mapping) for entry in content):
        columns = list(dict.fromkeys(str(key) for entry in content for key in entry))
        return PanelTable("", columns, [[_plain(entry.get(column)) for column in columns] for entry in content])
    entries = (
        content.items() if isinstance(content, Mapping) else enumerate(content if _is_list(content) else [content])
    )
    return PanelTable("", ["key", "value"], [[str(key), _plain(value)] for key, value in entries])


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping) or _is_list(value) else value
