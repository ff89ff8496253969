"""Is the figure of a validation worth anything? Rules on the history of validations, the newest last.

A network that has not learnt yet looks like one that has collapsed. Rules that would take the one for the other judge
only validations after ``settled``, the last epoch in which a network may still know nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipelines.preflight.finding import Finding
from pipelines.preflight.watch.histories import BACKGROUND, ClassVoxels, Validated

Limits = Mapping[str, float]
History = Sequence[Validated]
Sign = Literal["everywhere", "nowhere"]


def collapse(history: History, settled: int, limits: Limits) -> list[Finding]:
    """R31: a class has swallowed the others, or a class is never predicted, in the last validations.

    It is an error where no class is left that the prediction could be right about, else a warning.
    """
    last = _last(history, settled, limits["validations"])
    if not last:
        return []
    signs = [dict(_signs(validated, limits)) for validated in last]
    lasting = {name: sign for name, sign in signs[-1].items() if all(each.get(name) == sign for each in signs)}
    if "everywhere" in lasting.values():  # then the others are nowhere, which says nothing more
        lasting = {name: sign for name, sign in lasting.items() if sign == "everywhere"}
    now = last[-1].classes
    present = [n for n, v in now.items() if n != BACKGROUND and v.truth >= limits["rare_truth"] * v.valid]
    all_lost = bool(present) and all(lasting.get(name) == "nowhere" for name in present)
    findings = []
    for name, sign in lasting.items():
        voxels = now[name]
        error = sign == "everywhere" or all_lost
        what = f"the prediction is {name} everywhere" if sign == "everywhere" else f"{name} is never predicted"
        findings.append(
            Finding(
                "R31", "error" if error else "warn", what,
                f"{voxels.predicted / voxels.valid:.2%} of the predicted voxels in {len(last)} validations, "
                f"Dice {_text(voxels.dice)}",
                f"{voxels.truth / voxels.valid:.2%}, as in the truth",
                "class weights or sampling that reward one answer, a learning rate that is too high, or labels that "
                "do not reach the loss",
                "lower learning_rate, check class weights and ignored labels, then start again",
            )
        )  # fmt: skip
    return findings


def _signs(validated: Validated, limits: Limits) -> Iterator[tuple[str, Sign]]:
    for name, voxels in validated.classes.items():
        if not voxels.valid:
            continue
        predicted, truth = voxels.predicted / voxels.valid, voxels.truth / voxels.valid
        like_constant = voxels.dice is not None and abs(voxels.dice - voxels.constant_dice) < limits["signature"]
        dominant = predicted > limits["dominant"] and truth < limits["dominant_truth"]
        # the Dice alone can be near that of a constant by chance
        constant = name != BACKGROUND and predicted >= limits["everywhere"] > truth and like_constant
        if dominant or constant:
            yield name, "everywhere"
        elif truth >= limits["rare_truth"] and predicted < limits["rare_predicted"]:
            yield name, "nowhere"


def frozen_metric(history: History, settled: int, limits: Limits) -> list[Finding]:
    """R32: the metric stands still, and not because there is nothing left to gain.

    A metric of few voxels may repeat by chance. It is frozen where the network's outputs repeat as well, where it is no
    better than trivial, or where it repeats for long.
    """
    last = list(history[-int(limits["validations"]) :])
    if len(last) < limits["validations"] or not _equal(last, limits) or last[-1].metric >= 1 - limits["difference"]:
        return []
    long = list(history[-int(limits["long_validations"]) :])
    still = bool(last[-1].outputs) and len({each.outputs for each in last}) == 1
    no_better = all(each.trivial is not None and each.metric <= each.trivial + limits["difference"] for each in last)
    begun = last[0].epoch > settled  # before, a network may well predict nothing
    trivial = begun and no_better
    lasting = len(long) == limits["long_validations"] and _equal(long, limits) and (begun or not no_better)
    if not (still or trivial or lasting):
        return []
    causes = (
        "the validated network does not change, or its output is kept from an earlier epoch" if still
        else "the prediction is a constant" if trivial
        else "the metric does not see the prediction"
    )  # fmt: skip
    return [
        Finding(
            "R32", "warn", "the validated metric stands still",
            f"{last[-1].metric:.6f} in {len(long if lasting else last)} validations",
            f"a change of more than {limits['difference']:g}", causes,
            "check that validation gets the network in training, its own batches, and their labels",
        )
    ]  # fmt: skip


def same_sample(samples: Sequence[str]) -> list[Finding]:
    """R32: several validation samples that are all the same one."""
    if len(samples) < 2 or len(set(samples)) > 1:
        return []
    return [
        Finding(
            "R32", "warn", "all validation samples are the same one",
            f"1 digest of {len(samples)} samples", f"{len(samples)} digests",
            "a loader that repeats one batch, or one file imported under several names",
            "check the data set of the validation and its manifest", source="data",
        )
    ]  # fmt: skip


def changed_samples(before: Sequence[str], now: Sequence[str]) -> list[Finding]:
    """R43: a validation on other samples than the one before; their order does not matter."""
    gone, new = Counter(before) - Counter(now), Counter(now) - Counter(before)
    if not gone and not new:
        return []
    return [
        Finding(
            "R43", "warn", "the validation samples change from one epoch to the next",
            f"{max(gone.total(), new.total())} of {max(len(before), len(now))} samples are other ones",
            "the same samples in every validation",
            "a random transform or crop in the validation's chain, or files that changed",
            "take everything random out of validate#preprocessing",
        )
    ]  # fmt: skip


def not_above_trivial(history: History, settled: int, limits: Limits) -> list[Finding]:
    """R34: the last two validations after ``settled`` are no better than what nobody has to learn."""
    last = [validated for validated in history if validated.epoch > settled][-2:]
    if not last or last[-1].trivial is None:
        return []
    best, trivial = max(each.metric for each in last), last[-1].trivial
    if best > trivial:
        return []
    return [
        Finding(
            "R34", "warn", "the network is not better than a trivial answer",
            f"{best:.4f} after {last[-1].epoch} epochs", f"more than {trivial:.4f}, {last[-1].trivial_name}",
            "it has not begun to learn, or it learns something else than what is validated",
            "compare an overlay of the validation with the truth; check learning rate, labels and their classes",
        )
    ]  # fmt: skip


def implausible_fusion(history: History, limits: Limits) -> list[Finding]:
    """R34: PSNR (``*psnr_db``) or SSIM (``*ssim``) of a fused image below what any training reaches soon."""
    if not history:
        return []
    epoch, findings = history[-1].epoch, []
    for name, value in history[-1].figures.items():
        bad_psnr = name.endswith("psnr_db") and epoch > limits["psnr_epoch"] and value < limits["psnr_db"]
        bad_ssim = name.endswith("ssim") and epoch >= limits["ssim_epoch"] and value < limits["ssim"]
        if bad_psnr or bad_ssim:
            least = f"{limits['psnr_db']:g} dB" if bad_psnr else f"{limits['ssim']:g}"
            findings.append(
                Finding(
                    "R34", "warn", f"{name} is implausibly low", f"{value:.3f} in epoch {epoch}", f"at least {least}",
                    "output and reference on different scales, or a sampler that does not end at the image",
                    "compare the ranges of output and reference; check the schedule and the number of steps",
                )
            )  # fmt: skip
    return findings


def worse_than_plain(plain: float, processed: Mapping[str, float]) -> list[Finding]:
    """R34: what was meant to improve a prediction makes it worse.

    Args:
        plain: metric of the plain prediction.
        processed: metric by name of what was done to it: flips, components.
    """
    return [
        Finding(
            "R34", "warn", f"{name} makes the prediction worse", f"{value:.4f}", f"at least {plain:.4f} without it",
            "a threshold that removes true lesions, or views that are not brought back", f"leave out {name}",
        )
        for name, value in processed.items()
        if value < plain
    ]  # fmt: skip


def one_sided_errors(history: History, settled: int, limits: Limits) -> list[Finding]:
    """R39: a class is predicted far too often, or far too rarely, in the last validations."""
    last = _last(history, settled, limits["validations"])
    sides = [dict(_sides(validated.classes, limits)) for validated in last]
    findings = []
    for name, side in sides[-1].items() if sides else ():
        if all(each.get(name) == side for each in sides):
            voxels = last[-1].classes[name]
            over = side == "over"
            findings.append(
                Finding(
                    "R39", "warn", f"{name} is predicted far too {'often' if over else 'rarely'}",
                    f"recall {voxels.hit / voxels.truth:.2f}, precision {voxels.hit / voxels.predicted:.2f} in "
                    f"{len(last)} validations",
                    f"not {'recall' if over else 'precision'} > {limits['high']:g} with "
                    f"{'precision' if over else 'recall'} < {limits['low']:g}",
                    "class weights or sampling that favour it" if over else "class weights or sampling that starve it",
                    f"weight {name} {'down' if over else 'up'}, or set its threshold on validation cases",
                )
            )  # fmt: skip
    return findings


def _sides(classes: Mapping[str, ClassVoxels], limits: Limits) -> Iterator[tuple[str, str]]:
    for name, voxels in classes.items():
        if not voxels.truth or not voxels.predicted:
            continue
        recall, precision = voxels.hit / voxels.truth, voxels.hit / voxels.predicted
        if recall > limits["high"] and precision < limits["low"]:
            yield name, "over"
        elif precision > limits["high"] and recall < limits["low"]:
            yield name, "under"


@dataclass(frozen=True)
class Saturation:
    """How the values of one case end.

    Attributes:
        case: its name.
        low, high: minimum and maximum.
        share: of the values that are exactly at the end where more of them are.
        spike: how many times more than at the value next to it.
    """

    case: str
    low: float
    high: float
    share: float
    spike: float


def saturation_of(values: np.ndarray, case: str) -> Saturation:
    """Return how ``values`` (finite, any shape) end; give only a region with texture: air is rightly constant."""
    distinct, counts = np.unique(values, return_counts=True)
    inner = counts[[1, -2]] if len(distinct) > 2 else np.ones(2)
    ends = counts[[0, -1]]
    fuller = int(np.argmax(ends))
    share = float(ends[fuller] / counts.sum())
    return Saturation(case, float(distinct[0]), float(distinct[-1]), share, float(ends[fuller] / inner[fuller]))


def saturated_output(cases: Sequence[Saturation], limits: Limits, clamps: Sequence[float] = ()) -> list[Finding]:
    """R33: outputs that end at a clamp, or of which too many values are exactly at their minimum or maximum.

    Args:
        cases: of one validation.
        clamps: limits that the output is known to be cut at.
    """
    tolerance = limits["clamp"]
    cut = [
        each
        for each in cases
        if any(abs(end - clamp) <= tolerance for end in (each.low, each.high) for clamp in clamps)
        # rounding to bf16 also gives equal values, but then the next value has many too
        or (each.share > limits["share"] and each.spike >= limits["spike"])
    ]
    if not cut:
        return []
    worst = max(cut, key=lambda each: each.share)
    return [
        Finding(
            "R33", "warn", "the output is cut off at a limit",
            f"{worst.share:.2%} of the values at {worst.low:.4g} or {worst.high:.4g}, in {len(cut)} of "
            f"{len(cases)} cases",
            f"at most {limits['share']:.1%}, and no end within {tolerance:g} of a clamp",
            "a clamp on the sample or on the network's output: there, no gradient goes through",
            "remove the clamp; correct the scale instead",
            cases=tuple(each.case for each in sorted(cut, key=lambda each: -each.share)),
        )
    ]  # fmt: skip


def _last(history: History, settled: int, number: float) -> list[Validated]:
    """Return the last ``number`` validations, or nothing where so many are not yet after ``settled``."""
    last = [validated for validated in history if validated.epoch > settled][-int(number) :]
    return last if len(last) == number else []


def _equal(history: History, limits: Limits) -> bool:
    values = [each.metric for each in history]
    return max(values) - min(values) <= limits["difference"]


def _text(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
