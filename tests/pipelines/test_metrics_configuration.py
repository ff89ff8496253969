"""Our metrics in a MONAI configuration: by ``_target_``, in a real evaluator, the voxel size from the affine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from monai.bundle import ConfigParser

from pipelines.metrics import segmentation_metrics
from transforms.errors import DataError, find_error

SPACING = (0.5, 1.0, 3.0)
AFFINE = np.array([[-0.5, 0, 0, 20], [0, -1.0, 0, 30], [0, 0, 3.0, -10], [0, 0, 0, 1]])  # LPS, as many MRI are

# One configuration as a MONAI user writes it. Every image is its own logit, so the prediction is the mask of voxels
# above 0.5; preprocessing turns the axes, Invertd turns them back.
CONFIG = """
loading:
  _target_: Compose
  transforms:
  - {_target_: LoadImaged, keys: [image, label], ensure_channel_first: true}
  - {_target_: Orientationd, keys: image, axcodes: RAS}
postprocessing:
  _target_: Compose
  transforms:
  - {_target_: Invertd, keys: pred, transform: "@loading", orig_keys: image, nearest_interp: false}
  - {_target_: AsDiscreted, keys: pred, threshold: 0.5}
figures:
  _target_: pipelines.metrics.SegmentationMetric
  labels: {1: lesion}
  figures: [dice, hd95_mm, assd_mm, nsd, volume_error_ml]
  key_figure: dice
pair: "$monai.handlers.from_engine(['pred', 'label'])"
evaluator:
  _target_: SupervisedEvaluator
  device: cpu
  val_data_loader:
    _target_: DataLoader
    dataset: {_target_: Dataset, data: "@data", transform: "@loading"}
    batch_size: 2
  network: {_target_: torch.nn.Identity}
  postprocessing: "@postprocessing"
  key_val_metric:
    dice_of_all: {_target_: IgniteMetricHandler, metric_fn: "@figures", output_transform: "@pair"}
  additional_metrics:
    all_figures:
      _target_: IgniteMetricHandler
      metric_fn: {_target_: pipelines.metrics.FigureOf, metric: "@figures"}
      output_transform: "@pair"
    hd95:
      _target_: IgniteMetricHandler
      metric_fn: {_target_: pipelines.metrics.FigureOf, metric: "@figures", figure: hd95_mm}
      output_transform: "@pair"
  val_handlers:
  - {_target_: MetricsSaver, save_dir: "@folder", metrics: "*", metric_details: "*"}
imports:
- $import monai
"""


def configured(write_nifti: Callable[..., Path], folder: Path, pairs: list, change: Callable = lambda c: c) -> Any:
    """Write the files, parse the configuration and return the evaluator."""
    data = []
    for number, (prediction, reference) in enumerate(pairs):
        image = write_nifti(f"{number}/image", prediction.astype(np.float32), AFFINE)
        label = write_nifti(f"{number}/label", reference.astype(np.uint8), AFFINE)
        data.append({"image": str(image), "label": str(label)})
    config = change(yaml.safe_load(CONFIG)) | {"data": data, "folder": str(folder)}
    parser = ConfigParser(config)
    parser.get_parsed_content("imports")
    return parser.get_parsed_content("evaluator")


@pytest.fixture
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """Both, missed, empty, false alarm."""
    masks = []
    for seed in range(4):
        draw = np.random.default_rng(seed)
        reference = np.kron(draw.random((4, 3, 2)) < 0.3, np.ones((3, 3, 3), bool))
        masks.append((reference ^ (draw.random(reference.shape) < 0.1), reference))
    nothing = np.zeros_like(masks[0][0])
    return [masks[0], (nothing, masks[1][1]), (nothing, nothing), (masks[3][0], nothing)]


def test_configuration_with_an_evaluator(write_nifti: Callable, tmp_path: Path, pairs: list) -> None:
    evaluator = configured(write_nifti, tmp_path / "saved", pairs)
    evaluator.run()
    rows = [segmentation_metrics(p, r, SPACING, {1: "lesion"})[0] for p, r in pairs]
    metrics = evaluator.state.metrics
    for figure in ("dice", "hd95_mm", "assd_mm", "nsd", "volume_error_ml"):
        present = [row[figure] for row in rows if row[figure] is not None]
        assert metrics[f"{figure}_lesion"] == pytest.approx(np.mean(present), rel=1e-12)
        assert metrics[f"n_{figure}_lesion"] == len(present)
    counts = [metrics[f"n_{status}_lesion"] for status in ("missed", "false_alarm", "empty")]
    assert counts == [1, 1, 1]
    assert metrics["n_dice_lesion"] == 3
    assert metrics["n_volume_error_ml_lesion"] == 4  # a volume of 0 is right where there is nothing
    assert metrics["n_cases"] == 4
    # The scalars that MONAI compares and writes, and its table of cases.
    assert metrics["dice_of_all"] == metrics["dice_lesion"] == evaluator.state.best_metric
    assert metrics["hd95"] == metrics["hd95_mm_lesion"]
    saved = (tmp_path / "saved" / "hd95_raw.csv").read_text().splitlines()
    assert [line.split(",")[1] for line in saved[1:]] == [
        "nan" if row["hd95_mm"] is None else f"{row['hd95_mm']:.4f}" for row in rows
    ]


def test_second_epoch_forgets_the_first(write_nifti: Callable, tmp_path: Path, pairs: list) -> None:
    evaluator = configured(write_nifti, tmp_path, pairs)
    evaluator.run()
    first = dict(evaluator.state.metrics)
    evaluator.run()
    assert str(evaluator.state.metrics) == str(first)
    assert first["n_cases"] == 4


def test_prediction_that_was_not_inverted_is_refused(write_nifti: Callable, tmp_path: Path, pairs: list) -> None:
    def not_inverted(config: dict) -> dict:
        del config["postprocessing"]["transforms"][0]
        return config

    evaluator = configured(write_nifti, tmp_path, pairs, not_inverted)
    with pytest.raises(Exception, match="affines") as raised:
        evaluator.run()
    error = find_error(raised.value)
    assert isinstance(error, DataError)
    assert "label.nii.gz: the affines of prediction and reference differ" in error.what
    assert "Invertd" in error.fix


def test_without_metadata_it_is_refused(write_nifti: Callable, tmp_path: Path, pairs: list) -> None:
    def without(config: dict) -> dict:
        config["postprocessing"]["transforms"].append({"_target_": "ToTensord", "keys": "pred", "track_meta": False})
        config["postprocessing"]["transforms"].append({"_target_": "ToTensord", "keys": "label", "track_meta": False})
        return config

    with pytest.raises(Exception, match="voxel size") as raised:
        configured(write_nifti, tmp_path, pairs, without).run()
    assert isinstance(find_error(raised.value), DataError)


def test_handler_with_the_name_of_a_figure_is_refused(write_nifti: Callable, tmp_path: Path, pairs: list) -> None:
    def renamed(config: dict) -> dict:
        metrics = config["evaluator"]["additional_metrics"]
        metrics["dice"] = metrics.pop("all_figures")
        return config

    with pytest.raises(ValueError, match="conflicting"):
        configured(write_nifti, tmp_path, pairs, renamed).run()
