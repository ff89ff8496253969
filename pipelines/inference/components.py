"""Removal of small components: specks below a volume that the user declares in mm^3, never in voxels.

A component is joined over faces, edges and corners (26 neighbours in 3D, 8 in 2D), label by label: two labels that
touch are two components. In 2D the threshold is an area in mm^2.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform, Transform
from numpy.typing import NDArray
from scipy import ndimage

from transforms.errors import DataError, UsageError


def remove_small_components(
    label_map: NDArray[Any], spacing_mm: Sequence[float], minimum_volume_mm3: float
) -> NDArray[Any]:
    """Set to 0 every component whose volume is strictly below the threshold.

    Args:
        label_map: (X, Y) or (X, Y, Z), 0 is background; any dtype, whole numbers; not changed.
        spacing_mm: voxel size along each axis, in mm.
        minimum_volume_mm3: the smallest volume that stays, in mm^3 (2D: area in mm^2). Volumes that agree to 1e-6 count
            as equal, because a file's header stores the spacing as float32.

    Returns:
        A new label map of the same shape and dtype.

    Raises:
        DataError: not 2D or 3D, or a spacing that is not one positive number per axis.
        UsageError: a negative threshold.
    """
    _check_threshold(minimum_volume_mm3)
    if (
        label_map.ndim not in (2, 3)
        or len(spacing_mm) != label_map.ndim
        or not all(np.isfinite(s) and s > 0 for s in spacing_mm)
    ):
        raise DataError(
            f"label map of shape {label_map.shape}, spacing {tuple(spacing_mm)} mm",
            "expected (X, Y) or (X, Y, Z) and one positive spacing per axis",
            "drop the batch and channel axes, and take the spacing from the affine",
        )
    cleaned = label_map.copy()
    minimum_voxels = minimum_volume_mm3 / float(np.prod(spacing_mm)) * (1 - 1e-6)
    structure = ndimage.generate_binary_structure(label_map.ndim, label_map.ndim)
    for value in np.unique(label_map[label_map != 0]):
        components, n = ndimage.label(label_map == value, structure)
        small = np.bincount(components.ravel(), minlength=n + 1) < minimum_voxels
        small[0] = False
        cleaned[small[components]] = 0
    return cleaned


class RemoveSmallComponents(Transform):
    """:func:`remove_small_components` for a label map (1, *spatial) with an affine, from which the spacing is taken.

    Args:
        minimum_volume_mm3: the smallest volume that stays, in mm^3 (2D: area in mm^2).

    Raises:
        DataError: no affine, or not one channel.
        UsageError: a negative threshold, at construction.
    """

    def __init__(self, minimum_volume_mm3: float) -> None:
        _check_threshold(minimum_volume_mm3)
        self.minimum_volume_mm3 = minimum_volume_mm3

    def __call__(self, label_map: MetaTensor) -> MetaTensor:
        """Return a new MetaTensor of the same shape, dtype, device and metadata."""
        if not isinstance(label_map, MetaTensor) or label_map.shape[0] != 1:
            raise DataError(
                f"RemoveSmallComponents: a {type(label_map).__name__} of shape {tuple(label_map.shape)}",
                "expected a MetaTensor (1, *spatial): without an affine there is no volume in mm^3",
                "take the argmax first, and keep the image's metadata",
            )
        spacing_mm = [float(s) for s in label_map.pixdim[: label_map.ndim - 1]]
        cleaned = remove_small_components(label_map[0].cpu().numpy(), spacing_mm, self.minimum_volume_mm3)
        result = label_map.clone()
        result[0] = torch.from_numpy(cleaned).to(label_map.device)
        return result


class RemoveSmallComponentsd(MapTransform):
    """Dictionary twin of :class:`RemoveSmallComponents`.

    Args:
        keys: label maps (1, *spatial), MetaTensor.
        minimum_volume_mm3: the smallest volume that stays, in mm^3 (2D: area in mm^2).
        allow_missing_keys: whether a key may be absent.
    """

    def __init__(self, keys: KeysCollection, minimum_volume_mm3: float, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)
        self.remove = RemoveSmallComponents(minimum_volume_mm3)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of the dictionary with the cleaned label maps."""
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.remove(result[key])
        return result


def _check_threshold(minimum_volume_mm3: float) -> None:
    if not (np.isfinite(minimum_volume_mm3) and minimum_volume_mm3 >= 0):
        raise UsageError(f"minimum volume {minimum_volume_mm3} mm^3", "expected 0 or more", "correct the threshold")
