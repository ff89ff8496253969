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
from pipelines.inference.ensemble import UNCERTAINTY
from pipelines.manifests import Label
from pipelines.manifests.digest import file_digest
from transforms.errors import BundleError, DataError

_GEOMETRY = "qform_code sform_code quatern_b quatern_c quatern_d qoffset_x qoffset_y qoffset_z srow_x srow_y srow_z"


def segmentation_nifti(prediction: np.ndarray, source: str | Path) -> bytes:
    """Return a gzipped NIfTI (uint8) of a label map on the grid of ``source``, affine and codes taken from its header.

    Args:
        prediction: label map (X, Y, Z), on the grid of ``source``.
        source: the NIfTI image that was segmented.

    Raises:
        BundleError: the shapes differ (the way back to the image's grid is broken), or a value does not fit uint8.
    """
    content = _nifti_on_grid_of(source, prediction, np.dtype(np.uint8), "label map")
    if not np.array_equal(prediction, prediction.astype(np.uint8)):
        raise BundleError(
            f"{source}: the prediction is no label map of uint8",
            f"values from {prediction.min()} to {prediction.max()}, expected whole numbers from 0 to 255",
            "take the argmax in the bundle's postprocessing; more than 255 labels cannot be written",
        )
    return gzip.compress(content, mtime=0)  # no time stamp: equal predictions are equal files


def uncertainty_nifti(uncertainty: np.ndarray, source: str | Path, name: str) -> bytes:
    """Return a gzipped NIfTI (float32) of an uncertainty map in nats, on the grid of ``source`` as a label map's.

    Args:
        uncertainty: (X, Y, Z), on the grid of ``source``.
        source: the NIfTI image that was segmented.
        name: what it is; stands in the header.

    Raises:
        BundleError: the shapes differ, or a value is not finite or negative.
    """
    if not (np.isfinite(uncertainty).all() and (uncertainty >= 0).all()):
        raise BundleError(
            f"{source}: the {name} has values that are no uncertainty",
            f"{int((~np.isfinite(uncertainty)).sum())} not finite, {int((uncertainty < 0).sum())} negative",
            "the network's output is not finite: look at the image and at the weights",
        )
    return image_nifti(uncertainty, source, f"{name} (nats)")


def image_nifti(voxels: np.ndarray, source: str | Path, name: str) -> bytes:
    """Return a gzipped NIfTI (float32) of an image, on the grid of ``source`` as a label map's.

    Args:
        voxels: (X, Y, Z), on the grid of ``source``.
        source: the NIfTI image that it was made from.
        name: what it is; stands in the header.

    Raises:
        BundleError: the shapes differ, or a value is not finite.
    """
    content = _nifti_on_grid_of(source, voxels, np.dtype(np.float32), name)
    if not np.isfinite(voxels).all():
        raise BundleError(
            f"{source}: the {name} image has values that are not finite",
            f"{int((~np.isfinite(voxels)).sum())} of {voxels.size} voxels",
            "the network's output is not finite: look at the image and at the weights",
        )
    return gzip.compress(content, compresslevel=1, mtime=0)  # the last bits of floats do not compress


def _nifti_on_grid_of(source: str | Path, voxels: np.ndarray, dtype: np.dtype, name: str) -> bytes:
    original = nib.load(str(source))
    if tuple(original.shape[:3]) != voxels.shape:
        raise BundleError(
            f"{source}: the prediction has shape {voxels.shape}",
            f"the image has {tuple(original.shape[:3])}",
            "this is a defect of the bundle's postprocessing: report it",
        )
    image = nib.Nifti1Image(voxels.astype(dtype), original.affine)
    for field in _GEOMETRY.split():
        image.header[field] = original.header[field]
    image.header["pixdim"][:4] = original.header["pixdim"][:4]
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = f"Fiducial {name}".encode()
    return image.to_bytes()


def volumes(prediction: np.ndarray, spacing_mm: tuple[float, ...], labels: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return per foreground label: id, name, voxels, volume in mL, number of components (joined by 26 neighbours)."""
    voxel_ml = float(np.prod(spacing_mm)) / 1000.0
    rows = []
    for label, name in _foreground(labels):
        mask = prediction == label
        _, components = ndimage.label(mask, structure=np.ones((3,) * mask.ndim))
        count = int(mask.sum())
        rows.append(
            {"id": label, "name": name, "voxels": count, "volume_ml": count * voxel_ml, "components": int(components)}
        )
    return rows


def uncertainty_inside(
    prediction: np.ndarray, maps: Mapping[str, np.ndarray], labels: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Return per foreground label: id, name, and the mean of each map over its voxels (None without a voxel)."""
    rows = []
    for label, name in _foreground(labels):
        inside = prediction == label
        means = {f"mean_{key}": float(m[inside].mean(dtype=float)) if inside.any() else None for key, m in maps.items()}
        rows.append({"id": label, "name": name, **means})
    return rows


def _foreground(labels: Mapping[int, str]) -> list[tuple[int, str]]:
    return [(label, name) for label, name in labels.items() if label != 0]


class SavePredictions:
    """Write ``<case>.nii.gz`` (uint8, original grid) and ``<case>.json`` (volumes) for every case of an evaluator.

    Where the postprocessing leaves maps of uncertainty (``SplitUncertaintyd``), ``<case>_entropy.nii.gz`` and
    ``<case>_mutual_information.nii.gz`` (float32, nats) stand beside the mask, and their means in the JSON. Both are 0
    where the network did not look: outside of the box around the foreground.

    Args:
        folder: where they go.
        labels: the bundle's label table.
        weights: the networks' files; their digests go into the JSON, so that a mask can be traced to its networks.
    """

    def __init__(self, folder: str | Path, labels: Sequence[Label], weights: Sequence[str | Path]) -> None:
        self.folder = Path(folder)
        self.labels = {label.id: label.name for label in labels}
        self.written: dict[Path, str] = {}
        self.weights = [{"file": str(file), "sha256": file_digest(Path(file))} for file in weights]

    def attach(self, engine: Engine) -> None:
        """Register on an evaluator whose postprocessing leaves label maps on the image's own grid."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        for item, batch in zip(engine.state.output, engine.state.batch, strict=True):
            prediction = np.asarray(item["pred"].cpu())[0]
            source, case = item["image"].meta["filename_or_obj"], batch["case"]
            write_atomically(self._own(f"{case}.nii.gz", case), segmentation_nifti(prediction, source))
            spacing = tuple(float(s) for s in voxel_sizes(nib.load(str(source)).affine))
            maps = {name: np.asarray(item[name].cpu())[0] for name in UNCERTAINTY if name in item}
            for name, uncertainty in maps.items():
                content = uncertainty_nifti(uncertainty, source, name.replace("_", " "))
                write_atomically(self._own(f"{case}_{name}.nii.gz", case), content)
            write_json(
                self.folder / f"{case}.json",
                {
                    "case": case,
                    "spacing_mm": spacing,
                    "labels": volumes(prediction, spacing, self.labels),
                    **({"uncertainty": self._about(prediction, maps)} if maps else {}),
                    "weights": self.weights if len(self.weights) > 1 else self.weights[0],
                },
            )

    def _own(self, name: str, case: str) -> Path:
        """Return the path of a file of ``case``, sure that no other case has written it: x_entropy beside x would."""
        path = self.folder / name
        other = self.written.setdefault(path, case)
        if other != case:
            raise DataError(
                f"{path}: belongs to case {other} and to case {case}", "their files share a name", "rename one of them"
            )
        return path

    def _about(self, prediction: np.ndarray, maps: Mapping[str, np.ndarray]) -> dict[str, Any]:
        members = len(self.weights)
        alone = "a single network cannot disagree with itself: its mutual information is 0"
        about = {"unit": "nat", "members": members, "labels": uncertainty_inside(prediction, maps, self.labels)}
        return about if members > 1 else {**about, "note": alone}
