"""Batch normalisation and a case at once: the other way to train and to run the lesion bundle, from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from bundle_runs import BUNDLE, SMALL

from pipelines.cli import main

pytestmark = pytest.mark.slow


def test_it_learns_and_answers_without_windows_as_with_them(
    cohort: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runs = ["--runs_dir", str(tmp_path), "--run_name", "batch", "--manifest", str(cohort)]
    options = [*SMALL, "--max_epochs", "18", "--norm", "batch", "--window", "whole"]
    assert main(["train", str(BUNDLE), *runs, "--cache_dir", str(tmp_path / "cache"), *options]) == 0
    run = tmp_path / BUNDLE.name / "batch"
    assert json.loads((run / "record.json").read_text())["outcome"]["best_metric"] > 0.5
    assert main(["evaluate", str(BUNDLE), *runs, "--window", "whole"]) == 0
    whole = pd.read_csv(run / "metrics" / "per_case.csv")["dice"]
    assert main(["evaluate", str(BUNDLE), *runs, "--overlap", "0.75", "--output_dir", str(tmp_path / "windows")]) == 0
    windows = pd.read_csv(tmp_path / "windows" / "metrics" / "per_case.csv")["dice"]
    assert whole.mean() > 0.5
    assert (whole - windows).abs().max() < 0.05  # what is left are the edges of the windows
    assert "normalises by what it sees" not in caplog.text
