"""Can what a run writes be used again, and is what it starts from worth starting from?

R29: a network rebuilt from the contract in the weights' own header takes every tensor, by name and shape, and gives the
same output; here, and in a process that knows nothing but the file and the configuration. A state holds all that a run
needs to go on. R38: weights to start from are there, and were trained.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from pipelines import tensorfile
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import input_shape, own_draws
from pipelines.preflight.tracing import smallest_size
from pipelines.training.checkpoints import load_weights, read_header, save_weights
from pipelines.training.state import newest_state
from transforms.errors import BundleError, FiducialError, find_error

LIMITS: Mapping[str, float] = {"difference": 1e-5}
PARENTS = ("initial_weights", "lesion_head")
STATE_PARTS = {
    "network": "the weights",
    "average": "the averaged weights",
    "optimizer": "the optimiser",
    "scheduler": "the learning rate's schedule",
    "scaler": "the scaler of half precision",
    "keeper": "the best metric and the history",
}
GENERATORS = ("python", "numpy", "torch")
_TIMEOUT = 300  # seconds that a fresh process may take
_ROOT = Path(__file__).resolve().parents[2]


# --- R29: weights


def check_checkpoint(
    path: str | Path,
    config: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] = LIMITS,
    network: nn.Module | None = None,
    shape: Sequence[int] | None = None,
    fresh: bool = True,
) -> list[Finding]:
    """R29: whether a weights file can be used by whoever has it and the bundle's configuration. Also for an export.

    Args:
        path: of the weights.
        config: with ``network_def``; None = ``config.yaml`` of the run that the file stands in.
        limits: ``difference``: largest absolute difference of an output.
        network: that the weights were saved from; None = the one that is rebuilt here.
        shape: of an input, (1, C, *spatial); None = as the contract says.
        fresh: rebuild in another process; False = in this one.

    Raises:
        CannotRun: there is no configuration to rebuild from.
    """
    path = Path(path)
    try:
        header = read_header(path)
        tensors, _ = tensorfile.read_tensors(path)
    except FiducialError as refusal:
        return [_unusable(path, refusal)]
    findings = judge_header(header, list(tensors), path.name)
    config = _config_of(path) if config is None else config
    try:
        here = load_weights(build_network(config, header["contract"]), path).eval()
    except CannotRun:
        raise
    except Exception as problem:
        return [*findings, _unusable(path, find_error(problem) or problem)]
    shape = _shape_of(header["contract"]) if shape is None else tuple(shape)
    shape = (*shape[:2], *smallest_size(here, tuple(shape)))
    reference = here if network is None else copy.deepcopy(network).cpu().eval()
    expected = output_of(reference, shape)
    try:
        got = _output_elsewhere(path, config, shape) if fresh else output_of(here, shape)
    except FiducialError as refusal:
        return [*findings, _unusable(path, refusal)]
    return findings + judge_outputs(expected, got, path.name, limits)


def judge_outputs(expected: torch.Tensor, got: torch.Tensor, name: str, limits: Mapping[str, float]) -> list[Finding]:
    """R29: the output of a network, and of the one that was rebuilt from its weights."""
    same = expected.shape == got.shape
    difference = float((expected - got).abs().max()) if same else float("nan")
    if same and difference < limits["difference"]:
        return []
    return [
        Finding(
            rule="R29",
            severity="error",
            what=f"weights {name}: the network that is rebuilt from them is another",
            measured=f"outputs differ by {difference:.2g}" if same else f"shapes {expected.shape} and {got.shape}",
            threshold=f"less than {limits['difference']:g}",
            cause="something that decides the output stands neither in the weights nor in the contract",
            fix="register it as a parameter or buffer, or put it into the contract",
        )
    ]


def judge_header(header: Mapping[str, Any], tensors: Sequence[str], name: str) -> list[Finding]:
    """R29: the header says what the weights hold for; adapters are named where, and only where, there are some."""
    missing = [key for key in ("contract", "manifest_digest", "epoch") if header.get(key) is None]
    adapted = any("lora_" in tensor for tensor in tensors)
    declared = bool((header.get("contract") or {}).get("adapter"))
    if adapted != declared:
        missing.append("adapter")
    if not missing:
        return []
    what = "adapters and contract disagree" if missing == ["adapter"] else f"its header lacks {', '.join(missing)}"
    return [
        Finding(
            rule="R29",
            severity="error",
            what=f"weights {name}: {what}",
            measured=f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not as it should be",
            threshold="contract, manifest digest, epoch, and the adapter where there is one",
            cause="the file was written by hand, or by another version",
            fix="write weights with save_weights and the header of the run",
        )
    ]


def build_network(config: Mapping[str, Any], contract: Mapping[str, Any]) -> nn.Module:
    """Return the network that ``config`` (references not resolved) builds for a contract.

    Raises:
        CannotRun: the configuration has no ``network_def``.
    """
    from monai.bundle import ConfigParser

    named = [key for key in ("network_def", "network") if isinstance(config.get(key), Mapping)]
    if not named:
        raise CannotRun("the configuration has no network_def")
    parser = ConfigParser(copy.deepcopy({**config, "contract": dict(contract)}))
    with own_draws():
        return parser.get_parsed_content(named[0])


@torch.no_grad()
def output_of(network: nn.Module, shape: Sequence[int]) -> torch.Tensor:
    """Return the output for an input that is the same everywhere: noise, with a last channel of 0.5 (a time)."""
    given = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0))
    if shape[1] > 1:
        given[:, -1] = 0.5
    result = network(given)
    return (result if isinstance(result, torch.Tensor) else next(iter(result))).float()


def _output_elsewhere(path: Path, config: Mapping[str, Any], shape: Sequence[int]) -> torch.Tensor:
    """Return the output of the network that another process rebuilds.

    Raises:
        BundleError: it cannot.
    """
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "request.json"
        result = Path(folder) / "output.safetensors"
        content = {"weights": str(path.resolve()), "config": dict(config), "shape": list(shape), "output": str(result)}
        request.write_text(json.dumps(content, default=str))
        places = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            [sys.executable, "-m", "pipelines.preflight.checkpoint", str(request)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places), "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BundleError(
                f"weights {path.name}: a fresh process cannot rebuild the network", last, "see the configuration"
            )
        return tensorfile.read_tensors(result)[0]["output"]


def answer(request: Mapping[str, Any]) -> None:
    """Do what :func:`check_checkpoint` asks of a fresh process."""
    header = read_header(request["weights"])
    network = load_weights(build_network(request["config"], header["contract"]), request["weights"]).eval()
    tensorfile.write_tensors(request["output"], {"output": output_of(network, request["shape"])}, {})


def _config_of(path: Path) -> dict[str, Any]:
    """Return the configuration of the run that a weights file stands in (a phase's file stands deeper)."""
    for folder in path.resolve().parents[:5]:
        if (folder / "config.yaml").is_file():
            return yaml.safe_load((folder / "config.yaml").read_text())
    raise CannotRun(f"{path.name} stands in no run: there is no config.yaml above it")


def _shape_of(contract: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape (1, C, *patch) of an input: modalities, or condition, x_t and t of a denoiser."""
    if contract.get("network") == "denoiser":
        return (1, 2 + len(contract["windows"]) + 2, *contract["patch_size"])
    return (1, len(contract["modalities"]), *contract["patch_size"])


def _unusable(path: Path, problem: BaseException) -> Finding:
    what = problem.what if isinstance(problem, FiducialError) else f"{type(problem).__name__}: {problem}"
    why = problem.why if isinstance(problem, FiducialError) else "the network cannot be rebuilt"
    return Finding(
        rule="R29",
        severity="error",
        what=f"weights {path.name}: they cannot be used again; {what}",
        measured=why,
        threshold="every tensor matches by name and shape",
        cause="the file is damaged, or configuration and contract build another network",
        fix="rebuild the network from the contract alone, and save the weights again",
    )


def check_weights(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R29 on the network as it is now, rebuilt in this process."""
    return _check_saved(inspection, limits, fresh=False)


def check_weights_elsewhere(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R29 on the network as it is now, rebuilt in a fresh process."""
    return _check_saved(inspection, limits, fresh=True)


def _check_saved(inspection: Inspection, limits: Mapping[str, float], fresh: bool) -> list[Finding]:
    network, config, contract = (inspection.need(name) for name in ("network", "config", "contract"))
    digest = getattr(inspection.cohort, "digest", "unknown")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first.safetensors"
        save_weights(network, {"contract": dict(contract), "epoch": 0, "manifest_digest": digest}, path)
        return check_checkpoint(path, config, limits, network, input_shape(inspection), fresh)


# --- R29: states


def judge_state(tree: Mapping[str, Any], patience: bool = False) -> list[Finding]:
    """R29: whether a state holds all that a run needs to go on.

    Args:
        tree: as ``read_state`` returns it.
        patience: the phase stops early, so what it waits for has to be there.
    """
    parts, own = tree.get("parts") or {}, tree.get("own") or []
    missing = [what for part, what in STATE_PARTS.items() if part not in parts]
    missing += [what for key, what in (("iteration", "the step"), ("phase", "the phase")) if key not in tree]
    missing += ["the best metric"] * ("keeper" in parts and "best_metric" not in parts["keeper"])
    missing += ["the patience"] * (patience and "stop_early" not in parts)
    drawn = [each.get("random") or {} for each in own] or [{}]
    missing += [f"the generator of {name}" for name in GENERATORS if not all(name in each for each in drawn)]
    if not missing:
        return []
    return [
        Finding(
            rule="R29",
            severity="error",
            what=f"state of the run: it lacks {', '.join(missing)}",
            measured=f"{len(missing)} missing",
            threshold="everything that changes during training",
            cause="a part was not registered with the state",
            fix="add the part to those of the phase's engine",
        )
    ]


def check_states(folder: str | Path, patience: bool = False) -> list[Finding]:
    """R29 on the newest state in the ``checkpoints`` of a run.

    Raises:
        CannotRun: there is none.
    """
    try:
        found = newest_state(folder)
    except BundleError as refusal:
        return [_unusable(Path(folder), refusal)]
    if found is None:
        raise CannotRun(f"{folder} holds no state")
    return judge_state(found[1], patience)


# --- R38: weights to start from


def judge_parent(path: str | Path, header: Mapping[str, Any] | None, key: str = "initial_weights") -> list[Finding]:
    """R38: weights to start from are there, and were trained.

    Args:
        path: of the weights.
        header: theirs; None = there is no such file, or it cannot be read.
        key: of the configuration that names them.
    """
    epoch = None if header is None else header.get("epoch")
    if header is not None and (epoch is None or epoch >= 1) and _is_its_best(path, header):
        return []
    if header is None:
        what, measured, cause = "are not there", "no file that can be read", "the run before wrote none, or elsewhere"
    elif epoch is not None and epoch < 1:
        what, measured, cause = "are untrained", f"epoch {epoch}", "the run before never wrote its best weights"
    else:
        measured = f"metric {header.get('metric')}, best of its history {header.get('best_metric')}"
        what, cause = "are not the best of their run", "the file was written without an improvement"
    return [
        Finding(
            rule="R38",
            severity="error",
            what=f"{key} {Path(path).name}: the weights to start from {what}",
            measured=measured,
            threshold="weights of one epoch or more, the best of their run",
            cause=cause,
            fix=f"name the best weights of a finished run with {key}, or none",
        )
    ]


def _is_its_best(path: str | Path, header: Mapping[str, Any]) -> bool:
    """Return whether a file called ``best`` has the best metric of its run."""
    metric, best = header.get("metric"), header.get("best_metric")
    return Path(path).stem != "best" or metric is None or best is None or abs(metric - best) <= 1e-9


def check_parents(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R38 for every key of the configuration that names weights to start from."""
    findings = []
    for key in PARENTS:
        path = inspection.config.get(key)
        if path:
            try:
                header: Mapping[str, Any] | None = read_header(path)
            except BundleError:
                header = None
            findings += judge_parent(path, header, key)
    return findings


RULES: tuple[Rule, ...] = (
    Rule("R29", "weights come back", check_weights, LIMITS),
    Rule("R29", "weights come back in a fresh process", check_weights_elsewhere, LIMITS, when="smoke"),
    Rule("R38", "weights to start from", check_parents),
)

if __name__ == "__main__":
    answer(json.loads(Path(sys.argv[1]).read_text()))
