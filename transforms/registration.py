"""Bring a CT to the MRI of the same head: registration by mutual information, which says what it gained and moved.

SimpleITK maximises it; a result that is worse than none is refused, and it is the same to the last bit on any number of
cores. Whether a pair needs it: ``transforms.registration_check``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import SimpleITK as sitk  # noqa: N813  (the name its own documentation uses)
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from transforms.errors import BundleError, DataError
from transforms.masks import case_name, like, require_finite
from transforms.registration_check import (
    BINS,
    CT_RANGE_HU,
    SAMPLING_SEED,
    information_of_shifts,
    mri_and_ct,
    mri_outline,
    with_meta,
)
from transforms.rois import CT_AIR_HU, HEAD_HU, head_mask

Kind = Literal["rigid", "affine"]

SAMPLED_SHARE = 0.2
SHRINK_FACTORS = (4, 2, 1)
SMOOTHING_SIGMAS_MM = (4.0, 2.0, 1.0)
ITERATIONS = 200
FINEST_MM = 2.0
FIRST_STEP_MM = 4.0
MINIMUM_STEP_MM = 1e-3


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
        return information_of_shifts(mri, ct_on_grid, region, fixed.GetSpacing())(np.zeros(3))

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
        mri, ct_hu = mri_and_ct(output, self.keys, where)
        moved, quality = register_ct(
            mri, ct_hu, _affine(output[first], where), _affine(output[last], where), self.kind, where
        )
        channels = moved[None] if len(self.keys) == 2 else np.stack([mri.astype(np.float32), moved])
        output[last] = with_meta(like(channels, output[first]), "registration", asdict(quality))
        return output


def _affine(image: Any, where: str) -> np.ndarray:
    if not isinstance(image, MetaTensor):
        raise DataError(f"{where}: no affine", "the image is a plain array", "load it with LoadImage (a MetaTensor)")
    return np.asarray(image.affine, dtype=np.float64)
