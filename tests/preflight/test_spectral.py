"""The spectral axis and its cut: hand-derived segments, filters that cross and that do not, planted failures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import convolve1d

sys.path.append(str(Path(__file__).parent))
from planted import Proof
from proof_network import found
from proof_spectral import ALL_BANDS, BANDS, PROOFS, WN, cores, derivative_across, derivative_per_segment, unit

from pipelines.preflight import CannotRun
from pipelines.preflight.spectral import (
    RULES,
    bad_axis,
    centres_off_grid,
    crossing_filters,
    other_grids,
    segments,
)

LIMITS = {"step": 1.5, "crossing": 0.001}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_a_planted_failure_is_found_and_a_healthy_run_passes(proof: Proof) -> None:
    findings = proof.planted()
    assert len(findings) == 3
    assert {(finding.rule, finding.severity) for finding in findings} == {("R15", "error")}
    assert proof.healthy() == []


@pytest.mark.parametrize(
    ("axis", "starts"),
    [
        ([1, 2, 3, 5, 6, 7], [0, 3]),  # a step of 2 among steps of 1
        ([7, 6, 5, 3, 2, 1], [0, 3]),
        ([1, 2, 3, 4.4, 5.4, 6.4], [0]),  # 1.4 medians are no cut
        ([1, 2, 3, 4.6, 5.6, 6.6], [0, 3]),  # 1.6 are
        ([1, 2, 3, 9, 10, 11, 20, 21, 22], [0, 3, 6]),
        ([1, 2, 3, 2.5, 3.5, 4.5], [0, 3]),  # two spectrometers that overlap
        ([5], [0]),
    ],
)
def test_segments(axis: list[float], starts: list[int]) -> None:
    parts = segments(np.array(axis, float))
    assert [part.start for part in parts] == starts
    assert [part.stop for part in parts] == [*starts[1:], len(axis)]


def smooth(spectrum: np.ndarray) -> np.ndarray:
    return convolve1d(spectrum, np.ones(5) / 5)


@pytest.mark.parametrize(
    ("chain", "crosses"),
    [
        (derivative_across, True),
        (derivative_per_segment, False),
        (smooth, True),
        (unit, False),  # couples all channels, but by one factor
        (lambda x: x, False),
        (lambda x: np.concatenate([smooth(x[part]) for part in segments(WN)]), False),
        (lambda x: x - x.mean(), True),  # the mean over both sides: what is taken off is no factor
        (lambda x: x * 0, False),
    ],
    ids=["derivative", "per segment", "smoothing", "unit length", "nothing", "smoothed parts", "mean", "zero"],
)
def test_whether_a_filter_crosses_is_measured(chain: Callable, crosses: bool) -> None:
    findings = crossing_filters("f", chain, WN, LIMITS)
    assert len(findings) == crosses
    assert all("between 1348 and 1492 cm^-1" in finding.what for finding in findings)


def test_an_axis_without_a_cut_lets_every_filter_pass() -> None:
    assert crossing_filters("f", derivative_across, np.arange(900.0, 1300.0, 4.0), LIMITS) == []


def test_a_filter_with_other_channels_cannot_be_judged() -> None:
    with pytest.raises(CannotRun, match="returns 32 values for 191 channels"):
        crossing_filters("sinc", lambda x: x[:32], WN, LIMITS)


def test_centres() -> None:
    assert centres_off_grid(BANDS, WN, LIMITS) == []
    (finding,) = centres_off_grid(ALL_BANDS, WN, LIMITS)
    assert "1450, 1395" in finding.what
    # segments end at 1348 and 1800; half a step of 4 further is still there
    assert centres_off_grid([1350, 1802, 898, 1490], WN, LIMITS) == []
    assert "1350.5, 1802.5" in centres_off_grid([1350.5, 1802.5], WN, LIMITS)[0].what


def test_channels_and_axis() -> None:
    assert bad_axis(np.array([1.0, 2, 3]), 3, 3) == []
    assert bad_axis(np.array([3.0, 2, 1]), 3, 3) == []
    assert len(bad_axis(np.array([1.0, 2, 3]), 3, 4)) == 1
    assert len(bad_axis(np.array([1.0, 2, 3]), 4, 4)) == 1
    for axis in ([1.0, 3, 2], [1.0, 1, 2], [1.0, np.nan, 3]):
        (finding,) = bad_axis(np.array(axis), 3, 3)
        assert finding.source == "data"


def test_cases_on_another_grid() -> None:
    axes = {"a": WN, "b": WN + 0.4, "c": WN + 0.6, "d": WN[:-1]}
    (finding,) = other_grids(axes, 0.5)
    assert finding.cases == ("d", "c")
    assert other_grids({"a": WN, "b": WN + 0.4}, 0.5) == []


def test_what_is_lacking_is_said() -> None:
    lacking = replace(cores(derivative_per_segment), extra={})
    for name, what in (
        ("spectral axis", "in_channels"),
        ("filters across a cut", "spectral_filters"),
        ("centres of filters", "filter_centres"),
    ):
        with pytest.raises(CannotRun, match=what):
            found(RULES, "R15", lacking, name)
    without = cores(derivative_per_segment)
    without.train.cases[0].pop("wn")
    without.train.cases[1].pop("wn")
    with pytest.raises(CannotRun, match="wavenumbers"):
        found(RULES, "R15", without, "centres of filters")
