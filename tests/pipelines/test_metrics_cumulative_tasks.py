"""Image quality and instances as MONAI metrics, and all of them on several processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cumulative_worker import case as worker_case
from cumulative_worker import results as results_alone
from monai.data import MetaTensor
from monai.metrics import PanopticQualityMetric

from pipelines.metrics import (
    ImageQualityMetric,
    InstanceMetric,
    Window,
    count_instances,
    image_quality_in_rois,
    instance_metrics,
    pool_cases,
)
from transforms.errors import DataError, UsageError

SPACING = (0.5, 1.0, 3.0)
AFFINE = np.diag([*SPACING, 1.0])
SHIFTED = AFFINE + np.array([[0, 0, 0, 0.25], [0] * 4, [0] * 4, [0] * 4])  # half a voxel


def image_of(array: np.ndarray, affine: Any = AFFINE) -> MetaTensor:
    """(1, *spatial) with an affine."""
    return MetaTensor(torch.from_numpy(array)[None], affine=torch.as_tensor(affine))


def images(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    reference = draw.random((20, 18, 16)).astype(np.float32)
    head = np.zeros(reference.shape, bool)
    head[4:16, 4:14, 3:13] = True
    return reference + draw.normal(0, 0.1, reference.shape).astype(np.float32), reference, head


@pytest.mark.parametrize("window", [Window(), Window(size=9, sigma=3, unit="mm")])
def test_image_quality_in_regions(window: Window) -> None:
    figures = ("ssim", "psnr_db", "mae", "nmi")
    metric = ImageQualityMetric(1.0, ("head", "lesion"), figures, window)
    expected = []
    for seed in range(3):
        image, reference, head = images(seed)
        lesion = head & (reference > 0.9) & (seed > 0)  # the first has none
        y = torch.cat([torch.from_numpy(a.astype(np.float32))[None] for a in (reference, head, lesion)])
        metric([image_of(image)], [MetaTensor(y, affine=torch.from_numpy(AFFINE))])
        rois = {"head": head, "lesion": lesion}
        expected.append(image_quality_in_rois(image, reference, 1.0, rois, SPACING, figures, window=window))
    results = metric.aggregate()
    for k, name in enumerate(("head", "lesion")):
        for figure in figures:
            values = [rows[k][figure] for rows in expected if rows[k][figure] is not None]
            assert results[f"{figure}_{name}"] == pytest.approx(np.mean(values), rel=1e-12)
            assert results[f"n_{figure}_{name}"] == len(values) == (3 if name == "head" else 2)
        assert results[f"n_empty_{name}"] == (0 if name == "head" else 1)
    assert results["ssim"] == pytest.approx((results["ssim_head"] + results["ssim_lesion"]) / 2)


def test_image_quality_of_the_whole_image_needs_no_affine_but_a_window_in_mm_does() -> None:
    image, reference, _ = images(0)
    pair = torch.from_numpy(image)[None, None], torch.from_numpy(reference)[None, None]
    metric = ImageQualityMetric(1.0, figures=["mae"], key_figure="mae")
    metric(*pair)
    assert metric.aggregate().item() == pytest.approx(np.abs(image - reference).mean(), rel=1e-6)
    with pytest.raises(DataError, match="voxel size"):
        ImageQualityMetric(1.0, window=Window(size=9, sigma=3, unit="mm"))(*pair)


def test_image_quality_refuses_other_channels_and_affines() -> None:
    image, reference, head = (image_of(a.astype(np.float32)) for a in images(0))
    with pytest.raises(DataError, match="1 and 1, expected 1 and 2"):
        ImageQualityMetric(1.0, ["head"])([image], [reference])
    with pytest.raises(DataError, match="affines"):
        ImageQualityMetric(1.0, ["head"])([image], [torch.cat([image_of(reference.numpy()[0], SHIFTED), head])])


# --- instances ---------------------------------------------------------------------------------------------------

CELLS = {1: "red", 2: "white", 3: "platelet"}


def cells(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and reference (2, 24, 24), ids and classes; only the reference of an even seed has platelets."""
    draw = np.random.default_rng(seed)
    ids = np.kron(np.arange(1, 17).reshape(4, 4), np.ones((6, 6), int))
    classes = draw.integers(1, 4 if seed % 2 == 0 else 3, 17)
    classes[0] = 0
    kept = ids * (draw.random(17) < 0.8)[ids]
    moved = np.roll(ids * (draw.random(17) < 0.9)[ids], draw.integers(-2, 3, 2), (0, 1))
    other = np.where(classes == 3, 1, classes)
    return np.stack([moved, other[moved]]), np.stack([kept, classes[kept]])


def test_instances_by_image_and_of_the_cohort() -> None:
    figures = ("pq", "sq", "rq", "aji", "aji_plus", "f1_75", "map_count_50_95", "count_error")
    pairs = [cells(seed) for seed in range(4)]
    metric = InstanceMetric(CELLS, figures)
    for prediction, reference in pairs:
        metric([torch.from_numpy(prediction)], [torch.from_numpy(reference)])
    results = metric.aggregate()
    maps = [(p[0], r[0], CELLS, p[1], r[1]) for p, r in pairs]
    rows = [instance_metrics(*each) for each in maps]
    cohort = pool_cases([count_instances(*each) for each in maps])
    for k, name in enumerate(CELLS.values()):
        for figure in figures:
            values = [of_image[k][figure] for of_image in rows if of_image[k][figure] is not None]
            assert results[f"{figure}_{name}"] == pytest.approx(np.mean(values))
            assert results[f"cohort_{figure}_{name}"] == cohort["labels"][name][figure]
        assert results[f"n_empty_{name}"] == cohort["labels"][name]["n_images_empty"]
    assert results["cohort_pq"] == pytest.approx(cohort["mean_over_labels"]["pq"])
    assert results["n_empty_platelet"] == results["n_missed_platelet"] == 2


def test_panoptic_quality_of_the_cohort_is_that_of_monai() -> None:
    pairs = [tuple(torch.from_numpy(a)[None] for a in cells(seed)) for seed in range(4)]
    metric = InstanceMetric(CELLS, ["pq"], key_figure="cohort_pq")
    monai = PanopticQualityMetric(num_classes=3, metric_name="pq", reduction="mean_batch")
    for prediction, reference in pairs:
        metric(prediction, reference)
        monai(prediction, reference)
    expected = monai.aggregate().tolist()
    for name, value in zip(CELLS.values(), expected, strict=True):
        assert metric.results()[f"cohort_pq_{name}"] == pytest.approx(value, rel=1e-6, abs=1e-6)
    assert metric.aggregate().item() == pytest.approx(np.mean(expected), rel=1e-6)
    assert metric.get_buffer().shape == (4, 3)


def test_instances_without_classes_and_without_anything() -> None:
    prediction, reference = cells(0)
    nothing = torch.zeros(1, 24, 24, dtype=torch.int64)
    metric = InstanceMetric(figures=["pq", "count_error"])
    metric([torch.from_numpy(prediction[:1]), nothing], [torch.from_numpy(reference[:1]), nothing])
    results = metric.aggregate()
    (row,) = instance_metrics(prediction[0], reference[0])
    assert results["pq_instance"] == results["cohort_pq_instance"] == row["pq"]
    assert (results["n_pq_instance"], results["n_empty_instance"], results["n_cases"]) == (1, 1, 2)


def test_instances_refused() -> None:
    prediction, reference = (torch.from_numpy(a) for a in cells(0))
    with pytest.raises(DataError, match="3 channels"):
        InstanceMetric()([torch.cat([prediction, prediction[:1]])], [reference[:1]])
    with pytest.raises(UsageError, match="class of every instance"):
        InstanceMetric(CELLS)([prediction[:1]], [reference])
    mixed = reference.clone()
    mixed[1, 0, 0] = 3 - mixed[1, 0, 0].clamp(1, 2)
    mixed[0, 0, :2] = 40
    with pytest.raises(DataError, match="more than one class"):
        InstanceMetric(CELLS)([prediction], [mixed])


# --- several processes -------------------------------------------------------------------------------------------


def test_three_processes_of_which_one_has_no_case(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("cumulative_worker.py")), str(tmp_path)]
    workers = [subprocess.Popen(command, env={**common, "RANK": str(rank)}) for rank in range(3)]
    try:
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
    alone = results_alone(0, 1)
    for rank in range(3):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for task, expected in alone.items():
            assert found[task] == pytest.approx(expected, rel=1e-12)
        assert "no case was measured" in found["nothing"]
    assert alone["segmentation"]["n_cases"] == 4
    assert alone["segmentation"]["n_missed_core"] == 1
    assert worker_case(3)[0].max() == 0
