"""What real acquisition does to an MRI and a CT of one head, in numbers one can state: six kinds, three severities.

CT: noise, motion against the MRI, streaks from metal. MRI: noise, bias field, thick slices. Each is a function of a
volume (X, Y, Z), its spacing in mm and a generator, and returns the volume itself, bit for bit, at strength 0. In a
pair each kind draws from a generator of its own: which others are present, and how strong, does not change it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation

from transforms.errors import BundleError
from transforms.rois import CT_AIR_HU

CT_NOISE_CORRELATION_VOXELS = 0.6
# Dimmer voxels are air or cortical bone, whose signal is noise and says nothing about the scale of the image.
MRI_FOREGROUND_SHARE = 0.1
METAL_HU = 300.0
STREAK_SLAB_MM = 8.0
STREAK_REACH_MM = 60.0
STREAK_HARMONICS = (2, 24)


@dataclass(frozen=True)
class Severity:
    """How strong each degradation is; all 0 = none.

    Attributes:
        ct_noise_hu: standard deviation of the CT's noise in HU (low dose).
        shift_mm, rotation_deg: motion of the CT against the MRI, in a random direction and about a random axis.
        streak_hu: largest brightness of a streak in HU.
        bias_amplitude: a: the MRI's bias field has (1 + a)^2 as its largest over its smallest value.
        slice_mm: thickness of the MRI's slices along the third axis.
        mri_noise_share: sigma of the MRI's Rician noise as a share of the foreground's 99th percentile.
    """

    ct_noise_hu: float = 0.0
    shift_mm: float = 0.0
    rotation_deg: float = 0.0
    streak_hu: float = 0.0
    bias_amplitude: float = 0.0
    slice_mm: float = 0.0
    mri_noise_share: float = 0.0


SEVERITIES = (
    Severity(),
    Severity(20.0, 1.0, 1.0, 100.0, 0.2, 4.0, 0.05),
    Severity(40.0, 2.0, 2.0, 200.0, 0.4, 6.0, 0.10),
    Severity(80.0, 3.0, 3.0, 400.0, 0.6, 8.0, 0.15),
)
KINDS: Mapping[str, tuple[str, ...]] = {
    "misregistration": ("shift_mm", "rotation_deg"),
    "streaks": ("streak_hu",),
    "ct_noise": ("ct_noise_hu",),
    "bias_field": ("bias_amplitude",),
    "thick_slices": ("slice_mm",),
    "mri_noise": ("mri_noise_share",),
}


def severity_of(levels: float | Mapping[str, float]) -> Severity:
    """Return the strengths at a level from 0 to 3, linear between the neighbours in ``SEVERITIES``.

    Args:
        levels: one level for every kind, or a level for each kind named; the others are absent.

    Raises:
        BundleError: a kind that does not exist, or a level outside 0 to 3.
    """
    by_kind = levels if isinstance(levels, Mapping) else dict.fromkeys(KINDS, levels)
    strengths: dict[str, float] = {}
    for kind, level in by_kind.items():
        if kind not in KINDS or not 0 <= level <= len(SEVERITIES) - 1:
            raise BundleError(
                f"degradation '{kind}' at severity {level}",
                f"the kinds are {', '.join(KINDS)}; a severity is from 0 to {len(SEVERITIES) - 1}",
                "correct the kind or the severity",
            )
        for name in KINDS[kind]:
            tabled = [getattr(severity, name) for severity in SEVERITIES]
            strengths[name] = float(np.interp(level, range(len(SEVERITIES)), tabled))
    return replace(Severity(), **strengths)


def move_rigidly(
    volume: np.ndarray,
    spacing_mm: Sequence[float],
    translation_mm: Sequence[float],
    rotation_deg: Sequence[float],
    outside: float | None,
) -> np.ndarray:
    """Return ``volume`` moved: its content turns about the volume's middle, then shifts; float32, linear.

    A point p of the content, in mm along the axes of the array, goes to R (p - c) + c + t.

    Args:
        volume: (X, Y, Z).
        spacing_mm: voxel size along the three axes.
        translation_mm: t.
        rotation_deg: (3,) rotation vector: its direction is the axis, its length the angle in degrees (right-handed).
        outside: value of what moves in from outside of the volume; None repeats the edge.
    """
    spacing = np.asarray(spacing_mm, dtype=np.float64)
    centre = (np.array(volume.shape) - 1) / 2
    back = Rotation.from_rotvec(rotation_deg, degrees=True).as_matrix().T
    matrix = back * spacing / spacing[:, None]
    offset = centre - matrix @ centre - back @ np.asarray(translation_mm, dtype=np.float64) / spacing
    mode, value = ("nearest", 0.0) if outside is None else ("constant", outside)
    return ndimage.affine_transform(
        volume.astype(np.float32, copy=False), matrix, offset, output=np.float32, order=1, mode=mode, cval=value
    )


def misregister(
    ct: np.ndarray,
    spacing_mm: Sequence[float],
    shift_mm: float,
    rotation_deg: float,
    rng: np.random.Generator,
    outside: float | None = CT_AIR_HU,
) -> np.ndarray:
    """Return a CT (X, Y, Z) moved by exactly ``shift_mm`` and ``rotation_deg``, direction and axis drawn uniformly.

    ``outside`` as in ``move_rigidly``: air suits a whole head; None a crop, beyond whose edge the head goes on.
    """
    direction, axis = (vector / np.linalg.norm(vector) for vector in rng.standard_normal((2, 3)))
    if not shift_mm and not rotation_deg:
        return ct
    return move_rigidly(ct, spacing_mm, shift_mm * direction, rotation_deg * axis, outside)


def ct_noise(ct: np.ndarray, sd_hu: float, rng: np.random.Generator) -> np.ndarray:
    """Return a CT (X, Y, Z) with Gaussian noise of exactly the standard deviation ``sd_hu`` in expectation; float32.

    Within a slice (axes 0 and 1) neighbours are correlated, as a reconstruction kernel leaves them.
    """
    noise = rng.standard_normal(ct.shape, dtype=np.float32)
    if not sd_hu:
        return ct
    kernel = np.exp(-0.5 * (np.arange(-2, 3) / CT_NOISE_CORRELATION_VOXELS) ** 2)
    # White noise keeps its variance under a kernel whose squares sum to 1; wrapping keeps it so at the edges.
    kernel /= np.sqrt((kernel**2).sum())
    for axis in (0, 1):
        if ct.shape[axis] > len(kernel):
            noise = ndimage.correlate1d(noise, kernel, axis, mode="wrap")
    return ct.astype(np.float32, copy=False) + np.float32(sd_hu) * noise


def streaks(ct: np.ndarray, spacing_mm: Sequence[float], peak_hu: float, rng: np.random.Generator) -> np.ndarray:
    """Return a CT (X, Y, Z) with bright and dark streaks that radiate, slice by slice, from one dense voxel; float32.

    The voxel is drawn among those above 300 HU in the lower half of the slices (teeth, skull base), else in all of
    them; a volume without any stays as it is. With the distance r from it and the angle in the slice, and the distance
    z from its slice, both in mm, the streaks are

        peak_hu * profile(angle) * exp(-r / 60) * exp(-(z / 8)^2)

    where the profile is a random sum of harmonics of order 2 to 24 with a largest absolute value of 1.
    """
    draw, first, last = rng.random(), *STREAK_HARMONICS
    orders = np.arange(first, last + 1)
    amplitudes, phases = rng.standard_normal(len(orders)), rng.uniform(0, 2 * np.pi, len(orders))
    dense = ct > METAL_HU
    lower = dense[..., : (ct.shape[2] + 1) // 2]
    voxels = np.argwhere(lower if lower.any() else dense)
    if not peak_hu or not len(voxels):
        return ct
    source = voxels[int(draw * len(voxels))]
    x, y, z = (
        (np.arange(n) - middle) * mm for n, middle, mm in zip(ct.shape, source, map(float, spacing_mm), strict=True)
    )
    turns = np.linspace(0, 2 * np.pi, 1440, endpoint=False)
    profile = amplitudes @ np.cos(orders[:, None] * turns + phases[:, None])
    angle = np.arctan2(y[None, :], x[:, None])
    in_slice = np.interp(angle, turns, profile / np.abs(profile).max(), period=2 * np.pi)
    in_slice *= peak_hu * np.exp(-np.hypot(x[:, None], y[None, :]) / STREAK_REACH_MM)
    streaked = in_slice[..., None].astype(np.float32) * np.exp(-((z / STREAK_SLAB_MM) ** 2)).astype(np.float32)
    return ct.astype(np.float32, copy=False) + streaked


def bias_field(
    shape: Sequence[int], spacing_mm: Sequence[float], amplitude: float, rng: np.random.Generator
) -> np.ndarray:
    """Return a smooth positive field (X, Y, Z), float32, from 1 / (1 + amplitude) to 1 + amplitude.

    Its logarithm is a random sum of cosines of total order 1 and 2, of half a period and one per longest side of the
    volume in mm: along a thin axis it hardly changes. A single voxel has a field of 1.
    """
    weights = rng.standard_normal((3, 3, 3))
    order = np.indices(weights.shape).sum(0)
    weights = np.where((order > 0) & (order <= 2), weights, 0)
    longest = max(n * mm for n, mm in zip(shape, spacing_mm, strict=True))
    # A quarter of a period beside the middle, so that odd cosines are slopes there and do not vanish on thin axes.
    waves = [
        np.cos(np.pi * np.outer(np.arange(3), ((np.arange(n) - (n - 1) / 2) * mm / longest + 0.5)))
        for n, mm in zip(shape, spacing_mm, strict=True)
    ]
    exponent = np.einsum("abc,ax,by,cz->xyz", weights, *waves, optimize=True)
    low, high = exponent.min(), exponent.max()
    if low == high:
        return np.ones(exponent.shape, dtype=np.float32)
    return np.exp(math.log1p(amplitude) * (2 * (exponent - low) / (high - low) - 1)).astype(np.float32)


def thick_slice_matrix(slices: int, spacing_mm: float, slice_mm: float) -> np.ndarray:
    """Return the (slices, slices) matrix that turns a profile into one acquired with thick slices, on the same grid.

    The slices are boxes of ``slice_mm``, side by side and symmetric about the middle of the volume. Each holds the mean
    of what it covers (voxels count with their share), and the grid gets the linear interpolation between the middles of
    the slices, beyond the outermost of them its value. Every row sums to 1.
    """
    extent = slices * spacing_mm
    boxes = max(1, math.ceil(extent / slice_mm - 1e-9))
    starts = (extent - boxes * slice_mm) / 2 + slice_mm * np.arange(boxes)
    edges = spacing_mm * np.arange(slices + 1)
    covered = np.minimum(edges[1:], starts[:, None] + slice_mm) - np.maximum(edges[:-1], starts[:, None])
    averages = np.maximum(covered, 0)
    averages /= averages.sum(axis=1, keepdims=True)
    position = np.clip(((edges[:-1] + spacing_mm / 2) - starts[0] - slice_mm / 2) / slice_mm, 0, boxes - 1)
    tents = np.maximum(0, 1 - np.abs(position[:, None] - np.arange(boxes)))
    return tents @ averages


def thick_slices(volume: np.ndarray, spacing_mm: Sequence[float], slice_mm: float) -> np.ndarray:
    """Return ``volume`` (X, Y, Z) as slices of ``slice_mm`` along the third axis show it (``thick_slice_matrix``).

    Slices that are not thicker than the voxels already are change nothing.
    """
    if slice_mm <= spacing_mm[2]:
        return volume
    matrix = thick_slice_matrix(volume.shape[2], float(spacing_mm[2]), slice_mm).astype(np.float32)
    return volume.astype(np.float32, copy=False) @ matrix.T


def mri_noise(mri: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return an MRI (X, Y, Z) with Rician noise: sigma = ``share`` of the foreground's 99th percentile; float32.

    sqrt((S + n1)^2 + n2^2) with two Gaussian noises of sigma: where there is no signal, its mean is sigma sqrt(pi / 2)
    (Gudbjartsson & Patz 1995, doi:10.1002/mrm.1910340618). Foreground: above a tenth of the largest value.
    """
    real, imaginary = rng.standard_normal((2, *mri.shape), dtype=np.float32)
    bright = mri[mri > MRI_FOREGROUND_SHARE * mri.max()]
    if not share or not bright.size:
        return mri
    sigma = np.float32(share * np.percentile(bright, 99))
    return np.hypot(mri.astype(np.float32, copy=False) + sigma * real, sigma * imaginary)


def degrade_pair(
    pair: np.ndarray,
    spacing_mm: Sequence[float],
    severity: Severity,
    rng: np.random.Generator,
    outside: float | None = CT_AIR_HU,
) -> np.ndarray:
    """Return an MRI and a CT (2, X, Y, Z), arbitrary units and HU, degraded; float32, the input is not touched.

    In the order of acquisition: the CT is moved, streaked, noisy; the MRI is shaded, averaged over its slices, noisy.
    With the same generator, a larger strength is more of the same. ``outside`` as in ``misregister``.
    """
    mri, ct = pair.astype(np.float32)
    moving, streaking, ct_noising, shading, mri_noising = rng.spawn(5)
    ct = misregister(ct, spacing_mm, severity.shift_mm, severity.rotation_deg, moving, outside)
    ct = streaks(ct, spacing_mm, severity.streak_hu, streaking)
    ct = ct_noise(ct, severity.ct_noise_hu, ct_noising)
    if severity.bias_amplitude:
        mri = mri * bias_field(mri.shape, spacing_mm, severity.bias_amplitude, shading)
    mri = thick_slices(mri, spacing_mm, severity.slice_mm)
    mri = mri_noise(mri, severity.mri_noise_share, mri_noising)
    return np.stack([mri, ct])
