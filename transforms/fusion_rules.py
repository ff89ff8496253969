"""How an MRI and a CT become one image without learning: the rules that a learned fusion has to beat.

All take the same three volumes of one head on one grid and return the fused image in display units; all work in 3D (or
2D) on any size, and decide per voxel or per coefficient. The Haar transform is written here, in NumPy, because no
wavelet library is among the dependencies; it is the undecimated one, in which a shifted head gives the shifted result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import atan2, cos, hypot, sin
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage

from transforms.errors import DataError
from transforms.fusion import bone_share
from transforms.masks import require_finite

Volume = NDArray[np.float32]
FusionRule = Callable[[ArrayLike, ArrayLike, ArrayLike], Volume]

HEAD_FROM_HU = -300.0
PYRAMID_LEVELS = 4
HAAR_LEVELS = 3

# Generating kernel of Burt and Adelson with a = 3/8, the binomial one.
_KERNEL = np.array([1, 4, 6, 4, 1]) / 16
_HALF = np.float32(0.5)


def mean_fusion(mri_display: ArrayLike, ct_display: ArrayLike, ct_hu: ArrayLike) -> Volume:
    """Return the mean of both images.

    Args (of every rule):
        mri_display: (X, Y) or (X, Y, Z) MRI in display units, about 0 to 1.
        ct_display: the same shape, CT in display units.
        ct_hu: the same shape, the CT in HU; most rules only check it.

    Returns:
        The fused image, float32, the same shape, in display units, not clipped. No input is changed.

    Raises:
        DataError: shapes that differ, or a value that is not finite.
    """
    mri, ct, _ = _volumes(mri_display, ct_display, ct_hu)
    return _mean(mri, ct)


def maximum_fusion(mri_display: ArrayLike, ct_display: ArrayLike, ct_hu: ArrayLike) -> Volume:
    """Return the brighter image at every voxel; arguments and errors are those of :func:`mean_fusion`."""
    mri, ct, _ = _volumes(mri_display, ct_display, ct_hu)
    return np.maximum(mri, ct)


def blend_fusion(mri_display: ArrayLike, ct_display: ArrayLike, ct_hu: ArrayLike) -> Volume:
    """Return (1 - w) MRI + w CT, where w is :func:`transforms.fusion.bone_share` of the HU, as in the target itself.

    Arguments and errors are those of :func:`mean_fusion`.
    """
    mri, ct, hu = _volumes(mri_display, ct_display, ct_hu)
    weight: Volume = bone_share(hu)
    return (1 - weight) * mri + weight * ct


def pca_fusion(mri_display: ArrayLike, ct_display: ArrayLike, ct_hu: ArrayLike) -> Volume:
    """Return a weighted mean, the weights the first principal component of both images in the head (CT > -300 HU).

    Arguments and errors are those of :func:`mean_fusion`; :func:`pca_weights` tells how the component is read.

    Raises:
        DataError: also when no voxel is above -300 HU.
    """
    mri, ct, hu = _volumes(mri_display, ct_display, ct_hu)
    head = hu > HEAD_FROM_HU
    if not head.any():
        raise DataError(
            "PCA fusion: there is no head in the CT",
            f"the largest value is {hu.max():g} HU, expected some above {HEAD_FROM_HU:g}",
            "pass the CT in HU as the third volume",
        )
    of_mri, of_ct = pca_weights(mri[head], ct[head])
    return np.float32(of_mri) * mri + np.float32(of_ct) * ct


def pca_weights(mri: NDArray[np.floating], ct: NDArray[np.floating]) -> tuple[float, float]:
    """Return the weights of MRI and CT, which add up to 1, from paired values of both, of any one shape.

    The weights are |v| / (|v1| + |v2|), with v the eigenvector of the larger eigenvalue of the 2 x 2 covariance (Naidu
    and Raol 2008, doi:10.14429/dsj.58.1653, with the absolute value added: bone is dark in MRI and bright in CT, so the
    two can vary against each other, and the plain ratio would then subtract one image, or divide by 0). Where no
    direction is the first (no variance; or equal variances without covariance) both weigh 1/2.
    """
    x, y = (values.astype(np.float64) - values.mean(dtype=np.float64) for values in (mri, ct))
    excess, both = float(np.vdot(x, x) - np.vdot(y, y)), 2 * float(np.vdot(x, y))
    if hypot(excess, both) == 0:
        return 0.5, 0.5
    angle = atan2(both, excess) / 2
    of_mri, of_ct = abs(cos(angle)), abs(sin(angle))
    return of_mri / (of_mri + of_ct), of_ct / (of_mri + of_ct)


def pyramid_fusion(mri_display: ArrayLike, ct_display: ArrayLike, ct_hu: ArrayLike) -> Volume:
    """Return the fusion of two Laplacian pyramids: of each detail the stronger one, of the coarsest image the mean.

    Burt and Adelson 1983 (doi:10.1109/TCOM.1983.1095851) in 3D, four levels, mirrored about the outermost voxels;
    an axis of n voxels becomes one of ceil(n / 2). A tie takes the MRI. Arguments and errors are those of
    :func:`mean_fusion`.
    """
    mri, ct, _ = _volumes(mri_display, ct_display, ct_hu)
    return _fused_pyramid(mri, ct, PYRAMID_LEVELS)


def wavelet_fusion(mri_display: ArrayLike, ct_display: ArrayLike, ct_hu: ArrayLike) -> Volume:
    """Return the fusion of two stationary Haar transforms: of each detail the stronger one, of the coarsest the mean.

    Three levels, seven detail bands each in 3D, the image mirrored at its faces. No band is subsampled, so both
    inverses of the Haar step (from a voxel's own pair, and from the pair before it) exist and are averaged (Nason and
    Silverman 1995, doi:10.1007/978-1-4612-2544-7_17). A tie takes the MRI. Arguments and errors are those of
    :func:`mean_fusion`.
    """
    mri, ct, _ = _volumes(mri_display, ct_display, ct_hu)
    reach = 2**HAAR_LEVELS - 1
    margins = [(reach if n > 1 else 0,) * 2 for n in mri.shape]
    fused = _fused_haar(np.pad(mri, margins, mode="symmetric"), np.pad(ct, margins, mode="symmetric"))
    return np.ascontiguousarray(fused[tuple(slice(a, a + n) for (a, _), n in zip(margins, mri.shape, strict=True))])


def hard_composite(mri_display: ArrayLike, ct_display: ArrayLike, bone: ArrayLike) -> Volume:
    """Return the CT inside the bone mask and the MRI elsewhere.

    No rule, but what masks of the truth would give: best in every region by construction, with seams at their borders.
    It is therefore not in ``FUSION_RULES``.

    Args:
        mri_display: (X, Y) or (X, Y, Z) MRI in display units.
        ct_display: the same shape, CT in display units.
        bone: the same shape; above 0.5 is bone.

    Raises:
        DataError: as :func:`mean_fusion`.
    """
    mri, ct, mask = _volumes(mri_display, ct_display, bone, "bone mask")
    return np.where(mask > 0.5, ct, mri)


FUSION_RULES: Mapping[str, FusionRule] = MappingProxyType(
    {
        "mean": mean_fusion,
        "maximum": maximum_fusion,
        "blend": blend_fusion,
        "pyramid": pyramid_fusion,
        "wavelet": wavelet_fusion,
        "pca": pca_fusion,
    }
)
"""Every rule that needs no mask, by the name that tables use."""


def _volumes(
    mri_display: ArrayLike, ct_display: ArrayLike, third: ArrayLike, name: str = "CT in HU"
) -> tuple[Volume, Volume, Volume]:
    mri, ct, other = (np.asarray(values, np.float32) for values in (mri_display, ct_display, third))
    if not mri.shape == ct.shape == other.shape:
        raise DataError(
            "fusion: the images are not on one grid",
            f"MRI {mri.shape}, CT {ct.shape}, {name} {other.shape}; expected one shape",
            "resample the CT to the grid of the MRI",
        )
    for values, what in ((mri, "MRI"), (ct, "CT"), (other, name)):
        require_finite(values, f"fusion: {what}")
    return mri, ct, other


def _mean(mri: Volume, ct: Volume) -> Volume:
    return _HALF * (mri + ct)


def _stronger(mri: Volume, ct: Volume) -> Volume:
    return np.where(np.abs(ct) > np.abs(mri), ct, mri)


def _fused_pyramid(mri: Volume, ct: Volume, levels: int) -> Volume:
    if not levels:
        return _mean(mri, ct)
    coarse_mri, coarse_ct = _reduced(mri), _reduced(ct)
    detail = _stronger(mri - _expanded(coarse_mri, mri.shape), ct - _expanded(coarse_ct, ct.shape))
    return detail + _expanded(_fused_pyramid(coarse_mri, coarse_ct, levels - 1), mri.shape)


def _reduced(image: Volume) -> Volume:
    for axis in range(image.ndim):
        smooth = ndimage.correlate1d(image, _KERNEL, axis=axis, mode="mirror")
        image = smooth[(slice(None),) * axis + (slice(None, None, 2),)]
    return image


def _expanded(image: Volume, shape: tuple[int, ...]) -> Volume:
    for axis, n in enumerate(shape):
        if image.shape[axis] == n:
            continue
        spread = np.zeros((*image.shape[:axis], n, *image.shape[axis + 1 :]), np.float32)
        spread[(slice(None),) * axis + (slice(None, None, 2),)] = image
        # Mirroring about the outermost voxels keeps even places even, so that a constant stays constant at the faces.
        image = ndimage.correlate1d(spread, 2 * _KERNEL, axis=axis, mode="mirror")
    return image


def _fused_haar(mri: Volume, ct: Volume, level: int = 0, axis: int = 0, detail: bool = False) -> Volume:
    """Split along one axis after the other; a band that was high along any of them is a detail, the rest goes on."""
    if level == HAAR_LEVELS:
        return _mean(mri, ct)
    if axis == mri.ndim:
        return _stronger(mri, ct) if detail else _fused_haar(mri, ct, level + 1)
    if mri.shape[axis] == 1:
        return _fused_haar(mri, ct, level, axis + 1, detail)
    (low_mri, high_mri), (low_ct, high_ct) = (_split(image, axis, 2**level) for image in (mri, ct))
    low = _fused_haar(low_mri, low_ct, level, axis + 1, detail)
    high = _fused_haar(high_mri, high_ct, level, axis + 1, detail=True)
    return _HALF * (low + high + np.roll(low - high, 2**level, axis))


def _split(image: Volume, axis: int, step: int) -> tuple[Volume, Volume]:
    ahead = np.roll(image, -step, axis)
    return _HALF * (image + ahead), _HALF * (image - ahead)
