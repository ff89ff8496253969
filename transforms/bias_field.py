"""N4 bias field correction: fitted on a coarse grid, applied on the image's own grid.

The field is smooth, so every fourth voxel is enough to fit it, and its logarithm is evaluated on the full grid, so no
voxel is interpolated. Before sampling, the image is padded (outside the mask) to a multiple of the shrink factor plus
one: coarse and full grid then begin and end at the same points, and the field does not stretch for sizes that do not
divide.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813  (the name its own documentation uses)
from monai.transforms import MapTransform, Transform

from transforms.errors import BundleError, DataError
from transforms.intensity import one_per_key
from transforms.masks import (
    Array,
    Image,
    as_boolean_mask,
    as_numpy,
    case_name,
    foreground_mask,
    like,
    require_finite,
    require_foreground,
    require_key,
    spacing_of,
)

SPLINE_ORDER = 3
MINIMUM_VOXELS_PER_AXIS = 6
# N4 sharpens a histogram of log intensities with 200 bins: it needs two voxels per bin, and dark ones stretch it.
MINIMUM_SAMPLES = 400
DARKEST_SHARE = 0.01
# ITK sums once per work unit, so the last bits follow their number: it is fixed, whatever the machine has.
WORK_UNITS = 4


def estimate_log_bias_field(
    channel: np.ndarray,
    mask: np.ndarray,
    spacing: Sequence[float],
    shrink_factor: int = 4,
    iterations: Sequence[int] = (50, 50, 50, 50),
    tolerance: float = 1e-3,
    spline_distance: float = 200.0,
    where: str = "image",
) -> np.ndarray:
    """Return the natural logarithm of the bias field of ``channel`` (*spatial), 2D or 3D: float32, mean 0 in ``mask``.

    Model: image = truth x field. Only voxels in ``mask`` above 1 % of the 99th percentile of its positive voxels enter
    the fit, for the logarithm of zero, negative or nearly zero voxels says nothing about the field; the field is smooth
    and holds for them too. Arguments as in ``N4BiasFieldCorrection``; ``spacing`` in mm per axis.

    Raises:
        DataError: fewer than two axes longer than one voxel, or fewer than 400 usable voxels.
    """
    usable = mask & (channel > 0)
    if usable.any():
        usable &= channel > DARKEST_SHARE * np.percentile(channel[usable], 99)
    if usable.any() and channel[usable].min() == channel[usable].max():
        return np.zeros(channel.shape, dtype=np.float32)

    # A single slice has no extent to fit along: it is corrected as the plane that it is.
    long_axes = [axis for axis, size in enumerate(channel.shape) if size > 1]
    if len(long_axes) < 2:
        raise DataError(where, f"shape {channel.shape} is neither 2D nor 3D", "N4 needs two axes longer than one voxel")
    plane = [channel.shape[axis] for axis in long_axes]
    log_field = _fit(
        channel.reshape(plane).astype(np.float32),
        usable.reshape(plane),
        [float(spacing[axis]) for axis in long_axes],
        _shrink_factors(usable.reshape(plane), shrink_factor, where),
        _n4_filter(iterations, tolerance, spline_distance, plane, [spacing[axis] for axis in long_axes]),
    ).reshape(channel.shape)
    return log_field - np.float32(log_field[mask].mean(dtype=np.float64))


def _shrink_factors(usable: np.ndarray, shrink_factor: int, where: str) -> list[int]:
    """Return the factor for each axis: ``shrink_factor``, or less where too few voxels would remain for a fit."""
    for largest in range(shrink_factor, 0, -1):
        factors = [min(max(size // MINIMUM_VOXELS_PER_AXIS, 1), largest) for size in usable.shape]
        pads = [_padding(size, factor) for size, factor in zip(usable.shape, factors, strict=True)]
        samples = np.pad(usable, pads)[tuple(slice(None, None, factor) for factor in factors)]
        if np.count_nonzero(samples) >= MINIMUM_SAMPLES:
            return factors
    raise DataError(
        f"{where}: N4 bias field correction",
        f"{np.count_nonzero(usable)} voxels of the foreground are usable (positive); N4 needs {MINIMUM_SAMPLES}",
        "check that the mask covers the tissue; an image this small has no bias field to correct",
    )


def _n4_filter(
    iterations: Sequence[int], tolerance: float, spline_distance: float, shape: Sequence[int], spacing: Sequence[float]
) -> sitk.N4BiasFieldCorrectionImageFilter:
    spans = [max(1, round((n - 1) * mm / spline_distance)) for n, mm in zip(shape, spacing, strict=True)]
    n4 = sitk.N4BiasFieldCorrectionImageFilter()
    n4.SetMaximumNumberOfIterations([int(n) for n in iterations])
    n4.SetConvergenceThreshold(tolerance)
    n4.SetSplineOrder(SPLINE_ORDER)
    n4.SetNumberOfControlPoints([span + SPLINE_ORDER for span in reversed(spans)])
    n4.SetMaskLabel(1)
    return n4


def _fit(
    channel: np.ndarray,
    usable: np.ndarray,
    spacing: Sequence[float],
    factors: Sequence[int],
    n4: sitk.N4BiasFieldCorrectionImageFilter,
) -> np.ndarray:
    """Fit on every ``factors``-th voxel of the padded image; return the log field (*spatial) on the full grid."""
    pads = [_padding(size, factor) for size, factor in zip(channel.shape, factors, strict=True)]
    coarse = tuple(slice(None, None, factor) for factor in factors)
    coarse_spacing = [mm * factor for mm, factor in zip(spacing, factors, strict=True)]
    padded_shape = [before + size + after for size, (before, after) in zip(channel.shape, pads, strict=True)]
    full_grid = sitk.Image(padded_shape[::-1], sitk.sitkFloat32)
    full_grid.SetSpacing(list(spacing)[::-1])
    with _fixed_work_units():
        n4.Execute(
            _sitk_image(np.pad(channel, pads, mode="edge")[coarse], coarse_spacing),
            _sitk_image(np.pad(usable, pads)[coarse].astype(np.uint8), coarse_spacing),
        )
        log_field = sitk.GetArrayFromImage(n4.GetLogBiasFieldAsImage(full_grid))
    inner = tuple(slice(before, before + size) for size, (before, _) in zip(channel.shape, pads, strict=True))
    return np.ascontiguousarray(log_field[inner])


@contextmanager
def _fixed_work_units() -> Iterator[None]:
    """Hold ITK's global number of threads; the filter's own setting does not reach the spline fit inside it."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(WORK_UNITS)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


def _padding(size: int, factor: int) -> tuple[int, int]:
    """Return the padding on both sides that makes ``size`` a multiple of ``factor`` plus one."""
    missing = (1 - size) % factor
    return missing // 2, missing - missing // 2


def _sitk_image(values: np.ndarray, spacing: Sequence[float]) -> sitk.Image:
    """Return ``values`` as a SimpleITK image; its axes run in the reverse order of numpy's."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(values))
    image.SetSpacing(list(spacing)[::-1])
    return image


class N4BiasFieldCorrection(Transform):
    """Divide each channel by its smooth multiplicative bias field: (C, *spatial) in, float32 out, source units.

    corrected = image / exp(log field), with the field's geometric mean 1 over the mask, so that intensities keep their
    scale. Source: Tustison et al. 2010, "N4ITK", doi:10.1109/TMI.2010.2046908; SimpleITK's implementation. N4 also
    takes smooth anatomy for bias: use it for coils, not as a contrast filter. The result is the same to the last bit
    for any number of cores.

    Every axis keeps at least 6 voxels (or all it has) on the coarse grid, and the mask at least 400: thin axes and
    small images are shrunk less. A channel that is constant over the usable voxels is returned unchanged, with a field
    of 1. Zero and negative voxels take no part in the fit and are divided by the field like all others.

    Args:
        shrink_factor: take every n-th voxel along each axis for the fit.
        iterations: at most so many per level; the spline's resolution doubles with each level.
        tolerance: stop a level when the field changes by less (coefficient of variation).
        spline_distance: length of one span of the cubic spline at the first level, in mm; each axis has
            max(1, round(extent / distance)) spans.
        return_field: return (corrected, field) instead of the corrected image alone.

    Raises:
        BundleError: a parameter that is not positive.
        DataError: no spacing (neither a MetaTensor nor the argument), empty mask, mask of another shape, too few usable
            voxels, or voxels that are not finite.
    """

    def __init__(
        self,
        shrink_factor: int = 4,
        iterations: Sequence[int] = (50, 50, 50, 50),
        tolerance: float = 1e-3,
        spline_distance: float = 200.0,
        return_field: bool = False,
    ) -> None:
        if shrink_factor < 1 or not iterations or min(iterations) < 1 or tolerance <= 0 or spline_distance <= 0:
            raise BundleError(
                "N4BiasFieldCorrection",
                f"shrink_factor {shrink_factor}, iterations {tuple(iterations)}, tolerance {tolerance}, "
                f"spline_distance {spline_distance}",
                "give positive values, and at least one level of iterations",
            )
        self.shrink_factor = shrink_factor
        self.iterations = tuple(iterations)
        self.tolerance = tolerance
        self.spline_distance = spline_distance
        self.return_field = return_field

    def __call__(
        self,
        image: Image,
        mask: Array | None = None,
        spacing: Sequence[float] | None = None,
        where: str = "image",
    ) -> Image | tuple[Image, Image]:
        """Return the corrected image, with ``return_field`` also the field (C, *spatial).

        Without ``mask`` each channel's Otsu mask is taken (``ForegroundMask(method="otsu")``). ``spacing`` (mm per
        axis) goes before the spacing in the affine of a MetaTensor. ``where`` names the image in an error.
        """
        values = as_numpy(image)
        require_finite(values, where)
        voxel_size = spacing_of(image, spacing, where)
        inside = None if mask is None else as_boolean_mask(mask, values, where)
        if inside is not None:
            require_foreground(inside, where)
        log_fields = [self._log_field(channel, inside, voxel_size, where) for channel in values]
        field = np.exp(np.stack(log_fields))
        corrected = like(values.astype(np.float32) / field, image)
        return (corrected, like(field, image)) if self.return_field else corrected

    def _log_field(
        self, channel: np.ndarray, mask: np.ndarray | None, spacing: Sequence[float], where: str
    ) -> np.ndarray:
        if channel.min() == channel.max():
            return np.zeros(channel.shape, dtype=np.float32)
        inside = foreground_mask(channel[None], "otsu", where) if mask is None else mask
        return estimate_log_bias_field(
            channel, inside, spacing, self.shrink_factor, self.iterations, self.tolerance, self.spline_distance, where
        )


class N4BiasFieldCorrectiond(MapTransform):
    """The dictionary form of ``N4BiasFieldCorrection``.

    Args:
        keys: the images; their spacing comes from their affine.
        shrink_factor, iterations, tolerance, spline_distance: see ``N4BiasFieldCorrection``.
        mask_key: the foreground, or None for each channel's Otsu mask.
        field_key: where the fields go, one name per key, or None.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        shrink_factor: int = 4,
        iterations: Sequence[int] = (50, 50, 50, 50),
        tolerance: float = 1e-3,
        spline_distance: float = 200.0,
        mask_key: str | None = None,
        field_key: str | Sequence[str] | None = None,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.correct = N4BiasFieldCorrection(shrink_factor, iterations, tolerance, spline_distance, return_field=True)
        self.mask_key = mask_key
        self.field_keys = one_per_key(type(self).__name__, self.keys, field_key)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the images corrected."""
        output = dict(data)
        mask = None
        if self.mask_key is not None:
            mask = require_key(output, self.mask_key, type(self).__name__, "ForegroundMaskd")
        for key, field_key in self.key_iterator(output, self.field_keys):
            output[key], field = self.correct(output[key], mask, where=case_name(output, key))
            if field_key is not None:
                output[field_key] = field
        return output
