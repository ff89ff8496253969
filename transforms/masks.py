"""The foreground: which voxels belong to the patient, and what every intensity transform needs to respect them.

Percentiles, means and bias fields measured over air describe the field of view and not the tissue, so the mask is made
once, before anything changes the background, and is handed on under its own key. A brain mask file is taken where one
exists; otherwise the background is recognised as one constant value, or the object by Otsu's threshold.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import affine_to_spacing
from monai.transforms import MapTransform, Transform
from monai.utils import convert_to_dst_type
from scipy import ndimage
from skimage.filters import threshold_otsu

from transforms.errors import BundleError, DataError

Image = TypeVar("Image", np.ndarray, torch.Tensor)
Array = np.ndarray | torch.Tensor
Method = Literal["auto", "constant", "otsu", "all"]

METHODS: tuple[Method, ...] = ("auto", "constant", "otsu", "all")
MINIMUM_CONSTANT_SHARE = 0.05
# Rounding of a resampling or of compressed storage: a brain of values near 1 on a background of 1e-18.
CONSTANT_TOLERANCE = 1e-6
PLAUSIBLE_SHARE = (0.01, 0.99)


def as_numpy(image: Array) -> np.ndarray:
    """Return the values of ``image`` as a numpy array, sharing memory where possible (never write into it)."""
    if isinstance(image, torch.Tensor):
        return image.detach().cpu().as_subclass(torch.Tensor).numpy()
    return np.asarray(image)


def like(values: np.ndarray, image: Image) -> Image:
    """Return ``values``, dtype kept, in the container of ``image``: a MetaTensor gets a copy of its metadata."""
    return convert_to_dst_type(values, image, dtype=values.dtype)[0]


def spacing_of(image: Array, spacing_mm: Sequence[float] | None, where: str) -> list[float]:
    """Return the voxel size in mm along the spatial axes of ``image`` (C, *spatial): as given, else of its affine.

    Raises:
        DataError: neither is there, or it is not one positive length per axis.
    """
    if spacing_mm is None and isinstance(image, MetaTensor):
        spacing_mm = [float(mm) for mm in torch.as_tensor(affine_to_spacing(image.affine, r=image.ndim - 1))]
    if spacing_mm is None or len(spacing_mm) != image.ndim - 1 or min(spacing_mm) <= 0:
        raise DataError(
            f"{where}: no voxel size",
            f"the spacing is {spacing_mm}, expected {image.ndim - 1} positive lengths in mm",
            "load the image with its affine (a MetaTensor), or give spacing_mm",
        )
    return [float(mm) for mm in spacing_mm]


def case_name(data: Mapping[Hashable, Any], key: Hashable) -> str:
    """Return how an error names ``data[key]``: the case, else the file, and the key."""
    case = data.get("case")
    if case is None:
        case = getattr(data.get(key), "meta", {}).get("filename_or_obj", "without a name")
    return f"case {case}, key '{key}'"


def require_key(data: Mapping[Hashable, Any], key: str, transform: str, made_by: str) -> Any:
    """Return ``data[key]``, or raise ``BundleError`` telling which transform should have made it."""
    if key not in data:
        raise BundleError(
            f"{case_name(data, key)}: {transform} needs it",
            f"it is not in the dictionary; keys present: {', '.join(map(str, data))}",
            f"put {made_by} in front of {transform}",
        )
    return data[key]


def require_finite(image: np.ndarray, where: str) -> None:
    """Raise ``DataError`` when a voxel is NaN or infinite: it would make every statistic NaN."""
    bad = int(image.size - np.count_nonzero(np.isfinite(image)))
    if bad:
        raise DataError(
            where,
            f"{bad} of {image.size} voxels are NaN or infinite, expected none",
            "repair the file, or replace these voxels by the background value before this transform",
        )


def as_boolean_mask(mask: Array, image: np.ndarray, where: str) -> np.ndarray:
    """Return ``mask > 0.5`` of shape (*spatial), for an image of shape (C, *spatial).

    The threshold takes brain masks that a resampling left at 0.99999997 for what they are. A mask with several channels
    is their union.

    Raises:
        DataError: the mask is not of shape (K, *spatial).
    """
    values = as_numpy(mask)
    if values.ndim != image.ndim or values.shape[1:] != image.shape[1:]:
        raise DataError(
            f"{where}: foreground mask",
            f"the mask has shape {values.shape}, the image (channel first) {image.shape}",
            "put mask and image on one grid, both channel first, before this transform",
        )
    return np.any(values > 0.5, axis=0)


def require_foreground(mask: np.ndarray, where: str) -> None:
    """Raise ``DataError`` when ``mask`` selects no voxel."""
    if not mask.any():
        raise DataError(
            f"{where}: foreground mask",
            f"0 of {mask.size} voxels are foreground",
            "check that the image is not constant and that the mask file belongs to it",
        )


def constant_background(channel: np.ndarray) -> float | None:
    """Return the constant background value of ``channel`` (*spatial), or None when it has none.

    It is the value that more than half of the corner voxels share (4 corners in 2D, 8 in 3D), provided that at least
    5 % of all voxels have it. Two values are the same when they differ by at most 1e-6 of the channel's range. Zero is
    nothing special: after a z-score it may be -3.16.
    """
    corners = [float(channel[corner]) for corner in itertools.product((0, -1), repeat=channel.ndim)]
    value = float(np.median(corners))
    shares_value = ~differs(channel, value)
    shared = sum(bool(shares_value[corner]) for corner in itertools.product((0, -1), repeat=channel.ndim))
    if 2 * shared <= len(corners) or shares_value.mean() < MINIMUM_CONSTANT_SHARE:
        return None
    return value


def differs(channel: np.ndarray, value: float) -> np.ndarray:
    """Return where ``channel`` (*spatial) differs from ``value`` by more than 1e-6 of the channel's range (boolean)."""
    tolerance = CONSTANT_TOLERANCE * (float(channel.max()) - float(channel.min()))
    return np.abs(channel.astype(np.float64) - value) > tolerance


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """Return ``mask`` (*spatial) and all background that does not reach the border along faces (boolean)."""
    labels, count = ndimage.label(~mask)
    reaches_border = np.zeros(count + 1, dtype=bool)
    for axis in range(mask.ndim):
        reaches_border[labels.take((0, -1), axis=axis)] = True
    reaches_border[0] = False
    return ~reaches_border[labels]


def largest_component(mask: np.ndarray) -> np.ndarray:
    """Return the largest face-connected component of ``mask`` (*spatial, boolean); an empty mask stays empty."""
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()


def otsu_mask(image: np.ndarray) -> np.ndarray:
    """Return the object in ``image`` (C, *spatial): boolean (*spatial), bright against dark.

    A voxel counts when any channel exceeds that channel's own threshold (Otsu 1979, doi:10.1109/TSMC.1979.4310076), for
    channels differ in scale. Each channel is clipped to its 0.1 and 99.9 percentiles first, because one hot voxel
    would leave the 256 bins of the histogram empty. Then the largest component, its holes filled.
    """
    above = np.zeros(image.shape[1:], dtype=bool)
    for channel in image:
        clipped = np.clip(channel, *np.percentile(channel, (0.1, 99.9)))
        above |= clipped > threshold_otsu(clipped)
    return fill_holes(largest_component(above))


def is_plausible(mask: np.ndarray) -> bool:
    """Return whether ``mask`` (*spatial) looks like an object inside a field of view.

    It fills 1 to 99 % of the volume, and on all axes but one the two end faces are at most half as densely covered as
    the volume (a head scan may be cut along one axis). Noise, tissue cut to fill the image, and objects darker than
    their background fail.
    """
    share = float(mask.mean())
    if not PLAUSIBLE_SHARE[0] <= share <= PLAUSIBLE_SHARE[1]:
        return False
    free_axes = sum(float(mask.take((0, -1), axis=axis).mean()) <= share / 2 for axis in range(mask.ndim))
    return free_axes >= mask.ndim - 1


def foreground_mask(image: np.ndarray, method: Method = "auto", where: str = "image") -> np.ndarray:
    """Return the foreground of ``image`` (C, *spatial) as booleans (*spatial); see ``ForegroundMask``.

    Raises:
        DataError: a voxel is not finite; "constant" finds a channel without constant background; the mask is empty.
    """
    require_finite(image, where)
    backgrounds = [constant_background(channel) for channel in image] if method in ("auto", "constant") else []
    constants = [value for value in backgrounds if value is not None]
    if backgrounds and len(constants) == len(image):
        mask = fill_holes(
            np.any([differs(channel, value) for channel, value in zip(image, constants, strict=True)], axis=0)
        )
    elif method == "constant":
        raise DataError(
            where,
            f"channel {backgrounds.index(None)} has no constant background (a value in more than half of the corners "
            f"and in {MINIMUM_CONSTANT_SHARE:.0%} of the voxels)",
            "use method 'auto' or 'otsu', or give a mask file",
        )
    else:
        mask = np.ones(image.shape[1:], dtype=bool) if method == "all" else otsu_mask(image)
        if method == "auto" and not is_plausible(mask):
            mask = np.ones(image.shape[1:], dtype=bool)
    require_foreground(mask, where)
    return mask


class ForegroundMask(Transform):
    """Make the foreground mask of a channel-first image (C, *spatial), 2D or 3D: uint8 of shape (1, *spatial).

    Args:
        method:
            "constant": each channel has one background value, which more than half of its corner voxels share and at
            least 5 % of its voxels have (``constant_background``). Foreground = any channel differs from its background
            value, holes filled, nothing eroded.
            "otsu": any channel above its Otsu threshold, largest component, holes filled (``otsu_mask``).
            "all": every voxel.
            "auto": "constant" when every channel has a constant background; else "otsu" when its mask is plausible
            (``is_plausible``); else "all".

    Raises:
        BundleError: unknown method.
        DataError: a voxel is not finite, the mask is empty, or "constant" was asked for and there is none.
    """

    def __init__(self, method: Method = "auto") -> None:
        if method not in METHODS:
            raise BundleError(
                f"ForegroundMask: method '{method}'", f"expected one of {', '.join(METHODS)}", "choose one"
            )
        self.method: Method = method

    def __call__(self, image: Image, where: str = "image") -> Image:
        """Return the mask in the container of ``image``; ``where`` names the image in an error."""
        return like(foreground_mask(as_numpy(image), self.method, where)[None].astype(np.uint8), image)


class ForegroundMaskd(MapTransform):
    """Write one foreground mask for all ``keys`` together: the dictionary form of ``ForegroundMask``.

    Where the dictionary holds ``source_mask_key`` (a brain mask file), the foreground is that mask > 0.5, and
    ``method`` is not used. Otherwise the channels of all keys are taken as the channels of one image.

    Args:
        keys: the images; they share one grid.
        mask_key: where the mask goes: uint8 (1, *spatial), with the metadata of the first image.
        source_mask_key: where a mask file may be, or None.
        method: see ``ForegroundMask``.

    Raises:
        BundleError: unknown method.
        DataError: as ``ForegroundMask``, or shapes differ; the case is named.
    """

    def __init__(
        self,
        keys: str | Sequence[str],
        mask_key: str = "foreground",
        source_mask_key: str | None = "mask",
        method: Method = "auto",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.source_mask_key = source_mask_key
        self.make_mask = ForegroundMask(method)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the mask added."""
        output = dict(data)
        present = list(self.key_iterator(output))
        if not present:
            return output
        first = output[present[0]]
        where = case_name(output, present[0])
        if self.source_mask_key is not None and self.source_mask_key in output:
            mask = as_boolean_mask(output[self.source_mask_key], as_numpy(first), where)
            require_foreground(mask, case_name(output, self.source_mask_key))
        else:
            channels = _stack_channels({key: as_numpy(output[key]) for key in present}, where)
            mask = foreground_mask(channels, self.make_mask.method, where)
        output[self.mask_key] = like(mask[None].astype(np.uint8), first)
        return output


def _stack_channels(images: Mapping[Hashable, np.ndarray], where: str) -> np.ndarray:
    shapes = {key: image.shape[1:] for key, image in images.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(where, f"the images have different grids: {shapes}", "resample them to one grid first")
    return np.concatenate(list(images.values()))
