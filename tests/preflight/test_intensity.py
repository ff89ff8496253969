"""Intensities: the judging functions on numbers worked out by hand, the tools of chains, and the proofs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    NormalizeIntensityd,
    RandAffined,
    RandFlipd,
    RandGaussianNoised,
    ScaleIntensityd,
)
from planted import Proof
from proof_intensity import PROOFS, STAGES, changed, findings, fusion_run, lesion_run

from pipelines.preflight import CannotRun, Finding, Inspection
from pipelines.preflight.chains import centred, declared_z_score, steps_of, thinned, without_randomness
from pipelines.preflight.distributions import CROWD, Distribution, Region, distribution, region
from pipelines.preflight.intensity import (
    RULES,
    chain_findings,
    check_scale,
    region_findings,
    scale_findings,
)
from pipelines.preflight.stages import stage_findings
from transforms import DegradePaird, NormalizeIntensityInMaskd

SCALE, CHAINS, _, REGIONS = (rule.limits for rule in RULES)


def seen(
    channel: str, width: float, mean: float = 0.0, std: float = 1.0, case: str = "a", largest: float = 3.0
) -> Distribution:
    return Distribution(case, channel, -width / 2, width / 2, mean, std, largest)


def whats(found: Sequence[Finding]) -> list[str]:
    return [finding.what for finding in found]


def test_a_distribution_is_that_of_its_voxels() -> None:
    # 0 .. 100: percentiles 1 and 99 are 1 and 99, the mean 50
    d = distribution(np.arange(101, dtype=np.float32), "a", "flair")
    assert (d.low, d.high, d.mean, d.largest, d.width) == (1, 99, 50, 100, 98)
    assert d.std == pytest.approx(np.sqrt((101**2 - 1) / 12))


@pytest.mark.parametrize(("ratio", "fires"), [(1.99, False), (2.01, True)])
def test_widths_may_differ_by_a_factor_of_two(ratio: float, fires: bool) -> None:
    found = scale_findings([seen("mri", 1.0), seen("ct", ratio)], SCALE)
    assert whats(found) == (["inputs ct and mri are on different scales"] if fires else [])


def test_a_modality_counts_by_its_widest_window() -> None:
    some = [seen("mri", 4.0), seen("ct 40/80", 4.0), seen("ct 600/2800", 0.5)]
    assert not scale_findings(some, SCALE, modality_of={"ct 40/80": "ct", "ct 600/2800": "ct"})
    assert scale_findings(some, SCALE)


def test_a_modality_that_one_case_lacks_is_no_finding_but_one_that_all_lack_is() -> None:
    lacking = Distribution("b", "t1", 0, 0, 0, 0, 0)
    assert not scale_findings([seen("t1", 4.0), lacking, seen("t2", 4.0)], SCALE)
    assert whats(scale_findings([lacking, seen("t2", 4.0)], SCALE)) == [
        "input t1 is constant in every case that was looked at"
    ]


@pytest.mark.parametrize(
    ("mean", "std", "fires"), [(0.49, 1, False), (-0.51, 1, True), (0, 0.51, False), (0, 0.49, True), (0, 2.1, True)]
)
def test_a_declared_z_score_has_mean_0_and_deviation_1(mean: float, std: float, fires: bool) -> None:
    some = [seen("flair", 4.0, mean, std)]
    assert bool(scale_findings(some, SCALE, z_score=True)) is fires
    assert not scale_findings(some, SCALE, z_score=False)


def test_one_extreme_value_in_one_case_is_found_with_its_case() -> None:
    some = [seen("flair", 4.0, case="a"), seen("flair", 4.0, case="b", largest=10.1)]
    (found,) = scale_findings(some, SCALE)
    assert found.cases == ("b",)
    assert not scale_findings([seen("flair", 4.0, largest=10.0)], SCALE)


@pytest.mark.parametrize(("factor", "shift", "fires"), [(1.24, 0, False), (1.26, 0, True), (0.79, 0, True),
                                                        (1, 0.24, False), (1, -0.26, True)])  # fmt: skip
def test_both_chains_give_the_same_widths_and_means(factor: float, shift: float, fires: bool) -> None:
    # validation: width 4, mean 1, deviation 2; so a mean of 1 + 2 shift is moved by `shift` deviations
    ours, theirs = [seen("t1", 4 * factor, 1 + 2 * shift, 2)], [seen("t1", 4, 1, 2)]
    assert bool(chain_findings(ours, theirs, CHAINS)) is fires


def test_the_worst_case_of_a_chain_comes_first() -> None:
    ours = [seen("t1", 4, mean, 1, case) for case, mean in (("a", 1.0), ("b", 9.0), ("c", 2.0))]
    theirs = [seen("t1", 4, 0, 1, case) for case in "abc"]
    assert chain_findings(ours, theirs, CHAINS)[0].cases == ("b", "c", "a")


def test_statistics_of_the_same_stage_are_no_finding() -> None:
    assert not stage_findings([], ("Measure", "Normalize"), "training", ("d1", "d1"))
    (found,) = stage_findings(["N4"], ("Measure", "Normalize"), "training", ("d1", "d2"))
    assert "N4" in found.what
    assert found.rule == "R03"


def test_a_region_is_measured_against_the_limits_of_its_channel() -> None:
    # 2 of 4 voxels at the upper limit; deviation of (0, 1, 4, 4) is 1.785, the range 4
    r = region(np.array([0.5, 1.0, 4.0, 4.0]), (0.0, 4.0), "a", "bone", "ct")
    assert (r.voxels, r.at_limit) == (4, 0.5)
    assert r.spread == pytest.approx(np.std([0.5, 1, 4, 4]) / 4)


@pytest.mark.parametrize(("share", "at_limit"), [(CROWD / 2, 0.0), (2 * CROWD, 1.0)])
def test_a_lesion_alone_at_a_limit_is_not_saturated(share: float, at_limit: float) -> None:
    others = np.where(np.arange(1000) < 1000 * share, 4.0, 1.0)
    assert region(np.full(9, 4.0), (0.0, 4.0), "a", "lesion", "flair", others=others).at_limit == at_limit


@pytest.mark.parametrize(("saturated", "spread", "fires"), [(0.19, 0.2, False), (0.21, 0.2, True), (0.0, 0.02, True)])
def test_a_region_that_is_compared_needs_contrast(saturated: float, spread: float, fires: bool) -> None:
    limits = {"saturated": 0.2, "spread": 0.1}
    assert bool(region_findings([Region("a", "bone", "ct", 9, saturated, spread, True)], limits)) is fires


def test_a_region_may_be_saturated_in_all_inputs_but_one() -> None:
    soft, bone = Region("a", "bone", "ct soft", 9, 1.0, 0.0), Region("a", "bone", "ct bone", 9, 0.0, 0.2)
    mri = Region("a", "bone", "mri", 9, 0.0, 0.2)
    assert not region_findings([soft, bone], REGIONS)
    assert region_findings([soft], REGIONS)
    assert not region_findings([soft, mri], REGIONS)
    assert region_findings([soft, mri], REGIONS, {"bone": ["ct soft"]})  # the MRI shows no structure of bone


def test_cases_are_pooled_by_their_voxels() -> None:
    # 10 of 100 voxels saturated in one case, all of 5 in another: 15 of 105 = 14 %
    some = [Region("a", "lesion", "t2", 100, 0.1, 0.1), Region("b", "lesion", "t2", 5, 1.0, 0.0)]
    assert not region_findings(some, REGIONS)


def test_a_chain_with_its_randomness_off_changes_nothing() -> None:
    chain = Compose(
        [RandFlipd("image", prob=1.0), Compose([RandGaussianNoised("image", prob=0.7)]), RandAffined("image", prob=0.4)]
    )
    image = torch.arange(24.0).reshape(1, 4, 6)
    assert torch.equal(torch.as_tensor(without_randomness(chain)({"image": image})["image"]), image)
    assert [step.prob for step in steps_of(chain)] == [1.0, 0.7, 0.4]  # the chain itself is as it was


def test_a_degradation_on_purpose_is_off_too() -> None:
    (step,) = steps_of(without_randomness(Compose([DegradePaird("image", severity=2)])))
    assert step.severity.ct_noise_hu == 0


def test_a_thinned_case_keeps_its_physical_size_and_the_parity_of_the_crop() -> None:
    image = np.zeros((1, 200, 200, 201), np.float32)
    case = {"image": image, "image_affine": np.diag([1.0, 1, 2, 1]), "case": "a", "stats": np.ones((2, 2))}
    thin = thinned(case, parity_of=(64, 64, 9))
    # 8 million voxels, 200 000 wanted: every third; 67 x 67 x 67, even along the first two axes for the crop
    assert tuple(thin["image"].shape) == (1, 66, 66, 67)
    assert isinstance(thin["image"], MetaTensor)
    assert np.diag(thin["image"].affine.numpy()).tolist() == [3, 3, 6, 1]
    assert thin["stats"].shape == (2, 2)


def test_the_middle_is_cut_or_filled_with_zeros() -> None:
    # 1 2 3 4 5 -> 2 3 4, and 0 1 2 3 4 5 0
    row = np.arange(1, 6)[None]
    assert centred(row, (3,)).tolist() == [[2, 3, 4]]
    assert centred(row, (7,)).tolist() == [[0, 1, 2, 3, 4, 5, 0]]


@pytest.mark.parametrize(
    ("steps", "over"),
    [
        ([NormalizeIntensityInMaskd("image")], "foreground"),
        ([NormalizeIntensityd("image")], "all"),
        ([NormalizeIntensityd("image", nonzero=True)], "foreground"),
        ([NormalizeIntensityInMaskd("image"), ScaleIntensityd("image")], ""),
    ],
)
def test_the_last_normalisation_is_what_is_declared(steps: list[Any], over: str) -> None:
    assert declared_z_score(Compose(steps)) == over


def test_scaling_after_the_statistics_is_found_and_a_flip_is_not() -> None:
    run = lesion_run()
    preparation = steps_of(run.train.preparation)
    still = changed(run, "train", preparation=Compose([*preparation, RandFlipd("image"), RandGaussianNoised("image")]))
    assert not findings(STAGES, still)
    scaled = changed(run, "train", preparation=Compose([*preparation, ScaleIntensityd("image", factor=0.5)]))
    assert {finding.rule for finding in findings(STAGES, scaled)} == {"R03"}


def test_a_validation_that_degrades_behind_its_scale_is_found() -> None:
    run = fusion_run()
    steps = [step for step in steps_of(run.validation.transform) if type(step).__name__ != "MeasurePaird"]
    (found,) = findings(STAGES, changed(run, "validation", transform=Compose(steps)))
    assert "DegradePaird" in found.what


def test_a_run_without_its_pieces_says_so() -> None:
    with pytest.raises(CannotRun, match="validation"):
        check_scale(Inspection("segmentation"), SCALE)
    with pytest.raises(CannotRun, match="preparation"):
        findings(STAGES, changed(lesion_run(), "train", preparation=None))


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_the_planted_failure_is_found_and_the_healthy_run_is_not(proof: Proof) -> None:
    planted = proof.planted()
    assert {(finding.rule, finding.severity) for finding in planted} == {(proof.rule, proof.severity)}
    assert list(proof.healthy()) == []
