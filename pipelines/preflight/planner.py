"""What a cohort's fingerprint suggests: spacing, patch, network and batch, as overrides with the reason of each.

The questions are those of nnU-Net (Isensee et al., Nature Methods 18, 203-211, 2021), answered from three principles:
voxels as most scanners made them; a patch that is a cube of tissue as large as the memory allows and no larger than a
case; and the network that ``plan_unet`` makes of both. The memory is not estimated by a formula: the network itself is
run without data (torch's meta device) and the bytes that it keeps for the backward pass are counted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from pipelines.networks import conditional_denoiser, plan_unet, segmentation_network
from pipelines.preflight.finding import CannotRun
from pipelines.preflight.fingerprint import AXES, CaseFigures, Fingerprint, Grid, require_cases
from pipelines.preflight.inspection import Inspection
from transforms.errors import BundleError

MEMORY_GB = 8.0  # planned for where there is no GPU to ask
USED_SHARE = 0.8  # of the memory; the rest is for the context, workspaces and what else runs
WORKSPACE_GB = 1.0  # of the driver and of the libraries' convolutions
BYTES_PER_VALUE = 4  # planned for float32: what fits then, fits in every arithmetic
BYTES_PER_WEIGHT = 5 * BYTES_PER_VALUE  # weight, gradient, two moments of AdamW, average
FEWEST_SAMPLES = 2  # per step
LARGEST_BATCH_SHARE = 0.05  # of all training voxels in one step
THICK = 3.0  # times the finest spacing
MOST_HALVINGS = 5
FEWEST_FEATURES = 4  # voxels per axis that pooling may leave, as in ``plan_unet``
STEPS_PER_OCTAVE = 8  # of the patch's side while its largest size is searched

Build = Callable[[Sequence[float], Sequence[int]], nn.Module]


@dataclass(frozen=True)
class Proposal:
    """An option of the bundle, the value that suits the cohort, the run's own value, and why."""

    option: str
    value: Any
    current: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """What suits a cohort. ``network`` tells kernels and strides in words."""

    proposals: tuple[Proposal, ...]
    network: str
    memory_gb: float

    @property
    def command(self) -> str:
        """The proposals as overrides of the command line."""
        return " ".join(f"--{each.option} {_word(each.value)}" for each in self.proposals)


@dataclass(frozen=True)
class Setting:
    """A kind of network that a plan is made for.

    Attributes:
        axes: that are pooled: 3 of a volume, 2 of slices.
        channels: of the input, all that the network is given per voxel.
        build: network of (spacing in mm, patch), with ``axes`` or three axes as the bundle has it.
        stages: most resolutions.
    """

    axes: int
    channels: int
    build: Build
    stages: int = MOST_HALVINGS + 1


def plan_for(inspection: Inspection, fingerprint: Fingerprint, memory_gb: float | None = None) -> Plan:
    """Return what suits a run's cohort, within the memory of its GPU (or ``MEMORY_GB``).

    Raises:
        CannotRun: no plan is made for this task, or there are no training cases.
    """
    contract = inspection.need("contract")
    setting = setting_of(inspection)
    memory = memory_of(inspection.device) if memory_gb is None else memory_gb
    training = {case.case for case in require_cases(fingerprint)}
    grids = [grid for grid in fingerprint.grids if grid.case in training]
    if any(len(grid.spacing_mm) != 3 for grid in grids):
        raise CannotRun("a plan is made for volumes of three axes")
    spacing, why_spacing = spacing_for(grids)
    smallest, why_small = smallest_case(fingerprint)
    patch, why_patch = patch_for(setting, spacing, smallest, memory)
    total = sum(math.prod(case.extent_mm) for case in require_cases(fingerprint)) / math.prod(spacing)
    batch, why_batch = batch_for(setting, spacing, patch, memory, total)
    filters = [
        Proposal(
            "filters", None, contract.get("filters"), "the network planned from spacing and patch, 32 to 320 filters"
        )
    ]
    plan = plan_unet(spacing[: setting.axes], patch[: setting.axes], maximum_stages=setting.stages)
    return Plan(
        (
            Proposal("spacing", spacing, contract.get("spacing"), why_spacing),
            Proposal("patch_size", patch, contract.get("patch_size"), f"{why_patch}; {why_small}"),
            *(filters if inspection.task == "segmentation" else []),
            Proposal("batch_size", batch, inspection.config.get("batch_size"), why_batch),
        ),
        f"{plan.stages} resolutions; strides {_steps(plan.strides)}; kernels {_steps(plan.kernels)}",
        memory,
    )


def setting_of(inspection: Inspection) -> Setting:
    """Return the kind of network of a run.

    Raises:
        CannotRun: a task whose networks are not planned here.
    """
    contract = inspection.need("contract")
    dimensions = contract.get("dimensions", 3)
    axes = 3 if dimensions == 3 else 2
    if inspection.task == "segmentation":
        channels, labels = len(contract["modalities"]), len(contract["labels"])
        slices = int(contract.get("stack_slices", 5))

        def segmentation(spacing: Sequence[float], patch: Sequence[int]) -> nn.Module:
            return segmentation_network(dimensions, channels, labels, spacing, patch, None, slices)

        return Setting(axes, channels, segmentation)
    if inspection.task == "fusion":
        condition = 2 + len(contract["windows"])
        widths = list(contract["channels"])
        stack = int(contract.get("stack_slices", 3))

        def denoiser(spacing: Sequence[float], patch: Sequence[int]) -> nn.Module:
            return conditional_denoiser(dimensions, condition, spacing, patch, widths, stack_slices=stack)

        return Setting(axes, condition + 2, denoiser, stages=len(widths))
    raise CannotRun(f"no plan is made for the task {inspection.task}")


def memory_of(device: torch.device | None) -> float:
    """Return the memory of a GPU in GB, or ``MEMORY_GB`` where the run has none."""
    if device is not None and device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory) / 1e9
    return MEMORY_GB


def spacing_for(grids: Sequence[Grid]) -> tuple[list[float], str]:
    """Return the spacing (mm) to resample to, and why.

    Per axis the median over the cases: half of them then lose no detail, and few gain voxels without content. Of an
    axis at least three times as coarse as the finest, the 10th percentile, but nothing finer than the finest axis:
    halving the slices of the better scans costs more than interpolating in the others.
    """
    table = np.array([grid.spacing_mm for grid in grids], dtype=np.float64)
    medians = np.median(table, axis=0)
    finest = float(medians.min())
    spacing, thick = [], []
    for axis, median in enumerate(medians):
        if median >= THICK * finest:
            median = max(float(np.percentile(table[:, axis], 10.0)), finest)
            thick.append(AXES[axis])
        spacing.append(round(float(median), 3))
    if np.ptp(table, axis=0).max() <= 1e-3:
        reason = f"all {len(grids)} training cases have it"
    else:
        low, high = table.min(axis=0), table.max(axis=0)
        reason = f"median of {len(grids)} training cases per axis, from {_mm(low)} to {_mm(high)} mm"
        reason += f"; along {' and '.join(thick)} slices are thick: the 10th percentile" if thick else ""
    return spacing, reason


def smallest_case(fingerprint: Fingerprint) -> tuple[list[float], str]:
    """Return the smallest extent (mm) of the training cases per axis, outliers in it aside, and words."""
    cases = require_cases(fingerprint)
    extents, left_out = [], set()
    for axis, name in enumerate(AXES[: len(cases[0].extent_mm)]):
        odd = {each.case for each in fingerprint.outliers if each.figure == f"extent {name} (mm)"}
        usual: list[CaseFigures] = [case for case in cases if case.case not in odd] or cases
        left_out |= {case.case for case in cases if case.case in odd}
        extents.append(min(case.extent_mm[axis] for case in usual))
    words = f"the foreground of every case is at least {_mm(extents)} mm"
    return extents, words + (f" ({len(left_out)} outliers aside)" if left_out else "")


def patch_for(
    setting: Setting, spacing: Sequence[float], smallest_mm: Sequence[float], memory_gb: float
) -> tuple[list[int], str]:
    """Return the patch (voxels) and why: the largest cube of tissue with two samples in the memory, inside every case.

    Raises:
        CannotRun: not even the smallest patch fits.
    """
    largest, least = max(smallest_mm[: setting.axes]), 4 * FEWEST_FEATURES * min(spacing[: setting.axes])
    octaves = max(0.0, math.log2(largest / least))
    sides = [largest * 2 ** (-n / STEPS_PER_OCTAVE) for n in range(math.ceil(octaves * STEPS_PER_OCTAVE) + 1)]
    valid = [valid_patch(setting, spacing, [min(side, mm) for mm in smallest_mm]) for side in sides]
    patches = [list(patch) for patch in {tuple(patch) for patch in valid if patch is not None}]
    if not patches:
        raise CannotRun("the network has more resolutions than a patch of this cohort allows")
    patches.sort(key=math.prod)
    low, high = 0, len(patches)  # patches[:low] are known to fit, patches[high:] known not to
    while low < high:
        middle = (low + high) // 2
        if needed_gb(setting, spacing, patches[middle], FEWEST_SAMPLES) <= USED_SHARE * memory_gb:
            low = middle + 1
        else:
            high = middle
    if low == 0:
        raise CannotRun(f"no patch of this cohort fits into {memory_gb:.1f} GB with {FEWEST_SAMPLES} samples per step")
    bounded = low == len(patches)
    limit = "no case would hold a larger one" if bounded else f"a larger one needs more than {memory_gb:.1f} GB"
    size = _mm([n * mm for n, mm in zip(patches[low - 1], spacing, strict=True)])
    return patches[low - 1], f"{size} mm, as near to a cube of tissue as the cases allow; {limit}"


def valid_patch(setting: Setting, spacing: Sequence[float], wanted_mm: Sequence[float]) -> list[int] | None:
    """Return the largest patch (voxels, three axes) within ``wanted_mm`` that the network can pool, or None.

    Sizes are rounded down to what the plan of that very patch divides; an axis that is not pooled keeps its size. A
    fine axis has at least 16 voxels, without which there is no U-Net, even where a case is smaller.
    """
    axes = setting.axes
    wanted = [max(mm / step, 1.0) for mm, step in zip(wanted_mm, spacing, strict=True)]
    finest = min(spacing[:axes])
    for axis in range(axes):
        if spacing[axis] < 2 * finest:
            wanted[axis] = max(wanted[axis], 4.0 * FEWEST_FEATURES)
    halvings = [_halvings(size, setting.stages) for size in wanted[:axes]]
    patch = [_down(size, 2**n) for size, n in zip(wanted[:axes], halvings, strict=True)]
    try:
        plan = plan_unet(spacing[:axes], patch, maximum_stages=setting.stages)
        finer = [_down(size, step) for size, step in zip(wanted[:axes], plan.divisor, strict=True)]
        if plan_unet(spacing[:axes], finer, maximum_stages=setting.stages).divisor == plan.divisor:
            patch = finer
        stages = plan_unet(spacing[:axes], patch, maximum_stages=setting.stages).stages
    except BundleError:
        return None
    if setting.stages <= MOST_HALVINGS and stages < setting.stages:  # a network whose stages are given
        return None
    return [*patch, *[1] * (3 - axes)]


def batch_for(
    setting: Setting, spacing: Sequence[float], patch: Sequence[int], memory_gb: float, training_voxels: float
) -> tuple[int, str]:
    """Return the samples per step and why: what fits, but at most 5 % of all training voxels, and at least two."""
    first, second = (needed_gb(setting, spacing, patch, n) for n in (1, 2))
    fits = 1 + math.floor((USED_SHARE * memory_gb - first) / (second - first))
    most = max(FEWEST_SAMPLES, math.floor(LARGEST_BATCH_SHARE * training_voxels / math.prod(patch)))
    batch = max(FEWEST_SAMPLES, min(fits, most))
    needed = first + (batch - 1) * (second - first)
    why = "5 % of the training voxels in a step" if batch < fits else f"{USED_SHARE:.0%} of {memory_gb:.1f} GB"
    return batch, f"needs about {needed:.1f} GB in float32; more would pass {why}"


def needed_gb(setting: Setting, spacing: Sequence[float], patch: Sequence[int], samples: int) -> float:
    """Return the memory of a training step in GB: weights and all that stands beside them, what is kept for the
    backward pass, the two largest of these tensors once more, as gradients on their way, and ``WORKSPACE_GB``.

    Args:
        setting: kind of network.
        spacing: mm.
        patch: voxels.
        samples: per step.
    """
    with torch.device("meta"):
        network = setting.build(spacing, patch).train()
        kept, largest = kept_for_backward(network, torch.empty(1, setting.channels, *patch))
    weights = sum(weight.numel() for weight in network.parameters())
    return WORKSPACE_GB + (weights * BYTES_PER_WEIGHT + samples * (kept + 2 * largest) * BYTES_PER_VALUE) / 1e9


def kept_for_backward(network: nn.Module, image: torch.Tensor) -> tuple[int, int]:
    """Return how many values autograd keeps of a forward pass (each memory once, no weights), and the largest tensor.

    On the meta device this costs neither memory nor arithmetic.
    """
    weights = {StorageWeakRef(weight.untyped_storage()).cdata for weight in network.parameters()}
    seen: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        memory = StorageWeakRef(tensor.untyped_storage()).cdata
        if memory not in weights:
            seen[memory] = tensor  # held, so that its address is not given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        network(image)
    sizes = [tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in seen.values()]
    return sum(sizes), max(sizes, default=0)


def _halvings(size: float, stages: int) -> int:
    return max(0, min(stages - 1, math.floor(math.log2(size / FEWEST_FEATURES))))


def _down(size: float, step: int) -> int:
    return max(step, step * math.floor(round(size / step, 6)))


def _mm(lengths: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{mm:.4g}" for mm in lengths)


def _steps(table: Sequence[Sequence[int]]) -> str:
    return " ".join("x".join(map(str, row)) for row in table)


def _word(value: Any) -> str:
    return f"'{json.dumps(value)}'" if isinstance(value, list) else str(value)
