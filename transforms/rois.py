"""Head, bone and brain from a CT in Hounsfield units alone, for the cases that bring no masks.

A threshold puts the border of bone too far out, for a voxel shared by bone and soft tissue already passes it: the
border stands where the value has fallen to half of the bone beside it. The brain is what is *enclosed*: in nearly every
direction a ray meets bone before it leaves the head. That holds where the skull has holes or the scan ends, and fails
in the orbits and the neck.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy import ndimage

from transforms.errors import DataError
from transforms.intensity import require_hounsfield
from transforms.masks import as_numpy, case_name, fill_holes, largest_component, like, spacing_of

CT_AIR_HU = -1000.0
HEAD_HU = -300.0
BONE_HU = 300.0
# Dense bone has up to about 1500 HU. Beside a filling of 3000 HU, half of the peak would delete the bone around it.
BONE_PEAK_HU = 1500.0
BONE_SMOOTHING_MM = 0.5
BONE_PEAK_REACH_MM = 3.0
BONE_SMALLEST_ML = 0.5
BONE_FARTHEST_MM = 15.0

BRAIN_GRID_MM = 2.0
BRAIN_SMOOTHING_MM = 1.5
WALL_HU = 90.0
CAVITY_AIR_HU = -200.0
FAT_HU = -30.0
WALL_SMALLEST_ML = 0.5
WALL_CLOSING_MM = 3.0
OPENING_MM = 6.0
ENCLOSED_SHARE = 0.75
# Of 26 directions: where fewer rays end inside of the image, nothing is known.
FEWEST_RAYS = 6
BRAIN_SMALLEST_ML = 100.0


def cormack_to_hu(values: np.ndarray) -> np.ndarray:
    """Return Hounsfield units, float32, of a CT on the stretched scale of the Clinical toolbox's templates.

    There, with t = HU + 1000, the value is t + 10 clip(t - 900, 0, 200): air is 0, and the contrast between -100 and
    100 HU is eleven times as large (Rorden et al. 2012, doi:10.1016/j.neuroimage.2012.03.020). Inverse on all reals.
    """
    stretched = np.asarray(values, dtype=np.float64)
    t = np.where(stretched < 900, stretched, np.maximum(900 + (stretched - 900) / 11, stretched - 2000))
    return (t - 1000).astype(np.float32)


def head_mask(ct_hu: np.ndarray, where: str = "ct") -> np.ndarray:
    """Return the head in a CT (X, Y, Z) in HU: above -300, largest component, holes filled; bool.

    Raises:
        DataError: the values are not HU.
    """
    require_hounsfield(ct_hu, None, where)
    head = fill_holes(largest_component(ct_hu > HEAD_HU))
    _require_found(head, ct_hu, "head", f"a voxel above {HEAD_HU:g} HU", where)
    return head


def bone_mask(ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str = "ct") -> np.ndarray:
    """Return the bone in a CT (X, Y, Z) in HU: bool.

    Above 300 HU after a Gaussian of 0.5 mm against noise; voxels at the border of that count only above half of the
    largest value (at most 1500 HU) within 3 mm. Components of at least 0.5 mL within 15 mm of the largest are kept: not
    the table, the head holder or specks.

    Args:
        ct_hu: Hounsfield units.
        spacing_mm: voxel size along the three axes.
        where: names the image in an error.

    Raises:
        DataError: the values are not HU, or there is no bone.
    """
    require_hounsfield(ct_hu, None, where)
    smooth = _smoothed(ct_hu, spacing_mm, BONE_SMOOTHING_MM)
    dense = smooth > BONE_HU
    inner = ndimage.binary_erosion(dense, border_value=1)
    reach = [2 * int(np.ceil(BONE_PEAK_REACH_MM / mm)) + 1 for mm in spacing_mm]
    peak = np.minimum(ndimage.maximum_filter(smooth, reach), BONE_PEAK_HU)
    bone = _without_specks(dense & (inner | (smooth > peak / 2)), spacing_mm, BONE_SMALLEST_ML)
    _require_found(bone, ct_hu, "bone", f"{BONE_SMALLEST_ML:g} mL above {BONE_HU:g} HU", where)
    return _near_the_largest(bone, spacing_mm, BONE_FARTHEST_MM)


def brain_mask(ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str = "ct") -> np.ndarray:
    """Return the brain with its ventricles in a CT (X, Y, Z) in HU: bool.

    After a Gaussian of 1.5 mm, on every n-th voxel of an axis with n voxels within 2 mm:

    1. The wall: what exceeds 90 HU, or is air inside of the head; components below 0.5 mL (calcifications, noise) are
       dropped; closed by 3 mm against thin bone.
    2. From every voxel a ray runs in each of 26 directions until it meets the wall or leaves the head; one that leaves
       the image within the head is not counted. The voxel is enclosed when 75 % of its rays meet the wall.
    3. Enclosed voxels that are neither wall nor fat (-30 HU) are opened by 6 mm, which cuts the optic canals; the
       largest component is the brain; its holes (blood, calcifications) are filled.

    Arguments and errors as ``bone_mask``; also an error when it has less than 100 mL.
    """
    require_hounsfield(ct_hu, None, where)
    factors = [max(1, int(BRAIN_GRID_MM / mm + 1e-6)) for mm in spacing_mm]
    smooth = _smoothed(ct_hu, spacing_mm, BRAIN_SMOOTHING_MM)[tuple(slice(None, None, n) for n in factors)]
    coarse_mm = [n * mm for n, mm in zip(factors, spacing_mm, strict=True)]
    head = fill_holes(largest_component(smooth > HEAD_HU))
    air = head & (smooth < CAVITY_AIR_HU)
    wall = _closed(_without_specks(smooth > WALL_HU, coarse_mm, WALL_SMALLEST_ML) | air, coarse_mm, WALL_CLOSING_MM)
    cavity = head & ~wall & (smooth > FAT_HU) & (enclosed_share(wall, head) >= ENCLOSED_SHARE)
    core = largest_component(ndimage.distance_transform_edt(cavity, sampling=coarse_mm) > OPENING_MM)
    opened = cavity & _grown(core, coarse_mm, OPENING_MM) if core.any() else core
    brain = fill_holes(opened) & ~air
    volume_ml = float(brain.sum() * np.prod(coarse_mm)) / 1000
    if volume_ml < BRAIN_SMALLEST_ML:
        brain = np.zeros_like(brain)
    _require_found(brain, ct_hu, "brain", f"{BRAIN_SMALLEST_ML:g} mL enclosed by bone ({volume_ml:.1f} mL are)", where)
    if max(factors) == 1:
        return brain
    scale = [1 / n for n in factors]
    fine = ndimage.affine_transform(brain.astype(np.float32), scale, output_shape=ct_hu.shape, order=1, mode="nearest")
    return fine > 0.5


def enclosed_share(wall: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Return from each voxel's 26 rays the share that meets ``wall`` before it leaves ``head``: float32 (X, Y, Z).

    Rays run to the 26 neighbours and on. Those that reach the border of the image inside of the head tell nothing and
    are not counted; where fewer than 6 count, the share is 0. Both masks are bool.
    """
    # 1: the wall, 2: the open, 0: the ray goes on.
    meets = np.where(wall, 1, np.where(head, 0, 2)).astype(np.uint8)
    met, counted = np.zeros((2, *wall.shape), dtype=np.uint8)
    for direction in itertools.product((-1, 0, 1), repeat=3):
        axis = next((a for a in range(3) if direction[a]), None)
        if axis is None:
            continue
        lateral = [direction[a] for a in range(3) if a != axis]
        planes, met_planes, counted_planes = (np.moveaxis(volume, axis, 0) for volume in (meets, met, counted))
        seen = np.zeros(planes.shape[1:], dtype=np.uint8)
        for index in range(len(planes))[:: -direction[axis]]:
            seen = np.where(planes[index] > 0, planes[index], _neighbours(seen, lateral))
            met_planes[index] += seen == 1
            counted_planes[index] += seen > 0
    return np.where(counted >= FEWEST_RAYS, met / np.maximum(counted, 1, dtype=np.float32), 0).astype(np.float32)


def _neighbours(plane: np.ndarray, step: Sequence[int]) -> np.ndarray:
    """Return the plane in which each pixel holds what stands ``step`` further; 0 beyond the edge."""
    shifted = np.zeros_like(plane)
    to = tuple(slice(max(0, -k), n - max(0, k)) for k, n in zip(step, plane.shape, strict=True))
    out_of = tuple(slice(max(0, k), n - max(0, -k)) for k, n in zip(step, plane.shape, strict=True))
    shifted[to] = plane[out_of]
    return shifted


def _smoothed(volume: np.ndarray, spacing_mm: Sequence[float], sigma_mm: float) -> np.ndarray:
    return ndimage.gaussian_filter(volume.astype(np.float32, copy=False), [sigma_mm / mm for mm in spacing_mm])


def _grown(mask: np.ndarray, spacing_mm: Sequence[float], radius_mm: float) -> np.ndarray:
    return ndimage.distance_transform_edt(~mask, sampling=spacing_mm) <= radius_mm


def _closed(mask: np.ndarray, spacing_mm: Sequence[float], radius_mm: float) -> np.ndarray:
    if not mask.any():
        return mask
    grown = _grown(mask, spacing_mm, radius_mm)
    return mask | (ndimage.distance_transform_edt(grown, sampling=spacing_mm) > radius_mm)


def _without_specks(mask: np.ndarray, spacing_mm: Sequence[float], smallest_ml: float) -> np.ndarray:
    labels, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    volumes_ml = np.bincount(labels.ravel()) * float(np.prod(spacing_mm)) / 1000
    volumes_ml[0] = 0
    return (volumes_ml >= smallest_ml)[labels]


def _near_the_largest(mask: np.ndarray, spacing_mm: Sequence[float], farthest_mm: float) -> np.ndarray:
    labels, count = ndimage.label(mask, np.ones((3, 3, 3)))
    if count == 1:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    near = np.zeros(count + 1, dtype=bool)
    near[labels[_grown(labels == sizes.argmax(), spacing_mm, farthest_mm)]] = True
    near[0] = False
    return near[labels]


def _require_found(mask: np.ndarray, ct_hu: np.ndarray, name: str, expected: str, where: str) -> None:
    if not mask.any():
        raise DataError(
            f"{where}: no {name} in this CT",
            f"expected {expected}; the values run from {ct_hu.min():g} to {ct_hu.max():g}, median {np.median(ct_hu):g}",
            "is the CT in Hounsfield units, and does it hold a head? A mask file may be given instead",
        )


class _MaskFromCTd(MapTransform):
    """Write a mask made from a CT where the case brings none; ``meta["made_by"]`` says that it was made."""

    def __init__(
        self,
        keys: str,
        mask_key: str,
        channel: int,
        spacing_mm: Sequence[float] | None,
    ) -> None:
        super().__init__(keys)
        self.mask_key = mask_key
        self.channel = channel
        self.spacing_mm = spacing_mm

    @abstractmethod
    def make(self, ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str) -> np.ndarray:
        """Return the mask (X, Y, Z), bool."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the mask: uint8 (1, X, Y, Z), in the container of the image."""
        output = dict(data)
        if output.get(self.mask_key) is not None:
            return output
        for key in self.key_iterator(output):
            where = f"{case_name(output, key)}, channel {self.channel}"
            image = output[key]
            made = self.make(as_numpy(image)[self.channel], spacing_of(image, self.spacing_mm, where), where)
            mask = like(made[None].astype(np.uint8), image)
            if isinstance(mask, MetaTensor):
                mask.meta["made_by"] = type(self).__name__
            output[self.mask_key] = mask
        return output


class HeadMaskd(_MaskFromCTd):
    """Make the head mask of a CT where the case brings none: ``head_mask``.

    Args:
        keys: the image that holds the CT in HU, (C, X, Y, Z); its grid and metadata become the mask's.
        mask_key: where the mask may be, and goes: uint8 (1, X, Y, Z). A mask that is made says so in
            ``meta["made_by"]``.
        channel: the CT's channel; of a pair (MRI, CT) the last.
        spacing_mm: voxel size; None = of the affine.

    Raises:
        DataError: not HU, nothing found, or no spacing.
    """

    def __init__(
        self,
        keys: str = "image",
        mask_key: str = "foreground",
        channel: int = -1,
        spacing_mm: Sequence[float] | None = None,
    ) -> None:
        super().__init__(keys, mask_key, channel, spacing_mm)

    def make(self, ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str) -> np.ndarray:
        """Return the mask (X, Y, Z), bool."""
        return head_mask(ct_hu, where)


class BoneMaskd(_MaskFromCTd):
    """Make the bone mask of a CT where the case brings none: ``bone_mask``; arguments as ``HeadMaskd``."""

    def __init__(
        self, keys: str = "image", mask_key: str = "bone", channel: int = -1, spacing_mm: Sequence[float] | None = None
    ) -> None:
        super().__init__(keys, mask_key, channel, spacing_mm)

    def make(self, ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str) -> np.ndarray:
        """Return the mask (X, Y, Z), bool."""
        return bone_mask(ct_hu, spacing_mm, where)


class BrainMaskd(_MaskFromCTd):
    """Make the brain mask of a CT where the case brings none: ``brain_mask``; arguments as ``HeadMaskd``."""

    def __init__(
        self, keys: str = "image", mask_key: str = "mask", channel: int = -1, spacing_mm: Sequence[float] | None = None
    ) -> None:
        super().__init__(keys, mask_key, channel, spacing_mm)

    def make(self, ct_hu: np.ndarray, spacing_mm: Sequence[float], where: str) -> np.ndarray:
        """Return the mask (X, Y, Z), bool."""
        return brain_mask(ct_hu, spacing_mm, where)
