"""Gamma as an augmentation that keeps the statistics and the background of each channel, and its place in the chain.

Gamma belongs before the z-score: applied to signed values it moves the mean away from 0 and lifts the background, so
that training sees other intensities than validation. The guard below refuses such a chain before a run starts.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import (
    AdjustContrast,
    AdjustContrastd,
    Compose,
    MapTransform,
    NormalizeIntensity,
    NormalizeIntensityd,
    OneOf,
    RandAdjustContrast,
    RandAdjustContrastd,
    RandomizableTransform,
    RandomOrder,
    ScaleIntensity,
    ScaleIntensityd,
    ScaleIntensityRange,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentiles,
    ScaleIntensityRangePercentilesd,
    SomeOf,
)

from transforms.errors import BundleError
from transforms.intensity import (
    HUWindow,
    HUWindowd,
    NormalizeIntensityInMask,
    NormalizeIntensityInMaskd,
)
from transforms.masks import Array, Image, as_boolean_mask, as_numpy, case_name, like, require_finite, require_key


def gamma_in_mask(image: np.ndarray, gammas: Sequence[float], mask: np.ndarray | None = None) -> np.ndarray:
    """Apply one gamma per channel of ``image`` (C, *spatial) within ``mask`` (*spatial): float32, source units.

    Per channel, over the mask: u = (x - min) / (max - min), v = u^gamma, y = mean(x) + std(x) (v - mean(v)) / std(v).
    Values outside the mask, constant channels, and images with an empty mask are returned as they are, and so is
    everything at gamma 1. Restoring mean and standard deviation follows Isensee et al. 2021 (nnU-Net,
    doi:10.1038/s41592-020-01008-z, data augmentation); here within the mask and for every channel on its own.
    """
    output = image.astype(np.float32)
    voxels: Any = ... if mask is None else mask
    for channel, gamma in zip(output, gammas, strict=True):
        inside = torch.from_numpy(channel[voxels])
        if gamma == 1 or inside.numel() == 0 or inside.min() == inside.max():
            continue
        low, high = inside.min(), inside.max()
        changed = ((inside - low) / (high - low)) ** gamma
        std, mean = torch.std_mean(inside, correction=0)
        changed_std, changed_mean = torch.std_mean(changed, correction=0)
        channel[voxels] = ((changed - changed_mean) * (std / changed_std) + mean).numpy()
    return output


class RandGammaBeforeNormalize(RandomizableTransform):
    """With probability ``prob``, change the contrast of every channel by a gamma of its own, mean and std restored.

    Image (C, *spatial) in, float32 out, same units (``gamma_in_mask`` has the formula). It belongs before the z-score:
    see ``refuse_gamma_after_normalisation``. MONAI's ``RandAdjustContrast`` rescales by the minimum and maximum over
    all channels together, which flattens a channel in [0, 1] beside one in [1000, 2000].

    Args:
        prob: probability that the image is changed.
        gamma: range of the exponent, drawn uniformly per channel; below 1 brightens, above 1 darkens.

    Raises:
        BundleError: not 0 < gamma[0] <= gamma[1], or prob outside [0, 1].
        DataError: mask of another shape, voxels that are not finite.
    """

    def __init__(self, prob: float = 0.15, gamma: tuple[float, float] = (0.7, 1.5)) -> None:
        _require_parameters(type(self).__name__, prob, gamma)
        RandomizableTransform.__init__(self, prob)
        self.gamma = gamma
        self.gammas = np.ones(0)

    def randomize(self, channels: int) -> None:
        """Draw whether to change the image, then one gamma per channel."""
        super().randomize(None)
        self.gammas = self.R.uniform(*self.gamma, size=channels) if self._do_transform else np.ones(channels)

    def __call__(self, image: Image, mask: Array | None = None, randomize: bool = True, where: str = "image") -> Image:
        """Return the changed image; without ``mask`` every voxel counts; ``where`` names the image in an error."""
        if randomize:
            self.randomize(len(image))
        return _apply(image, self.gammas, mask, where)


class RandGammaBeforeNormalized(RandomizableTransform, MapTransform):
    """The dictionary form of ``RandGammaBeforeNormalize``: one draw of ``prob``, one gamma per key and channel.

    Args:
        keys: the images.
        prob: probability that the sample is changed.
        gamma: range of the exponent.
        mask_key: the foreground; None takes every voxel.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        prob: float = 0.15,
        gamma: tuple[float, float] = (0.7, 1.5),
        mask_key: str | None = "foreground",
        allow_missing_keys: bool = False,
    ) -> None:
        _require_parameters(type(self).__name__, prob, gamma)
        MapTransform.__init__(self, keys, allow_missing_keys)
        RandomizableTransform.__init__(self, prob)
        self.gamma = gamma
        self.mask_key = mask_key
        self.gammas: list[np.ndarray] = []

    def randomize(self, channels: Sequence[int]) -> None:
        """Draw whether to change the sample, then one gamma per key and channel."""
        super().randomize(None)
        self.gammas = [self.R.uniform(*self.gamma, size=c) if self._do_transform else np.ones(c) for c in channels]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the images changed."""
        output = dict(data)
        mask = None
        if self.mask_key is not None:
            mask = require_key(output, self.mask_key, type(self).__name__, "ForegroundMaskd")
        present = list(self.key_iterator(output))
        self.randomize([len(output[key]) for key in present])
        for key, gammas in zip(present, self.gammas, strict=True):
            output[key] = _apply(output[key], gammas, mask, case_name(output, key))
        return output


def refuse_gamma_after_normalisation(transform: Any) -> None:
    """Raise ``BundleError`` when ``transform`` applies a gamma to an image that a signed normalisation already changed.

    ``transform`` is a transform or a list of them; ``Compose``, ``OneOf``, ``SomeOf`` and ``RandomOrder`` are walked,
    and in the latter two any order counts. A gamma is one of ours or MONAI's (Rand)AdjustContrast; a signed
    normalisation is a z-score or a scaling to a range that begins below 0 (a later scaling to a range from 0 upwards
    ends it). Dictionary transforms meet only where they share a key. Functions inside a ``Lambda`` cannot be seen.

    Raises:
        BundleError: naming both transforms and their positions, counted from 0, outermost first.
    """
    _walk(transform, "", {})


_GAMMA = (
    RandGammaBeforeNormalize,
    RandGammaBeforeNormalized,
    AdjustContrast,
    AdjustContrastd,
    RandAdjustContrast,
    RandAdjustContrastd,
)
Z_SCORES = (NormalizeIntensityInMask, NormalizeIntensityInMaskd, NormalizeIntensity, NormalizeIntensityd)

# key (None: an array transform, which meets every key) -> name and position of the normalisation that made it signed
_Signed = dict[Hashable | None, str]


def _walk(transform: Any, position: str, signed: _Signed) -> _Signed:
    """Return which keys are signed after ``transform``, given which were before."""
    if isinstance(transform, list | tuple | Compose):
        members = transform.transforms if isinstance(transform, Compose) else transform
        places = [f"{position}[{index}]" for index in range(len(members))]
        if isinstance(transform, OneOf):
            return _union([_walk(member, place, signed) for member, place in zip(members, places, strict=True)])
        if isinstance(transform, RandomOrder | SomeOf):
            alone = [_walk(member, place, signed) for member, place in zip(members, places, strict=True)]
            for index, member in enumerate(members):
                _walk(member, places[index], _union([signed, *alone[:index], *alone[index + 1 :]]))
            return _union([signed, *alone])
        for member, place in zip(members, places, strict=True):
            signed = _walk(member, place, signed)
        return signed
    return _walk_leaf(transform, f"{position} {type(transform).__name__}".strip(), signed)


def _walk_leaf(transform: Any, name: str, signed: _Signed) -> _Signed:
    keys = transform.keys if isinstance(transform, MapTransform) else (None,)
    if isinstance(transform, _GAMMA):
        for key, normalisation in signed.items():
            if None in keys or key is None or key in keys:
                _refuse(name, normalisation, key)
    minimum = _output_minimum(transform)
    if minimum is None:
        return signed
    if minimum < 0:
        return {**signed, **dict.fromkeys(keys, name)}
    return {} if None in keys else {key: value for key, value in signed.items() if key not in keys}


def _output_minimum(transform: Any) -> float | None:
    """Return the lower end of the range a normalisation maps to, or None when ``transform`` is none."""
    if isinstance(transform, Z_SCORES):
        return -np.inf
    if isinstance(transform, HUWindow):
        return transform.output_range[0]
    if isinstance(transform, HUWindowd):
        return _output_minimum(transform.window)
    if isinstance(transform, ScaleIntensityd | ScaleIntensityRanged | ScaleIntensityRangePercentilesd):
        return _output_minimum(transform.scaler)
    if isinstance(transform, ScaleIntensity):
        return transform.minv
    if isinstance(transform, ScaleIntensityRange | ScaleIntensityRangePercentiles):
        return transform.b_min
    return None


def _union(states: Sequence[_Signed]) -> _Signed:
    return {key: name for state in states for key, name in state.items()}


def _refuse(gamma: str, normalisation: str, key: Hashable | None) -> None:
    on_key = "" if key is None else f" on key '{key}'"
    raise BundleError(
        f"transform {gamma} comes after transform {normalisation}{on_key}",
        "gamma after a z-score shifts the mean to about -0.45 and, where only non-zero voxels are normalised, moves "
        "the background from 0 to -0.62, so training no longer sees what validation sees; in one project this took the "
        "validation Dice from 0.70 to 0.33",
        "move the gamma in front of the normalisation (RandGammaBeforeNormalized), and measure the statistics of the "
        "case before it with MeasureIntensityInMaskd",
    )


def _require_parameters(transform: str, prob: float, gamma: tuple[float, float]) -> None:
    if not 0 <= prob <= 1 or len(gamma) != 2 or not 0 < gamma[0] <= gamma[1]:
        raise BundleError(transform, f"prob {prob}, gamma {gamma}", "give prob in [0, 1] and 0 < gamma[0] <= gamma[1]")


def _apply(image: Image, gammas: np.ndarray, mask: Array | None, where: str) -> Image:
    values = as_numpy(image)
    require_finite(values, where)
    inside = None if mask is None else as_boolean_mask(mask, values, where)
    return like(gamma_in_mask(values, [float(gamma) for gamma in gammas], inside), image)
