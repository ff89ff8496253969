"""Intensities summed up: of a channel in the foreground, and of a region that a loss looks at.

Pure functions from arrays to a few numbers, which the rules on intensities (``intensity.py``) judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.preflight.chains import foreground_of
from transforms.fusion import BRIGHT_RANGE, CONDITION_RANGE, MRI_DISPLAY_LIMIT, REFERENCE_CHANNELS
from transforms.masks import as_numpy

CROWD = 0.01  # share of the other voxels at a limit from which on a region that is there too cannot be told from them
RELATIVE = 1e-6  # of a range: what counts as the same value


@dataclass(frozen=True)
class Distribution:
    """Intensities of one channel of one case over its foreground, as the network sees them.

    Attributes:
        case, channel: names.
        low, high: percentiles 1 and 99.
        mean, std: of all voxels of the foreground.
        largest: largest absolute value.
    """

    case: str
    channel: str
    low: float
    high: float
    mean: float
    std: float
    largest: float

    @property
    def width(self) -> float:
        """The distance of the percentiles 1 and 99."""
        return self.high - self.low

    @property
    def constant(self) -> bool:
        """Whether the channel shows nothing: a modality that the case lacks."""
        return self.std <= RELATIVE * max(1.0, abs(self.mean))


@dataclass(frozen=True)
class Region:
    """What a region that a loss looks at has become in one channel of one case.

    Attributes:
        case, roi, channel: names.
        voxels: of the region.
        at_limit: share of them (0 to 1) at the lowest or highest value that the channel can have.
        spread: standard deviation within the region over the channel's range.
        compared: a loss compares intensities here, so that they must differ; else the region need only be told apart.
    """

    case: str
    roi: str
    channel: str
    voxels: int
    at_limit: float
    spread: float
    compared: bool = False


def distribution(values: np.ndarray, case: str, channel: str) -> Distribution:
    """Sum up the voxels (n,) of a channel in the foreground; n >= 1."""
    low, high = np.percentile(values, (1, 99))
    exact = values.astype(np.float64)
    return Distribution(
        case, channel, float(low), float(high), float(exact.mean()), float(exact.std()), float(np.abs(exact).max())
    )


def region(
    values: np.ndarray,
    limits: tuple[float, float],
    case: str,
    roi: str,
    channel: str,
    compared: bool = False,
    others: np.ndarray | None = None,
) -> Region:
    """Sum up the voxels (n,) of a region in a channel that runs between ``limits``; n >= 1.

    With ``others``, the voxels (m,) of the foreground around it, a limit counts only where more than ``CROWD`` of them
    stand at it too: a bright lesion alone at the upper limit is still told from all else.
    """
    span = max(limits[1] - limits[0], float(np.finfo(np.float32).tiny))
    at_limit = np.zeros(len(values), bool)
    for sign, limit in ((1.0, limits[0]), (-1.0, limits[1])):
        inner = limit + sign * RELATIVE * span
        if others is None or (len(others) and float((sign * others <= sign * inner).mean()) > CROWD):
            at_limit |= sign * values <= sign * inner
    spread = float(values.astype(np.float64).std() / span)
    return Region(case, roi, channel, len(values), float(at_limit.mean()), spread, compared)


def distributions(sample: Mapping[str, Any], names: Sequence[str], inside: np.ndarray) -> list[Distribution]:
    """Sum up every channel of a sample's image (C, *spatial) over ``inside`` (*spatial)."""
    image = as_numpy(sample["image"])
    case = str(sample.get("case", ""))
    return [distribution(channel[inside], case, name) for channel, name in zip(image, names, strict=False)]


def label_regions(
    sample: Mapping[str, Any], image: np.ndarray, label: np.ndarray, names: Sequence[str], labels: Mapping[int, str]
) -> list[Region]:
    """Sum up every label of a sample in every channel, against the voxels of the foreground that have none."""
    inside = foreground_of(sample, image.shape[1:])
    regions = []
    for channel, name in zip(image, names, strict=True):
        limits = float(channel[inside].min()), float(channel[inside].max())
        others = channel[inside & (label[0] == 0)]
        for index, roi in labels.items():
            there = channel[label[0] == index]
            if there.size and limits[1] > limits[0]:
                regions.append(region(there, limits, str(sample["case"]), roi, name, others=others))
    return regions


def fusion_regions(
    sample: Mapping[str, Any], image: np.ndarray, label: np.ndarray, names: Sequence[str]
) -> list[Region]:
    """Regions of the inputs, and of the references that the loss compares the fused image with, in their ranges."""
    truth = dict(zip(REFERENCE_CHANNELS, label, strict=True))
    case = str(sample["case"])
    around = foreground_of(sample, image.shape[1:]) & (truth["lesion"] < 0.5)
    regions = []
    for roi, compared_with, most in (
        ("brain", "mri_display", MRI_DISPLAY_LIMIT),
        ("bone", "ct_display", 1.0),
        ("lesion", "", 0.0),
    ):
        there = truth[roi] > 0.5
        if not there.any():
            continue
        if compared_with:
            values = truth[compared_with][there]
            regions.append(region(values, (0.0, most), case, roi, f"{compared_with}, the loss's reference", True))
        for number, (channel, name) in enumerate(zip(image, names, strict=False)):
            others = channel[around] if roi == "lesion" else None
            limits = CONDITION_RANGE if 0 < number < len(image) - 1 else BRIGHT_RANGE  # windows stand between
            regions.append(region(channel[there], limits, case, roi, name, others=others))
    return regions
