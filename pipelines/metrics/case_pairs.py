"""A prediction and its reference as MONAI hands them over: one case, channel first, its voxel size in its affine.

MONAI gives an image without an affine the identity, which looks like voxels of 1 mm. Such an affine says nothing here:
the voxel size then comes from the other image of the pair or from the user, and where neither has it, that is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from numpy.typing import NDArray

from transforms.errors import DataError

SHIFT_TOLERANCE = 0.01
"""The most, in voxels, by which the affines of prediction and reference may move a corner against each other."""


@dataclass(frozen=True)
class CasePair:
    """One case: prediction and reference, each (C, *spatial) on one grid, and its name.

    ``spacing_mm``: voxel size along each spatial axis, None where neither image nor user has told it.
    """

    prediction: torch.Tensor
    reference: torch.Tensor
    spacing_mm: tuple[float, ...] | None
    case: str

    def known_spacing(self) -> tuple[float, ...]:
        """Return the voxel size in mm; raise a ``DataError`` where it is not known."""
        if self.spacing_mm is None:
            raise DataError(
                f"case {self.case}: the voxel size is not known",
                "neither prediction nor reference has an affine other than the identity, MONAI's stand-in for none",
                "load the reference with its metadata and leave track_meta on, or give spacing_mm to the metric",
            )
        return self.spacing_mm


def pair_of_case(prediction: Any, reference: Any, spacing_mm: Sequence[float] | None = None) -> CasePair:
    """Bring one case together.

    Args:
        prediction: (C, *spatial), tensor, MetaTensor or array, on any device.
        reference: likewise; its channels may be others.
        spacing_mm: voxel size where the images do not tell; where they do, it has to be the same.

    Raises:
        DataError: different grids (shape, affine), or a voxel size that is not that of the affine.
    """
    case = _name_of(reference) or _name_of(prediction) or "unnamed"
    shapes = tuple(prediction.shape[1:]), tuple(reference.shape[1:])
    if shapes[0] != shapes[1] or len(shapes[0]) not in (2, 3):
        raise DataError(
            f"case {case}: prediction and reference cannot be compared",
            f"prediction {tuple(prediction.shape)}, reference {tuple(reference.shape)}: expected (C, X, Y) or "
            "(C, X, Y, Z) on one grid",
            "invert the preprocessing of the prediction, or transform the reference in the same way",
        )
    affines = [affine for image in (prediction, reference) if (affine := _affine_of(image)) is not None]
    if len(affines) == 2:
        _check_same_place(affines[0], affines[1], shapes[1], case)
    found = tuple(_voxel_size(affines[-1], len(shapes[1])).tolist()) if affines else None
    if spacing_mm is not None:
        given = tuple(float(s) for s in spacing_mm)
        if found is not None and (len(given) != len(found) or not np.allclose(given, found, rtol=SHIFT_TOLERANCE)):
            raise DataError(
                f"case {case}: two voxel sizes",
                f"spacing_mm {given}, by the affine {tuple(round(s, 4) for s in found)} mm",
                "leave spacing_mm out where the images have an affine",
            )
        found = found or given
    return CasePair(_plain(prediction), _plain(reference), found, case)


def as_label_map(image: torch.Tensor, labels: Collection[int], name: str, case: str) -> NDArray[Any]:
    """Return the label map (*spatial) of a label map (1, *spatial), or of one channel per label, background included.

    Raises:
        DataError: several channels that are not one-hot, or too few of them for the labels.
    """
    if len(image) == 1:
        return as_array(image[0])
    map_of = torch.zeros(image.shape[1:], dtype=torch.int16, device=image.device)
    n_labels = torch.zeros_like(map_of)
    one_hot = len(image) > max(labels)
    for value, channel in enumerate(image):
        mask = channel != 0
        one_hot = one_hot and torch.equal(mask.to(channel.dtype), channel)
        map_of += mask * value
        n_labels += mask
    if not one_hot or not bool((n_labels == 1).all()):
        raise DataError(
            f"case {case}: the {name} has {len(image)} channels",
            f"expected a label map (1, *spatial), or one-hot with background and the labels {sorted(labels)}",
            "take the argmax of a network's output (AsDiscreted); for masks that overlap set multilabel",
        )
    return as_array(map_of)


def as_array(image: torch.Tensor) -> NDArray[Any]:
    """Return a NumPy array, in the memory of the tensor where that is possible."""
    image = image.detach().cpu()
    array: NDArray[Any] = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    return array


def _plain(image: Any) -> torch.Tensor:
    return image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)


def _name_of(image: Any) -> str:
    return str(image.meta.get("filename_or_obj", "")) if isinstance(image, MetaTensor) else ""


def _affine_of(image: Any) -> NDArray[np.float64] | None:
    """Return the affine (4, 4), or None where the image has none or MONAI's stand-in."""
    if not isinstance(image, MetaTensor):
        return None
    affine = to_affine_nd(3, np.asarray(image.affine, np.float64))
    return None if np.array_equal(affine, np.eye(4)) else affine


def _voxel_size(affine: NDArray[np.float64], ndim: int) -> NDArray[np.float64]:
    size: NDArray[np.float64] = np.linalg.norm(affine[:3, :ndim], axis=0)
    return size


def _check_same_place(
    predicted: NDArray[np.float64], referenced: NDArray[np.float64], shape: Sequence[int], case: str
) -> None:
    ends = [(0, size - 1) for size in shape] + [(0, 0)] * (3 - len(shape))
    corners = np.array([(*corner, 1) for corner in product(*ends)], float)
    shift_mm = float(np.linalg.norm((corners @ (predicted - referenced).T)[:, :3], axis=1).max())
    size, spacing = (_voxel_size(affine, len(shape)) for affine in (predicted, referenced))
    if not shift_mm <= SHIFT_TOLERANCE * spacing.min():
        raise DataError(
            f"case {case}: the affines of prediction and reference differ",
            f"a corner of the grid is {shift_mm:.4g} mm apart, voxels of {_lengths(size)} and "
            f"{_lengths(spacing)} mm; expected the same place within {SHIFT_TOLERANCE:g} voxels",
            "invert the preprocessing of the prediction (Invertd), or compare with the reference in the same grid",
        )


def _lengths(values: NDArray[np.float64]) -> str:
    return " x ".join(f"{value:.4g}" for value in values)
