"""A small head cohort and one training run on it, made once and used by every end-to-end test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.demo import head_cohort
from pipelines.runner import BUNDLES

BUNDLE = BUNDLES / "brain_lesion_mri_segmentation"
# what is small enough for a test and still learns; the rest is the bundle's default
SMALL = ["--spacing", "[3.0,3.0,3.0]", "--patch_size", "[32,32,32]", "--filters", "[16,32,64]", "--max_epochs", "24"]
SMALL += ["--steps_per_epoch", "30", "--val_interval", "4", "--learning_rate", "0.005"]


def monai_bundle(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run MONAI's own command in the bundle's root."""
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config, *arguments]
    return subprocess.run(command, cwd=BUNDLE, capture_output=True, text=True, check=False)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of ten small heads with FLAIR and T1."""
    folder = tmp_path_factory.mktemp("data") / "heads"
    manifest = head_cohort(folder, subjects=10, spacing_mm=(3.0, 3.0, 3.0), seed=4, modalities=("flair", "t1"))
    assert manifest.path is not None
    return manifest.path


@pytest.fixture(scope="session")
def trained(cohort: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run trained by MONAI's own command."""
    runs = tmp_path_factory.mktemp("runs")
    where = ["--runs_dir", str(runs), "--cache_dir", str(runs / "cache"), "--run_name", "small"]
    done = monai_bundle("configs/train.yaml", "--manifest", str(cohort), *where, *SMALL)
    assert done.returncode == 0, done.stderr
    return runs / BUNDLE.name / "small"
