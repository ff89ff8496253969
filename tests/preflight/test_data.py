"""Masks and files: the judging functions on numbers worked out by hand, and the proofs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from planted import Proof
from proof_data import CASES, FILES, MASKS, PROOFS, with_a_corner_of_brain, with_automatic_masks
from proof_geometry import prepared
from proof_intensity import findings, fusion_run, lesion_run, scratch

from pipelines.manifests import LeftOut
from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.data import (
    Tally,
    Volumes,
    brain_findings,
    file_findings,
    left_out_findings,
    share_findings,
    tally_findings,
)

LIMITS = MASKS.limits


def shares(*points: float) -> list[Volumes]:
    return [Volumes(f"c{i}", f"s{i}", "foreground", 100.0, point / 100) for i, point in enumerate(points)]


@pytest.mark.parametrize(("spread", "fires"), [(0.49, True), (0.51, False)])
def test_a_share_that_never_changes_is_a_quantile(spread: float, fires: bool) -> None:
    # five subjects at 15 - spread, five at 15 + spread: the standard deviation is `spread` points
    some = shares(*[15 - spread, 15 + spread] * 5)
    assert bool(share_findings(some, LIMITS)) is fires


def test_nine_subjects_are_too_few_and_contrasts_of_one_are_one() -> None:
    assert not share_findings(shares(*[15.0] * 9), LIMITS)
    one_subject = [replace(each, subject="s") for each in shares(*[15.0] * 12)]
    assert not share_findings(one_subject, LIMITS)
    assert share_findings(shares(*[15.0] * 10), LIMITS)


def test_masks_of_everything_or_of_one_shape_are_no_quantile() -> None:
    assert not share_findings(shares(*[100.0] * 12), LIMITS)
    assert not share_findings(shares(*[15.0] * 12), LIMITS, {"foreground": 0.97})
    assert share_findings(shares(*[15.0] * 12), LIMITS, {"foreground": 0.6})


@pytest.mark.parametrize(("ml", "fires"), [(699, True), (701, False), (2199, False), (2201, True)])
def test_a_brain_has_the_volume_of_a_brain(ml: float, fires: bool) -> None:
    assert bool(brain_findings([Volumes("a", "a", "brain", ml)], LIMITS)) is fires


def test_there_is_less_bone_than_brain() -> None:
    some = [Volumes("a", "a", "brain", 1300), Volumes("a", "a", "bone", 1299)]
    assert not brain_findings(some, LIMITS)
    (found,) = brain_findings([*some[:1], Volumes("a", "a", "bone", 1301)], LIMITS)
    assert "bone" in found.what
    assert not brain_findings([Volumes("a", "a", "bone", 1301)], LIMITS)  # a case without a brain mask says nothing


def test_a_part_of_a_brain_is_found() -> None:
    few = prepared(with_automatic_masks(fusion_run()), with_a_corner_of_brain)
    brain, bone = findings(MASKS, few)
    assert brain.measured.startswith("64 mL")
    assert "larger" in bone.what


def test_a_given_mask_is_not_judged() -> None:
    assert not findings(MASKS, prepared(fusion_run(), with_a_corner_of_brain))


def test_dropped_and_added_cases_are_named() -> None:
    assert not tally_findings([Tally("train", ("a", "b"), ("a", "b"))])
    (dropped,) = tally_findings([Tally("train", ("a", "b", "c"), ("a", "c"))])
    assert dropped.cases == ("b",)
    (added,) = tally_findings([Tally("validation", ("a",), ("a", "x"))])
    assert added.cases == ("x",)
    assert tally_findings([Tally("train", ("a",), ("a", "a"))])  # one case twice


def test_files_are_named() -> None:
    assert not file_findings([], [], 4)
    absent, unreadable = file_findings([("a", "a/t1.nii.gz")], [("b", "b/t1.nii.gz", "10 bytes instead of 20")], 4)
    assert absent.what == "a/t1.nii.gz is missing"
    assert absent.evidence == {"files": ["a/t1.nii.gz"]}
    assert "10 bytes instead of 20" in unreadable.measured


def test_cases_that_the_import_left_out_are_reported_and_stop_nothing() -> None:
    assert not left_out_findings({})
    cohort = replace(lesion_run().need("cohort"), left_out=(LeftOut("x", ("label",)),))
    (found,) = findings(CASES, replace(lesion_run(), cohort=cohort))
    assert (found.severity, found.cases) == ("warn", ("x",))


def test_folds_count_as_the_run_uses_them() -> None:
    run = lesion_run()
    assert findings(CASES, replace(run, config={**run.config, "fold": None})) == []


def test_a_file_that_was_cut_short_is_found() -> None:
    run = lesion_run()
    cohort = run.need("cohort")
    case = cohort.cases[0]
    longer = replace(case, label=replace(case.label, size=case.label.size + 1))
    (found,) = findings(FILES, replace(run, cohort=replace(cohort, cases=(longer, *cohort.cases[1:]))))
    assert "unreadable" in found.what
    gone = replace(cohort, root=scratch("nowhere"))
    (found,) = findings(FILES, replace(run, cohort=gone))
    assert len(found.cases) == 4


def test_a_run_without_its_pieces_says_so() -> None:
    for rule in (MASKS, CASES, FILES):
        with pytest.raises(CannotRun):
            findings(rule, Inspection("segmentation"))
    case = {"case": "a", "mask": np.ones((1, 4, 4, 4))}
    with pytest.raises(CannotRun, match="affine"):
        findings(MASKS, Inspection("fusion", train=SimpleNamespace(data=[], cases=[case])))


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_the_planted_failure_is_found_and_the_healthy_run_is_not(proof: Proof) -> None:
    planted = proof.planted()
    assert {(finding.rule, finding.severity) for finding in planted} == {(proof.rule, proof.severity)}
    assert list(proof.healthy()) == []
