"""Rules about memory: bytes counted by hand, memory maps that count for nothing, networks found where they hide."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Proof
from proof_memory import CASES, NETWORKS, PROOFS, RULES
from proof_network import found, lesion
from torch import nn

from pipelines.inference import AutocastInferer
from pipelines.inference.memory import available_bytes
from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight import memory as module
from pipelines.preflight.memory import (
    Demand,
    check_peak,
    held_bytes,
    judge_copies,
    judge_memory,
    judge_peak,
)


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


def test_demand_by_hand() -> None:
    # 10 held and 2 in use, in 2 processes with 3 workers each: 12 x 2 x 4 = 96
    demand = Demand(held=10, largest=2, processes=2, workers=3)
    assert demand.total == 96
    assert judge_memory(demand, 120, {"share": 0.8}) == []  # 80 % of 120
    assert judge_memory(demand, 119, {"share": 0.8})


def test_what_is_held(tmp_path: Path) -> None:
    np.save(tmp_path / "case.npy", np.zeros((100, 100), np.float32))
    mapped = np.load(tmp_path / "case.npy", mmap_mode="r")
    array, tensor = np.zeros(1000, np.float64), torch.zeros(500, dtype=torch.float32)
    assert held_bytes([{"image": mapped}, mapped[10:]]) == 0
    assert held_bytes([{"image": array}, (tensor, "text", None)]) == 8000 + 2000
    assert held_bytes([array, array]) == 8000  # one array, named twice
    assert held_bytes(lesion().train.cases) == 0  # the content cache is mapped


def test_workers_and_processes_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    class Held:
        data = (np.broadcast_to(np.zeros(1, np.uint8), (available_bytes() // 4,)),)  # a quarter of the memory

    def run(workers: int) -> Inspection:
        return replace(lesion(), train=Held(), validation=None, config={"workers": workers})

    assert found(RULES, "R16", run(0), CASES) == []
    assert found(RULES, "R16", run(2), CASES) == []  # three quarters
    assert found(RULES, "R16", run(3), CASES)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert found(RULES, "R16", run(0), CASES)


def test_networks_are_found_where_they_hide() -> None:
    def twin() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 1))

    network = twin()
    run = Inspection("segmentation", network=network)
    assert found(RULES, "R16", replace(run, inferer=AutocastInferer("fp32")), NETWORKS) == []
    assert found(RULES, "R16", replace(run, extra={"same": network}), NETWORKS) == []
    assert found(RULES, "R16", replace(run, extra={"other": nn.Conv2d(1, 2, 3)}), NETWORKS) == []
    inferer = AutocastInferer("fp32")
    inferer.inferer = partial(print, twin())
    assert found(RULES, "R16", replace(run, inferer=inferer), NETWORKS)
    assert found(RULES, "R16", replace(run, loss=partial(print, teacher=nn.ModuleList([twin()]))), NETWORKS)
    assert judge_copies(0, 10) == []


def test_peak_at_its_limit() -> None:
    assert judge_peak(90, 100, {"peak": 0.9}) == []
    assert judge_peak(91, 100, {"peak": 0.9})
    with pytest.raises(CannotRun, match="GPU"):
        check_peak(lesion(), {"peak": 0.9})


def test_a_system_that_does_not_say_is_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    with pytest.raises(CannotRun, match="does not say"):
        module.check_memory(lesion(), {"share": 0.8})
