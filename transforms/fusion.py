"""An MRI and a CT of one head as the input of a fusion, and the image that the fusion should give.

A fused image has *display units*, about 0 to 1, in which both modalities have a fixed scale:

    MRI   0 and 1 are two percentiles of the head, up to 1.5: a bright lesion keeps its inside
    CT    HU / 1500       the window in which no bone is saturated

The reference is the MRI, but the CT where there is bone. A network sees the MRI, the CT through several windows, and
their blend as a first guess, each brought to -2 .. 2: no input drowns another. A z-score would hide from the network
what it has to give: mean and deviation are not in the image, and it could not know which grey is 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform

from transforms.diffusion import LABEL_CHANNELS
from transforms.errors import BundleError, DataError
from transforms.intensity import HUWindow, Windows, require_hounsfield
from transforms.masks import as_boolean_mask, as_numpy, case_name, like, require_finite, require_foreground, require_key

PairWindows = str | Mapping[str, tuple[float, float]] | Sequence[tuple[float, float]]

MRI, CT = 0, 1  # channels of the pair
CONDITION_RANGE = (-2.0, 2.0)
CT_DISPLAY_HU = 1500.0
# A bright lesion is above the upper percentile as soon as it is larger than what the percentile leaves out. Above this
# limit are vessels and artefacts, a few voxels that must not drown the rest.
MRI_DISPLAY_LIMIT = 1.5
BRIGHT_RANGE = (-2.0, 4 * MRI_DISPLAY_LIMIT - 2)  # of the condition's channels that show the MRI
# HU: below the first a voxel is soft tissue, above the second bone. Calcified soft tissue and marrow lie in between.
BONE_RAMP_HU = (100.0, 300.0)
REFERENCE_CHANNELS = LABEL_CHANNELS[:-1]  # AddDiffusionNoised adds the last one, the weight of the sample


def measure_mri(mri: np.ndarray, head: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Return (low, high): two percentiles of an MRI over ``head``, (2,) float32, in the MRI's units.

    Args:
        mri: (*spatial), arbitrary units.
        head: bool, same shape.
        lower, upper: percentiles.
    """
    return np.percentile(mri[head], (lower, upper)).astype(np.float32)


def mri_display(mri: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return an MRI in display units, float32: 0 at ``low`` and less (air), 1 at ``high``, at most 1.5."""
    low, high = (np.float32(value) for value in scale)
    return np.clip((mri.astype(np.float32) - low) / (high - low), 0, MRI_DISPLAY_LIMIT)


def ct_display(hounsfield: np.ndarray) -> np.ndarray:
    """Return a CT in display units: 0 for water and less, 1 for 1500 HU and more."""
    return np.clip(hounsfield.astype(np.float32) / np.float32(CT_DISPLAY_HU), 0, 1)


def bone_share(hounsfield: np.ndarray) -> np.ndarray:
    """Return how much a voxel is bone by its HU: 0 up to 100, 1 from 300 on, linear between."""
    low, high = BONE_RAMP_HU
    return np.clip((hounsfield.astype(np.float32) - low) / (high - low), 0, 1).astype(np.float32)


def fusion_target(mri: np.ndarray, ct: np.ndarray, hounsfield: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Return the image that a fusion should give, in display units, without a seam: w CT + (1 - w) MRI.

    w is ``bone_share`` outside of the brain and 0 in it, so that a calcification stays what the MRI shows.

    Args:
        mri, ct: display units, (*spatial).
        hounsfield: the CT in HU.
        brain: bool.
    """
    share = np.where(brain, 0, bone_share(hounsfield))
    return (share * ct + (1 - share) * mri).astype(np.float32)


class MeasurePaird(MapTransform):
    """Check that the second channel of the pair is in HU, and store the scale of the first: see ``measure_mri``.

    Args:
        keys: the pair (2, X, Y, Z): MRI, CT.
        lower, upper: percentiles of the MRI over the head.
        mask_key: the head, (1, X, Y, Z).
        scale_key: where the two numbers go.

    Raises:
        DataError: the CT is not in HU, the MRI is constant in the head, a voxel is not finite, or the head is empty.
    """

    def __init__(
        self,
        keys: str = "image",
        lower: float = 0.5,
        upper: float = 99.5,
        mask_key: str = "foreground",
        scale_key: str = "mri_scale",
    ) -> None:
        super().__init__(keys)
        if not 0 <= lower < upper <= 100:
            raise BundleError("MeasurePaird", f"lower {lower}, upper {upper}", "give 0 <= lower < upper <= 100")
        self.lower, self.upper = lower, upper
        self.mask_key, self.scale_key = mask_key, scale_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the scale added."""
        output = dict(data)
        for key in self.key_iterator(output):
            where = case_name(output, key)
            pair = _pair(output[key], where)
            require_finite(pair, where)
            require_hounsfield(pair[CT], -500.0, f"{where}, channel ct")
            head = as_boolean_mask(require_key(output, self.mask_key, type(self).__name__, "HeadMaskd"), pair, where)
            require_foreground(head, where)
            scale = measure_mri(pair[MRI], head, self.lower, self.upper)
            if not scale[1] > scale[0]:
                raise DataError(
                    f"{where}, channel mri: constant in the head",
                    f"every voxel is {scale[0]:g} between the percentiles {self.lower:g} and {self.upper:g}",
                    "check the file; a label map or a mask is no MRI",
                )
            output[self.scale_key] = scale
        return output


class FusionReferenced(MapTransform):
    """Make what a fusion is trained on and measured by from the pair as it came in: (6, *spatial) float32.

    Channels, as in ``REFERENCE_CHANNELS``: target on the scale of the diffusion (2 display - 1), MRI and CT in display
    units, masks of brain, bone and lesion. It stands before any degradation: what a scanner spoils is not asked for.

    Args:
        keys: the pair.
        reference_key: where the channels go; a label map that stands there becomes the lesion mask.
        scale_key, brain_key, bone_key: what the transforms before have left.
    """

    def __init__(
        self,
        keys: str = "image",
        reference_key: str = "label",
        scale_key: str = "mri_scale",
        brain_key: str = "mask",
        bone_key: str = "bone",
    ) -> None:
        super().__init__(keys)
        self.reference_key, self.scale_key = reference_key, scale_key
        self.brain_key, self.bone_key = brain_key, bone_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the reference."""
        output = dict(data)
        name = type(self).__name__
        for key in self.key_iterator(output):
            pair = _pair(output[key], case_name(output, key))
            bone, brain = (
                as_numpy(require_key(output, mask, name, made_by))[0] > 0.5
                for mask, made_by in ((self.bone_key, "BoneMaskd"), (self.brain_key, "BrainMaskd"))
            )
            brain &= ~bone
            label = output.get(self.reference_key)
            lesion = np.zeros(bone.shape) if label is None else as_numpy(label)[0] > 0.5
            mri = mri_display(pair[MRI], require_key(output, self.scale_key, name, "MeasurePaird"))
            ct = ct_display(pair[CT])
            target = 2 * fusion_target(mri, ct, pair[CT], brain) - 1
            channels = np.stack([target, mri, ct, brain, bone, lesion]).astype(np.float32)
            output[self.reference_key] = like(channels, output[key])
        return output


class FusionConditiond(MapTransform):
    """Replace the pair by what a network sees: MRI, CT in each window, first guess; -2 .. 2, float32.

    What is brighter than the upper percentile of the MRI goes up to 4: see ``MRI_DISPLAY_LIMIT``.

    The first guess is ``fusion_target`` of the pair as it is, without a brain mask: had nothing spoilt the pair, it
    would be the target wherever the brain holds no calcification.

    Args:
        keys: the pair.
        windows: of the CT: (level, width) in HU of each channel, also by name; or a name of ``HU_WINDOWS``.
        scale_key: of ``MeasurePaird``.
        pair_key: where the pair stays, for the rules that a network is compared with; None = nowhere.
    """

    def __init__(
        self, keys: str, windows: PairWindows, scale_key: str = "mri_scale", pair_key: str | None = None
    ) -> None:
        super().__init__(keys)
        self.window = HUWindow(_named(windows), CONDITION_RANGE, minimum_air=None)
        self.scale_key, self.pair_key = scale_key, pair_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the condition in place of the pair."""
        output = dict(data)
        for key in self.key_iterator(output):
            where = case_name(output, key)
            pair = _pair(output[key], where)
            scale = require_key(output, self.scale_key, type(self).__name__, "MeasurePaird")
            windows = self.window(np.ascontiguousarray(pair[CT:]), f"{where}, channel ct")
            mri = mri_display(pair[MRI], as_numpy(scale))
            guess = fusion_target(mri, ct_display(pair[CT]), pair[CT], brain=np.zeros(mri.shape, bool))
            condition = np.concatenate([_in_range(mri)[None], windows, _in_range(guess)[None]])
            if self.pair_key is not None:
                output[self.pair_key] = output[key]
            output[key] = like(condition, output[key])
        return output


def _in_range(display: np.ndarray) -> np.ndarray:
    low, high = CONDITION_RANGE
    return low + (high - low) * display


def _named(windows: PairWindows) -> Windows:
    if isinstance(windows, (str, Mapping)):
        return windows
    return {f"{level:g}/{width:g}": (float(level), float(width)) for level, width in windows}


def _pair(image: Any, where: str) -> np.ndarray:
    values = as_numpy(image)
    if len(values) != 2:
        raise DataError(where, f"a pair has 2 channels (MRI, CT), this has {len(values)}", "name two modalities")
    return values
