"""Does a forward pass fit? What it needs is counted on tensors that have a shape and no values, without arithmetic.

A process that takes more than there is, is ended by the system without a word; so it is asked before.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def available_bytes(device: torch.device | str = "cpu") -> int | None:
    """Return the memory of this machine, or of the container that it is shared by, or of a GPU.

    All of it, not what is free: on a GPU, what earlier images have left with torch counts as taken and can be used
    again. None where the system does not say.
    """
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = []
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in map(Path, _LIMIT_FILES):
        text = file.read_text().strip() if file.is_file() else ""
        if text.isdigit():
            limits.append(int(text))
    return min(limits, default=None)


def without_values(network: nn.Module) -> nn.Module:
    """Return a copy whose parameters and buffers have shapes only: nothing of the network's size is copied."""
    memo: dict[int, Any] = {}
    for parameter in network.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(network, memo)


def forward_bytes(network: nn.Module, shape: Sequence[int]) -> int:
    """Return the most bytes that tensors hold at one time while a network answers (B, C, *spatial) in float32.

    The image counts, weights do not, nor what a library takes for its own work. Without gradients: what an operation
    has read is freed as soon as nobody needs it.
    """
    empty = without_values(network).eval()
    with torch.no_grad(), _LargestSum() as counted:
        empty(torch.empty(tuple(shape), device="meta"))
    return counted.largest


class _LargestSum(TorchDispatchMode):
    """Adds up, after each operation, the memory of its results and of the earlier ones that are still there."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self._there: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._there[reference.cdata] = (reference, storage.nbytes())
        self._there = {key: held for key, held in self._there.items() if not held[0].expired()}
        self.largest = max(self.largest, sum(nbytes for _, nbytes in self._there.values()))
        return result
