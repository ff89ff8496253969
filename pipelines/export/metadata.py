"""``metadata.json`` of an export: the bundle's own, with what these weights take and give, and what they reached."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jsonschema

from pipelines.export.lock import Pin
from transforms.errors import BundleError

VERSION_KEYS = {"monai_version": "monai", "pytorch_version": "torch", "numpy_version": "numpy"}


def export_metadata(
    bundle: Path, contract: Mapping[str, Any], summary: Mapping[str, Any] | None, pins: Sequence[Pin]
) -> dict[str, Any]:
    """Return the metadata of an export, valid against the schema that travels with it.

    Args:
        bundle: folder in the repository.
        contract: of the weights.
        summary: of the evaluation, if there is one: its means become ``eval_metrics``.
        pins: of the lock, for the versions.

    Raises:
        BundleError: the result is not valid.
    """
    own = json.loads((bundle / "configs" / "metadata.json").read_text())
    versions = {pin.name: pin.version.partition("+")[0] for pin in pins}
    metadata = {
        **own,
        **{key: versions[package] for key, package in VERSION_KEYS.items()},
        "required_packages_version": {
            name: versions.get(name.lower(), version) for name, version in own["required_packages_version"].items()
        },
        "eval_metrics": means_of(summary),
        "network_data_format": _network_format(own["network_data_format"], contract),
    }
    try:
        jsonschema.validate(metadata, metadata_schema(bundle))
    except jsonschema.ValidationError as problem:
        raise BundleError(
            f"metadata of {bundle.name}: {problem.json_path} is not valid",
            problem.message[:200],
            "correct configs/metadata.json of the bundle",
        ) from problem
    return metadata


def metadata_schema(bundle: Path) -> dict[str, Any]:
    """Return the schema that the metadata of every bundle follow."""
    return json.loads((bundle.parent / "metadata.schema.json").read_text())


def means_of(summary: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the mean of every metric of every label that has one, as ``<label> <metric>``."""
    labels = {} if summary is None else summary["labels"]
    return {
        f"{label} {metric}": float(entry["mean"])
        for label, metrics in labels.items()
        for metric, entry in metrics.items()
        if entry["mean"] is not None
    }


def input_channels(contract: Mapping[str, Any]) -> list[str]:
    """Return what the channels of the network's input are: modalities, or condition and state of a denoiser."""
    if "windows" not in contract:
        return [str(name) for name in contract["modalities"]]
    windows = [f"CT, level {level:g} HU, width {width:g} HU" for level, width in contract["windows"]]
    return ["MRI between its percentiles", *windows, "first guess: blend by HU", "x_t", "t"]


def _network_format(own: Mapping[str, Any], contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the format with these weights' channels, at the size of their patch, for which the network is planned."""
    image, pred = own["inputs"]["image"], own["outputs"]["pred"]
    size = [int(voxels) for voxels in contract["patch_size"]]
    channels = {str(number): name for number, name in enumerate(input_channels(contract))}
    given = pred["channel_def"]
    if "windows" not in contract:
        given = {str(label["id"]): label["name"] for label in contract["labels"]}
    shaped_image = {**image, "num_channels": len(channels), "spatial_shape": size, "channel_def": channels}
    shaped_pred = {**pred, "num_channels": len(given), "spatial_shape": size, "channel_def": given}
    return {
        "inputs": {**own["inputs"], "image": shaped_image},
        "outputs": {**own["outputs"], "pred": shaped_pred},
    }
