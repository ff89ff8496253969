"""Inference over subjects: the bootstrap with BCa intervals, the signed-rank test, and Holm's correction.

Subjects, not cases, are drawn: two scans of one person are not two observations. A statistic is a ratio of sums over
subjects (a mean of cases), so one vector of sums gives the estimate, every leave-one-out value and every resample.
BCa (Efron 1987) moves the percentiles for bias and skewness, which a percentile interval of a skewed score ignores.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]

LEVEL = 0.95
"""Of every interval in the project."""

_LARGEST_BIAS = 4.0


def draw_subjects(n_subjects: int, n_resamples: int, seed: int) -> Floats:
    """Return how often each subject is drawn in each resample, (n_resamples, n_subjects); every row sums to n."""
    draws = np.random.default_rng(seed).multinomial(n_subjects, [1 / n_subjects] * n_subjects, n_resamples)
    return draws.astype(np.float64)


def resampled_means(of_subject: Sequence[Sequence[float]], draws: Floats) -> tuple[float, Floats]:
    """Return the mean of all values, and the means of all, of all but each subject, and of each resample.

    Args:
        of_subject: the values of each of n subjects; some may have none, but not all.
        draws: (B, n), from :func:`draw_subjects`.

    Returns:
        The mean, and (1 + n + B,) means, NaN where no value is left.
    """
    # Exact rational arithmetic: the order of the values does not matter, and the mean of equal values is that value.
    mean = statistics.mean(value for values in of_subject for value in values)
    deviation = np.array([math.fsum(value - mean for value in values) for values in of_subject])
    count = np.array([len(values) for values in of_subject], np.float64)
    drawn = _resampled_sums(count, draws)
    means = np.where(drawn > 0, mean + _resampled_sums(deviation, draws) / np.maximum(drawn, 1), np.nan)
    return mean, means


def _resampled_sums(of_subject: Floats, draws: Floats) -> Floats:
    total = of_subject.sum()
    return np.concatenate(([total], total - of_subject, draws @ of_subject))


def bca_interval(estimate: float, leave_one_out: Floats, resampled: Floats) -> tuple[float, float]:
    """Return the bias-corrected and accelerated bootstrap interval (Efron 1987; Efron and Tibshirani 1993, 14.3).

    The bias z0 is the normal quantile of the share of resamples below the estimate, ties counted half; the acceleration
    a is the skewness of the leave-one-out values / 6 (equation 14.15).

    Degenerate cases: when all leave-one-out values are equal, a is 0; when all values are, the interval has no width.
    z0 is kept within +-4, so that an estimate outside all resamples has an interval; as |a| is at most 1/6, nothing is
    then divided by 0. Values that are not finite (a resample without any value) are left out. With few subjects, below
    about 20, any bootstrap interval is too short: it knows no value that was not drawn.

    Args:
        estimate: the statistic of all subjects.
        leave_one_out: (n,) the statistic without each subject.
        resampled: (B,) the statistic in each resample.
    """
    leave_one_out, resampled = (values[np.isfinite(values)] for values in (leave_one_out, resampled))
    # Sums in another order differ by a rounding error, which has a sign but no meaning.
    rounding = 1e-12 * max(abs(estimate), np.abs(resampled).max())
    below = ((resampled < estimate - rounding).mean() + (resampled <= estimate + rounding).mean()) / 2
    bias = np.clip(ndtri(below), -_LARGEST_BIAS, _LARGEST_BIAS)
    deviations = leave_one_out.mean() - leave_one_out
    largest = np.abs(deviations).max()
    acceleration = 0.0
    if largest > rounding:
        deviations /= largest
        acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    shifted = bias + ndtri([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    low, high = np.quantile(resampled, ndtr(bias + shifted / (1 - acceleration * shifted)))
    return float(low), float(high)


def signed_rank_p(differences: Floats) -> float:
    """Return the two-sided p-value of Wilcoxon's signed-rank test for differences of independent subjects.

    Differences of 0 are dropped (Wilcoxon 1945). Exact as far as :func:`scipy.stats.wilcoxon` is (up to 50 subjects
    without ties), else the normal approximation. 1 when every difference is 0. Five subjects can never reach 0.05.
    """
    nonzero = differences[differences != 0]
    return float(stats.wilcoxon(nonzero).pvalue) if nonzero.size else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for testing all of them (Holm 1979), in the given order.

    The k-th smallest of m is multiplied by m - k + 1; none becomes smaller than one before it, nor larger than 1.
    """
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values, float)[order]), 1)
    return [float(p) for p in adjusted]
