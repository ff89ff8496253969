"""The command line: what a user types, what comes back, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.cli import main
from pipelines.overrides import overrides_of
from pipelines.runner import absolute, bundle_parser, bundle_root
from transforms.errors import BundleError, UsageError


def write_nifti(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 3.0, 1.0])), path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    for case in ("p1", "p2", "p3"):
        write_nifti(
            tmp_path / "in" / "imagesTr" / f"{case}_0000.nii.gz", rng.normal(9, 1, (6, 7, 5)).astype(np.float32)
        )
        write_nifti(tmp_path / "in" / "labelsTr" / f"{case}.nii.gz", (rng.random((6, 7, 5)) > 0.8).astype(np.uint8))
    return tmp_path / "in"


def test_overrides_are_read_as_monai_reads_them() -> None:
    words = [
        "--max_epochs",
        "5",
        "--spacing",
        "[1.0,2.0,3.0]",
        "--run_name=a=b",
        "--modalities",
        "['flair']",
        "--fold",
        "None",
    ]
    assert overrides_of(words) == {
        "max_epochs": 5,
        "spacing": [1.0, 2.0, 3.0],
        "run_name": "a=b",
        "modalities": ["flair"],
        "fold": None,
    }


@pytest.mark.parametrize("words", [["5"], ["--max_epochs"], ["--max_epochs", "5", "x"]])
def test_incomplete_overrides_are_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        overrides_of(words)


@pytest.mark.parametrize("words", [[], ["trian"], ["manifest", "import", "folder"], ["phantom", "x", "--subject", "3"]])
def test_wrong_usage_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line[:7] for line in lines] == ["error: ", "  why: ", "  fix: "]


def test_a_bundle_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path)]) == 4
    assert "brain_lesion_mri_segmentation" in capsys.readouterr().err  # what there is instead
    with pytest.raises(BundleError):
        bundle_root("nothing")
    assert (bundle_root("brain_lesion_mri_segmentation") / "configs").is_dir()


def test_a_traceback_only_with_debug(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["manifest", "check", str(tmp_path / "none.json")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main(["--debug", "manifest", "check", str(tmp_path / "none.json")]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_import_nnunet_and_check(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    description = {"channel_names": {"0": "FLAIR"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    (images / "dataset.json").write_text(json.dumps({**description, "numTraining": 3}))
    out = tmp_path / "manifest.json"
    assert (
        main(["manifest", "import", "nnunet", str(images), "-o", str(out), "--test", "p2", "--validation", "p3"]) == 0
    )
    assert main(["manifest", "check", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "train 1 (1 subjects), validation 1 (1 subjects), test 1 (1 subjects)" in printed
    assert "2x2x3 (3)" in printed
    stored = {case["subject"]: case["split"] for case in json.loads(out.read_text())["cases"]}
    assert stored == {"p1": "train", "p2": "test", "p3": "validation"}
    path = images / "imagesTr" / "p1_0000.nii.gz"
    content = bytearray(path.read_bytes())
    content[-9] ^= 1  # one bit of the stored check sum
    path.write_bytes(bytes(content))
    assert main(["manifest", "check", str(out)]) == 3
    assert "p1_0000.nii.gz" in capsys.readouterr().err


def test_import_msd(images: Path, tmp_path: Path) -> None:
    pairs = [{"image": f"./imagesTr/{c}_0000.nii.gz", "label": f"./labelsTr/{c}.nii.gz"} for c in ("p1", "p2", "p3")]
    about = {
        "name": "Task",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "x"},
    }
    (images / "dataset.json").write_text(json.dumps({**about, "training": pairs, "test": []}))
    out = tmp_path / "manifest.json"
    given = ["--fractions", "0.34", "0.33", "0.33", "--seed", "1"]
    assert main(["manifest", "import", "msd", str(images / "dataset.json"), "-o", str(out), *given]) == 0
    manifest = json.loads(out.read_text())
    assert sorted(case["split"] for case in manifest["cases"]) == ["test", "train", "validation"]
    assert manifest["splits"]["seed"] == 1


def test_patterns_need_a_name(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--image", "{case}.nii.gz", "--name", "x", "-o", str(tmp_path / "m.json")]
    assert main(["manifest", "import", "folder", str(images), *given]) == 2
    assert "NAME=VALUE" in capsys.readouterr().err
    assert not (tmp_path / "m.json").exists()


def test_phantoms_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "heads"
    given = ["--subjects", "3", "--spacing", "6", "6", "6", "--modalities", "flair"]
    assert main(["phantom", str(folder), *given]) == 0
    assert "3 subjects" in capsys.readouterr().out
    assert len(list(folder.glob("*/flair.nii.gz"))) == 3
    assert main(["phantom", str(folder), *given]) == 0  # there already
    # what is there must not pass for what was asked for
    assert main(["phantom", str(folder), *given, "--seed", "1"]) == 2
    assert main(["phantom", str(folder), *given, "--lesion_t2", "90", "150"]) == 2
    assert "generated with other arguments" in capsys.readouterr().err


def test_relative_paths_count_from_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("cohort.json") == str(tmp_path / "cohort.json")


def test_paths_of_a_bundle_count_from_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "lesion_head": "head.safetensors",
        "compare_with": ["a/metrics", "/b"],
        "runs_dir": "runs",
        "method": "mine",
    }
    with bundle_parser("head_mri_ct_fusion", "evaluate", given) as parser:
        found = {key: parser.get(key) for key in given}
    here = str(tmp_path)
    assert found == {
        "lesion_head": f"{here}/head.safetensors",
        "compare_with": [f"{here}/a/metrics", "/b"],
        "runs_dir": f"{here}/runs",
        "method": "mine",
    }


@pytest.mark.parametrize(
    ("words", "code"),
    [(["--help"], 0), (["train"], 2), (["train", "b", "--half"], 2), (["verify", "no_such_archive.zip"], 3)],
    ids=["help", "no bundle", "no pair", "no archive"],
)
def test_what_needs_no_network_is_answered_without_loading_torch(words: list[str], code: int) -> None:
    """MONAI and torch take seconds to load; a mistake in the arguments is not worth the wait."""
    probe = "import sys; from pipelines.cli import main\ntry: sys.exit(main(sys.argv[1:]))\n"
    probe += "finally: print('LOADED', *sorted({'torch', 'monai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", probe, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (code, "LOADED"), done.stderr
