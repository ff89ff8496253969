"""Where the head phantom's anatomy comes from: the MNI152 average brain in nilearn's wheel, or an analytic ellipsoid.

Both give the same thing, fractions of CSF, grey and white matter on a 1 mm grid; around the brain two smooth distances
are measured, to the inner table of the skull and to the skin, from which every shell follows at any resolution. The
skull is closed all around: there is no face, no neck and no foramen magnum.
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from transforms.errors import UsageError

SOURCES = ("mni152", "ellipsoid")
SUBARACHNOID_MM = 2.5
SKULL_MM = 6.5
SCALP_MM = 5.0
_SKULL_CLOSING_MM = 20.0
_SKIN_CLOSING_MM = 40.0
_DEPTH_SPACING_MM = 2.0
_SHARPENING = 2.0


@dataclass(frozen=True)
class HeadSource:
    """One head in world coordinates (RAS, mm); every array is float32 and read-only.

    Attributes:
        tissues: fractions (3, X, Y, Z) in [0, 1] of CSF, grey and white matter inside the brain, nothing outside it.
        affine: (4, 4), voxel indices of ``tissues`` to world mm.
        inner: distance to the inner table of the skull in mm, negative inside.
        outer: distance to the skin in mm, negative inside.
        depth_affine: (4, 4), voxel indices of ``inner`` and ``outer`` to world mm.
        low: (3,) lowest corner of the skin in world mm.
        high: (3,) highest corner.
    """

    tissues: NDArray[np.float32]
    affine: NDArray[np.float64]
    inner: NDArray[np.float32]
    outer: NDArray[np.float32]
    depth_affine: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def resolve_source(source: str) -> str:
    """Return the source meant: ``auto`` is ``mni152`` with nilearn, and ``ellipsoid``, with a warning, without it.

    Raises:
        UsageError: the name is unknown, or ``mni152`` is asked for and nilearn is not installed.
    """
    if source not in (*SOURCES, "auto"):
        raise UsageError(
            f"head phantom, source '{source}'",
            "this source does not exist",
            f"choose one of {', '.join(SOURCES)}, auto",
        )
    if source == "ellipsoid" or importlib.util.find_spec("nilearn"):
        return "mni152" if source == "auto" else source
    if source == "mni152":
        raise UsageError(
            "head phantom, source 'mni152'",
            "nilearn, whose wheel carries the MNI152 brain, is not installed",
            "install the extra 'demo' (nilearn), or choose source 'ellipsoid'",
        )
    warnings.warn("nilearn is not installed: the head phantom is the analytic ellipsoid head", stacklevel=2)
    return "ellipsoid"


@lru_cache(maxsize=2)
def head_source(source: str) -> HeadSource:
    """Load ``mni152`` or ``ellipsoid`` and measure the shells around its brain; kept in the process, never on disk."""
    tissues, affine = _mni152_tissues() if source == "mni152" else _ellipsoid_tissues()
    inner, outer, depth_affine = _depths(tissues.sum(0), affine)
    skin = np.argwhere(outer < 0)
    low, high = (depth_affine[:3, :3] @ corner + depth_affine[:3, 3] for corner in (skin.min(0), skin.max(0)))
    for array in (tissues, inner, outer):
        array.setflags(write=False)
    return HeadSource(tissues, affine, inner, outer, depth_affine, low, high)


@lru_cache(maxsize=2)
def averaged_tissues(source: str, spacing_mm: tuple[float, float, float]) -> NDArray[np.float32]:
    """Tissue fractions of ``source`` averaged over about one voxel of ``spacing_mm``: sampling them does not alias.

    The Gaussian has the variance that a box of the voxel's width adds to one of 1 mm: (s^2 - 1) / 12.
    """
    sigmas = [np.sqrt(max(0.0, s**2 - 1) / 12) for s in spacing_mm]
    tissues = np.stack([ndimage.gaussian_filter(t, sigmas, mode="constant") for t in head_source(source).tissues])
    tissues.setflags(write=False)
    return tissues


def _mni152_tissues() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """CSF, grey and white matter of the ICBM152 2009a symmetric average (Fonov et al., NeuroImage 54, 2011).

    The average of 152 brains is more blurred than any of them: the fractions are sharpened by a power and renormalised.
    CSF is what the skull-stripped T1 template holds besides grey and white matter.
    """
    from nilearn import datasets

    template = datasets.load_mni152_template(resolution=1)
    brain = template.get_fdata(dtype=np.float32) > 0
    maps = (datasets.load_mni152_gm_template(resolution=1), datasets.load_mni152_wm_template(resolution=1))
    grey, white = (image.get_fdata(dtype=np.float32) * brain for image in maps)
    csf = np.clip(brain - grey - white, 0, 1)
    powers = np.stack([csf, grey, white]) ** _SHARPENING
    fractions = powers / np.maximum(powers.sum(0), 1e-6) * brain
    corners = np.argwhere(brain)
    low, high = np.maximum(corners.min(0) - 2, 0), corners.max(0) + 3
    affine = np.array(template.affine, dtype=np.float64)
    affine[:3, 3] += affine[:3, :3] @ low
    cropped = fractions[:, low[0] : high[0], low[1] : high[1], low[2] : high[2]]
    return np.ascontiguousarray(cropped, dtype=np.float32), affine


def _ellipsoid_tissues() -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """CSF, grey and white matter of an analytic brain: folded cortex, white matter, two ventricles, two grey nuclei."""
    semi_axes = np.array([68.0, 86.0, 64.0])
    origin = -np.ceil(semi_axes) - 4
    axes = [np.arange(o, -o + 1) for o in origin]
    x, y, z = np.meshgrid(*axes, indexing="ij", sparse=True)
    radius = np.sqrt((x / semi_axes[0]) ** 2 + (y / semi_axes[1]) ** 2 + (z / semi_axes[2]) ** 2)
    folds = np.cos(x / 5) * np.cos(y / 6) + np.cos(y / 5 + z / 6)

    def inside(distance_mm: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.clip(0.5 - distance_mm, 0, 1)

    def ellipsoid(centre: tuple[float, float, float], size: tuple[float, float, float]) -> NDArray[np.float64]:
        scaled = (
            ((np.abs(x) - centre[0]) / size[0]) ** 2
            + ((y - centre[1]) / size[1]) ** 2
            + ((z - centre[2]) / size[2]) ** 2
        )
        return inside((np.sqrt(scaled) - 1) * min(size))

    brain = inside((radius - 1) * semi_axes.min())
    sulci = brain * (1 - inside((radius - 0.97 + 0.01 * folds) * semi_axes.min()))
    core = inside((radius - 0.88 - 0.04 * folds) * semi_axes.min()) * (1 - sulci)
    ventricles = ellipsoid((9, 0, 8), (5, 30, 9))
    nuclei = ellipsoid((26, 4, 2), (9, 20, 12)) * (1 - ventricles)
    csf = np.maximum(sulci, ventricles)
    white = core * (1 - ventricles) * (1 - nuclei)
    tissues = np.stack([csf, brain - csf - white, white]).astype(np.float32)
    affine = np.eye(4)
    affine[:3, 3] = origin
    return tissues, affine


def _depths(
    brain: NDArray[np.float32], affine: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Distances in mm to the inner table and to the skin, negative inside, on a padded 2 mm grid with its affine."""
    pad = _SKIN_CLOSING_MM + SUBARACHNOID_MM + SKULL_MM + SCALP_MM + 4
    low = affine[:3, 3] - pad
    shape = np.ceil((np.array(brain.shape) + 2 * pad) / _DEPTH_SPACING_MM).astype(int) + 1
    depth_affine = np.diag([_DEPTH_SPACING_MM] * 3 + [1.0])
    depth_affine[:3, 3] = low
    coarse = ndimage.affine_transform(
        brain, np.full(3, _DEPTH_SPACING_MM), offset=low - affine[:3, 3], output_shape=tuple(shape), order=1
    )
    inner = _closed_distance(coarse > 0.5, _SKULL_CLOSING_MM) - SUBARACHNOID_MM
    outer = _closed_distance(inner < SKULL_MM + SCALP_MM, _SKIN_CLOSING_MM)
    return inner, outer, depth_affine


def _closed_distance(mask: NDArray[np.bool_], radius_mm: float) -> NDArray[np.float32]:
    """Signed distance in mm to the closing of ``mask`` by a ball: a fissure narrower than the ball is bridged."""
    spacing = [_DEPTH_SPACING_MM] * 3
    dilated = ndimage.distance_transform_edt(~mask, sampling=spacing) <= radius_mm
    depth = ndimage.distance_transform_edt(dilated, sampling=spacing)
    height = ndimage.distance_transform_edt(~dilated, sampling=spacing)
    return ndimage.gaussian_filter((radius_mm - depth + height).astype(np.float32), 1.5)
