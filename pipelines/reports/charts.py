"""Charts as numbers: what to draw where, in pixels. The page's template draws them as SVG, so they need no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7a00", "#666666")
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 460, 52, 12, 10, 34
LINE_HEIGHT, ROW_HEIGHT, LABEL_WIDTH = 190, 30, 110
MOST_SERIES = len(COLOURS)


@dataclass(frozen=True)
class Tick:
    """A position in pixels and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A case in a strip: place in pixels, what happened (``both``, ``missed``, ...), what to say about it."""

    x: float
    y: float
    status: str
    text: str


@dataclass(frozen=True)
class Strip:
    """A label in a distribution: its dots, and its quartiles in pixels (None where there are fewer than 4 values)."""

    name: str
    y: float
    dots: Sequence[Dot]
    quartiles: tuple[float, float, float] | None
    n: int


@dataclass(frozen=True)
class Line:
    """A series: its name, colour, and pieces ``x,y x,y ...`` in pixels; a gap in the data is a gap in the line."""

    name: str
    colour: str
    pieces: Sequence[str]
    dots: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A chart of ``width`` x ``height`` pixels: strips, or lines; (left, bottom) is the corner of the axes."""

    title: str
    width: int
    height: int
    left: float
    bottom: float
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick] = ()
    strips: Sequence[Strip] = ()
    lines: Sequence[Line] = ()
    x_name: str = ""
    notes: Sequence[str] = ()


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (steps of 1, 2 or 5 times a power of ten) from at most ``low`` to at least ``high``."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def distribution(metric: str, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    """Return every value of a metric as a dot, a strip per label, with its quartiles; None where there is no value."""
    valued = [row for row in rows if row.get(metric) is not None]
    if not valued:
        return None
    values = [float(row[metric]) for row in valued]
    ticks = nice_ticks(min(values), max(values))
    left = float(LABEL_WIDTH)
    x_of = _scale(ticks, left, WIDTH - RIGHT)
    names = list(dict.fromkeys(str(row["label"]) for row in rows))
    strips = []
    for position, name in enumerate(names):
        own = [row for row in valued if str(row["label"]) == name]
        y = TOP + (position + 0.5) * ROW_HEIGHT
        dots = [
            Dot(
                round(x_of(float(row[metric])), 1),
                round(y + 9 * _jitter(index), 1),
                str(row.get("status", "both")),
                f"{row['case']}: {float(row[metric]):.4g}",
            )
            for index, row in enumerate(own)
        ]
        strips.append(Strip(name, y, dots, _quartiles([float(row[metric]) for row in own], x_of), len(own)))
    bottom = float(TOP + len(names) * ROW_HEIGHT)
    x_ticks = [Tick(round(x_of(tick), 1), f"{tick:g}") for tick in ticks]
    return Chart(metric, WIDTH, int(bottom) + BOTTOM, left, bottom, x_ticks, strips=strips)


def line_chart(
    title: str, series: Mapping[str, Sequence[tuple[float, float | None]]], x_name: str, diagonal: bool = False
) -> Chart | None:
    """Return series of (x, y) as lines; None where there is no value.

    Args:
        title: of the chart.
        series: points by name; y None = no value there.
        x_name: under the axis.
        diagonal: also draw y = x, what a calibrated network would give.
    """
    known = {name: points for name, points in series.items() if any(y is not None for _, y in points)}
    if not known:
        return None
    shown = dict(list(known.items())[:MOST_SERIES])
    left_out = len(known) - len(shown)
    xs = [x for points in shown.values() for x, _ in points]
    ys = [y for points in shown.values() for _, y in points if y is not None]
    x_ticks, y_ticks = nice_ticks(min(xs), max(xs)), nice_ticks(min(ys), max(ys))
    if diagonal:
        x_ticks = y_ticks = nice_ticks(0.0, 1.0)
    bottom = float(LINE_HEIGHT - BOTTOM)
    x_of, y_of = _scale(x_ticks, LEFT, WIDTH - RIGHT), _scale(y_ticks, bottom, TOP)
    lines = [
        _line(name, COLOURS[index], [(x_of(x), None if y is None else y_of(y)) for x, y in points])
        for index, (name, points) in enumerate(shown.items())
    ]
    if diagonal:
        lines.append(_line("perfect", "#999999", [(x_of(0.0), y_of(0.0)), (x_of(1.0), y_of(1.0))]))
    return Chart(
        title,
        WIDTH,
        LINE_HEIGHT,
        LEFT,
        bottom,
        [Tick(round(x_of(tick), 1), f"{tick:g}") for tick in x_ticks],
        [Tick(round(y_of(tick), 1), f"{tick:g}") for tick in y_ticks],
        lines=lines,
        x_name=x_name,
        notes=(f"and {left_out} more series",) if left_out else (),
    )


def training_charts(outcome: Mapping[str, Any]) -> list[tuple[str, list[Chart]]]:
    """Return the charts of a run's history, phase by phase: loss and its terms, validated metrics, counts.

    Args:
        outcome: of ``record.json``: ``history`` (a dictionary per epoch), ``phase``, and earlier ``phases`` alike.
    """
    phases = [*outcome.get("phases", []), outcome]
    return [
        (str(phase.get("phase") or "training"), _history_charts(phase["history"]))
        for phase in phases
        if phase.get("history")
    ]


def _history_charts(history: Sequence[Mapping[str, Any]]) -> list[Chart]:
    keys = list(dict.fromkeys(key for entry in history for key in entry if key != "epoch"))
    groups: dict[str, list[str]] = {"loss": [], "validation": [], "validation: counts": []}
    for key in keys:
        group = "loss" if "loss" in key else "validation: counts" if key.startswith("n_") else "validation"
        groups[group].append(key)
    groups["validation"].sort(key=lambda key: not key.startswith("mean_"))
    charts = []
    for title, names in groups.items():
        series = {
            name: [(float(entry["epoch"]), _number(entry[name])) for entry in history if name in entry]
            for name in names
        }
        if title == "validation: counts":
            series = {name: points for name, points in series.items() if any(y for _, y in points)}
        chart = line_chart(title, series, "epoch")
        charts += [chart] if chart else []
    return charts


def _number(value: Any) -> float | None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _line(name: str, colour: str, points: Sequence[tuple[float, float | None]]) -> Line:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in points:
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((round(x, 1), round(y, 1)))
    dots = [point for piece in pieces for point in piece]
    texts = [" ".join(f"{x:g},{y:g}" for x, y in piece) for piece in pieces if len(piece) > 1]
    return Line(name, colour, texts, dots if len(dots) <= 40 else ())


def _scale(ticks: Sequence[float], start: float, end: float) -> Any:
    low, high = ticks[0], ticks[-1]
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _jitter(index: int) -> float:
    """Return a number in [-1, 1) that differs from its neighbours' and is the same in every report."""
    return 2.0 * ((index * 0.618033988749895) % 1.0) - 1.0


def _quartiles(values: Sequence[float], x_of: Any) -> tuple[float, float, float] | None:
    if len(values) < 4:
        return None
    q1, q2, q3 = (round(x_of(float(q)), 1) for q in np.percentile(values, [25, 50, 75]))
    return q1, q2, q3
