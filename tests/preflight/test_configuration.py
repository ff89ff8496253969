"""What a configuration gets wrong although its names are right; the lint is in tests/pipelines."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))
from planted import Proof
from proof_configuration import IMPATIENT, PROOFS, found, with_config, with_phases
from proof_network import lesion

from pipelines.preflight import CannotRun, Inspection
from pipelines.preflight.configuration import (
    RULES,
    EarlyStop,
    adjustments_of,
    early_stopping_too_early,
    idle_phases,
    one_sided_adjustments,
    wrong_rates,
    wrong_schedule_length,
)

R37 = {"share": 0.25, "looks": 2}


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_a_planted_failure_is_found_and_a_healthy_run_passes(proof: Proof) -> None:
    planted = proof.planted()
    assert planted
    assert {(finding.rule, finding.severity) for finding in planted} == {(proof.rule, proof.severity)}
    assert proof.healthy() == []


@pytest.mark.parametrize("rule", ["R24", "R26", "R37", "R41"])
def test_without_a_configuration_nothing_counts_as_passed(rule: str) -> None:
    (check,) = [each for each in RULES if each.id == rule]
    with pytest.raises(CannotRun, match="config"):
        check.check(Inspection("segmentation"), check.limits)


# --- R24


def test_all_faults_are_findings_each_with_its_fix() -> None:
    wrong = with_config(max_epoch=5, train__dataset__crop_sise=[8, 8, 8])
    assert [(finding.what.split("'")[1], finding.fix) for finding in found(wrong, "R24")] == [
        ("max_epoch", "did you mean --max_epochs?"),
        ("crop_sise", "did you mean 'crop_size'?"),
    ]


def test_away_from_the_files_of_the_bundle_nothing_counts_as_passed() -> None:
    (rule,) = [each for each in RULES if each.id == "R24"]
    with pytest.raises(CannotRun, match="stand twice"):
        rule.check(lesion(), rule.limits)


# --- R26


@pytest.mark.parametrize(
    ("part", "adjustments"),
    [
        ({"temperature": 2.0}, {"temperature": 2.0}),
        ({"temperature": 1.0}, {}),  # does nothing
        ({"T": "@temperature"}, {"temperature": 1.5}),  # by the name of the hyper-parameter
        ({"a": [{"logit_shift": [0.1, 0.2]}]}, {"logit shift": [0.1, 0.2]}),
        ({"logit_shift": 0, "class_priors": None}, {}),
        ({"class_priors": [0.9, 0.1]}, {"prior": [0.9, 0.1]}),
        ({"name": "balanced_softmax"}, {"prior": "balanced_softmax"}),
        ({"_target_": "losses.LogitAdjustedLoss"}, {"logit shift": "losses.LogitAdjustedLoss"}),
        ({"windowed_logits": "@x", "prioritise": 3, "folder": "/data/prior/x"}, {}),
    ],
)
def test_adjustments_are_found_by_name(part: dict[str, Any], adjustments: dict[str, Any]) -> None:
    assert adjustments_of(part, {"temperature": 1.5, "x": {}}) == adjustments


def test_an_adjustment_on_both_sides_is_no_difference() -> None:
    assert one_sided_adjustments({"temperature": 2.0}, {"temperature": 2.0}) == []
    assert [f.measured for f in one_sided_adjustments({"temperature": 2.0}, {})] == ["training: 2.0; inference: none"]
    assert [f.measured for f in one_sided_adjustments({}, {"prior": 1})] == ["training: none; inference: 1"]
    assert len(one_sided_adjustments({"temperature": 2.0}, {"temperature": 3.0})) == 1


def test_a_temperature_of_the_inference_alone_is_found() -> None:
    inferer = {**lesion().config["validate"]["inferer"], "temperature": 2.0}
    (finding,) = found(with_config(validate__inferer=inferer), "R26")
    assert finding.measured == "training: none; inference: 2.0"


def test_a_temperature_on_both_sides_of_training_is_missed_by_the_hospital() -> None:
    """Validation has it, too, but configs/inference.yaml has not."""
    inferer = {**lesion().config["validate"]["inferer"], "temperature": 2.0}
    loss = {**lesion().config["loss"], "temperature": 2.0}
    (finding,) = found(with_config(validate__inferer=inferer, loss=loss), "R26")
    assert finding.measured == "training: 2.0; inference: none"


# --- R37


@pytest.mark.parametrize(
    ("stop", "severities"),
    [
        (EarlyStop("x", 25, 10, 5, 100), []),
        (EarlyStop("x", 24, 10, 5, 100), ["error"]),  # a quarter of 100 epochs is 25
        (EarlyStop("x", 25, 10, 30, 100), ["error"]),  # the warm-up is longer
        (EarlyStop("x", 30, 10, 30, 100), []),
        (EarlyStop("x", 25, 10, 5, 100, validation_interval=5), []),  # two validations
        (EarlyStop("x", 25, 9, 5, 100, validation_interval=5), ["warn"]),
    ],
)
def test_early_stops(stop: EarlyStop, severities: list[str]) -> None:
    assert [finding.severity for finding in early_stopping_too_early(stop, R37)] == severities


def test_an_impatient_phase_and_an_impatient_handler() -> None:
    (warning,) = found(with_phases({"name": "a", "patience": 1}), "R37")
    assert (warning.severity, warning.what) == ("warn", "phase a: the patience covers hardly a validation")
    assert found(with_phases({"name": "a", "patience": 2}), "R37") == []
    (error,) = found(with_config(validate__handlers=[IMPATIENT]), "R37")
    assert error.what.startswith("validate::handlers::0 (EarlyStopHandler) may end the training")


# --- R41


@pytest.mark.parametrize(
    ("steps", "batches", "accumulation", "epochs", "right"),
    [
        (500, 50, 1, 10, True),
        (130, 50, 4, 10, True),  # ceil(50 / 4) = 13 steps
        (125, 50, 4, 10, False),  # 12.5 steps would be cut off
        (10, 50, 1, 10, False),  # epochs for steps
    ],
)
def test_length_of_a_schedule(steps: int, batches: int, accumulation: int, epochs: int, right: bool) -> None:
    assert (wrong_schedule_length("x", steps, batches, accumulation, epochs) == []) is right


def one_cycle(total_steps: Any, **handler: Any) -> dict[str, Any]:
    schedule = {"_target_": "torch.optim.lr_scheduler.OneCycleLR", "optimizer": "@o", "total_steps": total_steps}
    return {"_target_": "LrScheduleHandler", "lr_scheduler": schedule, **handler}


@pytest.mark.parametrize(
    ("handler", "steps"),
    [
        (one_cycle(100, epoch_level=False), None),  # 5 batches in each of 20 epochs
        (one_cycle("@max_epochs", epoch_level=False), 20),
        (one_cycle("@max_epochs"), None),  # moved once per epoch
        (one_cycle(100), 100),
        (one_cycle("$len(@x)"), None),  # only the run can tell
    ],
)
def test_schedules_in_the_configuration(handler: dict[str, Any], steps: int | None) -> None:
    planned = with_phases({"name": "a"})
    config = {**planned.config, "max_epochs": 20, "train": {**planned.config["train"], "handlers": [handler]}}
    findings = found(replace(planned, config=config), "R41")
    assert [finding.measured for finding in findings] == ([f"{steps} steps"] if steps else [])


def test_phases_that_do_nothing() -> None:
    assert idle_phases(["a", "b"], {"a": 10, "b": 1}) == []
    assert [f.what.split()[1] for f in idle_phases(["a", "b"], {"a": 10})] == ["b"]
    assert [f.measured for f in idle_phases([], {"a": 0})] == ["0 optimiser steps"]


def test_a_warm_up_as_long_as_the_phase_and_a_requested_phase_that_is_not_planned() -> None:
    (finding,) = found(with_phases({"name": "a", "warmup_epochs": 20}), "R41")
    assert finding.measured == "20 epochs of warm-up"
    assert found(with_phases({"name": "a", "warmup_epochs": 19}), "R41") == []
    planned = with_phases({"name": "a"})
    (finding,) = found(replace(planned, config={**planned.config, "phases": [{"name": "a"}, {"name": "b"}]}), "R41")
    assert finding.what == "phase b would not train as it was asked to"


def test_rates() -> None:
    assert wrong_rates("a", {"decoder": 1e-4}, {"decoder": 1e-4}) == []
    (finding,) = wrong_rates("a", {"decoder": 1e-4, "lora": 1e-5}, {"decoder": 1e-3, "lora": 1e-5})
    assert finding.measured == "rates {'decoder': 0.001}"
    (finding,) = found(with_config(optimizer__lr=0.1), "R41")
    assert (finding.measured, finding.threshold) == ("optimizer: lr 0.1", "rates {'.*': 0.002} alone")


def test_looking_at_rates_changes_nothing_in_the_network() -> None:
    names = [name for name, _ in lesion().network.named_parameters()]
    last = names[-1].split(".")[0]
    before = [parameter.requires_grad for parameter in lesion().network.parameters()]
    assert found(with_phases({"name": "a", "rates": {f"^{last}": 0.001}}), "R41") == []
    assert [parameter.requires_grad for parameter in lesion().network.parameters()] == before
