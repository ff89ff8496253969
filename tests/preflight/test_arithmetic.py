"""R45: gradients in the run's arithmetic against float32."""

from __future__ import annotations

import pytest
import torch
from planted import Proof
from proof_arithmetic import PROOFS, BrokenKernel
from proof_network import found, lesion, with_network

from pipelines.preflight.arithmetic import RULES, judge_gradients

LIMITS = {"gradient": 0.5}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    (finding,) = proof.planted()
    assert (finding.rule, finding.severity) == (proof.rule, proof.severity)
    assert "bf16" in finding.what


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


@pytest.mark.parametrize(("second", "findings"), [(5.0, 0), (6.6, 1), (float("nan"), 1), (float("inf"), 1)])
def test_gradients_at_the_limit(second: float, findings: int) -> None:
    # exact (3, 4): norm 5, half of it 2.5. A second entry of 5 is 1 away: .2. One of 6.6 is 2.6 away: .52.
    exact = {"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}
    judged = judge_gradients({"a": torch.tensor([3.0]), "b": torch.tensor([second])}, exact, "bf16", LIMITS)
    assert len(judged) == findings
    assert all("most of it in b" in finding.measured for finding in judged)


def test_in_float32_there_is_nothing_to_compare() -> None:
    assert found(RULES, "R45", with_network(lesion(), BrokenKernel(lesion().network))) == []
