"""A cohort in numbers, and what they suggest: hand-derived cases, and the memory against what autograd really keeps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipelines.manifests import Manifest
from pipelines.networks import plan_unet, segmentation_network
from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.fingerprint import (
    CaseFigures,
    Fingerprint,
    Grid,
    case_figures,
    figures_by_name,
    fingerprint_of,
    grid_of,
    outliers,
    robust_z,
    sampled_inside,
    structures,
)
from pipelines.preflight.planner import (
    USED_SHARE,
    Plan,
    Proposal,
    Setting,
    batch_for,
    kept_for_backward,
    needed_gb,
    patch_for,
    plan_for,
    spacing_for,
    valid_patch,
)

LABELS = [{"id": 0, "name": "background", "colour": "#000000"}, {"id": 1, "name": "lesion", "colour": "#ff0000"}]
CONTRACT = {
    "modalities": ["flair"],
    "labels": LABELS,
    "dimensions": 3,
    "spacing": [1.0, 1.0, 1.0],
    "patch_size": [64, 64, 64],
    "filters": [8, 16, 32],
}


def network(spacing: object, patch: object) -> nn.Module:
    return segmentation_network(3, 1, 2, spacing, patch, None)  # type: ignore[arg-type]


VOLUMES = Setting(3, 1, network)


def figures(case: str, extent: tuple[float, ...], volume: float = 1.0, split: str = "train") -> CaseFigures:
    return CaseFigures(case, split, extent, 1000.0, {}, {"lesion": volume}, {"lesion": 1}, {"lesion": volume})


def cohort_of(extents: list[tuple[float, ...]], spacing: tuple[float, ...] = (1.0, 1.0, 1.0)) -> Fingerprint:
    cases = tuple(figures(f"c{number}", extent) for number, extent in enumerate(extents))
    grids = tuple(Grid(case.case, "train", (200, 200, 200), spacing) for case in cases)
    return Fingerprint(grids, cases, tuple(outliers(figures_by_name(grids, cases))))


def inspection_of(task: str = "segmentation", **contract: object) -> Inspection:
    return Inspection(task, contract={**CONTRACT, **contract}, config={"batch_size": 2})


# --- a case


def test_a_case_in_numbers() -> None:
    # 4 x 4 x 2 voxels of 1 x 2 x 5 mm = 10 mm3; foreground: the first two rows (16 voxels), 100 there, 900 outside
    #   label, first slice   1 . . .      face-connected: {(0,0)}, {(2,2), (2,3)}: 2 parts, 3 voxels, 0.03 mL
    #                        . . . .      the smallest part has 1 voxel
    #                        . . 1 1
    image = np.full((1, 4, 4, 2), 900.0)
    image[:, :2] = 100.0
    foreground = (image < 500).astype(np.uint8)
    label = np.zeros((1, 4, 4, 2), np.uint8)
    label[0, 0, 0, 0] = label[0, 2, 2, 0] = label[0, 2, 3, 0] = 1
    case = {"case": "a", "image": image, "foreground": foreground, "label": label}
    got = case_figures({**case, "image_affine": np.diag([1.0, 2.0, 5.0, 1.0])}, "train", ["flair"], {1: "lesion"})
    assert got.extent_mm == (4.0, 8.0, 10.0)
    assert got.foreground_ml == pytest.approx(0.16)
    assert (got.intensity["flair"].median, got.intensity["flair"].sd) == (100.0, 0.0)
    assert got.volume_ml["lesion"] == pytest.approx(0.03)
    assert got.components == {"lesion": 2}
    assert got.smallest_ml["lesion"] == pytest.approx(0.01)


def test_corners_do_not_connect_and_an_absent_label_has_no_smallest_part() -> None:
    label = np.array([[1, 0], [0, 1]])
    volume, count, smallest = structures(label, {1: "a", 2: "b"}, 0.5)
    assert (volume, count, smallest) == ({"a": 1.0, "b": 0.0}, {"a": 2, "b": 0}, {"a": 0.5})


def test_sampling_keeps_the_percentiles_of_a_large_case() -> None:
    # a ramp along every axis: percentiles of the sample against those of all voxels
    ramp = sum(np.meshgrid(*[np.arange(n, dtype=np.float32) for n in (96, 80, 64)], indexing="ij"))[None]
    sampled = sampled_inside(ramp, np.ones(ramp.shape, np.uint8), most=20_000)
    assert sampled.shape[1] <= 40_000
    want = np.percentile(ramp, [0.5, 50, 99.5])
    assert np.percentile(sampled, [0.5, 50, 99.5]) == pytest.approx(want, abs=0.02 * float(np.ptp(ramp)))


def test_axes_of_a_grid_are_those_of_the_body(tmp_path: Path, tiny_cohort: Manifest) -> None:
    # file axes: superior, right, anterior; the affine sends file axis 0 to z, 1 to x, 2 to y
    affine = np.array([[0, 2.0, 0, 0], [0, 0, 3.0, 0], [5.0, 0, 0, 0], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.zeros((4, 6, 8), np.float32), affine), tmp_path / "a.nii.gz")
    entry = replace(tiny_cohort.cases[0].images["flair"], path="a.nii.gz")
    case = replace(tiny_cohort.cases[0], images={"flair": entry}, shape=(4, 6, 8), spacing=(5.0, 2.0, 3.0))
    grid = grid_of(case, replace(tiny_cohort, root=tmp_path))
    assert (grid.shape, grid.spacing_mm) == ((6, 8, 4), (2.0, 3.0, 5.0))


def test_a_grid_without_a_readable_header_is_that_of_the_manifest(tiny_cohort: Manifest, tmp_path: Path) -> None:
    grid = grid_of(tiny_cohort.cases[0], replace(tiny_cohort, root=tmp_path))
    assert (grid.shape, grid.spacing_mm) == ((20, 22, 24), (2.0, 2.0, 2.0))


def test_a_bundle_without_a_cohort_cannot_be_described() -> None:
    with pytest.raises(CannotRun, match="cohort"):
        fingerprint_of(Inspection("segmentation"))


# --- outliers


def test_robust_z_of_a_hand_derived_case() -> None:
    # 1 2 3 4 100: median 3, absolute deviations 2 1 0 1 97, MAD 1; (100 - 3) / 1.4826
    assert robust_z(np.array([1.0, 2.0, 3.0, 4.0, 100.0]))[-1] == pytest.approx(97 / 1.4826)


def test_where_most_are_equal_the_mean_deviation_stands_in() -> None:
    # nine of 1 mm, one of 3 mm: MAD 0, mean absolute deviation 0.2; 2 / (1.2533 * 0.2) = 7.98
    assert robust_z(np.array([1.0] * 9 + [3.0]))[-1] == pytest.approx(7.98, abs=0.01)


def test_a_difference_of_a_few_percent_is_not_far() -> None:
    assert not robust_z(np.array([200.0] * 9 + [208.0])).any()


def test_fewer_than_five_cases_have_no_outlier() -> None:
    assert outliers({"x": {"a": 1.0, "b": 1.1, "c": 0.9, "d": 1000.0}}) == []
    assert [each.case for each in outliers({"x": {"a": 1.0, "b": 1.1, "c": 0.9, "e": 1.2, "d": 1000.0}})] == ["d"]


@given(st.lists(st.floats(50, 150), min_size=5, max_size=40), st.floats(0.1, 1000.0))
@settings(deadline=None, max_examples=50)
def test_robust_z_does_not_know_the_unit(values: list[float], factor: float) -> None:
    assert robust_z(np.array(values) * factor) == pytest.approx(robust_z(np.array(values)), rel=1e-6, abs=1e-6)


def test_volumes_are_compared_by_their_logarithm() -> None:
    # 0.1 to 10 mL are usual lesion loads, however skew; a load of 0 has no logarithm and does not enter
    table = figures_by_name([], [figures(f"c{n}", (1.0,), ml) for n, ml in enumerate((0.1, 0.3, 1.0, 3.0, 10.0, 0.0))])
    assert len(table["lesion: log10 of mL"]) == 5
    assert not outliers({"volume": table["lesion: log10 of mL"]})


# --- spacing


def test_spacing_is_the_median_per_axis() -> None:
    grids = [Grid(str(n), "train", (9, 9, 9), (mm, 1.0, 2.0)) for n, mm in enumerate((0.8, 1.0, 1.4))]
    spacing, reason = spacing_for(grids)
    assert spacing == [1.0, 1.0, 2.0]
    assert "0.8 x 1 x 2 to 1.4 x 1 x 2 mm" in reason


def test_of_thick_slices_the_tenth_percentile() -> None:
    # slices 2 2 6 6 6 6 6 6 6 6 6: median 6 >= 3 x 1 mm, so the 10th percentile, which is the second of eleven: 2 mm
    grids = [Grid(str(n), "train", (9, 9, 9), (1.0, 1.0, mm)) for n, mm in enumerate([2.0] * 2 + [6.0] * 9)]
    assert spacing_for(grids)[0] == [1.0, 1.0, 2.0]


def test_never_finer_than_the_finest_axis() -> None:
    grids = [Grid(str(n), "train", (9, 9, 9), (1.0, 1.0, mm)) for n, mm in enumerate([0.5] * 2 + [6.0] * 9)]
    assert spacing_for(grids)[0] == [1.0, 1.0, 1.0]


def test_one_spacing_for_all_says_so() -> None:
    grids = [Grid(str(n), "train", (9, 9, 9), (1.0, 1.0, 1.0)) for n in range(3)]
    assert spacing_for(grids) == ([1.0, 1.0, 1.0], "all 3 training cases have it")


# --- patch


def test_a_patch_is_what_the_network_can_pool() -> None:
    # 100 mm at 1 mm: at most 4 halvings leave 4 voxels (100 / 16 = 6), so the size divides by 16: 96
    assert valid_patch(VOLUMES, (1.0, 1.0, 1.0), (100.0, 100.0, 100.0)) == [96, 96, 96]


def test_thick_slices_are_not_rounded_more_than_they_are_pooled() -> None:
    # 26 slices of 5 mm beside 0.7 mm: halved twice at most, so 24; the plan agrees
    patch = valid_patch(VOLUMES, (0.7, 0.7, 5.0), (150.0, 150.0, 130.0))
    assert patch is not None
    assert patch[2] % plan_unet((0.7, 0.7, 5.0), patch).divisor[2] == 0
    assert patch[2] >= 24


def test_slices_have_no_depth() -> None:
    flat = Setting(2, 1, network, stages=3)
    assert valid_patch(flat, (2.0, 2.0, 2.0), (100.0, 100.0, 100.0)) == [48, 48, 1]  # two halvings: 50 -> 48


@given(st.tuples(*[st.floats(20, 300)] * 3), st.tuples(*[st.sampled_from([0.5, 0.9, 1.0, 2.0, 5.0])] * 3))
@settings(deadline=None, max_examples=80)
def test_every_patch_has_a_plan_and_lies_inside_of_the_wish(
    wanted: tuple[float, float, float], spacing: tuple[float, float, float]
) -> None:
    patch = valid_patch(VOLUMES, spacing, wanted)
    if patch is None:
        assert min(mm / step for mm, step in zip(wanted, spacing, strict=True)) < 16
        return
    plan_unet(spacing, patch)
    finest = min(spacing)
    for size, mm, step in zip(patch, wanted, spacing, strict=True):
        assert size * step <= max(mm, 16 * step if step < 2 * finest else step) * (1 + 1e-6)


def test_the_memory_decides_how_large_a_cube_is() -> None:
    small, _ = patch_for(VOLUMES, [1.0] * 3, [160.0, 200.0, 160.0], 4.0)
    large, reason = patch_for(VOLUMES, [1.0] * 3, [160.0, 200.0, 160.0], 80.0)
    assert len(set(small)) == 1
    assert small[0] < 160
    assert needed_gb(VOLUMES, [1.0] * 3, small, 2) <= USED_SHARE * 4.0
    assert large == [160, 192, 160]
    assert "no case would hold a larger one" in reason


def test_too_little_memory_is_said() -> None:
    with pytest.raises(CannotRun, match=r"0\.1 GB"):
        patch_for(VOLUMES, [1.0] * 3, [160.0] * 3, 0.1)


def test_what_is_counted_without_data_is_what_autograd_keeps_with_data() -> None:
    # one convolution and one sigmoid by hand: the input (1 x 1 x 4^3) for the weights' gradient, the sigmoid's output
    # (1 x 2 x 4^3) for its own; the weights themselves are not counted
    by_hand = nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.Sigmoid())
    assert kept_for_backward(by_hand, torch.zeros(1, 1, 4, 4, 4)) == (64 + 128, 128)
    real = kept_for_backward(network([1.0] * 3, [16, 16, 16]).train(), torch.zeros(1, 1, 16, 16, 16))
    with torch.device("meta"):
        assert kept_for_backward(network([1.0] * 3, [16, 16, 16]).train(), torch.empty(1, 1, 16, 16, 16)) == real


# --- batch and the whole plan


def test_a_batch_fills_the_memory_but_not_the_cohort() -> None:
    patch = [32, 32, 32]
    full, why_full = batch_for(VOLUMES, [1.0] * 3, patch, 8.0, training_voxels=1e12)
    assert needed_gb(VOLUMES, [1.0] * 3, patch, full) <= USED_SHARE * 8.0
    assert needed_gb(VOLUMES, [1.0] * 3, patch, full + 1) > USED_SHARE * 8.0
    assert "80%" in why_full
    # 20 patches' worth of voxels in 5 %: 20 * 32^3 / 0.05
    few, why_few = batch_for(VOLUMES, [1.0] * 3, patch, 80.0, training_voxels=20 * 32**3 / 0.05)
    assert few == 20
    assert "5 %" in why_few
    assert batch_for(VOLUMES, [1.0] * 3, patch, 80.0, training_voxels=1.0)[0] == 2


def test_a_plan_is_an_override_that_the_command_line_reads_back() -> None:
    from pipelines.overrides import overrides_of

    plan = plan_for(inspection_of(), cohort_of([(100.0, 120.0, 100.0)] * 6), memory_gb=8.0)
    assert [each.option for each in plan.proposals] == ["spacing", "patch_size", "filters", "batch_size"]
    assert all(each.reason for each in plan.proposals)
    words = [word.strip("'") for word in plan.command.replace(", ", ",").split()]
    assert overrides_of(words) == {each.option: each.value for each in plan.proposals}
    plan_unet(plan.proposals[0].value, plan.proposals[1].value)


def test_one_small_outlier_does_not_shrink_the_patch() -> None:
    plan = plan_for(inspection_of(), cohort_of([(100.0, 120.0, 100.0)] * 9 + [(30.0, 30.0, 30.0)]), memory_gb=80.0)
    assert plan.proposals[1].value == [96, 112, 96]
    assert "1 outlier" in plan.proposals[1].reason


def test_cases_of_other_splits_do_not_count() -> None:
    fingerprint = cohort_of([(100.0, 100.0, 100.0)] * 2)
    other = replace(fingerprint, cases=tuple(replace(case, split="validation") for case in fingerprint.cases))
    with pytest.raises(CannotRun, match="train"):
        plan_for(inspection_of(), other)


def test_a_fusion_of_slices_keeps_its_network() -> None:
    windows = [[40, 160], [750, 1500], [200, 1600]]
    inspection = inspection_of("fusion", dimensions=2, windows=windows, channels=[32, 64, 96], modalities=["mri", "ct"])
    plan = plan_for(inspection, cohort_of([(190.0, 220.0, 200.0)] * 5, (2.0, 2.0, 2.0)), memory_gb=8.0)
    assert [each.option for each in plan.proposals] == ["spacing", "patch_size", "batch_size"]
    assert plan.proposals[1].value == [92, 108, 1]  # two halvings: 95 -> 92, 110 -> 108
    assert plan.network.startswith("3 resolutions")


def test_a_task_without_planned_networks_says_so() -> None:
    with pytest.raises(CannotRun, match="spectral"):
        plan_for(inspection_of("spectral"), cohort_of([(100.0, 100.0, 100.0)]))


def test_lists_are_quoted_for_the_shell() -> None:
    plan = Plan((Proposal("spacing", [1.0, 2.0], None, ""), Proposal("filters", None, [8], "")), "", 8.0)
    assert plan.command == "--spacing '[1.0, 2.0]' --filters None"
