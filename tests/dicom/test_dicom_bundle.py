"""A bundle on DICOM from end to end: a study in, segmentation, uncertainty and report out."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from bundle_runs import BUNDLE, MODALITIES
from generated_series import NAMES
from lesion_study import OPTIONS, study_of
from pydicom.dataset import Dataset
from pynetdicom import AE, evt

from pipelines.cli import main
from pipelines.dicom.listener import SENT
from pipelines.dicom.predict import check_request, predict_dicom
from pipelines.dicom.privacy import names_found
from pipelines.dicom.report import volumes_of_report
from pipelines.dicom.segmentation import labels_of_segmentation
from pipelines.dicom.series import find_series
from pipelines.dicom.volume import read_volume
from transforms.errors import DataError, UsageError


def test_a_study_becomes_what_the_same_images_as_nifti_become(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    study = study_of(trained / "data", tmp_path / "study")
    options = {**OPTIONS, "runs_dir": str(trained / "runs"), "uncertainty": True, "minimum_lesion_mm3": 0.0}
    with caplog.at_level(logging.INFO):
        written = predict_dicom(check_request(str(BUNDLE), options), study, tmp_path / "out")
    names = ["entropy.dcm", "measurements.dcm", "mutual_information.dcm", "result.json", "segmentation.dcm"]
    assert sorted(path.name for path in written) == names
    said = caplog.text + "".join(capfd.readouterr())
    assert "not used" not in said
    assert names_found(said, NAMES) == []
    for path in written:
        assert names_found(path.read_bytes(), NAMES) == []

    # the same voxels as NIfTI, by the command that a researcher uses
    for modality in MODALITIES:
        image = nib.load(trained / "data" / "c" / f"{modality}.nii.gz")
        (tmp_path / "nifti" / "c").mkdir(parents=True, exist_ok=True)
        rounded = nib.Nifti1Image(np.rint(image.get_fdata()).astype(np.float32), image.affine)
        nib.save(rounded, tmp_path / "nifti" / "c" / f"{modality}.nii.gz")
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    assert main(["predict", str(BUNDLE), "-i", str(tmp_path / "nifti"), "-o", str(tmp_path / "masks"), *given]) == 0
    mask = np.asarray(nib.load(tmp_path / "masks" / "c.nii.gz").dataobj)
    series = next(s for s in find_series(study, tmp_path / "w").series if "flair" in str(s.header.SeriesDescription))
    volume = read_volume(series)
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-9)
    found = labels_of_segmentation(
        pydicom.dcmread(tmp_path / "out" / f"series-{series.key}" / "segmentation.dcm"), volume
    )
    assert 0 < mask.sum() < mask.size  # not trivial: one step of training finds something, and not everything
    assert int((found.transpose(2, 1, 0) != mask).sum()) == 0
    record = json.loads((tmp_path / "masks" / "c.json").read_text())
    report = pydicom.dcmread(tmp_path / "out" / f"series-{series.key}" / "measurements.dcm")
    assert list(volumes_of_report(report).values()) == pytest.approx([record["labels"][0]["volume_ml"]], rel=1e-6)


def test_what_cannot_be_predicted_is_refused_before_the_bundle_runs(trained: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "runs_dir": str(trained / "runs")}
    study = study_of(trained / "data", tmp_path / "study")
    next((study / "Grimsby t1").glob("*_005.dcm")).unlink()
    with pytest.raises(DataError, match="missing slice"):
        predict_dicom(check_request(str(BUNDLE), options), study, tmp_path / "out")
    with pytest.raises(UsageError, match="dicom_serie"):
        check_request(str(BUNDLE), {**options, "dicom_serie": "flair=0"})
    assert not (tmp_path / "out").exists()


def test_a_watched_folder_predicts_every_study_and_sends_the_results(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    study_of(trained / "data", tmp_path / "in" / "Grimsby sound")
    spoiled = study_of(trained / "data", tmp_path / "in" / "Grimsby spoiled", subject="a")
    next((spoiled / "Grimsby t1").glob("*_005.dcm")).unlink()
    received: list[Dataset] = []

    def keep(event: evt.Event) -> int:
        received.append(event.dataset)
        return 0

    archive = AE(ae_title="ARCHIVE")
    for uid in SENT:
        archive.add_supported_context(uid)
    server = archive.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, keep)])
    assert server is not None
    try:
        command = [
            "watch",
            str(tmp_path / "in"),
            str(tmp_path / "out"),
            "--bundle",
            str(BUNDLE),
            "--once",
            "--settle",
            "0",
        ]
        options = ["--runs_dir", str(trained / "runs"), *(word for k, v in OPTIONS.items() for word in (f"--{k}", v))]
        archive_at = ["--send_to", f"ARCHIVE@127.0.0.1:{server.server_address[1]}"]
        assert main([*command, *options, *archive_at]) == 2  # nothing says whether with or without the patient
        assert main([*command, *options, *archive_at, "--dicom_keep_identity", "False"]) == 0
    finally:
        server.shutdown()
    assert [str(result.Modality) for result in received] == ["SEG", "SR"]
    (done,), (reason,) = (tmp_path / "in" / "done").iterdir(), (tmp_path / "in" / "failed").glob("*.txt")
    assert "missing slice" in reason.read_text()
    (case,) = (tmp_path / "out" / done.name).iterdir()  # and nothing of the work in between
    kept = pydicom.dcmread(case / "segmentation.dcm")
    assert kept.SOPInstanceUID == received[0].SOPInstanceUID
    said = "".join(capfd.readouterr()) + reason.read_text() + (tmp_path / "out" / "watch.jsonl").read_text()
    assert names_found(said, NAMES) == []
    bad = [str(tmp_path / "a"), str(tmp_path / "b"), "--bundle"]
    assert main(["watch", *bad, str(BUNDLE), "--send_to", "nowhere"]) == 2
    assert main(["watch", *bad, "no_such_bundle"]) == 4
    assert not (tmp_path / "a").exists()


def test_the_listener_needs_to_know_who_may_send(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["listen", str(tmp_path)]) == 2
    assert "nobody may send" in capsys.readouterr().err
