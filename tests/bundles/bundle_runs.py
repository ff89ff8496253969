"""Run the lesion bundle as users do, on data small enough for a test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

from pipelines.cli import main
from pipelines.runner import BUNDLES

BUNDLE = BUNDLES / "brain_lesion_mri_segmentation"
MODALITIES = ("flair", "t1")
# one step of a tiny network: whether something runs, not whether it learns
QUICK = ["--max_epochs", "1", "--steps_per_epoch", "1", "--warmup_epochs", "0", "--spacing", "[3.0,3.0,3.0]"]
QUICK += ["--patch_size", "[16,16,16]", "--filters", "[4,8,8]"]
# what is small enough for a test and still learns; the rest is the bundle's default
SMALL = ["--spacing", "[3.0,3.0,3.0]", "--patch_size", "[32,32,32]", "--filters", "[16,32,64]", "--max_epochs", "24"]
SMALL += ["--steps_per_epoch", "30", "--val_interval", "4", "--learning_rate", "0.005"]


def monai_bundle(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run MONAI's own command in the bundle's root."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, *arguments]
    return subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True, check=False)


def save(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Write a NIfTI file, by default with voxels of 3 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([3.0, 3.0, 3.0, 1.0]) if affine is None else affine), path)


def write_tiny_data(folder: Path) -> None:
    """Write three subjects of 20 x 22 x 18 voxels: a noisy block in air, and a label inside it."""
    rng = np.random.default_rng(0)
    for subject in ("a", "b", "c"):
        brain = np.zeros((20, 22, 18), np.float32)
        brain[3:17, 3:19, 3:15] = 1
        lesion = np.zeros(brain.shape, np.uint8)
        lesion[8:11, 8:12, 7:10] = 1
        for modality in MODALITIES:
            noisy = brain * (100 + rng.normal(0, 5, brain.shape)).astype(np.float32)
            save(folder / subject / f"{modality}.nii.gz", noisy)
        save(folder / subject / "lesion.nii.gz", lesion)


def import_data(folder: Path, *more: str) -> int:
    """Make ``manifest.json`` of the tiny data by our command; return its exit code."""
    images = [word for name in MODALITIES for word in ("--image", f"{name}={{subject}}/{name}.nii.gz")]
    names = ["--name", "small", "--validation", "b", "--test", "c", "-o", str(folder / "manifest.json")]
    label = ["--label", "{subject}/lesion.nii.gz"]
    return main(["manifest", "import", "folder", str(folder), *images, *label, *names, *more])


def train(folder: Path, *more: str) -> int:
    """Train run ``r`` on the tiny data by our command; return its exit code."""
    runs = folder.parent / "runs"
    where = ["--runs_dir", str(runs), "--cache_dir", str(folder.parent / "cache"), "--run_name", "r"]
    return main(["train", str(BUNDLE), "--manifest", str(folder / "manifest.json"), *where, *QUICK, *more])
