"""Summaries: counts, the bootstrap over subjects, and files that can be read back digit by digit."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.metrics.segmentation import segmentation_metrics
from pipelines.metrics.summary import summarise
from pipelines.reports.tables import format_table, write_per_case_csv, write_summary_json
from transforms.errors import DataError, ResourceError


def row(case: str, dice: float | None, subject: str = "", label: str = "lesion", status: str = "both", **more) -> dict:
    return {"case": case, "subject": subject or case, "label": label, "status": status, "dice": dice, **more}


def lesion_dice(rows: list[dict], **options) -> dict:
    return summarise(rows, **options)["labels"]["lesion"]["dice"]


ROWS = [
    row("a", 0.9),
    row("b", 0.7),
    row("c", 0.0, status="missed"),
    row("d", None, status="empty"),
    row("e", 0.0, status="false_alarm"),
    row("f", 0.8),
]


# 0.9, 0.7, 0, 0, 0.8: mean 2.4 / 5, median 0.7; the empty case is counted, not averaged.
def test_counts_mean_and_median() -> None:
    entry = lesion_dice(ROWS)
    assert entry["mean"] == pytest.approx(0.48, abs=1e-15)
    assert entry["median"] == 0.7
    assert [entry[key] for key in ("n", "n_missed", "n_empty", "n_false_alarm")] == [5, 1, 1, 1]
    assert 0 <= entry["ci95_low"] < entry["mean"] < entry["ci95_high"] <= 0.9


def test_missing_a_lesion_lowers_the_mean() -> None:
    found = [*ROWS[:2], row("c", 0.3)]
    assert lesion_dice(ROWS[:3])["mean"] < lesion_dice(found)["mean"]


@settings(max_examples=20, deadline=None)
@given(value=st.floats(0, 100), n=st.integers(2, 12))
def test_equal_values_have_an_interval_of_no_width(value: float, n: int) -> None:
    entry = lesion_dice([row(f"case{i}", value) for i in range(n)], n_resamples=200)
    assert entry["mean"] == entry["median"] == entry["ci95_low"] == entry["ci95_high"] == value


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_order_of_rows_is_irrelevant(seed: int) -> None:
    rows = [row(f"c{i}{label}", i * 0.1 / 3, f"s{i % 4}", label) for i in range(9) for label in ("lesion", "core")]
    shuffled = rows.copy()
    random.Random(seed).shuffle(shuffled)
    assert json.dumps(summarise(shuffled, 200)) == json.dumps(summarise(rows, 200))


def test_seeded() -> None:
    rows = [row(f"c{i}", math.sin(i)) for i in range(30)]
    assert lesion_dice(rows, seed=1) == lesion_dice(rows, seed=1)
    assert lesion_dice(rows, seed=1)["ci95_low"] != lesion_dice(rows, seed=2)["ci95_low"]


# Two subjects, values 0 and 1: a resample is 00, 01, 10 or 11, its mean 0 with probability 1/4, more than 2.5 %; the
# sample is symmetric, so that neither bias nor skewness moves the limits.
def test_interval_of_two_subjects_by_hand() -> None:
    entry = lesion_dice([row("a", 0.0), row("b", 1.0)])
    assert (entry["ci95_low"], entry["ci95_high"]) == (0.0, 1.0)


# For many subjects the interval approaches mean +- 1.96 standard errors.
def test_interval_agrees_with_the_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(0.7, 0.1, 400)
    entry = lesion_dice([row(f"c{i}", float(v)) for i, v in enumerate(values)])
    half = 1.96 * values.std() / math.sqrt(400)
    assert entry["ci95_low"] == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert entry["ci95_high"] == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_the_interval_is_the_bca_of_scipy() -> None:
    values = np.random.default_rng(0).beta(5, 1.2, 40)
    rows = [row(f"c{i}", float(value)) for i, value in enumerate(values)]
    summary = summarise(rows, n_resamples=20_000)
    assert summary["bootstrap"] == {"unit": "subject", "method": "BCa", "n_resamples": 20_000, "seed": 0}
    result = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=20_000, rng=np.random.default_rng(1))
    entry = summary["labels"]["lesion"]["dice"]
    width = entry["ci95_high"] - entry["ci95_low"]
    assert (entry["ci95_low"], entry["ci95_high"]) == pytest.approx(tuple(result.confidence_interval), abs=0.02 * width)


# Dice is skewed to the left, a few cases fail: both limits lie below those of the percentile interval, whose mirror
# image is that of 1 - Dice.
def test_a_skewed_score_moves_both_limits() -> None:
    values = [0.9, 0.92, 0.88, 0.91, 0.93, 0.9, 0.89, 0.94, 0.9, 0.91, 0.2, 0.92]
    entry = lesion_dice([row(f"c{i}", value) for i, value in enumerate(values)])
    draws = np.random.default_rng(5).choice(values, (20_000, 12)).mean(axis=1)
    percentile = np.percentile(draws, [2.5, 97.5])
    assert entry["ci95_low"] < percentile[0] - 0.01
    assert entry["ci95_high"] < percentile[1]
    mirrored = lesion_dice([row(f"c{i}", 1 - value) for i, value in enumerate(values)])
    assert mirrored["ci95_low"] == pytest.approx(1 - entry["ci95_high"])


# The only subject with a core is left out by one leave-one-out value and by many resamples: the mean over labels is
# then that of the lesion alone, and the limits stay between the smallest and the largest value.
def test_a_label_of_one_subject_leaves_the_mean_over_labels_an_interval() -> None:
    rows = [row(f"c{i}", 0.5 + 0.05 * i) for i in range(6)] + [
        row(f"c{i}", 0.1 if i == 0 else None, label="core", status="both" if i == 0 else "empty") for i in range(6)
    ]
    summary = summarise(rows)
    assert summary["labels"]["core"]["dice"]["ci95_low"] is None
    entry = summary["mean_over_labels"]["dice"]
    assert 0.1 < entry["ci95_low"] < entry["mean"] < entry["ci95_high"] <= 0.75


# Ten scans of each of four people, all alike within a person, carry no more information than four scans.
def test_the_unit_is_the_subject() -> None:
    values = {"s0": 0.2, "s1": 0.5, "s2": 0.6, "s3": 0.9}
    once = lesion_dice([row(s, v, s) for s, v in values.items()])
    repeated = lesion_dice([row(f"{s}_{i}", v, s) for s, v in values.items() for i in range(10)])
    pretended = lesion_dice([row(f"{s}_{i}", v) for s, v in values.items() for i in range(10)])
    assert repeated["n"] == 40
    assert repeated["ci95_low"] == pytest.approx(once["ci95_low"], abs=1e-12)
    assert repeated["ci95_high"] == pytest.approx(once["ci95_high"], abs=1e-12)
    assert pretended["ci95_high"] - pretended["ci95_low"] < 0.5 * (once["ci95_high"] - once["ci95_low"])


def test_no_interval_below_two_subjects() -> None:
    one = lesion_dice([row("scan1", 0.5, "s"), row("scan2", 0.7, "s"), row("other", None, status="empty")])
    assert (one["ci95_low"], one["ci95_high"]) == (None, None)
    assert one["mean"] == pytest.approx(0.6)
    none = lesion_dice([row("a", None, status="empty"), row("b", None, status="empty")])
    assert [none[key] for key in ("n", "n_empty", "mean", "median", "ci95_low", "ci95_high")] == [0, 2, *[None] * 4]


# lesion 0.6 and 0.8, mean 0.7; core 0.1; rim never there: mean over labels (0.7 + 0.1) / 2.
def test_mean_over_labels() -> None:
    rows = [
        row("a", 0.6),
        row("b", 0.8),
        row("a", 0.1, label="core"),
        row("b", None, label="core", status="empty"),
        row("a", None, label="rim", status="empty"),
        row("b", None, label="rim", status="empty"),
    ]
    summary = summarise(rows)
    entry = summary["mean_over_labels"]["dice"]
    assert entry["mean"] == entry["median"] == pytest.approx(0.4)
    assert (entry["n"], entry["n_empty"]) == (3, 3)
    assert entry["ci95_low"] <= 0.4 <= entry["ci95_high"]
    assert list(summary["labels"]) == ["core", "lesion", "rim"]
    assert (summary["n_cases"], summary["n_subjects"]) == (2, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("nan"), "0.8", True])
def test_refuses_what_is_no_finite_number(value, tmp_path) -> None:
    rows = [row("a", 0.5), row("patient_7", value)]
    with pytest.raises(DataError, match="case patient_7, label lesion: dice"):
        summarise(rows)
    with pytest.raises(DataError, match="patient_7"):
        write_per_case_csv(rows, tmp_path / "per_case.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([row("a", 0.5), row("a", 0.5)], "case a, label lesion: two rows"),
        ([row("a", 0.5), row("b", 0.5, nsd=1.0)], "case b, label lesion: key nsd"),
        ([{"case": "a", "label": "lesion", "dice": 0.5}], "key subject"),
        ([{"case": "a", "subject": None, "label": "lesion", "dice": 0.5}], "subject is None"),
    ],
    ids=["empty", "twice", "other keys", "no subject key", "no subject"],
)
def test_refuses_rows_that_do_not_fit(rows, message) -> None:
    with pytest.raises(DataError, match=message):
        summarise(rows)


def test_real_rows_pass_through(tmp_path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"case": f"c{i}", "subject": f"s{i // 2}", **result}
        for i in range(4)
        for result in segmentation_metrics(
            rng.integers(0, 2, (6, 6, 6)), rng.integers(0, 2, (6, 6, 6)), (0.7, 0.7, 3.0), {1: "lesion", 2: "core"}
        )
    ]
    summary = summarise(rows)
    assert summary["labels"]["lesion"]["hd95_mm"]["n"] == 4
    assert summary["labels"]["core"]["dice"]["n_empty"] == 4
    write_per_case_csv(rows, tmp_path / "new" / "per_case.csv")
    table = pd.read_csv(tmp_path / "new" / "per_case.csv")
    assert list(table.columns) == list(rows[0])
    for column in table.columns:
        expected = pd.Series([r[column] for r in rows])
        if table[column].dtype.kind in "if":
            np.testing.assert_array_equal(table[column], expected.astype(float))
        else:
            assert list(table[column]) == list(expected)
    write_summary_json(summary, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary


@settings(max_examples=15, deadline=None)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False) | st.none(), min_size=1, max_size=8))
def test_csv_keeps_every_digit_and_none(values, tmp_path_factory) -> None:
    path = tmp_path_factory.mktemp("csv") / "per_case.csv"
    write_per_case_csv([row(f'c{i}, "x"', v) for i, v in enumerate(values)], path)
    table = pd.read_csv(path, dtype={"dice": float})
    assert [None if math.isnan(v) else v for v in table["dice"]] == values
    assert list(table["case"]) == [f'c{i}, "x"' for i in range(len(values))]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "per_case.csv"
    write_per_case_csv([row("a", 0.5)], path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipelines.files.os.fsync", full)
    with pytest.raises(ResourceError, match="No space left"):
        write_per_case_csv([row("a", 0.6)], path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_json_refuses_nan(tmp_path) -> None:
    with pytest.raises(DataError, match=r"summary\.json"):
        write_summary_json({"mean": float("nan")}, tmp_path / "summary.json")
    assert list(tmp_path.iterdir()) == []


def test_table() -> None:
    text = format_table(summarise([*ROWS, row("a", None, label="core", status="empty")]))
    lines = text.splitlines()
    assert text.isascii()
    assert "nan" not in text.lower()
    assert " ".join(lines[0].split()) == "label metric n missed false alarm empty mean 95 % interval median"
    assert lines[2].split() == ["core", "dice", "0", "0", "0", "1", "-", "-", "-"]
    assert lines[3].split()[:7] == ["lesion", "dice", "5", "1", "1", "1", "0.480"]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert "6 cases of 6 subjects" in text
    assert "2000 resamples of subjects, seed 0" in text
    assert "HD95 the image diagonal" in text


# Another task's figures have no missed label: no status column, no Dice and no footnote about it.
def test_rows_without_status() -> None:
    rows = [{"case": case, "subject": case, "label": "brain", "ssim": 0.9} for case in "ab"]
    summary = summarise(rows)
    assert summary["labels"]["brain"]["ssim"]["n_missed"] == 0
    assert "Dice" not in format_table(summary)
