"""Exponential moving average of the weights: what is validated, saved and shipped."""

from __future__ import annotations

import torch
from torch.optim.swa_utils import AveragedModel

from transforms.errors import BundleError

Tensors = tuple[torch.Tensor, ...] | list[torch.Tensor]


def ramped_decay(updates: int, decay: float) -> float:
    """Return the decay after ``updates`` updates: ``min(decay, (1 + n) / (10 + n))``.

    A constant decay close to 1 would carry the random initial weights far into a short run.
    """
    return min(decay, (1.0 + updates) / (10.0 + updates))


def averaged_network(network: torch.nn.Module, decay: float) -> AveragedModel:
    """Return a copy of ``network`` that follows it: ``average <- d * average + (1 - d) * network``; see ``.module``.

    The first update takes the network as it is; from the n-th on (n = 1, 2, ...), d is ``ramped_decay(n, decay)``.

    Args:
        network: the network in training; make the average before the first forward pass.
        decay: from 0 (the copy equals the network) to below 1.

    Raises:
        BundleError: another decay.
    """
    if not 0 <= decay < 1:
        raise BundleError(f"ema_decay {decay}", "expected a number from 0 to below 1", "correct ema_decay")

    def follow(average: Tensors, current: Tensors, updates: torch.Tensor | int) -> None:
        weight = 1.0 - ramped_decay(int(updates), decay)
        for mean, value in zip(average, current, strict=True):
            if mean.is_floating_point():
                mean.lerp_(value.to(mean.dtype), weight)
            else:
                mean.copy_(value)  # how often batch normalisation has looked

    return AveragedModel(network, multi_avg_fn=follow, use_buffers=True)
