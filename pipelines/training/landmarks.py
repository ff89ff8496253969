"""Histogram landmarks of a bundle: fitted on its training cases, at that stage of the chain where they are applied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.files import write_json
from pipelines.progress import progress
from pipelines.runner import absolute, bundle_parser
from transforms.histogram import StandardizeHistogramd, StandardLandmarks, fit_landmarks, load_landmarks
from transforms.intensity import ClipIntensityPercentilesInMaskd, MeasureIntensityInMaskd

AFTER_LANDMARKS = (StandardizeHistogramd, ClipIntensityPercentilesInMaskd, MeasureIntensityInMaskd)


def read_landmarks(path: str | Path) -> dict[str, Any] | None:
    """Return the landmarks in a file as JSON values, for the contract of the weights; None where no file is named.

    Raises:
        BundleError: the file is missing or was changed.
    """
    return load_landmarks(path).to_dict() if path else None


def fit_landmarks_of_bundle(bundle: str, output: str | Path, overrides: Mapping[str, Any]) -> StandardLandmarks:
    """Fit landmarks on the training split with the bundle's own chain and write them as JSON.

    Statistics of another stage (before the bias correction, before the resampling) would not fit what they are applied
    to (rule R03), so everything in front of the standardisation runs first.

    Args:
        bundle: path or name.
        output: the file to write.
        overrides: hyper-parameters of the bundle's ``train.yaml``.
    """
    target = absolute(output)
    with bundle_parser(bundle, "train", {**overrides, "landmarks_file": ""}) as parser:
        chain = parser.get_parsed_content("preparation").transforms
        items = parser.get_parsed_content("train::data")
    before = [transform for transform in chain if not isinstance(transform, AFTER_LANDMARKS)]
    images, masks = [], []
    for item in progress(items, "preparing cases"):
        for transform in before:
            item = transform(item)
        images.append(np.asarray(item["image"]))
        masks.append(np.asarray(item["foreground"]))
    landmarks = fit_landmarks(images, masks)
    write_json(target, landmarks.to_dict())
    return landmarks
