"""Does the network learn, at the rate it was meant to, from what it was given? Rules on losses, rates and times."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from pipelines.preflight.finding import Finding

Limits = Mapping[str, float]
ByEpoch = Sequence[tuple[int, float]]


def starved_classes(
    shares: Mapping[str, float], steps: int, limits: Limits, dice: Mapping[str, float] | None = None
) -> list[Finding]:
    """R27: classes whose voxels have next to no part in the gradient, although they are not learnt yet.

    Args:
        shares: of the absolute gradient with respect to the logits that falls on voxels of a class, by name, for the
            classes that occurred.
        steps: that the shares were measured over.
        dice: of the validation, by name: a class that is learnt has no gradient left.
    """
    if steps < limits["steps"]:
        return []
    learnt = {name for name, value in (dice or {}).items() if value >= limits["learnt_dice"]}
    return [
        Finding(
            "R27", "warn", f"class {name} hardly takes part in the gradient",
            f"{share:.3%} of the gradient over {steps} steps", f"at least {limits['share']:.0%}",
            "class weights that nobody reads or that starve it, or a class much rarer than the others",
            f"weight {name} up, sample more patches with it, or take a loss that balances classes",
        )
        for name, share in shares.items()
        if share < limits["share"] and name not in learnt
    ]  # fmt: skip


def non_finite_steps(
    left_out: int, steps: int, limits: Limits, allowed: int | None = None, scaler_skips: int = 0, scaler_steps: int = 0
) -> list[Finding]:
    """R30: too many steps without a finite loss, or with gradients too large for the arithmetic.

    Args:
        left_out: steps whose loss or gradient was not finite.
        steps: all steps.
        allowed: so many may be left out, however long the run is; None = any number.
        scaler_skips, scaler_steps: optimiser steps of fp16 that the gradient scaler left out, and all of them.
    """
    findings = []
    many = steps >= limits["least_steps"] and left_out > limits["share"] * steps
    if many or (allowed is not None and left_out > allowed):
        most = f"at most {limits['share']:.0%}" + ("" if allowed is None else f" and {allowed} steps")
        findings.append(
            Finding(
                "R30", "error", "the loss is not finite again and again",
                f"{left_out} of {steps} steps", most,
                "a damaged case, a learning rate that is too high, or a loss that is not finite at its edges",
                "look at the kept batches with `fiducial replay`, then correct the cases or lower learning_rate",
                source="data",
            )
        )  # fmt: skip
    if scaler_steps >= limits["least_steps"] and scaler_skips > limits["scaler_share"] * scaler_steps:
        findings.append(
            Finding(
                "R30", "error", "gradients overflow in half precision",
                f"{scaler_skips} of {scaler_steps} optimiser steps left out by the scaler",
                f"at most {limits['scaler_share']:.0%}",
                "values beyond the range of fp16 in the network or the loss",
                "train with --precision bf16 or fp32",
            )
        )  # fmt: skip
    return findings


def not_learning(
    losses: ByEpoch, warmup_epochs: int, limits: Limits, learnt: bool = False, noise_mse: ByEpoch = ()
) -> list[Finding]:
    """R35: since the first epoch the smoothed loss has hardly fallen.

    The loss of a network that has learnt stands still as well, so the fall is counted from the first epoch on.

    Args:
        losses: (epoch, loss of the epoch).
        warmup_epochs: of the phase; the epochs of the limit come after them.
        learnt: the validation says that it has learnt, as a network that is fine-tuned has from the beginning.
        noise_mse: (epoch, error of the predicted noise, in units of its variance), of a diffusion that predicts noise.
    """
    findings = []
    epochs, values = [epoch for epoch, _ in losses], [value for _, value in losses]
    long_enough = len(values) > limits["epochs"] and epochs[-1] > warmup_epochs + limits["epochs"]
    if long_enough and not learnt:
        smoothed = [(one + two) / 2 for one, two in itertools.pairwise(values[1:])]
        drop = (values[0] - min(smoothed)) / max(abs(values[0]), 1e-12)
        if drop < limits["drop"]:
            findings.append(
                Finding(
                    "R35", "warn", "the loss does not fall",
                    f"{drop:+.1%} lower than in epoch {epochs[0]}, after {epochs[-1]} epochs",
                    f"{limits['drop']:.0%} lower after {limits['epochs']:g} epochs",
                    "a learning rate that is far too low or too high, frozen parameters, or labels that do not belong "
                    "to the images",
                    "try `fiducial find-rate`, and look at the batches of the smoke run",
                )
            )  # fmt: skip
    if noise_mse and noise_mse[-1][0] >= limits["epochs"] and noise_mse[-1][1] > limits["noise_mse"]:
        findings.append(
            Finding(
                "R35", "warn", "the predicted noise is no better than none",
                f"mean squared error {noise_mse[-1][1]:.3f} of the noise's variance in epoch {noise_mse[-1][0]}",
                f"at most {limits['noise_mse']:g} after {limits['epochs']:g} epochs",
                "a network that does not see the noisy image or the time",
                "check what the network gets as input, and its learning rate",
            )
        )  # fmt: skip
    return findings


def overfitting(training: ByEpoch, validation: ByEpoch, limits: Limits, validation_loss: ByEpoch = ()) -> list[Finding]:
    """R36: the training is better than the validation by far and for long, or the loss of validation rises again.

    Args:
        training, validation: (epoch, Dice); only epochs that both have count.
        validation_loss: (epoch, loss of the validation cases) where there is one.
    """
    findings = []
    trained = dict(training)
    gaps = [(epoch, trained[epoch] - value) for epoch, value in validation if epoch in trained]
    last = gaps[-int(limits["validations"]) :]
    if len(last) == limits["validations"] and all(gap > limits["gap"] for _, gap in last):
        findings.append(
            Finding(
                "R36", "warn", "the training Dice leaves the validation Dice behind",
                f"{min(gap for _, gap in last):.2f} or more apart in the last {len(last)} validations",
                f"at most {limits['gap']:g}",
                "too few cases for the network, or validation cases of another kind",
                "use the best weights instead of the last; add cases or augmentation, or take a smaller network",
            )
        )  # fmt: skip
    if validation_loss:
        lowest_at, lowest = min(validation_loss, key=lambda entry: entry[1])
        rise = (validation_loss[-1][1] - lowest) / max(abs(lowest), 1e-12)
        if rise > limits["loss_rise"]:
            findings.append(
                Finding(
                    "R36", "warn", "the loss of the validation cases rises again",
                    f"{rise:+.0%} since its lowest value in epoch {lowest_at}", f"at most +{limits['loss_rise']:.0%}",
                    "the network learns the training cases by heart",
                    "use the best weights instead of the last; stop earlier",
                )
            )  # fmt: skip
    return findings


def early_stopping(
    metric: ByEpoch, patience: int, first_epoch: int, max_epochs: int, limits: Limits, stopped: bool = False
) -> list[Finding]:
    """R37: the patience is short against the time that this training needs to begin.

    Args:
        metric: (epoch, validated metric).
        patience: epochs; 0 = it never stops early.
        first_epoch: stopping counts from there on.
        max_epochs: of the phase: what would stop after its end cannot stop too early.
        stopped: it has stopped early.
    """
    if not patience:
        return []
    began = next((epoch for epoch, value in metric if value > limits["passed"]), None)
    needed = None if began is None else math.ceil(limits["factor"] * began)
    can_stop = max(first_epoch, began or 0) + patience < max_epochs
    if (began is None and stopped) or (needed is not None and patience < needed and can_stop):
        when = "never" if began is None else f"in epoch {began}"
        return [
            Finding(
                "R37", "warn", "early stopping may end a training that has only begun",
                f"patience {patience} epochs; the metric passed {limits['passed']:g} {when}",
                "more epochs than it stopped after" if needed is None else f"at least {needed} epochs",
                "learning begins late: a low learning rate, a long warm-up, or small lesions",
                f"take --early_stopping_patience {needed or 2 * max_epochs}, or 0 for never",
            )
        ]  # fmt: skip
    return []


def data_wait(waited_s: float, whole_s: float, limits: Limits) -> list[Finding]:
    """R40: the step waits for its data.

    Args:
        waited_s: seconds of an epoch in which no batch was there.
        whole_s: seconds of the same steps altogether. A few seconds are not worth a word.
    """
    if whole_s < limits["least_seconds"] or waited_s <= limits["share"] * whole_s:
        return []
    return [
        Finding(
            "R40", "warn", "the training waits for its data",
            f"{waited_s / whole_s:.0%} of {whole_s:.0f} s", f"at most {limits['share']:.0%}",
            "patches are prepared more slowly than the network learns from them",
            "take more --workers, put cache_dir on a fast disk, or take dear augmentation out",
        )
    ]  # fmt: skip


def followed_schedule(
    scheduler_steps: int, expected_steps: int, rates: Mapping[str, tuple[float, float]], limits: Limits
) -> list[Finding]:
    """R41: the schedule has gone as far as the training, and every group has the rate of its phase.

    Args:
        scheduler_steps: that the schedule has taken.
        expected_steps: ceil(batches / accumulation) x epochs so far.
        rates: per group of parameters the rate in force and the one that phase and schedule ask for.
    """
    findings = []
    if scheduler_steps != expected_steps:
        findings.append(
            Finding(
                "R41", "warn", "the schedule of the learning rate is not where the training is",
                f"{scheduler_steps} steps of the schedule", f"{expected_steps} optimiser steps",
                "the schedule is stepped per batch instead of per optimiser step, or twice",
                "step the schedule once after every optimiser step",
            )
        )  # fmt: skip
    for name, (rate, wanted) in rates.items():
        if abs(rate - wanted) > limits["difference"] * max(abs(wanted), 1e-12):
            findings.append(
                Finding(
                    "R41", "warn", f"the parameters {name} learn at another rate than their phase says",
                    f"{rate:.3g}", f"{wanted:.3g}",
                    "a rate inherited from another phase or changed by a handler",
                    "let the phase alone set the rate",
                )
            )  # fmt: skip
    return findings


def took_steps(phase: str, steps: int) -> list[Finding]:
    """R41: a phase that was asked for has trained."""
    if steps > 0:
        return []
    return [
        Finding(
            "R41", "error", f"phase {phase} took no step", "0 steps", "at least 1",
            "no epochs, no batches, or a phase that was passed over", "correct its max_epochs and the data",
        )
    ]  # fmt: skip
