"""Parity: figures by hand, an exported network that was changed is found, and a healthy one stays quiet."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.transforms import AsDiscreted
from torch import nn

from pipelines.export.formats import write_formats
from pipelines.export.parity import (
    CaseResponse,
    Gates,
    beyond,
    compare,
    dice_difference,
    measure_parity,
    require_parity,
    responses,
)
from pipelines.inference import FlipAveragingInferer, open_backend
from transforms.errors import BundleError

SIZE = (8, 8, 8)


def response(label_map: Any, values: Any = 0.0) -> CaseResponse:
    return CaseResponse("a", np.broadcast_to(np.asarray(values, np.float32), (1, 2, 2)), np.asarray(label_map))


def test_figures_by_hand() -> None:
    # original      other        The border is where a neighbour has another label: columns 2 and 3. One voxel of the
    # 0 0 1 1 1 1   0 1 1 1 1 1  first row flips beside it (column 1 touches no 1: its neighbours are 0 0 0 and 0 0 1 in
    # 0 0 1 1 1 1   0 0 1 1 1 1  column 2, so it is border too), one in column 5 is inside.
    # 0 0 1 1 1 1   0 0 1 1 1 0
    original = np.array([[0, 0, 1, 1, 1, 1]] * 3)[..., None]
    other = original.copy()
    other[0, 1], other[2, 5] = 1, 0
    figures = compare(response(original), response(other, [[0.0, 0.25], [0.0, -0.5]]))
    assert figures == {
        "case": "a",
        "max_difference": 0.5,
        # 12 voxels each, 11 in common
        "dice_difference": pytest.approx(1 - 22 / 24),
        "boundary_flips": 1,
        "inner_flips": 1,
    }


def test_dice_difference_is_that_of_the_worst_label() -> None:
    one, two = np.array([0, 1, 1, 2, 2]), np.array([0, 1, 1, 2, 3])
    assert dice_difference(one, one) == 0
    assert dice_difference(one * 0, one * 0) == 0
    assert dice_difference(one, two) == 1  # label 3 is only in one of them
    assert dice_difference(np.array([1, 1, 1]), np.array([1, 1, 0])) == pytest.approx(0.2)


def test_gates_by_hand() -> None:
    figures = {"case": "a", "max_difference": 0.2, "dice_difference": 2e-4, "boundary_flips": 3, "inner_flips": 0}
    assert beyond(figures, Gates()) == ["dice_difference 0.0002 in case a, at most 0.0001"]
    assert beyond(figures, Gates(dice_difference=1e-3)) == []
    assert len(beyond(figures, Gates(1e-3, boundary_flips=2, inner_flips=0, max_difference=0.1))) == 2
    image = {"case": "a", "max_difference": 0.2}
    assert beyond(image, Gates()) == ["max_difference 0.2 in case a, at most 0.001"]
    assert beyond({"case": "a", "max_difference": float("nan")}, Gates()) != []


def test_arrays_of_two_cases_are_not_compared() -> None:
    other = CaseResponse("b", np.zeros((1, 2, 2)), None)
    with pytest.raises(BundleError, match="case a"):
        compare(response([0]), other)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(1, 2, 3, padding=1).eval().requires_grad_(False)


def perturbed(by: float) -> nn.Module:
    changed = copy.deepcopy(network())
    changed.bias += torch.tensor([0.0, by])
    return changed


@pytest.fixture
def evaluator() -> SupervisedEvaluator:
    """Two cases larger than the window, through windows, flips and the label map."""
    draw = torch.Generator().manual_seed(1)
    items: Sequence[dict[str, Any]] = [
        {"image": torch.rand(1, 12, 9, 8, generator=draw), "case": case} for case in ("a", "b")
    ]
    return SupervisedEvaluator(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(Dataset(items), batch_size=1),
        network=network(),
        inferer=FlipAveragingInferer(SlidingWindowInferer(SIZE, 2, 0.5, mode="gaussian"), (0,)),
        postprocessing=AsDiscreted(keys="pred", argmax=True),
    )


def test_the_same_network_passes_with_zeros(evaluator: SupervisedEvaluator) -> None:
    before = evaluator.network, evaluator.inferer
    record = measure_parity(evaluator, network(), {"pt2": network()})
    measured = record["backends"]["pt2"]
    assert measured["passed"]
    assert "reason" not in measured
    assert (measured["dice_difference"], measured["boundary_flips"], measured["max_difference"]) == (0, 0, 0)
    assert [figures["case"] for figures in measured["cases"]] == ["a", "b"]
    require_parity(record)
    assert (evaluator.network, evaluator.inferer) == before
    json.dumps(record, allow_nan=False)


def test_a_perturbed_network_is_named_with_case_and_figure(evaluator: SupervisedEvaluator) -> None:
    record = measure_parity(evaluator, network(), {"pt2": network(), "onnxruntime": perturbed(0.05)})
    with pytest.raises(BundleError, match=r"model\.onnx on onnxruntime") as refusal:
        require_parity(record)
    assert "dice_difference" in refusal.value.why
    assert "in case a" in refusal.value.why
    assert "in case b" in refusal.value.why
    require_parity(measure_parity(evaluator, network(), {"openvino:bf16": perturbed(0.05)}))  # this one may fail


def test_responses_that_are_not_finite_do_not_pass(evaluator: SupervisedEvaluator) -> None:
    record = measure_parity(evaluator, network(), {"pt2": perturbed(float("nan"))}, Gates(max_difference=1.0))
    assert not record["backends"]["pt2"]["passed"]
    assert record["backends"]["pt2"]["max_difference"] == "inf"


def test_a_bundle_without_labels_is_gated_by_its_images(evaluator: SupervisedEvaluator) -> None:
    record = measure_parity(evaluator, network(), {"pt2": network(), "torchscript": perturbed(0.05)}, labelled=False)
    assert record["backends"]["pt2"]["passed"]
    assert "dice_difference" not in record["backends"]["torchscript"]
    assert "max_difference" in record["backends"]["torchscript"]["reason"]


def test_responses_are_those_of_the_chain(evaluator: SupervisedEvaluator) -> None:
    (first, _) = responses(evaluator, network())
    (image, _) = (batch["image"] for batch in evaluator.data_loader)
    expected = evaluator.inferer(image, network())[0]
    np.testing.assert_array_equal(first.response, expected.numpy())
    assert first.label_map is not None
    np.testing.assert_array_equal(first.label_map, expected.argmax(0).numpy())


def test_a_weight_changed_in_an_exported_file_is_found(evaluator: SupervisedEvaluator, tmp_path: Path) -> None:
    """The file itself is tampered with: the archive opens, the network runs, and answers something else."""
    write_formats(network(), 1, SIZE, tmp_path, ["pt2"])
    healthy = measure_parity(evaluator, network(), {"pt2": open_backend("pt2", tmp_path)})
    assert healthy["backends"]["pt2"]["passed"]
    write_formats(perturbed(0.05), 1, SIZE, tmp_path, ["pt2"])
    with pytest.raises(BundleError, match=r"model\.pt2"):
        require_parity(measure_parity(evaluator, network(), {"pt2": open_backend("pt2", tmp_path)}))


def test_a_weight_changed_in_onnx_is_found(evaluator: SupervisedEvaluator, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra `onnx` is not installed")
    pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
    path = write_formats(network(), 1, SIZE, tmp_path, ["onnx"])["onnx"]
    healthy = measure_parity(evaluator, network(), {"onnxruntime": open_backend("onnxruntime", tmp_path)})
    assert healthy["backends"]["onnxruntime"]["passed"]
    model = onnx.load(path)
    (bias,) = [tensor for tensor in model.graph.initializer if list(tensor.dims) == [2]]
    bias.raw_data = (np.frombuffer(bias.raw_data, np.float32) + np.array([0, 0.05], np.float32)).tobytes()
    onnx.save(model, path)
    with pytest.raises(BundleError, match=r"model\.onnx on onnxruntime"):
        require_parity(measure_parity(evaluator, network(), {"onnxruntime": open_backend("onnxruntime", tmp_path)}))
