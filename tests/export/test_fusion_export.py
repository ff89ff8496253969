"""The fusion bundle as an export: a denoiser in a loop of samples, images instead of labels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.embedded import pair_cohort
from pipelines.export.archive import read_archive
from pipelines.export.selftest import selftest
from pipelines.runner import BUNDLES

pytestmark = pytest.mark.slow

BUNDLE = BUNDLES / "head_mri_ct_fusion"
SMALL = ["--spacing", "[4.0,4.0,4.0]", "--patch_size", "[48,56,1]", "--channels", "[8,16,24]", "--warmup_epochs", "0"]
SMALL += ["--max_epochs", "1", "--steps_per_epoch", "2", "--val_interval", "1", "--sampling_steps", "1"]


def test_a_denoiser_is_exported_and_proves_itself(tmp_path: Path) -> None:
    cohort = pair_cohort(tmp_path / "pairs", subjects=5, spacing_mm=(4.0, 4.0, 4.0), seed=6, contrasts=("t1",))
    where = ["--manifest", str(cohort.path), "--runs_dir", str(tmp_path / "runs"), "--run_name", "d"]
    assert main(["train", str(BUNDLE), *where, "--cache_dir", str(tmp_path / "cache"), *SMALL]) == 0
    run = tmp_path / "runs" / BUNDLE.name / "d"
    accepted = ["--acknowledge", "['R42: a test']"]
    assert main(["export", str(run), "-o", str(tmp_path / "fusion.zip"), *accepted]) == 0
    files = read_archive(tmp_path / "fusion.zip")
    assert "**These weights were not measured.** a test" in files["docs/README.md"].decode()
    assert not [name for name in files if name.startswith("results/")]
    image = json.loads(files["configs/metadata.json"])["network_data_format"]["inputs"]["image"]
    assert (image["num_channels"], image["spatial_shape"]) == (7, [48, 56, 1])
    assert list(image["channel_def"].values())[1] == "CT, level 40 HU, width 160 HU"
    assert list(image["channel_def"].values())[-3:] == ["first guess: blend by HU", "x_t", "t"]
    (tested,) = selftest(tmp_path / "fusion.zip", ["torch"], unsigned=True)
    assert (tested.status, tested.figures) == ("passed", {"response": 0.0, "phantom_fused.nii": 0.0})
