"""R45 on the run's own network: do its gradients in the run's arithmetic agree with those in float32?

A kernel of half precision may be wrong for one shape alone: in torch 2.13 on CPUs, the weight gradient of a bfloat16
convolution in 3D whose input has two voxels along its first axis holds whatever was in the memory. Losses stay
plausible until the first NaN. So one batch of the run, at its own size, is differentiated both ways.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

import torch
from torch import nn

from pipelines.inference.inferers import AutocastInferer
from pipelines.preflight.condition import wake
from pipelines.preflight.finding import Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import draw_batch, need_one_process, own_draws

Limits = Mapping[str, float]
Gradients = Mapping[str, torch.Tensor]

FP16_SCALE = 2.0**10  # a gradient scaler does the same: small gradients would be 0


def judge_gradients(found: Gradients, exact: Gradients, precision: str, limits: Limits) -> list[Finding]:
    """R45: gradients of one batch in the run's arithmetic against those in float32.

    Args:
        found, exact: gradient by name of the parameter, in float32.
        precision: of the run, for the message.
        limits: ``gradient``: norm of the difference over the norm of the exact one, of all parameters together.
    """
    errors = {name: _norm(found[name] - exact[name]) for name in exact}
    whole = math.sqrt(sum(_norm(each) ** 2 for each in exact.values()))
    error = math.sqrt(sum(each**2 for each in errors.values())) / max(whole, 1e-30)
    if error <= limits["gradient"]:
        return []
    worst = max(errors, key=lambda name: errors[name] if math.isfinite(errors[name]) else math.inf)
    return [
        Finding(
            rule="R45",
            severity="error",
            what=f"network: its gradients in {precision} are not those in float32",
            measured=f"relative error {error:.2g}, most of it in {worst}",
            threshold=f"at most {limits['gradient']:g}",
            cause="a kernel of this device is wrong for a shape in this network, or values leave the range",
            fix="take another patch_size or filters, or --precision fp32",
        )
    ]


def gradients_of(
    network: nn.Module, loss: nn.Module, image: torch.Tensor, label: torch.Tensor, precision: str
) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter that has one, in float32, on the CPU.

    Args:
        network: a copy, in training mode.
        loss: of its outputs and the label.
        image, label: a batch.
        precision: fp32, bf16, fp16.
    """
    scale = FP16_SCALE if precision == "fp16" else 1.0
    network.zero_grad()
    (scale * loss(AutocastInferer(precision)(image, network), label)).backward()
    return {
        name: parameter.grad.detach().float().cpu() / scale
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def check_arithmetic(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R45 on one training sample at the run's own size. In float32 there is nothing to compare with."""
    need_one_process()
    if inspection.precision == "fp32":
        return []
    image, label = draw_batch(inspection, 1)
    loss = inspection.need("loss")(inspection.need("plan")[0].loss)
    network = wake(inspection.need("network")).train()
    with own_draws():
        found, exact = (
            gradients_of(copy.deepcopy(network), loss, image, label, p) for p in (inspection.precision, "fp32")
        )
    return judge_gradients(found, exact, inspection.precision, limits)


def _norm(values: torch.Tensor) -> float:
    return float(values.double().norm())


RULES: tuple[Rule, ...] = (Rule("R45", "arithmetic", check_arithmetic, {"gradient": 0.5}),)
