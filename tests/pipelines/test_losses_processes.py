"""The loss of a batch, and its gradient, are the same whether one process or two hold it: Dice is no mean of halves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from pipelines.losses import segmentation_loss

NAMES = ["dice_ce", "dice_focal", "log_cosh_dice_focal"]


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(1, 3, 3, padding=1)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four images with very different amounts of foreground, and masks that leave out very different parts."""
    torch.manual_seed(1)
    share = torch.tensor([0.02, 0.8, 0.3, 0.05]).reshape(4, 1, 1, 1)
    label = (torch.rand(4, 1, 12, 12) < share).long() * torch.randint(1, 3, (4, 1, 12, 12))
    mask = torch.rand(4, 1, 12, 12) < torch.tensor([0.9, 0.2, 0.6, 1.0]).reshape(4, 1, 1, 1)
    return torch.randn(4, 1, 12, 12), label, mask.float()


def losses_and_gradients(model: torch.nn.Module, part: slice) -> dict[str, tuple[float, torch.Tensor]]:
    image, label, mask = (each[part] for each in batch())
    found = {}
    for name in NAMES:
        model.zero_grad()
        loss = segmentation_loss(name)(model(image), label, mask)
        loss.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found[name] = (float(loss.detach()), torch.cat(gradients))
    return found


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = DistributedDataParallel(network())
    torch.save(losses_and_gradients(model, slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    alone = losses_and_gradients(network(), slice(None))
    halves = [losses_and_gradients(network(), slice(2 * r, 2 * r + 2)) for r in range(2)]
    for rank in range(2):
        shared = torch.load(tmp_path / f"{rank}.pt")
        for name in NAMES:
            assert shared[name][0] == pytest.approx(alone[name][0], abs=1e-6)
            torch.testing.assert_close(shared[name][1], alone[name][1], atol=1e-6, rtol=1e-5)
    # Planted failure: the mean of what each half finds for itself is another loss, with another gradient.
    for name in NAMES:
        assert abs(sum(half[name][0] for half in halves) / 2 - alone[name][0]) > 1e-4
        assert (sum(half[name][1] for half in halves) / 2 - alone[name][1]).abs().max() > 1e-3
