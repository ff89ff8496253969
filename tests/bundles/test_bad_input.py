"""Bad input, as a user meets it: three lines that name file, case and key, the exit code, and nothing half-written."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from bundle_runs import BUNDLE, import_data, monai_bundle, save, train

from pipelines.cli import main
from pipelines.manifests.digest import file_digest


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def record_again(folder: Path) -> None:
    """Record the files as they are now, as if they had been damaged before the import."""

    def change(manifest: dict[str, Any]) -> None:
        for case in manifest["cases"]:
            for entry in [*case["images"].values(), case["label"]]:
                path = folder / entry["path"]
                entry.update(sha256=file_digest(path), size=path.stat().st_size)

    edit(folder, change)


def assert_three_lines(text: str, *words: str) -> None:
    lines = [line for line in text.splitlines() if line.strip()]
    start = next(index for index, line in enumerate(lines) if line.startswith("error: "))
    assert lines[start + 1].startswith("  why: ")
    assert lines[start + 2].startswith("  fix: ")
    message = "\n".join(lines[start : start + 3])
    for word in words:
        assert word in message, message
    assert "Traceback" not in text


def assert_nothing_written(folder: Path) -> None:
    assert not (folder.parent / "runs").exists()


def test_sound_data_trains(data: Path) -> None:
    assert train(data) == 0
    assert (data.parent / "runs" / BUNDLE.name / "r" / "checkpoints" / "last.safetensors").is_file()


def test_missing_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "b" / "t1.nii.gz").unlink()
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "b/t1.nii.gz", "case b", "t1")
    assert_nothing_written(data)


def test_file_changed_since_the_import(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "a" / "t1.nii.gz"
    content = bytearray(path.read_bytes())
    content[-20] ^= 1  # same size, another content
    path.write_bytes(bytes(content))
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "a/t1.nii.gz", "case a", "sha256")
    assert_nothing_written(data)


def test_truncated_gzip(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "a" / "flair.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    record_again(data)
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "a/flair.nii.gz", "case a", "flair")
    assert_nothing_written(data)
    assert import_data(data) == 3  # the importer refuses it as well
    assert_three_lines(capsys.readouterr().err, "a/flair.nii.gz")


@pytest.mark.parametrize(
    ("shape", "affine"),
    [((20, 22, 17), np.diag([3.0, 3.0, 3.0, 1.0])), ((20, 22, 18), np.diag([3.0, 3.0, 3.01, 1.0]))],
    ids=["shape", "affine"],
)
def test_label_on_another_grid(
    data: Path, shape: tuple[int, ...], affine: np.ndarray, capsys: pytest.CaptureFixture[str]
) -> None:
    save(data / "a" / "lesion.nii.gz", np.ones(shape, np.uint8), affine)
    record_again(data)
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "a/lesion.nii.gz", "case a", "label")
    assert_nothing_written(data)


def test_header_spacing_zero(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "a" / "t1.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = np.float32(0.0).tobytes()  # pixdim[1] of the NIfTI-1 header
    path.write_bytes(gzip.compress(bytes(content)))
    record_again(data)
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "a/t1.nii.gz", "case a", "t1")
    assert_nothing_written(data)


def test_nan_voxels(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voxels = np.asarray(nib.load(data / "a" / "t1.nii.gz").dataobj).copy()
    voxels[5, 5, 5] = np.nan
    save(data / "a" / "t1.nii.gz", voxels)
    record_again(data)
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "a/t1.nii.gz", "case a", "t1")
    assert_nothing_written(data)


def test_label_value_outside_the_table(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voxels = np.asarray(nib.load(data / "a" / "lesion.nii.gz").dataobj).copy()
    voxels[5, 5, 5] = 7
    save(data / "a" / "lesion.nii.gz", voxels)
    record_again(data)
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "a/lesion.nii.gz", "case a", "label", "7")
    assert_nothing_written(data)


def test_subject_in_two_splits(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(data, lambda manifest: manifest["cases"][1].update(subject="a"))
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "manifest.json", "case b", "subject")
    assert_nothing_written(data)


def test_empty_training_split(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(data, lambda manifest: manifest["cases"][0].update(split="validation"))
    assert train(data) == 3
    assert_three_lines(capsys.readouterr().err, "manifest.json", "train")
    assert_nothing_written(data)


@pytest.mark.parametrize(("typo", "meant"), [("max_epoch", "max_epochs"), ("learnig_rate", "learning_rate")])
def test_unknown_override(data: Path, typo: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, f"--{typo}", "3") == 2
    assert_three_lines(capsys.readouterr().err, typo, f"--{meant}")
    assert_nothing_written(data)


def test_unknown_modality(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--modalities", "['flare']") == 2
    assert_three_lines(capsys.readouterr().err, "flare", "flair")
    assert_nothing_written(data)


def test_patch_that_does_not_fit_the_network(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--patch_size", "[18,16,16]") == 4
    assert_three_lines(capsys.readouterr().err, "18")
    assert_nothing_written(data)


def test_exit_codes_under_monais_own_command(data: Path) -> None:
    where = ["--runs_dir", str(data.parent / "runs"), "--cache_dir", str(data.parent / "cache")]
    typo = monai_bundle("configs/train.yaml", "--manifest", str(data / "manifest.json"), *where, "--epochs", "3")
    assert typo.returncode == 2
    assert_three_lines(typo.stderr, "epochs", "max_epochs")
    shutil.rmtree(data / "a")
    absent = monai_bundle("configs/train.yaml", "--manifest", str(data / "manifest.json"), *where)
    assert absent.returncode == 3
    assert_three_lines(absent.stderr, "a/flair.nii.gz", "case a")
    untrained = monai_bundle("configs/evaluate.yaml", "--manifest", str(data / "manifest.json"), *where[:2])
    assert untrained.returncode == 3  # the data are looked at first
    assert_nothing_written(data)


def test_no_trained_weights(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--manifest", str(data / "manifest.json"), "--runs_dir", str(data.parent / "runs")]
    assert main(["evaluate", str(BUNDLE), *given]) == 4
    assert_three_lines(capsys.readouterr().err, "no trained weights")


def test_damaged_weights(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data) == 0
    weights = data.parent / "runs" / BUNDLE.name / "r" / "checkpoints" / "last.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    given = ["--manifest", str(data / "manifest.json"), "--checkpoint", str(weights), "--output_dir", str(data / "out")]
    assert main(["evaluate", str(BUNDLE), *given]) == 4
    assert_three_lines(capsys.readouterr().err, "last.safetensors")
    assert not (data / "out").exists()
