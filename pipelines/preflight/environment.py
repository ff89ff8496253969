"""Is this machine the one that the run needs? R45: packages, device, processes, weights to read, folders to write."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from torch.nn import functional as F

from pipelines import tensorfile
from pipelines.inference.inferers import PRECISIONS
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import own_draws
from pipelines.training.distributed import world_size
from transforms.errors import BundleError

Limits = Mapping[str, float]

PACKAGE = "fiducial"
FOLDERS = ("runs_dir", "cache_dir")
WEIGHTS = ("initial_weights", "lesion_head", "pretrained_weights", "checkpoint")


# --- packages


def judge_packages(problems: Mapping[str, str]) -> list[Finding]:
    """R45: requirement -> what is wrong with it, empty where nothing is."""
    wrong = {name: problem for name, problem in problems.items() if problem}
    if not wrong:
        return []
    name, problem = next(iter(wrong.items()))
    return [
        Finding(
            rule="R45",
            severity="error",
            what=f"environment: {name} is not there as it is required",
            measured=problem + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            threshold=f"{name}, importable",
            cause="another environment is active, or an installation was not finished",
            fix="install the package's requirements into this environment",
            evidence={"packages": dict(wrong)},
        )
    ]


def package_problems(requirements: Sequence[str]) -> dict[str, str]:
    """Return for every requirement (as in package metadata; those of extras are left out) what is wrong with it."""
    problems = {}
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        problems[f"{requirement.name}{requirement.specifier}"] = _problem_of(requirement)
    return problems


def _problem_of(requirement: Requirement) -> str:
    try:
        there = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    if not requirement.specifier.contains(there, prereleases=True):
        return f"version {there}"
    for module in modules_of(requirement.name):
        try:
            importlib.import_module(module)
        except Exception as problem:  # a broken installation raises anything
            return f"import {module}: {type(problem).__name__}: {problem}"[:200]
    return ""


def modules_of(package: str) -> list[str]:
    """Return the names by which an installed package is imported: its own, or those that its list of files says."""
    own = re.sub(r"[-.]+", "_", package)
    if importlib.util.find_spec(own) is not None:
        return [own]
    distribution = importlib.metadata.distribution(package)
    files = [each.parts for each in distribution.files or ()]
    names = {parts[0] for parts in files if len(parts) == 2 and parts[1] == "__init__.py"}
    names |= {parts[0].removesuffix(".py") for parts in files if len(parts) == 1 and parts[0].endswith(".py")}
    return sorted(name for name in names if not name.startswith("_")) or [own]


def check_packages(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R45 for the requirements of this package."""
    try:
        required = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise CannotRun(f"{PACKAGE} is not installed, so nothing says what it requires") from None
    return judge_packages(package_problems(required))


# --- device and processes


def judge_device(error: float, device: str, limits: Limits, problem: str = "") -> list[Finding]:
    """R45: relative error of a small computation on the device, against the same in double precision."""
    if not problem and error <= limits["error"]:
        return []
    return [
        Finding(
            rule="R45",
            severity="error",
            what=f"device {device}: it does not compute",
            measured=problem or f"relative error {error:.2g}",
            threshold=f"a convolution, a product and a gradient within {limits['error']:g}",
            cause="driver, library and device do not belong together, or the device is not free",
            fix="check the device with its own tools, or take another with device_name",
        )
    ]


def device_error(device: torch.device, precision: str) -> float:
    """Return the relative error of a convolution with its gradient, and of a matrix product, on ``device``."""
    with own_draws():
        image, kernel = torch.randn(1, 4, 8, 8, 8, dtype=torch.float64), torch.randn(4, 4, 3, 3, 3, dtype=torch.float64)

    def compute(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        k = k.requires_grad_()
        convolved = F.conv3d(x, k, padding=1).flatten(1)
        (gradient,) = torch.autograd.grad(convolved.float().square().mean(), k)
        product = convolved.reshape(4, -1) @ convolved.reshape(4, -1).T
        return torch.cat([each.detach().double().cpu().flatten() for each in (convolved, gradient * 10, product / 100)])

    exact = compute(image, kernel)
    dtype = PRECISIONS[precision]
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        found = compute(image.float().to(device), kernel.float().to(device))
    return float((found - exact).norm() / exact.norm())


def judge_processes(processes: int, devices: int, on_gpu: bool) -> list[Finding]:
    """R45: processes and GPUs of this machine; on CPUs any number will do."""
    if not on_gpu or processes == devices or (processes == 1 and devices > 0):
        return []
    more = processes > devices
    return [
        Finding(
            rule="R45",
            severity="error" if more else "warn",
            what=f"processes: {processes} on {devices} GPU(s)",
            measured=f"{processes} processes, {devices} devices",
            threshold="one process per device",
            cause="the launcher was told another number than there are devices",
            fix=f"start {devices} processes" if devices else "start where there are GPUs, or on the CPU",
        )
    ]


def check_device(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R45: a small computation on the run's device in its arithmetic, and as many processes as devices."""
    device = inspection.need("device")
    try:
        error, problem = device_error(device, inspection.precision), ""
    except (RuntimeError, AssertionError) as raised:
        error, problem = float("nan"), str(raised).splitlines()[0][:200]
    findings = judge_device(error, str(device), limits, problem)
    on_gpu = device.type == "cuda"
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return findings + judge_processes(processes, torch.cuda.device_count() if on_gpu else 0, on_gpu)


# --- files and folders


def judge_files(problems: Mapping[str, str], kind: str) -> list[Finding]:
    """R45: key of the configuration -> what is wrong with what it names, empty where nothing is."""
    return [
        Finding(
            rule="R45",
            severity="error",
            what=f"{key}: {kind}",
            measured=problem,
            threshold="a file that can be read to its end" if "read" in kind else "a folder that can be written",
            cause="the path is another machine's, or the permissions are not those of this user",
            fix=f"correct {key}, or the permissions",
        )
        for key, problem in problems.items()
        if problem
    ]


def unreadable(path: str | Path) -> str:
    """Return what keeps a weights file from being read; empty where nothing does. Tensors are not loaded."""
    try:
        with Path(path).open("rb") as file:
            file.read(1)
        tensorfile.read_header(path)
    except OSError as problem:
        return f"{path}: {problem.strerror or problem}"
    except BundleError as damage:
        return f"{damage.what}: {damage.why}"[:200]
    return ""


def unwritable(folder: str | Path) -> str:
    """Return what keeps files from being written below ``folder``, which need not exist; empty where nothing does."""
    place = Path(folder).expanduser().resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".{uuid.uuid4().hex}.tmp"
    try:
        probe.mkdir()
        (probe / "probe").write_bytes(b"1")
        (probe / "probe").unlink()
    except OSError as problem:
        return f"{place}: {problem.strerror or problem}"
    finally:
        if probe.is_dir():
            probe.rmdir()
    return ""


def check_files(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R45: weights that the configuration names can be read, and its folders written."""
    weights = {key: unreadable(path) for key, path in _named(inspection.config, WEIGHTS)}
    folders = {key: unwritable(path) for key, path in _named(inspection.config, FOLDERS)}
    if not folders:
        raise CannotRun("the configuration names no folder of runs")
    return judge_files(weights, "the weights cannot be read") + judge_files(folders, "nothing can be written there")


def _named(config: Mapping[str, Any], keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    for key in keys:
        value = config.get(key)
        if isinstance(value, (str, Path)) and str(value) and not str(value).startswith(("@", "$", "%")):
            yield key, str(value)


RULES: tuple[Rule, ...] = (
    Rule("R45", "packages", check_packages),
    Rule("R45", "device and processes", check_device, {"error": 0.02}),
    Rule("R45", "files and folders", check_files),
)
