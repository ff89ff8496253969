"""Are the MRI and the CT of a head on top of each other, and how to bring them there.

Two figures judge a pair: how far the outlines of the two heads overlap, and where the mutual information of the two
images peaks when the CT is shifted. Registration maximises the mutual information (SimpleITK), measures what it gained
and moved, and refuses a result that is worse than none. Both are the same to the last bit on any number of cores.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk  # noqa: N813  (the name its own documentation uses)
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage
from skimage.filters import threshold_otsu

from transforms.errors import BundleError, DataError
from transforms.masks import as_numpy, case_name, fill_holes, largest_component, like, require_finite
from transforms.rois import CT_AIR_HU, HEAD_HU, brain_mask, head_mask, spacing_of

Kind = Literal["rigid", "affine"]
Action = Literal["raise", "warn"]

SEARCH_MM = 6.0
# (how far around the best so far, step)
SEARCH_MM_AND_STEPS = ((6.0, 3.0), (2.0, 1.0))
PARABOLA_MM = 1.5
SAMPLES = 40_000
OUTLINE_SMOOTHING_MM = 1.5
SMOOTHING_MM = 1.0
BINS = 32
# Air must be told from soft tissue: with a window from -150 HU the best affine had a scale wrong by 2 to 6 %.
CT_RANGE_HU = (-1000.0, 1000.0)
MRI_PERCENTILES = (0.5, 99.5)

# An MRI whose outline has less of the head's volume shows the brain alone: it is compared with the CT's brain.
STRIPPED_SHARE = 0.7
SMALLEST_OUTLINE_DICE = 0.8
LARGEST_OFFSET_MM = 2.0

SAMPLED_SHARE = 0.2
SAMPLING_SEED = 1
SHRINK_FACTORS = (4, 2, 1)
SMOOTHING_SIGMAS_MM = (4.0, 2.0, 1.0)
ITERATIONS = 200
FINEST_MM = 2.0
FIRST_STEP_MM = 4.0
MINIMUM_STEP_MM = 1e-3


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


@dataclass(frozen=True)
class RegistrationQuality:
    """What a registration did.

    Attributes:
        kind: ``rigid`` or ``affine``.
        mutual_information_before, mutual_information_after: of the pair by its headers, and
            after the registration, in nats.
        matrix: (4, 4), from mm of the MRI to mm of the CT as it came in; four rows.
        motion_mm: displacement of the middle of the MRI.
        rotation_deg: angle of the (nearest) rotation.
    """

    kind: Kind
    mutual_information_before: float
    mutual_information_after: float
    matrix: list[list[float]]
    motion_mm: float
    rotation_deg: float


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
    offset, information = _peak(_information_of_shifts(mri, ct_hu, outline | head, spacing))
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


def _information_of_shifts(
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


def register_ct(
    mri: np.ndarray,
    ct_hu: np.ndarray,
    mri_affine: np.ndarray,
    ct_affine: np.ndarray,
    kind: Kind = "rigid",
    where: str = "pair",
) -> tuple[np.ndarray, RegistrationQuality]:
    """Return the CT registered to the MRI and resampled on its grid (X, Y, Z), float32 HU, and what that did.

    Mattes mutual information (Mattes et al. 2003, doi:10.1109/TMI.2003.809072) of a random fifth of the voxels, three
    resolutions, gradient descent with regular steps; the affine starts from the rigid. It starts where the headers put
    the CT, or with the middles of the two heads on top of each other, whichever has more mutual information. Linear
    interpolation; -1000 HU outside of the CT.

    Args:
        mri: (X, Y, Z), arbitrary units.
        ct_hu: (U, V, W) in HU, on a grid of its own.
        mri_affine, ct_affine: (4, 4), voxel indices to mm.
        kind: "rigid" (6 parameters) or "affine" (12). Two scans of one head differ rigidly. Mutual information knows
            the scale of a head to about 1 % only: "affine" is for scans whose voxel sizes are in doubt.
        where: names the pair in an error.

    Raises:
        DataError: an affine has shear, the two do not overlap, the CT is not in HU, or the registered pair has less
            mutual information than the pair by its headers.
    """
    require_finite(mri, where)
    ct_head = head_mask(ct_hu, where)
    fixed, moving = _sitk_image(mri, mri_affine, where), _sitk_image(ct_hu, ct_affine, where)
    outline = mri_outline(mri, fixed.GetSpacing(), where)
    centre = _middle(outline, mri_affine)
    starts = [_rigid(centre), _rigid(centre, _middle(ct_head, ct_affine) - centre)]
    by_headers = _resampled(moving, fixed, starts[0])
    region = outline | (by_headers > HEAD_HU)

    def information(ct_on_grid: np.ndarray) -> float:
        return _information_of_shifts(mri, ct_on_grid, region, fixed.GetSpacing())(np.zeros(3))

    before, by_middles = information(by_headers), information(_resampled(moving, fixed, starts[1]))
    windowed = sitk.Clamp(moving, sitk.sitkFloat32, *CT_RANGE_HU)
    try:
        found = _maximised(fixed, windowed, starts[int(by_middles > before)])
        if kind == "affine":
            found = _maximised(fixed, windowed, _as_affine(found))
    except RuntimeError as error:
        raise DataError(
            f"{where}: the registration failed",
            f"SimpleITK: {str(error).strip().splitlines()[-1]}",
            "check that both images show the same head, and that their affines are right",
        ) from error
    registered = _resampled(moving, fixed, found)
    after = information(registered)
    if after < before:
        raise DataError(
            f"{where}: the registration made the pair worse",
            f"mutual information {before:.4f} before, {after:.4f} after, expected no less",
            "use the pair as it is, or kind rigid; check that both images show the same head",
        )
    matrix = _matrix(found)
    motion_mm = float(np.linalg.norm(matrix @ [*centre, 1.0] - [*centre, 1.0]))
    return registered, RegistrationQuality(kind, before, after, matrix.tolist(), motion_mm, _rotation_deg(matrix))


def _resampled(moving: sitk.Image, fixed: sitk.Image, transform: sitk.Transform) -> np.ndarray:
    resampled = sitk.Resample(moving, fixed, transform, sitk.sitkLinear, CT_AIR_HU, sitk.sitkFloat32)
    return np.ascontiguousarray(sitk.GetArrayFromImage(resampled).T)


def _sitk_image(volume: np.ndarray, affine: np.ndarray, where: str) -> sitk.Image:
    """Return ``volume`` (X, Y, Z) in the space of its affine (ITK means another, but only their relation counts)."""
    columns = np.asarray(affine, dtype=np.float64)[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    direction = columns / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise DataError(
            f"{where}: the affine has shear",
            f"its axes are not at right angles: {np.round(direction, 4).tolist()}",
            "resample the image to a grid without shear first (a CT with a tilted gantry needs its tilt corrected)",
        )
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.T, dtype=np.float32))
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin(np.asarray(affine, dtype=np.float64)[:3, 3].tolist())
    return image


def _middle(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.asarray(affine, dtype=np.float64)[:3] @ [*ndimage.center_of_mass(mask), 1.0]


def _rigid(centre: np.ndarray, translation: Sequence[float] | np.ndarray = (0.0, 0.0, 0.0)) -> sitk.Transform:
    transform = sitk.Euler3DTransform()
    transform.SetCenter(centre.tolist())
    transform.SetTranslation([float(mm) for mm in translation])
    return transform


def _as_affine(rigid: sitk.Transform) -> sitk.Transform:
    affine = sitk.AffineTransform(3)
    affine.SetCenter(rigid.GetCenter())
    affine.SetMatrix(rigid.GetMatrix())
    affine.SetTranslation(rigid.GetTranslation())
    return affine


def _maximised(fixed: sitk.Image, moving: sitk.Image, start: sitk.Transform) -> sitk.Transform:
    """Return a transform of the class of ``start`` with more mutual information."""
    method, found = sitk.ImageRegistrationMethod(), type(start)(start)
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricSamplingStrategy(method.RANDOM)
    method.SetMetricSamplingPercentage(SAMPLED_SHARE, SAMPLING_SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(FIRST_STEP_MM, MINIMUM_STEP_MM, ITERATIONS, relaxationFactor=0.5)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel(SHRINK_FACTORS)
    method.SetSmoothingSigmasPerLevel(SMOOTHING_SIGMAS_MM)
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetInitialTransform(found, inPlace=True)
    # A metric on finer voxels than this takes many times longer and is no better.
    factors = [max(1, int(FINEST_MM / mm + 1e-6)) for mm in fixed.GetSpacing()]
    with _one_thread():
        method.Execute(sitk.BinShrink(fixed, factors), moving)
    return found


def _matrix(transform: sitk.Transform) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = np.reshape(transform.GetMatrix(), (3, 3))
    matrix[:3, 3] = transform.TransformPoint((0.0, 0.0, 0.0))
    return matrix


def _rotation_deg(matrix: np.ndarray) -> float:
    """Return the angle of the rotation nearest to ``matrix`` (polar decomposition)."""
    left, _, right = np.linalg.svd(matrix[:3, :3])
    return math.degrees(math.acos(float(np.clip((np.trace(left @ right) - 1) / 2, -1, 1))))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Hold ITK's global number of threads: partial sums, and with them the last bits, follow it."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


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
        mri, ct_hu = _mri_and_ct(output, self.keys, where)
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
        output[self.keys[-1]] = _with_meta(output[self.keys[-1]], "registration_check", asdict(figures))
        return output


class RigidRegistrationd(MapTransform):
    """Register the CT to the MRI and put it on the MRI's grid (``register_ct``); the MRI is not touched.

    ``meta["registration"]`` of the CT (of the pair) keeps what it did: ``RegistrationQuality``.

    Args:
        keys: the pair (2, X, Y, Z): MRI, and CT in HU; or two keys, MRI and CT, each (1, X, Y, Z) on a grid of its own.
            MetaTensors.
        kind: "rigid" or "affine".

    Raises:
        BundleError: an unknown kind.
        DataError: as ``register_ct``, or an image without affine.
    """

    def __init__(self, keys: str | Sequence[str] = "image", kind: Kind = "rigid") -> None:
        super().__init__(keys)
        if kind not in ("rigid", "affine"):
            raise BundleError(f"RigidRegistrationd: kind '{kind}'", "expected rigid or affine", "choose one")
        self.kind: Kind = kind

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the CT moved."""
        output = dict(data)
        first, last = self.keys[0], self.keys[-1]
        where = case_name(output, first)
        mri, ct_hu = _mri_and_ct(output, self.keys, where)
        moved, quality = register_ct(
            mri, ct_hu, _affine(output[first], where), _affine(output[last], where), self.kind, where
        )
        channels = moved[None] if len(self.keys) == 2 else np.stack([mri.astype(np.float32), moved])
        output[last] = _with_meta(like(channels, output[first]), "registration", asdict(quality))
        return output


def _mri_and_ct(data: Mapping[Hashable, Any], keys: Sequence[Hashable], where: str) -> tuple[np.ndarray, np.ndarray]:
    channels = [channel for key in keys for channel in as_numpy(data[key])]
    if len(channels) != 2 or any(channel.ndim != 3 for channel in channels):
        raise DataError(
            where,
            f"{list(keys)} have shapes {[tuple(data[key].shape) for key in keys]}, expected an MRI and a CT in 3D",
            "name one pair (2, X, Y, Z), or two images (1, X, Y, Z)",
        )
    return channels[0], channels[1]


def _affine(image: Any, where: str) -> np.ndarray:
    if not isinstance(image, MetaTensor):
        raise DataError(f"{where}: no affine", "the image is a plain array", "load it with LoadImage (a MetaTensor)")
    return np.asarray(image.affine, dtype=np.float64)


def _with_meta(image: Any, name: str, value: Mapping[str, Any]) -> Any:
    """Return a copy of ``image`` whose metadata hold ``value``; an array that has no metadata comes back as it is."""
    if not isinstance(image, MetaTensor):
        return image
    copy = MetaTensor(image.as_tensor(), meta=dict(image.meta), applied_operations=image.applied_operations)
    copy.meta[name] = dict(value)
    return copy


def _rounded(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.1f}" for value in values) + ")"
