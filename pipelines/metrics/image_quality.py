"""How alike are an image and its reference, inside regions of interest? One call for several figures and regions.

The rules, the same for every figure: the data range is given, never guessed; a local map belongs to the whole image and
is averaged over the region; a voxel whose window reaches beyond the image has no value (or the image is mirrored, on
request) and what was averaged over is counted; an empty region has the status "empty" and no values, never a NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.metrics.image_gradient import gradient_similarity
from pipelines.metrics.image_intensity import information, mean_errors, psnr_from_nrmse
from pipelines.metrics.image_regions import ImagePair, check_data_range, pair_of_images
from pipelines.metrics.image_ssim import SCALE_WEIGHTS, Window, ms_ssim_means, ssim_local, ssim_means
from pipelines.names import nearest
from transforms.errors import UsageError

WINDOWED = ("ssim", "ms_ssim", "gms_mean", "gms_std")
IMAGE_METRICS = (*WINDOWED, "psnr_db", "mae", "nrmse", "mi_bits", "nmi")
WINDOW = Window()

Row = dict[str, Any]


def image_quality(
    image: NDArray[Any],
    reference: NDArray[Any],
    data_range: float,
    roi: NDArray[Any] | None = None,
    spacing_mm: Sequence[float] | None = None,
    metrics: Sequence[str] = ("ssim", "psnr_db", "mae", "nrmse"),
    **options: Any,
) -> Row:
    """Compare an image with its reference in one region of interest, or everywhere.

    Arguments, keys (but for ``roi``) and errors are those of :func:`image_quality_in_rois`.
    """
    row = image_quality_in_rois(image, reference, data_range, {"": roi}, spacing_mm, metrics, **options)[0]
    return {key: value for key, value in row.items() if key != "roi"}


def image_quality_in_rois(
    image: NDArray[Any],
    reference: NDArray[Any],
    data_range: float,
    rois: Mapping[str, NDArray[Any] | None],
    spacing_mm: Sequence[float] | None = None,
    metrics: Sequence[str] = ("ssim", "psnr_db", "mae", "nrmse"),
    *,
    window: Window = WINDOW,
    border: str = "exclude",
    bins: int = 64,
    threads: int | None = None,
    case: str = "",
) -> list[Row]:
    """Compare an image with its reference in several regions; what the regions share is computed once.

    Args:
        image: (X, Y) or (X, Y, Z), real numbers of any dtype.
        reference: the same shape; intensities in the same unit.
        data_range: width of the range that the intensities can take, in their unit.
        rois: name to mask (bool, or 0 and 1) of the same shape; None stands for the whole image. They may overlap.
        spacing_mm: voxel size along each axis, in mm; needed for a window in mm.
        metrics: any of ``IMAGE_METRICS``.
        window: window of SSIM and MS-SSIM; with the unit "mm" the gradient of ``gms`` is per mm as well.
        border: "exclude" leaves out voxels whose window reaches beyond the image, as MONAI and scikit-image do in the
            mean; "reflect" mirrors the image at its faces (d c b a | a b c d), and no voxel is left out.
        bins: of each image in the joint histogram of ``mi_bits`` and ``nmi``.
        threads: for the compiled kernels, 1 or more; None: ``NUMBA_NUM_THREADS``, or every core. It changes no value.
        case: the case's name, for error messages.

    Returns:
        One row per region, in order: ``roi``; ``status``; ``n_voxels`` of the region; ``n_windows``, those of them that
        SSIM is averaged over (None unless SSIM or MS-SSIM is asked for); then the metrics in the order asked for.
        ``status`` is "ok", "empty" (no voxel in the region; every value is None) or "border" (a windowed figure has no
        voxel left to average over, and is None). ``ssim``, ``ms_ssim``: see :mod:`pipelines.metrics.image_ssim`;
        ``gms_mean``, ``gms_std``: :mod:`pipelines.metrics.image_gradient`; ``psnr_db`` = 10 log10(R^2 / MSE), at most
        ``PSNR_CAP_DB`` = 100 dB, which is also the value of identical images; ``mae`` in the unit of the images;
        ``nrmse`` = RMSE / R; ``mi_bits``, ``nmi``: :func:`pipelines.metrics.image_intensity.information` (``nmi`` is
        None where both images are constant).

    Raises:
        UsageError: no valid data range, unknown metric, window, border or bins, a window in mm without spacing, no
            thread.
        DataError: images or masks that cannot be compared (shape, dtype, values), or a value that is not finite in the
            box of the regions or within half a window of it.
    """
    data_range = check_data_range(data_range)
    wanted = _check_metrics(metrics)
    if not rois:
        raise UsageError("image quality: no region", "rois is empty", 'pass {"image": None} for the whole image')
    pair = pair_of_images(image, reference, rois, spacing_mm, case)
    columns: dict[str, list[Any]] = {}
    if wanted & {"ssim", "ms_ssim"}:
        means = ssim_means(pair, data_range, window, border, threads)
        columns["n_windows"], columns["ssim"] = [row[0] for row in means], [row[1] for row in means]
        if "ms_ssim" in wanted:
            columns["ms_ssim"] = ms_ssim_means(pair, data_range, window, border, SCALE_WEIGHTS, threads, means)
    if wanted & {"gms_mean", "gms_std"}:
        rows = gradient_similarity(pair, data_range, border, window.unit == "mm")
        columns["gms_mean"], columns["gms_std"] = [row[1] for row in rows], [row[2] for row in rows]
    if wanted & {"psnr_db", "mae", "nrmse"}:
        errors = mean_errors(pair, threads)
        columns["mae"] = [row[1] for row in errors]
        columns["nrmse"] = [np.sqrt(row[2]) / data_range for row in errors]
        columns["psnr_db"] = [psnr_from_nrmse(value) for value in columns["nrmse"]]
    if wanted & {"mi_bits", "nmi"}:
        columns["mi_bits"], columns["nmi"] = map(list, zip(*information(pair, bins), strict=True))
    return [_row(name, index, pair, columns, metrics) for index, name in enumerate(rois)]


def ssim(image: NDArray[Any], reference: NDArray[Any], data_range: float, **options: Any) -> float | None:
    """Return mean SSIM; options and errors are those of :func:`image_quality`."""
    return _single("ssim", image, reference, data_range, options)


def ms_ssim(image: NDArray[Any], reference: NDArray[Any], data_range: float, **options: Any) -> float | None:
    """Return MS-SSIM over five scales; options and errors are those of :func:`image_quality`."""
    return _single("ms_ssim", image, reference, data_range, options)


def psnr_db(image: NDArray[Any], reference: NDArray[Any], data_range: float, **options: Any) -> float | None:
    """Return PSNR in dB, at most 100; options and errors are those of :func:`image_quality`."""
    return _single("psnr_db", image, reference, data_range, options)


def mutual_information(image: NDArray[Any], reference: NDArray[Any], **options: Any) -> Row:
    """Return ``mi_bits`` and ``nmi``; they need no data range. Options and errors as for :func:`image_quality`."""
    row = image_quality(image, reference, 1.0, metrics=("mi_bits", "nmi"), **options)
    return {"mi_bits": row["mi_bits"], "nmi": row["nmi"]}


def ssim_map(
    image: NDArray[Any],
    reference: NDArray[Any],
    data_range: float,
    spacing_mm: Sequence[float] | None = None,
    *,
    window: Window = WINDOW,
    border: str = "exclude",
    threads: int | None = None,
) -> NDArray[np.float64]:
    """Return the local SSIM of the whole image, float64, NaN where the window reaches beyond the image.

    Arguments and errors are those of :func:`image_quality_in_rois`.
    """
    data_range = check_data_range(data_range)
    pair = pair_of_images(image, reference, {"": None}, spacing_mm)
    values = np.full(pair.shape, np.nan)
    local = ssim_local(pair, data_range, window, border, threads)
    if local is not None:
        frame, maps = local
        size = maps.shape[1:]
        values[tuple(slice(a, a + n) for a, n in zip(frame.origin, size, strict=True))] = maps[0]
    if np.ndim(reference) == 2:
        values = values[:, 0]
    return values.T if pair.transposed else values


def _single(
    name: str, image: NDArray[Any], reference: NDArray[Any], data_range: float, options: Mapping[str, Any]
) -> float | None:
    value: float | None = image_quality(image, reference, data_range, metrics=(name,), **options)[name]
    return value


def _check_metrics(metrics: Sequence[str]) -> set[str]:
    names = [metrics] if isinstance(metrics, str) else list(metrics)
    for name in names:
        if name not in IMAGE_METRICS:
            raise UsageError(f"image quality: metric {name!r}", "it does not exist", nearest(str(name), IMAGE_METRICS))
    if isinstance(metrics, str) or not names:
        raise UsageError(
            f"image quality: metrics {metrics!r}", "expected a list of one name or more", "for example ['ssim']"
        )
    return set(names)


def _row(name: str, index: int, pair: ImagePair, columns: Mapping[str, Sequence[Any]], metrics: Sequence[str]) -> Row:
    mask = pair.masks[index]
    n_voxels = int(np.prod(pair.shape) if mask is None else np.count_nonzero(mask))
    n_windows = int(columns["n_windows"][index]) if "n_windows" in columns else None
    values: Row = dict.fromkeys(metrics)
    if n_voxels:
        values = {key: _or_none(columns[key][index]) for key in metrics}
    status = "ok" if n_voxels else "empty"
    if n_voxels and any(values[key] is None for key in metrics if key in WINDOWED):
        status = "border"
    return {"roi": name, "status": status, "n_voxels": n_voxels, "n_windows": n_windows, **values}


def _or_none(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
