"""How deep a U-Net is, and where it pools: a pure function of spacing and patch size.

A convolution should see a cube of tissue, not a cube of voxels. Thick slices are therefore left alone (stride 1,
kernel 1) until the finer axes have been pooled down to about their spacing; from there on all axes are treated alike.
This is the rule of nnU-Net (Isensee et al., Nature Methods 18, 203-211, 2021), as numbers in and numbers out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transforms.errors import BundleError

MINIMUM_STAGES = 3  # one input, one downsampling and one bottleneck block: DynUNet takes no fewer
# Headers store spacing in single precision: 2 mm against 0.9999999 mm is a ratio of two.
_ANISOTROPIC = 2 * (1 - 1e-4)

Axes = tuple[int, ...]


@dataclass(frozen=True)
class UNetPlan:
    """One entry per stage, from full resolution to the bottleneck; kernels and strides have one number per axis."""

    kernels: tuple[Axes, ...]
    strides: tuple[Axes, ...]
    filters: tuple[int, ...]

    @property
    def stages(self) -> int:
        """Number of resolutions, full resolution and bottleneck included."""
        return len(self.strides)

    @property
    def divisor(self) -> Axes:
        """What each axis of an input (in voxels) must be divisible by."""
        return tuple(math.prod(along_axis) for along_axis in zip(*self.strides, strict=True))


def plan_unet(
    spacing_mm: Sequence[float],
    patch_size: Sequence[int],
    *,
    minimum_feature_size: int = 4,
    maximum_stages: int = 6,
    base_filters: int = 32,
    maximum_filters: int = 320,
) -> UNetPlan:
    """Plan kernels, strides and filters of a 2D or 3D U-Net.

    An axis is halved while its feature map has at least ``2 * minimum_feature_size`` voxels and its spacing is less
    than twice the finest spacing among the axes that can still be halved. The kernel is 1 along an axis until its
    spacing is less than twice the finest of all axes, then 3 for good; the bottleneck always has 3, so that slices
    however thick see their neighbours at least once. Filters double per stage from ``base_filters`` up to
    ``maximum_filters``.

    Args:
        spacing_mm: voxel spacing per axis in mm, two or three axes.
        patch_size: patch in voxels, same axes.
        minimum_feature_size: smallest feature map, in voxels per axis, that pooling may leave.
        maximum_stages: most stages, the bottleneck included.
        base_filters: filters of the first stage.
        maximum_filters: most filters of any stage.

    Raises:
        BundleError: spacing or patch is malformed, fewer than three stages fit, or the patch is not divisible by the
            strides (the message names the axis and the nearest sizes that are).
    """
    _check_geometry(spacing_mm, patch_size)
    strides = _plan_strides(spacing_mm, patch_size, minimum_feature_size, maximum_stages)
    if len(strides) < MINIMUM_STAGES:
        raise BundleError(
            f"network plan: patch_size {list(patch_size)} allows {len(strides)} of {MINIMUM_STAGES} stages",
            f"each halving leaves at least {minimum_feature_size} voxels; at most {maximum_stages} stages were allowed",
            f"use a patch of at least {minimum_feature_size * 2 ** (MINIMUM_STAGES - 1)} voxels along the fine axes "
            f"and at least {MINIMUM_STAGES} stages (filters)",
        )
    plan = UNetPlan(
        kernels=_plan_kernels(spacing_mm, strides),
        strides=strides,
        filters=tuple(min(base_filters * 2**stage, maximum_filters) for stage in range(len(strides))),
    )
    for axis, (size, divisor) in enumerate(zip(patch_size, plan.divisor, strict=True)):
        if size % divisor:
            valid = _nearest_valid_sizes(spacing_mm, patch_size, axis, minimum_feature_size, maximum_stages)
            raise BundleError(
                f"network plan: patch_size[{axis}] = {size} cannot be halved as often as the network pools",
                f"patch {list(patch_size)} at spacing {list(spacing_mm)} mm needs axis {axis} divisible by {divisor}",
                f"set patch_size[{axis}] to {' or '.join(map(str, valid))}",
            )
    return plan


def _check_geometry(spacing_mm: Sequence[float], patch_size: Sequence[int]) -> None:
    if len(spacing_mm) != len(patch_size) or len(patch_size) not in (2, 3):
        raise BundleError(
            f"network plan: spacing {list(spacing_mm)} and patch_size {list(patch_size)} do not describe one image",
            f"{len(spacing_mm)} and {len(patch_size)} axes; expected two each, or three each",
            "give one spacing in mm and one size in voxels per axis",
        )
    for axis, (spacing, size) in enumerate(zip(spacing_mm, patch_size, strict=True)):
        if not (math.isfinite(spacing) and spacing > 0 and size % 1 == 0 and size > 0):
            raise BundleError(
                f"network plan: axis {axis} has spacing {spacing} mm and patch size {size}",
                "expected a positive spacing and a positive whole number of voxels",
                "correct spacing_mm and patch_size",
            )


def _plan_strides(
    spacing_mm: Sequence[float], patch_size: Sequence[int], minimum_feature_size: int, maximum_stages: int
) -> tuple[Axes, ...]:
    spacing, size = list(spacing_mm), list(patch_size)
    strides = [(1,) * len(size)]
    while len(strides) < maximum_stages:
        large = [axis for axis, voxels in enumerate(size) if voxels >= 2 * minimum_feature_size]
        if not large:
            break
        finest = min(spacing[axis] for axis in large)
        stride = tuple(2 if a in large and spacing[a] < _ANISOTROPIC * finest else 1 for a in range(len(size)))
        spacing = [mm * step for mm, step in zip(spacing, stride, strict=True)]
        size = [voxels // step for voxels, step in zip(size, stride, strict=True)]
        strides.append(stride)
    return tuple(strides)


def _plan_kernels(spacing_mm: Sequence[float], strides: tuple[Axes, ...]) -> tuple[Axes, ...]:
    spacing, kernel = list(spacing_mm), [1] * len(spacing_mm)
    kernels = []
    for stride in strides:
        spacing = [mm * step for mm, step in zip(spacing, stride, strict=True)]
        kernel = [3 if k == 3 or mm < _ANISOTROPIC * min(spacing) else 1 for k, mm in zip(kernel, spacing, strict=True)]
        kernels.append(tuple(kernel))
    return (*kernels[:-1], (3,) * len(spacing_mm))


def _nearest_valid_sizes(
    spacing_mm: Sequence[float], patch_size: Sequence[int], axis: int, minimum_feature_size: int, maximum_stages: int
) -> list[int]:
    """Return the nearest smaller and larger size of one axis that the plan for that size divides."""

    def divides(size: int) -> bool:
        resized = [*patch_size[:axis], size, *patch_size[axis + 1 :]]
        strides = _plan_strides(spacing_mm, resized, minimum_feature_size, maximum_stages)
        return len(strides) >= MINIMUM_STAGES and size % math.prod(stride[axis] for stride in strides) == 0

    size = patch_size[axis]
    smaller = next((s for s in range(size - 1, 0, -1) if divides(s)), None)
    # A multiple of the deepest possible divisor is always valid, so the search upwards ends.
    larger = next(s for s in range(size + 1, size + 2 ** (maximum_stages - 1) + 1) if divides(s))
    return [larger] if smaller is None else [smaller, larger]
