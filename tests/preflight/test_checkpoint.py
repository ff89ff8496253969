"""Rules about weights and states: rebuilt here and in a fresh process, complete, trained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from planted import Proof
from proof_checkpoint import PROOFS, RULES, parent
from proof_network import found, fusion, lesion

from pipelines.files import write_atomically
from pipelines.preflight import CannotRun
from pipelines.preflight.checkpoint import (
    check_checkpoint,
    check_states,
    judge_header,
    judge_outputs,
    judge_parent,
    judge_state,
)
from pipelines.training import save_weights
from pipelines.training.state import RandomState, write_state

LIMITS = {"difference": 1e-5}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


def header(**changes: Any) -> dict[str, Any]:
    return {"contract": dict(lesion().contract), "manifest_digest": "0" * 64, "epoch": 3, **changes}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The weights of the lesion bundle's network, in a run's folder."""
    path = tmp_path / "run" / "checkpoints" / "best.safetensors"
    save_weights(lesion().network, header(), path)
    return path


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_output(weights: Path) -> None:
    config = lesion().config
    assert check_checkpoint(weights, config, network=lesion().network) == []
    blind = {**config, "imports": [*config["imports"], "$import a_module_of_another_machine"]}
    (finding,) = check_checkpoint(weights, {**blind, "network_def": {"_target_": "a_module_of_another_machine.Net"}})
    assert "cannot be" in finding.what


def test_weights_of_another_network_are_found(weights: Path) -> None:
    other = copy.deepcopy(lesion().network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    (finding,) = check_checkpoint(weights, lesion().config, network=other, fresh=False)
    assert "another" in finding.what


def test_the_configuration_of_the_run_is_found_by_itself(weights: Path) -> None:
    with pytest.raises(CannotRun, match=r"config\.yaml"):
        check_checkpoint(weights, fresh=False)
    run = weights.parents[1]
    plain = {key: value for key, value in lesion().config.items() if key in ("imports", "network_def")}
    write_atomically(run / "config.yaml", yaml.safe_dump(plain).encode())
    assert check_checkpoint(weights, fresh=False) == []


def test_damaged_weights_and_another_architecture(weights: Path) -> None:
    config = {**lesion().config}
    content = bytearray(weights.read_bytes())
    content[-9] ^= 1
    damaged = weights.with_name("last.safetensors")
    damaged.write_bytes(bytes(content))
    (finding,) = check_checkpoint(damaged, config, fresh=False)
    assert "damaged" in finding.what
    save_weights(lesion().network, header(contract={**lesion().contract, "filters": [8, 16, 16]}), weights)
    (finding,) = check_checkpoint(weights, config, fresh=False)
    assert "another architecture" in finding.what
    save_weights(fusion().network, header(), weights)
    assert "another architecture" in check_checkpoint(weights, config, fresh=False)[0].what


def test_outputs_at_the_limit() -> None:
    zero = torch.zeros(1, 2, 4)
    assert judge_outputs(zero, zero + 9e-6, "w", LIMITS) == []
    assert judge_outputs(zero, zero + 2e-5, "w", LIMITS)
    assert judge_outputs(zero, zero[:, :1], "w", LIMITS)
    assert judge_outputs(zero, zero + torch.nan, "w", LIMITS)


def test_headers() -> None:
    assert judge_header(header(), ["conv.weight"], "w") == []
    (finding,) = judge_header({"contract": {}}, ["conv.weight"], "w")
    assert "manifest_digest, epoch" in finding.what
    adapted = header(contract={"adapter": {"rank": 4}})
    assert judge_header(adapted, ["qkv.lora_A", "qkv.weight"], "w") == []
    assert judge_header(adapted, ["qkv.weight"], "w")
    assert judge_header(header(), ["qkv.lora_A"], "w")


def tree(**changes: Any) -> dict[str, Any]:
    """A state as a run writes it."""
    network = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    parts: dict[str, Any] = {name: {} for name in ("average", "scheduler", "scaler", "stop_early")}
    parts |= {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
    parts["keeper"] = {"best_metric": 0.5, "best_epoch": 1, "history": []}
    own = [{"random": RandomState().state_dict(), "losses": {}}]
    return {"phase": 0, "iteration": 7, "parts": parts, "own": own, **changes}


def test_a_state_lacks_nothing(tmp_path: Path) -> None:
    assert judge_state(tree(), patience=True) == []
    write_state(tmp_path, 0, 7, tree())
    assert check_states(tmp_path, patience=True) == []
    with pytest.raises(CannotRun, match="no state"):
        check_states(tmp_path / "checkpoints")


def test_a_state_of_a_real_run_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "pipelines"))
    from small_runs import small_run, validation_cases

    small_run(tmp_path, cases=validation_cases(1), plan={"max_epochs": 1, "steps_per_epoch": 2, "patience": 3}).run()
    assert check_states(tmp_path / "checkpoints", patience=True) == []


@pytest.mark.parametrize(
    ("part", "named"),
    [("optimizer", "optimiser"), ("scheduler", "rate"), ("scaler", "half precision"), ("average", "averaged"),
     ("keeper", "best metric"), ("stop_early", "patience")],
)  # fmt: skip
def test_a_part_that_is_missing_is_named(part: str, named: str) -> None:
    whole = tree()
    del whole["parts"][part]
    (finding,) = judge_state(whole, patience=True)
    assert named in finding.what


def test_step_and_generators_that_are_missing_are_named() -> None:
    lacking = tree(own=[{"random": {"python": (), "numpy": ()}}])
    del lacking["iteration"]
    (finding,) = judge_state(lacking)
    assert "the step" in finding.what
    assert "generator of torch" in finding.what


def test_a_state_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    write_state(tmp_path, 0, 7, tree()).write_bytes(b"no state at all")
    (finding,) = check_states(tmp_path)
    assert finding.rule == "R29"


@pytest.mark.parametrize(
    ("name", "given", "number"),
    [
        ("best.safetensors", None, 1),
        ("best.safetensors", {"epoch": 0}, 1),
        ("best.safetensors", {"epoch": 1}, 0),
        ("best.safetensors", {"epoch": 9, "metric": 0.6, "best_metric": 0.6}, 0),
        ("best.safetensors", {"epoch": 9, "metric": 0.5, "best_metric": 0.6}, 1),
        ("last.safetensors", {"epoch": 9, "metric": 0.5, "best_metric": 0.6}, 0),
    ],
)
def test_parents(name: str, given: dict[str, Any] | None, number: int) -> None:
    assert len(judge_parent(name, given)) == number


def test_a_parent_is_named_by_its_key() -> None:
    (finding,) = found(RULES, "R38", parent("again", epoch=0))
    assert "initial_weights" in finding.what
    assert "epoch 0" in finding.measured
