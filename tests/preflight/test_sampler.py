"""The rule about samplers: against a Gaussian whose denoiser is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import Proof
from proof_network import found, fusion, fusion_with, lesion
from proof_sampler import PROOFS, RULES, disguised

from pipelines.inference import SamplingInferer, sampling_times
from pipelines.preflight import CannotRun
from pipelines.preflight.sampler import exact_denoiser, judge_sampler
from transforms.diffusion import NoiseSchedule

LIMITS = RULES[0].limits


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_planted_failure_is_found(proof: Proof) -> None:
    findings = proof.planted()
    assert {finding.rule for finding in findings} == {proof.rule}
    assert findings[0].severity == proof.severity


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_healthy_run_is_quiet(proof: Proof) -> None:
    assert list(proof.healthy()) == []


@pytest.mark.parametrize(
    ("mean", "std", "severities"),
    [
        (1.05, 0.345, []),
        (1.051, 0.3, ["error"]),
        (1.0, 0.254, ["error"]),
        (0.07, 0.95, ["error", "error"]),
        (float("nan"), 0.3, ["error"]),
        (1.0, None, []),
    ],
)
def test_at_the_limits(mean: float, std: float | None, severities: list[str]) -> None:
    limits = {name: limit + 1e-9 for name, limit in LIMITS.items()}
    assert [finding.severity for finding in judge_sampler(mean, std, limits)] == severities


def test_a_sampler_that_is_right_and_coarse_is_a_warning() -> None:
    (coarse,) = judge_sampler(1.0, 0.24, LIMITS, finer_std=0.299, steps=4)
    assert (coarse.severity, coarse.cause) == ("warn", "too few steps")
    (wrong,) = judge_sampler(1.0, 0.24, LIMITS, finer_std=0.24, steps=4)
    assert wrong.severity == "error"


@pytest.mark.parametrize("steps", [3, 4])
def test_few_steps_of_the_bundle(steps: int) -> None:
    (finding,) = found(RULES, "R23", replace(fusion(), inferer=disguised(SamplingInferer, times=sampling_times(steps))))
    assert finding.severity == "warn"
    assert f"{steps} steps" in finding.measured


def test_other_schedules_are_quiet() -> None:
    assert (
        found(RULES, "R23", replace(fusion(), inferer=disguised(SamplingInferer, schedule=NoiseSchedule("none")))) == []
    )
    flow = disguised(SamplingInferer, schedule=NoiseSchedule("rectified_flow"))
    assert found(RULES, "R23", replace(fusion(), inferer=flow)) == []


def test_the_runs_own_sampler_is_left_alone() -> None:
    run = fusion_with(sampling_steps=3)
    before = dict(vars(run.inferer))
    found(RULES, "R23", run)
    assert vars(run.inferer) == before


def test_denoiser_by_hand() -> None:
    # at t = 1 there is no image: the best guess is the mean. At t = 0 there is no noise: it is x_t.
    x = torch.zeros(1, 3, 2, 2)
    x[:, 1], x[:, 2] = 0.4, 1.0
    assert exact_denoiser(NoiseSchedule("cosine"))(x).flatten().tolist() == pytest.approx([1.0] * 4)
    x[:, 2] = 0.0
    assert exact_denoiser(NoiseSchedule("cosine"))(x).flatten().tolist() == pytest.approx([0.4] * 4)


def test_what_is_no_sampler_is_not_judged() -> None:
    with pytest.raises(CannotRun, match="no sampler"):
        RULES[0].check(lesion(), LIMITS)
