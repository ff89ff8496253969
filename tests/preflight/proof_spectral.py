"""Planted failures of the spectral axis: a second derivative across the cut at the paraffin band, and its like."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from planted import Proof
from proof_network import found
from scipy.signal import savgol_filter

from pipelines.preflight import Finding, Inspection
from pipelines.preflight.spectral import RULES, segments

# 900 to 1800 cm^-1 in steps of 4 without 1350 to 1490: two segments, of 113 and 78 channels
WHOLE = np.arange(900.0, 1801.0, 4.0)
WN = WHOLE[(WHOLE < 1350) | (WHOLE > 1490)]
BANDS = (1655, 1545, 1740, 1240, 1080, 1160)  # amide I and II, ester, phosphate, ...
ALL_BANDS = (*BANDS, 1450, 1395)  # the last two lie in the cut


def unit(spectrum: np.ndarray) -> np.ndarray:
    return spectrum / np.linalg.norm(spectrum)


def derivative_across(spectrum: np.ndarray) -> np.ndarray:
    """Unit length, Savitzky-Golay second derivative over all channels, unit length."""
    return unit(savgol_filter(unit(spectrum), 11, 5, deriv=2))


def derivative_per_segment(spectrum: np.ndarray) -> np.ndarray:
    """The same, segment by segment."""
    parts = [savgol_filter(unit(spectrum)[part], 11, 5, deriv=2) for part in segments(WN)]
    return unit(np.concatenate(parts))


def cores(
    derivative: Callable[[np.ndarray], np.ndarray],
    centres: tuple[float, ...] = BANDS,
    in_channels: int = len(WN),
    wn: np.ndarray = WN,
) -> Inspection:
    """Return a spectral run: two cores, the derivative of its chain, the filters of its network."""
    cases = [{"case": name, "image": np.zeros((len(WN), 4, 4)), "wn": wn} for name in ("core1", "core2")]
    extra = {"in_channels": in_channels, "spectral_filters": {"derivative": derivative}, "filter_centres": centres}
    return Inspection("spectral", train=SimpleNamespace(cases=cases), extra=extra)


def planted() -> list[Finding]:
    return [
        *found(RULES, "R15", cores(derivative_across), "filters across a cut"),
        *found(RULES, "R15", cores(derivative_per_segment, ALL_BANDS), "centres of filters"),
        *found(RULES, "R15", cores(derivative_per_segment, in_channels=len(WHOLE)), "spectral axis"),
    ]


PROOFS: list[Proof] = [
    Proof(
        "R15", "response on one side of a cut to a change on the other, filter centres, channels",
        "a derivative and learnable filters across the removed paraffin band",
        planted, lambda: found(RULES, "R15", cores(derivative_per_segment)),
    ),
]  # fmt: skip
