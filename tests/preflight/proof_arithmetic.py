"""A network whose gradient is wrong in half precision alone, planted in the lesion bundle."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from planted import Proof
from proof_network import found, fusion, lesion
from torch import nn

from pipelines.preflight import Inspection
from pipelines.preflight.arithmetic import RULES


class OnlyRightInFloat32(torch.autograd.Function):
    """The identity, whose gradient in half precision is what was in the memory."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient if gradient.dtype == torch.float32 else torch.full_like(gradient, 1e10)


class BrokenKernel(nn.Module):
    """The bundle's network behind an operation of that kind."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return OnlyRightInFloat32.apply(self.network(x))


def in_half(run: Inspection, **changes: Any) -> Inspection:
    return replace(run, precision="bf16", **changes)


PROOFS = [
    Proof(
        rule="R45",
        check="gradients of a batch of the run in its arithmetic against those in float32",
        origin="a bfloat16 kernel whose weight gradient is unset memory for one shape: NaN after four steps",
        planted=lambda: found(RULES, "R45", in_half(lesion(), network=BrokenKernel(lesion().network))),
        healthy=lambda: found(RULES, "R45", in_half(lesion())) + found(RULES, "R45", in_half(fusion())),
    ),
]
