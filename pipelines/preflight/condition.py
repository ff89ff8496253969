"""R22: does what a denoiser is given decide what it returns? Its condition, the place of things in it, and the noise.

A condition that is pooled to a vector has lost where things are, and one that does not arrive changes nothing; neither
shows in a loss. Networks start with layers of zeros, so ``wake`` gives a copy in which every layer carries something.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import MOST_DRAWS, draw_batch, own_draws

Limits = Mapping[str, float]
SHIFT_VOXELS = 8


@dataclass(frozen=True)
class Responses:
    """By how much a result changes, relative to its own size, when something else is given.

    Attributes:
        swapped: the condition of another case.
        shifted: the same condition, moved.
        noise: another noise; None where there is none.
    """

    swapped: float
    shifted: float
    noise: float | None = None


def judge_responses(found: Responses, limits: Limits) -> list[Finding]:
    """R22: a condition that another, or the same elsewhere, does not change; samples that are all alike."""
    checks = (
        (found.swapped, limits["change"], "the condition of another case", "the condition does not reach the output"),
        (
            found.shifted,
            limits["change"],
            f"the condition moved by {SHIFT_VOXELS} voxels",
            "the condition is pooled to a vector, and has lost where things are",
        ),
        (found.noise, 0.0, "another noise", "the noise does not reach the output: all samples are one"),
    )
    return [
        Finding(
            rule="R22",
            severity="error",
            what=f"network: {given} does not change the output",
            measured=f"{100 * value:.3g} % of the output's spread",
            threshold=f"{'more than' if limit == 0 else 'at least'} {100 * limit:g} %",
            cause=cause,
            fix="lead the condition into the network voxel by voxel, beside x_t",
        )
        for value, limit, given, cause in checks
        if value is not None and (value < limit or value <= 0)
    ]


def check_condition(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R22 at t = 1, where the condition is all that the network has.

    A layer that starts at zero is woken on a copy: what it will carry is what the network carries without it, and is
    measured alone, so that a first guess that is added to the output does not stand in for it.
    """
    network, inferer = inspection.need("network"), inspection.need("inferer")
    channels = getattr(inferer, "condition_channels", None)
    if channels is None:
        raise CannotRun("the inferer does not say how many channels the condition has")
    images, _ = draw_batch(inspection, MOST_DRAWS // 4)
    condition = images[:, :channels]
    other = _least_alike(condition)
    return judge_responses(responses(network, condition[:1], condition[other : other + 1], inferer.schedule), limits)


def _least_alike(condition: torch.Tensor) -> int:
    distance = (condition - condition[:1]).flatten(1).square().mean(1)
    if not float(distance.max()) > 0:
        raise CannotRun("all samples drawn have the same condition")
    return int(distance.argmax())


@torch.no_grad()
def responses(network: nn.Module, condition: torch.Tensor, other: torch.Tensor, schedule: Any) -> Responses:
    """Return how the learnt part of a denoiser responds.

    Args:
        network: maps (1, C + 2, *spatial), condition, x_t and t, to (1, 1, *spatial).
        condition, other: (1, C, *spatial) of two cases.
        schedule: with the ``name`` of the noise; ``none`` has none.
    """
    awake, asleep = wake(network), copy.deepcopy(network).eval()
    without_noise = getattr(schedule, "name", "") == "none"

    def learnt(given: torch.Tensor, seed: int) -> torch.Tensor:
        with own_draws(seed):
            x_t = torch.zeros_like(given[:, :1]) if without_noise else torch.randn(given[:, :1].shape).to(given)
        whole = torch.cat([given, x_t, torch.ones_like(x_t)], 1)
        return awake(whole) if awake.untouched else awake(whole) - asleep(whole)

    result = learnt(condition, 0)
    axis = 2 + int(np.argmax(condition.shape[2:]))
    shift = min(SHIFT_VOXELS, condition.shape[axis] // 4)
    spread = float(result.std()) or float(result.abs().mean()) or 1.0

    def change(changed: torch.Tensor) -> float:
        return float((changed - result).square().mean().sqrt()) / spread

    return Responses(
        change(learnt(other, 0)),
        change(learnt(torch.roll(condition, shift, axis), 0)),
        None if without_noise else change(learnt(condition, 1)),
    )


class _Awake(nn.Module):
    """A copy of a network in which no layer is all zero."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval()
        zero = [
            parameter
            for parameter in self.network.parameters()
            if parameter.ndim >= 2 and parameter.numel() and not bool(parameter.any())
        ]
        self.untouched = not zero
        with own_draws(), torch.no_grad():
            for parameter in zero:
                parameter.copy_(torch.randn(parameter.shape) / math.sqrt(math.prod(parameter.shape[1:])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the copy."""
        return self.network(x)


def wake(network: nn.Module) -> _Awake:
    """Return a copy in eval mode whose all-zero kernels are random; ``untouched`` where there were none."""
    return _Awake(network)


RULES: tuple[Rule, ...] = (Rule("R22", "condition and noise", check_condition, {"change": 0.01}, tasks=("fusion",)),)
