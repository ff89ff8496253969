"""R23: does the configured sampler return the distribution that its denoiser knows?

For x0 ~ N(1, 0.3^2) in every voxel, x_t ~ N(a, 0.09 a^2 + s^2), and the best denoiser is known:
E[x0 | x_t] = 1 + 0.09 a / (0.09 a^2 + s^2) (x_t - a). A right sampler, given it in place of a network, returns
N(1, 0.3^2) again. Few steps lose some spread; a sampler that is wrong loses the mean too, or gains nothing by more.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from transforms.diffusion import NoiseSchedule

MEAN, STD = 1.0, 0.3
VOXELS = 32_768
LEAST_SIZE = 8  # voxels along an axis of the volume that is sampled


def exact_denoiser(schedule: NoiseSchedule) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the best denoiser of N(1, 0.3^2): (B, C + 2, *spatial), x_t and t last, to (B, 1, *spatial)."""

    def denoise(x: torch.Tensor) -> torch.Tensor:
        t = float(x[0, -1].max())
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = alpha**2 * STD**2 + sigma**2
        gain = alpha * STD**2 / total if total else 0.0
        return MEAN + gain * (x[:, -2:-1] - alpha * MEAN)

    return denoise


def judge_sampler(
    mean: float, std: float | None, limits: Mapping[str, float], finer_std: float | None = None, steps: int = 0
) -> list[Finding]:
    """R23: mean and standard deviation of what a sampler returns for the exact denoiser of N(1, 0.3^2).

    Args:
        mean, std: of the samples; std is None where there is no noise.
        limits: ``mean``, ``std``: relative errors.
        finer_std: standard deviation with ten times the steps: where that is right, the sampler is right and coarse.
        steps: of the sampler.
    """
    findings = []
    off = abs(mean / MEAN - 1)
    if not off <= limits["mean"]:
        findings.append(
            Finding(
                rule="R23",
                severity="error",
                what="sampler: it does not return the mean that its denoiser knows",
                measured=f"mean {mean:.3f} of {MEAN:g}, {100 * off:.1f} % off",
                threshold=f"{100 * limits['mean']:g} %",
                cause="the coefficients of a step are not those of the two times that it goes between",
                fix="take the coefficients from the schedule at both times of a step",
            )
        )
    lost = 0.0 if std is None else abs(std / STD - 1)
    if not lost <= limits["std"]:
        coarse = finer_std is not None and abs(finer_std / STD - 1) <= limits["std"] and not findings
        findings.append(
            Finding(
                rule="R23",
                severity="warn" if coarse else "error",
                what="sampler: it does not return the spread that its denoiser knows",
                measured=f"standard deviation {std:.3f} of {STD:g}, {100 * lost:.1f} % off in {steps} steps",
                threshold=f"{100 * limits['std']:g} %",
                cause="too few steps" if coarse else "noise is added or taken away with another step's coefficients",
                fix="take more sampling steps" if coarse else "correct the sampler",
            )
        )
    return findings


def check_sampler(inspection: Inspection, limits: Mapping[str, float]) -> list[Finding]:
    """R23 on the inferer of validation: its schedule, times, steps and windows, without guidance."""
    inferer = inspection.need("inferer")
    schedule = getattr(inferer, "schedule", None)
    if not isinstance(schedule, NoiseSchedule) or not hasattr(inferer, "condition_channels"):
        raise CannotRun("the inferer is no sampler")
    size = _size(inspection)
    mean, std = _sampled(inferer, schedule, size)
    if schedule.name == "none":
        return judge_sampler(mean, None, limits)
    steps = len(getattr(inferer, "times", ())) - 1
    finer = None
    if abs(std / STD - 1) > limits["std"]:
        finer = _finer(inferer, schedule, size, steps)
    return judge_sampler(mean, std, limits, finer, steps)


def _sampled(inferer: Any, schedule: NoiseSchedule, size: tuple[int, ...], times: Any = None) -> tuple[float, float]:
    """Return mean and standard deviation of one volume on the diffusion scale; the run's sampler stays as it is."""
    own = copy.copy(inferer)
    own.samples, own.guidance = 1, None
    if times is not None:
        own.times = times
    condition = torch.zeros(1, int(inferer.condition_channels), *size)
    with torch.no_grad():
        x = 2 * own(condition, exact_denoiser(schedule))[:, :1].double() - 1
    return float(x.mean()), float(x.std())


def _finer(inferer: Any, schedule: NoiseSchedule, size: tuple[int, ...], steps: int) -> float | None:
    """Return the spread with every step divided into ten, or None where the sampler has no times."""
    times = list(getattr(inferer, "times", ()))
    if steps < 1:
        return None
    finer = [t + (to - t) * i / 10 for t, to in itertools.pairwise(times) for i in range(10)] + [times[-1]]
    return _sampled(inferer, schedule, size, finer)[1]


def _size(inspection: Inspection) -> tuple[int, ...]:
    """Return a volume of one window or more, with voxels enough for a standard deviation to be known to a percent."""
    patch = [max(int(each), 1) for each in inspection.contract.get("patch_size", (32, 32, 32))]
    thin = [axis for axis, each in enumerate(patch) if each < LEAST_SIZE]
    for axis in thin:
        patch[axis] = LEAST_SIZE
    if thin and math.prod(patch) < VOXELS:
        patch[thin[-1]] = -(-VOXELS * LEAST_SIZE // math.prod(patch))
    return tuple(patch)


RULES: tuple[Rule, ...] = (Rule("R23", "sampler", check_sampler, {"mean": 0.05, "std": 0.15}, tasks=("fusion",)),)
