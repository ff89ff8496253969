"""Which samples make which batch: the same ones whatever the number of processes and workers, from any step on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from pipelines.training.datasets import collate_batch
from pipelines.training.distributed import rank, world_size
from pipelines.training.signals import heed_the_parent_alone
from transforms.errors import BundleError


class PatchBatches(Sampler[list[int]]):
    """The indices of an epoch's batches, or of this process's share of each batch.

    Batch ``s`` of ``B`` samples holds the indices ``s B`` to ``(s + 1) B - 1``. Of 2 processes with B = 4, the first
    makes samples 0, 1 of the first batch and the second 2, 3: together they see what one process sees.

    Args:
        steps: batches per epoch.
        batch_size: samples per batch, over all processes.

    Raises:
        BundleError: the processes cannot share a batch evenly.
    """

    def __init__(self, steps: int, batch_size: int) -> None:
        if batch_size % world_size():
            raise BundleError(
                f"batch_size {batch_size} on {world_size()} processes",
                "a batch is shared among the processes, each taking as many samples",
                f"take a multiple of {world_size()}",
            )
        self.steps = int(steps)
        self.batch_size = int(batch_size)
        self.first_step = 0  # of the next epoch only: where an interrupted run goes on

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        first, self.first_step = self.first_step, 0
        own = self.batch_size // world_size()
        for step in range(first, self.steps):
            start = step * self.batch_size + rank() * own
            yield list(range(start, start + own))


def patch_loader(dataset: Any, steps: int, batch_size: int, workers: int) -> DataLoader:
    """Return the loader of training patches; its ``batch_sampler`` is a ``PatchBatches``.

    The loader draws its workers' seeds from a generator of its own: the run's generators then stand where they would
    stand without it, and an interrupted run goes on exactly.
    """
    return DataLoader(
        dataset,
        batch_sampler=PatchBatches(steps, batch_size),
        num_workers=workers,
        collate_fn=collate_batch,
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=heed_the_parent_alone,
        pin_memory=torch.cuda.is_available(),
    )
