"""Ranking and charts by hand: what is worse, round ticks, and where a value is drawn."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.reports.charts import LABEL_WIDTH, RIGHT, WIDTH, distribution, line_chart, nice_ticks, training_charts
from pipelines.reports.ranking import better, rank_cases, ranking_metric, second_metric


def row(case: str, label: str = "lesion", status: str = "both", **metrics: float | None) -> dict[str, Any]:
    return {"case": case, "subject": case, "label": label, "status": status, **metrics}


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("dice", "higher"),
        ("nsd_2mm", "higher"),
        ("lesion_f1", "higher"),
        ("hd95_mm", "lower"),
        ("brier", "lower"),
        ("lesion_largest_missed_ml", "lower"),
        ("volume_error_ml", "near zero"),
        ("volume_reference_ml", None),
        ("lesion_n_reference", None),
        ("lesion_tp_predicted", None),
    ],
)
def test_which_values_are_good_ones(metric: str, direction: str | None) -> None:
    assert better(metric) == direction


def test_the_metric_to_rank_by() -> None:
    assert ranking_metric(["volume_ml", "hd95_mm", "dice", "nsd"]) == "dice"
    assert ranking_metric(["volume_ml", "hd95_mm"]) == "hd95_mm"
    assert ranking_metric(["volume_error_ml"]) == "volume_error_ml"
    assert ranking_metric(["volume_ml"]) is None
    assert second_metric(["volume_ml", "dice", "hd95_mm"], "dice") == "hd95_mm"


def test_the_worst_case_first_ties_by_the_second_metric_and_empty_cases_last() -> None:
    rows = [
        row("empty", status="empty", dice=None, hd95_mm=None),
        row("good", dice=0.9, hd95_mm=1.0),
        row("missed_near", status="missed", dice=0.0, hd95_mm=50.0),
        row("missed_far", status="missed", dice=0.0, hd95_mm=90.0),
        row("two", dice=0.2, hd95_mm=9.0),
        row("two", label="oedema", dice=0.8, hd95_mm=9.0),
    ]
    ranked = rank_cases(rows, "dice", "hd95_mm")
    assert [r.case for r in ranked] == ["missed_far", "missed_near", "two", "good", "empty"]
    assert ranked[2].value == pytest.approx(0.5)
    assert [r.why for r in ranked[1:3]] == ["lesion missed", "lesion 0.200, oedema 0.800"]
    assert ranked[-1].value is None
    by_distance = rank_cases(rows, "hd95_mm")
    assert [r.case for r in by_distance] == ["missed_far", "missed_near", "two", "good", "empty"]
    assert [r.case for r in rank_cases(rows, None)] == ["empty", "good", "missed_near", "missed_far", "two"]
    errors = [row("a", volume_error_ml=-3.0), row("b", volume_error_ml=2.0), row("c", volume_error_ml=0.1)]
    assert [r.case for r in rank_cases(errors, "volume_error_ml")] == ["a", "b", "c"]


def test_ticks_are_round() -> None:
    assert nice_ticks(0.0, 1.0) == [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(3.0, 47.0) == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0]
    assert nice_ticks(2.0, 2.0)[0] < 2 < nice_ticks(2.0, 2.0)[-1]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_surround_the_values(low: float, extent: float) -> None:
    ticks = nice_ticks(low, low + extent)
    slack = 1e-6 * (abs(low) + extent)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + extent - slack
    assert 2 <= len(ticks) <= 9


def test_a_dot_stands_where_its_value_is() -> None:
    rows = [row(f"p{i}", dice=value) for i, value in enumerate((0.0, 0.5, 1.0, 1.0))]
    rows += [row("p9", label="oedema", status="empty", dice=None)]
    chart = distribution("dice", rows)
    assert chart is not None
    lesion, oedema = chart.strips
    middle = LABEL_WIDTH + (WIDTH - RIGHT - LABEL_WIDTH) / 2
    assert [dot.x for dot in lesion.dots] == [LABEL_WIDTH, middle, WIDTH - RIGHT, WIDTH - RIGHT]
    assert [dot.text for dot in lesion.dots][:2] == ["p0: 0", "p1: 0.5"]
    assert lesion.quartiles is not None
    # 0.375, 0.75 and 1 are the quartiles of 0, 0.5, 1, 1
    expected = [LABEL_WIDTH + q * (WIDTH - RIGHT - LABEL_WIDTH) for q in (0.375, 0.75, 1.0)]
    assert lesion.quartiles == pytest.approx(expected, abs=0.06)
    assert (oedema.n, oedema.dots, oedema.quartiles) == (0, [], None)
    assert distribution("dice", rows[-1:]) is None


def test_a_gap_in_the_data_is_a_gap_in_the_line() -> None:
    chart = line_chart("x", {"a": [(1, 0.0), (2, 1.0), (3, None), (4, 0.0), (5, 1.0)], "b": [(1, None)]}, "epoch")
    assert chart is not None
    (line,) = chart.lines
    assert [len(piece.split()) for piece in line.pieces] == [2, 2]
    assert len(line.dots) == 4
    assert line_chart("x", {"b": [(1, None)]}, "epoch") is None


def test_more_series_than_colours_are_counted() -> None:
    chart = line_chart("x", {f"s{i}": [(0, 0.0), (1, float(i))] for i in range(11)}, "epoch")
    assert chart is not None
    assert len(chart.lines) == 8
    assert chart.notes == ("and 3 more series",)


def test_training_is_drawn_phase_by_phase() -> None:
    history = [
        {
            "epoch": 1,
            "loss": 2.0,
            "loss_dice": 1.0,
            "dice_a": None,
            "mean_dice": 0.1,
            "n_empty_a": 0.0,
            "n_missed_a": 2,
        },
        {"epoch": 2, "loss": 1.0, "loss_dice": 0.5, "dice_a": 0.3, "mean_dice": 0.3, "n_empty_a": 0.0, "n_missed_a": 0},
    ]
    outcome = {"phase": "second", "history": history[:1], "phases": [{"phase": "first", "history": history}]}
    (first, charts), (second, _) = training_charts(outcome)
    assert (first, second) == ("first", "second")
    assert [chart.title for chart in charts] == ["loss", "validation", "validation: counts"]
    assert [[line.name for line in chart.lines] for chart in charts] == [
        ["loss", "loss_dice"],
        ["mean_dice", "dice_a"],
        ["n_missed_a"],
    ]
    assert training_charts({}) == []
