"""The bundle's options, each through training, evaluation and prediction on a tiny cohort: do they reach the result?"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from bundle_runs import BUNDLE, import_data, train
from safetensors.torch import load_file

from pipelines.cli import main
from pipelines.inference import inferers
from pipelines.training import read_contract


def weights_of(data: Path) -> Path:
    return data.parent / "runs" / BUNDLE.name / "r" / "checkpoints" / "best.safetensors"


def evaluate(data: Path, *more: str) -> Path:
    out = data.parent / "out"
    given = ["--manifest", str(data / "manifest.json"), "--checkpoint", str(weights_of(data)), "--output_dir", str(out)]
    assert main(["evaluate", str(BUNDLE), *given, *more]) == 0
    return out


def test_slices_instead_of_volumes(data: Path) -> None:
    assert train(data, "--variant", "configs/variant_2_5d.yaml") == 0
    assert read_contract(weights_of(data))["dimensions"] == 2.5
    assert (evaluate(data) / "predictions" / "c.nii.gz").is_file()


def test_bias_correction_and_landmarks(data: Path) -> None:
    landmarks = data.parent / "landmarks.json"
    given = ["--manifest", str(data / "manifest.json"), "--bias_correction", "True", "--spacing", "[3.0,3.0,3.0]"]
    assert main(["landmarks", str(BUNDLE), "-o", str(landmarks), *given]) == 0
    assert train(data, "--bias_correction", "True", "--landmarks_file", str(landmarks)) == 0
    contract = read_contract(weights_of(data))
    assert contract["bias_correction"] is True
    assert contract["landmarks"] == json.loads(landmarks.read_text())  # the fitted state travels inside the weights
    landmarks.unlink()
    assert (evaluate(data) / "metrics" / "per_case.csv").is_file()


def test_an_optional_modality_may_be_missing_only_where_the_bundle_says_so(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, "--optional_modalities", "['t1']") == 0
    scan = data.parent / "scan"
    scan.mkdir()
    for name, code in (("flair", 0), ("t1", 3)):
        (scan / f"{name}.nii.gz").write_bytes((data / "c" / f"{name}.nii.gz").read_bytes())
        given = ["-i", str(scan), "-o", str(data.parent / name), "--checkpoint", str(weights_of(data))]
        assert main(["predict", str(BUNDLE), *given]) == code
        (scan / f"{name}.nii.gz").unlink()
    assert "modality flair is missing" in capsys.readouterr().err
    mask = nib.load(data.parent / "flair" / "scan.nii.gz")
    assert mask.get_data_dtype() == np.uint8


def test_folds_are_stored_and_used(data: Path) -> None:
    assert import_data(data, "--folds", "2") == 0
    stored = {case["id"]: case.get("fold") for case in json.loads((data / "manifest.json").read_text())["cases"]}
    assert sorted(fold for fold in stored.values() if fold is not None) == [0, 1]
    assert stored["c"] is None  # the test subject belongs to no fold
    assert train(data, "--fold", "1") == 0
    record = json.loads((data.parent / "runs" / BUNDLE.name / "r" / "record.json").read_text())
    assert record["outcome"]["best_epoch"] == 1


def test_no_validation_cases(data: Path) -> None:
    path = data / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["cases"][1]["split"] = "train"
    path.write_text(json.dumps(manifest))
    assert train(data) == 0
    assert not weights_of(data).exists()  # nothing decided which weights are best
    assert weights_of(data).with_name("last.safetensors").is_file()


def test_fine_tuning_starts_from_what_was_learnt(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--max_epochs", "2", "--steps_per_epoch", "3") == 0
    weights = str(weights_of(data).with_name("last.safetensors"))
    # a rate that is nothing in float32 leaves what it starts from
    still = ["--learning_rate", "1e-60", "--weight_decay", "0.0", "--run_name"]
    assert train(data, "--initial_weights", weights, *still, "tuned") == 0
    assert train(data, *still, "fresh") == 0
    runs = data.parent / "runs" / BUNDLE.name
    earlier, tuned, fresh = (
        load_file(runs / run / "checkpoints" / "last.safetensors") for run in ("r", "tuned", "fresh")
    )
    assert all(torch.equal(earlier[name], tuned[name]) for name in earlier)
    assert not all(torch.equal(earlier[name], fresh[name]) for name in earlier)
    assert train(data, "--initial_weights", weights, "--modalities", "['t1','flair']", *still, "swapped") == 4
    assert "other modalities" in capsys.readouterr().err  # same shapes, another meaning
    assert not (runs / "swapped").exists()


def test_a_case_that_does_not_fit_at_once_is_refused_by_its_size(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(data, "--norm", "batch") == 0
    assert (evaluate(data, "--window", "whole") / "metrics" / "per_case.csv").is_file()
    monkeypatch.setattr(inferers, "available_bytes", lambda device: 1000)
    given = ["--manifest", str(data / "manifest.json"), "--checkpoint", str(weights_of(data)), "--window", "whole"]
    assert main(["evaluate", str(BUNDLE), *given, "--output_dir", str(data.parent / "other")]) == 5
    what, why, fix = capsys.readouterr().err.splitlines()[-3:]
    assert what.startswith("error: window whole: an image of ")
    assert why == "  why: the network needs about 0.0 GiB at once, there are 0.0"
    assert "--window patch" in fix


def test_the_same_command_gives_the_same_weights(data: Path) -> None:
    assert train(data, "--max_epochs", "2", "--steps_per_epoch", "3") == 0
    elsewhere = data.parent / "elsewhere"
    assert train(data, "--runs_dir", str(elsewhere), "--max_epochs", "2", "--steps_per_epoch", "3") == 0
    second = elsewhere / BUNDLE.name / "r" / "checkpoints" / "best.safetensors"
    assert weights_of(data).read_bytes() == second.read_bytes()
