"""Exported networks on every runtime: they answer like the original, and what was not proven is not chosen."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from torch import nn

from pipelines.export.formats import write_formats
from pipelines.inference import AutocastInferer, ExportedNetwork, exported_network, open_backend
from pipelines.inference.backends import PARITY, choose_backend
from pipelines.manifests.digest import file_digest
from transforms.errors import BundleError, UsageError

INSTALLED = {name for name in ("onnx", "onnxruntime", "openvino") if importlib.util.find_spec(name)}
SIZE = (8, 6, 4)


def needing(backend: str) -> Any:
    """Mark a case of a parametrised test: it is skipped, with the reason, where the backend is not installed."""
    packages = {"pt2": set(), "torchscript": set(), "onnxruntime": {"onnx", "onnxruntime"}}
    missing = packages.get(backend, {"onnx", "openvino"}) - INSTALLED
    return pytest.param(backend, marks=pytest.mark.skipif(bool(missing), reason=f"not installed: {missing}"))


EVERY = [needing(name) for name in ("pt2", "torchscript", "onnxruntime", "openvino")]


def convolution() -> nn.Conv3d:
    torch.manual_seed(0)
    return nn.Conv3d(2, 3, 3, padding=1).eval().requires_grad_(False)


def onnx_of(network: nn.Conv3d) -> bytes:
    """Write the convolution as ONNX by hand, any batch and size."""
    from onnx import TensorProto, checker, helper, numpy_helper

    values = {"weight": network.weight, "bias": network.bias}
    constants = [numpy_helper.from_array(value.detach().numpy(), name) for name, value in values.items()]
    node = helper.make_node("Conv", ["image", "weight", "bias"], ["output"], kernel_shape=[3] * 3, pads=[1] * 6)
    axes = ["x", "y", "z"]
    given = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 2, *axes])
    result = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 3, *axes])
    graph = helper.make_graph([node], "convolution", [given], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    checker.check_model(model)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with something that stands for weights, and the convolution in every format."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "best.safetensors").write_bytes(b"weights")
    write_formats(convolution(), 2, SIZE, folder, ["pt2", "torchscript"])
    (folder / "model.onnx").write_bytes(onnx_of(convolution()) if "onnx" in INSTALLED else b"onnx")
    return folder


@pytest.fixture
def with_parity(exported: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copy the folder and write what was measured there: by default every backend passed; return the weights."""

    def write(**backends: Any) -> Path:
        for path in exported.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        passed = {name: {"passed": True} for name in ("pt2", "torchscript", "onnxruntime", "openvino", "openvino:bf16")}
        measured = {**passed, **{name.replace("__", ":"): value for name, value in backends.items()}}
        files = {path.name: file_digest(path) for path in exported.iterdir()}
        (tmp_path / PARITY).write_text(json.dumps({"backends": measured, "files": files}))
        return tmp_path / "best.safetensors"

    return write


@pytest.mark.parametrize("backend", EVERY)
def test_it_answers_like_the_original_in_windows_and_modes(exported: Path, backend: str) -> None:
    network, original = open_backend(backend, exported, threads=1).eval().to("cpu"), convolution()
    image = torch.rand(1, 2, 11, 9, 5)
    inferer = SlidingWindowInferer(SIZE, 2, 0.5, mode="gaussian")
    expected = inferer(image, original)
    torch.testing.assert_close(inferer(image, network), expected, rtol=0, atol=1e-5)
    # arithmetic is the graph's own: a run in bf16 must not change what was measured in float32
    torch.testing.assert_close(AutocastInferer("bf16", inferer)(image, network), expected, rtol=0, atol=1e-5)
    assert list(network.parameters()) == []


OPENS = """
import sys, torch
from pathlib import Path
from pipelines.inference import open_backend
print(tuple(open_backend("openvino", Path(sys.argv[1]), threads=1)(torch.zeros(1, 2, 8, 6, 4)).shape))
"""


@pytest.mark.skipif(not {"onnx", "openvino"} <= INSTALLED, reason="not installed: onnx, openvino")
def test_openvino_reports_to_nobody(exported: Path, tmp_path: Path) -> None:
    """Importing it alone writes an identity of the machine into the user's home, for reports of use."""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}

    def left_at_home(code: str) -> list[Path]:
        home = tmp_path / str(len(code))
        home.mkdir()
        command = [sys.executable, "-c", code, str(exported)]
        subprocess.run(command, check=True, capture_output=True, env={**environment, "HOME": str(home)})
        return [path for path in home.rglob("*") if path.is_file() and "matplotlib" not in path.parts]

    assert left_at_home("import openvino")  # planted: what it does by itself
    assert not left_at_home(OPENS)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no such signal here")
@pytest.mark.skipif("openvino" not in INSTALLED, reason="not installed: openvino")
def test_signals_are_handled_after_openvino_has_been_used(exported: Path) -> None:
    lines = (
        "import gc, os, signal, sys",
        "from pipelines.inference import open_backend",
        "first = open_backend('openvino', sys.argv[1], 1)",
        "second = open_backend('openvino', sys.argv[1], 1)",
        "del first, second; gc.collect()",
        "signal.signal(signal.SIGUSR1, lambda number, frame: print('handled'))",
        "os.kill(os.getpid(), signal.SIGUSR1)",
    )
    command = [sys.executable, "-c", "\n".join(lines), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "handled"), done.stderr


@pytest.mark.parametrize("backend", EVERY)
def test_two_answers_are_two_arrays_and_the_affine_stays(exported: Path, backend: str) -> None:
    network = open_backend(backend, exported, threads=1)
    affine = torch.diag(torch.tensor([0.5, 1.0, 3.0, 1.0], dtype=torch.float64))
    first = network(MetaTensor(torch.zeros(1, 2, *SIZE), affine=affine))
    kept = first.clone()
    network(torch.ones(1, 2, *SIZE))
    assert torch.equal(first, kept)
    torch.testing.assert_close(first.affine, affine)


@pytest.mark.parametrize("backend", EVERY)
def test_what_it_cannot_take_is_said_in_three_lines(exported: Path, tmp_path: Path, backend: str) -> None:
    with pytest.raises(BundleError, match=rf"backend {backend}: refuses an image of shape \(1, 5, 8, 6, 4\)"):
        open_backend(backend, exported)(torch.zeros(1, 5, *SIZE))
    with pytest.raises(BundleError, match="beside the weights"):
        open_backend(backend, tmp_path)
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:40])
    with pytest.raises(BundleError, match=f"backend {backend} cannot open it"):
        open_backend(backend, tmp_path)


def test_an_unknown_or_absent_backend_is_refused(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="did you mean 'openvino'"):
        open_backend("openvinno", exported)
    with pytest.raises(UsageError, match="valid: auto, torch, pt2"):
        exported_network("tensorrt", [exported / "best.safetensors"], "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"onnxruntime is not installed") as refusal:
        open_backend("onnxruntime", exported)
    assert refusal.value.fix == "pip install 'fiducial[onnx]'"


@pytest.fixture
def everything_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.inference.backends.not_installed", lambda name: "")


FAILED = {"passed": False, "reason": "dice_difference .5 in case a"}


@pytest.mark.usefixtures("everything_installed")
def test_auto_takes_the_fastest_that_has_passed(with_parity: Callable[..., Path]) -> None:
    assert choose_backend(with_parity(), "fp32") == "openvino"
    assert choose_backend(with_parity(), "bf16") == "openvino:bf16"
    assert choose_backend(with_parity(openvino__bf16=FAILED), "bf16") == "openvino"
    assert choose_backend(with_parity(openvino=FAILED), "fp32") == "onnxruntime"
    assert choose_backend(with_parity(openvino=FAILED, openvino__bf16=FAILED), "bf16") == "torch"
    assert choose_backend(with_parity(openvino=FAILED, onnxruntime=FAILED), "fp32") == "torch"


@pytest.mark.usefixtures("everything_installed")
@pytest.mark.parametrize("changed", ["best.safetensors", "model.onnx"])
def test_parity_of_other_bytes_counts_for_nothing(with_parity: Callable[..., Path], changed: str) -> None:
    weights = with_parity()
    (weights.parent / changed).write_bytes(b"another training")
    assert choose_backend(weights, "fp32") == "torch"
    with pytest.raises(BundleError, match=f"{changed} is not the file that was measured"):
        exported_network("openvino", [weights], "cpu")


def test_auto_without_an_export_or_on_a_gpu_runs_the_weights(tmp_path: Path, with_parity: Callable[..., Path]) -> None:
    weights = with_parity()
    assert exported_network("auto", [weights], "cuda:0") is None
    assert exported_network("torch", [weights], "cpu") is None
    (weights.parent / PARITY).unlink()
    assert exported_network("auto", [weights], "cpu") is None


def test_a_backend_that_has_failed_is_not_run_by_name(with_parity: Callable[..., Path]) -> None:
    with pytest.raises(BundleError, match=r"backend pt2: refused") as refusal:
        exported_network("pt2", [with_parity(pt2=FAILED)], "cpu")
    assert "in case a" in refusal.value.why


def test_the_members_of_an_ensemble_are_opened_each_from_its_folder(
    with_parity: Callable[..., Path], caplog: pytest.LogCaptureFixture, exported: Path
) -> None:
    single = exported_network("pt2", [with_parity()], "cpu")
    assert isinstance(single, ExportedNetwork)
    assert caplog.text == ""
    members = exported_network("pt2", [with_parity(), exported / "best.safetensors"], "cpu")
    assert isinstance(members, nn.ModuleList)
    assert [member.backend for member in members] == ["pt2", "pt2"]
    assert "whether it agrees is not known" in caplog.text  # the second folder has no parity.json


def test_a_damaged_record_is_refused(with_parity: Callable[..., Path]) -> None:
    weights = with_parity()
    (weights.parent / PARITY).write_text('{"backends": [1]}')
    with pytest.raises(BundleError, match=r"parity\.json: unreadable"):
        exported_network("auto", [weights], "cpu")


def test_an_image_on_another_device_is_refused() -> None:
    with pytest.raises(BundleError, match="an image on meta"):
        ExportedNetwork(lambda image: image, "pt2")(torch.zeros(1, 1, 2, device="meta"))


@pytest.mark.parametrize("backend", EVERY)
def test_numbers_equal_the_definition_of_a_convolution(exported: Path, backend: str) -> None:
    # one voxel of 1 in channel 0 of zeros: the output around it is the mirrored kernel plus the bias
    image = torch.zeros(1, 2, *SIZE)
    image[0, 0, 4, 3, 2] = 1
    output = open_backend(backend, exported)(image).numpy()
    kernel, bias = convolution().weight.numpy()[:, 0], convolution().bias.numpy()
    expected = kernel[:, ::-1, ::-1, ::-1] + bias[:, None, None, None]
    np.testing.assert_allclose(output[0, :, 3:6, 2:5, 1:4], expected, atol=1e-6)
