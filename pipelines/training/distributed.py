"""One run on several processes: who am I, who writes, how is the work shared.

Started by ``torchrun``, or by ``srun`` on a cluster, with ``configs/multi_gpu_train.yaml`` laid over the training.
Files are written by the main process alone. Everything here also works, and does nothing, in a single process.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from transforms.errors import BundleError

T = TypeVar("T")
logger = logging.getLogger(__name__)

DEFAULT_PORT = 29500
# Longer than the main process may take to write a run's folder, shorter than a night.
PATIENCE = timedelta(hours=2)
# A thread of gloo lets go of the tensors of an exchange a moment after it; where Python is gone by then, it aborts.
MOMENT = 0.2  # seconds


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def place_in(environment: Mapping[str, str]) -> Place | None:
    """Return the place that the launcher has written into the environment, or None where there is no launcher.

    ``torchrun`` sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT. ``srun`` sets SLURM_PROCID,
    SLURM_STEP_NUM_TASKS, SLURM_LOCALID and SLURM_STEP_NODELIST, whose first node is the meeting point; the port follows
    from the job's number, so that two jobs on one node do not meet.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Place(
            int(environment["RANK"]),
            int(environment["WORLD_SIZE"]),
            int(environment.get("LOCAL_RANK", 0)),
            environment.get("MASTER_ADDR", "127.0.0.1"),
            int(environment.get("MASTER_PORT", DEFAULT_PORT)),
        )
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        job = int(environment.get("SLURM_JOB_ID", 0))
        return Place(
            int(environment["SLURM_PROCID"]),
            int(environment["SLURM_STEP_NUM_TASKS"]),
            int(environment.get("SLURM_LOCALID", 0)),
            environment.get("MASTER_ADDR") or first_node(environment.get("SLURM_STEP_NODELIST", "127.0.0.1")),
            int(environment.get("MASTER_PORT", 20000 + job % 10000)),
        )
    return None


def first_node(nodes: str) -> str:
    """Return the first host of a SLURM list: ``gpu[03-05,9],x1`` -> ``gpu03``, ``r[1-2]n[7-9]`` -> ``r1n7``."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]  # at the first comma outside of brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def join_processes(device_name: str) -> None:
    """Join the other processes of the run: nccl on GPUs, gloo on CPUs. In ``initialize`` of the configuration.

    Raises:
        BundleError: there is no launcher, or the processes do not find one another.
    """
    place = place_in(os.environ)
    if place is None:
        raise BundleError(
            "multi_gpu_train.yaml needs several processes",
            "neither torchrun nor srun has started this one",
            "start it with: torchrun --standalone --nproc_per_node=2 -m monai.bundle run ...",
        )
    on_gpu = torch.cuda.is_available() and device_name in ("auto", "cuda")
    if on_gpu:
        torch.cuda.set_device(place.local_rank)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"tcp://{place.address}:{place.port}" if "RANK" not in os.environ else "env://",
            rank=place.rank,
            world_size=place.world_size,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError) as problem:
        raise BundleError(
            f"process {place.rank} of {place.world_size} cannot join the others at {place.address}:{place.port}",
            str(problem).splitlines()[0],
            "check that the port is free and the node can be reached; set MASTER_PORT to another",
        ) from problem
    atexit.register(time.sleep, MOMENT)
    if not is_main_process():
        logging.getLogger().setLevel(logging.WARNING)


def leave_processes() -> None:
    """Leave the other processes. In ``finalize`` of the configuration."""
    if dist.is_initialized():
        dist.destroy_process_group()


def refuse_unjoined_processes() -> None:
    """Refuse several processes that do not know of one another: each would train alone, and all write one run.

    Raises:
        BundleError: see above.
    """
    place = place_in(os.environ)
    if place is not None and place.world_size > 1 and not dist.is_initialized():
        raise BundleError(
            f"{place.world_size} processes were started for a configuration of one",
            "each would train on its own",
            "add configs/multi_gpu_train.yaml: --config_file \"['configs/train.yaml','configs/multi_gpu_train.yaml']\"",
        )


def rank() -> int:
    """Return the number of this process, 0 in a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Return whether this process writes the run's files."""
    return rank() == 0


def local_device() -> torch.device | None:
    """Return the GPU of this process among those of the run, or None where the run has one process or no GPU."""
    place = place_in(os.environ) if dist.is_initialized() else None
    if place is None or dist.get_backend() != "nccl":
        return None
    return torch.device("cuda", place.local_rank)


def share(items: Sequence[T]) -> Sequence[T]:
    """Return this process's share of ``items``: every item belongs to exactly one process."""
    return items[rank() :: world_size()]


def from_main_process(value: T) -> T:
    """Return the main process's ``value`` in every process."""
    if world_size() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_every_process(value: T) -> list[T]:
    """Return the ``value`` of every process, in the order of ranks."""
    if world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Return whether ``flag`` is set in any process."""
    if world_size() == 1:
        return flag
    box = torch.tensor([int(flag)], device=local_device() or device)
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return bool(box.item())


def wait_for_all() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        dist.barrier()
