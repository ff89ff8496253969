"""Mean ranks and paired differences of methods: by hand, properties, beside the comparison of two runs; refusals."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from pipelines.metrics.comparison import compare_runs
from pipelines.metrics.ranks import MEAN_RANK, compare_methods, mean_ranks
from pipelines.metrics.statistics import holm
from transforms.errors import DataError, UsageError

UP = {"ssim": True, "seam": False}

#            ssim, higher is better        seam, lower is better      ranks, subject a: ssim 1 2 3, seam 1 2.5 2.5
#            ours   mean   max             ours   mean   max                 subject b: ssim 2 3 1, seam 1 3 2
# a          0.9    0.8    0.7             0.1    0.3    0.3
# b          0.8    0.5    0.9             0.0    0.4    0.2
BY_HAND = {
    "ssim": {"ours": {"a": 0.9, "b": 0.8}, "mean": {"a": 0.8, "b": 0.5}, "max": {"a": 0.7, "b": 0.9}},
    "seam": {"ours": {"a": 0.1, "b": 0.0}, "mean": {"a": 0.3, "b": 0.4}, "max": {"a": 0.3, "b": 0.2}},
}


def drawn(n_subjects: int = 12, seed: int = 0, advantage: float = 0.0) -> dict:
    """Three methods; the first is better by ``advantage`` standard deviations in every figure."""
    random = np.random.default_rng(seed)
    values: dict = {}
    for figure, higher in UP.items():
        for index, method in enumerate(("ours", "mean", "max")):
            noise = random.normal(size=n_subjects) + (advantage * (1 if higher else -1) if index == 0 else 0)
            values.setdefault(figure, {})[method] = {f"s{k:02d}": float(v) for k, v in enumerate(noise)}
    return values


# ---- mean ranks ----------------------------------------------------------------------------------------------------


def test_ranks_by_hand() -> None:
    rows = mean_ranks(BY_HAND, UP)
    assert [row["method"] for row in rows] == ["ours", "max", "mean"]
    assert [row["mean_rank"] for row in rows] == [(1 + 1 + 2 + 1) / 4, (3 + 2.5 + 1 + 2) / 4, (2 + 2.5 + 3 + 3) / 4]
    assert [row["by_figure"] for row in rows] == [
        {"ssim": 1.5, "seam": 1}, {"ssim": 2, "seam": 2.25}, {"ssim": 2.5, "seam": 2.75},
    ]  # fmt: skip
    assert all((row["n"], row["n_subjects"]) == (4, 2) for row in rows)
    # Two subjects: nothing but aa, ab, bb can be drawn. Ours: 1 (a), 1.25, 1.5 (b).
    assert (rows[0]["ci95_low"], rows[0]["ci95_high"]) == (1, 1.5)


def test_a_direction_turned_round_turns_the_ranks_round() -> None:
    plain, turned = (mean_ranks({"ssim": BY_HAND["ssim"]}, {"ssim": higher}) for higher in (True, False))
    ranks = {row["method"]: row["mean_rank"] for row in plain}
    assert {row["method"]: 4 - row["mean_rank"] for row in turned} == ranks


# b has no SSIM by any method: a's ranks 1 2 3 remain for SSIM; a subject without any value is counted out.
def test_what_has_no_value_is_left_out_and_counted() -> None:
    values = copy.deepcopy(BY_HAND)
    for method in values["ssim"]:
        values["ssim"][method]["b"] = None
        values["ssim"][method]["c"] = values["seam"][method]["c"] = None
    ours = mean_ranks(values, UP)[0]
    assert ours["mean_rank"] == 1
    assert (ours["n"], ours["n_subjects"]) == (3, 2)
    one = {figure: {method: {"a": own["a"]} for method, own in of.items()} for figure, of in BY_HAND.items()}
    assert mean_ranks(one, UP)[0]["ci95_low"] is None
    values["seam"] = {method: dict.fromkeys(own) for method, own in values["seam"].items()}
    assert mean_ranks(values, UP)[0]["by_figure"] == {"ssim": 1, "seam": None}


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 6))
def test_ranks_share_out_and_ignore_scales_and_the_order_of_subjects(seed: int, n: int) -> None:
    values = drawn(n, seed)
    rows = mean_ranks(values, UP, n_resamples=50)
    assert sum(row["mean_rank"] for row in rows) == pytest.approx(6)
    assert all(row["ci95_low"] <= row["mean_rank"] <= row["ci95_high"] for row in rows)
    bent = {
        figure: {m: {s: float(np.exp(v)) for s, v in reversed(own.items())} for m, own in of.items()}
        for figure, of in values.items()
    }
    assert mean_ranks(bent, UP, n_resamples=50) == rows


def test_mean_ranks_are_those_of_friedman() -> None:
    values = {"ssim": drawn()["ssim"]}
    rows = {row["method"]: row["mean_rank"] for row in mean_ranks(values, UP)}
    columns = [list(own.values()) for own in values["ssim"].values()]
    n, k = len(columns[0]), len(columns)
    statistic = 12 * n / (k * (k + 1)) * sum((rank - (k + 1) / 2) ** 2 for rank in rows.values())
    assert statistic == pytest.approx(stats.friedmanchisquare(*columns).statistic)


def test_the_bootstrap_repeats_itself() -> None:
    assert mean_ranks(drawn(), UP, seed=4) == mean_ranks(drawn(), UP, seed=4)
    assert mean_ranks(drawn(), UP, seed=4) != mean_ranks(drawn(), UP, seed=5)


def test_a_planted_winner_is_found_and_noise_is_not() -> None:
    best = mean_ranks(drawn(advantage=20), UP)[0]
    assert (best["method"], best["mean_rank"], best["ci95_low"], best["ci95_high"]) == ("ours", 1, 1, 1)
    won = compare_methods(drawn(advantage=20), UP, "ours")
    assert all(row["p_holm"] < 0.05 and row["ci95_low"] * row["ci95_high"] > 0 for row in won)
    noise = compare_methods(drawn(), UP, "ours")
    assert all(row["p_holm"] > 0.05 for row in noise)


# ---- paired differences --------------------------------------------------------------------------------------------


# Ours - mean: SSIM 0.1 and 0.3, seam -0.2 and -0.4; ranks -1, -1 in SSIM and -1.5, -2 in seam.
def test_differences_by_hand() -> None:
    rows = {(row["figure"], row["other"]): row for row in compare_methods(BY_HAND, UP, "ours")}
    assert list(rows) == [(figure, other) for figure in (MEAN_RANK, "ssim", "seam") for other in ("mean", "max")]
    assert rows["ssim", "mean"]["difference"] == pytest.approx(0.2)
    assert rows["ssim", "mean"]["mean_chosen"] == pytest.approx(0.85)
    assert rows["ssim", "mean"]["mean_other"] == pytest.approx(0.65)
    assert rows["seam", "mean"]["difference"] == pytest.approx(-0.3)
    rank = rows[MEAN_RANK, "mean"]
    assert (rank["mean_chosen"], rank["mean_other"], rank["difference"]) == (1.25, 2.625, -1.375)
    assert (rank["n"], rank["n_subjects"]) == (4, 2)
    assert (rank["ci95_low"], rank["ci95_high"]) == (-1.5, -1.25)


def test_a_figure_is_compared_as_two_runs_are() -> None:
    values = drawn()
    rows = compare_methods(values, UP, "mean", seed=3)
    runs = [
        [{"case": s, "subject": s, "label": "head", "ssim": value} for s, value in values["ssim"][method].items()]
        for method in ("max", "mean")
    ]
    expected = compare_runs(*runs, seed=3)[0]
    found = next(row for row in rows if (row["figure"], row["other"]) == ("ssim", "max"))
    for key in ("n", "n_subjects", "difference", "ci95_low", "ci95_high", "p"):
        assert found[key] == expected[key]
    assert [row["p_holm"] for row in rows] == pytest.approx(holm([row["p"] for row in rows]))
    assert min(row["p_holm"] / row["p"] for row in rows) >= 1


def test_a_method_compared_with_its_copy_differs_by_nothing() -> None:
    values = drawn()
    for of in values.values():
        of["copy"] = dict(of["ours"])
    rows = [row for row in compare_methods(values, UP, "ours") if row["other"] == "copy"]
    assert all((row["difference"], row["ci95_low"], row["ci95_high"], row["p"]) == (0, 0, 0, 1) for row in rows)


# ---- refusals ------------------------------------------------------------------------------------------------------


def changed(figure: str, method: str, subject: str, value: object) -> dict:
    values = copy.deepcopy(BY_HAND)
    values[figure][method][subject] = value
    return values


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        (changed("ssim", "max", "b", None), DataError, "subject b: ssim of max cannot be ranked"),
        (changed("seam", "ours", "a", float("nan")), DataError, "subject a: seam of ours cannot be ranked"),
        (changed("ssim", "max", "c", 0.5), DataError, "ranks: ssim of max"),
        (BY_HAND | {"ssim": {"ours": BY_HAND["ssim"]["ours"]}}, DataError, "1 methods"),
        (BY_HAND | {"seam": BY_HAND["seam"] | {"pca": {"a": 1, "b": 1}}}, DataError, "ranks: seam of pca"),
        ({}, DataError, "0 methods"),
        ({"ssim": {"ours": {"a": None}, "mean": {"a": None}}}, DataError, "no figure has a value"),
        ({"ssim": {"ours": {}, "mean": {}}}, DataError, "no figure has a value"),
        (BY_HAND | {"psnr": BY_HAND["ssim"]}, UsageError, "figure psnr"),
        ({MEAN_RANK: BY_HAND["ssim"]}, UsageError, "figure mean_rank"),
    ],
)
def test_values_that_cannot_be_ranked_are_refused(values: dict, error: type, match: str) -> None:
    for refused in (lambda: mean_ranks(values, UP), lambda: compare_methods(values, UP, "ours")):
        with pytest.raises(error, match=match):
            refused()


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UsageError, match="method 'our'"):
        compare_methods(BY_HAND, UP, "our")
