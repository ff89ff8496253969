"""Heads that look otherwise than those of a cohort: softer or fainter bone, another contrast of the MRI; for training.

A cohort whose skulls are all alike, as those of one scanner or of one generator, teaches a fusion that bone *is* like
that, and it then gives any other head the bone that it has learnt. Each kind of change is a function that returns the
volume itself at its neutral strength. It belongs before the reference: the head is another, and its fusion with it.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from monai.transforms import MapTransform, RandomizableTransform
from scipy import ndimage

from transforms.degradation import bias_field
from transforms.degraded_pairs import checked_pair
from transforms.errors import BundleError
from transforms.fusion import BONE_RAMP_HU
from transforms.masks import as_numpy, case_name, like, require_key


@dataclass(frozen=True)
class Appearance:
    """How a head differs from the scanned one; the defaults change nothing.

    Attributes:
        bone_gain: factor of the HU above 100.
        bone_spread: a: the gain differs over the head by a smooth field from 1 / (1 + a) to 1 + a.
        ct_blur_mm, mri_blur_mm: standard deviation of a Gaussian, as of a wide point spread or of averaged heads.
        mri_gamma: of the MRI between its two percentiles, which stay.
    """

    bone_gain: float = 1.0
    bone_spread: float = 0.0
    ct_blur_mm: float = 0.0
    mri_blur_mm: float = 0.0
    mri_gamma: float = 1.0


def remap_bone(ct: np.ndarray, gain: float | np.ndarray) -> np.ndarray:
    """Return a CT in HU, float32, in which ``gain`` multiplies what is above 100 HU: continuous, soft tissue stays.

    Args:
        ct: (X, Y, Z).
        gain: one, or one per voxel.
    """
    if np.ndim(gain) == 0 and gain == 1:
        return ct
    start = np.float32(BONE_RAMP_HU[0])
    hounsfield = ct.astype(np.float32, copy=False)
    return np.where(hounsfield > start, start + np.asarray(gain, np.float32) * (hounsfield - start), hounsfield)


def soften(volume: np.ndarray, spacing_mm: Sequence[float], sigma_mm: float) -> np.ndarray:
    """Return ``volume`` (X, Y, Z) under a Gaussian of ``sigma_mm`` along each axis in mm; the edge goes on outside."""
    if not sigma_mm:
        return volume
    sigmas = [sigma_mm / mm for mm in spacing_mm]
    return ndimage.gaussian_filter(volume.astype(np.float32, copy=False), sigmas, mode="nearest")


def bend_contrast(mri: np.ndarray, scale: np.ndarray, gamma: float) -> np.ndarray:
    """Return an MRI (X, Y, Z), float32, with u^gamma for u from 0 to 1 between the two values of ``scale``.

    What is below stays; above, the curve goes on as a line of its slope at 1, which is ``gamma``.
    """
    if gamma == 1:
        return mri
    low, high = (np.float32(value) for value in scale)
    u = (mri.astype(np.float32, copy=False) - low) / (high - low)
    bent = np.where(u < 0, u, np.where(u > 1, 1 + gamma * (u - 1), np.clip(u, 0, 1) ** np.float32(gamma)))
    return (low + (high - low) * bent).astype(np.float32)


def vary_pair(
    pair: np.ndarray,
    spacing_mm: Sequence[float],
    scale: np.ndarray,
    appearance: Appearance,
    rng: np.random.Generator,
) -> np.ndarray:
    """Return an MRI and a CT (2, X, Y, Z), arbitrary units and HU, of a head that looks otherwise; float32.

    Args:
        pair: not touched.
        spacing_mm: voxel size along the axes.
        scale: the two percentiles of the MRI over the head.
        appearance: what to change.
        rng: draws the field of ``bone_spread``.
    """
    mri, ct = pair.astype(np.float32)
    gain: float | np.ndarray = appearance.bone_gain
    if appearance.bone_spread:
        gain = gain * bias_field(ct.shape, spacing_mm, appearance.bone_spread, rng)
    ct = soften(remap_bone(ct, gain), spacing_mm, appearance.ct_blur_mm)
    mri = soften(bend_contrast(mri, scale, appearance.mri_gamma), spacing_mm, appearance.mri_blur_mm)
    return np.stack([mri, ct])


class RandAppearanced(RandomizableTransform, MapTransform):
    """Change how the head of a pair looks, each kind of change with the same probability; before ``FusionReferenced``.

    Bone gain and gamma are drawn uniformly in their logarithms, the others uniformly.

    Args:
        keys: pairs (2, X, Y, Z): MRI, and CT in HU; MetaTensor, or an array with ``spacing_mm``. Returned as float32.
        prob: of each kind of change; 0 = never any.
        bone_gain, mri_gamma: (lowest, highest), positive.
        bone_spread, ct_blur_mm, mri_blur_mm: the highest. Blurred MRI teaches a network that lesions may be faint.
        spacing_mm: voxel size along the axes; None = of the affine.
        scale_key: of ``MeasurePaird``.

    Raises:
        BundleError: a probability outside 0 to 1, or a range that is none.
        DataError: not two channels in 3D, no spacing, or voxels that are not finite.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        prob: float = 0.5,
        bone_gain: tuple[float, float] = (0.3, 1.2),
        bone_spread: float = 0.3,
        ct_blur_mm: float = 3.0,
        mri_blur_mm: float = 0.0,
        mri_gamma: tuple[float, float] = (0.6, 1.6),
        spacing_mm: Sequence[float] | None = None,
        scale_key: str = "mri_scale",
        allow_missing_keys: bool = False,
    ) -> None:
        MapTransform.__init__(self, keys, allow_missing_keys)
        ranges_hold = all(0 < low <= high for low, high in (bone_gain, mri_gamma))
        if not 0 <= prob <= 1 or not ranges_hold or min(bone_spread, ct_blur_mm, mri_blur_mm) < 0:
            raise BundleError(
                f"RandAppearanced: prob {prob}, bone_gain {bone_gain}, mri_gamma {mri_gamma}, "
                f"bone_spread {bone_spread}, ct_blur_mm {ct_blur_mm}, mri_blur_mm {mri_blur_mm}",
                "expected a probability from 0 to 1, 0 < lowest <= highest, and nothing negative",
                "correct the appearance of the bundle",
            )
        RandomizableTransform.__init__(self, prob=prob)
        self.bone_gain, self.mri_gamma = bone_gain, mri_gamma
        self.bone_spread, self.ct_blur_mm, self.mri_blur_mm = bone_spread, ct_blur_mm, mri_blur_mm
        self.spacing_mm, self.scale_key = spacing_mm, scale_key
        self.appearance = Appearance()
        self._seed = 0

    def randomize(self, data: Any = None) -> None:
        """Draw which changes there are, how strong, and the seed of what they draw themselves."""
        present = self.R.rand(5) < self.prob
        gain, gamma = (np.exp(self.R.uniform(*np.log(ends))) for ends in (self.bone_gain, self.mri_gamma))
        spread, ct_blur, mri_blur = (
            self.R.uniform(0, highest) for highest in (self.bone_spread, self.ct_blur_mm, self.mri_blur_mm)
        )
        self._seed = int(self.R.randint(2**31))
        drawn = {
            "bone_gain": gain,
            "bone_spread": spread,
            "ct_blur_mm": ct_blur,
            "mri_blur_mm": mri_blur,
            "mri_gamma": gamma,
        }
        self.appearance = Appearance(
            **{name: float(value) for (name, value), there in zip(drawn.items(), present, strict=True) if there}
        )

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the pairs changed."""
        output = dict(data)
        self.randomize()
        for key in self.key_iterator(output):
            pair, spacing = checked_pair(output[key], self.spacing_mm, case_name(output, key))
            scale = as_numpy(require_key(output, self.scale_key, type(self).__name__, "MeasurePaird"))
            rng = np.random.default_rng(self._seed)
            output[key] = like(vary_pair(pair, spacing, scale, self.appearance, rng), output[key])
        return output
