"""Write predictions as a hospital can use them: on the grid of the image that came in, with the volumes beside them."""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from nibabel.affines import voxel_sizes
from scipy import ndimage

from pipelines.files import write_atomically, write_json
from pipelines.manifests import Label
from pipelines.manifests.digest import file_digest
from transforms.errors import BundleError

_GEOMETRY = "qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z"


def segmentation_nifti(prediction: np.ndarray, source: str | Path) -> bytes:
    """Return a gzipped NIfTI (uint8) of a label map on the grid of ``source``, affine and codes taken from its header.

    Args:
        prediction: label map (X, Y, Z), on the grid of ``source``.
        source: the NIfTI image that was segmented.

    Raises:
        BundleError: the shapes differ (the way back to the image's grid is broken), or a value does not fit uint8.
    """
    original = nib.load(str(source))
    if tuple(original.shape[:3]) != prediction.shape:
        raise BundleError(
            f"{source}: the prediction has shape {prediction.shape}",
            f"the image has {tuple(original.shape[:3])}",
            "this is a defect of the bundle's postprocessing: report it",
        )
    if not np.array_equal(prediction, prediction.astype(np.uint8)):
        raise BundleError(
            f"{source}: the prediction is no label map of uint8",
            f"values from {prediction.min()} to {prediction.max()}, expected whole numbers from 0 to 255",
            "take the argmax in the bundle's postprocessing; more than 255 labels cannot be written",
        )
    image = nib.Nifti1Image(prediction.astype(np.uint8), original.affine)
    for field in _GEOMETRY.split():
        image.header[field] = original.header[field]
    image.header["pixdim"][:4] = original.header["pixdim"][:4]
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"Fiducial label map"
    return gzip.compress(image.to_bytes(), mtime=0)  # no time stamp: equal predictions are equal files


def volumes(prediction: np.ndarray, spacing_mm: tuple[float, ...], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return per foreground label: id, name, voxels, volume in mL, number of components (joined by 26 neighbours)."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000.0
    rows = []
    for label, name in labels.items():
        if label == 0:
            continue
        mask = prediction == label
        _, components = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
        count = int(mask.sum())
        rows.append(
            {"id": label, "name": name, "voxels": count, "volume_ml": count * voxel_ml, "components": int(components)}
        )
    return rows


class SavePredictions:
    """Write ``<case>.nii.gz`` (uint8, original grid) and ``<case>.json`` (volumes) for every case of an evaluator.

    Args:
        folder: where they go.
        labels: the bundle's label table.
        weights: the network's file; its digest goes into the JSON, so that a mask can be traced to its network.
    """

    def __init__(self, folder: str | Path, labels: Sequence[Label], weights: str | Path) -> None:
        self.folder = Path(folder)
        self.labels = {label.id: label.name for label in labels}
        self.weights = {"file": str(weights), "sha256": file_digest(Path(weights))}

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose postprocessing leaves label maps on the image's own grid."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            prediction = np.asarray(item["pred"].cpu())[0]
            source = item["image"].meta["filename_or_obj"]
            write_atomically(self.folder / f"{batch['case']}.nii.gz", segmentation_nifti(prediction, source))
            spacing = tuple(float(s) for s in voxel_sizes(nib.load(str(source)).affine))
            write_json(
                self.folder / f"{batch['case']}.json",
                {
                    "case": batch["case"],
                    "spacing_mm": spacing,
                    "labels": volumes(prediction, spacing, self.labels),
                    "weights": self.weights,
                },
            )
