"""Bootstrap, signed ranks, Holm and the comparison of two runs: by hand, beside SciPy, and by simulation."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.metrics.comparison import compare_runs
from pipelines.metrics.statistics import bca_interval, draw_subjects, holm, resampled_means, signed_rank_p
from pipelines.reports.comparison import format_comparison
from transforms.errors import DataError


def split(values, n_resamples: int = 2000, seed: int = 0) -> tuple[float, np.ndarray, np.ndarray]:
    """The mean of one value per subject, without each subject, and in each resample."""
    n = len(values)
    _, means = resampled_means([[float(v)] for v in values], draw_subjects(n, n_resamples, seed))
    return float(means[0]), means[1 : 1 + n], means[1 + n :]


# ---- the bootstrap -------------------------------------------------------------------------------------------------


# Subject a has the values 1 and 2, b none, c 6: mean 3; without a 6, without b 3, without c 1.5. Drawing a, a, c gives
# (1 + 2 + 1 + 2 + 6) / 5, drawing b three times no value at all.
def test_means_by_hand() -> None:
    mean, means = resampled_means([[1.0, 2.0], [], [6.0]], np.array([[2.0, 0, 1], [0, 3, 0]]))
    assert mean == 3
    assert means[:5].tolist() == pytest.approx([3, 6, 3, 1.5, 12 / 5])
    assert math.isnan(means[5])


def test_every_resample_draws_n_subjects() -> None:
    draws = draw_subjects(7, 500, seed=3)
    assert (draws.sum(axis=1) == 7).all()
    assert draws.mean(axis=0) == pytest.approx(np.ones(7), abs=0.2)


@pytest.mark.parametrize(
    "values", [np.random.default_rng(0).exponential(1, 25), np.array([58, 51, 54, 6, 60, 45, 3, 7]) / 64]
)
def test_bca_equals_scipy_on_the_same_resamples(values) -> None:
    estimate, leave_one_out, _ = split(values)
    result = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=3000, rng=np.random.default_rng(1))
    low, high = bca_interval(estimate, leave_one_out, result.bootstrap_distribution)
    assert (low, high) == pytest.approx(tuple(result.confidence_interval), rel=1e-9)


# z0 by hand: 3 of 4 resamples lie below, z0 = 0.6745; equal leave-one-out values: a = 0. The upper limit is at
# Phi(2 * 0.6745 + 1.96) = 0.99953, the lower at Phi(2 * 0.6745 - 1.96) = 0.2706 of 0, 1, 2, 10: 3 * 0.2706 = 0.812.
def test_bias_by_hand() -> None:
    low, high = bca_interval(3.0, np.array([3.0, 3.0]), np.array([0.0, 1.0, 2.0, 10.0]))
    assert low == pytest.approx(3 * stats.norm.cdf(2 * stats.norm.ppf(0.75) - 1.959964), abs=1e-5)
    assert low == pytest.approx(0.812, abs=1e-3)
    assert high == pytest.approx(10, abs=0.02)


def test_a_long_tail_moves_the_interval_towards_the_tail() -> None:
    values = np.random.default_rng(2).lognormal(0, 1, 40)
    estimate, leave_one_out, resampled = split(values)
    low, high = bca_interval(estimate, leave_one_out, resampled)
    percentile = np.percentile(resampled, [2.5, 97.5])
    assert low > percentile[0]
    assert high > percentile[1]
    mirrored = bca_interval(*split(-values))
    assert mirrored == pytest.approx((-high, -low))


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9),
    scale=st.sampled_from([1e-200, 1e-3, 7.0, 1e9]),
)
def test_limits_are_resampled_means_and_follow_the_unit(values, scale) -> None:
    estimate, leave_one_out, resampled = split(values, 300)
    low, high = bca_interval(estimate, leave_one_out, resampled)
    assert min(resampled) <= low <= high <= max(resampled)
    scaled = bca_interval(estimate * scale, leave_one_out * scale, resampled * scale)
    assert scaled == pytest.approx((low * scale, high * scale), rel=1e-6, abs=1e-9 * scale)


def test_degenerate_samples() -> None:
    assert bca_interval(*split([0.3] * 5)) == (0.3, 0.3)
    outside = bca_interval(5.0, np.array([4.0, 5.0, 6.5]), np.array([1.0, 2.0, 3.0, math.nan]))
    assert outside == (pytest.approx(3.0, abs=1e-3), 3.0)


# With four subjects the sample itself is drawn in 24 of 256 resamples. A rounding error below it is a tie, not a bias.
def test_a_rounding_error_is_no_bias() -> None:
    estimate, leave_one_out, resampled = split([0.1, 0.7, 0.3, 0.8], 4000)
    tied = resampled == estimate
    assert tied.sum() > 300
    expected = bca_interval(estimate, leave_one_out, resampled)
    nudged = np.where(tied, np.nextafter(estimate, 0), resampled)
    assert bca_interval(estimate, leave_one_out, nudged) == pytest.approx(expected, abs=1e-12)


# 80 subjects of an exponential score, 1500 times: how often does the 95 % interval contain the true mean, 1? The
# percentile interval does so less often, and nearly all of its misses lie on one side, below the truth.
@pytest.mark.slow
def test_coverage_of_a_skewed_score() -> None:
    truth, n, trials = 1.0, 80, 1500
    covered, above = np.zeros(2), np.zeros(2)
    rng = np.random.default_rng(0)
    for seed in range(trials):
        estimate, leave_one_out, resampled = split(rng.exponential(1, n), 1000, seed)
        limits = np.array([bca_interval(estimate, leave_one_out, resampled), np.percentile(resampled, [2.5, 97.5])])
        covered += (limits[:, 0] <= truth) & (truth <= limits[:, 1])
        above += limits[:, 1] < truth
    bca, percentile = covered / trials
    assert bca == pytest.approx(0.95, abs=0.02)
    assert bca > percentile
    assert above[0] < 0.8 * above[1]


@pytest.mark.slow
def test_coverage_of_a_symmetric_score() -> None:
    rng = np.random.default_rng(1)
    inside = 0
    for seed in range(1000):
        low, high = bca_interval(*split(rng.normal(0, 1, 40), 1000, seed))
        inside += low <= 0 <= high
    assert inside / 1000 == pytest.approx(0.95, abs=0.025)


# ---- tests and corrections -----------------------------------------------------------------------------------------


def exact_signed_rank(differences: list[float]) -> float:
    """Two-sided p from all assignments of signs to the ranks."""
    ranks = stats.rankdata(np.abs(differences))
    half = ranks.sum() / 2
    observed = abs(ranks[np.array(differences) > 0].sum() - half)
    sums = [
        sum(rank for rank, sign in zip(ranks, signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=len(ranks))
    ]
    return float(np.mean([abs(value - half) >= observed - 1e-9 for value in sums]))


@pytest.mark.parametrize("n", [5, 8, 11])
def test_signed_rank_equals_all_assignments_of_signs(n) -> None:
    differences = np.random.default_rng(n).normal(0.5, 1, n)
    assert signed_rank_p(differences) == pytest.approx(exact_signed_rank(differences.tolist()))


# Five subjects, all better: of 2^5 assignments of signs two are as extreme, p = 2/32.
def test_signed_rank_by_hand_and_without_any_difference() -> None:
    assert signed_rank_p(np.array([0.1, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 32)
    assert signed_rank_p(np.array([0.1, 0.0, 0.2, 0.3, 0.4, 0.5])) == pytest.approx(2 / 32)
    assert signed_rank_p(np.zeros(4)) == 1.0


# 0.01, 0.02, 0.03, 0.04 by 4, 3, 2, 1: 0.04, 0.06, then 0.06 (not smaller than the one before) and 0.06.
def test_holm_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.05]) == [0.05]
    assert holm([]) == []


@settings(max_examples=30, deadline=None)
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_holm_is_between_no_correction_and_bonferroni(p) -> None:
    adjusted = holm(p)
    for raw, value in zip(p, adjusted, strict=True):
        assert raw <= value <= min(1, raw * len(p)) + 1e-15
    assert [adjusted[i] for i in np.argsort(p, kind="stable")] == sorted(adjusted)


# ---- two runs ------------------------------------------------------------------------------------------------------


def rows(dice: dict[str, float | None], label: str = "lesion", **more) -> list[dict]:
    return [
        {"case": case, "subject": case.split("_")[0], "label": label, "dice": value, **more}
        for case, value in dice.items()
    ]


A = {"s1": 0.5, "s2": 0.6, "s3": 0.7, "s4": None, "s5": 0.0, "s6": None, "s7": None}
B = {"s1": 0.6, "s2": 0.8, "s3": 0.7, "s4": None, "s5": None, "s6": 0.3, "s7": 0.4}


# Pairs: s1 to s3, differences .1, .2, 0: mean .1. s5 has a value in A only (a false alarm that B avoids),
# s6 and s7 in B only.
def test_comparison_by_hand() -> None:
    (row,) = compare_runs(rows(A), rows(B))
    assert (row["label"], row["metric"]) == ("lesion", "dice")
    assert [row[key] for key in ("n", "n_subjects", "n_only_a", "n_only_b", "n_neither")] == [3, 3, 1, 2, 1]
    assert [row[key] for key in ("mean_a", "mean_b", "difference")] == pytest.approx([0.6, 0.7, 0.1])
    assert 0 <= row["ci95_low"] <= 0.1 <= row["ci95_high"] <= 0.2 + 1e-12
    assert row["p"] == row["p_holm"] == pytest.approx(exact_signed_rank([0.1, 0.2]))


def test_a_constant_gain_has_an_interval_of_no_width() -> None:
    of_a = {f"s{i}": i / 64 for i in range(12)}
    (row,) = compare_runs(rows(of_a), rows({case: value + 0.25 for case, value in of_a.items()}))
    assert (row["difference"], row["ci95_low"], row["ci95_high"]) == (0.25, 0.25, 0.25)
    assert row["p"] < 0.001


# Cases differ by far more than the runs do: the paired interval excludes 0, two separate intervals would overlap.
def test_pairing_removes_the_spread_of_the_cases() -> None:
    rng = np.random.default_rng(0)
    of_a = {f"s{i}": float(v) for i, v in enumerate(rng.uniform(0.2, 0.9, 30))}
    of_b = {case: value + float(rng.normal(0.02, 0.02)) for case, value in of_a.items()}
    (row,) = compare_runs(rows(of_a), rows(of_b))
    assert 0.01 < row["ci95_low"] < row["difference"] < row["ci95_high"] < 0.04
    spread = np.std(list(of_a.values())) / math.sqrt(30)
    assert row["ci95_high"] - row["ci95_low"] < spread


def test_swapping_the_runs_mirrors_the_difference() -> None:
    forth, back = compare_runs(rows(A), rows(B))[0], compare_runs(rows(B), rows(A))[0]
    assert back["difference"] == pytest.approx(-forth["difference"])
    assert (back["p"], back["n_only_a"]) == (forth["p"], forth["n_only_b"])


# Ten scans of each of three subjects that moved alike are three observations, not thirty.
def test_the_unit_is_the_subject() -> None:
    gain = {"s1": 0.1, "s2": 0.2, "s3": 0.3}
    cases = {f"{subject}_{i}": value for subject, value in gain.items() for i in range(10)}
    (many,) = compare_runs(rows(dict.fromkeys(cases, 0.0)), rows(cases))
    (once,) = compare_runs(rows(dict.fromkeys(gain, 0.0)), rows(gain))
    assert (many["n"], many["n_subjects"]) == (30, 3)
    for key in ("difference", "ci95_low", "ci95_high", "p"):
        assert many[key] == pytest.approx(once[key])


def test_holm_runs_over_labels_and_metrics_and_order_is_irrelevant() -> None:
    rng = np.random.default_rng(3)
    runs = [
        [
            {
                "case": f"c{i}",
                "subject": f"c{i}",
                "label": label,
                "dice": float(rng.random()),
                "nsd": float(rng.random()),
            }
            for label in ("core", "lesion")
            for i in range(9)
        ]
        for _ in range(2)
    ]
    compared = compare_runs(*runs)
    assert [(row["label"], row["metric"]) for row in compared] == [
        ("core", "dice"),
        ("core", "nsd"),
        ("lesion", "dice"),
        ("lesion", "nsd"),
    ]
    assert [row["p_holm"] for row in compared] == holm([row["p"] for row in compared])
    shuffled = [random.Random(1).sample(run, len(run)) for run in runs]
    assert compare_runs(*shuffled) == compared
    only = compare_runs(*runs, metrics=["nsd"])
    assert [row["metric"] for row in only] == ["nsd", "nsd"]


def test_too_few_subjects_have_no_interval() -> None:
    (single,) = compare_runs(rows({"s1_1": 0.5, "s1_2": 0.6}), rows({"s1_1": 0.6, "s1_2": 0.6}))
    assert single["difference"] == pytest.approx(0.05)
    assert [single[key] for key in ("ci95_low", "ci95_high", "p", "p_holm")] == [None] * 4
    (nothing,) = compare_runs(rows({"s1": None}), rows({"s1": 0.4}))
    assert (nothing["n"], nothing["n_only_b"], nothing["difference"]) == (0, 1, None)


@pytest.mark.parametrize(
    ("of_b", "message"),
    [
        (rows({"s1": 0.1}), "only run A has case s2, label lesion"),
        (rows({"s1": 0.1, "s2": 0.1, "s3": 0.1}), "only run B has case s3, label lesion"),
        (rows({"s1": 0.1}) + rows({"s2": 0.1}, label="core"), "only run A has case s2, label lesion"),
        ([{**row, "subject": "x"} for row in rows({"s1": 0.1, "s2": 0.1})], "case s1: subject s1 in run A, x in run B"),
        (rows({"s1": 0.1, "s2": 0.1}, nsd=1.0), "nsd cannot be compared"),
    ],
)
def test_refuses_runs_that_differ(of_b, message) -> None:
    with pytest.raises(DataError, match=message):
        compare_runs(rows({"s1": 0.1, "s2": 0.2}), of_b)


def test_names_at_most_five_cases_and_the_metric_that_is_missing() -> None:
    many = rows({f"s{i}": 0.1 for i in range(9)})
    with pytest.raises(DataError, match="case s5, label lesion and 3 more"):
        compare_runs(many, many[:1])
    with pytest.raises(DataError, match="hd95_mm cannot be compared"):
        compare_runs(many, many, metrics=["dice", "hd95_mm"])
    with pytest.raises(DataError, match="no metric cannot be compared"):
        compare_runs(many, many, metrics=[])


def test_table() -> None:
    lines = format_comparison(compare_runs(rows(A), rows(B)), "fold 0", "fold 0, tuned").splitlines()
    assert lines[0].split()[:4] == ["label", "metric", "n", "subjects"]
    assert lines[2].split()[:7] == ["lesion", "dice", "3", "3", "0.600", "0.700", "+0.100"]
    assert "A: fold 0; B: fold 0, tuned." in lines[3]
    assert lines[4] == "lesion, dice: no pair in 1 cases with a value in A only, 2 in B only."
    empty = format_comparison(compare_runs(rows({"s1": None}), rows({"s1": None}))).splitlines()
    assert empty[2].split() == ["lesion", "dice", "0", "0", *["-"] * 6]
