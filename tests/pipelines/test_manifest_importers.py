"""Importers on small generated cohorts: what they find, and every fault of a file that they must name."""

from __future__ import annotations

import gzip
import json
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from pipelines.manifests import (
    Label,
    Manifest,
    SplitPlan,
    case_items,
    import_folder,
    import_msd,
    import_nnunet,
    label_table,
    load_manifest,
    parse_label,
    write_manifest,
)
from pipelines.manifests.labels import label_colour
from transforms.errors import DataError, UsageError
from transforms.nifti import read_label, read_voxels

SHAPE = (6, 5, 4)
AFFINE = np.diag([0.5, 1.0, 3.0, 1.0])
TEXT = {"name": "cohort", "licence": "CC0", "source": "generated"}
PATTERNS = {"flair": "{subject}/FLAIR.nii.gz", "t1": "{subject}/T1.nii.gz"}


def save(path: Path, seed: int = 0, shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.random.default_rng(seed).normal(size=shape).astype(np.float32), affine), path)


def save_label(path: Path, *values: float, dtype: str = "uint8", affine: np.ndarray = AFFINE) -> None:
    """Write ``values`` into the first voxels, 0 into the others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.zeros(SHAPE, dtype=dtype)
    data.ravel()[: len(values)] = values
    nib.save(nib.Nifti1Image(data, affine), path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six subjects; subject k has k lesion voxels of 1.5 mm3, values 1 and 2."""
    root = tmp_path / "cohort"
    for k in range(1, 7):
        save(root / f"p{k}" / "FLAIR.nii.gz", seed=2 * k)
        save(root / f"p{k}" / "T1.nii.gz", seed=2 * k + 1)
        save_label(root / f"p{k}" / "lesion.nii.gz", *([1, 2] * k)[:k])
        save_label(root / f"p{k}" / "brain.nii.gz", *[1] * 60)
    (root / "notes.txt").write_text("no image")
    return root


def imported(folder: Path, **more: Any) -> Manifest:
    options: dict[str, Any] = {
        "images": PATTERNS,
        "label": "{subject}/lesion.nii.gz",
        "masks": {"brain": "{subject}/brain.nii.gz"},
        "labels": ["1:lesion=1+2"],
        **TEXT,
        **more,
    }
    return import_folder(folder, **options)


def refused(folder: Path, *words: str, **more: Any) -> None:
    with pytest.raises(DataError) as caught:
        imported(folder, **more)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.fix


def test_a_folder_becomes_a_manifest(folder: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    manifest = imported(folder, units={"flair": "1"}, progress=lambda *state: seen.append(state))
    write_manifest(manifest, tmp_path / "cohort.json")
    loaded = load_manifest(tmp_path / "cohort.json", check="sha256")
    assert loaded.digest == manifest.digest
    assert [case.id for case in loaded.cases] == ["p1", "p2", "p3", "p4", "p5", "p6"]
    assert loaded.cases[0].shape == SHAPE
    assert loaded.cases[0].spacing == (0.5, 1.0, 3.0)
    assert [(modality.name, modality.unit) for modality in loaded.modalities] == [("flair", "1"), ("t1", "a.u.")]
    assert [(label.id, label.name) for label in loaded.labels] == [(0, "background"), (1, "lesion")]
    assert seen[0] == (1, 6, "p1")
    assert seen[-1] == (6, 6, "p6")


def test_items_lead_to_the_voxels(folder: Path) -> None:
    manifest = imported(folder)
    item = next(item for split in ("train", "validation", "test") for item in case_items(manifest, split))
    assert read_voxels(item["image"][0], channel=item["channels"][0]).shape == SHAPE
    label = read_label(item["label"], dict(item["label_values"]))
    assert int(label.sum()) == int(item["subject"][1])


def test_the_split_is_stratified_by_lesion_volume(folder: Path) -> None:
    """Six subjects, tertiles p1 p2 | p3 p4 | p5 p6: half to train means one of each pair."""
    manifest = imported(folder, split=SplitPlan(fractions=(0.5, 0.0, 0.5)))
    split = {case.subject: case.split for case in manifest.cases}
    for pair in (("p1", "p2"), ("p3", "p4"), ("p5", "p6")):
        assert {split[subject] for subject in pair} == {"train", "test"}


def test_named_subjects_and_folds(folder: Path) -> None:
    manifest = imported(folder, split=SplitPlan(test=("p6",), folds=5))
    assert [case.id for case in manifest.cases if case.split == "test"] == ["p6"]
    assert sorted(case.fold for case in manifest.cases if case.fold is not None) == [0, 1, 2, 3, 4]


def test_two_imports_of_one_folder_are_one_cohort(folder: Path) -> None:
    assert imported(folder).digest == imported(folder).digest


def test_sessions_of_a_subject_stay_together(tmp_path: Path) -> None:
    for number, subject in enumerate(("s1", "s2", "s3")):
        for offset, session in enumerate(("a", "b")):
            save(tmp_path / subject / session / "FLAIR.nii.gz", seed=2 * number + offset)
        save_label(tmp_path / subject / "brain.nii.gz", *[1] * 60)
    manifest = import_folder(
        tmp_path,
        {"flair": "{subject}/{session}/FLAIR.nii.gz"},
        masks={"brain": "{subject}/brain.nii.gz"},
        split=SplitPlan(fractions=(0.34, 0.33, 0.33)),
        **TEXT,
    )
    assert [case.id for case in manifest.cases] == ["s1_a", "s1_b", "s2_a", "s2_b", "s3_a", "s3_b"]
    assert {case.masks["brain"].path for case in manifest.cases[:2]} == {"s1/brain.nii.gz"}
    for subject in ("s1", "s2", "s3"):
        assert len({case.split for case in manifest.cases if case.subject == subject}) == 1


def test_case_names_in_file_names(tmp_path: Path) -> None:
    for case in ("c_01", "c_02"):
        save(tmp_path / "images" / f"{case}.nii.gz", seed=int(case[-1]))
        save_label(tmp_path / "labels" / f"{case}.nii.gz", 1)
    manifest = import_folder(
        tmp_path, {"mr": "images/{case}.nii.gz"}, "labels/{case}.nii.gz", labels=["1:organ"], **TEXT
    )
    assert [(case.id, case.subject) for case in manifest.cases] == [("c_01", "c_01"), ("c_02", "c_02")]


def test_a_repeated_placeholder_means_the_same(tmp_path: Path) -> None:
    save(tmp_path / "p1" / "p1_FLAIR.nii.gz")
    save(tmp_path / "p2" / "p1_FLAIR.nii.gz", seed=1)
    manifest = import_folder(tmp_path, {"flair": "{subject}/{subject}_FLAIR.nii.gz"}, **TEXT)
    assert [case.id for case in manifest.cases] == ["p1"]


def test_without_a_placeholder_the_folder_is_one_case(tmp_path: Path) -> None:
    save(tmp_path / "T2.nii.gz")
    save_label(tmp_path / "lesion.nii.gz", 1)
    manifest = import_folder(tmp_path, {"t2": "T2.nii.gz"}, "lesion.nii.gz", labels=["1:lesion"], **TEXT)
    assert [(case.id, case.split) for case in manifest.cases] == [("cohort", "train")]


def test_linked_folders_are_followed_and_circles_end(folder: Path, tmp_path: Path) -> None:
    links = tmp_path / "links"
    links.mkdir()
    for k in range(1, 7):
        (links / f"p{k}").symlink_to(folder / f"p{k}")
    (links / "circle").symlink_to(links)
    assert len(imported(links).cases) == 6


def test_a_missing_modality_is_named(folder: Path) -> None:
    (folder / "p3" / "T1.nii.gz").unlink()
    refused(folder, str(folder / "p3" / "T1.nii.gz"), "case p3", "images/t1")


def test_a_case_with_only_a_label_is_not_forgotten(folder: Path) -> None:
    save_label(folder / "p9" / "lesion.nii.gz", 1)
    refused(folder, "case p9", "images/flair")


def test_incomplete_cases_can_be_skipped_and_are_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "p3" / "T1.nii.gz").unlink()
    (folder / "p5" / "lesion.nii.gz").unlink()
    manifest = imported(folder, missing="skip")
    assert [(left.case, left.missing) for left in manifest.left_out] == [("p3", ("images/t1",)), ("p5", ("label",))]
    assert [case.id for case in manifest.cases] == ["p1", "p2", "p4", "p6"]
    write_manifest(manifest, tmp_path / "cohort.json")
    assert load_manifest(tmp_path / "cohort.json").left_out == manifest.left_out


def test_optional_keys_may_be_missing(folder: Path) -> None:
    (folder / "p3" / "T1.nii.gz").unlink()
    (folder / "p4" / "lesion.nii.gz").unlink()
    (folder / "p5" / "brain.nii.gz").unlink()
    manifest = imported(folder, optional=["t1", "label", "brain"])
    assert [modality.optional for modality in manifest.modalities] == [False, True]
    assert "t1" not in manifest.cases[2].images
    assert manifest.cases[3].label is None
    assert manifest.cases[4].masks == {}


def test_no_match_is_refused_with_the_patterns(folder: Path) -> None:
    refused(folder, "no complete case", "{subject}/FLAIR.nii", images={"flair": "{subject}/FLAIR.nii"}, label=None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"images": {"flair": "{subjekt}/FLAIR.nii.gz"}}, ["'subjekt'", "did you mean 'subject'"]),
        ({"images": {}}, ["no modality"]),
        ({"images": {**PATTERNS, "t2": "{case}.nii.gz"}}, ["'t2'", "same placeholders"]),
        ({"label": "{subject}/{session}.nii.gz"}, ["'label'", "session"]),
        ({"labels": []}, ["labels", "1:lesion"]),
        ({"units": {"t11": "HU"}}, ["units 't11'", "did you mean 't1'"]),
        ({"optional": ["brian"]}, ["optional 'brian'", "did you mean 'brain'"]),
        ({"labels": ["1:lesion=1+2", "2:core=2"]}, ["'core'", "value 2", "'lesion'"]),
        ({"split": SplitPlan(test=("p66",))}, ["'p66'", "did you mean 'p6'"]),
        ({"missing": "skp"}, ["missing 'skp'", "did you mean 'skip'"]),
        ({"split": SplitPlan(folds=9)}, ["folds 9"]),
    ],
)
def test_options_that_contradict_each_other(folder: Path, more: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        imported(folder, **more)
    for word in words:
        assert word in str(caught.value)


def test_an_absent_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        imported(tmp_path / "nothing")


def test_a_truncated_image_is_named(folder: Path) -> None:
    path = folder / "p2" / "T1.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    refused(folder, str(path), "case p2", "images/t1", "truncated")


def test_a_wrong_checksum_is_named(folder: Path) -> None:
    path = folder / "p2" / "FLAIR.nii.gz"
    content = bytearray(path.read_bytes())
    content[-5] ^= 255
    path.write_bytes(bytes(content))
    refused(folder, str(path), "case p2", "corrupt")


def test_a_corrupt_mask_is_named(folder: Path) -> None:
    path = folder / "p4" / "brain.nii.gz"
    path.write_bytes(path.read_bytes()[:-4])
    refused(folder, str(path), "case p4", "masks/brain")


def test_a_spacing_of_zero_is_named(folder: Path) -> None:
    path = folder / "p2" / "FLAIR.nii.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<f", content, 76 + 12, 0.0)
    path.write_bytes(gzip.compress(bytes(content)))
    refused(folder, str(path), "case p2", "[0.5, 1.0, 0.0]")


def test_nan_is_named(folder: Path) -> None:
    data = np.zeros(SHAPE, dtype=np.float32)
    data[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(data, AFFINE), folder / "p2" / "T1.nii.gz")
    refused(folder, "case p2", "images/t1", "(1, 2, 3)")


@pytest.mark.parametrize("key", ["images/t1", "label", "masks/brain"])
def test_another_grid_is_named_and_measured(folder: Path, key: str) -> None:
    moved = AFFINE.copy()
    moved[2, 3] = 0.25
    if key == "images/t1":
        save(folder / "p2" / "T1.nii.gz", affine=moved)
    else:
        save_label(folder / "p2" / ("lesion.nii.gz" if key == "label" else "brain.nii.gz"), 1, affine=moved)
    refused(folder, "case p2", key, "0.25")


def test_another_shape_is_named(folder: Path) -> None:
    save(folder / "p2" / "T1.nii.gz", shape=(6, 5, 5))
    refused(folder, "case p2", "images/t1", "(6, 5, 5)", "(6, 5, 4)")


def test_label_values_outside_the_table_are_counted(folder: Path) -> None:
    save_label(folder / "p2" / "lesion.nii.gz", 1, 3, 3, 7)
    refused(folder, "case p2", "label", "3 (2 voxels)", "7 (1 voxels)")


def test_float_labels_near_integers_are_fine(folder: Path) -> None:
    save_label(folder / "p2" / "lesion.nii.gz", 0.99999997, 2.0, dtype="float32")
    assert len(imported(folder).cases) == 6


def test_a_4d_image_is_refused(folder: Path) -> None:
    save(folder / "p2" / "T1.nii.gz", shape=(*SHAPE, 2))
    refused(folder, "case p2", "images/t1", "2 channels")


def test_one_file_for_two_modalities_is_refused(folder: Path) -> None:
    refused(folder, "case p1", "1 channels", "names 2", images={**PATTERNS, "t2": PATTERNS["t1"]})


def test_a_copied_scan_in_two_splits_is_leakage(folder: Path) -> None:
    (folder / "p2" / "FLAIR.nii.gz").write_bytes((folder / "p1" / "FLAIR.nii.gz").read_bytes())
    refused(folder, "leakage", "case p2", "case p1", split=SplitPlan(test=("p2",)))
    assert len(imported(folder, split=SplitPlan(test=("p6",))).cases) == 6


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1:lesion", Label(1, "lesion", "#e69f00", (1,))),
        ("1:whole_tumour=1+2+3+4", Label(1, "whole_tumour", "#e69f00", (1, 2, 3, 4))),
        ("2:core=-1@tumour_core", Label(2, "core", "#56b4e9", (-1,), "tumour_core")),
        ("0:background=0+5", Label(0, "background", "#000000", (0, 5))),
    ],
)
def test_labels_as_written(text: str, expected: Label) -> None:
    assert parse_label(text) == expected


@pytest.mark.parametrize("text", ["lesion", "x:lesion", "1:", "1:lesion=", "1:lesion=1,2", "40000:lesion", "-1:lesion"])
def test_other_forms_of_a_label_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="1:whole_tumour"):
        parse_label(text)


@pytest.mark.parametrize("labels", [["1:a", "1:b"], ["1:a", "2:a"], ["1:a=0+1"]])
def test_label_tables_with_a_clash_are_refused(labels: list[str]) -> None:
    with pytest.raises(UsageError, match="already belongs"):
        label_table(labels)


def test_colours_are_fixed_and_differ() -> None:
    colours = [label_colour(label_id) for label_id in range(40)]
    assert len(set(colours)) == 40
    assert all(len(colour) == 7 and colour == colour.lower() for colour in colours)


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    """Four labelled cases of two sessions each for two subjects, one unlabelled; two modalities in one 4D file."""
    root = tmp_path / "Task99"
    names = ["BRATS_1_a", "BRATS_1_b", "BRATS_2_a", "BRATS_2_b"]
    for seed, name in enumerate(names):
        save(root / "imagesTr" / f"{name}.nii.gz", seed, (*SHAPE, 2))
        save_label(root / "labelsTr" / f"{name}.nii.gz", 1, 2)
    save(root / "imagesTs" / "BRATS_9_a.nii.gz", 9, (*SHAPE, 2))
    dataset = {
        "name": "BRATS",
        "reference": "https://example.org",
        "licence": "CC-BY-SA 4.0",
        "modality": {"0": "FLAIR", "1": "T1w"},
        "labels": {"0": "background", "1": "oedema", "2": "enhancing/core"},
        "numTraining": 4,
        "numTest": 1,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
        "test": ["./imagesTs/BRATS_9_a.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root / "dataset.json"


def edit(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return path


def test_decathlon(decathlon: Path) -> None:
    manifest = import_msd(decathlon)
    assert (manifest.name, manifest.licence, manifest.source) == ("BRATS", "CC-BY-SA 4.0", "https://example.org")
    assert [modality.name for modality in manifest.modalities] == ["FLAIR", "T1w"]
    assert [label.name for label in manifest.labels] == ["background", "oedema", "enhancing_core"]
    first = manifest.cases[0]
    assert first.id == first.subject == "BRATS_1_a"
    assert first.images["T1w"].path == "imagesTr/BRATS_1_a.nii.gz"
    assert [first.images[name].channel for name in ("FLAIR", "T1w")] == [0, 1]
    item = case_items(manifest, "train", modalities=["T1w"])[0]
    stored = nib.load(item["image"][0]).get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(read_voxels(item["image"][0], channel=item["channels"][0]), stored[..., 1])


def test_decathlon_subjects_and_test_images(decathlon: Path) -> None:
    plan = SplitPlan(fractions=(0.5, 0.5, 0.0))
    manifest = import_msd(decathlon, case_pattern="{subject}_{session}", include_test=True, split=plan)
    split = {case.id: case.split for case in manifest.cases}
    assert split["BRATS_1_a"] == split["BRATS_1_b"] != split["BRATS_2_a"] == split["BRATS_2_b"]
    assert split["BRATS_9_a"] == "test"
    assert manifest.cases[-1].label is None


def test_decathlon_labels_can_be_chosen(decathlon: Path) -> None:
    manifest = import_msd(decathlon, labels=["1:whole=1+2"], name="other")
    assert manifest.label_values() == {0: 0, 1: 1, 2: 1}
    assert manifest.name == "other"


def test_one_modality_needs_no_channel(decathlon: Path) -> None:
    for seed, path in enumerate(sorted((decathlon.parent / "imagesTr").iterdir())):
        save(path, seed)
    manifest = import_msd(edit(decathlon, modality={"0": "CT"}))
    assert [(modality.name, modality.unit) for modality in manifest.modalities] == [("CT", "HU")]
    assert manifest.cases[0].images["CT"].channel is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"numTraining": 5}, ["numTraining", "declares 5", "4 were found"]),
        ({"modality": {"0": "FLAIR", "1": "T1w", "2": "T2w"}}, ["case BRATS_1_a", "2 channels", "names 3"]),
        ({"modality": {"1": "FLAIR"}}, ["key modality"]),
        ({"labels": {"0": "background", "1": "oedema"}}, ["case BRATS_1_a", "label", "2 (1 voxels)"]),
        ({"labels": {}}, ["key labels"]),
        ({"training": []}, ["key training"]),
        ({"training": [{"image": "./imagesTr/x.nii.gz"}], "numTraining": 1}, ["/training/0"]),
        ({"training": [{"image": "../x.nii.gz", "label": "y.nii.gz"}], "numTraining": 1}, ["/training/0", "../x"]),
        ({"training": [{"image": "x.mha", "label": "y.nii.gz"}], "numTraining": 1}, ["/training/0", "x.mha"]),
        ({"training": [{"image": "x.nii.gz", "label": "y.nii.gz"}], "numTraining": 1}, ["x.nii.gz", "does not exist"]),
    ],
)
def test_a_decathlon_task_that_contradicts_itself(decathlon: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        import_msd(edit(decathlon, **changes))
    for word in words:
        assert word in str(caught.value)


def test_what_a_data_set_does_not_state(decathlon: Path) -> None:
    edit(decathlon, licence="")
    assert import_msd(decathlon).licence == "not stated"
    assert import_msd(decathlon, licence="CC0").licence == "CC0"
    edit(decathlon, name="")
    with pytest.raises(UsageError, match="name"):
        import_msd(decathlon)


def test_a_case_pattern_that_does_not_fit_is_refused(decathlon: Path) -> None:
    with pytest.raises(UsageError, match="does not fit case 'BRATS_1_a'"):
        import_msd(decathlon, case_pattern="{subject}-{session}")


@pytest.fixture
def nnunet(tmp_path: Path) -> Path:
    root = tmp_path / "Dataset001_Brain"
    for k in range(1, 5):
        for channel in range(2):
            save(root / "imagesTr" / f"b_{k}_{channel:04d}.nii.gz", seed=10 * k + channel)
        save_label(root / "labelsTr" / f"b_{k}.nii.gz", 1, 2)
    for channel in range(2):
        save(root / "imagesTs" / f"b_9_{channel:04d}.nii.gz", seed=90 + channel)
    dataset = {
        "channel_names": {"0": "T1", "1": "CT"},
        "labels": {"background": 0, "anterior": 1, "posterior": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(dataset))
    return root


GIVEN = {"licence": "CC0", "source": "generated"}


def test_nnunet(nnunet: Path) -> None:
    manifest = import_nnunet(nnunet, **GIVEN)
    assert manifest.name == "Dataset001_Brain"
    assert [(modality.name, modality.unit) for modality in manifest.modalities] == [("T1", "a.u."), ("CT", "HU")]
    assert [label.name for label in manifest.labels] == ["background", "anterior", "posterior"]
    assert manifest.label_values() == {0: 0, 1: 1, 2: 2}
    assert [case.id for case in manifest.cases] == ["b_1", "b_2", "b_3", "b_4"]
    assert manifest.cases[0].images["CT"].path == "imagesTr/b_1_0001.nii.gz"
    assert manifest.cases[0].label is not None
    assert manifest.cases[0].label.path == "labelsTr/b_1.nii.gz"


def test_nnunet_test_images_on_request(nnunet: Path) -> None:
    manifest = import_nnunet(nnunet, include_test=True, split=SplitPlan(fractions=(0.75, 0.25, 0.0)), **GIVEN)
    assert [(case.id, case.label) for case in manifest.cases if case.split == "test"] == [("b_9", None)]


def test_the_older_table_of_nnunet_reads_the_same(nnunet: Path) -> None:
    new = import_nnunet(nnunet, **GIVEN)
    edit(
        nnunet / "dataset.json",
        channel_names={"0": "T1", "1": "CT"},
        labels={"0": "background", "1": "anterior", "2": "posterior"},
    )
    assert import_nnunet(nnunet, **GIVEN).digest == new.digest


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, ["label 'whole'", "region", "[1, 2]"]),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, ["'ignore'"]),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, ["'b'"]),
        ({"file_ending": ".mha"}, ["file_ending", ".mha"]),
        ({"file_ending": ".nii"}, ["no file ends in .nii"]),
        ({"channel_names": {"0": "T1"}}, ["case b_1", "[0, 1]", "0 to 0"]),
        ({"numTraining": 9}, ["declares 9"]),
        ({"dataset": {}}, ["key dataset"]),
    ],
)
def test_an_nnunet_data_set_that_contradicts_itself(nnunet: Path, changes: dict[str, Any], words: list[str]) -> None:
    edit(nnunet / "dataset.json", **changes)
    with pytest.raises(DataError) as caught:
        import_nnunet(nnunet, **GIVEN)
    for word in words:
        assert word in str(caught.value)


def test_regions_of_nnunet_with_labels_chosen(nnunet: Path) -> None:
    edit(nnunet / "dataset.json", labels={"background": 0, "whole": [1, 2]})
    assert import_nnunet(nnunet, labels=["1:whole=1+2"], **GIVEN).label_values() == {0: 0, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        ("imagesTr/b_2_0001.nii.gz", ["case b_2", "[0]"]),
        ("labelsTr/b_2.nii.gz", ["labelsTr/b_2.nii.gz", "case b_2", "does not exist"]),
        ("dataset.json", ["dataset.json"]),
    ],
)
def test_a_file_missing_from_nnunet_is_named(nnunet: Path, gone: str, words: list[str]) -> None:
    (nnunet / gone).unlink()
    with pytest.raises((DataError, UsageError)) as caught:
        import_nnunet(nnunet, **GIVEN)
    for word in words:
        assert word in str(caught.value)


def test_a_label_without_images_is_named(nnunet: Path) -> None:
    save_label(nnunet / "labelsTr" / "b_7.nii.gz", 1)
    with pytest.raises(DataError, match=r"imagesTr/b_7_0000\.nii\.gz \(case b_7\)"):
        import_nnunet(nnunet, **GIVEN)


def test_an_image_without_channel_number_is_named(nnunet: Path) -> None:
    save(nnunet / "imagesTr" / "b_7.nii.gz")
    with pytest.raises(DataError, match=r"b_7\.nii\.gz(.|\n)*no channel"):
        import_nnunet(nnunet, **GIVEN)
