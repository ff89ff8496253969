"""Leaks between the parts of a split: by hand, and planted in the cohort of the lesion bundle."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parent))
from planted import Proof
from proof_labels import cohort
from proof_network import lesion
from proof_splits import PROOFS, same_file, same_subject, same_voxels, splits

from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.label_counts import Tally
from pipelines.preflight.splits import (
    Place,
    check_compared,
    compared_on_other_splits,
    content_digest,
    files_in_two_parts,
    missing_classes,
    places_of,
    split_digest,
    subjects_in_two_parts,
    voxels_in_two_parts,
)


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_a_planted_failure_is_found_and_a_healthy_run_passes(proof: Proof) -> None:
    planted = proof.planted()
    assert {(finding.rule, finding.severity) for finding in planted} == {("R13", "error")}
    assert proof.healthy() == []


@pytest.mark.parametrize(
    ("run", "name", "words"),
    [
        (same_subject, "subjects and files", "one subject is"),
        (same_file, "subjects and files", "image file flair"),
        (same_voxels, "voxels", "content of the image"),
    ],
)
def test_each_leak_is_named_with_its_cases(run: Callable[[], Inspection], name: str, words: str) -> None:
    (finding,) = splits(run(), name)
    assert finding.what.startswith(words)
    assert "is in train" in finding.what
    assert "in validation" in finding.what
    assert len(finding.cases) == 2


def test_a_file_stored_again_is_seen_by_its_voxels_alone() -> None:
    assert splits(same_voxels(), "subjects and files") == []


# --- by hand: a and b are contrasts of one subject, c is another subject

A, B = Place("a", "s1", "train", {"t1": "11"}), Place("b", "s1", "train", {"t1": "22"})
C = Place("c", "s2", "validation", {"t1": "33"})


def test_a_subject_may_have_several_cases_in_one_part() -> None:
    assert subjects_in_two_parts([A, B, C]) == []
    (finding,) = subjects_in_two_parts([A, replace(B, part="test"), C])
    assert finding.what == "one subject is in train (case a) and in test (case b)"
    assert finding.cases == ("a", "b")
    assert len(subjects_in_two_parts([A, replace(C, subject=" S1")])) == 1


def test_a_file_may_stand_twice_in_one_part() -> None:
    assert files_in_two_parts([A, replace(B, images={"t1": "11"}), C]) == []
    assert len(files_in_two_parts([A, replace(C, images={"t2": "11"})])) == 1


def test_voxels_are_compared_where_they_are_known() -> None:
    assert voxels_in_two_parts([A, B, C], {"a": "x", "b": "x", "c": "y"}) == []
    assert voxels_in_two_parts([A, B, C], {"a": "x", "b": "x"}) == []
    assert voxels_in_two_parts([A, B, C], {"a": "x", "c": "x"})[0].cases == ("a", "c")


def test_the_digest_of_voxels_sees_shape_and_values() -> None:
    image = np.zeros((2, 40, 40, 40), np.float32)
    noisy = image + np.random.default_rng(0).normal(size=image.shape).astype(np.float32)
    assert content_digest(image) == content_digest(image.copy())
    assert len({content_digest(one) for one in (image, noisy, image[:1], image[:, :, :, :39])}) == 4


def test_folds_move_cases_between_training_and_validation() -> None:
    folded = replace(cohort(), cases=tuple(replace(c, fold=i % 2) for i, c in enumerate(cohort().cases)))
    first, second = places_of(folded, fold=0), places_of(folded, fold=1)
    for case, one, other in zip(folded.cases, first, second, strict=True):
        parts = {one.part, other.part}
        assert parts == ({"test"} if case.split == "test" else {"train", "validation"})
    assert split_digest(folded, 0) != split_digest(folded, 1)
    assert split_digest(folded) == split_digest(replace(cohort(), name="other", licence="other"))


def test_a_class_missing_from_one_part() -> None:
    has, lacks, unseen = Tally("a", {1: 5}, 100), Tally("b", {1: 0}, 100), Tally("c", {1: 5}, 100, frozenset([2]))
    names = {1: "lesion"}
    assert missing_classes({"train": [has, lacks], "validation": [has]}, names) == []
    assert missing_classes({"train": [lacks], "validation": [lacks]}, names) == []  # R05 says that it is nowhere
    assert missing_classes({"train": [has], "validation": []}, names) == []  # there is no validation
    for validation in (lacks, unseen):
        (finding,) = missing_classes({"train": [has], "validation": [validation]}, names)
        assert finding.what == "class 1 (lesion) is missing from validation"
        assert finding.measured == "train: 1 cases, validation: 0 cases"


def test_runs_on_other_splits() -> None:
    assert compared_on_other_splits({"this run": "aa", "b": "aa"}) == []
    (finding,) = compared_on_other_splits({"this run": "aa", "b": "aa", "c": "bb"})
    assert finding.what == "this run is compared with c, which had another split"
    assert finding.source == "configuration"


def test_compared_runs_are_read_from_their_results(tmp_path: Path) -> None:
    with pytest.raises(CannotRun, match="compared with no other"):
        check_compared(lesion(), {})
    against = replace(lesion(), config={"compare_with": [str(tmp_path)]})
    with pytest.raises(CannotRun, match="does not say"):
        check_compared(against, {})
    (tmp_path / "summary.json").write_text(json.dumps({"source": {"manifest_digest": cohort().digest}}))
    assert check_compared(against, {}) == []
    (tmp_path / "summary.json").write_text(json.dumps({"source": {"manifest_digest": "other"}}))
    assert len(check_compared(against, {})) == 1
