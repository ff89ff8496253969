"""The lesion bundle as a user runs it: MONAI's own command, from the bundle's root, from raw data to masks."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import yaml
from bundle_runs import BUNDLE, monai_bundle
from monai.bundle import ConfigWorkflow

from pipelines.cli import main
from pipelines.manifests import load_manifest
from pipelines.runner import working_directory
from pipelines.tensorfile import read_tensors, write_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluated(trained: Path, cohort: Path) -> Path:
    where = ["--runs_dir", str(trained.parent.parent), "--run_name", "small"]
    done = monai_bundle("configs/evaluate.yaml", "--manifest", str(cohort), *where)
    assert done.returncode == 0, done.stderr
    return trained


def test_it_learns(trained: Path) -> None:
    outcome = json.loads((trained / "record.json").read_text())["outcome"]
    assert outcome["best_metric"] > 0.5  # validation Dice; predicting nothing gives 0, everything about 0.01
    assert outcome["steps"] == 24 * 30
    losses = [entry["loss"] for entry in outcome["history"]]
    assert losses[-1] < 0.5 * losses[0]


def test_the_run_explains_itself(trained: Path, cohort: Path) -> None:
    record = json.loads((trained / "record.json").read_text())
    config = yaml.safe_load((trained / "config.yaml").read_text())
    manifest = load_manifest(cohort)
    assert record["manifest_digest"] == manifest.digest
    assert record["contract"]["modalities"] == ["flair", "t1"]
    assert record["contract"]["foreground"] == "mask"
    assert record["versions"]["monai"] == "1.6.1"
    assert config["max_epochs"] == 24  # the override, resolved
    assert not [value for value in config.values() if str(value).startswith("%")]
    assert (trained / "checkpoints" / "best.safetensors").is_file()
    assert (trained / "checkpoints" / "last.safetensors").is_file()


def test_evaluation_on_the_test_split(evaluated: Path, cohort: Path) -> None:
    manifest = load_manifest(cohort)
    cases = {case.id: case for case in manifest.cases if case.split == "test"}
    table = pd.read_csv(evaluated / "metrics" / "per_case.csv")
    summary = json.loads((evaluated / "metrics" / "summary.json").read_text())
    assert set(table["case"]) == set(cases)
    weights = hashlib.sha256((evaluated / "checkpoints" / "best.safetensors").read_bytes()).hexdigest()
    digests = {"manifest_digest": manifest.digest, "weights_sha256": weights}
    assert summary["source"] == {"cohort": manifest.name, "split": "test", "fold": None, **digests}
    assert summary["labels"]["lesion"]["dice"]["mean"] == pytest.approx(table["dice"].mean())
    assert summary["labels"]["lesion"]["dice"]["mean"] > 0.5
    for case_id, case in cases.items():
        assert case.label is not None
        mask = nib.load(evaluated / "predictions" / f"{case_id}.nii.gz")
        truth = nib.load(manifest.root / case.label.path)
        assert mask.shape == truth.shape
        assert mask.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(mask.affine, truth.affine)
        # Dice from the written file by its definition, beside the table's
        a, b = np.asarray(mask.dataobj) == 1, np.asarray(truth.dataobj) == 1
        row = table.set_index("case").loc[case_id]
        assert row["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
        assert row["volume_prediction_ml"] == pytest.approx(a.sum() * 0.027)  # voxels of 3 x 3 x 3 mm


def test_prediction_of_a_folder(trained: Path, cohort: Path, tmp_path: Path) -> None:
    manifest = load_manifest(cohort)
    case = next(case for case in manifest.cases if case.split == "test")
    scans = tmp_path / "scans" / "patient_7"
    scans.mkdir(parents=True)
    for name, entry in {**case.images, "brain": case.masks["brain"]}.items():
        # as a scanner might store it: axes turned to left-posterior-superior
        image = nib.load(manifest.root / entry.path)
        turned = image.as_reoriented(nib.io_orientation(np.diag([-1, -1, 1, 1])))
        nib.save(turned, scans / f"{name.upper()}.nii.gz")
    out = tmp_path / "masks"
    weights = trained / "checkpoints" / "best.safetensors"
    where = ["--input", str(tmp_path / "scans"), "--output_dir", str(out), "--checkpoint", str(weights)]
    done = monai_bundle("configs/inference.yaml", *where)
    assert done.returncode == 0, done.stderr
    mask = nib.load(out / "patient_7.nii.gz")
    source = nib.load(scans / "FLAIR.nii.gz")
    assert nib.aff2axcodes(mask.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(mask.affine, source.affine)
    volumes = json.loads((out / "patient_7.json").read_text())["labels"]
    voxels = int(np.asarray(mask.dataobj).sum())
    assert volumes[0]["voxels"] == voxels
    assert volumes[0]["volume_ml"] == pytest.approx(voxels * 0.027)
    assert case.label is not None
    truth = nib.as_closest_canonical(nib.load(manifest.root / case.label.path))
    a = np.asarray(nib.as_closest_canonical(mask).dataobj) == 1
    b = np.asarray(truth.dataobj) == 1
    assert 2 * (a & b).sum() / (a.sum() + b.sum()) > 0.5  # the mask lies where the lesion is, not mirrored


def test_the_same_by_our_command(
    evaluated: Path, cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # relative paths count from here
    weights = str(evaluated / "checkpoints" / "best.safetensors")
    given = ["--manifest", str(cohort), "--checkpoint", weights, "--output_dir", "again"]
    assert main(["evaluate", str(BUNDLE), *given]) == 0
    for name in ("per_case.csv", "summary.json"):
        assert (tmp_path / "again" / "metrics" / name).read_bytes() == (evaluated / "metrics" / name).read_bytes()


def test_monai_finds_every_property(trained: Path, cohort: Path) -> None:
    given = {"manifest": str(cohort), "checkpoint": str(trained / "checkpoints" / "best.safetensors")}
    with working_directory(BUNDLE):
        workflow = ConfigWorkflow("configs/inference.yaml", workflow_type="infer", **given)
        workflow.initialize()
        assert workflow.check_properties() == []


def test_results_of_another_split_are_not_overwritten(
    evaluated: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (evaluated / "metrics" / "summary.json").read_bytes()
    runs = str(evaluated.parent.parent)
    given = ["--manifest", str(cohort), "--runs_dir", runs, "--run_name", "small", "--split", "validation"]
    assert main(["evaluate", str(BUNDLE), *given]) == 2
    assert "holds results of another cohort, split or network" in capsys.readouterr().err
    assert (evaluated / "metrics" / "summary.json").read_bytes() == before


def test_a_run_never_enters_the_folder_of_another(
    trained: Path, cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.stat().st_mtime_ns for path in trained.rglob("*"))
    given = ["--manifest", str(cohort), "--runs_dir", str(trained.parent.parent), "--run_name", "small"]
    assert main(["train", str(BUNDLE), *given]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.stat().st_mtime_ns for path in trained.rglob("*")) == before


def test_weights_from_before_normalisation_was_a_choice(evaluated: Path, cohort: Path, tmp_path: Path) -> None:
    tensors, header = read_tensors(evaluated / "checkpoints" / "best.safetensors")
    assert header["contract"].pop("norm") == "instance"
    write_tensors(tmp_path / "old.safetensors", tensors, header)
    given = [
        "--manifest",
        str(cohort),
        "--checkpoint",
        str(tmp_path / "old.safetensors"),
        "--output_dir",
        str(tmp_path),
    ]
    assert main(["evaluate", str(BUNDLE), *given]) == 0
    assert (tmp_path / "metrics" / "per_case.csv").read_bytes() == (evaluated / "metrics" / "per_case.csv").read_bytes()


def test_weights_of_another_architecture(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, header = read_tensors(trained / "checkpoints" / "best.safetensors")
    header["contract"]["filters"] = [8, 16, 32]
    planted = tmp_path / "planted.safetensors"
    write_tensors(planted, tensors, header)
    given = ["--manifest", str(cohort), "--checkpoint", str(planted), "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", str(BUNDLE), *given]) == 4
    message = capsys.readouterr().err
    assert "another architecture" in message
    assert "tensors match" in message
    assert not (tmp_path / "out").exists()


def test_a_missing_modality_is_refused(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(cohort)
    case = manifest.cases[0]
    (tmp_path / "scan").mkdir()
    (tmp_path / "scan" / "flair.nii.gz").write_bytes((manifest.root / case.images["flair"].path).read_bytes())
    weights = str(trained / "checkpoints" / "best.safetensors")
    out = tmp_path / "masks"
    assert main(["predict", str(BUNDLE), "-i", str(tmp_path / "scan"), "-o", str(out), "--checkpoint", weights]) == 3
    assert "modality t1 is missing" in capsys.readouterr().err
    assert not out.exists()


def test_a_missing_brain_mask_is_refused(
    trained: Path, cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = load_manifest(cohort)
    (tmp_path / "scan").mkdir()
    for name, entry in manifest.cases[0].images.items():
        (tmp_path / "scan" / f"{name}.nii.gz").write_bytes((manifest.root / entry.path).read_bytes())
    weights = str(trained / "checkpoints" / "best.safetensors")
    given = ["-i", str(tmp_path / "scan"), "-o", str(tmp_path / "masks"), "--checkpoint", weights]
    assert main(["predict", str(BUNDLE), *given]) == 3
    assert "key mask is missing" in capsys.readouterr().err
