"""Learning rate over a run: linear warm-up, then polynomial decay, one step per optimiser step."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from transforms.errors import BundleError


def learning_rate_factor(step: int, total_steps: int, warmup_steps: int, power: float) -> float:
    """Return the factor on the base rate before optimiser step ``step`` (counted from 0).

    ``(step + 1) / warmup_steps`` in the warm-up, then ``(1 - progress) ** power`` with progress from 0 at its end to 1
    at ``total_steps`` (Chen et al. 2017, arXiv:1606.00915, with nnU-Net's power of 0.9).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return float(max(0.0, 1.0 - progress) ** power)


def polynomial_with_warmup(
    optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, power: float = 0.9
) -> LambdaLR:
    """Return a scheduler to step after every optimiser step.

    Raises:
        BundleError: the warm-up is as long as the run, or the power is negative.
    """
    if power < 0:
        raise BundleError(f"decay_power {power}", "a negative power lets the learning rate grow", "take 0 or more")
    if not 0 <= warmup_steps < total_steps:
        raise BundleError(
            f"warm-up of {warmup_steps} steps in a run of {total_steps}",
            "the learning rate would never reach its value",
            "shorten warmup_epochs or lengthen max_epochs",
        )
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, warmup_steps, power))
