"""How good is a fusion of MRI and CT? Each tissue beside the modality that shows it, what was kept of both, and seams.

A figure that a plain rule wins by construction says little alone: the maximum keeps the edges of both images, a hard
composite wins in every region and pays at the borders. The figures are therefore read together, and by rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats

from pipelines.metrics.image_quality import image_quality, mutual_information
from pipelines.metrics.image_regions import check_data_range, pair_of_images
from pipelines.metrics.inputs import as_mask
from transforms.errors import DataError, UsageError

INFORMATION_BINS = 64
ENTROPY_BINS = 256
CALIBRATION_BINS = 15

# Xydeas and Petrovic 2000: Gamma, kappa, sigma of the two sigmoids.
_STRENGTH = (0.9994, -15.0, 0.5)
_ORIENTATION = (0.9879, -22.0, 0.8)

HIGHER_IS_BETTER: Mapping[str, bool] = MappingProxyType(
    {
        "brain_ssim": True,
        "brain_ssim_within": True,
        "brain_ms_ssim": True,
        "brain_gradient_similarity": True,
        "bone_psnr_db": True,
        "bone_ssim": True,
        "bone_ssim_within": True,
        "global_ssim": True,
        "global_psnr_db": True,
        "qabf": True,
        "fusion_mi_bits": True,
        "seam_false_edge": False,
    }
)
"""The figures that can be ranked. The other two describe: noise raises ``entropy_bits``, blur wins ``seam_excess``."""

Array = NDArray[Any]
Floats = NDArray[np.float32]


def fusion_figures(
    fused: Array,
    mri: Array,
    ct: Array,
    *,
    target: Array,
    brain: Array,
    bone: Array,
    head: Array,
    spacing_mm: Sequence[float] | None = None,
    data_range: float = 1.0,
    case: str = "",
) -> dict[str, float | None]:
    """Measure one fused image against clean references; nothing of it depends on how the image was made.

    Args:
        fused: (X, Y) or (X, Y, Z), display units.
        mri: the same shape, the reference MRI in display units.
        ct: the same shape, the reference CT in display units.
        target: the same shape, the soft composite of both references: what a seamless fusion should be.
        brain, bone, head: masks (bool, or 0 and 1) of the same shape; each may be empty.
        spacing_mm: voxel size along each axis. The gradients of ``qabf`` and of the seams are then per mm, else per
            voxel; the other figures are those of the voxels as they are.
        data_range: width of the range of display units.
        case: the case's name, for error messages.

    Returns:
        The figures below; one is None where its region is empty, or lies within half a window of the image's faces.

        - ``brain_ssim``, ``brain_ms_ssim``, ``brain_gradient_similarity`` (the gradient term of FSIM, ``gms_mean``):
          against the MRI in the brain; ``bone_psnr_db``, ``bone_ssim``: against the CT in the bone; ``global_ssim``,
          ``global_psnr_db``: against the target in the head. See :mod:`pipelines.metrics.image_quality`.
        - ``brain_ssim_within``, ``bone_ssim_within``: the same, but with the reference in place of the fused image
          outside of the region. The window of SSIM is wider than the skull: what stands beside bone, and has to be
          unlike the CT, keeps ``bone_ssim`` of a perfect fusion far below 1; these reach 1.
        - ``qabf``: :func:`edge_preservation` in the head.
        - ``fusion_mi_bits`` = I(F; MRI) + I(F; CT) in the head (Qu, Zhang and Yan 2002, doi:10.1049/el:20020212), from
          joint histograms with 64 bins of each image.
        - ``entropy_bits``: :func:`entropy_bits` in the head.
        - ``seam_excess``, ``seam_false_edge``: :func:`seams` at the borders of brain and bone in the head.

    Raises:
        DataError: images or masks that cannot be compared, or a value that is not finite in the head, or near a region.
        UsageError: no valid data range.
    """
    rest: dict[str, Any] = {"spacing_mm": spacing_mm, "case": case}
    in_brain = image_quality(fused, mri, data_range, brain, metrics=("ssim", "ms_ssim", "gms_mean"), **rest)
    in_bone = image_quality(fused, ct, data_range, bone, metrics=("psnr_db", "ssim"), **rest)
    in_head = image_quality(fused, target, data_range, head, metrics=("ssim", "psnr_db"), **rest)
    bits = [mutual_information(fused, image, roi=head, bins=INFORMATION_BINS, **rest)["mi_bits"] for image in (mri, ct)]
    masks = [as_mask(mask, name, case) for mask, name in ((brain, "brain"), (bone, "bone"), (head, "head"))]
    within = [
        image_quality(np.where(roi, fused, reference), reference, data_range, roi, metrics=("ssim",), **rest)["ssim"]
        for roi, reference in ((masks[0], mri), (masks[1], ct))
    ]
    of_fused, of_mri, of_ct = (gradient(image, spacing_mm) for image in (fused, mri, ct))
    inner = masks[2] & _within(masks[2].shape)
    excess, false_edge = seams(of_fused, of_mri, of_ct, masks[:2], inner)
    return {
        "brain_ssim": in_brain["ssim"],
        "brain_ssim_within": within[0],
        "brain_ms_ssim": in_brain["ms_ssim"],
        "brain_gradient_similarity": in_brain["gms_mean"],
        "bone_psnr_db": in_bone["psnr_db"],
        "bone_ssim": in_bone["ssim"],
        "bone_ssim_within": within[1],
        "global_ssim": in_head["ssim"],
        "global_psnr_db": in_head["psnr_db"],
        "qabf": edge_preservation(of_fused, of_mri, of_ct, inner),
        "fusion_mi_bits": None if None in bits else sum(bits),
        "entropy_bits": entropy_bits(fused, masks[2], data_range),
        "seam_excess": excess,
        "seam_false_edge": false_edge,
    }


def gradient(image: Array, spacing_mm: Sequence[float] | None = None) -> Floats:
    """Return the Sobel gradient of a 2D or 3D image, (axes, *image.shape), float32, per mm, or per voxel.

    Scaled so that a ramp of 1 per voxel has the gradient 1; a step of height h has h / 2 on either side. At the faces
    of the image the outermost voxel is repeated; an axis with one voxel has the component 0.
    """
    values = np.asarray(image, np.float32)
    steps = (1.0,) * values.ndim if spacing_mm is None else spacing_mm
    scale = 2 * 4 ** (values.ndim - 1)
    return np.stack(
        [ndimage.sobel(values, axis, mode="nearest") / np.float32(scale * step) for axis, step in enumerate(steps)]
    )


def edge_preservation(of_fused: Floats, of_mri: Floats, of_ct: Floats, mask: Array) -> float | None:
    """Return Qabf, how much of the edges of both images the fused one has kept: 0 to 0.975; None without an edge.

    Xydeas and Petrovic 2000 (doi:10.1049/el:20000267), with L = 1 and the published constants of the sigmoids. For a
    source A: strength G = min(gF, gA) / max(gF, gA); orientation 1 - angle / (pi / 2); each passes a sigmoid, and their
    product counts with the weight gA; both sources are averaged together. Images that are equal reach
    0.9994 / (1 + exp(-7.5)) 0.9879 / (1 + exp(-4.4)) = 0.9748.

    It was published for 2D images. Here the gradient has all axes of the image and the angle is the one between two
    gradients as lines, 0 to pi / 2: in 2D that is the published difference of angles, except that two edges just on
    either side of the angle pi / 2 are alike.

    Args:
        of_fused, of_mri, of_ct: gradients (axes, *spatial) by :func:`gradient`.
        mask: bool (*spatial); the voxels that count.
    """
    own = [field[:, mask].astype(np.float64) for field in (of_fused, of_mri, of_ct)]
    lengths = [np.linalg.norm(field, axis=0) for field in own]
    weight = lengths[1].sum() + lengths[2].sum()
    if weight == 0:
        return None
    kept = [lengths[source] @ _preserved(own[0], own[source], lengths[0], lengths[source]) for source in (1, 2)]
    return float(sum(kept) / weight)


def entropy_bits(image: Array, mask: Array, data_range: float = 1.0) -> float | None:
    """Return the Shannon entropy of the intensities in a mask, in bits; None for an empty mask.

    256 bins of equal width between 0 and ``data_range``, the same for every image so that images can be compared
    (Roberts, van Aardt and Ahmed 2008, doi:10.1117/1.2945910); values beyond count in the outermost bins.

    Raises:
        UsageError: no valid data range.
    """
    bins = np.asarray(image)[as_mask(mask, "mask", "")] * (ENTROPY_BINS / check_data_range(data_range))
    if not bins.size:
        return None
    counts = np.bincount(np.clip(bins, 0, ENTROPY_BINS - 1).astype(np.int64))
    return float(stats.entropy(counts, base=2))


def seams(
    of_fused: Floats, of_mri: Floats, of_ct: Floats, rois: Sequence[NDArray[np.bool_]], mask: Array
) -> tuple[float | None, float | None]:
    """Return how much stronger edges at the borders of regions are than in either source: excess, and false edges.

    With d = |gF| - max(|gA|, |gB|), over the voxels that have a face in common with the border of a region, on either
    side: the excess is the mean of d, and the false edges are the mean of max(d, 0), what no source has. The excess is
    mostly below 0, as no fusion keeps the whole step from air to bone of the CT beside the MRI's tissue, and is lowest
    for a blurred image; the false edges are not lowered by edges that are lost elsewhere. None without such a voxel.

    Args:
        of_fused, of_mri, of_ct: gradients (axes, *spatial) by :func:`gradient`; both figures have their unit.
        rois: masks (*spatial) of the regions.
        mask: bool (*spatial); the voxels that count.
    """
    border = np.zeros(mask.shape, bool)
    for roi in rois:
        border |= ndimage.binary_dilation(roi) & ~ndimage.binary_erosion(roi, border_value=1)
    border &= mask
    if not border.any():
        return None, None
    fused, mri, ct = (np.linalg.norm(of[:, border].astype(np.float64), axis=0) for of in (of_fused, of_mri, of_ct))
    added = fused - np.maximum(mri, ct)
    return float(added.mean()), float(np.maximum(added, 0).mean())


def error_uncertainty(
    fused: Array, reference: Array, std: Array, mask: Array | None = None, bins: int = CALIBRATION_BINS, case: str = ""
) -> dict[str, float | int | None]:
    """Measure whether a predicted standard deviation tells where, and how much, a fused image is wrong.

    For an intensity there is no event whose probability a Brier score could take; for the lesion on samples of the
    fused image there is: see :mod:`pipelines.metrics.calibration`.

    Args:
        fused: any shape, for example the mean of samples.
        reference: the same shape and unit.
        std: the same shape and unit, 0 or more.
        mask: bool, or 0 and 1, of the same shape; None: everywhere.
        bins: of equal mass, by the rank of ``std``; voxels of one ``std`` stay together.
        case: the case's name, for error messages.

    Returns:
        ``n_voxels``; ``rmse`` and ``rms_std``, equal for a calibrated spread; ``uncertainty_spearman``, the rank
        correlation of |fused - reference| and ``std`` (None where one of them is constant); and with m the root mean
        square of ``std`` and e that of the error in a bin, ``error_calibration`` = sum n_b / n |m_b - e_b|, in the unit
        of the images, and ``ence`` = sum n_b / n |m_b - e_b| / m_b, the expected normalised calibration error (Levi,
        Gispan, Giladi and Fetaya 2022, doi:10.3390/s22155540; None where a bin predicts no error at all). All
        but ``n_voxels`` are None without a voxel.

    Raises:
        DataError: shapes that differ, a value that is not finite, or a ``std`` below 0 in the mask.
        UsageError: fewer than one bin.
    """
    if bins < 1:
        raise UsageError(f"error and uncertainty: {bins} bins", "expected 1 or more", "15 is the default")
    for image in (fused, std):
        pair_of_images(image, reference, {"mask": mask}, None, case)
    keep = np.ones(np.shape(reference), bool) if mask is None else as_mask(mask, "mask", case)
    error, spread = np.abs(np.subtract(fused, reference, dtype=np.float64))[keep], np.asarray(std, np.float64)[keep]
    if not (np.isfinite(error).all() and np.isfinite(spread).all() and spread.min(initial=0) >= 0):
        raise DataError(
            f"case {case or 'unnamed'}: error and uncertainty",
            "a value is not finite, or a standard deviation is below 0, in the mask",
            "repair the prediction, or compare a mask that keeps clear of it",
        )
    names = ("rmse", "rms_std", "uncertainty_spearman", "error_calibration", "ence")
    if not error.size:
        return {"n_voxels": 0, **dict.fromkeys(names)}
    ranks = stats.rankdata(spread)
    place = np.minimum(((ranks - 0.5) * (bins / error.size)).astype(np.int64), bins - 1)
    n, errors, spreads = (np.bincount(place, weights) for weights in (None, error**2, spread**2))
    n, errors, spreads = (sums[n > 0] for sums in (n, errors, spreads))
    predicted = np.sqrt(spreads / n)
    gap = np.abs(predicted - np.sqrt(errors / n))
    values = (
        np.sqrt(np.square(error).mean()),
        np.sqrt(np.square(spread).mean()),
        _correlation(stats.rankdata(error), ranks),
        n @ gap / n.sum(),
        n @ (gap / predicted) / n.sum() if predicted.all() else None,
    )
    measured = {name: None if value is None else float(value) for name, value in zip(names, values, strict=True)}
    return {"n_voxels": int(error.size), **measured}


def _preserved(
    fused: NDArray[np.float64],
    source: NDArray[np.float64],
    of_fused: NDArray[np.float64],
    of_source: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Return Q^AF at every voxel; where a gradient is 0, it has no direction and is at right angles to any."""
    larger, product = np.maximum(of_fused, of_source), of_fused * of_source
    strength = np.divide(np.minimum(of_fused, of_source), larger, out=np.zeros_like(larger), where=larger > 0)
    cosine = np.abs(np.einsum("ij,ij->j", fused, source))
    cosine = np.divide(cosine, product, out=np.zeros_like(cosine), where=product > 0)
    orientation = 1 - np.arccos(np.minimum(cosine, 1)) / (np.pi / 2)
    return _sigmoid(strength, *_STRENGTH) * _sigmoid(orientation, *_ORIENTATION)


def _sigmoid(values: NDArray[np.float64], top: float, slope: float, middle: float) -> NDArray[np.float64]:
    return top / (1 + np.exp(slope * (values - middle)))


def _within(shape: Sequence[int]) -> NDArray[np.bool_]:
    """Return where the operator of the gradient lies in the image; an axis with fewer than three voxels is all in."""
    inner = np.zeros(shape, bool)
    inner[tuple(slice(1, -1) if n > 2 else slice(None) for n in shape)] = True
    return inner


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    if x.min() == x.max() or y.min() == y.max():
        return None
    return float(np.corrcoef(x, y)[0, 1])
