"""The rules that watch a run: at their thresholds by hand, and every planted failure beside a healthy run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from planted import Proof
from proof_watch import PROOFS

from pipelines.preflight import CannotRun, Finding, Inspection
from pipelines.preflight.watch import (
    LIMITS,
    WATCHED,
    ClassVoxels,
    Validated,
    best_weights,
    changed_samples,
    collapse,
    data_wait,
    early_stopping,
    followed_schedule,
    frozen_metric,
    implausible_fusion,
    instance_consistency,
    missing_artefacts,
    non_finite_steps,
    not_above_trivial,
    not_learning,
    one_sided_errors,
    overfitting,
    same_sample,
    saturated_output,
    saturation_of,
    settled_epoch,
    silent_curves,
    starved_classes,
    took_steps,
    worse_than_plain,
)
from pipelines.preflight.watch.histories import validated_from_json


def rules(findings: Sequence[Finding]) -> list[tuple[str, str]]:
    return [(finding.rule, finding.severity) for finding in findings]


def validated(*metrics: float, start: int = 10, **more: Any) -> list[Validated]:
    """Validations of epochs ``start`` and on."""
    return [Validated(start + i, metric, **more) for i, metric in enumerate(metrics)]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: proof.rule)
def test_a_planted_failure_is_found_and_a_healthy_run_is_quiet(proof: Proof) -> None:
    found = proof.planted()
    assert found
    assert {(finding.rule, finding.severity) for finding in found} == {(proof.rule, proof.severity)}
    assert all(finding.measured and finding.threshold and finding.cause and finding.fix for finding in found)
    assert list(proof.healthy()) == []


def test_every_rule_of_the_table_has_its_proof() -> None:
    assert sorted(proof.rule for proof in PROOFS) == sorted(rule.id for rule in WATCHED)


@pytest.mark.parametrize("rule", WATCHED, ids=lambda rule: rule.id)
def test_before_a_run_they_say_that_they_cannot_run(rule: Any) -> None:
    assert rule.when in ("training", "validation", "export")
    with pytest.raises(CannotRun):
        rule.check(Inspection("segmentation"), rule.limits)


def test_a_history_survives_json() -> None:
    one = Validated(3, 0.5, {"lesion": ClassVoxels(1, 2, 1, 9, 0.6, 0.1)}, 0.1, "x", ("a", "b"), ("c",), {"dice": 0.6})
    assert validated_from_json(one.as_json()) == one


@pytest.mark.parametrize(
    ("max_epochs", "warmup", "expected"),
    [(100, 2, 25), (100, 40, 40), (8, 0, 5), (21, 0, 6)],
)
def test_settled_epoch(max_epochs: int, warmup: int, expected: int) -> None:
    assert settled_epoch(max_epochs, warmup, 0.25, 5) == expected


# ------------------------------------------------------------------------------------------------------ R27, R30, R35


def test_starved_class() -> None:
    def judge(share: float, steps: int = 100, dice: float = 0.0) -> list[Finding]:
        return starved_classes({"background": 1 - share, "platelet": share}, steps, LIMITS["R27"], {"platelet": dice})

    assert rules(judge(0.0099)) == [("R27", "warn")]
    assert "platelet" in judge(0.0099)[0].what
    assert judge(0.0101) == []
    assert judge(0.0, steps=99) == []
    assert judge(0.0099, dice=0.5) == []  # what is learnt has no gradient left


def test_non_finite_steps() -> None:
    limits = LIMITS["R30"]
    assert non_finite_steps(2, 200, limits) == []
    assert rules(non_finite_steps(3, 299, limits)) == [("R30", "error")]
    assert non_finite_steps(1, 99, limits) == []  # too few steps for a share
    assert rules(non_finite_steps(3, 10_000, limits, allowed=2)) == [("R30", "error")]
    assert non_finite_steps(2, 10_000, limits, allowed=2) == []
    assert non_finite_steps(0, 400, limits, scaler_skips=20, scaler_steps=400) == []
    assert "half precision" in non_finite_steps(0, 400, limits, scaler_skips=21, scaler_steps=400)[0].what
    assert non_finite_steps(0, 99, limits, scaler_skips=50, scaler_steps=99) == []  # it looks for its scale at first


def losses(*values: float) -> list[tuple[int, float]]:
    return list(enumerate(values, start=1))


def test_not_learning() -> None:
    limits = LIMITS["R35"]
    # smoothed over two epochs, from the second on: 0.9755 and more, 0.945 in the second case
    flat = losses(1.0, 0.99, 0.98, 0.98, 0.97, 0.981)
    assert rules(not_learning(flat, 0, limits)) == [("R35", "warn")]
    assert not_learning(losses(1.0, 0.99, 0.98, 0.98, 0.95, 0.94), 0, limits) == []
    assert not_learning(flat[:5], 0, limits) == []  # five epochs after the first
    assert not_learning(flat, 1, limits) == []  # and after the warm-up
    assert not_learning(flat, 0, limits, learnt=True) == []
    # fallen once and flat since: it has learnt
    assert not_learning(losses(1.0, 0.5, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3), 0, limits) == []


def test_noise_that_is_not_predicted() -> None:
    limits = LIMITS["R35"]
    assert rules(not_learning([], 0, limits, noise_mse=[(5, 0.96)])) == [("R35", "warn")]
    assert not_learning([], 0, limits, noise_mse=[(4, 0.99)]) == []
    assert not_learning([], 0, limits, noise_mse=[(5, 0.94)]) == []


# ------------------------------------------------------------------------------------------------------------ R36, R37


def test_gap_in_five_validations() -> None:
    limits = LIMITS["R36"]
    training = losses(*[0.9] * 6)
    apart = losses(0.8, 0.74, 0.74, 0.74, 0.74, 0.74)
    assert rules(overfitting(training, apart, limits)) == [("R36", "warn")]
    assert overfitting(training, apart[:5], limits) == []  # four of them
    assert overfitting(training, [*apart[:5], (6, 0.76)], limits) == []  # the gap has closed
    assert overfitting(training[:4], apart, limits) == []  # epochs that only one has do not count


def test_validation_loss_that_rises() -> None:
    limits = LIMITS["R36"]
    assert overfitting([], [], limits, losses(1.0, 0.5, 0.6)) == []
    assert rules(overfitting([], [], limits, losses(1.0, 0.5, 0.61))) == [("R36", "warn")]


def test_patience_against_the_beginning() -> None:
    limits = LIMITS["R37"]
    late = [(epoch, 0.01 if epoch < 22 else 0.3) for epoch in range(1, 25)]  # learning began in epoch 22
    (found,) = early_stopping(late, 30, 25, 100, limits)
    assert "44" in found.fix
    assert early_stopping(late, 44, 25, 100, limits) == []
    assert early_stopping(late, 0, 25, 100, limits) == []  # it never stops
    assert early_stopping(late, 30, 25, 55, limits) == []  # the phase ends before
    never = [(epoch, 0.01) for epoch in range(1, 56)]
    assert early_stopping(never, 30, 25, 100, limits) == []
    assert rules(early_stopping(never, 30, 25, 100, limits, stopped=True)) == [("R37", "warn")]


# ------------------------------------------------------------------------------------------------------------ R31, R39


def classes(predicted: int, truth: int, hit: int, dice: float | None = None, valid: int = 100_000) -> dict[str, Any]:
    """A lesion and its background in ``valid`` voxels, as if of a single case."""
    share = truth / valid
    of_lesion = 2 * hit / max(1, predicted + truth) if dice is None else dice
    lesion = ClassVoxels(predicted, truth, hit, valid, of_lesion, 2 * share / (1 + share))
    background = ClassVoxels(valid - predicted, valid - truth, valid - predicted - truth + hit, valid)
    return {"background": background, "lesion": lesion}


def twice(**voxels: Any) -> list[Validated]:
    return validated(0.5, 0.5, classes=classes(**voxels))


def test_collapse_to_nothing() -> None:
    limits = LIMITS["R31"]
    # 0.1 % of the voxels are lesion, 9 of 100 000 are predicted: below 0.01 %
    nowhere = twice(predicted=9, truth=100, hit=5)
    assert rules(collapse(nowhere, 5, limits)) == [("R31", "error")]
    assert "lesion is never predicted" in collapse(nowhere, 5, limits)[0].what
    assert collapse(twice(predicted=10, truth=100, hit=5), 5, limits) == []
    assert collapse(twice(predicted=9, truth=99, hit=5), 5, limits) == []  # too rare to say
    assert collapse(nowhere, 10, limits) == []  # a network may know nothing until then
    assert collapse(nowhere[1:], 5, limits) == []  # once
    assert collapse([*nowhere[:1], *twice(predicted=100, truth=100, hit=90)[1:]], 5, limits) == []


def test_collapse_to_everything() -> None:
    limits = LIMITS["R31"]
    found = collapse(twice(predicted=100_000, truth=5000, hit=5000), 5, limits)
    assert rules(found) == [("R31", "error")]
    assert "lesion everywhere" in found[0].what
    # 92 % of the voxels and the Dice of a constant, 2 * 0.05 / 1.05 = 0.0952: the all-positive signature
    assert rules(collapse(twice(predicted=92_000, truth=5000, hit=5000, dice=0.1), 5, limits)) == [("R31", "error")]
    assert collapse(twice(predicted=92_000, truth=5000, hit=5000, dice=0.101), 5, limits) == []
    # the Dice of a constant by chance, in a prediction that is none
    assert collapse(twice(predicted=6000, truth=5000, hit=500, dice=0.0952), 5, limits) == []
    # background everywhere, as in the truth
    assert collapse(twice(predicted=900, truth=4000, hit=800), 5, limits) == []
    # background in more than 99 % of the prediction and in less than 95 % of the truth
    assert rules(collapse(twice(predicted=900, truth=6000, hit=800), 5, limits)) == [("R31", "error")]


def test_one_starving_class_of_two_is_a_warning() -> None:
    both = {"big": ClassVoxels(900, 1000, 800, 10_000, 0.8, 0.18), "small": ClassVoxels(0, 100, 0, 10_000, 0.0, 0.02)}
    assert rules(collapse(validated(0.4, 0.4, classes=both), 5, LIMITS["R31"])) == [("R31", "warn")]


def test_one_sided_errors() -> None:
    limits = LIMITS["R39"]
    over = twice(predicted=3000, truth=1000, hit=810)  # recall 0.81, precision 0.27
    assert "too often" in one_sided_errors(over, 5, limits)[0].what
    assert one_sided_errors(twice(predicted=3000, truth=1000, hit=800), 5, limits) == []
    assert one_sided_errors(twice(predicted=2700, truth=1000, hit=810), 5, limits) == []
    under = twice(predicted=300, truth=1000, hit=243)  # recall 0.243, precision 0.81
    assert "too rarely" in one_sided_errors(under, 5, limits)[0].what
    assert one_sided_errors([over[0], under[1]], 5, limits) == []
    assert one_sided_errors(over, 10, limits) == []
    assert one_sided_errors(twice(predicted=0, truth=1000, hit=0), 5, limits) == []  # precision is not defined


# ------------------------------------------------------------------------------------------------------ R32, R34, R43


def test_frozen_metric() -> None:
    limits = LIMITS["R32"]
    still = validated(0.4, 0.4, outputs=("a",))
    assert rules(frozen_metric(still, 5, limits)) == [("R32", "warn")]
    assert frozen_metric(validated(0.4, 0.400002, outputs=("a",)), 5, limits) == []
    assert frozen_metric(still[:1], 5, limits) == []
    moving = [Validated(10, 0.4, outputs=("a",)), Validated(11, 0.4, outputs=("b",))]
    assert frozen_metric(moving, 5, limits) == []  # few voxels repeat by chance
    assert frozen_metric(validated(1.0, 1.0, outputs=("a",)), 5, limits) == []  # nothing left to gain
    trivial = [Validated(epoch, 0.4, trivial=0.4, outputs=(str(epoch),)) for epoch in (10, 11)]
    assert rules(frozen_metric(trivial, 5, limits)) == [("R32", "warn")]
    assert frozen_metric(trivial, 10, limits) == []
    long = [Validated(epoch, 0.4, outputs=(str(epoch),)) for epoch in range(1, 6)]
    assert rules(frozen_metric(long, 9, limits)) == [("R32", "warn")]
    assert frozen_metric(long[:4], 9, limits) == []
    begins_late = [Validated(epoch, 0.0, trivial=0.1, outputs=(str(epoch),)) for epoch in range(1, 22)]
    assert frozen_metric(begins_late, 25, limits) == []


def test_samples() -> None:
    assert rules(same_sample(["a", "a", "a"])) == [("R32", "warn")]
    assert same_sample(["a"]) == same_sample(["a", "b", "a"]) == same_sample([]) == []
    assert changed_samples(["a", "b"], ["b", "a"]) == []
    assert "1 of 2" in changed_samples(["a", "b"], ["a", "c"])[0].measured
    assert rules(changed_samples(["a", "b"], ["a"])) == [("R43", "warn")]
    assert rules(changed_samples(["a", "b"], ["a", "a"])) == [("R43", "warn")]


def test_not_above_trivial() -> None:
    limits = LIMITS["R34"]
    assert rules(not_above_trivial(validated(0.1, 0.2, trivial=0.2), 5, limits)) == [("R34", "warn")]
    assert not_above_trivial(validated(0.1, 0.21, trivial=0.2), 5, limits) == []
    assert not_above_trivial(validated(0.21, 0.1, trivial=0.2), 5, limits) == []  # one of the last two
    assert not_above_trivial(validated(0.1, 0.2, trivial=0.2), 11, limits) == []
    assert not_above_trivial(validated(0.1, 0.2), 5, limits) == []


@pytest.mark.parametrize(
    ("epoch", "figures", "number"),
    [
        (1, {"bone_psnr_db": -1.0}, 0),
        (2, {"bone_psnr_db": -0.1}, 1),
        (2, {"bone_psnr_db": 0.1}, 0),
        (9, {"brain_ssim": 0.01}, 0),
        (10, {"brain_ssim": 0.049, "bone_ssim": 0.03}, 2),
        (10, {"brain_ssim": 0.051, "dice": 0.0}, 0),
    ],
)
def test_implausible_fusion(epoch: int, figures: dict[str, float], number: int) -> None:
    assert len(implausible_fusion([Validated(epoch, 0.0, figures=figures)], LIMITS["R34"])) == number


def test_post_processing_that_does_harm() -> None:
    (found,) = worse_than_plain(0.8, {"flips": 0.81, "components": 0.79})
    assert (found.rule, "components" in found.what) == ("R34", True)
    assert implausible_fusion([], LIMITS["R34"]) == []


# ------------------------------------------------------------------------------------------------------------ R33, R40


def test_saturation() -> None:
    limits = LIMITS["R33"]
    draw = np.random.default_rng(0).normal(0.5, 0.2, 100_000).astype(np.float32)
    assert saturated_output([saturation_of(draw, "a")], limits) == []
    cut = saturation_of(np.minimum(draw, 1.0), "b")  # 2.5 sigma: 0.6 % of the voxels
    assert cut.high == 1.0
    assert cut.share == pytest.approx(0.0062, abs=0.002)
    (found,) = saturated_output([saturation_of(draw, "a"), cut], limits)
    assert (found.rule, found.cases) == ("R33", ("b",))
    # 3.5 sigma: 0.02 %, below 0.1 %; only who knows the clamp sees it
    rare = saturation_of(np.minimum(draw, 1.2), "c")
    assert saturated_output([rare], limits) == []
    assert rules(saturated_output([rare], limits, clamps=(1.2,))) == [("R33", "warn")]
    assert saturated_output([rare], limits, clamps=(1.2002,)) == []
    # steps of 0.2 instead of a clamp: each end has many values, and so has the value beside it
    rounded = saturation_of(np.round(np.clip(draw, -0.1, 1.1) * 5) / 5, "d")
    assert rounded.share > limits["share"]
    assert saturated_output([rounded], limits) == []


def test_waiting_for_data() -> None:
    limits = LIMITS["R40"]
    assert rules(data_wait(20.1, 40, limits)) == [("R40", "warn")]
    assert data_wait(20.0, 40, limits) == []
    assert data_wait(29, 29, limits) == []  # not worth a word


# ------------------------------------------------------------------------------------------------------ R38, R41, R42


def test_schedule_and_rates() -> None:
    limits = LIMITS["R41"]
    assert followed_schedule(12, 12, {"decoder": (1e-4, 1e-4)}, limits) == []
    (steps,) = followed_schedule(48, 12, {}, limits)
    assert "schedule" in steps.what
    (rate,) = followed_schedule(12, 12, {"decoder": (1e-3, 1e-4), "lora": (1e-5, 1e-5)}, limits)
    assert "decoder" in rate.what
    assert followed_schedule(0, 0, {"all": (0.0, 0.0)}, limits) == []  # at the end of a polynomial
    assert rules(took_steps("lora", 0)) == [("R41", "error")]
    assert took_steps("lora", 1) == []


def test_best_weights() -> None:
    limits = LIMITS["R38"]
    history = [(1, 0.5), (2, 0.7), (3, 0.6)]
    assert best_weights((2, 0.7), history, limits) == []
    assert best_weights((2, 0.7), history, limits, written_in=2) == []
    assert best_weights(None, [], limits) == []  # nothing was validated yet
    for stored, more in (
        (None, {}),
        ((3, 0.6), {}),
        ((2, 0.6), {}),  # not the metric of that epoch
        ((4, 0.7), {}),
        ((2, 0.7), {"written_in": 3}),
    ):
        assert rules(best_weights(stored, history, limits, **more)) == [("R38", "error")]
    assert best_weights((3, 0.6), [(3, 0.6), (4, 0.65)], limits, min_delta=0.1) == []  # no improvement


def test_artefacts_and_curves() -> None:
    limits = LIMITS["R42"]
    assert rules(missing_artefacts({"last": True, "best": False})) == [("R42", "warn")]
    history = [
        {"epoch": 1, "loss": 0.5, "loss/lesion": 0.0, "dice_a": None, "dice_b": 0.0, "n_missed": 0, "late": 0.0},
        {"epoch": 2, "loss": 0.4, "loss/lesion": 0.0, "dice_a": None, "dice_b": 0.1, "n_missed": 0},
    ]
    found = silent_curves(history, limits)
    assert [finding.what.split()[2] for finding in found] == ["dice_a", "loss/lesion"]
    assert silent_curves(history[:1], limits) == []


# --------------------------------------------------------------------------------------------------------------- R44


def row(rq: float | None, f1: float | None, predicted: int, truth: int) -> dict[str, Any]:
    return {"label": "rbc", "rq": rq, "f1_50": f1, "n_predicted": predicted, "n_reference": truth}


@pytest.mark.parametrize(
    ("of_class", "number"),
    [
        (row(0.826, 0.704, 100, 100), 1),  # the figures of the origin: RQ .826, F1 .704
        (row(0.80, 0.76, 100, 100), 0),
        (row(0.8, 0.8, 79, 100), 1),
        (row(0.8, 0.8, 80, 100), 0),
        (row(0.8, 0.8, 125, 100), 0),
        (row(0.8, 0.8, 126, 100), 1),
        (row(None, None, 0, 0), 0),
        (row(0.0, 0.0, 3, 0), 0),
    ],
)
def test_instance_consistency(of_class: dict[str, Any], number: int) -> None:
    assert len(instance_consistency([of_class], LIMITS["R44"])) == number
