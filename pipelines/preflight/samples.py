"""Real samples for the rules: drawn as the training draws them, without leaving a trace in the run.

A data set, its transforms and the random generators are afterwards what they were before; a batch is small, and holds
what there is to learn: a foreground, a lesion, the place of the largest error.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.preflight.finding import CannotRun
from pipelines.preflight.inspection import Inspection
from pipelines.training.datasets import collate_batch
from pipelines.training.distributed import world_size
from transforms.diffusion import LABEL_CHANNELS, NoiseSchedule, min_snr_weight

Shape = tuple[int, ...]

MOST_DRAWS = 16  # samples until one has what is looked for
AVERAGE_POOL = {2: nn.functional.avg_pool2d, 3: nn.functional.avg_pool3d}


def need_one_process() -> None:
    """Raise ``CannotRun`` in a run of several processes: the battery is in one of them, a loss waits for all."""
    if world_size() > 1:
        raise CannotRun("losses and metrics add up over all processes of a run; check it in a single one")


@contextmanager
def own_draws(seed: int = 0) -> Iterator[None]:
    """Draw from a state of torch's generators of one's own; put theirs back."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def input_shape(inspection: Inspection) -> Shape:
    """Return the shape (1, C, *spatial) of a training sample's image."""
    return (1, *np.shape(next(draw_samples(inspection))["image"]))


def draw_samples(inspection: Inspection) -> Iterator[dict[str, Any]]:
    """Yield training samples; the data set, its epoch and its transforms stay as they are."""
    dataset = copy.copy(inspection.need("train"))
    if hasattr(dataset, "transform"):
        dataset.transform = copy.deepcopy(dataset.transform)
    for index in itertools.count():
        yield dataset[index]


def draw_batch(inspection: Inspection, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and label of ``size`` samples on the run's device: of up to 16 draws those with foreground first.

    In a fusion that is a lesion; then come those with most brain and bone.
    """
    chosen: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for sample in itertools.islice(draw_samples(inspection), max(size, MOST_DRAWS)):
        label = torch.as_tensor(np.asarray(sample["label"]))
        wanted = label[LABEL_CHANNELS.index("lesion")] if inspection.task == "fusion" else label
        (chosen if bool((wanted != 0).any()) else others).append(sample)
        if len(chosen) == size:
            break
    others.sort(key=lambda sample: -int(content(inspection.task, torch.as_tensor(np.asarray(sample["label"]))).sum()))
    batch = collate_batch([*chosen, *others][:size])
    device = inspection.device or torch.device("cpu")
    return batch["image"].to(device), batch["label"].to(device)


def content(task: str, label: torch.Tensor) -> torch.Tensor:
    """Return where a label (C, *spatial) has something to learn, (*spatial): a foreground, or brain and bone."""
    if task == "fusion":
        return (label[LABEL_CHANNELS.index("brain")] + label[LABEL_CHANNELS.index("bone")]) > 0
    return label[0] != 0


def at_time(
    image: torch.Tensor, label: torch.Tensor, schedule: NoiseSchedule, t: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch of a diffusion at time ``t``, with the same noise whenever it is asked for.

    Args:
        image: (B, C + 2, *spatial), x_t and t last.
        label: (B, 7, *spatial), x0 first and the weight last.
    """
    with own_draws():
        noise = torch.randn(label[:, :1].shape).to(label)
    image, label = image.clone(), label.clone()
    image[:, -2:-1] = schedule.add_noise(label[:, :1], noise, t)
    image[:, -1] = t
    label[:, -1] = 1.0 if schedule.name == "none" else min_snr_weight(schedule, t)
    return image, label


def crop_to(
    image: torch.Tensor, label: torch.Tensor, size: Sequence[int], weight: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a batch cropped to ``size``: where ``weight`` (B, 1, *spatial) sums up to most, or in the middle."""
    pairs = []
    for number, (one, truth) in enumerate(zip(image, label, strict=True)):
        starts = [(length - voxels) // 2 for voxels, length in zip(size, one.shape[1:], strict=True)]
        if weight is not None and bool(weight[number].any()):
            strides = [max(1, voxels // 2) for voxels in size]
            pooled = AVERAGE_POOL[len(size)](weight[number : number + 1].float(), list(size), strides)[0, 0]
            best = np.unravel_index(int(pooled.argmax()), tuple(pooled.shape))
            starts = [int(index) * stride for index, stride in zip(best, strides, strict=True)]
        window = [slice(start, start + voxels) for start, voxels in zip(starts, size, strict=True)]
        pairs.append((one[(slice(None), *window)], truth[(slice(None), *window)]))
    return torch.stack([one for one, _ in pairs]), torch.stack([truth for _, truth in pairs])


def window_of(item: Mapping[str, Any], size: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return image and label of a case, (1, C, *spatial), about its middle: one window, a few slices if it is one."""
    window = []
    for voxels, length in zip(size, np.shape(item["image"])[1:], strict=True):
        wanted = min(voxels if voxels > 1 else 4, length)
        window.append(slice((length - wanted) // 2, (length - wanted) // 2 + wanted))
    return {
        key: torch.as_tensor(np.asarray(item[key])[(slice(None), *window)].copy())[None] for key in ("image", "label")
    }


@torch.no_grad()
def predict(
    inspection: Inspection, network: nn.Module, item: Mapping[str, torch.Tensor], inferer: Any = None
) -> torch.Tensor:
    """Return what validation makes of a case (1, C, *spatial): a label map, or a fused image (1, 1, *spatial)."""
    output = (inferer or inspection.need("inferer"))(item["image"].to(inspection.device or "cpu"), network)
    if inspection.task == "segmentation":
        return output.argmax(1, keepdim=True) if output.shape[1] > 1 else (output > 0).int()
    return output
