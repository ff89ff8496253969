"""A small head cohort and one training run on it, made once and used by every end-to-end test; and tiny data."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundle_runs import BUNDLE, SMALL, import_data, monai_bundle, write_tiny_data

from pipelines.embedded import head_cohort


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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The tiny data with a manifest."""
    write_tiny_data(tmp_path / "data")
    assert import_data(tmp_path / "data") == 0
    return tmp_path / "data"
