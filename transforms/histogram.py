"""One intensity scale for MRI, which has no unit: landmarks learnt on a cohort, and the map of an image onto them.

Percentiles of the foreground are landmarks of an image. Their average over the training cohort, on one scale, is the
standard; each image is mapped to it piecewise linearly. The landmarks are a file with a digest, because they are as
much a part of a trained model as its weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.transforms import MapTransform, Transform

from transforms.errors import BundleError, DataError
from transforms.masks import (
    Array,
    Image,
    as_boolean_mask,
    as_numpy,
    case_name,
    like,
    require_finite,
    require_foreground,
    require_key,
)

PERCENTILES: tuple[float, ...] = (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 99)
STANDARD_SCALE = (0.0, 100.0)
# Percentiles closer than this share of their range are one landmark: a slope through them would be noise.
TIE = 1e-3


@dataclass(frozen=True)
class StandardLandmarks:
    """The standard scale of a cohort.

    Attributes:
        percentiles: increasing, within [0, 100], at least two.
        values: per channel, the standard intensity of each percentile; not decreasing, first below last.

    Raises:
        BundleError: percentiles or values are not so.
    """

    percentiles: tuple[float, ...]
    values: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        _require_percentiles(self.percentiles)
        for channel, values in enumerate(self.values):
            increasing = all(a <= b for a, b in itertools.pairwise(values))
            if len(values) != len(self.percentiles) or not increasing or not values[0] < values[-1]:
                raise BundleError(
                    f"standard landmarks of channel {channel}",
                    f"{values} is not one non-decreasing value for each of {len(self.percentiles)} percentiles",
                    "fit the landmarks again with fit_landmarks",
                )
        if not self.values:
            raise BundleError("standard landmarks", "there is no channel", "fit them with fit_landmarks")

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, ready for JSON, with the digest."""
        return {**json.loads(json.dumps(asdict(self))), "digest": self.digest}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> StandardLandmarks:
        """Return the landmarks in ``content``; raises ``BundleError`` when the digest does not match or a key lacks."""
        try:
            landmarks = cls(
                tuple(float(p) for p in content["percentiles"]),
                tuple(tuple(float(v) for v in channel) for channel in content["values"]),
            )
            digest = content["digest"]
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                "standard landmarks", f"{type(error).__name__}: {error}", "expected percentiles, values and digest"
            ) from error
        if landmarks.digest != digest:
            raise BundleError(
                "standard landmarks",
                f"the digest is {landmarks.digest}, the file says {digest}: the values were changed",
                "restore the file, or fit the landmarks again",
            )
        return landmarks

    @property
    def digest(self) -> str:
        """SHA-256 of the landmarks in canonical JSON (hexadecimal)."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def fit_landmarks(
    images: Iterable[Array], masks: Iterable[Array], percentiles: Sequence[float] = PERCENTILES
) -> StandardLandmarks:
    """Return the standard landmarks of a cohort of images (C, *spatial) with their foreground masks (1, *spatial).

    Per channel and image, the percentiles q_k over the mask are mapped by the line that takes (q_first, q_last) to
    (0, 100); the standard is their mean over the images. Source: Nyul, Udupa & Zhang 2000, doi:10.1109/42.836373;
    linear between the landmarks. One pass, one image in memory at a time, so ``images`` may be a generator.

    Raises:
        BundleError: percentiles do not increase within [0, 100].
        DataError: no image, different numbers of images and masks or of channels, an empty mask, a voxel that is not
            finite, or a channel whose first and last percentile coincide.
    """
    _require_percentiles(percentiles)
    low, high = STANDARD_SCALE
    mapped: list[np.ndarray] = []
    for index, (image, mask) in enumerate(_pairs(images, masks)):
        where = f"image {index} of the cohort"
        landmarks = _landmarks_of(as_numpy(image), mask, percentiles, where)
        if mapped and len(landmarks) != len(mapped[0]):
            raise DataError(
                where, f"it has {len(landmarks)} channels, the first has {len(mapped[0])}", "give one kind of image"
            )
        first, last = landmarks[:, :1], landmarks[:, -1:]
        mapped.append(low + (high - low) * (landmarks - first) / (last - first))
    if not mapped:
        raise DataError("fit_landmarks", "the cohort holds no image", "give at least one image with its mask")
    standard = np.mean(mapped, axis=0)
    return StandardLandmarks(
        tuple(float(p) for p in percentiles), tuple(tuple(float(v) for v in channel) for channel in standard)
    )


def load_landmarks(path: str | Path) -> StandardLandmarks:
    """Return the landmarks in the file ``path``; raises ``BundleError`` when it is missing, malformed or changed."""
    try:
        return StandardLandmarks.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BundleError(f"landmarks file {path}", str(error), "fit and save the landmarks first") from error
    except BundleError as error:
        raise BundleError(f"landmarks file {path}: {error.what}", error.why, error.fix) from error


def standardize(channel: np.ndarray, landmarks: np.ndarray, standard: Sequence[float]) -> np.ndarray:
    """Map ``channel`` (*spatial) so that its ``landmarks`` (K) come to lie on ``standard`` (K): float32, monotone.

    Between landmarks linear, beyond the first and the last by the line of the end segment. Landmarks closer than 1/1000
    of their range are replaced by their mean, and so are their standard values, which keeps the map monotone.
    """
    source, target = _merge_ties(landmarks, np.asarray(standard))
    values = channel.astype(np.float64)
    mapped = np.interp(values, source, target)
    slopes = np.diff(target) / np.diff(source)
    mapped += slopes[0] * np.minimum(values - source[0], 0) + slopes[-1] * np.maximum(values - source[-1], 0)
    return mapped.astype(np.float32)


class StandardizeHistogram(Transform):
    """Map each channel of an image to the standard scale of a cohort: (C, *spatial) in, float32 out, no unit.

    The percentiles are measured over the mask; the whole image is mapped, the background along the first segment's
    line.

    Args:
        landmarks: from ``fit_landmarks``, or the path of their file.

    Raises:
        BundleError: the file is missing, malformed or changed.
        DataError: another number of channels, an empty mask or one of another shape, voxels that are not finite, or a
            channel whose first and last percentile coincide (its scale cannot be known).
    """

    def __init__(self, landmarks: StandardLandmarks | str | Path) -> None:
        self.landmarks = landmarks if isinstance(landmarks, StandardLandmarks) else load_landmarks(landmarks)

    def __call__(self, image: Image, mask: Array, where: str = "image") -> Image:
        """Return the standardised image; ``where`` names it in an error."""
        values = as_numpy(image)
        if len(values) != len(self.landmarks.values):
            raise DataError(
                where,
                f"it has {len(values)} channels, the landmarks {len(self.landmarks.values)}",
                "use landmarks that were fitted on the same channels",
            )
        measured = _landmarks_of(values, mask, self.landmarks.percentiles, where)
        channels = zip(values, measured, self.landmarks.values, strict=True)
        return like(np.stack([standardize(*channel) for channel in channels]), image)


class StandardizeHistogramd(MapTransform):
    """The dictionary form of ``StandardizeHistogram``: all ``keys`` share landmarks and the mask at ``mask_key``."""

    def __init__(
        self,
        keys: str | Sequence[str],
        landmarks: StandardLandmarks | str | Path,
        mask_key: str = "foreground",
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.mask_key = mask_key
        self.standardize = StandardizeHistogram(landmarks)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the images standardised."""
        output = dict(data)
        mask = require_key(output, self.mask_key, type(self).__name__, "ForegroundMaskd")
        for key in self.key_iterator(output):
            output[key] = self.standardize(output[key], mask, case_name(output, key))
        return output


def _landmarks_of(image: np.ndarray, mask: Array, percentiles: Sequence[float], where: str) -> np.ndarray:
    """Return the percentiles of each channel over ``mask``: float64 (C, K), first below last."""
    require_finite(image, where)
    inside = as_boolean_mask(mask, image, where)
    require_foreground(inside, where)
    landmarks = np.array([np.percentile(channel[inside].astype(np.float64), percentiles) for channel in image])
    for channel, values in enumerate(landmarks):
        if not values[0] < values[-1]:
            raise DataError(
                f"{where}: landmarks of channel {channel}",
                f"percentiles {percentiles[0]:g} and {percentiles[-1]:g} over the mask are both {values[0]:g}",
                "check the mask: it should hold tissue with contrast",
            )
    return landmarks


def _merge_ties(landmarks: np.ndarray, standard: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tolerance = TIE * (landmarks[-1] - landmarks[0])
    groups = [[0]]
    for index in range(1, len(landmarks)):
        if landmarks[index] - landmarks[groups[-1][0]] > tolerance:
            groups.append([])
        groups[-1].append(index)
    return (
        np.array([landmarks[group].mean() for group in groups]),
        np.array([standard[group].mean() for group in groups]),
    )


def _pairs(images: Iterable[Array], masks: Iterable[Array]) -> Iterable[tuple[Array, Array]]:
    try:
        yield from zip(images, masks, strict=True)
    except ValueError as error:
        raise DataError("fit_landmarks", f"images and masks: {error}", "give one mask for each image") from error


def _require_percentiles(percentiles: Sequence[float]) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(percentiles))
    if len(percentiles) < 2 or not increasing or percentiles[0] < 0 or percentiles[-1] > 100:
        raise BundleError(
            "landmarks: percentiles", f"{tuple(percentiles)}", "give at least two, increasing, in [0, 100]"
        )
