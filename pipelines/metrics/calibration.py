"""Does a probability of 0.8 mean right in 8 of 10 voxels? ECE, Brier score, reliability curve.

A cohort does not fit into memory, so each case leaves a fine histogram behind: voxels, true voxels and the sum of the
probabilities in each of 12600 bins of equal width, and three sums for the Brier score. Histograms add up over cases;
coarser bins, of equal width or of equal mass, are unions of fine ones and are chosen afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transforms.errors import DataError, UsageError

FINE_BINS = 12600
"""Divisible by every number up to 10, and by 12, 14, 15, 18, 20, 25, 30, 50 and 100."""

_BLOCK_VOXELS = 1 << 18


@dataclass(frozen=True)
class CalibrationCounts:
    """What one case, or several together, leave behind.

    Attributes:
        voxels: (FINE_BINS,) voxels whose probability p is in [i, i + 1) / FINE_BINS; the last bin includes 1. float64.
        positives: (FINE_BINS,) those of them that are foreground in the reference.
        probability: (FINE_BINS,) sum of p over the voxels.
        squared_error: sum of (p - y)^2 over all voxels, y = 1 in the foreground, else 0.
    """

    voxels: NDArray[np.float64]
    positives: NDArray[np.float64]
    probability: NDArray[np.float64]
    squared_error: float


@dataclass(frozen=True)
class ReliabilityCurve:
    """One entry per bin that has a voxel, in ascending order of probability.

    Attributes:
        probability: mean predicted probability, the abscissa; ``frequency``: share of foreground, the ordinate.
        voxels: how many, float64.
    """

    probability: NDArray[np.float64]
    frequency: NDArray[np.float64]
    voxels: NDArray[np.float64]


def count_calibration(
    probability: ArrayLike, reference: ArrayLike, mask: ArrayLike | None = None, case: str = ""
) -> CalibrationCounts:
    """Count one case, for one label.

    Args:
        probability: of the foreground, 0 to 1, any shape, floating.
        reference: bool or 0/1, same shape: is it foreground?
        mask: bool or 0/1, same shape; only voxels where it is not 0 count. A calibration over the air around a head is
            near perfect and says nothing.
        case: named in errors.

    Raises:
        DataError: different shapes; inside the mask, a probability outside [0, 1] or NaN, a reference that is not 0/1.
    """
    arrays = [np.asarray(probability), np.asarray(reference), *([] if mask is None else [np.asarray(mask)])]
    if len({array.shape for array in arrays}) != 1:
        raise DataError(
            f"case {case or 'unnamed'}: calibration",
            f"shapes of probability, reference and mask are {[array.shape for array in arrays]}; equal is expected",
            "bring the prediction to the grid of the reference, one label at a time",
        )
    flat = [array.reshape(-1) for array in arrays]
    histogram, total, squared_error = np.zeros(2 * FINE_BINS), np.zeros(FINE_BINS), 0.0
    for start in range(0, flat[0].size, _BLOCK_VOXELS):
        p, y, *kept = (array[start : start + _BLOCK_VOXELS] for array in flat)
        if kept:
            p, y = p[kept[0] != 0], y[kept[0] != 0]
        p = p.astype(np.float64)
        _check(p, y, case)
        fine = np.minimum((p * FINE_BINS).astype(np.int64), FINE_BINS - 1)
        histogram += np.bincount(fine + FINE_BINS * (y != 0), minlength=2 * FINE_BINS)
        total += np.bincount(fine, p, FINE_BINS)
        error = p - y
        squared_error += float(error @ error)
    negatives, positives = histogram.reshape(2, FINE_BINS)
    return CalibrationCounts(negatives + positives, positives, total, squared_error)


def pool_calibration(counts: Iterable[CalibrationCounts]) -> CalibrationCounts:
    """Add the counts of several cases: every voxel counts the same, so a large case counts more than a small one.

    Raises:
        UsageError: there are none.
    """
    parts = list(counts)
    if not parts:
        raise UsageError("calibration: nothing to pool", "0 counts, at least 1 expected", "count one case at least")
    return CalibrationCounts(
        np.sum([part.voxels for part in parts], axis=0),
        np.sum([part.positives for part in parts], axis=0),
        np.sum([part.probability for part in parts], axis=0),
        float(sum(part.squared_error for part in parts)),
    )


def reliability_curve(counts: CalibrationCounts, n_bins: int = 15, equal_mass: bool = False) -> ReliabilityCurve:
    """Return mean probability and frequency of the foreground in coarser bins; bins without a voxel are left out.

    Args:
        counts: of one case or pooled.
        n_bins: bins [k, k + 1) / n_bins, the last one with 1; or, with ``equal_mass``, bins of n / n_bins voxels.
        equal_mass: each fine bin goes whole to the bin of equal mass that its middle voxel falls in. Voxels whose
            probabilities are equal, or closer than 1 / FINE_BINS, therefore stay together, and a crowd of them (the
            sure background) may leave fewer than ``n_bins`` bins.

    Raises:
        UsageError: ``n_bins`` below 1, or, for bins of equal width, no divisor of FINE_BINS.
    """
    if n_bins < 1 or (not equal_mass and FINE_BINS % n_bins):
        raise UsageError(
            f"calibration: {n_bins} bins",
            f"a divisor of {FINE_BINS} is expected",
            "take 10, 15, 20, 25, 50 or 100 bins",
        )
    if equal_mass:
        middle = np.cumsum(counts.voxels) - counts.voxels / 2
        coarse = np.minimum((middle / max(counts.voxels.sum(), 1) * n_bins).astype(np.int64), n_bins - 1)
    else:
        coarse = np.arange(FINE_BINS) // (FINE_BINS // n_bins)
    voxels, positives, total = np.zeros((3, n_bins))
    for coarser, finer in ((voxels, counts.voxels), (positives, counts.positives), (total, counts.probability)):
        np.add.at(coarser, coarse, finer)
    kept = voxels > 0
    return ReliabilityCurve(total[kept] / voxels[kept], positives[kept] / voxels[kept], voxels[kept])


def calibration_figures(counts: CalibrationCounts, n_bins: int = 15) -> dict[str, float | int | None]:
    """Return the figures of calibration.

    With n voxels, K bins of n_k voxels, mean probability p_k and frequency y_k, and the overall frequency y:

    - ``ece`` = sum n_k / n |y_k - p_k| over bins of equal width (Naeini et al. 2015; Guo et al. 2017, equation 3);
      ``ece_equal_mass``: over bins of equal mass (Nixon et al. 2019), which no crowd at probability 0 can hide.
    - ``brier`` = mean (p - y)^2 (Brier 1950), exact, and its decomposition over the bins of equal width (Murphy 1973):
      ``reliability`` = sum n_k / n (p_k - y_k)^2, ``resolution`` = sum n_k / n (y_k - y)^2, ``uncertainty`` =
      y (1 - y); ``within_bins`` is what is lost by binning (Stephenson et al. 2008), so that
      brier = reliability - resolution + uncertainty + within_bins.

    Returns:
        ``n_voxels``, ``prevalence`` (y), ``mean_probability`` and the above; all but ``n_voxels`` None without a voxel.

    Raises:
        UsageError: as :func:`reliability_curve`.
    """
    curve, by_mass = reliability_curve(counts, n_bins), reliability_curve(counts, n_bins, equal_mass=True)
    n = counts.voxels.sum()
    names = ("prevalence", "mean_probability", "ece", "ece_equal_mass", "brier", "reliability", "resolution")
    if not n:
        return {"n_voxels": 0, **dict.fromkeys((*names, "uncertainty", "within_bins"))}
    prevalence, brier = counts.positives.sum() / n, counts.squared_error / n
    weight = curve.voxels / n
    reliability = weight @ (curve.probability - curve.frequency) ** 2
    resolution = weight @ (curve.frequency - prevalence) ** 2
    uncertainty = prevalence * (1 - prevalence)
    values = (prevalence, counts.probability.sum() / n, _ece(curve), _ece(by_mass), brier, reliability, resolution)
    figures: dict[str, float | int | None] = {"n_voxels": int(n)}
    figures |= {name: float(value) for name, value in zip(names, values, strict=True)}
    figures["uncertainty"] = float(uncertainty)
    figures["within_bins"] = float(brier - (reliability - resolution + uncertainty))
    return figures


def _ece(curve: ReliabilityCurve) -> float:
    return float(curve.voxels @ np.abs(curve.frequency - curve.probability) / curve.voxels.sum())


def _check(probability: NDArray[np.float64], reference: NDArray[Any], case: str) -> None:
    if not (probability.min(initial=0) >= 0 and probability.max(initial=1) <= 1):
        raise DataError(
            f"case {case or 'unnamed'}: calibration needs probabilities",
            f"from {probability.min()} to {probability.max()}, expected 0 to 1 and no NaN",
            "apply the softmax or the sigmoid first",
        )
    if not np.array_equal(reference != 0, reference):
        raise DataError(
            f"case {case or 'unnamed'}: calibration: the reference is not binary",
            f"from {reference.min()} to {reference.max()}, expected 0 and 1",
            "take one label at a time: reference == label",
        )
