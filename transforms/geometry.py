"""Bring a case to the grid that a network was trained on, and its prediction back.

MONAI's transforms do the work and keep the record for the way back; what is added here is a rule that cannot be broken
by a forgotten argument: labels and masks move by nearest neighbour, images by the declared order, and an empty crop is
refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import CropForegroundd, Orientationd, Spacingd

from transforms.errors import BundleError, DataError


class ToRASd(Orientationd):
    """Flip and permute axes so that the array runs right, anterior, superior. Invertible; values are not touched.

    Args:
        keys: channel-first MetaTensors (C, X, Y, Z); absent keys are skipped.
    """

    def __init__(self, keys: KeysCollection) -> None:
        super().__init__(keys, axcodes="RAS", labels=None, allow_missing_keys=True)


class ResampleToSpacingd(Spacingd):
    """Resample to ``spacing_mm``: images by spline of ``order``, labels and masks always by nearest; invertible.

    Args:
        image_keys: channel-first intensity images (C, X, Y, Z) float32.
        label_keys: label maps and masks (1, X, Y, Z); a value that was not there before cannot appear.
        spacing_mm: the target voxel size in mm; an entry of 0 keeps the image's own spacing along that axis.
        order: 0 nearest, 1 linear, 3 cubic spline (SciPy's ``map_coordinates``; beyond the edge the edge value).

    Raises:
        BundleError: a key declared as image and label, a negative spacing, an order outside 0-5.
    """

    def __init__(
        self, image_keys: KeysCollection, label_keys: KeysCollection, spacing_mm: Sequence[float], order: int = 1
    ) -> None:
        images, labels = _as_tuple(image_keys), _as_tuple(label_keys)
        if set(images) & set(labels):
            raise BundleError(
                f"ResampleToSpacingd: key {sorted(map(str, set(images) & set(labels)))[0]} is image and label",
                "labels move by nearest neighbour and images by spline, one key cannot do both",
                "name every key once",
            )
        if not 0 <= order <= 5 or any(s < 0 for s in spacing_mm):
            raise BundleError(
                f"ResampleToSpacingd: order {order}, spacing {list(spacing_mm)} mm",
                "expected an order from 0 to 5 and spacings >= 0",
                "correct the bundle's resampling hyper-parameters",
            )
        # MONAI's integer modes are spline orders; for linear its own sampler is the same function and far quicker.
        image_mode: int | str = "bilinear" if order == 1 else order
        super().__init__(
            images + labels,
            pixdim=[float(s) if s > 0 else float("nan") for s in spacing_mm],
            mode=[image_mode] * len(images) + ["nearest"] * len(labels),
            padding_mode=["border" if order == 1 else "nearest"] * len(images) + ["border"] * len(labels),
            # With an integer mode and align_corners MONAI 1.6 shrinks the image about its middle, away from its label.
            align_corners=[order == 1] * len(images) + [True] * len(labels),
            dtype=[torch.float64] * len(images) + [torch.float64] * len(labels),
            allow_missing_keys=True,
        )
        self.label_names = labels

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        result = super().__call__(data, lazy)
        for key in self.label_names:
            if key in result:
                result[key] = result[key].to(data[key].dtype)
        return result


class CropToForegroundd(CropForegroundd):
    """Crop every key to the box of the foreground mask plus a margin in voxels. Invertible.

    Air around the head costs memory and windows and teaches a network nothing.

    Args:
        keys: channel-first arrays to crop; absent keys are skipped.
        source_key: mask (1, X, Y, Z) with at least one voxel.
        margin: voxels kept around the box, where the volume has them.

    Raises:
        DataError: the mask is empty (MONAI would return an image of size 0).
    """

    def __init__(self, keys: KeysCollection, source_key: str = "foreground", margin: int = 4) -> None:
        super().__init__(keys, source_key=source_key, margin=margin, allow_smaller=True, allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, torch.Tensor], lazy: bool | None = None) -> dict[Hashable, torch.Tensor]:
        if not bool(np.asarray(data[self.source_key]).any()):
            raise DataError(
                f"case {data.get('case', '')}: key {self.source_key} is empty",
                "0 foreground voxels, at least 1 expected",
                "check the image and its brain mask",
            )
        return super().__call__(data, lazy)


def _as_tuple(keys: KeysCollection) -> tuple[Any, ...]:
    return (keys,) if isinstance(keys, str) else tuple(keys)
