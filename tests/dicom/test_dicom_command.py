"""DICOM as a user meets it, through the command: defects by name and exit code, fusion, kill -9, listen and watch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from bundle_runs import BUNDLE
from generated_series import MR, NAMES, encoded, set_in, spoil, without, write_image
from lesion_study import OPTIONS, study_of
from pydicom.dataset import Dataset
from pydicom.uid import JPEG2000Lossless
from pynetdicom import AE
from pynetdicom.sop_class import MRImageStorage  # type: ignore[attr-defined]

from pipelines.cli import main
from pipelines.dicom.geometry import DEFECTS
from pipelines.dicom.parametric import values_of_map
from pipelines.dicom.privacy import names_found
from pipelines.dicom.series import find_series
from pipelines.dicom.volume import read_volume
from pipelines.embedded import pair_cohort
from pipelines.runner import BUNDLES

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def options_of(trained: Path) -> list[str]:
    return ["--runs_dir", str(trained / "runs"), *(word for k, v in OPTIONS.items() for word in (f"--{k}", v))]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pipelines.cli", *arguments]


def at_heights(z: Callable[[int], float]) -> Callable[[int, Dataset], None]:
    def change(k: int, image: Dataset) -> None:
        x, y, _ = image.ImagePositionPatient
        image.ImagePositionPatient = [x, y, z(k)]

    return change


def shifted(k: int, image: Dataset) -> None:
    x, y, z = image.ImagePositionPatient
    image.ImagePositionPatient = [x, y + k, z]


def padded(k: int, image: Dataset) -> None:
    if k == 3:
        image.add_new(0x00280120, "SS", -5)


def cut_pixels(k: int, image: Dataset) -> None:
    image.PixelData = image.PixelData[:-4]


# one of each, planted in the FLAIR of a sound study of 18 slices of 3 mm
PLANTED: dict[str, Callable[[int, Dataset], None]] = {
    "missing slice": at_heights(lambda k: 3.0 * (k + (k >= 5))),
    "uneven gaps": at_heights(lambda k: 3.0 * k + (k if k > 9 else 0)),
    "duplicate slice": at_heights(lambda k: 3.0 * (4 if k == 5 else k)),
    "several volumes": at_heights(lambda k: 3.0 * (k // 2)),
    "tilted gantry": shifted,
    "mixed orientation": set_in(3, ImageOrientationPatient=[0, -1, 0, 1, 0, 0]),
    "mixed spacing": set_in(3, PixelSpacing=[3.0, 3.3]),
    "mixed frame of reference": set_in(3, FrameOfReferenceUID="1.2.99"),
    "mixed series": set_in(3, StudyInstanceUID="1.2.98"),
    "different patients": set_in(3, PatientName="Other^Somebody"),
    "geometry missing": without("ImagePositionPatient"),
    "impossible geometry": set_in(None, PixelSpacing=[0.0, 3.0]),
    "multi-frame": set_in(None, NumberOfFrames=3),
    "wrong modality": set_in(None, Modality="CT"),
    "not a plain image": set_in(None, PhotometricInterpretation="MONOCHROME1"),
    "rescale": set_in(3, RescaleSlope=0, RescaleIntercept=0),
    "padding value": padded,
    "pixel format": set_in(3, BitsStored=12, HighBit=15),
    "truncated pixels": cut_pixels,
    "compressed pixels": encoded(JPEG2000Lossless),
}


def keep_one(folder: Path) -> None:
    for path in sorted(folder.iterdir())[1:]:
        path.unlink()


def cut_header(folder: Path) -> None:
    path = sorted(folder.iterdir())[3]
    path.write_bytes(path.read_bytes()[:700])


OF_FILES: dict[str, Callable[[Path], None]] = {"single slice": keep_one, "broken file": cut_header}


@pytest.mark.parametrize("defect", DEFECTS)
def test_the_command_refuses_a_defect_by_its_name_with_exit_code_3(
    defect: str, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study = study_of(trained / "data", tmp_path / "study")
    if defect in PLANTED:
        spoil(study / "Grimsby flair", PLANTED[defect])
    else:
        OF_FILES[defect](study / "Grimsby flair")
    given = ["-i", str(study), "-o", str(tmp_path / "out"), *options_of(trained)]
    assert main(["predict", str(BUNDLE), *given]) == 3
    said = capfd.readouterr()
    what, why, fix = said.err.strip().splitlines()
    assert what.startswith("error: ")
    assert what.endswith(f": {defect}")
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")
    assert names_found(said.out + said.err, [*NAMES, "Somebody"]) == []
    assert not (tmp_path / "out").exists()


def test_dicom_and_nifti_in_one_folder_are_not_told_apart_in_silence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_of(trained / "data", tmp_path / "study")
    (study / "flair.nii.gz").write_bytes((trained / "data" / "a" / "flair.nii.gz").read_bytes())
    assert main(["predict", str(BUNDLE), "-i", str(study), "-o", str(tmp_path / "out"), *options_of(trained)]) == 2
    assert "1 NIfTI files" in capsys.readouterr().err


def results_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_watcher_that_is_killed_loses_nothing_and_leaves_nothing_half_written(trained: Path, tmp_path: Path) -> None:
    incoming, results = tmp_path / "in", tmp_path / "out"
    expected = {}
    for subject in ("a", "c"):
        study = study_of(trained / "data", incoming / f"Grimsby {subject}", subject)
        given = ["-i", str(study), "-o", str(tmp_path / subject), *options_of(trained)]
        assert main(["predict", str(BUNDLE), *given]) == 0
        expected[subject] = results_of(tmp_path / subject)
    assert len(expected["a"]) == 3
    spoiled = study_of(trained / "data", incoming / "Grimsby spoiled", "b")
    spoil(spoiled / "Grimsby t1", shifted)
    watch = ["watch", str(incoming), str(results), "--bundle", str(BUNDLE), "--settle", "0", *options_of(trained)]

    def half_made() -> bool:
        """Images of the study lie in the scratch folder, and nothing is finished."""
        return any(results.glob(".*.tmp/fiducial-*/cases/*/*.nii.gz"))

    def whole() -> list[Path]:
        return sorted(path for path in results.iterdir() if path.is_dir() and not path.name.startswith("."))

    for _ in range(2):  # the same study is hit twice, and has a third attempt
        process = subprocess.Popen(command(*watch), env=ENVIRONMENT, text=True, stderr=subprocess.PIPE)
        wait_for(half_made, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for folder in whole():
            assert results_of(folder) in expected.values()
        waiting = list((incoming / ".working").glob("[!.]*")) + list(incoming.glob("Grimsby*"))
        assert len(waiting) + len(list((incoming / "done").iterdir())) >= 2  # no study is gone
    assert main([*watch, "--once"]) == 0
    assert sorted(map(str, map(results_of, whole()))) == sorted(map(str, expected.values()))
    assert len(list((incoming / "done").iterdir())) == 2
    (reason,) = (incoming / "failed").glob("*.txt")
    assert "tilted gantry" in reason.read_text()
    assert list((incoming / ".working").iterdir()) == []
    assert list(results.glob(".*")) == []
    events = [json.loads(line)["event"] for line in (results / "watch.jsonl").read_text().splitlines()]
    assert {event: events.count(event) for event in set(events)} == {"taken": 3, "done": 2, "failed": 1}
    everything = " ".join(str(path.relative_to(tmp_path)) for path in results.rglob("*"))
    everything += (results / "watch.jsonl").read_text() + reason.read_text()
    assert names_found(everything, NAMES) == []


@contextmanager
def listening(incoming: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run ``fiducial listen`` on a free port; end it by SIGTERM, as a service manager does."""
    arguments = ["listen", str(incoming), "--caller", "ARCHIVE", "--port", "0", "--quiet", "1"]
    process = subprocess.Popen(command(*arguments), env=ENVIRONMENT, text=True, stderr=subprocess.PIPE)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("listen: FIDUCIAL on 127.0.0.1:"), line
        yield process, int(line.rpartition(":")[2])
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()


@pytest.mark.slow
def test_a_study_sent_to_the_listener_is_predicted_by_the_watcher(trained: Path, tmp_path: Path) -> None:
    study = study_of(trained / "data", tmp_path / "study")
    assert main(["predict", str(BUNDLE), "-i", str(study), "-o", str(tmp_path / "by file"), *options_of(trained)]) == 0
    incoming, results = tmp_path / "in", tmp_path / "out"
    with listening(incoming) as (process, port):
        sender = AE(ae_title="ARCHIVE")
        sender.add_requested_context(MRImageStorage)
        association = sender.associate("127.0.0.1", port, ae_title="FIDUCIAL")
        assert association.is_established
        for path in sorted(study.rglob("*.dcm")):
            assert association.send_c_store(pydicom.dcmread(path)).Status == 0
        association.release()
        stranger = AE(ae_title="STRANGER")
        stranger.add_requested_context(MRImageStorage)
        assert stranger.associate("127.0.0.1", port, ae_title="FIDUCIAL").is_rejected
        wait_for(lambda: any(incoming.glob("study-*")), process)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert "association rejected, 'STRANGER' called 'FIDUCIAL'" in said
    assert "handed over" in said
    watch = ["watch", str(incoming), str(results), "--bundle", str(BUNDLE), "--settle", "0", "--once"]
    run = subprocess.run(
        command(*watch, *options_of(trained)), env=ENVIRONMENT, text=True, capture_output=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().endswith("1 studies finished")
    (done,) = (incoming / "done").iterdir()
    assert results_of(results / done.name) == results_of(tmp_path / "by file")
    assert names_found(said + run.stdout + run.stderr + (results / "watch.jsonl").read_text(), NAMES) == []


FUSION = BUNDLES / "head_mri_ct_fusion"


@pytest.fixture(scope="module")
def fusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs of five subjects at 4 mm and a one-pass network of ten steps in ``runs``."""
    folder = tmp_path_factory.mktemp("fusion")
    pair_cohort(folder / "pairs", subjects=5, spacing_mm=(4.0, 4.0, 4.0), seed=6, contrasts=("t1",))
    quick = ["--max_epochs", "1", "--steps_per_epoch", "10", "--val_interval", "1", "--warmup_epochs", "0"]
    small = ["--spacing", "[4.0,4.0,4.0]", "--patch_size", "[48,56,1]", "--channels", "[8,16,24]"]
    where = ["--manifest", str(folder / "pairs" / "manifest.json"), "--runs_dir", str(folder / "runs")]
    where += ["--cache_dir", str(folder / "cache"), "--run_name", "r", "--schedule", "none"]
    assert main(["train", str(FUSION), *where, *small, *quick]) == 0
    return folder


def pair_of(folder: Path, out: Path, moved_mm: float = 0.0, **of_the_ct: object) -> Path:
    """Write a pair of the cohort as two studies of one patient; the CT may lie elsewhere, in a frame of its own."""
    pair = next(path.parent for path in sorted((folder / "pairs").rglob("mri.nii.gz")))
    ct = nib.load(pair / "ct.nii.gz")
    affine = ct.affine.copy()
    affine[:3, 3] += moved_mm
    described = {"SeriesDescription": "Grimsby", "StudyInstanceUID": "1.2.6.1"}
    write_image(out / "Grimsby mri", nib.load(pair / "mri.nii.gz"), "MR", "1.2.6.1.1", set_in(None, **described))
    of_the_ct = {**described, "StudyInstanceUID": "1.2.6.2", **of_the_ct}
    write_image(
        out / "Grimsby ct", nib.Nifti1Image(ct.get_fdata(), affine), "CT", "1.2.6.2.1", set_in(None, **of_the_ct)
    )
    return pair


def fused(folder: Path, study: Path, out: Path, *more: str) -> int:
    given = ["-i", str(study), "-o", str(out), "--runs_dir", str(folder / "runs"), "--run_name", "r"]
    return main(["predict", str(FUSION), *given, "--device_name", "cpu", *more])


@pytest.mark.slow
def test_an_mri_and_a_ct_are_fused_into_a_parametric_map(
    fusion: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pair = pair_of(fusion, tmp_path / "study")
    assert fused(fusion, tmp_path / "study", tmp_path / "out") == 0
    said = "".join(capfd.readouterr())
    (case,) = (tmp_path / "out").iterdir()
    assert sorted(path.name for path in case.iterdir()) == ["fused.dcm", "result.json"]
    for modality in ("mri", "ct"):  # the same voxels as NIfTI, by the command that a researcher uses
        image = nib.load(pair / f"{modality}.nii.gz")
        (tmp_path / "nifti" / "c").mkdir(parents=True, exist_ok=True)
        rounded = nib.Nifti1Image(np.rint(image.get_fdata()).astype(np.float32), image.affine)
        nib.save(rounded, tmp_path / "nifti" / "c" / f"{modality}.nii.gz")
    assert fused(fusion, tmp_path / "nifti", tmp_path / "images") == 0
    expected = np.asarray(nib.load(tmp_path / "images" / "c_fused.nii.gz").dataobj)
    series = next(s for s in find_series(tmp_path / "study", tmp_path / "w").series if s.modality == "MR")
    volume, result = read_volume(series), pydicom.dcmread(case / "fused.dcm")
    np.testing.assert_array_equal(values_of_map(result, volume), expected.transpose(2, 1, 0))
    assert expected.std() > 0.1
    assert result.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.6.1.1"
    record = (case / "result.json").read_text()
    assert set(json.loads(record)["series"]) == {"mri", "ct"}
    assert names_found((case / "fused.dcm").read_bytes(), NAMES) == []
    assert names_found(said + record, NAMES) == []

    # the CT in a frame of its own, 25 mm away along every axis: refused, or registered where that is said
    pair_of(fusion, tmp_path / "apart", 25.0, FrameOfReferenceUID="1.2.6.77")
    assert fused(fusion, tmp_path / "apart", tmp_path / "no") == 3
    assert "mixed frame of reference" in capfd.readouterr().err
    assert fused(fusion, tmp_path / "apart", tmp_path / "registered", "--dicom_register", "True") == 0
    (case,) = (tmp_path / "registered").iterdir()
    (note,) = json.loads((case / "result.json").read_text())["notes"]
    assert "ct: registered to series" in note
    again = values_of_map(pydicom.dcmread(case / "fused.dcm"), volume)
    shown = expected.transpose(2, 1, 0)
    assert np.corrcoef(again.ravel(), shown.ravel())[0, 1] > 0.98

    # another patient's CT
    pair_of(fusion, tmp_path / "other", StudyInstanceUID="1.2.6.1", PatientID="PID2")
    assert fused(fusion, tmp_path / "other", tmp_path / "no") == 3
    assert "different patients" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_no_constant_of_this_file_is_a_name() -> None:
    """The healthy case of the search for names: what the tests themselves say does not count as a find."""
    assert names_found(" ".join([*PLANTED, *OF_FILES, MR]), NAMES) == []
