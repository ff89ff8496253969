"""Predictions as DICOM: nothing lost on the way there and back, the same bytes for the same content, and no names."""

from __future__ import annotations

import datetime
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest
from generated_series import CORONAL, NAMES, PLANTED, SAGITTAL, SERIES, STUDY, Change, stored_pixels, write_series
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.datadict import DicomDictionary
from pydicom.dataset import Dataset
from pydicom.uid import UID

from pipelines.dicom.cases import Allowed, DicomCases, as_case_folders
from pipelines.dicom.choice import sequence_of
from pipelines.dicom.objects import Origin, to_bytes
from pipelines.dicom.parametric import parametric_map, values_of_map
from pipelines.dicom.privacy import IDENTITY, names_found, names_in, redacted, refuse_identity, without_names
from pipelines.dicom.report import measurement_report, volumes_of_report
from pipelines.dicom.results import write_back
from pipelines.dicom.segmentation import CODES, code_of, codes_from_raw, dicom_segmentation, labels_of_segmentation
from pipelines.dicom.series import Image, Series, find_series
from pipelines.dicom.uids import content_uid
from pipelines.dicom.volume import Volume, read_volume
from pipelines.manifests.discover import items_from_path
from pipelines.manifests.model import Label
from transforms.errors import BundleError, DataError, ResourceError, UsageError

LABELS = [
    Label(0, "background", "#000000", (0,)),
    Label(1, "lesion", "#ff0000", (1,)),
    Label(2, "necrosis", "#00ff00", (2,)),
]
ORIGIN = Origin("brain_lesion_mri_segmentation", ("ab" * 32,))


def volume_of(folder: Path, **options: bool) -> Volume:
    return read_volume(find_series(folder, folder.parent / "work").series[0], **options)


def drawn(volume: Volume, seed: int = 0, values: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, values, volume.voxels.shape).astype(np.uint8)


def reread(result: Dataset) -> Dataset:
    return pydicom.dcmread(io.BytesIO(to_bytes(result)))


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    return volume_of(write_series(tmp_path / "in"))


@pytest.mark.parametrize("orientation", [None, SAGITTAL, CORONAL])
@pytest.mark.parametrize("gap", [3.0, -1.5])
def test_a_segmentation_holds_every_voxel_on_the_slice_it_came_from(
    orientation: tuple[float, ...] | None, gap: float, tmp_path: Path
) -> None:
    options = {} if orientation is None else {"orientation": orientation}
    volume = volume_of(write_series(tmp_path / "in", gap=gap, **options))
    prediction = drawn(volume)
    result = reread(dicom_segmentation(prediction, volume, LABELS, ORIGIN))
    assert int((labels_of_segmentation(result, volume) != volume.to_slices(prediction)).sum()) == 0
    # by hand, past highdicom's reader: each frame says its segment and position; its bits are packed from the lowest
    bits = np.unpackbits(np.frombuffer(result.PixelData, np.uint8), bitorder="little")
    frames = bits[: result.NumberOfFrames * 24].reshape(-1, 6, 4)
    inverse = np.linalg.inv(volume.affine)
    for group, frame in zip(result.PerFrameFunctionalGroupsSequence, frames, strict=True):
        label = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        position = np.array(group.PlanePositionSequence[0].ImagePositionPatient, float) * [-1, -1, 1]
        k = round(float((inverse @ [*position, 1])[2]))
        np.testing.assert_array_equal(frame, (prediction[:, :, k] == label).T)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_label_map_survives_also_an_empty_one(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # nine pixels: the bits of a frame begin in the middle of a byte
    volume = volume_of(write_series(tmp_path_factory.mktemp("any") / "in", stored_pixels(2, 3, 3)))
    flat = data.draw(st.lists(st.integers(0, 2), min_size=18, max_size=18))
    prediction = np.array(flat, np.uint8).reshape(3, 3, 2)
    result = reread(dicom_segmentation(prediction, volume, LABELS, ORIGIN))
    np.testing.assert_array_equal(labels_of_segmentation(result, volume), volume.to_slices(prediction))
    assert [item.SegmentLabel for item in result.SegmentSequence] == ["lesion", "necrosis"]


def test_a_segmentation_is_coded_and_refers_to_its_source(volume: Volume) -> None:
    result = reread(dicom_segmentation(drawn(volume), volume, LABELS, ORIGIN))
    first = result.SegmentSequence[0]
    assert result.SegmentationType == "BINARY"
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"  # SNOMED CT: lesion
    assert first.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "49755003"  # morphologically abnormal structure
    assert first.AnatomicRegionSequence[0].CodeValue == "12738006"  # brain
    assert first.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == ORIGIN.bundle
    (referenced,) = result.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == SERIES
    instances = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert instances == {f"{SERIES}.{number}" for number in range(1, 6)}
    assert (result.StudyInstanceUID, result.Modality) == (STUDY, "SEG")
    assert result.SeriesInstanceUID != SERIES
    for group in result.PerFrameFunctionalGroupsSequence:  # the frame's source is the image at the frame's position
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        image = next(header for header in volume.sources if source == header.SOPInstanceUID)
        assert group.PlanePositionSequence[0].ImagePositionPatient == image.ImagePositionPatient


def test_segments_of_a_tilted_stack_lie_on_the_tilted_slices(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "in", stored_pixels(5, 12, 4), step=(0.0, 1.0, 3.0))
    volume = volume_of(folder, allow_resampling=True)
    prediction = drawn(volume)
    result = reread(dicom_segmentation(prediction, volume, LABELS, ORIGIN))
    np.testing.assert_array_equal(labels_of_segmentation(result, volume), volume.to_slices(prediction))
    positions = {
        tuple(g.PlanePositionSequence[0].ImagePositionPatient) for g in result.PerFrameFunctionalGroupsSequence
    }
    assert positions == {(-10.0, 20.0 + k, 30.0 + 3 * k) for k in range(5)}


def test_a_value_that_no_label_has_and_a_result_of_another_shape_are_refused(volume: Volume) -> None:
    with pytest.raises(BundleError, match=r"\[7\]"):
        dicom_segmentation(np.full(volume.voxels.shape, 7, np.uint8), volume, LABELS, ORIGIN)
    with pytest.raises(DataError, match="shape"):
        dicom_segmentation(np.zeros((6, 4, 5), np.uint8), volume, LABELS, ORIGIN)


def test_a_label_without_a_code_is_refused_unless_one_is_given(volume: Volume) -> None:
    odd = [LABELS[0], Label(1, "widget", "#ff0000", (1,))]
    with pytest.raises(UsageError, match="'widget': no SNOMED code"):
        dicom_segmentation(drawn(volume, values=2), volume, odd, ORIGIN)
    entry = {"category": ["85756007", "SCT", "Tissue"], "type": ["1234", "99TEST", "Widget"]}
    codes = codes_from_raw({"Widget": entry})
    result = dicom_segmentation(drawn(volume, values=2), volume, odd, ORIGIN, codes)
    assert result.SegmentSequence[0].SegmentedPropertyTypeCodeSequence[0].CodingSchemeDesignator == "99TEST"
    with pytest.raises(UsageError, match="code table"):
        codes_from_raw({"widget": {"type": ["1", "SCT"]}})


def test_a_code_is_found_by_name_however_it_is_spelt_and_by_the_roi_role() -> None:
    assert code_of(Label(1, "White_Matter-Lesion", "", (1,))) == CODES["white matter lesion"]
    assert code_of(Label(1, "class 1", "", (1,), roi="lesion")) == CODES["lesion"]
    assert {code.kind.scheme_designator for code in CODES.values()} == {
        "SCT",
        "NCIt",
    }  # NCIt: enhancing, as in CID 7159


def test_a_parametric_map_keeps_its_floats_bit_by_bit(volume: Volume) -> None:
    values = np.random.default_rng(0).normal(size=volume.voxels.shape).astype(np.float32) ** 2
    result = reread(parametric_map(values, volume, "entropy", ORIGIN))
    np.testing.assert_array_equal(values_of_map(result, volume), volume.to_slices(values))
    mapping = result.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1.0, 0.0)
    assert "nat" in mapping.LUTExplanation
    assert result.ReferencedSeriesSequence[0].SeriesInstanceUID == SERIES
    with pytest.raises(BundleError, match="not finite"):
        parametric_map(np.full(volume.voxels.shape, np.nan, np.float32), volume, "entropy", ORIGIN)


def test_a_report_holds_the_volumes_and_refers_to_the_segments(volume: Volume) -> None:
    """17 voxels of 0.5 x 2 x 3 mm are 0.051 mL; nothing of the other label was found."""
    prediction = np.zeros(volume.voxels.shape, np.uint8)
    prediction.flat[:17] = 1
    segmentation = dicom_segmentation(prediction, volume, LABELS, ORIGIN)
    rows = [
        {"id": 1, "volume_ml": 17 * 0.003, "mean_entropy": 1 / 3},
        {"id": 2, "volume_ml": 0.0, "mean_entropy": None},
    ]
    result = reread(measurement_report(segmentation, volume, LABELS, rows, ORIGIN))
    key = volume.series.key
    assert volumes_of_report(result) == {f"lesion {key}": pytest.approx(0.051), f"necrosis {key}": 0.0}
    # and by highdicom's own reader of templates
    report = highdicom.sr.Comprehensive3DSR.from_dataset(result).content
    groups = report.get_volumetric_roi_measurement_groups()
    assert len(groups) == 2
    assert groups[0].reference_type.value == "121191"  # referenced segment
    assert groups[0].finding_type.value == "52988006"
    values = {m.name.value: (m.value, m.unit.value) for m in groups[0].get_measurements()}
    assert values["118565006"] == (pytest.approx(0.051), "mL")
    assert values["entropy"] == (pytest.approx(1 / 3), "1")
    evidence = {
        item.ReferencedSOPInstanceUID
        for study in result.CurrentRequestedProcedureEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for item in series.ReferencedSOPSequence
    }
    assert evidence == {str(segmentation.SOPInstanceUID)} | {f"{SERIES}.{number}" for number in range(1, 6)}
    assert groups[0].tracking_uid == segmentation.SegmentSequence[0].TrackingUID


def test_a_segmentation_that_does_not_hold_the_label_map_is_not_written(tmp_path: Path) -> None:
    """The library packs frames of fewer than eight pixels wrongly (0.28.2): no clinical image, a planted failure."""
    write_series(tmp_path / "in", stored_pixels(5, 2, 3))
    with pytest.raises(BundleError):
        everything(tmp_path / "in", tmp_path)
    assert not (tmp_path / "results").exists()


def everything(folder: Path, out: Path, origin: Origin = ORIGIN) -> tuple[DicomCases, list[Path]]:
    """Take a series through: case folder, a prediction and its entropy as a bundle leaves them, and back."""
    cases = as_case_folders(folder, ["ct"], out / "work")
    (item,) = items_from_path(cases.folder, ["ct"])
    image = nib.load(item["image"][0])
    prediction = drawn(cases.cases[0].volume)
    entropy = np.random.default_rng(1).random(image.shape).astype(np.float32)
    (out / "predictions").mkdir()
    for name, values in ((item["case"], prediction), (f"{item['case']}_entropy", entropy)):
        nib.save(nib.Nifti1Image(values, image.affine), out / "predictions" / f"{name}.nii.gz")
    return cases, write_back(out / "predictions", cases, out / "results", LABELS, origin)


def test_a_case_folder_holds_the_voxels_and_the_affine_as_bundles_read_them(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    cases = as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")
    (item,) = items_from_path(cases.folder, ["ct"])
    image, volume = nib.load(item["image"][0]), volume_of(tmp_path / "in")
    assert item["case"] == cases.cases[0].name == f"series-{volume.series.key}"
    np.testing.assert_array_equal(image.get_fdata(), volume.voxels)
    np.testing.assert_allclose(image.affine, volume.affine)


def test_the_same_content_twice_is_the_same_bytes_also_in_another_process(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    files = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        if name == "here":
            everything(tmp_path / "in", tmp_path / name)
        else:
            code = (
                "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
                "from test_dicom_results import everything; everything(Path(sys.argv[2]), Path(sys.argv[3]))"
            )
            command = [
                sys.executable,
                "-c",
                code,
                str(Path(__file__).parent),
                str(tmp_path / "in"),
                str(tmp_path / name),
            ]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
        found = (path for path in (tmp_path / name / "results").rglob("*") if path.is_file())
        files.append({path.relative_to(tmp_path / name).as_posix(): path.read_bytes() for path in found})
    assert files[0] == files[1]
    assert {Path(name).name for name in files[0]} == {
        "segmentation.dcm",
        "entropy.dcm",
        "measurements.dcm",
        "result.json",
    }


def test_other_content_has_other_uids(volume: Volume) -> None:
    prediction = drawn(volume)
    changed = prediction.copy()
    changed[0, 0, 0] = (changed[0, 0, 0] + 1) % 3
    results = [
        dicom_segmentation(prediction, volume, LABELS, ORIGIN),
        dicom_segmentation(changed, volume, LABELS, ORIGIN),
        dicom_segmentation(prediction, volume, LABELS, Origin(ORIGIN.bundle, ("cd" * 32,))),
        dicom_segmentation(
            prediction, volume, LABELS, Origin(ORIGIN.bundle, ORIGIN.weights, moment=datetime.datetime(2026, 1, 2))
        ),
    ]
    assert len({result.SOPInstanceUID for result in results}) == 4
    uids = {UID(str(element.value)) for element in results[0].iterall() if element.VR == "UI"}
    assert all(uid.is_valid for uid in uids)
    assert not [uid for uid in uids if uid.startswith("1.2.826.0.1.3680043.10.511.3.")]  # none drawn at random


@given(st.lists(st.text(), max_size=4), st.lists(st.text(), max_size=4))
def test_content_uids_are_valid_and_differ_with_the_content(one: list[str], other: list[str]) -> None:
    assert UID(content_uid(*one)).is_valid
    assert (content_uid(*one) == content_uid(*other)) == (one == other)


def test_nobody_is_named_in_anything_that_is_written_logged_or_raised(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    with caplog.at_level(logging.DEBUG):
        write_series(tmp_path / "in")
        caplog.clear()
        cases, written = everything(tmp_path / "in", tmp_path / "out")
    written += sorted(cases.folder.rglob("*.nii.gz"))
    assert len(written) == 5
    for path in written:
        content = path.read_bytes() if path.suffix != ".gz" else nib.load(path).to_bytes()
        assert names_found(content, NAMES) == []
        assert names_found(path.relative_to(tmp_path).as_posix(), NAMES) == []
    said = caplog.text + "".join(capfd.readouterr()) + "\n".join(cases.lines)
    assert names_found(said, NAMES) == []
    assert set(NAMES) - {"20210309"} <= set(cases.names)  # they were there to be found
    planted = next((tmp_path / "in").iterdir()).read_bytes()
    assert names_found(planted, NAMES) == sorted(NAMES)


def test_no_text_of_any_attribute_leaves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A word in every attribute of the data dictionary that takes a text: no result, line, log or refusal has one."""
    words = {
        keyword: f"Zz{number}Qx"
        for number, (tag, (representation, _, _, retired, keyword)) in enumerate(sorted(DicomDictionary.items()))
        if tag >> 16 > 2  # not of messages and file headers
        and representation in {"PN", "LO", "SH", "ST", "LT", "UT", "UC"}
        and keyword
        and not retired
    }

    def change(k: int, image: Dataset) -> None:
        for keyword, word in words.items():
            setattr(image, keyword, word)
        image.RescaleType = "HU"

    assert len(words) > 600
    (tmp_path / "out").mkdir()
    folder = write_series(tmp_path / "in", change=change)
    assert b"Zz" in next(folder.iterdir()).read_bytes()
    with caplog.at_level(logging.DEBUG):
        caplog.clear()
        cases, written = everything(folder, tmp_path / "out")
        spoiled = write_series(tmp_path / "spoiled", step=(0.0, 1.0, 3.0), change=change)
        with pytest.raises(DataError) as refused:
            as_case_folders(spoiled, ["ct"], tmp_path / "work")
    contents = [path.read_bytes() if path.suffix != ".gz" else nib.load(path).to_bytes() for path in written]
    contents += [nib.load(path).to_bytes() for path in cases.folder.rglob("*.nii.gz")]
    said = caplog.text + "".join(capfd.readouterr()) + "\n".join(cases.lines) + str(refused.value)
    assert not [content for content in (*contents, said.encode()) if re.search(rb"zz\d+qx", content.lower())]
    assert len(contents) == 5
    # with identity, these and no others
    (tmp_path / "kept").mkdir()
    _, written = everything(folder, tmp_path / "kept", Origin("bundle", keep_identity=True))
    found = {word for path in written for word in re.findall(r"Zz\d+Qx", path.read_bytes().decode("latin-1"))}
    assert found == {words[k] for k in IDENTITY if k in words}


def test_identity_is_kept_when_it_is_asked_for_and_nothing_else_of_the_source(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _, written = everything(write_series(tmp_path / "in"), tmp_path / "out", Origin("bundle", keep_identity=True))
    for path in (path for path in written if path.suffix == ".dcm"):
        result = pydicom.dcmread(path)
        assert {k: str(result[k].value) for k in IDENTITY if k in PLANTED} == {
            k: PLANTED[k] for k in IDENTITY if k in PLANTED
        }
        assert (result.InstanceCreationDate, result.ContentTime) == ("20210309", "101112")  # sorted with its study
        left = set(PLANTED) - set(IDENTITY)
        assert not [k for k in left if k in result and k != "SeriesDescription"]
        assert "PatientIdentityRemoved" not in result
        assert names_found(path.read_bytes(), ["Wetherspool", "Ethelburga", "Thistlewood", "ALT5510022"]) == []


def test_a_result_that_names_somebody_is_not_written(volume: Volume) -> None:
    result = dicom_segmentation(drawn(volume), volume, LABELS, ORIGIN)
    refuse_identity(result, "segmentation")  # quiet on a sound one
    result.SegmentSequence[0].PerformingPhysicianName = "Somebody"
    with pytest.raises(DataError, match="Performing Physician"):
        refuse_identity(result, "segmentation")
    del result.SegmentSequence[0].PerformingPhysicianName
    result.private_block(0x0029, "MAKER", create=True).add_new(1, "LO", "text")
    with pytest.raises(DataError, match="not de-identified"):
        refuse_identity(result, "segmentation")


def test_errors_lose_the_names_and_keep_the_sense() -> None:
    names = frozenset({"Lee", "Grimsby^Aurelia", "Grimsby"})
    with pytest.raises(ResourceError) as refused, without_names(names):
        raise ResourceError("/in/GRIMSBY_AURELIA/1.dcm", "Lee asleep; grimsby", "")
    assert refused.value.what == "/in/[removed]/1.dcm"
    assert refused.value.why == "[removed] asleep; [removed]"  # a short name only as a word of its own
    with pytest.raises(DataError) as refused_data, without_names(names):
        raise ValueError("Patient Grimsby")
    assert "Grimsby" not in str(refused_data.value)
    assert refused_data.value.__cause__ is None
    assert redacted("nothing to hide", names) == "nothing to hide"


def test_names_are_found_in_sequences_and_in_other_alphabets(tmp_path: Path) -> None:
    def change(k: int, image: Dataset) -> None:
        image.SpecificCharacterSet = "ISO_IR 192"
        image.PatientName = "Ærøskøbing^Søren"
        item = Dataset()
        item.PersonIdentificationCodeSequence, item.InstitutionName = [], "Nested Clinic"
        item.OrderEnteredBy = "Deepdown^Nell"
        image.RequestAttributesSequence = [item]

    found = find_series(write_series(tmp_path / "in", change=change), tmp_path / "work")
    assert {"Ærøskøbing", "Søren", "Nested Clinic", "Deepdown"} <= found.names
    assert names_in([]) == frozenset()
    assert names_found("Ærøskøbing".encode(), ["ærøskøbing", "Søren"]) in (["ærøskøbing"], [])
    assert names_found("Ærøskøbing".encode(), found.names) == ["Ærøskøbing"]


@pytest.mark.parametrize(
    ("description", "sequence"),
    [
        ("Ax T2 FLAIR fs", "flair"),
        ("t2_tirm_tra_dark-fluid", "flair"),
        ("anat-T1w", "t1"),
        ("MPRAGE sag", "t1"),
        ("t1_mprage_post gad", "t1ce"),
        ("T1 +C", "t1ce"),
        ("T2w TSE", "t2"),
        ("T2* GRE", None),
        ("t2star", None),
        ("pd/t2 dual echo", None),
        ("AT10 survey", None),
        ("t1_mpr_sag_p2_iso", "t1"),
        ("Ax T1 FLAIR", None),  # T1-weighted with an inversion: no FLAIR
        ("t2_tirm_tra", None),  # may be a FLAIR or fat suppression
        ("T1 map", None),
        ("T2 DWI trace", None),
        ("", None),
    ],
)
def test_the_sequence_is_read_from_the_description_or_left_open(description: str, sequence: str | None) -> None:
    header = Dataset()
    header.SeriesDescription = description
    assert sequence_of(Series("0" * 8, (Image(Path("a"), header),))) == sequence


def test_the_header_counts_beside_the_description() -> None:
    header = Dataset()
    header.SeriesDescription, header.ContrastBolusAgent = "t1 mprage sag", "some agent"
    assert sequence_of(Series("0" * 8, (Image(Path("a"), header),))) == "t1ce"
    header.SeriesDescription, header.InversionTime = "t2 tra", 2500
    assert sequence_of(Series("0" * 8, (Image(Path("a"), header),))) is None


def multi(folder: Path, name: str, uid: str, **more: object) -> None:
    def change(k: int, image: Dataset) -> None:
        image.SeriesInstanceUID, image.SeriesDescription = uid, name
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = f"{uid}.{k + 1}"
        for keyword, value in more.items():
            setattr(image, keyword, value)

    write_series(folder / uid, modality="MR", change=change)


def test_a_study_of_several_sequences_is_one_case_on_one_grid(tmp_path: Path) -> None:
    multi(tmp_path / "in", "t2 flair", "1.2.7.1")
    multi(tmp_path / "in", "t1", "1.2.7.2")
    multi(tmp_path / "in", "dti", "1.2.7.3")
    cases = as_case_folders(tmp_path / "in", ["flair", "t1"], tmp_path / "work")
    (item,) = items_from_path(cases.folder, ["flair", "t1"])
    assert [Path(path).name for path in item["image"]] == ["flair.nii.gz", "t1.nii.gz"]
    assert sorted(line.split("  ")[-1] for line in cases.lines) == ["flair", "not used", "t1"]

    multi(tmp_path / "in", "t1 repeated", "1.2.7.4")
    with pytest.raises(UsageError, match="modality t1: 2 series"):
        as_case_folders(tmp_path / "in", ["flair", "t1"], tmp_path / "work2")
    with pytest.raises(DataError, match="no series for t2"):
        as_case_folders(tmp_path / "in", ["flair", "t2"], tmp_path / "work3")


def test_sequences_on_different_grids_or_in_different_frames_are_refused(tmp_path: Path) -> None:
    multi(tmp_path / "in", "flair", "1.2.7.1")
    multi(tmp_path / "in", "t1", "1.2.7.2", PixelSpacing=[2.1, 0.5])
    with pytest.raises(DataError, match="grid"):
        as_case_folders(tmp_path / "in", ["flair", "t1"], tmp_path / "work")
    cases = as_case_folders(tmp_path / "in", ["flair", "t1"], tmp_path / "work", allowed=Allowed(resampling=True))
    (item,) = items_from_path(cases.folder, ["flair", "t1"])
    flair, t1 = (nib.load(path) for path in item["image"])
    np.testing.assert_allclose(flair.affine, t1.affine)
    # row 4 of the flair grid lies at 8 mm, between rows 3 (6.3 mm) and 4 (8.4 mm) of the t1: 10 * 8 / 2.1
    assert t1.get_fdata()[1, 4, 2] == pytest.approx(200 + 10 * 8 / 2.1 + 1, abs=1e-3)

    multi(tmp_path / "other", "flair", "1.2.7.1")
    multi(tmp_path / "other", "t1", "1.2.7.2", FrameOfReferenceUID="1.2.3.4.8")
    with pytest.raises(DataError, match="mixed frame of reference"):
        as_case_folders(tmp_path / "other", ["flair", "t1"], tmp_path / "work2", allowed=Allowed(resampling=True))


def mri_and_ct(folder: Path, **of_the_ct: object) -> None:
    """Write an MRI and a CT of one patient, of two studies and in one frame of reference; the CT twice as fine in z."""
    mri = {"StudyInstanceUID": "1.2.8.1", "SeriesInstanceUID": "1.2.8.1.1"}
    ct = {"StudyInstanceUID": "1.2.8.2", "SeriesInstanceUID": "1.2.8.2.1", **of_the_ct}

    def change(of: dict[str, object]) -> Change:
        def with_uids(k: int, image: Dataset) -> None:
            for keyword, value in of.items():
                setattr(image, keyword, value)
            image.SOPInstanceUID = f"{of['SeriesInstanceUID']}.{k + 1}"

        return with_uids

    write_series(folder / "mri", modality="MR", change=change(mri))
    write_series(folder / "ct", stored_pixels(9), gap=1.5, change=change(ct))


def test_an_mri_and_a_ct_of_two_studies_of_one_patient_are_one_case(tmp_path: Path) -> None:
    mri_and_ct(tmp_path / "in")
    with pytest.raises(DataError, match="grid"):
        as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work")
    cases = as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work", allowed=Allowed(resampling=True))
    (case,) = cases.cases
    (item,) = items_from_path(cases.folder, ["mri", "ct"])
    mri, ct = (nib.load(path).get_fdata() for path in item["image"])
    np.testing.assert_array_equal(mri.transpose(2, 1, 0), stored_pixels())
    np.testing.assert_array_equal(ct.transpose(2, 1, 0), 2 * stored_pixels(9)[::2] - 1000)  # every other slice
    assert set(case.series) == {"mri", "ct"}
    (note,) = case.notes
    assert "ct: resampled on the grid of" in note
    assert "covers 100.0%" in note


@pytest.mark.parametrize("ids", [{"PatientID": "PID2"}, {"PatientBirthDate": "19600101"}])
def test_images_of_two_patients_are_never_one_case(ids: dict[str, str], tmp_path: Path) -> None:
    mri_and_ct(tmp_path / "in", **ids)
    with pytest.raises(DataError, match="no series for"):
        as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work")
    keys = {s.modality.lower().replace("mr", "mri"): s.key for s in find_series(tmp_path / "in", tmp_path).series}
    with pytest.raises(DataError, match="different patients") as refused:
        as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work", chosen=keys)
    assert names_found(str(refused.value), NAMES) == []
    # in one study as well
    mri_and_ct(tmp_path / "one", StudyInstanceUID="1.2.8.1", **ids)
    with pytest.raises(DataError, match="different patients"):
        as_case_folders(tmp_path / "one", ["mri", "ct"], tmp_path / "work")


def test_two_studies_of_nobody_in_particular_are_one_case_only_where_it_is_said(tmp_path: Path) -> None:
    """Both IDs read ANON and the birth dates are gone: that says nothing about who they are."""
    mri_and_ct(tmp_path / "in", PatientBirthDate="")
    for path in (tmp_path / "in" / "mri").iterdir():
        image = pydicom.dcmread(path)
        image.PatientBirthDate = ""
        image.save_as(path)
    with pytest.raises(DataError, match="no series for ct") as refused:
        as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work")
    assert "--dicom_series mri=KEY,ct=KEY" in refused.value.fix
    keys = {s.modality.lower().replace("mr", "mri"): s.key for s in find_series(tmp_path / "in", tmp_path).series}
    allowed = Allowed(resampling=True)
    cases = as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work", chosen=keys, allowed=allowed)
    assert len(cases.cases) == 1


@pytest.mark.parametrize("frame", ["1.2.3.4.8", ""])
def test_a_ct_in_another_frame_or_in_none_is_not_laid_over_an_mri(frame: str, tmp_path: Path) -> None:
    mri_and_ct(tmp_path / "in", FrameOfReferenceUID=frame)
    with pytest.raises(DataError, match="mixed frame of reference") as refused:
        as_case_folders(tmp_path / "in", ["mri", "ct"], tmp_path / "work", allowed=Allowed(resampling=True))
    assert "--dicom_register True" in refused.value.fix


def test_a_series_that_lies_beside_the_first_is_not_resampled_to_nothing(tmp_path: Path) -> None:
    def far(k: int, image: Dataset) -> None:
        image.SeriesInstanceUID, image.SOPInstanceUID = "1.2.8.5", f"1.2.8.5.{k + 1}"
        image.SeriesDescription = "flair"
        image.ImagePositionPatient = [-10.0, 20.0, 500.0 + 3 * k]

    write_series(tmp_path / "in" / "t1", modality="MR")
    write_series(tmp_path / "in" / "flair", modality="MR", change=far)
    with pytest.raises(DataError, match="no voxel of"):
        as_case_folders(tmp_path / "in", ["flair", "t1"], tmp_path / "work", allowed=Allowed(resampling=True))


def test_references_stay_where_the_source_was_made_by_the_same_library(tmp_path: Path) -> None:
    """highdicom draws UIDs below its root; ours replace those that it drew for the result, not those of the source."""
    root = "1.2.826.0.1.3680043.10.511.3.77"

    def change(k: int, image: Dataset) -> None:
        image.SeriesInstanceUID, image.StudyInstanceUID = f"{root}.1", f"{root}.2"
        image.FrameOfReferenceUID, image.SOPInstanceUID = f"{root}.3", f"{root}.4.{k + 1}"

    volume = volume_of(write_series(tmp_path / "in", change=change))
    prediction = drawn(volume)
    result = reread(dicom_segmentation(prediction, volume, LABELS, ORIGIN))
    assert (result.StudyInstanceUID, result.FrameOfReferenceUID) == (f"{root}.2", f"{root}.3")
    assert result.ReferencedSeriesSequence[0].SeriesInstanceUID == f"{root}.1"
    assert result.SeriesInstanceUID.startswith("2.25.")
    np.testing.assert_array_equal(labels_of_segmentation(result, volume), volume.to_slices(prediction))


def test_fused_images_become_parametric_maps_without_a_label_table(tmp_path: Path) -> None:
    cases = as_case_folders(write_series(tmp_path / "in"), ["ct"], tmp_path / "work")
    case = cases.cases[0]
    (tmp_path / "predictions").mkdir()
    maps = {
        name: np.random.default_rng(2).random(case.volume.voxels.shape).astype(np.float32)
        for name in ("fused", "uncertainty")
    }
    for name, values in maps.items():
        nib.save(nib.Nifti1Image(values, case.volume.affine), tmp_path / "predictions" / f"{case.name}_{name}.nii.gz")
    written = write_back(tmp_path / "predictions", cases, tmp_path / "out", [], ORIGIN)
    assert [path.name for path in written] == ["fused.dcm", "uncertainty.dcm", "result.json"]
    for path in written[:2]:
        result = pydicom.dcmread(path)
        np.testing.assert_array_equal(values_of_map(result, case.volume), case.volume.to_slices(maps[path.stem]))
        assert result.RecognizableVisualFeatures == ("YES" if path.stem == "fused" else "NO")  # a face can be seen


def test_a_prediction_on_another_grid_or_none_at_all_is_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "in")
    cases = as_case_folders(tmp_path / "in", ["ct"], tmp_path / "work")
    (tmp_path / "predictions").mkdir()
    with pytest.raises(DataError, match="no prediction"):
        write_back(tmp_path / "predictions", cases, tmp_path / "out", LABELS, ORIGIN)
    volume = cases.cases[0].volume
    moved = volume.affine.copy()
    moved[0, 3] += 0.5
    path = tmp_path / "predictions" / f"{cases.cases[0].name}.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(volume.voxels.shape, np.uint8), moved), path)
    with pytest.raises(DataError, match="another grid"):
        write_back(tmp_path / "predictions", cases, tmp_path / "out", LABELS, ORIGIN)
    assert not (tmp_path / "out").exists()
