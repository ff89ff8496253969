"""Are the MRI and the CT of a head on top of each other?

Two figures judge a pair: how far the outlines of the two heads overlap, and where the mutual information of the two
images peaks when the CT is shifted. Both are the same to the last bit on any number of cores.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.filters import threshold_otsu

from transforms.errors import BundleError, DataError
from transforms.masks import as_numpy, case_name, fill_holes, largest_component, require_finite, spacing_of
from transforms.rois import brain_mask, head_mask

Action = Literal["raise", "warn"]

SEARCH_MM = 6.0
# (how far around the best so far, step)
SEARCH_MM_AND_STEPS = ((6.0, 3.0), (2.0, 1.0))
PARABOLA_MM = 1.5
SAMPLES = 40_000
SAMPLING_SEED = 1
OUTLINE_SMOOTHING_MM = 1.5
SMOOTHING_MM = 1.0
BINS = 32
# Air must be told from soft tissue: with a window from -150 HU the best affine had a scale wrong by 2 to 6 %.
CT_RANGE_HU = (-1000.0, 1000.0)
MRI_PERCENTILES = (0.5, 99.5)

# An MRI whose outline has less of the head's volume shows the brain alone: it is compared with the CT's brain.
STRIPPED_SHARE = 0.7
# T2-weighted scalp is nearly as dark as air: a perfectly registered T2 phantom reaches .848.
SMALLEST_OUTLINE_DICE = 0.8
LARGEST_OFFSET_MM = 2.0


@dataclass(frozen=True)
class RegistrationFigures:
    """How well an MRI and a CT on one grid belong together.

    Attributes:
        outline_dice: Dice of the outlines of the two heads (of the brain, where the MRI shows no more).
        offset_mm: (3,) where the CT's content stands against the MRI's along the axes of the array: moving it by the
            opposite maximises the mutual information. Within +-6 mm.
        offset_length_mm: its length.
        mutual_information: at the peak, in nats.
    """

    outline_dice: float
    offset_mm: tuple[float, float, float]
    offset_length_mm: float
    mutual_information: float


def registration_figures(
    mri: np.ndarray, ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str = "pair"
) -> RegistrationFigures:
    """Return how well ``mri`` and ``ct_hu`` (X, Y, Z) on one grid belong together.

    The mutual information is measured at 40 000 points drawn between the voxels of the two heads, of which both images
    are interpolated: on the grid itself, interpolating only the CT would favour shifts by whole voxels (Pluim et al.
    2000, doi:10.1006/cviu.1999.0816). All shifts of a 3 mm grid within +-6 mm are tried, then those 1 mm around the
    best; a parabola per axis gives the rest.

    Raises:
        DataError: shapes differ, the CT is not in HU, or a voxel is not finite.
    """
    if mri.shape != ct_hu.shape or mri.ndim != 3:
        raise DataError(
            where,
            f"the MRI has shape {mri.shape} and the CT {ct_hu.shape}, expected one 3D grid",
            "register the CT to the MRI first (RigidRegistrationd)",
        )
    require_finite(mri, where)
    spacing = [float(mm) for mm in spacing_mm]
    outline, head = mri_outline(mri, spacing, where), head_mask(ct_hu, where)
    expected = brain_mask(ct_hu, spacing, where) if outline.sum() < STRIPPED_SHARE * head.sum() else head
    dice = 2 * int((outline & expected).sum()) / int(outline.sum() + expected.sum())
    offset, information = _peak(information_of_shifts(mri, ct_hu, outline | head, spacing))
    return RegistrationFigures(dice, offset, math.hypot(*offset), information)


def mri_outline(mri: np.ndarray, spacing_mm: Sequence[float], where: str = "mri") -> np.ndarray:
    """Return the head, or what a stripping left of it, in an MRI (X, Y, Z): bool.

    Above half of Otsu's threshold after a Gaussian of 1.5 mm, for scalp and fluid may be far darker than the brain;
    largest component, holes filled.

    Raises:
        DataError: the image is constant.
    """
    smooth = ndimage.gaussian_filter(mri.astype(np.float32), [OUTLINE_SMOOTHING_MM / mm for mm in spacing_mm])
    low, high = (float(value) for value in np.percentile(smooth, (0.1, 99.9)))
    if low == high:
        raise DataError(f"{where}: the MRI is constant", f"almost every voxel is {low:g}", "check the file")
    threshold = threshold_otsu(np.clip(smooth, low, high))
    return fill_holes(largest_component(smooth > low + (threshold - low) / 2))


def information_of_shifts(
    mri: np.ndarray, ct_hu: np.ndarray, region: np.ndarray, spacing_mm: Sequence[float]
) -> Callable[[np.ndarray], float]:
    """Return the function from a displacement of the CT's content in mm (3,) to the mutual information in nats."""
    spacing = np.asarray(spacing_mm)[:, None]
    rng = np.random.default_rng(SAMPLING_SEED)
    # No shift may leave the volume: what it would repeat there is no anatomy.
    margins = np.minimum((SEARCH_MM / spacing[:, 0]).astype(int) + 1, (np.array(region.shape) - 1) // 2)
    inner = tuple(slice(margin, size - margin) for margin, size in zip(margins, region.shape, strict=True))
    voxels = np.stack(np.nonzero(region[inner] if region[inner].any() else np.ones_like(region[inner])))
    drawn = voxels[:, rng.integers(voxels.shape[1], size=SAMPLES)]
    points = drawn + margins[:, None] + rng.uniform(-0.5, 0.5, (3, SAMPLES))
    # The window comes before the smoothing: after it, it would shift the borders of what it saturates.
    smooth_mri, smooth_ct = (
        ndimage.gaussian_filter(volume.astype(np.float32), (SMOOTHING_MM / spacing[:, 0]).tolist())
        for volume in (mri, np.clip(ct_hu, *CT_RANGE_HU))
    )
    sampled = ndimage.map_coordinates(smooth_mri, points, order=1, mode="nearest")
    rows = BINS * _binned(sampled, *np.percentile(sampled, MRI_PERCENTILES))

    def information(displacement_mm: np.ndarray) -> float:
        moved = ndimage.map_coordinates(smooth_ct, points + displacement_mm[:, None] / spacing, order=1, mode="nearest")
        counts = np.bincount(rows + _binned(moved, *CT_RANGE_HU), minlength=BINS**2).reshape(BINS, BINS)
        joint = counts / SAMPLES
        product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        there = joint > 0
        return float((joint[there] * np.log(joint[there] / product[there])).sum())

    return information


def _binned(values: np.ndarray, low: float, high: float) -> np.ndarray:
    width = max(float(high) - float(low), float(np.finfo(np.float32).tiny))
    return np.clip((values - low) * (BINS / width), 0, BINS - 1).astype(np.int64)


def _peak(information: Callable[[np.ndarray], float]) -> tuple[tuple[float, float, float], float]:
    """Return where ``information`` peaks within +-6 mm, and its value at the best point tried."""
    tried: dict[tuple[float, ...], float] = {}

    def at(point: Sequence[float]) -> float:
        key = tuple(float(mm) for mm in point)
        if key not in tried:
            tried[key] = information(np.array(key))
        return tried[key]

    best: tuple[float, ...] = (0.0, 0.0, 0.0)
    for reach, step in SEARCH_MM_AND_STEPS:
        offsets = np.arange(-reach, reach + step / 2, step)
        around = [
            tuple(np.clip(np.add(best, move), -SEARCH_MM, SEARCH_MM)) for move in itertools.product(offsets, repeat=3)
        ]
        best = max(around, key=at)
    refined: list[float] = []
    for axis in range(3):
        below, above = (at(np.add(best, sign * PARABOLA_MM * np.eye(3)[axis])) for sign in (-1, 1))
        curvature = below - 2 * at(best) + above
        refined.append(best[axis] + (PARABOLA_MM * (below - above) / (2 * curvature) if curvature < 0 else 0.0))
    x, y, z = (float(np.clip(mm, -SEARCH_MM, SEARCH_MM)) for mm in refined)
    return (x, y, z), at(best)


class RegistrationCheckd(MapTransform):
    """Refuse, or warn of, a pair that is misregistered; ``meta["registration_check"]`` of the pair keeps the figures.

    Args:
        keys: the pair (2, X, Y, Z): MRI, and CT in HU; or two keys, MRI and CT, on one grid.
        smallest_dice: of the head outlines (``registration_figures``).
        largest_offset_mm: of the peak of the mutual information from zero.
        action: "raise" or "warn".

    Raises:
        BundleError: an unknown action.
        DataError: misregistered (with "raise"), or as ``registration_figures``.
    """

    def __init__(
        self,
        keys: str | Sequence[str] = "image",
        smallest_dice: float = SMALLEST_OUTLINE_DICE,
        largest_offset_mm: float = LARGEST_OFFSET_MM,
        action: Action = "raise",
    ) -> None:
        super().__init__(keys)
        if action not in ("raise", "warn"):
            raise BundleError(f"RegistrationCheckd: action '{action}'", "expected raise or warn", "choose one")
        self.smallest_dice = smallest_dice
        self.largest_offset_mm = largest_offset_mm
        self.action = action

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data``; only metadata is added."""
        output = dict(data)
        where = case_name(output, self.keys[0])
        mri, ct_hu = mri_and_ct(output, self.keys, where)
        figures = registration_figures(mri, ct_hu, spacing_of(output[self.keys[0]], None, where), where)
        if figures.outline_dice < self.smallest_dice or figures.offset_length_mm > self.largest_offset_mm:
            problem = DataError(
                f"{where}: MRI and CT are misregistered",
                f"Dice of the head outlines {figures.outline_dice:.3f}, expected at least {self.smallest_dice:g}; "
                f"mutual information peaks {figures.offset_length_mm:.1f} mm away, at {_rounded(figures.offset_mm)}, "
                f"expected at most {self.largest_offset_mm:g} mm",
                "register the CT to the MRI (RigidRegistrationd), or leave the case out",
            )
            if self.action == "raise":
                raise problem
            warnings.warn(str(problem), stacklevel=2)
        output[self.keys[-1]] = with_meta(output[self.keys[-1]], "registration_check", asdict(figures))
        return output


def mri_and_ct(data: Mapping[Hashable, Any], keys: Sequence[Hashable], where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return MRI and CT (X, Y, Z) of one pair (2, X, Y, Z) or of two images (1, X, Y, Z); DataError for all else."""
    channels = [channel for key in keys for channel in as_numpy(data[key])]
    if len(channels) != 2 or any(channel.ndim != 3 for channel in channels):
        raise DataError(
            where,
            f"{list(keys)} have shapes {[tuple(data[key].shape) for key in keys]}, expected an MRI and a CT in 3D",
            "name one pair (2, X, Y, Z), or two images (1, X, Y, Z)",
        )
    return channels[0], channels[1]


def with_meta(image: Any, name: str, value: Mapping[str, Any]) -> Any:
    """Return a copy of ``image`` whose metadata hold ``value``; an array that has no metadata comes back as it is."""
    if not isinstance(image, MetaTensor):
        return image
    copy = MetaTensor(image.as_tensor(), meta=dict(image.meta), applied_operations=image.applied_operations)
    copy.meta[name] = dict(value)
    return copy


def _rounded(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in values) + ")"
