"""Figures of a fusion: edges, information, entropy, seams and uncertainty, by hand and beside peers; every refusal."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from scipy import stats
from skimage.filters import sobel_h, sobel_v
from skimage.measure import shannon_entropy
from sklearn.metrics import mutual_info_score

from pipelines.metrics.fusion import (
    HIGHER_IS_BETTER,
    edge_preservation,
    entropy_bits,
    error_uncertainty,
    fusion_figures,
    gradient,
    seams,
)
from pipelines.metrics.image_quality import image_quality
from pipelines.metrics.summary import summarise
from transforms import FUSION_RULES, hard_composite
from transforms.errors import DataError, UsageError

BEST = 0.9994 / (1 + math.exp(-7.5)) * 0.9879 / (1 + math.exp(-4.4))


def qabf(fused, mri, ct, spacing=None, mask=None) -> float | None:
    """Qabf where the gradient lies within the image."""
    if mask is None:
        mask = np.zeros(fused.shape, bool)
        mask[(slice(1, -1),) * fused.ndim] = True
    return edge_preservation(*(gradient(image, spacing) for image in (fused, mri, ct)), mask)


def ramp(*slopes: float) -> np.ndarray:
    """A 3D (or 2D) image with these slopes per voxel."""
    return sum(slope * place for slope, place in zip(slopes, np.indices((5,) * len(slopes)), strict=True))


# ---- the gradient --------------------------------------------------------------------------------------------------


# Slopes 2, -3 and 4 per voxel of 1, 0.5 and 2 mm: 2, -6 and 2 per mm. A step of 1 has 1/2 in the voxels beside it.
def test_gradient_by_hand() -> None:
    inner = (slice(None), *[slice(1, -1)] * 3)
    assert_allclose(gradient(ramp(2, -3, 4))[inner][:, 0, 0, 0], [2, -3, 4], rtol=1e-6)
    assert_allclose(gradient(ramp(2, -3, 4), (1, 0.5, 2))[inner][:, 1, 1, 1], [2, -6, 2], rtol=1e-6)
    step = np.repeat([0.0, 0, 0, 1, 1], 4).reshape(5, 4)
    assert_allclose(gradient(step)[0], np.repeat([0, 0, 0.5, 0.5, 0], 4).reshape(5, 4))
    assert not gradient(step)[1].any()


def test_a_slice_has_the_gradient_of_a_2d_image() -> None:
    image = np.random.default_rng(0).random((6, 7)).astype(np.float32)
    volume = gradient(image[..., None])
    assert_allclose(volume[:2, ..., 0], gradient(image), atol=1e-6)
    assert not volume[2].any()


# ---- Qabf ----------------------------------------------------------------------------------------------------------


def test_an_image_equal_to_both_has_the_largest_value() -> None:
    image = np.random.default_rng(0).random((6, 7, 8))
    assert pytest.approx(BEST, abs=1e-6) == qabf(image, image, image)
    assert pytest.approx(0.9748, abs=1e-4) == BEST


# The CT is constant: it has no edge and no weight, so F = MRI keeps everything, F = CT nothing: G = A = 0 (a gradient
# of 0 has no direction), 0.9994 / (1 + exp(7.5)) * 0.9879 / (1 + exp(17.6)) = 1e-11. With no edge anywhere: no value.
def test_only_edges_count() -> None:
    image, flat = np.random.default_rng(0).random((6, 7, 8)), np.full((6, 7, 8), 0.3)
    assert qabf(image, image, flat) == pytest.approx(BEST, abs=1e-6)
    assert qabf(image, flat, image) == pytest.approx(BEST, abs=1e-6)
    assert qabf(flat, image, flat) == pytest.approx(0, abs=1e-9)
    assert qabf(image, flat, flat) is None


# Half the slope: G = 1/2, which is the middle of the sigmoid: 0.9994 / 2. The same slope at 45 degrees: A = 1/2:
# 0.9879 / (1 + exp(6.6)). A slope twice as strong is as wrong as one half as strong.
def test_strength_and_orientation_by_hand() -> None:
    flat, mri = ramp(0, 0, 0), ramp(1, 0, 0)
    best_strength, best_orientation = 0.9994 / (1 + math.exp(-7.5)), 0.9879 / (1 + math.exp(-4.4))
    half = 0.9994 / 2 * best_orientation
    assert qabf(mri / 2, mri, flat) == pytest.approx(half, rel=1e-5)
    assert qabf(mri * 2, mri, flat) == pytest.approx(half, rel=1e-5)
    assert qabf(-mri, mri, flat) == pytest.approx(BEST, rel=1e-5)
    turned = ramp(0.5**0.5, 0, 0.5**0.5)
    assert qabf(turned, mri, flat) == pytest.approx(best_strength * 0.9879 / (1 + math.exp(6.6)), rel=1e-4)


# MRI slope 3 along x, CT slope 1 along y, F = MRI: (3 best + 1 nothing) / 4.
def test_sources_weigh_by_their_edges() -> None:
    mri, ct = ramp(3, 0, 0), ramp(0, 1, 0)
    assert qabf(mri, mri, ct) == pytest.approx(0.75 * BEST, abs=1e-4)
    assert qabf(ct, mri, ct) == pytest.approx(0.25 * BEST, abs=1e-4)


# Slopes 1 and 1 per voxel are at 45 degrees to the first axis; in voxels of 1 x 10^6 mm they are along it.
def test_the_angle_is_that_in_the_body() -> None:
    diagonal, along, flat = ramp(1, 1), ramp(1, 0), ramp(0, 0)
    assert qabf(diagonal, along, flat) < 0.01
    assert qabf(diagonal, along, flat, (1, 1e6)) == pytest.approx(BEST, abs=1e-4)


def published_qabf(fused: np.ndarray, *sources: np.ndarray) -> float:
    """The formulas of the letter, from scikit-image's Sobel operators; angles beyond pi / 2 folded back."""

    def edges(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        x, y = (operator(image)[1:-1, 1:-1] for operator in (sobel_v, sobel_h))
        return np.hypot(x, y), np.arctan(y / x)

    (g_f, a_f), total, weight = edges(fused), 0.0, 0.0
    for g, a in map(edges, sources):
        strength = np.where(g > g_f, g_f / g, g / g_f)
        difference = np.abs(a - a_f)
        orientation = 1 - np.minimum(difference, np.pi - difference) / (np.pi / 2)
        q_g = 0.9994 / (1 + np.exp(-15 * (strength - 0.5)))
        q_a = 0.9879 / (1 + np.exp(-22 * (orientation - 0.8)))
        total, weight = total + (g * q_g * q_a).sum(), weight + g.sum()
    return total / weight


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_in_2d_it_is_the_published_figure(seed: int, share: float) -> None:
    mri, ct, noise = np.random.default_rng(seed).random((3, 12, 14))
    fused = share * mri + (1 - share) * ct + 0.1 * noise
    assert qabf(fused, mri, ct) == pytest.approx(published_qabf(fused, mri, ct), abs=1e-5)


# ---- entropy -------------------------------------------------------------------------------------------------------


# One value: 0 bits; two values as often as each other: 1 bit; 1/2, 1/4, 1/4: 1.5 bits. -3 and 0, and 1 and 7, are one.
def test_entropy_by_hand() -> None:
    everywhere = np.ones(4, bool)
    assert entropy_bits(np.full(4, 0.7), everywhere) == 0
    assert entropy_bits(np.array([0.1, 0.9, 0.1, 0.9]), everywhere) == pytest.approx(1)
    assert entropy_bits(np.array([0.1, 0.5, 0.1, 0.9]), everywhere) == pytest.approx(1.5)
    assert entropy_bits(np.array([-3, 0, 1, 7.0]), everywhere) == pytest.approx(1)
    assert entropy_bits(np.array([0.1, 0.9, 0.1, 0.9]), np.array([1, 0, 1, 0])) == 0
    assert entropy_bits(np.zeros(4), np.zeros(4, bool)) is None


def test_entropy_is_that_of_scikit_image() -> None:
    values = np.random.default_rng(0).integers(0, 256, (9, 10, 11))
    assert entropy_bits(values, np.ones(values.shape), 256) == pytest.approx(shannon_entropy(values))
    assert entropy_bits((values + 0.5) / 256, np.ones(values.shape)) == pytest.approx(shannon_entropy(values))


# ---- seams ---------------------------------------------------------------------------------------------------------


def plates() -> tuple[np.ndarray, ...]:
    """MRI 0.2 and CT 0.8 everywhere; bone is the part with x >= 4 of 8 voxels."""
    shape = (8, 4, 5)
    bone = np.zeros(shape, bool)
    bone[4:] = True
    return np.full(shape, 0.2), np.full(shape, 0.8), bone


# x       0   1   2   3 | 4   5   6   7          The voxels 3 and 4 lie beside the border; the step of 0.6 has 0.3 per
# F      .2  .2  .2  .2 |.8  .8  .8  .8          voxel in both, and no source has an edge: excess = false edges = 0.3;
# |gF|    0   0   0  .3 |.3   0   0   0          in voxels of 2 mm 0.15 per mm.
def test_seam_of_a_hard_composite_by_hand() -> None:
    mri, ct, bone = plates()
    fused, everywhere = hard_composite(mri, ct, bone), np.ones(mri.shape, bool)
    per_voxel = seams(gradient(fused), gradient(mri), gradient(ct), [bone], everywhere)
    assert per_voxel == pytest.approx((0.3, 0.3), rel=1e-6)
    two_mm = (2.0, 1.0, 1.0)
    per_mm = seams(gradient(fused, two_mm), gradient(mri, two_mm), gradient(ct, two_mm), [bone], everywhere)
    assert per_mm == pytest.approx((0.15, 0.15), rel=1e-6)
    # Where the CT has that edge too, it is none of the fusion's making; a fusion without it has softened it.
    own_edge = gradient(np.where(bone, 0.8, 0.2))
    assert seams(own_edge, gradient(mri), own_edge, [bone], everywhere) == (0, 0)
    assert seams(gradient(mri), gradient(mri), own_edge, [bone], everywhere) == (pytest.approx(-0.3), 0)


# Edges lost in one half of the border (-0.3) hide the false ones in the other half (+0.3) in the excess.
def test_false_edges_are_not_made_up_for() -> None:
    mri, _, bone = plates()
    half = np.arange(4)[:, None] < 2
    fused, ct_with_edge = np.where(bone & half, 0.8, 0.2), np.where(bone & ~half, 0.8, 0.2)
    sharp = np.ones(mri.shape, bool)
    sharp[:, 1:3] = False  # where the halves meet
    excess, false_edge = seams(gradient(fused), gradient(mri), gradient(ct_with_edge), [bone], sharp)
    assert (excess, false_edge) == (pytest.approx(0, abs=1e-7), pytest.approx(0.15))


def test_the_end_of_the_image_is_no_border_of_a_region() -> None:
    mri, ct, bone = plates()
    fields = [gradient(image) for image in (hard_composite(mri, ct, bone), mri, ct)]
    assert seams(*fields, [np.ones_like(bone)], np.ones_like(bone)) == (None, None)
    assert seams(*fields, [bone], np.zeros_like(bone)) == (None, None)


# ---- all figures of one image --------------------------------------------------------------------------------------


def head(seed: int = 0) -> dict[str, np.ndarray]:
    """A brain in a skull of three voxels in air; smooth noise in the brain, bone bright in CT and dark in MRI."""
    random = np.random.default_rng(seed)
    distance = np.linalg.norm(np.indices((40, 42, 38)) - np.array([20, 21, 19]).reshape(3, 1, 1, 1), axis=0)
    brain, inside = distance < 12, distance < 15
    bone = inside & ~brain
    texture = random.normal(size=(2, *distance.shape)) * 0.05
    mri = np.where(brain, 0.6, np.where(bone, 0.2, 0)) + texture[0]
    ct = np.where(brain, 0.03, np.where(bone, 0.7, 0)) + texture[1] * bone
    target = np.where(bone, ct, mri)
    return {"mri": mri, "ct": ct, "target": target, "brain": brain, "bone": bone, "head": inside}


def test_figures_are_those_of_the_parts() -> None:
    case = head()
    fused = (case["mri"] + case["ct"]) / 2
    figures = fusion_figures(fused, **case, spacing_mm=(1, 1, 2))
    in_brain = image_quality(fused, case["mri"], 1, case["brain"], metrics=("ssim", "ms_ssim", "gms_mean"))
    in_bone = image_quality(fused, case["ct"], 1, case["bone"], metrics=("ssim", "psnr_db"))
    in_head = image_quality(fused, case["target"], 1, case["head"])
    assert [figures[f"brain_{key}"] for key in ("ssim", "ms_ssim", "gradient_similarity")] == list(in_brain.values())[
        3:
    ]
    assert [figures[f"bone_{key}"] for key in ("ssim", "psnr_db")] == [in_bone["ssim"], in_bone["psnr_db"]]
    assert [figures[f"global_{key}"] for key in ("ssim", "psnr_db")] == [in_head["ssim"], in_head["psnr_db"]]
    assert figures["qabf"] == qabf(fused, case["mri"], case["ct"], (1, 1, 2), case["head"])
    assert figures["entropy_bits"] == entropy_bits(fused, case["head"])
    fields = [gradient(image, (1, 1, 2)) for image in (fused, case["mri"], case["ct"])]
    expected = seams(*fields, [case["brain"], case["bone"]], case["head"])
    assert (figures["seam_excess"], figures["seam_false_edge"]) == expected
    assert set(figures) - set(HIGHER_IS_BETTER) == {"entropy_bits", "seam_excess"}
    assert set(HIGHER_IS_BETTER) < set(figures)


def test_information_is_that_of_scikit_learn() -> None:
    case = head()
    fused = case["mri"] + 0.3 * case["ct"]

    def binned(image: np.ndarray) -> np.ndarray:
        values = image[case["head"]]
        return np.digitize(values, np.linspace(values.min(), values.max(), 65)[1:-1])

    shared = [mutual_info_score(binned(fused), binned(case[name])) / math.log(2) for name in ("mri", "ct")]
    assert fusion_figures(fused, **case)["fusion_mi_bits"] == pytest.approx(sum(shared), rel=1e-3)


# The perfect fusion has the CT in the bone; the window of 11 voxels around a skull of 3 sees the MRI on either side.
def test_a_perfect_fusion_reaches_the_best_values_within_the_regions() -> None:
    case = head()
    figures = fusion_figures(case["target"], **case)
    assert figures["brain_ssim_within"] == figures["bone_ssim_within"] == pytest.approx(1)
    assert figures["global_ssim"] == pytest.approx(1)
    assert figures["bone_psnr_db"] == figures["global_psnr_db"] == 100
    assert figures["bone_ssim"] < 0.9
    # Wrong in the bone only: the brain keeps its value within.
    dark = fusion_figures(case["mri"], **case)
    assert dark["brain_ssim_within"] == pytest.approx(1)
    assert dark["bone_ssim_within"] < 0.9


def test_a_planted_seam_is_seen() -> None:
    case = head()
    rule = FUSION_RULES["maximum"](case["mri"], case["ct"], case["ct"] * 1500)
    plain = fusion_figures(rule, **case)
    seam = fusion_figures(np.where(case["bone"], rule + 1, rule), **case)
    assert seam["seam_false_edge"] > plain["seam_false_edge"] + 0.1


@pytest.mark.parametrize(
    ("missing", "figures_without"),
    [
        ("brain", {"brain_ssim", "brain_ssim_within", "brain_ms_ssim", "brain_gradient_similarity"}),
        ("bone", {"bone_psnr_db", "bone_ssim", "bone_ssim_within"}),
        ("head", {"global_ssim", "global_psnr_db", "qabf", "fusion_mi_bits", "entropy_bits", "seam_excess",
                  "seam_false_edge"}),
    ],
)  # fmt: skip
def test_an_empty_region_has_no_figures(missing: str, figures_without: set[str]) -> None:
    case = head()
    case[missing] = np.zeros_like(case[missing])
    figures = fusion_figures(case["target"], **case)
    assert {name for name, value in figures.items() if value is None} == figures_without
    summary = summarise([{"case": "a", "subject": "a", "label": "fused", **figures}])
    assert summary["labels"]["fused"]["bone_ssim"]["n"] == (missing != "bone")


def test_images_in_fortran_order_and_masks_of_numbers_have_the_same_figures() -> None:
    case = head()
    other = {name: np.asfortranarray(array.astype(np.float32)) for name, array in case.items()}
    fused = 0.4 * case["mri"] + 0.6 * case["ct"]
    expected = fusion_figures(fused, **case)
    assert fusion_figures(np.asfortranarray(fused, np.float32), **other) == pytest.approx(expected, rel=1e-3)


def test_a_2d_image_has_figures() -> None:
    case = {name: array[:, :, 19] for name, array in head().items()}
    figures = fusion_figures(case["target"], **case)
    assert figures["global_ssim"] == pytest.approx(1)
    assert 0 < figures["qabf"] < BEST


def test_what_cannot_be_compared_is_refused() -> None:
    case = head()
    with pytest.raises(DataError, match="cannot be compared"):
        fusion_figures(case["mri"][1:], **case)
    with pytest.raises(DataError, match="ROI"):
        fusion_figures(case["mri"], **{**case, "bone": case["bone"][1:]})
    with pytest.raises(UsageError, match="data range"):
        fusion_figures(case["mri"], **case, data_range=0)
    fused = case["mri"].copy()
    fused[20, 21, 19] = np.nan
    with pytest.raises(DataError, match=r"case head_1.*not finite"):
        fusion_figures(fused, **case, case="head_1")


# ---- uncertainty ---------------------------------------------------------------------------------------------------


# Errors 1 1 3 3, deviations 1 1 2 2, two bins: m = 1 and 2, e = 1 and 3: calibration (0 + 1) / 2, ENCE (0 + 1/2) / 2,
# RMSE sqrt(20 / 4), root mean square of the deviations sqrt(10 / 4); the ranks agree.
def test_uncertainty_by_hand() -> None:
    fused, std = np.array([[1.0, -1, 3, -3]]), np.array([[1.0, 1, 2, 2]])
    assert error_uncertainty(fused, np.zeros((1, 4)), std, bins=2) == {
        "n_voxels": 4,
        "rmse": pytest.approx(5**0.5),
        "rms_std": pytest.approx(2.5**0.5),
        "uncertainty_spearman": pytest.approx(1),
        "error_calibration": pytest.approx(0.5),
        "ence": pytest.approx(0.25),
    }


def drawn(factor: float, n: int = 40_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors drawn with deviations from 0.5 to 2, of which ``factor`` times as much is predicted."""
    random = np.random.default_rng(0)
    std = random.uniform(0.5, 2, (n, 1))
    return std * random.normal(size=(n, 1)), np.zeros((n, 1)), factor * std


# Predicted twice too large: |2 s - s| / 2 s = 1/2 in every bin; twice too small: |s / 2 - s| / (s / 2) = 1.
def test_a_spread_of_the_right_size_is_calibrated() -> None:
    right = error_uncertainty(*drawn(1))
    assert right["ence"] < 0.02
    assert right["error_calibration"] < 0.02
    assert right["rmse"] == pytest.approx(right["rms_std"], rel=0.02)
    assert error_uncertainty(*drawn(2))["ence"] == pytest.approx(0.5, abs=0.02)
    assert error_uncertainty(*drawn(0.5))["ence"] == pytest.approx(1, abs=0.04)
    assert error_uncertainty(*drawn(2))["uncertainty_spearman"] == right["uncertainty_spearman"]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), values=st.integers(2, 30))
def test_rank_correlation_is_that_of_scipy_and_the_order_of_voxels_does_not_matter(seed: int, values: int) -> None:
    random = np.random.default_rng(seed)
    fused, reference, std = random.integers(0, values, (3, 60, 2)).astype(float)
    row = error_uncertainty(fused, reference, std)
    if np.ptp(np.abs(fused - reference)) and np.ptp(std):
        expected = stats.spearmanr(np.abs(fused - reference).ravel(), std.ravel()).statistic
        assert row["uncertainty_spearman"] == pytest.approx(expected, abs=1e-12)
    order = random.permutation(60)
    again = error_uncertainty(fused[order], reference[order], std[order])
    assert {key: value is None for key, value in again.items()} == {key: value is None for key, value in row.items()}
    assert [v for v in again.values() if v is not None] == pytest.approx([v for v in row.values() if v is not None])


def test_uncertainty_without_a_value_says_so() -> None:
    error, zero, std = drawn(1, 100)
    empty = error_uncertainty(error, zero, std, np.zeros(std.shape, bool))
    assert empty == {"n_voxels": 0, **dict.fromkeys(list(empty)[1:])}
    sure = error_uncertainty(error, zero, 0 * std)
    assert sure["ence"] is None
    assert sure["uncertainty_spearman"] is None
    assert sure["error_calibration"] == pytest.approx(sure["rmse"])


def test_only_the_mask_counts() -> None:
    error, zero, std = drawn(1, 100)
    mask = np.arange(100)[:, None] < 40
    expected = error_uncertainty(error[:40], zero[:40], std[:40])
    error[40:], std[40:] = np.nan, -1
    assert error_uncertainty(error, zero, std, mask) == expected


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"std": np.full((4, 3), -0.1)}, DataError, "below 0"),
        ({"fused": np.full((4, 3), np.nan)}, DataError, "not finite"),
        ({"std": np.ones((4, 2))}, DataError, "cannot be compared"),
        ({"mask": np.ones((4, 2))}, DataError, "ROI"),
        ({"bins": 0}, UsageError, "0 bins"),
    ],
)
def test_uncertainty_that_cannot_be_measured_is_refused(change: dict, error: type, match: str) -> None:
    arguments = {"fused": np.ones((4, 3)), "reference": np.zeros((4, 3)), "std": np.ones((4, 3))} | change
    with pytest.raises(error, match=match):
        error_uncertainty(**arguments)
