"""Sums over the processes that share a batch, through which gradients flow: the loss of the whole batch, not of a part.

Dice over a batch, and a mean over kept voxels, are no means of their parts' values: averaging what each process finds
would be another loss than that of one process. nnU-Net gathers the same sums for the same reason.
"""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.distributed.nn import functional as dist_functional


def summed_over_processes(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of ``values`` over all processes; in a single one, ``values`` itself.

    Every process has to call this equally often. The gradient that reaches ``values`` is that of the sum of every
    process's loss: with the average that ``DistributedDataParallel`` takes, it is the gradient of one loss.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    return dist_functional.all_reduce(values)
