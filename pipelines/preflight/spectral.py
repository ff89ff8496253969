"""Does a chain know where its spectral axis has a hole (R15)?

Where a range of wavenumbers was cut out, neighbouring channels are far apart. A derivative, a smoothing or a learnable
filter that runs across the cut makes one number of two unrelated bands. Whether one does is measured, not read from its
arguments: a channel on one side is moved, and nothing on the other side may follow.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule

_r15 = partial(Finding, "R15", "error")

SpectralFilter = Callable[[np.ndarray], np.ndarray]


def segments(wavenumbers: np.ndarray, step: float = 1.5) -> list[slice]:
    """Return the runs of channels between the cuts of an axis.

    Args:
        wavenumbers: (C,) in cm^-1, rising or falling.
        step: a distance above so many medians is a cut, and so is a step the other way, as between two spectrometers.
    """
    steps = np.diff(wavenumbers)
    cuts: list[int] = []
    if len(steps):
        typical = float(np.median(steps))
        cuts = (np.flatnonzero((np.abs(steps) > step * abs(typical)) | (steps * typical <= 0)) + 1).tolist()
    return [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, len(wavenumbers)], strict=True)]


def bad_axis(wavenumbers: np.ndarray, channels: int, in_channels: int) -> list[Finding]:
    """Find an axis that is no axis, or that has another length than image or network.

    Args:
        wavenumbers: (C,) in cm^-1.
        channels: of the prepared image.
        in_channels: of the network.
    """
    findings = []
    steps = np.diff(wavenumbers)
    if not np.isfinite(wavenumbers).all() or not ((steps > 0).all() or (steps < 0).all()):
        wrong = int(np.count_nonzero(~np.isfinite(wavenumbers)))
        turns = int(min(np.count_nonzero(steps <= 0), np.count_nonzero(steps >= 0)))
        measured = f"{wrong} values not finite, {turns} steps the other way"
        findings.append(
            _r15(
                "the wavenumbers are no axis",
                measured,
                "finite, rising or falling throughout",
                "channels were joined without sorting",
                "sort channels and wavenumbers together",
                "data",
            )
        )
    if not channels == in_channels == len(wavenumbers):
        findings.append(
            _r15(
                "channels and wavenumbers do not belong together",
                f"image {channels}, network {in_channels}, wavenumbers {len(wavenumbers)}",
                "one number",
                "the range was cut after the network was planned, or in the image alone",
                "cut image and wavenumbers together, and plan the network with what is left",
            )
        )
    return findings


def other_grids(axes: Mapping[str, np.ndarray], tolerance: float) -> list[Finding]:
    """Find cases on another axis than the first.

    Args:
        axes: case -> wavenumbers (C,) in cm^-1.
        tolerance: cm^-1.
    """
    if not axes:
        return []
    first, reference = next(iter(axes.items()))
    off = {
        name: np.inf if len(axis) != len(reference) else float(np.abs(axis - reference).max())
        for name, axis in axes.items()
    }
    worst = sorted((name for name in off if off[name] > tolerance), key=lambda name: -off[name])
    if not worst:
        return []
    return [
        _r15(
            f"{len(worst)} cases are on another grid of wavenumbers than {first}",
            f"up to {off[worst[0]]:g} cm^-1 apart",
            f"{tolerance:g} cm^-1",
            "another instrument or export",
            "resample every case to one grid",
            "data",
            tuple(worst),
        )
    ]


def crossing_filters(
    name: str, spectral_filter: SpectralFilter, wavenumbers: np.ndarray, limits: Mapping[str, float]
) -> list[Finding]:
    """Find a filter that carries something across a cut of the axis.

    The three channels at one side of a cut are moved; what the other side does beyond a common factor (a vector
    normalisation couples all channels by one factor) has crossed.

    Args:
        name: of the filter.
        spectral_filter: spectrum (C,) -> (C,).
        wavenumbers: (C,) in cm^-1.
        limits: ``step`` (see ``segments``), ``crossing``: share of the largest value on that side.

    Raises:
        CannotRun: the output has other channels than the input.
    """
    parts = segments(wavenumbers, limits["step"])
    generator = np.random.default_rng(0)
    spectrum = 1 + np.cumsum(generator.normal(size=len(wavenumbers))) / np.sqrt(len(wavenumbers))
    before = np.asarray(spectral_filter(spectrum), float)
    if len(before) != len(wavenumbers):
        raise CannotRun(f"{name} returns {len(before)} values for {len(wavenumbers)} channels")
    worst, place = 0.0, 0
    for left, right in itertools.pairwise(parts):
        for moved, watched in (
            (slice(max(left.start, left.stop - 3), left.stop), right),
            (slice(right.start, min(right.start + 3, right.stop)), left),
        ):
            changed = spectrum.copy()
            changed[moved] += 1
            after = np.asarray(spectral_filter(changed), float)[watched]
            was = before[watched]
            factor = float(after @ was / (was @ was)) if np.any(was) else 1.0
            share = float(np.abs(after - factor * was).max() / max(float(np.abs(was).max()), 1e-12))
            if share > worst:
                worst, place = share, right.start
    if worst <= limits["crossing"]:
        return []
    gap = f"{wavenumbers[place - 1]:g} and {wavenumbers[place]:g} cm^-1"
    return [
        _r15(
            f"{name} runs across the cut between {gap}",
            f"moving one side changes the other by {worst:.1%}",
            f"at most {limits['crossing']:.1%}",
            "the filter takes the channels for evenly spaced",
            "apply it to each segment on its own",
        )
    ]


def centres_off_grid(centres: Sequence[float], wavenumbers: np.ndarray, limits: Mapping[str, float]) -> list[Finding]:
    """Find filter centres where there is no channel: outside of the axis, or in a cut of it.

    Args:
        centres: cm^-1.
        wavenumbers: (C,) in cm^-1.
        limits: ``step``, see ``segments``; a centre may lie half a median step beyond a segment.
    """
    half = float(np.median(np.abs(np.diff(wavenumbers)))) / 2
    covered = [wavenumbers[part] for part in segments(wavenumbers, limits["step"])]
    off = [c for c in centres if not any(part.min() - half <= c <= part.max() + half for part in covered)]
    if not off:
        return []
    ranges = ", ".join(f"{part.min():g} to {part.max():g}" for part in covered)
    return [
        _r15(
            f"filter centres {', '.join(f'{c:g}' for c in off)} cm^-1 are where there is no channel",
            f"{len(off)} of {len(centres)} centres",
            f"{ranges} cm^-1",
            "centres for the whole range, after a range was cut out",
            "take these centres out, or move them to bands that are there",
        )
    ]


def _axes(inspection: Inspection) -> dict[str, np.ndarray]:
    axes = {
        str(case.get("case", "")): np.asarray(case["wn"], float).ravel()
        for case in inspection.training_cases
        if case.get("wn") is not None
    }
    if not axes:
        raise CannotRun("the prepared cases have no wavenumbers (wn)")
    return axes


def check_axis(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R15: wavenumbers (``wn`` of the cases), channels of the image and of the network (``extra``: ``in_channels``)."""
    axes = _axes(inspection)
    first = next(iter(axes.values()))
    channels = int(inspection.training_cases[0]["image"].shape[0])
    return [
        *bad_axis(first, channels, int(inspection.need("in_channels"))),
        *other_grids(axes, limits["grid"]),
    ]


def check_filters(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R15: every filter along the spectrum (``extra``: ``spectral_filters``, by name)."""
    wavenumbers = next(iter(_axes(inspection).values()))
    filters: Mapping[str, SpectralFilter] = inspection.need("spectral_filters")
    return [f for name, one in filters.items() for f in crossing_filters(name, one, wavenumbers, limits)]


def check_centres(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R15: the first centres of the network's filters (``extra``: ``filter_centres``, cm^-1)."""
    wavenumbers = next(iter(_axes(inspection).values()))
    return centres_off_grid(list(inspection.need("filter_centres")), wavenumbers, limits)


RULES: tuple[Rule, ...] = (
    Rule("R15", "spectral axis", check_axis, {"grid": 0.5}, tasks=("spectral",)),
    Rule("R15", "filters across a cut", check_filters, {"step": 1.5, "crossing": 0.001}, tasks=("spectral",)),
    Rule("R15", "centres of filters", check_centres, {"step": 1.5}, tasks=("spectral",)),
)
