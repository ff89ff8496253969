"""Shared by all tests: files as a hospital has them, small enough to check by eye."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

if "FIDUCIAL_REAL_DATA" not in os.environ:
    # Before torch is loaded: tests start processes by forks, and a fork of a process whose OpenMP has had a second
    # thread waits for that thread for ever, in its first convolution. `make test-real` runs tests that do not fork.
    os.environ["OMP_NUM_THREADS"] = "1"

import nibabel as nib
import numpy as np
import pytest
from absl import logging as absl_logging

from pipelines.manifests import Manifest, SplitPlan, import_folder, write_manifest

Writer = Callable[..., Path]

# TensorBoard's library keeps the stream it was imported with, here pytest's own, and closes it whenever a bundle's
# logging.conf is read. It leaves the process's real one alone.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def as_if_no_bundle_had_run() -> None:
    """Undo what a bundle run in this process has left: its logging.conf puts every logger at INFO, on stderr."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.handlers = [handler for handler in root.handlers if type(handler).__module__.startswith("_pytest")]


@pytest.fixture
def write_nifti(tmp_path: Path) -> Writer:
    """Write voxels as ``<tmp_path>/<name>.nii.gz`` on a grid of 0.5 x 1 x 3 mm, or on the given affine."""

    def write(name: str, voxels: np.ndarray, affine: np.ndarray | None = None) -> Path:
        path = tmp_path / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(voxels, np.diag([0.5, 1.0, 3.0, 1.0]) if affine is None else affine), path)
        return path

    return write


@pytest.fixture
def oblique() -> np.ndarray:
    """Voxels of 0.5 x 1 x 3 mm, turned by 30 degrees about the third axis; origin at (-10, 20, 5) mm."""
    c, s = np.cos(np.pi / 6), np.sin(np.pi / 6)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.diag([0.5, 1.0, 3.0])
    affine[:3, 3] = (-10, 20, 5)
    return affine


def ball(shape: tuple[int, ...], centre: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) <= radius


@pytest.fixture(scope="session")
def tiny_cohort(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Five subjects of 20 x 22 x 24 voxels of 2 mm: a ball of 100 a.u. with a lesion, bright in flair, dark in t1.

    s0, s1 and s2 train, s3 validates, s4 tests; each has a brain mask.
    """
    folder = tmp_path_factory.mktemp("tiny") / "cohort"
    shape, affine = (20, 22, 24), np.diag([2.0, 2.0, 2.0, 1.0])
    for number in range(5):
        draw = np.random.default_rng(number)
        brain = ball(shape, (10, 11, 12), 9)
        lesion = ball(shape, tuple(draw.uniform(7, 14, size=3)), 2.5) & brain
        subject = folder / f"s{number}"
        subject.mkdir(parents=True)
        for modality, contrast in (("flair", 80.0), ("t1", -40.0)):
            image = brain * (100 + contrast * lesion + draw.normal(0, 5, size=shape))
            nib.save(nib.Nifti1Image(image.astype(np.float32), affine), subject / f"{modality}.nii.gz")
        nib.save(nib.Nifti1Image(lesion.astype(np.uint8), affine), subject / "lesion.nii.gz")
        nib.save(nib.Nifti1Image(brain.astype(np.uint8), affine), subject / "brain.nii.gz")
    manifest = import_folder(
        folder,
        {modality: f"{{subject}}/{modality}.nii.gz" for modality in ("flair", "t1")},
        "{subject}/lesion.nii.gz",
        {"brain": "{subject}/brain.nii.gz"},
        ["1:lesion"],
        name="tiny",
        licence="generated",
        source="tests",
        split=SplitPlan(train=("s0", "s1", "s2"), validation=("s3",), test=("s4",)),
    )
    return write_manifest(manifest, folder / "manifest.json")
