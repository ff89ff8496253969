"""Rules about the machine: requirements, device, processes, files."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from planted import Proof
from proof_environment import PROOFS
from proof_network import lesion

from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.environment import (
    check_device,
    check_files,
    device_error,
    judge_device,
    judge_packages,
    judge_processes,
    modules_of,
    package_problems,
    unreadable,
    unwritable,
)
from pipelines.training import save_weights


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.check)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.check)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


def test_requirements() -> None:
    wanted = ["numpy>=2.0", "numpy<1", "a-package-that-is-nowhere", "mlflow>=99; extra == 'mlflow'"]
    problems = package_problems(wanted)
    assert problems["numpy>=2.0"] == ""
    assert problems["numpy<1"].startswith("version 2")
    assert problems["a-package-that-is-nowhere"] == "not installed"
    assert len(problems) == 3  # an extra that nobody asked for is not required
    (finding,) = judge_packages(problems)
    assert "1 more" in finding.measured
    assert judge_packages({"numpy>=2.0": ""}) == []


def test_every_requirement_is_imported_by_the_name_that_the_rule_takes() -> None:
    required = [Requirement(text) for text in metadata.requires("fiducial") or []]
    own = [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    assert len(own) > 15
    for package in own:
        assert all(find_spec(module) is not None for module in modules_of(package)), package
    names = {"pillow": ["PIL"], "scikit-image": ["skimage"], "pytorch-ignite": ["ignite"], "pyyaml": ["yaml"]}
    assert {package: modules_of(package) for package in names} == names


def test_what_is_installed_but_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenlib").mkdir()
    (tmp_path / "brokenlib" / "__init__.py").write_text("raise OSError('libcudart.so: cannot open shared object')")
    about = tmp_path / "brokenlib-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: brokenlib\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "libcudart" in package_problems(["brokenlib"])["brokenlib"]


@pytest.mark.parametrize(("precision", "largest"), [("fp32", 1e-5), ("bf16", 0.02)])
def test_this_machine_computes(precision: str, largest: float) -> None:
    assert device_error(torch.device("cpu"), precision) < largest


def test_devices() -> None:
    assert judge_device(0.019, "cpu", {"error": 0.02}) == []
    assert judge_device(0.021, "cpu", {"error": 0.02})
    assert judge_device(float("nan"), "cpu", {"error": 0.02})
    (finding,) = check_device(Inspection("segmentation", device=torch.device("cuda:63")), {"error": 0.02})[:1]
    assert "cuda:63" in finding.what


@pytest.mark.parametrize(
    ("processes", "devices", "severities"),
    [(1, 1, []), (4, 4, []), (1, 4, []), (2, 4, ["warn"]), (4, 2, ["error"]), (2, 0, ["error"])],
)
def test_one_process_per_gpu(processes: int, devices: int, severities: list[str]) -> None:
    assert [finding.severity for finding in judge_processes(processes, devices, on_gpu=True)] == severities
    assert judge_processes(processes, devices, on_gpu=False) == []


def test_files_and_folders(tmp_path: Path) -> None:
    assert unwritable(tmp_path / "runs" / "of" / "next" / "year") == ""
    assert list(tmp_path.iterdir()) == []  # nothing is left behind
    (tmp_path / "file").write_text("")
    assert unwritable(tmp_path / "file" / "runs")
    assert "No such file" in unreadable(tmp_path / "weights.safetensors")
    assert unreadable(tmp_path / "file")
    save_weights(lesion().network, {"contract": {}}, tmp_path / "weights.safetensors")
    assert unreadable(tmp_path / "weights.safetensors") == ""


def test_a_configuration_without_folders_is_not_judged() -> None:
    with pytest.raises(CannotRun, match="folder"):
        check_files(Inspection("segmentation"), {})
