"""Which samples make which batch, by hand: the same for one process and for several, and from any step on."""

from __future__ import annotations

import random
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from pipelines.training import loaders as module
from pipelines.training.loaders import PatchBatches, patch_loader
from transforms.errors import BundleError


class Numbers(Dataset):
    """Sample i of epoch e is 100 e + i; no length, because an epoch has as many batches as it is asked for."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        value = torch.tensor([100.0 * self.epoch + index])
        return {"image": value, "label": value, "case": str(index)}


def batches_of(monkeypatch: pytest.MonkeyPatch, rank: int, world: int, steps: int, batch: int) -> PatchBatches:
    monkeypatch.setattr(module, "rank", lambda: rank)
    monkeypatch.setattr(module, "world_size", lambda: world)
    return PatchBatches(steps, batch)


@pytest.mark.parametrize(
    ("world", "expected"),
    [
        # three batches of four, as each process makes them
        (1, [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]]),
        (2, [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10, 11]]]),
        (4, [[[0], [4], [8]], [[1], [5], [9]], [[2], [6], [10]], [[3], [7], [11]]]),
    ],
)
def test_indices_by_hand(monkeypatch: pytest.MonkeyPatch, world: int, expected: list[list[list[int]]]) -> None:
    for rank in range(world):
        batches = batches_of(monkeypatch, rank, world, 3, 4)
        assert len(batches) == 3
        assert list(batches) == expected[rank]
        assert list(batches) == expected[rank]  # in every epoch


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))
def test_together_the_processes_make_what_one_makes(steps: int, own: int, world: int, first: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        shares = []
        for rank in range(world):
            batches = batches_of(patch, rank, world, steps, own * world)
            batches.first_step = min(first, steps)
            shares.append(list(batches))
        alone = batches_of(patch, 0, 1, steps, own * world)
        alone.first_step = min(first, steps)
        whole = list(alone)
    assert [list(chain(*parts)) for parts in zip(*shares, strict=True)] == whole
    assert list(chain(*whole)) == list(range(min(first, steps) * own * world, steps * own * world))


@pytest.mark.parametrize(("world", "batch"), [(2, 1), (2, 5), (4, 6)])
def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch, world: int, batch: int) -> None:
    with pytest.raises(BundleError, match=f"batch_size {batch} on {world} processes") as caught:
        batches_of(monkeypatch, 0, world, 3, batch)
    assert str(world) in caught.value.fix


def test_a_run_goes_on_within_its_epoch_once() -> None:
    batches = PatchBatches(3, 2)
    batches.first_step = 2
    assert list(batches) == [[4, 5]]
    assert list(batches) == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_samples_of_its_epoch_in_order(workers: int) -> None:
    data = Numbers()
    loader = patch_loader(data, 3, 2, workers)
    assert len(loader) == 3
    for epoch, first in ((1, 1), (2, 0), (3, 0)):
        data.set_epoch(epoch)  # workers are started anew in every epoch, and so know
        loader.batch_sampler.first_step = first
        expected = [[100.0 * epoch + 2 * step + i for i in (0, 1)] for step in range(first, 3)]
        assert [batch["image"].flatten().tolist() for batch in loader] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_iterating_leaves_the_runs_generators_alone(workers: int) -> None:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    loader = patch_loader(Numbers(), 2, 2, workers)
    for _ in range(2):
        assert len(list(loader)) == 2
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
