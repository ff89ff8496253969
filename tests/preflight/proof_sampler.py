"""A sampler that strides over times with the coefficients of one step, planted in the fusion bundle."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from planted import Proof
from proof_network import found, fusion

from pipelines.inference import SamplingInferer
from pipelines.preflight.sampler import RULES


class Strides(SamplingInferer):
    """The ancestral step of one of 1000 times, taken while most of them are skipped."""

    def _run(self, denoise: Callable[[torch.Tensor, float], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        for t in [1 - i / 25 for i in range(25)]:
            t = min(t, 0.999)
            alpha, before = math.cos(t * math.pi / 2), math.cos((t - 1e-3) * math.pi / 2)
            sigma, own = math.sin(t * math.pi / 2), (alpha / before) ** 2
            noise = (x - alpha * denoise(x, t)) / sigma
            x = (x - (1 - own) / sigma * noise) / math.sqrt(own)
            x = x + math.sqrt(1 - own) * torch.randn(x.shape, generator=generator)
        return x


def disguised(kind: type[SamplingInferer], **attributes: Any) -> SamplingInferer:
    """Return the bundle's inferer as another kind, or with other attributes."""
    inferer = copy.copy(fusion().inferer)
    inferer.__class__ = kind
    for name, value in attributes.items():
        setattr(inferer, name, value)
    return inferer


PROOFS = [
    Proof(
        rule="R23",
        check="the configured sampler returns the distribution of an exact denoiser",
        origin="one-step coefficients with 25 strides: mean 0.07 and deviation 0.95 in place of 1.00 and 0.30",
        planted=lambda: found(RULES, "R23", replace(fusion(), inferer=disguised(Strides))),
        healthy=lambda: found(RULES, "R23", fusion()),
    )
]
