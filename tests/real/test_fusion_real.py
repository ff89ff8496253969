"""The parts of a fusion on real images: averaged head CT and T1 on one grid, whose tissues are known by probability."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from pipelines.metrics.fusion import fusion_figures
from transforms.fusion import ct_display, fusion_target, measure_mri, mri_display
from transforms.fusion_rules import FUSION_RULES, hard_composite
from transforms.registration_check import registration_figures
from transforms.rois import bone_mask, brain_mask, cormack_to_hu, head_mask

SPACING = (2.0, 2.0, 2.0)


@pytest.fixture(scope="module")
def templates(real_data: Path) -> dict[str, np.ndarray]:
    folder = real_data / "ct_mr_head_templates"
    names = {"ct": "ct", "t1": "mr_t1_on_ct_grid", "grey": "prob_grey", "white": "prob_white", "csf": "prob_csf"}
    found = {key: np.asarray(nib.load(folder / f"{name}.nii.gz").dataobj, np.float32) for key, name in names.items()}
    return {**found, "ct": cormack_to_hu(found["ct"])}


def test_hounsfield_units_come_back_from_the_stretched_scale(templates: dict[str, np.ndarray]) -> None:
    """Brain near 2450 of that scale is some 50 HU in these averages; air is -1000."""
    brain = templates["grey"] + templates["white"] > 0.9
    assert templates["ct"].min() == -1000
    assert 20 < np.median(templates["ct"][brain]) < 60
    assert 500 < np.percentile(templates["ct"][bone_mask(templates["ct"], SPACING)], 90) < 1500


def test_the_brain_found_in_the_ct_is_that_of_the_tissue_probabilities(templates: dict[str, np.ndarray]) -> None:
    truth = templates["grey"] + templates["white"] + templates["csf"] > 0.5
    found = brain_mask(templates["ct"], SPACING)
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.94
    assert not (found & bone_mask(templates["ct"], SPACING) & truth).sum() > 0.01 * truth.sum()


def test_the_t1_lies_on_the_ct(templates: dict[str, np.ndarray]) -> None:
    figures = registration_figures(templates["t1"], templates["ct"], SPACING)
    assert figures.outline_dice > 0.9
    assert figures.offset_length_mm < 2
    moved = registration_figures(templates["t1"], np.roll(templates["ct"], 2, axis=1), SPACING)
    assert moved.offset_mm[1] == pytest.approx(figures.offset_mm[1] + 4, abs=0.7)


def test_on_clean_aligned_averages_the_plain_rules_are_nearly_perfect(templates: dict[str, np.ndarray]) -> None:
    """So clean scores prove nothing alone: the blend is the target, and the mean is what a fusion must not be."""
    ct = templates["ct"]
    head, bone = head_mask(ct), bone_mask(ct, SPACING)
    brain = brain_mask(ct, SPACING) & ~bone
    mri = mri_display(templates["t1"], measure_mri(templates["t1"], head, 0.5, 99.5))
    shown = ct_display(ct)
    masks = {"brain": brain, "bone": bone, "head": head}
    images = {name: FUSION_RULES[name](mri, shown, ct) for name in ("blend", "maximum", "mean")}
    images["oracle"] = hard_composite(mri, shown, bone)
    target = fusion_target(mri, shown, ct, brain)
    of = {name: fusion_figures(image, mri, shown, target=target, **masks) for name, image in images.items()}
    assert of["blend"]["brain_ssim_within"] > 0.99
    assert of["blend"]["bone_psnr_db"] > 40
    assert of["maximum"]["brain_ssim_within"] > 0.99
    assert of["mean"]["brain_ssim_within"] < 0.7
    assert of["oracle"]["bone_psnr_db"] == 100
