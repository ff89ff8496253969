"""The contract of the weights decides which cohorts, cases and files fit; what does not is refused, never bent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.manifests import (
    Manifest,
    case_items,
    chosen_modalities,
    contract_labels,
    labels_of,
    pair_items,
    prediction_items,
    reference_items,
)
from pipelines.manifests.discover import items_from_path
from pipelines.manifests.model import Label
from pipelines.manifests.selection import contract_items, foreground_source
from transforms.errors import DataError, UsageError


@pytest.fixture
def contract(tiny_cohort: Manifest) -> dict[str, Any]:
    return {
        "modalities": ["flair", "t1"],
        "optional_modalities": [],
        "labels": contract_labels(tiny_cohort),
        "foreground": "mask",
    }


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def names_of(item: dict[str, Any]) -> list[str | None]:
    return [None if path is None else Path(path).name for path in item["image"]]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [("all", ["flair", "t1"]), ("t1", ["t1"]), (["t1", "flair"], ["t1", "flair"]), (("t1",), ["t1"])],
)
def test_modalities_in_the_wanted_order(tiny_cohort: Manifest, wanted: Any, chosen: list[str]) -> None:
    assert chosen_modalities(tiny_cohort, wanted) == chosen


@pytest.mark.parametrize(("wanted", "words"), [("flare", "'flair'"), (["t1", "t1"], "once"), ([], "once")])
def test_modalities_that_do_not_fit(tiny_cohort: Manifest, wanted: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        chosen_modalities(tiny_cohort, wanted)


def test_the_label_table_goes_through_the_contract_and_back(tiny_cohort: Manifest) -> None:
    assert labels_of({"labels": contract_labels(tiny_cohort)}) == list(tiny_cohort.labels)


def test_label_ids_with_a_gap_are_refused(tiny_cohort: Manifest) -> None:
    gap = replace(tiny_cohort, labels=(*tiny_cohort.labels, Label(5, "other", "#00ff00", (5,))))
    with pytest.raises(DataError, match=r"label ids \[0, 1, 5\]"):
        contract_labels(gap)


def test_the_truth_of_an_evaluation_stands_under_reference(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    (item,) = reference_items(tiny_cohort, "test", contract)
    assert item["case"] == "s4"
    assert Path(item["reference"]).name == "lesion.nii.gz"
    assert "label" not in item
    assert names_of(item) == ["flair.nii.gz", "t1.nii.gz"]


def test_evaluation_on_another_label_table_is_refused(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    renamed = [{**label, "name": "tumour"} if label["id"] else label for label in contract["labels"]]
    with pytest.raises(DataError, match=r"the weights were trained for.*tumour"):
        reference_items(tiny_cohort, "test", {**contract, "labels": renamed})


def test_evaluation_needs_cases_and_truths(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    without = replace(tiny_cohort, cases=tuple(replace(case, label=None) for case in tiny_cohort.cases))
    with pytest.raises(DataError, match="case s4: key label is missing in split test"):
        reference_items(without, "test", contract)
    no_test = replace(tiny_cohort, cases=tuple(case for case in tiny_cohort.cases if case.split != "test"))
    with pytest.raises(DataError, match="split test is empty"):
        reference_items(no_test, "test", contract)


def test_a_cohort_without_a_modality_of_the_weights_is_refused(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="modality 't2'"):
        reference_items(tiny_cohort, "test", {**contract, "modalities": ["flair", "t2"]})


def test_the_kind_of_foreground_belongs_to_the_contract(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    bare = replace(tiny_cohort, cases=tuple(replace(case, masks={}) for case in tiny_cohort.cases))
    mixed = replace(tiny_cohort, cases=(*tiny_cohort.cases[:4], bare.cases[4]))
    assert foreground_source(tiny_cohort) == "mask"
    assert foreground_source(bare) == "auto"
    with pytest.raises(DataError, match="case s4 has no mask"):
        foreground_source(mixed)
    with pytest.raises(DataError, match="case s4: key mask is missing"):
        contract_items(bare, "test", contract)
    assert "mask" not in contract_items(tiny_cohort, "test", {**contract, "foreground": "auto"})[0]


def test_prediction_takes_a_split_or_files(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    (item,) = prediction_items("", str(tiny_cohort.path), "test", contract)
    assert item["case"] == "s4"
    assert "label" not in item
    (same,) = prediction_items(tiny_cohort.root / "s4", "", "test", contract)
    assert names_of(same) == ["flair.nii.gz", "t1.nii.gz"]
    assert Path(same["mask"]).name == "brain.nii.gz"
    assert same["case"] == "s4"


def test_one_modality_makes_every_image_a_case(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.NII", "a_seg.nii.gz", "notes.txt", "c_flair.nii.gz", "d_0000.nii.gz")
    items = items_from_path(tmp_path, ["flair"])
    assert [item["case"] for item in items] == ["a", "b", "c", "d"]


def test_several_modalities_by_name_by_index_and_by_folder(tmp_path: Path) -> None:
    touch(tmp_path, "p1/FLAIR.nii.gz", "p1/t1.nii.gz", "p1/label.nii.gz", "p2-flair.nii", "p2-t1.nii")
    touch(tmp_path, "p3_0000.nii.gz", "p3_0001.nii.gz")
    items = items_from_path(tmp_path, ["flair", "t1"])
    assert [(item["case"], *names_of(item)) for item in items] == [
        ("p1", "FLAIR.nii.gz", "t1.nii.gz"),
        ("p2", "p2-flair.nii", "p2-t1.nii"),
        ("p3", "p3_0000.nii.gz", "p3_0001.nii.gz"),
    ]


def test_a_single_file(tmp_path: Path) -> None:
    touch(tmp_path, "scan.nii.gz", "other.nii.gz")
    (item,) = items_from_path(tmp_path / "scan.nii.gz", ["flair"])
    assert item == {"case": "scan", "image": [str(tmp_path / "scan.nii.gz")]}


def test_an_optional_modality_may_be_missing_a_required_one_not(tmp_path: Path) -> None:
    touch(tmp_path, "p1_flair.nii.gz")
    (item,) = items_from_path(tmp_path, ["flair", "t1"], optional=["t1"])
    assert names_of(item) == ["p1_flair.nii.gz", None]
    with pytest.raises(DataError, match="case p1: modality t1 is missing"):
        items_from_path(tmp_path, ["flair", "t1"])


def test_two_files_for_one_place_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "p1_flair.nii.gz", "p1_flair.nii")
    with pytest.raises(UsageError, match="case p1: two files for flair"):
        items_from_path(tmp_path, ["flair"])


@pytest.mark.parametrize(
    ("name", "words"), [("none.nii.gz", "no such file"), ("scan.mha", "not a NIfTI file"), ("empty", "no image found")]
)
def test_inputs_without_an_image(tmp_path: Path, name: str, words: str) -> None:
    touch(tmp_path, "scan.mha", "empty/readme.txt")
    with pytest.raises(DataError, match=words):
        items_from_path(tmp_path / name, ["flair"])


def test_items_are_what_load_takes(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    from transforms import LoadCased

    (item,) = reference_items(tiny_cohort, "test", contract)
    case = LoadCased(modalities=contract["modalities"])(item)
    assert case["image"].shape == (2, 20, 22, 24)
    assert sorted(np.unique(case["reference"])) == [0, 1]


def with_bone(cohort: Manifest, *without: str) -> Manifest:
    """The cohort with a mask of the role bone (the lesion's file) in every case but those named."""
    cases = [
        case if case.id in without or case.label is None else replace(case, masks={**case.masks, "bone": case.label})
        for case in cohort.cases
    ]
    return replace(cohort, cases=tuple(cases))


def test_masks_come_under_the_keys_asked_for(tiny_cohort: Manifest) -> None:
    cohort = with_bone(tiny_cohort)
    (alone,) = case_items(cohort, "test")
    assert Path(alone["mask"]).name == "brain.nii.gz"
    assert "bone" not in alone
    (both,) = case_items(cohort, "test", masks={"head": "brain", "bone": "bone"})
    assert [Path(both[key]).name for key in ("head", "bone")] == ["brain.nii.gz", "lesion.nii.gz"]
    assert "mask" not in both
    masks, label = cohort.cases[4].masks, cohort.cases[4].label
    assert label is not None
    assert {key: both["digests"][key] for key in ("head", "bone")} == {
        "head": masks["brain"].sha256,
        "bone": label.sha256,
    }
    (none,) = case_items(cohort, "test", masks={})
    assert not {"mask", "head", "bone"} & set(none)


def test_a_mask_that_a_case_does_not_have_is_left_out(tiny_cohort: Manifest) -> None:
    items = case_items(with_bone(tiny_cohort, "s1"), "train", masks={"bone": "bone"})
    assert ["bone" in item for item in items] == [True, False, True]
    assert ["bone" in item["digests"] for item in items] == [True, False, True]


def test_pairs_bring_the_masks_that_there_are(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    pair = {**contract, "modalities": ["t1", "flair"], "foreground": "auto"}
    (item,) = pair_items(with_bone(tiny_cohort), "test", pair)
    assert names_of(item) == ["t1.nii.gz", "flair.nii.gz"]
    assert [Path(item[key]).name for key in ("mask", "bone", "label")] == [
        "brain.nii.gz",
        "lesion.nii.gz",
        "lesion.nii.gz",
    ]
    bare = replace(tiny_cohort, cases=tuple(replace(case, masks={}) for case in tiny_cohort.cases))
    (item,) = pair_items(bare, "test", pair)
    assert not {"mask", "bone"} & set(item)


def test_pairs_of_a_fold(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="stores no folds"):
        pair_items(tiny_cohort, "validation", contract, fold=0)


def test_no_pairs_are_refused(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="modality 'ct'"):
        pair_items(tiny_cohort, "test", {**contract, "modalities": ["t1", "ct"]})
    no_test = replace(tiny_cohort, cases=tuple(case for case in tiny_cohort.cases if case.split != "test"))
    with pytest.raises(DataError, match="split test is empty"):
        pair_items(no_test, "test", contract)


def test_fusing_new_pairs_needs_no_masks_and_takes_none(tiny_cohort: Manifest, contract: dict[str, Any]) -> None:
    pair = {**contract, "foreground": "auto"}
    for source, manifest in (("", str(tiny_cohort.path)), (tiny_cohort.root / "s4", "")):
        (item,) = prediction_items(source, manifest, "test", pair)
        assert not {"mask", "bone", "label"} & set(item)
