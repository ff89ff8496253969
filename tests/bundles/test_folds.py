"""Cross-validation, its ensemble and the ensemble's uncertainty, as a user runs them, on a tiny cohort."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from bundle_runs import BUNDLE, MODALITIES, import_data, train, write_tiny_data
from safetensors.torch import load_file

from pipelines.cli import main
from pipelines.manifests.digest import file_digest

FOLDS = ["--folds", "2", "--max_epochs", "2"]


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data with two folds (a and b; c is the test), and cross-validation ``cv`` trained on it."""
    data = tmp_path_factory.mktemp("folds") / "data"
    write_tiny_data(data)
    assert import_data(data, "--folds", "2") == 0
    assert train(data, "--run_name", "cv", *FOLDS) == 0
    return data


def runs_of(data: Path) -> Path:
    return data.parent / "runs" / BUNDLE.name


def best_of(data: Path, run: str) -> Path:
    return runs_of(data) / run / "checkpoints" / "best.safetensors"


def command(name: str, data: Path, *more: str) -> int:
    return main([name, str(BUNDLE), "--runs_dir", str(data.parent / "runs"), *more])


def fold_of(data: Path) -> dict[str, int]:
    cases = json.loads((data / "manifest.json").read_text())["cases"]
    return {case["id"]: case["fold"] for case in cases if "fold" in case}


def test_a_fold_equals_the_same_run_alone(folded: Path) -> None:
    # fold 1 was trained second, in the same process as fold 0
    assert train(folded, "--run_name", "alone", "--fold", "1", "--max_epochs", "2") == 0
    alone, second, first = (load_file(best_of(folded, run)) for run in ("alone", "cv_fold1", "cv_fold0"))
    assert all(torch.equal(alone[name], second[name]) for name in alone | second)
    assert not all(torch.equal(first[name], second[name]) for name in second)


def test_each_case_is_measured_once_by_the_network_that_did_not_see_it(folded: Path) -> None:
    folder = runs_of(folded) / "cv_folds"
    table = pd.read_csv(folder / "metrics" / "per_case.csv")
    assert dict(zip(table["case"], table["fold"], strict=True)) == fold_of(folded)
    assert set(table["case"]) == {"a", "b"}
    for fold in (0, 1):
        source = json.loads((folder / f"fold{fold}" / "metrics" / "summary.json").read_text())["source"]
        assert (source["split"], source["fold"]) == ("validation", fold)
        assert source["weights_sha256"] == file_digest(best_of(folded, f"cv_fold{fold}"))
    summary = json.loads((folder / "metrics" / "summary.json").read_text())
    assert summary["source"]["weights_sha256"] == [file_digest(best_of(folded, f"cv_fold{k}")) for k in (0, 1)]
    assert summary["labels"]["lesion"]["dice"]["mean"] == pytest.approx(table["dice"].mean())


def test_the_command_repeated_trains_nothing(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in runs_of(folded).glob("cv_fold[01]/**/*") if path.is_file()}
    assert train(folded, "--run_name", "cv", *FOLDS) == 0
    assert capsys.readouterr().out.count("is finished, nothing to do") == 2
    assert {p: p.stat().st_mtime_ns for p in runs_of(folded).glob("cv_fold[01]/**/*") if p.is_file()} == before
    assert train(folded, "--run_name", "cv", "--folds", "2", "--max_epochs", "3") == 2
    assert "was trained with another max_epochs" in capsys.readouterr().err


def test_a_fold_that_was_interrupted_goes_on(folded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folded, "--run_name", "cut", *FOLDS) == 0
    run = runs_of(folded) / "cut_fold1"
    shutil.copyfile(best_of(folded, "cut_fold1"), tmp_path / "best.safetensors")
    record = json.loads((run / "record.json").read_text())
    del record["outcome"]  # as if the process had been killed before it could write it
    (run / "record.json").write_text(json.dumps(record))
    capsys.readouterr()
    assert train(folded, "--run_name", "cut", *FOLDS) == 0
    printed = capsys.readouterr().out
    assert "run cut_fold0 is finished" in printed
    assert "training run cut_fold1" in printed
    record = json.loads((run / "record.json").read_text())
    assert record["outcome"]["epochs"] == 2
    assert len(record["resumed"]) == 1
    before, after = (load_file(path) for path in (tmp_path / "best.safetensors", best_of(folded, "cut_fold1")))
    assert all(torch.equal(before[name], after[name]) for name in before | after)


def test_an_ensemble_is_measured_on_the_test_split_only(folded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--manifest", str(folded / "manifest.json"), "--ensemble", "cv"]
    assert command("evaluate", folded, *given, "--split", "validation") == 2
    assert "split validation with an ensemble" in capsys.readouterr().err
    assert not (runs_of(folded) / "cv_ensemble").exists()
    assert command("evaluate", folded, *given) == 0
    folder = runs_of(folded) / "cv_ensemble"
    assert list(pd.read_csv(folder / "metrics" / "per_case.csv")["case"]) == ["c"]
    about = json.loads((folder / "predictions" / "c.json").read_text())
    assert [weights["sha256"] for weights in about["weights"]] == [
        file_digest(best_of(folded, f"cv_fold{k}")) for k in (0, 1)
    ]
    assert "uncertainty" not in about


def test_an_evaluation_shows_how_well_its_probabilities_are_calibrated(folded: Path, tmp_path: Path) -> None:
    given = ["--manifest", str(folded / "manifest.json"), "--run_name", "cv_fold0"]
    assert command("evaluate", folded, *given, "--output_dir", str(tmp_path / "with")) == 0
    panel = json.loads((tmp_path / "with" / "metrics" / "calibration.json").read_text())
    (row,) = panel["tables"][0]["rows"]
    figures = dict(zip(panel["tables"][0]["columns"], row, strict=True))
    # of the one test case, the voxels of the block that is the head, 14 x 16 x 12; in it 3 x 4 x 3 of the lesion
    assert (figures["label"], figures["n_voxels"]) == ("lesion", 14 * 16 * 12)
    assert figures["prevalence"] == pytest.approx(36 / 2688)
    assert 0 < figures["brier"] < 1
    assert "reliability" in (tmp_path / "with" / "report" / "index.html").read_text()
    assert command("evaluate", folded, *given, "--output_dir", str(tmp_path / "without"), "--calibration", "False") == 0
    assert not (tmp_path / "without" / "metrics" / "calibration.json").exists()
    for name in ("metrics/per_case.csv", "predictions/c.nii.gz"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


@pytest.fixture
def scan(folded: Path, tmp_path: Path) -> Path:
    """Case c as another scanner stores it: axes turned to left-posterior-superior."""
    for name in MODALITIES:
        image = nib.load(folded / "c" / f"{name}.nii.gz")
        turned = image.as_reoriented(nib.io_orientation(np.diag([-1, -1, 1, 1])))
        (tmp_path / "scan").mkdir(exist_ok=True)
        nib.save(turned, tmp_path / "scan" / f"{name}.nii.gz")
    return tmp_path / "scan"


def maps_in(folder: Path) -> dict[str, np.ndarray]:
    return {name: nib.load(folder / f"scan_{name}.nii.gz").get_fdata() for name in ("entropy", "mutual_information")}


def test_uncertainty_of_an_ensemble_on_the_grid_of_the_image(folded: Path, scan: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    given = ["-i", str(scan), "-o", str(out), "--ensemble", "cv", "--uncertainty", "True"]
    assert command("predict", folded, *given) == 0
    source, mask = nib.load(scan / "flair.nii.gz"), nib.load(out / "scan.nii.gz")
    for name in ("entropy", "mutual_information"):
        image = nib.load(out / f"scan_{name}.nii.gz")
        assert image.get_data_dtype() == np.float32
        assert image.shape == source.shape == mask.shape
        np.testing.assert_array_equal(image.affine, source.affine)
    entropy, information = maps_in(out).values()
    assert (information >= 0).all()
    assert (information <= entropy).all()
    assert 0 < entropy.max() <= np.log(2) + 1e-6
    assert information.max() > 0  # two networks with other training cases do not agree everywhere
    assert (entropy[3:17, 3:19, 3:15] > 0).all()  # the block that is the head: nothing is certain after two steps
    about = json.loads((out / "scan.json").read_text())
    assert (about["uncertainty"]["members"], len(about["weights"])) == (2, 2)
    inside = np.asarray(mask.dataobj) == 1
    expected = entropy[inside].mean() if inside.any() else None
    assert about["uncertainty"]["labels"][0]["mean_entropy"] == pytest.approx(expected)


def test_uncertainty_changes_no_mask_and_one_network_has_no_disagreement(
    folded: Path, scan: Path, tmp_path: Path
) -> None:
    weights = ["--checkpoint", str(best_of(folded, "cv_fold0"))]
    assert command("predict", folded, "-i", str(scan), "-o", str(tmp_path / "plain"), *weights) == 0
    given = ["-i", str(scan), "-o", str(tmp_path / "maps"), *weights, "--uncertainty", "True"]
    assert command("predict", folded, *given) == 0
    assert (tmp_path / "plain" / "scan.nii.gz").read_bytes() == (tmp_path / "maps" / "scan.nii.gz").read_bytes()
    entropy, information = maps_in(tmp_path / "maps").values()
    assert entropy.max() > 0
    assert (information == 0).all()
    about = json.loads((tmp_path / "maps" / "scan.json").read_text())
    assert about["uncertainty"]["members"] == 1
    assert "mutual information is 0" in about["uncertainty"]["note"]
    assert about["weights"] == {"file": weights[1], "sha256": file_digest(Path(weights[1]))}


def test_members_by_path_are_the_same_ensemble(
    folded: Path, scan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("predict", folded, "-i", str(scan), "-o", str(tmp_path / "named"), "--ensemble", "cv") == 0
    monkeypatch.chdir(runs_of(folded))  # relative paths count from here, in a list too
    files = str([f"cv_fold{k}/checkpoints/best.safetensors" for k in (0, 1)])
    assert command("predict", folded, "-i", str(scan), "-o", str(tmp_path / "listed"), "--checkpoint", files) == 0
    named, listed = (tmp_path / name / "scan.nii.gz" for name in ("named", "listed"))
    assert named.read_bytes() == listed.read_bytes()


def test_members_with_another_preprocessing_are_refused(
    folded: Path, scan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folded, "--run_name", "fine", "--spacing", "[2.0,3.0,3.0]") == 0
    files = str([str(best_of(folded, run)) for run in ("cv_fold0", "fine")])
    assert command("predict", folded, "-i", str(scan), "-o", str(tmp_path / "out"), "--checkpoint", files) == 4
    assert "fine/checkpoints/best.safetensors: other spacing than" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
