"""Segmentation as a MONAI metric: forms of the batch, voxel size from the affine, means and counts, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.data.utils import list_data_collate
from monai.metrics import HausdorffDistanceMetric, SurfaceDiceMetric

from pipelines.metrics import (
    FigureOf,
    ImageQualityMetric,
    InstanceMetric,
    SegmentationMetric,
    segmentation_metrics,
    summarise,
)
from transforms.errors import DataError, UsageError

SPACING = (0.5, 1.0, 3.0)
AFFINE = np.array([[-0.5, 0, 0, 20], [0, -1.0, 0, 30], [0, 0, 3.0, -10], [0, 0, 0, 1]])  # LPS, as many MRI are
LABELS = {0: "background", 1: "lesion", 2: "core"}
FIGURES = ("dice", "hd95_mm", "nsd", "nsd_3mm", "boundary_iou", "volume_error_ml", "lesion_f1")
OPTIONS: dict[str, Any] = {"nsd_tolerance_mm": (1.0, 3.0)}


def label_maps(seed: int, shape: tuple[int, ...] = (12, 9, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference with labels 0 to 2 in blocks, alike but not equal."""
    draw = np.random.default_rng(seed)
    coarse = draw.integers(0, 3, [-(-size // 3) for size in shape])
    reference = np.kron(coarse, np.ones([3] * len(shape), int))[tuple(slice(size) for size in shape)]
    prediction = np.where(draw.random(shape) < 0.8, reference, draw.integers(0, 3, shape))
    return prediction.astype(np.uint8), reference.astype(np.uint8)


def image_of(array: np.ndarray, affine: Any = AFFINE, **meta: Any) -> MetaTensor:
    """(1, *spatial) with an affine."""
    return MetaTensor(torch.from_numpy(array)[None], affine=torch.as_tensor(affine), meta=meta or None)


def one_hot(image: MetaTensor) -> MetaTensor:
    return MetaTensor(torch.cat([image.as_tensor() == k for k in range(3)]).float(), affine=image.affine)


def rows_of(pairs: list, **options: Any) -> list[dict[str, Any]]:
    return [
        {"case": str(n), "subject": str(n), **row}
        for n, (p, r) in enumerate(pairs)
        for row in segmentation_metrics(p, r, SPACING, LABELS, **OPTIONS, **options)
    ]


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", "p1", "r1", "p2", "r2", "p1r1"])), min_size=1))
def test_means_and_counts_are_those_of_the_summary(drawn: list[tuple[int, str]]) -> None:
    pairs = []
    for seed, without in drawn:
        prediction, reference = label_maps(seed, (6, 5, 4))
        for kind, value in (("p", 1), ("p", 2)):
            prediction[prediction == (value if f"{kind}{value}" in without else 9)] = 0
        for kind, value in (("r", 1), ("r", 2)):
            reference[reference == (value if f"{kind}{value}" in without else 9)] = 0
        pairs.append((prediction, reference))
    metric = SegmentationMetric(LABELS, FIGURES, **OPTIONS)
    for prediction, reference in pairs:
        metric([image_of(prediction)], [image_of(reference)])
    results = metric.aggregate()
    summary = summarise(rows_of(pairs), n_resamples=10)
    for figure in FIGURES:
        for name in ("lesion", "core"):
            entry = summary["labels"][name][figure]
            mean = math.nan if entry["mean"] is None else entry["mean"]
            assert results[f"{figure}_{name}"] == pytest.approx(mean, rel=1e-9, abs=1e-12, nan_ok=True)
            assert results[f"n_{figure}_{name}"] == entry["n"]
            for count in ("n_missed", "n_empty", "n_false_alarm"):
                assert results[f"{count}_{name}"] == entry[count]
        mean = summary["mean_over_labels"][figure]["mean"]
        assert results[figure] == pytest.approx(math.nan if mean is None else mean, rel=1e-9, abs=1e-12, nan_ok=True)


def test_equal_to_monai() -> None:
    pairs = [label_maps(seed) for seed in range(3)]
    metric = SegmentationMetric(LABELS, ("hd95_mm", "nsd"))
    hausdorff = HausdorffDistanceMetric(percentile=95)
    surface = SurfaceDiceMetric([1.0, 1.0], use_subvoxels=True)
    for prediction, reference in pairs:
        y_pred, y = one_hot(image_of(prediction)), one_hot(image_of(reference))
        metric([y_pred], [y])
        hausdorff([y_pred.as_tensor()], [y.as_tensor()], spacing=SPACING)
        surface([y_pred.as_tensor()], [y.as_tensor()], spacing=SPACING)
    results = metric.aggregate()
    assert results["hd95_mm"] == pytest.approx(hausdorff.aggregate().item(), rel=1e-6)
    assert results["nsd"] == pytest.approx(surface.aggregate().item(), rel=1e-6)


@pytest.mark.parametrize("form", ["list", "batch", "one-hot", "one-hot and map", "bfloat16", "arrays"])
def test_forms_of_the_batch(form: str) -> None:
    pairs = [label_maps(seed) for seed in (0, 1)]
    y_pred, y = ([image_of(pair[side]) for pair in pairs] for side in (0, 1))
    before = [image.clone() for image in (*y_pred, *y)]
    metric = SegmentationMetric(LABELS, FIGURES, spacing_mm=SPACING if form == "arrays" else None, **OPTIONS)
    if form.startswith("one-hot"):
        y_pred = list(map(one_hot, y_pred))
        y = y if form.endswith("map") else list(map(one_hot, y))
    if form == "bfloat16":
        y_pred, y = ([image.to(torch.bfloat16) for image in images] for images in (y_pred, y))
    if form == "batch":  # as MONAI's DataLoader collates: an affine for each item
        metric(list_data_collate(y_pred), list_data_collate(y))
    elif form == "arrays":
        metric([image.numpy() for image in y_pred], [image.numpy() for image in y])
    else:
        metric(y_pred, y)
    expected = [[row[figure] for figure in FIGURES] for row in rows_of(pairs)]
    assert metric.get_buffer().reshape(4, -1).tolist() == expected
    if form == "list":
        assert all(torch.equal(a, b) for a, b in zip(before, (*y_pred, *y), strict=True))


def test_items_of_a_batch_keep_their_own_voxel_size() -> None:
    prediction, reference = label_maps(0)
    affines = AFFINE, AFFINE @ np.diag([2.0, 2, 2, 1])
    metric = SegmentationMetric(LABELS, ["hd95_mm"])
    metric(*(list_data_collate([image_of(m, affine) for affine in affines]) for m in (prediction, reference)))
    single, double = metric.get_buffer()
    assert torch.allclose(2 * single, double)
    assert single.min() > 0


def test_masks_that_overlap() -> None:
    masks = np.stack([m == k for m in label_maps(0) for k in (1, 2)]).reshape(2, 2, 12, 9, 6)
    masks[:, 1] |= masks[:, 0]
    metric = SegmentationMetric({0: "whole", 1: "core"}, FIGURES, multilabel=True, **OPTIONS)
    metric(*(MetaTensor(torch.from_numpy(m).float(), affine=torch.from_numpy(AFFINE))[None] for m in masks))
    rows = segmentation_metrics(*masks, SPACING, {0: "whole", 1: "core"}, multilabel=True, **OPTIONS)
    assert metric.get_buffer().reshape(2, -1).tolist() == [[row[figure] for figure in FIGURES] for row in rows]


def test_two_dimensions_and_a_slice_of_a_volume() -> None:
    prediction, reference = label_maps(0, (12, 9))
    metric = SegmentationMetric(LABELS, ["hd95_mm"])
    metric([image_of(prediction)], [image_of(reference)])  # affine (4, 4), third axis left over
    plane = np.array([[0.5, 0, 3], [0, 1.0, 4], [0, 0, 1]])
    metric([image_of(prediction, plane)], [image_of(reference, plane)])
    volume = [image_of(np.repeat(m[..., None], 5, axis=2)) for m in (prediction, reference)]
    metric([volume[0][..., 2]], [volume[1][..., 2]])
    expected = [row["hd95_mm"] for row in segmentation_metrics(prediction, reference, SPACING[:2], LABELS)]
    assert metric.get_buffer().tolist() == [expected] * 3


# --- what is refused ---------------------------------------------------------------------------------------------

PREDICTION, REFERENCE = label_maps(0)
SHIFTED = AFFINE + np.array([[0, 0, 0, 0.25], [0] * 4, [0] * 4, [0] * 4])  # half a voxel
REFUSED = {
    "no affine": (torch.from_numpy(PREDICTION)[None], torch.from_numpy(REFERENCE)[None], "voxel size is not known"),
    "the default of MONAI": (
        MetaTensor(torch.from_numpy(PREDICTION)[None]),
        MetaTensor(torch.from_numpy(REFERENCE)[None]),
        "voxel size is not known",
    ),
    "half a voxel apart": (image_of(PREDICTION, SHIFTED), image_of(REFERENCE), "affines"),
    "another spacing": (image_of(PREDICTION, AFFINE @ np.diag([2.0, 1, 1, 1])), image_of(REFERENCE), "affines"),
    "an affine of NaN": (image_of(PREDICTION, AFFINE * np.nan), image_of(REFERENCE), "affines"),
    "another shape": (image_of(PREDICTION[:-1]), image_of(REFERENCE), "cannot be compared"),
    "probabilities": (image_of(PREDICTION * 0.5), image_of(REFERENCE), "not a label map"),
    "scores of three channels": (one_hot(image_of(PREDICTION)) * 0.9, image_of(REFERENCE), "3 channels"),
    "two labels at once": (one_hot(image_of(PREDICTION)).clamp(min=1), image_of(REFERENCE), "3 channels"),
    "a channel too few": (one_hot(image_of(PREDICTION))[:2], image_of(REFERENCE), "2 channels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    prediction, reference, message = REFUSED[name]
    metric = SegmentationMetric(LABELS)
    with pytest.raises(DataError, match=message):
        metric([prediction], [reference])
    with pytest.raises(DataError, match="no case was measured"):
        metric.aggregate()


def test_affine_of_one_image_is_enough() -> None:
    metric = SegmentationMetric(LABELS, ["hd95_mm"])
    plain = torch.from_numpy(PREDICTION)[None], torch.from_numpy(REFERENCE)[None]
    metric([plain[0]], [image_of(REFERENCE)])
    metric([image_of(PREDICTION)], [plain[1]])
    metric([MetaTensor(plain[0])], [image_of(REFERENCE)])
    expected = [row["hd95_mm"] for row in segmentation_metrics(PREDICTION, REFERENCE, SPACING, LABELS)]
    assert metric.get_buffer().tolist() == [expected] * 3


def test_voxel_size_of_an_oblique_scan(oblique: np.ndarray) -> None:
    metric = SegmentationMetric(LABELS, FIGURES, **OPTIONS)
    metric([image_of(PREDICTION, oblique)], [image_of(REFERENCE, oblique)])
    expected = [row[figure] for row in rows_of([(PREDICTION, REFERENCE)]) for figure in FIGURES]
    assert metric.get_buffer()[0].tolist() == pytest.approx(expected, rel=1e-6)


def test_rounding_of_an_affine_is_accepted() -> None:
    metric = SegmentationMetric(LABELS, ["dice"])
    metric([image_of(PREDICTION, AFFINE + 1e-5)], [image_of(REFERENCE)])
    assert len(metric.get_buffer()) == 1


def test_spacing_that_contradicts_the_affine_is_refused() -> None:
    metric = SegmentationMetric(LABELS, spacing_mm=(1.0, 1.0, 3.0))
    with pytest.raises(DataError, match="two voxel sizes"):
        metric([image_of(PREDICTION)], [image_of(REFERENCE)])


def test_lists_of_different_length_are_refused() -> None:
    image = image_of(REFERENCE)
    for y_pred, y in (([image, image], [image]), ([image], None), ([], [])):
        with pytest.raises(DataError, match="batch cannot be compared"):
            SegmentationMetric(LABELS)(y_pred, y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SegmentationMetric(LABELS, ["dise"]), "did you mean 'dice'"),
        (lambda: SegmentationMetric(LABELS, ["nsd_2mm"], [1.0, 3.0]), "nsd_3mm"),
        (lambda: SegmentationMetric(LABELS, "dice"), "expected a list"),
        (lambda: SegmentationMetric(LABELS, ["dice"], key_figure="hd95_mm"), "hd95_mm"),
        (lambda: SegmentationMetric(LABELS, empty_policy="ignore"), "empty_policy"),
        (lambda: SegmentationMetric({0: "background"}), "label other than 0"),
        (lambda: FigureOf(SegmentationMetric(LABELS, ["dice"]), "dice_lesoin"), "dice_lesion"),
        (lambda: FigureOf(SegmentationMetric(LABELS, ["dice"]), "cohort_dice"), "not among"),
        (lambda: ImageQualityMetric(0.0), "data range"),
        (lambda: ImageQualityMetric(1.0, figures=["psnr"]), "psnr_db"),
        (lambda: ImageQualityMetric(1.0, border="wrap"), "border"),
        (lambda: InstanceMetric(figures=["ap_50"]), "ap_50"),
        (lambda: InstanceMetric(match_iou=1.0), "match_iou"),
    ],
)
def test_mistakes_are_found_when_the_configuration_is_read(make: Callable, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_key_figure_without_a_value_chooses_no_checkpoint() -> None:
    nothing = image_of(np.zeros((4, 4, 4), np.uint8))
    metric = SegmentationMetric({1: "lesion"}, ["dice"], key_figure="dice")
    metric([nothing], [nothing])
    with pytest.raises(DataError, match="dice has no value"):
        metric.aggregate()
    assert math.isnan(metric.results()["dice"])
    assert metric.results()["n_empty_lesion"] == 1


def test_view_reads_what_the_metric_measured() -> None:
    metric = SegmentationMetric(LABELS, ["dice", "hd95_mm"], prefix="val_")
    view = FigureOf(metric, "hd95_mm_core")
    for each in (metric, view):
        each([image_of(PREDICTION)], [image_of(REFERENCE)])
    view.reset()
    results = metric.aggregate()
    assert results["val_n_cases"] == 1
    assert view.aggregate().item() == results["val_hd95_mm_core"]
    assert view.get_buffer().tolist() == [[results["val_hd95_mm_core"]]]
    assert FigureOf(metric).aggregate() == results
