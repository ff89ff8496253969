"""Intensities on a known scale: percentile clipping, z-score and Hounsfield windows, all within the foreground.

Every statistic is measured per channel over the mask, in float64, and the result is float32. The statistics of a whole
case can be measured once and kept beside the image, so that a patch is normalised like the case it was cut from.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.transforms import MapTransform, Transform
from monai.utils import ensure_tuple

from transforms.errors import BundleError, DataError
from transforms.masks import (
    Array,
    Image,
    as_boolean_mask,
    as_numpy,
    case_name,
    like,
    require_finite,
    require_foreground,
    require_key,
)

Windows = str | Sequence[str] | Mapping[str, tuple[float, float]]

# A float32 channel whose std is below a millionth of its mean holds rounding errors and no contrast.
RELATIVE_STD_FLOOR = 1e-6

# (level, width) in HU. Source: Radiopaedia, "Windowing (CT)", the customary display windows; ranges at their middle.
HU_WINDOWS: dict[str, tuple[float, float]] = {
    "brain": (40, 80),
    "stroke": (40, 40),
    "subdural": (75, 215),
    "bone": (600, 2800),
    "head_soft_tissue": (40, 375),
    "lung": (-600, 1500),
    "mediastinum": (50, 350),
    "abdomen": (50, 400),
    "liver": (30, 150),
    "spine_soft_tissue": (50, 250),
    "spine_bone": (400, 1800),
}
HU_PADDING = -1100.0
HU_MAXIMUM = 32767.0
HU_MINIMUM_SPAN = 20.0
HU_BODY_MAXIMUM = 100.0


def clip_percentiles_in_mask(image: np.ndarray, mask: np.ndarray, lower: float, upper: float) -> np.ndarray:
    """Clip each channel of ``image`` (C, *spatial) to its own percentiles over ``mask`` (*spatial): float32.

    y = min(max(x, q_lower), q_upper). The percentile p of n sorted values v_0..v_(n-1) is the linear interpolation at
    the position p/100 (n - 1), numpy's default (Hyndman & Fan 1996, definition 7).
    """
    clipped = np.empty(image.shape, dtype=np.float32)
    for channel, output in zip(image, clipped, strict=True):
        np.clip(channel, *np.percentile(channel[mask], (lower, upper)), out=output, casting="unsafe")
    return clipped


def measure_statistics(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return (mean, standard deviation, ddof 0) of each channel over ``mask``: float32 (C, 2), from float64 sums."""
    values = [channel[mask].astype(np.float64) for channel in image]
    return np.array([(v.mean(), v.std()) for v in values], dtype=np.float32)


def normalize(image: np.ndarray, mask: np.ndarray, statistics: np.ndarray, background: float) -> np.ndarray:
    """Return the z-score (x - mean) / std in ``mask`` and ``background`` outside: float32 (C, *spatial).

    A channel with std <= 1e-6 |mean| is constant: it becomes ``background`` everywhere, and nothing is divided.
    """
    normalized = np.full(image.shape, background, dtype=np.float32)
    for channel, output, (mean, std) in zip(image, normalized, statistics.astype(np.float32), strict=True):
        if std > RELATIVE_STD_FLOOR * abs(mean):
            output[mask] = (channel[mask].astype(np.float32) - mean) / std
    return normalized


def denormalize(image: Image, statistics: Array) -> Image:
    """Return z std + mean per channel, float32: undoes ``NormalizeIntensityInMask`` inside the mask, in source units.

    Outside the mask the source values are not kept anywhere; a constant channel comes back as its mean (background 0).
    """
    values = as_numpy(image).astype(np.float32)
    mean, std = as_numpy(statistics).astype(np.float32).T.reshape(2, -1, *[1] * (values.ndim - 1))
    return like(values * std + mean, image)


def require_hounsfield(image: np.ndarray, minimum_air: float | None, where: str) -> None:
    """Raise ``DataError``, naming the measured minimum and maximum, unless ``image`` can be in Hounsfield units.

    Voxels below -1100 HU are padding around the reconstructed circle and are not judged. For the others:
    1. they exist, and the maximum is at most 32767 (the extended CT scale of 16 bits);
    2. they span at least 20 HU: values in [0, 1] or z-scores do not, any anatomy does;
    3. unless ``minimum_air`` is None: the minimum is <= ``minimum_air`` (a head or body has air near -1000 around it)
       and the maximum > 100 (bone). Stored values without their rescale intercept start at 0 and fail here.
    """
    require_finite(image, where)
    judged = image[image >= HU_PADDING]
    reason = ""
    if judged.size == 0:
        reason = "every voxel is padding (below -1100)"
    elif judged.max() > HU_MAXIMUM:
        reason = f"the maximum exceeds {HU_MAXIMUM:g}"
    elif float(judged.max()) - float(judged.min()) < HU_MINIMUM_SPAN:
        reason = f"the values span less than {HU_MINIMUM_SPAN:g}, as scaled or z-scored data do"
    elif minimum_air is not None and judged.min() > minimum_air:
        reason = f"there is no air: expected a minimum <= {minimum_air:g}"
    elif minimum_air is not None and judged.max() <= HU_BODY_MAXIMUM:
        reason = f"there is no bone: expected a maximum > {HU_BODY_MAXIMUM:g}"
    if reason:
        raise DataError(
            f"{where}: not in Hounsfield units",
            f"minimum {image.min():g}, maximum {image.max():g}; {reason}",
            "apply the rescale slope and intercept, window before any other scaling; for data cropped to "
            "tissue set minimum_air to null",
        )


class ClipIntensityPercentilesInMask(Transform):
    """Clip each channel to its own percentiles over the foreground; voxels outside are clipped to the same bounds.

    Image (C, *spatial) in, float32 out, same units; formula in ``clip_percentiles_in_mask``. With a mask of ones it
    equals MONAI's ``ClipIntensityPercentiles(channel_wise=True)``.

    Args:
        lower: lower percentile, 0 to 100.
        upper: upper percentile, above ``lower``.

    Raises:
        BundleError: not 0 <= lower < upper <= 100.
        DataError: empty mask, mask of another shape, voxels that are not finite.
    """

    def __init__(self, lower: float = 0.5, upper: float = 99.5) -> None:
        if not 0 <= lower < upper <= 100:
            raise BundleError(
                "ClipIntensityPercentilesInMask", f"lower {lower}, upper {upper}", "give 0 <= lower < upper <= 100"
            )
        self.lower = lower
        self.upper = upper

    def __call__(self, image: Image, mask: Array, where: str = "image") -> Image:
        """Return the clipped image; ``where`` names it in an error."""
        values, inside = _image_and_mask(image, mask, where)
        require_foreground(inside, where)
        return like(clip_percentiles_in_mask(values, inside, self.lower, self.upper), image)


class ClipIntensityPercentilesInMaskd(MapTransform):
    """The dictionary form of ``ClipIntensityPercentilesInMask``, with the mask at ``mask_key``."""

    def __init__(
        self,
        keys: str | Sequence[str],
        lower: float = 0.5,
        upper: float = 99.5,
        mask_key: str = "foreground",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.clip = ClipIntensityPercentilesInMask(lower, upper)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the images clipped."""
        output = dict(data)
        mask = require_key(output, self.mask_key, type(self).__name__, "ForegroundMaskd")
        for key in self.key_iterator(output):
            output[key] = self.clip(output[key], mask, case_name(output, key))
        return output


class MeasureIntensityInMaskd(MapTransform):
    """Store (mean, std) of each channel over the foreground: float32 array (C, 2) in the units of the image.

    Placed after the last transform that changes intensities of the whole case and before the patch is cut, so that
    ``NormalizeIntensityInMaskd`` normalises every patch alike.

    Args:
        keys: the images.
        mask_key: the foreground.
        statistics_key: where the statistics go; one per key.

    Raises:
        BundleError: not one statistics key per key; no mask in the dictionary.
        DataError: empty mask, mask of another shape, voxels that are not finite.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        mask_key: str = "foreground",
        statistics_key: str | Sequence[str] = "intensity_statistics",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.statistics_keys = one_per_key(type(self).__name__, self.keys, statistics_key)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the statistics added; the images are not touched."""
        output = dict(data)
        mask = require_key(output, self.mask_key, type(self).__name__, "ForegroundMaskd")
        for key, statistics_key in self.key_iterator(output, self.statistics_keys):
            where = case_name(output, key)
            values, inside = _image_and_mask(output[key], mask, where)
            require_foreground(inside, where)
            output[statistics_key] = measure_statistics(values, inside)
        return output


class NormalizeIntensityInMask(Transform):
    """Z-score per channel: y = (x - mean) / std (ddof 0) inside the mask, ``background`` outside; float32, no unit.

    Mean and std are measured over the mask, or given. A channel with std <= 1e-6 |mean| becomes ``background``
    everywhere: rounding errors are never blown up to unit variance. ``denormalize`` undoes it inside the mask. On an
    image whose foreground is where it is not zero, it equals MONAI's ``NormalizeIntensity(nonzero=True,
    channel_wise=True)``.

    Args:
        background: the value outside the mask.

    Raises:
        BundleError: statistics are not of shape (C, 2).
        DataError: mask of another shape, voxels that are not finite, or an empty mask while statistics are not given (a
            patch cut from the background, with the statistics of its case, is legitimate: all ``background``).
    """

    def __init__(self, background: float = 0.0) -> None:
        self.background = background

    def __call__(self, image: Image, mask: Array, statistics: Array | None = None, where: str = "image") -> Image:
        """Return the normalised image; ``statistics`` is (C, 2), and ``where`` names the image in an error."""
        values, inside = _image_and_mask(image, mask, where)
        if statistics is None:
            require_foreground(inside, where)
            measured = measure_statistics(values, inside)
        else:
            measured = as_numpy(statistics)
        if measured.shape != (len(values), 2):
            raise BundleError(
                f"{where}: intensity statistics",
                f"they have shape {measured.shape}, expected ({len(values)}, 2): mean and std per channel",
                "measure the statistics of this image, after the transforms that change its channels",
            )
        return like(normalize(values, inside, measured, self.background), image)


class NormalizeIntensityInMaskd(MapTransform):
    """The dictionary form of ``NormalizeIntensityInMask``.

    Args:
        keys: the images.
        background: the value outside the mask.
        mask_key: the foreground.
        statistics_key: where ``MeasureIntensityInMaskd`` stored the statistics of the whole case, one per key; None
            measures them here.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        background: float = 0.0,
        mask_key: str = "foreground",
        statistics_key: str | Sequence[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.normalize = NormalizeIntensityInMask(background)
        self.statistics_keys = one_per_key(type(self).__name__, self.keys, statistics_key)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the images normalised."""
        output = dict(data)
        name = type(self).__name__
        mask = require_key(output, self.mask_key, name, "ForegroundMaskd")
        for key, statistics_key in self.key_iterator(output, self.statistics_keys):
            statistics = None
            if statistics_key is not None:
                statistics = require_key(output, statistics_key, name, "MeasureIntensityInMaskd")
            output[key] = self.normalize(output[key], mask, statistics, case_name(output, key))
        return output


class HUWindow(Transform):
    """Window a CT in Hounsfield units: (1, *spatial) in, one float32 channel per window out.

    With level L and width W in HU and output range [a, b]:
        y = a + (b - a) min(max((x - (L - W/2)) / W, 0), 1)
    the bounds are L - W/2 and L + W/2 (DICOM PS3.3 C.11.2.1.3.2, LINEAR_EXACT).

    Args:
        windows: a name of ``HU_WINDOWS``, names, or a mapping from name to (level, width); channels in this order.
        output_range: (a, b), a < b.
        minimum_air: highest minimum that still counts as air, in HU; None for data cropped to tissue.

    Raises:
        BundleError: unknown name, width that is not positive, a >= b.
        DataError: more than one channel, or values that are not HU (``require_hounsfield``).
    """

    def __init__(
        self,
        windows: Windows,
        output_range: tuple[float, float] = (0.0, 1.0),
        minimum_air: float | None = -500.0,
    ) -> None:
        self.windows = _resolve_windows(windows)
        self.output_range = (float(output_range[0]), float(output_range[1]))
        if self.output_range[0] >= self.output_range[1]:
            raise BundleError("HUWindow: output_range", f"{output_range} is not increasing", "give (low, high)")
        self.minimum_air = minimum_air

    def __call__(self, image: Image, where: str = "image") -> Image:
        """Return the windowed channels; ``where`` names the image in an error."""
        values = as_numpy(image)
        if len(values) != 1:
            raise DataError(where, f"a CT has 1 channel, this image has {len(values)}", "window each CT on its own")
        require_hounsfield(values, self.minimum_air, where)
        hounsfield = values[0].astype(np.float64)
        low, high = self.output_range
        shares = [np.clip((hounsfield - (level - width / 2)) / width, 0, 1) for level, width in self.windows.values()]
        return like((low + (high - low) * np.stack(shares)).astype(np.float32), image)


class HUWindowd(MapTransform):
    """The dictionary form of ``HUWindow``."""

    def __init__(
        self,
        keys: str | Sequence[str],
        windows: Windows,
        output_range: tuple[float, float] = (0.0, 1.0),
        minimum_air: float | None = -500.0,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window = HUWindow(windows, output_range, minimum_air)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the CTs windowed."""
        output = dict(data)
        for key in self.key_iterator(output):
            output[key] = self.window(output[key], case_name(output, key))
        return output


def one_per_key(transform: str, keys: Sequence[Hashable], names: str | Sequence[str] | None) -> tuple[str | None, ...]:
    """Return one name per key, or None per key; raise ``BundleError`` when they are not as many."""
    if names is None:
        return (None,) * len(keys)
    resolved: tuple[str, ...] = ensure_tuple(names)
    if len(resolved) != len(keys) or len(set(resolved)) != len(keys):
        raise BundleError(
            f"{transform}: keys {list(keys)}", f"got the names {list(resolved)}", "give one name of its own to each key"
        )
    return resolved


def _image_and_mask(image: Array, mask: Array, where: str) -> tuple[np.ndarray, np.ndarray]:
    values = as_numpy(image)
    require_finite(values, where)
    return values, as_boolean_mask(mask, values, where)


def _resolve_windows(windows: Windows) -> dict[str, tuple[float, float]]:
    if isinstance(windows, Mapping):
        resolved = {name: (float(level), float(width)) for name, (level, width) in windows.items()}
    else:
        names = [windows] if isinstance(windows, str) else [str(name) for name in windows]
        unknown = [name for name in names if name not in HU_WINDOWS]
        if unknown:
            raise BundleError(
                f"HUWindow: window '{unknown[0]}'", f"expected one of {', '.join(HU_WINDOWS)}", "choose one"
            )
        resolved = {name: HU_WINDOWS[name] for name in names}
    if not resolved or any(width <= 0 for _, width in resolved.values()):
        raise BundleError("HUWindow: windows", f"{resolved}", "give at least one window, each with a positive width")
    return resolved
