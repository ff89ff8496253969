"""What the metrics accept: every argument is checked, by name, before a number is computed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from transforms.errors import DataError, UsageError

Maps = tuple[list[NDArray[Any]], list[NDArray[Any]]]


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise a ``UsageError`` unless ``value`` is one of the choices."""
    if value not in choices:
        raise UsageError(
            f"segmentation metrics: {name} {value!r}", f"expected one of {', '.join(choices)}", "correct the name"
        )


def check_same_grid(
    prediction: NDArray[Any], reference: NDArray[Any], spacing_mm: Sequence[float], case: str = ""
) -> None:
    """Raise a ``DataError`` unless both arrays are 2D or 3D, equal in shape, and have one positive spacing per axis."""
    shapes = f"prediction {np.shape(prediction)}, reference {np.shape(reference)}, spacing {tuple(spacing_mm)} mm"
    where = f"case {case or 'unnamed'}: prediction and reference cannot be compared"
    if np.shape(prediction) != np.shape(reference):
        raise DataError(where, f"{shapes}: the shapes differ", "bring the prediction back to the grid of the reference")
    if np.ndim(reference) not in (2, 3):
        raise DataError(where, f"{shapes}: expected (X, Y) or (X, Y, Z)", "drop the batch and channel axes")
    if len(spacing_mm) != np.ndim(reference) or not all(np.isfinite(s) and s > 0 for s in spacing_mm):
        raise DataError(where, f"{shapes}: expected one positive spacing per axis", "take it from the image's affine")


def check_labels(labels: Mapping[int, str], ignore_label: int | None, multilabel: bool) -> dict[int, str]:
    """Return the labels to compare: all but 0 of a label map, all channels of a stack."""
    foreground = {value: name for value, name in labels.items() if value != 0 or multilabel}
    if not foreground:
        raise UsageError(
            f"segmentation metrics: labels {dict(labels)}",
            "expected at least one label other than 0",
            "correct the label table",
        )
    if ignore_label is not None and (multilabel or ignore_label in foreground):
        raise UsageError(
            f"segmentation metrics: ignore_label {ignore_label}",
            f"it is a value of a label map that is not compared; labels {foreground}, multilabel {multilabel}",
            "leave it out of the labels, or pass an evaluation mask",
        )
    return foreground


def check_lengths(name: str, lengths_mm: Collection[float]) -> None:
    """Raise a ``UsageError`` unless there is at least one length and all are finite and not negative."""
    if not lengths_mm or not all(np.isfinite(length) and length >= 0 for length in lengths_mm):
        raise UsageError(
            f"segmentation metrics: {name} {list(lengths_mm)} mm",
            "expected 0 mm or more",
            "correct the tolerance or the width",
        )


def as_maps(
    prediction: NDArray[Any],
    reference: NDArray[Any],
    spacing_mm: Sequence[float],
    foreground: Mapping[int, str],
    multilabel: bool,
    case: str,
) -> tuple[Maps, list[list[int]]]:
    """Return the maps of prediction and reference, whole numbers, and the labels of each: one map, or one per channel.

    Raises:
        DataError: the two cannot be compared, or are not label maps (masks with ``multilabel``).
        UsageError: a channel that is not there.
    """
    prediction, reference = np.asarray(prediction), np.asarray(reference)
    if not multilabel:
        check_same_grid(prediction, reference, spacing_mm, case)
        maps = ([_as_label_map(prediction, "prediction", case)], [_as_label_map(reference, "reference", case)])
        return maps, [list(foreground)]
    if prediction.ndim and reference.ndim and len(prediction) == len(reference) > 0:
        check_same_grid(prediction[0], reference[0], spacing_mm, case)
    else:
        raise DataError(
            f"case {case or 'unnamed'}: prediction and reference cannot be compared",
            f"prediction {prediction.shape}, reference {reference.shape}: expected as many channels in both",
            "give both one mask per label",
        )
    missing = [channel for channel in foreground if not 0 <= channel < len(reference)]
    if missing:
        raise UsageError(
            f"segmentation metrics: label {missing[0]} ({foreground[missing[0]]})",
            f"the stack has the channels 0 to {len(reference) - 1}",
            "name the channels of the stack",
        )
    stacks = [
        [as_mask(stack[channel], f"{name}, channel {channel},", case) for channel in foreground]
        for stack, name in ((prediction, "prediction"), (reference, "reference"))
    ]
    return (stacks[0], stacks[1]), [[1]] * len(foreground)


def kept_voxels(
    evaluation_mask: NDArray[Any] | None, ignore_label: int | None, reference: NDArray[Any], case: str
) -> NDArray[np.bool_] | None:
    """Return the voxels that count, or None where all do.

    Raises:
        DataError: the mask has another shape, or is not 0 and 1.
    """
    keep = None
    if evaluation_mask is not None:
        keep = as_mask(evaluation_mask, "evaluation mask", case)
        if keep.shape != reference.shape:
            raise DataError(
                f"case {case or 'unnamed'}: the evaluation mask does not fit",
                f"evaluation mask {keep.shape}, reference {reference.shape}",
                "bring the mask to the grid of the reference",
            )
    if ignore_label is not None:
        known = reference != ignore_label
        keep = known if keep is None else keep & known
    return keep


def as_mask(array: ArrayLike, name: str, case: str) -> NDArray[np.bool_]:
    """Return a mask of 0 and 1, of any dtype, as bool.

    Raises:
        DataError: other values.
    """
    array = np.asarray(array)
    mask = array.astype(bool, copy=False)
    # The extremes of whole numbers are found without a second array.
    whole = array.dtype.kind in "iu"
    if not (array.min(initial=0) >= 0 and array.max(initial=0) <= 1 if whole else np.array_equal(mask, array)):
        raise DataError(
            f"case {case or 'unnamed'}: the {name} is not a mask",
            f"values from {array.min()} to {array.max()}, expected 0 and 1 only",
            "compare one label at a time: array == label; threshold probabilities",
        )
    return mask


def _as_label_map(array: NDArray[Any], name: str, case: str) -> NDArray[Any]:
    if array.dtype.kind in "iub":
        return array
    whole = array.dtype.kind == "f" and np.array_equal(array, np.trunc(array))
    if not whole or np.abs(array).max(initial=0) >= 2**31:
        raise DataError(
            f"case {case or 'unnamed'}: the {name} is not a label map",
            f"dtype {array.dtype} with values that are not whole numbers",
            "take the argmax of a network's output; resample labels by nearest neighbour",
        )
    return array.astype(np.int32)
