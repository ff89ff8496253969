"""Calibration: by hand, beside loops over voxels, and added up over cases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.metrics.calibration import (
    FINE_BINS,
    calibration_figures,
    count_calibration,
    pool_calibration,
    reliability_curve,
)
from transforms.errors import DataError, UsageError


def figures(probability, reference, n_bins: int = 10, **options) -> dict:
    return calibration_figures(count_calibration(np.asarray(probability), np.asarray(reference), **options), n_bins)


# Ten bins. Bin [.2, .3): .2 .2 .2 .2, one of four true: |.25 - .2| = .05. Bin [.9, 1]: .9 and 1., both true:
# |1 - .95| = .05. ECE = 4/6 * .05 + 2/6 * .05 = .05.
# Brier: (3 * .2^2 + .8^2 + .1^2 + 0) / 6 = .77 / 6. y = 3/6, uncertainty .25,
# reliability (4 * .05^2 + 2 * .05^2) / 6 = .0025, resolution (4 * .25^2 + 2 * .5^2) / 6 = .125.
HAND = np.array([0.2, 0.2, 0.2, 0.2, 0.9, 1.0])
HAND_TRUTH = np.array([0, 0, 0, 1, 1, 1])


def test_by_hand() -> None:
    found = figures(HAND, HAND_TRUTH)
    assert found["n_voxels"] == 6
    assert found["prevalence"] == 0.5
    assert found["mean_probability"] == pytest.approx(2.7 / 6)
    assert found["ece"] == pytest.approx(0.05)
    assert found["brier"] == pytest.approx(0.77 / 6)
    assert (found["reliability"], found["resolution"]) == (pytest.approx(0.0025), pytest.approx(0.125))
    assert found["uncertainty"] == 0.25
    assert found["within_bins"] == pytest.approx(0.77 / 6 - 0.1275)
    curve = reliability_curve(count_calibration(HAND, HAND_TRUTH), 10)
    assert curve.probability.tolist() == pytest.approx([0.2, 0.95])
    assert curve.frequency.tolist() == [0.25, 1.0]
    assert curve.voxels.tolist() == [4, 2]


# Two bins of equal mass: .1 .2 .3 | .6 .7 .8, one true and two true: (|1/3 - .2| + |2/3 - .7|) / 2.
def test_equal_mass_by_hand() -> None:
    counts = count_calibration(np.array([0.6, 0.1, 0.8, 0.2, 0.7, 0.3]), np.array([1, 0, 1, 1, 0, 0]))
    curve = reliability_curve(counts, 2, equal_mass=True)
    assert curve.voxels.tolist() == [3, 3]
    assert calibration_figures(counts, 2)["ece_equal_mass"] == pytest.approx((1 / 3 - 0.2 + 0.7 - 2 / 3) / 2)


# 90 sure background voxels stay together; the ten others are not diluted by them in bins of equal width either.
def test_a_crowd_at_zero_stays_in_one_bin_of_equal_mass() -> None:
    counts = count_calibration(np.array([0.0] * 90 + [0.5] * 10), np.array([0] * 90 + [1] * 10))
    curve = reliability_curve(counts, 10, equal_mass=True)
    assert curve.voxels.tolist() == [90, 10]
    assert curve.frequency.tolist() == [0, 1]


def ece_by_loops(probability: np.ndarray, reference: np.ndarray, bins: list[np.ndarray]) -> float:
    return sum(
        len(members) * abs(reference[members].mean() - probability[members].mean()) for members in bins if len(members)
    ) / len(probability)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n_bins=st.sampled_from([5, 10, 15, 20]))
def test_equals_loops_over_voxels(seed: int, n_bins: int) -> None:
    rng = np.random.default_rng(seed)
    # Distinct probabilities, more than a fine bin apart: bins of equal mass are then those of the sorted voxels.
    probability = (rng.choice(FINE_BINS - 1, 600, replace=False) + rng.uniform(0.1, 0.9, 600)) / FINE_BINS
    reference = rng.random(600) < probability**1.5
    found = figures(probability.reshape(6, 10, 10), reference.reshape(6, 10, 10), n_bins)
    width = [np.flatnonzero((probability >= k / n_bins) & (probability < (k + 1) / n_bins)) for k in range(n_bins)]
    mass = np.array_split(np.argsort(probability), n_bins)
    assert found["ece"] == pytest.approx(ece_by_loops(probability, reference, width), abs=1e-12)
    assert found["ece_equal_mass"] == pytest.approx(ece_by_loops(probability, reference, mass), abs=1e-12)
    assert found["brier"] == pytest.approx(np.mean((probability - reference) ** 2), abs=1e-12)
    parts = found["reliability"] - found["resolution"] + found["uncertainty"] + found["within_bins"]
    assert parts == pytest.approx(found["brier"], abs=1e-12)


# Stephenson et al. 2008: the two terms that binning adds, the variance within the bins less twice the covariance.
def test_within_bins_is_variance_less_twice_the_covariance() -> None:
    rng = np.random.default_rng(1)
    probability = rng.random(500)
    reference = rng.random(500) < probability
    within = 0.0
    for k in range(10):
        p, y = (values[np.floor(probability * 10) == k].astype(float) for values in (probability, reference))
        within += ((p - p.mean()) ** 2).sum() - 2 * ((p - p.mean()) * (y - y.mean())).sum()
    assert figures(probability, reference)["within_bins"] == pytest.approx(within / 500)


def test_forecasts_of_one_value_per_bin_lose_nothing() -> None:
    rng = np.random.default_rng(0)
    probability = rng.integers(0, 10, 2000) / 10 + 0.05
    assert figures(probability, rng.random(2000) < probability)["within_bins"] == pytest.approx(0, abs=1e-12)


def test_calibrated_and_overconfident_predictions() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(200_000)
    reference = rng.random(200_000) < probability
    overconfident = np.clip(2 * probability - 0.5, 0, 1)
    honest, sure = figures(probability, reference), figures(overconfident, reference)
    assert honest["ece"] < 0.01
    assert honest["ece_equal_mass"] < 0.01
    assert sure["ece"] > 0.1
    assert sure["brier"] > honest["brier"]
    assert honest["resolution"] == pytest.approx(1 / 12, abs=0.003)  # the variance of a uniform frequency


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_cases_add_up_to_the_cohort(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cases = [(rng.random(size) ** 2, rng.random(size) < 0.3) for size in (50, 80, 5)]
    pooled = calibration_figures(pool_calibration(count_calibration(*case) for case in cases))
    whole = calibration_figures(count_calibration(*(np.concatenate(parts) for parts in zip(*cases, strict=True))))
    assert pooled == pytest.approx(whole, abs=1e-12)


def test_mask_blocks_dtype_and_inputs(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    probability, reference = rng.random((7, 8, 9)).astype(np.float32), rng.integers(0, 2, (7, 8, 9))
    mask = rng.random((7, 8, 9)) < 0.5
    before = probability.copy()
    expected = figures(probability[mask], reference[mask])
    outside = np.where(mask, probability, np.nan)
    assert figures(outside, reference, mask=mask) == expected
    monkeypatch.setattr("pipelines.metrics.calibration._BLOCK_VOXELS", 11)
    assert figures(probability, reference == 1, mask=mask.astype(np.uint8)) == pytest.approx(expected)
    np.testing.assert_array_equal(probability, before)


def test_no_voxel_has_no_figures() -> None:
    found = figures(np.ones((2, 2)), np.ones((2, 2)), mask=np.zeros((2, 2)))
    assert found.pop("n_voxels") == 0
    assert set(found) == set(figures(HAND, HAND_TRUTH)) - {"n_voxels"}
    assert set(found.values()) == {None}
    assert reliability_curve(count_calibration(np.zeros(0), np.zeros(0)), equal_mass=True).voxels.size == 0


@pytest.mark.parametrize(
    ("probability", "reference"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2))),
        (np.array([0.5, 1.01]), np.zeros(2)),
        (np.array([0.5, -0.01]), np.zeros(2)),
        (np.array([0.5, np.nan]), np.zeros(2)),
        (np.array([0.5, 0.5]), np.array([0, 2])),
    ],
    ids=["shapes", "above 1", "below 0", "NaN", "labels"],
)
def test_refuses_what_is_no_probability(probability, reference) -> None:
    with pytest.raises(DataError, match="case patient_7"):
        count_calibration(probability, reference, case="patient_7")


def test_refuses_bad_bins_and_an_empty_pool() -> None:
    counts = count_calibration(HAND, HAND_TRUTH)
    for options in ({"n_bins": 0}, {"n_bins": 11}, {"n_bins": 0, "equal_mass": True}):
        with pytest.raises(UsageError):
            reliability_curve(counts, **options)
    assert reliability_curve(counts, 11, equal_mass=True).voxels.sum() == 6
    with pytest.raises(UsageError):
        pool_calibration([])
