"""The metrics on real lesion masks: equal to MONAI, and the surface definition close to it, within a voxel."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.metrics import (
    compute_average_surface_distance,
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy import ndimage

from pipelines.metrics import lesion_detection, segmentation_metrics

PATIENTS = ("patient01", "patient02", "patient16", "patient30")


def cases(folder: Path):
    """Pairs with a known kind of difference: grown, moved, one lesion less and one more far away."""
    image = nib.load(folder / "consensus_gt.nii.gz")
    reference = np.asarray(image.dataobj) > 0
    spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
    labelled, n = ndimage.label(reference, np.ones((3, 3, 3)))
    largest = 1 + int(np.argmax(np.bincount(labelled.ravel())[1:]))
    altered = reference & (labelled != largest)
    altered[2:5, 3:6, 2:6] = True
    yield spacing, ndimage.binary_dilation(reference), reference
    yield spacing, np.roll(reference, (1, -2, 1), (0, 1, 2)), reference
    yield spacing, altered, reference
    assert n > 1


@pytest.mark.parametrize("patient", PATIENTS)
def test_equal_to_monai_on_lesions(real_data: Path, patient: str) -> None:
    for spacing, prediction, reference in cases(real_data / "ms_lesion_mri" / "masks_only" / patient):
        (row,) = segmentation_metrics(prediction, reference, spacing, {1: "lesion"}, (1.0, 3.0))
        y_pred, y = (torch.from_numpy(np.ascontiguousarray(m))[None, None] for m in (prediction, reference))
        options = {"include_background": True, "spacing": spacing}
        expected = {
            "dice": compute_dice(y_pred, y),
            "hd_mm": compute_hausdorff_distance(y_pred, y, **options),
            "hd95_mm": compute_hausdorff_distance(y_pred, y, percentile=95, **options),
            "asd_mm": compute_average_surface_distance(y_pred, y, **options),
            "assd_mm": compute_average_surface_distance(y_pred, y, symmetric=True, **options),
            "nsd": compute_surface_dice(y_pred, y, [1.0], use_subvoxels=True, **options),
            "nsd_3mm": compute_surface_dice(y_pred, y, [3.0], use_subvoxels=True, **options),
        }
        for key, value in expected.items():
            assert row[key] == pytest.approx(value.item(), rel=1e-6, abs=1e-6), key
        lesions = lesion_detection(prediction, reference, spacing)
        assert {key: row[f"lesion_{key}"] for key in lesions} == lesions


def test_surface_definition_on_lesions(real_data: Path) -> None:
    for spacing, prediction, reference in cases(real_data / "ms_lesion_mri" / "masks_only" / PATIENTS[0]):
        rows = [
            segmentation_metrics(prediction, reference, spacing, {1: "lesion"}, definition=definition)[0]
            for definition in ("voxel", "surface")
        ]
        assert rows[0]["dice"] == rows[1]["dice"]
        assert rows[0]["assd_mm"] == pytest.approx(rows[1]["assd_mm"], abs=max(spacing))
        assert 0 < rows[1]["nsd"] < 1
