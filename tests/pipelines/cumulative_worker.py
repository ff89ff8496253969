"""One process of several: measure every n-th case and write what the metrics make of all. Argument: folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipelines.metrics import InstanceMetric, SegmentationMetric
from transforms.errors import DataError

CASES = 4


def case(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prediction and reference (1, 12, 12), labels 0 to 2; of the last the prediction is empty."""
    draw = np.random.default_rng(number)
    maps = draw.integers(0, 3, (2, 1, 4, 4)).repeat(3, axis=2).repeat(3, axis=3)
    return torch.from_numpy(maps[0] * (number < CASES - 1)), torch.from_numpy(maps[1])


def results(rank: int, processes: int) -> dict[str, dict[str, float]]:
    """Measure the cases of this process; the last process has none if there is more than one."""
    segmentation = SegmentationMetric({1: "lesion", 2: "core"}, spacing_mm=(0.5, 2.0))
    instances = InstanceMetric()
    for number in range(CASES):
        if number % max(processes - 1, 1) == rank:
            prediction, reference = case(number)
            segmentation([prediction], [reference])
            instances([prediction], [reference])
    return {"segmentation": segmentation.aggregate(), "instances": instances.aggregate()}


def main() -> None:
    """Join the others, measure, and see what happens when none of all has a case."""
    dist.init_process_group("gloo")
    rank, processes = dist.get_rank(), dist.get_world_size()
    found = results(rank, processes)
    try:
        SegmentationMetric({1: "lesion"}, spacing_mm=(1.0, 1.0)).aggregate()
    except DataError as problem:
        found["nothing"] = problem.what
    Path(sys.argv[1], f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    assert "RANK" in os.environ
    main()
