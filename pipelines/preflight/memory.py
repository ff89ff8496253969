"""Does the run fit? R16: what is held in memory, on how many processes, and how often the network is alive.

Cases in the content cache are read by memory map: their pages are the system's, and no process holds them. What counts
is what a data set really holds, once in every process and every worker of it, and the case that each has in its hands.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from pipelines.inference.inferers import AutocastInferer
from pipelines.inference.memory import available_bytes
from pipelines.preflight.finding import CannotRun, Finding
from pipelines.preflight.inspection import Inspection
from pipelines.preflight.rule import Rule
from pipelines.preflight.samples import draw_batch, need_one_process, own_draws
from pipelines.training.distributed import world_size

Limits = Mapping[str, float]

GIB = 2**30
_HELD_IN = ("cases", "_cache", "data")  # attributes in which data sets hold their cases
_PASSED_ON = 4  # levels of attributes in which a second network is looked for


@dataclass(frozen=True)
class Demand:
    """What the data sets of one process hold, in bytes, and how many hold it.

    Attributes:
        held: by the data sets, for as long as the run takes.
        largest: case that is whole in memory at one time.
        processes: of the run on this machine.
        workers: of each process.
    """

    held: int
    largest: int
    processes: int = 1
    workers: int = 0

    @property
    def total(self) -> int:
        """Bytes over all processes and workers."""
        return (self.held + self.largest) * self.processes * (1 + self.workers)


def judge_memory(demand: Demand, available: int, limits: Limits) -> list[Finding]:
    """R16: bytes held, times processes, times workers, against the memory of the machine."""
    if demand.total <= limits["share"] * available:
        return []
    return [
        Finding(
            rule="R16",
            severity="error",
            what="memory: the cases do not fit",
            measured=f"{demand.total / GIB:.1f} GiB: {demand.held / GIB:.1f} held, {demand.largest / GIB:.1f} in use, "
            f"{demand.processes} process(es) with {demand.workers} worker(s) each",
            threshold=f"{100 * limits['share']:g} % of {available / GIB:.1f} GiB",
            cause="cases are kept in memory, once in every process and worker",
            fix="read cases by memory map from the content cache, or take fewer workers",
        )
    ]


def judge_copies(copies: int, parameters: int) -> list[Finding]:
    """R16: how many further networks of the same build the pieces of the run hold, its average apart."""
    if not copies:
        return []
    return [
        Finding(
            rule="R16",
            severity="error",
            what="memory: the network is there more than once",
            measured=f"{copies} further of {parameters:,} parameters",
            threshold="one, and its average",
            cause="a second network was built for another phase, for validation or for a teacher",
            fix="load weights into the network that is there",
        )
    ]


def judge_peak(peak: int, available: int, limits: Limits) -> list[Finding]:
    """R16: the largest memory of a training step on the device."""
    if peak <= limits["peak"] * available:
        return []
    return [
        Finding(
            rule="R16",
            severity="error",
            what="memory: a training step nearly fills the device",
            measured=f"{peak / GIB:.2f} of {available / GIB:.2f} GiB",
            threshold=f"{100 * limits['peak']:g} %",
            cause="batch or patch is too large for the device",
            fix="take a smaller batch_size, then a smaller patch_size",
        )
    ]


def held_bytes(value: Any) -> int:
    """Return the bytes of all arrays and tensors in a nest of containers and data classes; memory maps hold none."""
    return sum(_array_bytes(value, set()))


def _array_bytes(value: Any, seen: set[int]) -> Iterable[int]:
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, np.ndarray):
        yield 0 if _is_mapped(value) else value.nbytes
    elif isinstance(value, torch.Tensor):
        yield value.numel() * value.element_size()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _array_bytes(each, seen)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _array_bytes(each, seen)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _array_bytes(vars(value), seen)


def _is_mapped(array: np.ndarray) -> bool:
    """Return whether an array, or what it is a view of, is a memory map."""
    base: Any = array
    while base is not None:
        if isinstance(base, np.memmap):
            return True
        base = getattr(base, "base", None)
    return False


def check_memory(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R16 for the data sets of training and validation, and for the networks in the pieces of the run."""
    held, largest = 0, 0
    for dataset in (inspection.train, inspection.validation):
        if dataset is not None:
            held += held_bytes([getattr(dataset, name, None) for name in _HELD_IN])
            largest = max(largest, _largest_case(getattr(dataset, "cases", ())))
    if inspection.train is None:
        raise CannotRun("the bundle names no train")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    demand = Demand(held, largest, processes, int(inspection.config.get("workers") or 0))
    available = available_bytes()
    if available is None:
        raise CannotRun("the system does not say how much memory there is")
    return judge_memory(demand, available, limits)


def _largest_case(cases: Any) -> int:
    """Return the bytes of the largest case of the content cache, when it is whole in memory."""
    sizes = [sum(about.get("bytes", 0) for about in case.arrays.values()) for case in cases if hasattr(case, "arrays")]
    return max(sizes, default=0)


def check_copies(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R16: other networks of the same build that inferer, loss, metrics or further pieces hold."""
    network = inspection.need("network")
    pieces = [inspection.inferer, inspection.loss, list(inspection.metrics.values()), list(inspection.extra.values())]
    own = {id(module) for module in network.modules()}
    found = {id(each) for each in _networks(pieces, set(), 0) if _build(each) == _build(network)} - own
    return judge_copies(len(found), sum(parameter.numel() for parameter in network.parameters()))


def _build(network: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in network.named_parameters()]


def _networks(value: Any, seen: set[int], depth: int) -> Iterable[nn.Module]:
    """Yield every network in a nest of containers, functions and objects; an average is meant to be there."""
    if id(value) in seen or depth > _PASSED_ON or isinstance(value, (AveragedModel, torch.Tensor, np.ndarray, str)):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _networks(each, seen, depth + 1)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _networks(each, seen, depth + 1)
    elif isinstance(value, partial):
        yield from _networks([*value.args, value.keywords], seen, depth)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _networks(vars(value), seen, depth)


def check_peak(inspection: Inspection, limits: Limits) -> list[Finding]:
    """R16: one training step at the run's patch and batch on a GPU, with gradients and the optimiser's two moments."""
    device = inspection.device
    if device is None or device.type != "cuda":
        raise CannotRun("the run has no GPU whose memory could be measured")
    need_one_process()
    phase = inspection.need("plan")[0]
    loss = inspection.need("loss")(phase.loss)
    image, label = draw_batch(inspection, phase.batch_size)
    torch.cuda.reset_peak_memory_stats(device)
    network = copy.deepcopy(inspection.need("network")).train()
    optimizer = torch.optim.AdamW(network.parameters())
    with own_draws():
        loss(AutocastInferer(inspection.precision)(image, network), label).backward()
        optimizer.step()
    peak = torch.cuda.max_memory_reserved(device)
    return judge_peak(peak, torch.cuda.get_device_properties(device).total_memory, limits)


RULES: tuple[Rule, ...] = (
    Rule("R16", "cases in memory", check_memory, {"share": 0.8}),
    Rule("R16", "one network", check_copies),
    Rule("R16", "peak of a step on the device", check_peak, {"peak": 0.9}, when="smoke"),
)
