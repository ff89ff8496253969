"""How long do instance metrics take on 1000 x 1000 pixels with 500 cells?

PQ of MONAI 1.6.1, and AJI from dense masks as published evaluation code computes it, beside our one call that returns
PQ, AJI, AJI+, AP, F1 and the count error together; one process, the same arrays, values compared. Prints the median CPU
time on one thread (which other programs lengthen less than wall time), ratios and memory. MONAI makes a mask of the
whole image per instance, 4 GB in all: in the first call the system has to provide these pages, later calls mostly find
them in the process. Both are printed, for ours too. ``--crowded``: cells touch each other; ``--dtype``: of both maps.

    .venv/bin/python benchmarks/metrics_instances.py [--pixels 1000] [--cells 500] [--rounds 3] [--crowded] [--dtype D]
"""

from __future__ import annotations

import argparse
import math
import time
import tracemalloc
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from monai.metrics.panoptic_quality import compute_panoptic_quality
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from pipelines.metrics.contingency import contingency
from pipelines.metrics.instances import instance_metrics
from pipelines.metrics.matching import unique_partner_iou


def draw_cells(pixels: int, cells: int, shift: float, seed: int = 0) -> NDArray[np.int32]:
    """Return an instance map of round cells on a jittered grid; the truth has ``shift`` 0, in pixels."""
    rng = np.random.default_rng(seed)
    per_side = int(np.ceil(np.sqrt(cells)))
    step = pixels / per_side
    image = np.zeros((pixels, pixels), np.int32)
    grid = np.stack(np.mgrid[:pixels, :pixels], axis=-1).astype(np.float32)
    for index in range(cells):
        row, column = divmod(index, per_side)
        centre = np.array([row + 0.5, column + 0.5]) * step + rng.uniform(-0.15, 0.15, 2) * step + shift
        radius = rng.uniform(0.25, 0.45) * step
        low = np.maximum(centre - radius - 1, 0).astype(int)
        high = (centre + radius + 2).astype(int)
        window = (slice(low[0], high[0]), slice(low[1], high[1]))
        image[window][((grid[window] - centre) ** 2).sum(axis=-1) < radius**2] = index + 1
    return image


def draw_tissue(pixels: int, cells: int, shift: float, seed: int = 0) -> NDArray[np.int32]:
    """Return the Voronoi cells of random points, each moved by about ``shift`` pixels; no background."""
    points = np.random.default_rng(seed).uniform(0, pixels, (cells, 2))
    points += shift * np.random.default_rng(seed + 1).standard_normal((cells, 2))
    grid = np.stack(np.mgrid[:pixels, :pixels], axis=-1)
    return (cKDTree(points).query(grid)[1] + 1).astype(np.int32)


def dense_aji(prediction: NDArray[Any], reference: NDArray[Any]) -> float:
    """AJI with one mask of the whole image per instance (Kumar et al. 2017, algorithm 1)."""
    masks = {i: prediction == i for i in np.unique(prediction) if i}
    used, intersection, union = set(), 0, 0
    for i in np.unique(reference):
        if i == 0:
            continue
        truth = reference == i
        best = (0.0, 0, int(truth.sum()), 0)
        for j in np.unique(prediction[truth]):
            if j:
                shared, either = int((truth & masks[j]).sum()), int((truth | masks[j]).sum())
                best = max(best, (shared / either, shared, either, j))
        intersection, union = intersection + best[1], union + best[2]
        used.add(best[3])
    return intersection / (union + sum(int(mask.sum()) for j, mask in masks.items() if j not in used))


def timed(function: Callable[[], Any], rounds: int) -> tuple[float, float, Any]:
    """Return the median seconds, the peak of NumPy's memory in MB and the result."""
    result = function()
    seconds = []
    for _ in range(rounds):
        start = time.process_time()
        result = function()
        seconds.append(time.process_time() - start)
    tracemalloc.start()
    function()
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    return median(seconds), peak, result


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=1000)
    parser.add_argument("--cells", type=int, default=500)
    parser.add_argument("--crowded", action="store_true")
    parser.add_argument("--rounds", type=int, default=3, help="of the slow peers; ours takes 31 each time")
    parser.add_argument("--dtype", default="int32", choices=("uint16", "int32", "int64"), help="of both maps")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw = draw_tissue if options.crowded else draw_cells
    shift = 0.08 * options.pixels / options.cells**0.5
    reference, prediction = (draw(options.pixels, options.cells, by).astype(options.dtype) for by in (0, shift))

    def our_pq(prediction: NDArray[Any], reference: NDArray[Any]) -> float:
        table = contingency(prediction, reference)
        total = table.predicted_ids.size + table.reference_ids.size
        return 2 * math.fsum(unique_partner_iou(table)) / total

    def monai_pq(prediction: NDArray[Any], reference: NDArray[Any]) -> float:
        return float(compute_panoptic_quality(torch.from_numpy(prediction), torch.from_numpy(reference)))

    # Kernels compiled and modules loaded, on a corner of the image; then the first call on all of it.
    first = {}
    for task in (our_pq, monai_pq):
        task(prediction[:50, :50].copy(), reference[:50, :50].copy())
        start = time.process_time()
        task(prediction, reference)
        first[task] = time.process_time() - start
    alone, everything, theirs = [], [], []
    for _ in range(options.rounds):  # interleaved
        alone.append(timed(lambda: our_pq(prediction, reference), 31)[0])
        seconds, memory, rows = timed(lambda: instance_metrics(prediction, reference), 31)
        everything.append(seconds)
        start = time.process_time()
        pq = monai_pq(prediction, reference)
        theirs.append(time.process_time() - start)
    dense, dense_memory, aji = timed(lambda: dense_aji(prediction, reference), options.rounds)
    pq_alone, ours, monai, figures = median(alone), median(everything), median(theirs), rows[0]
    print(f"ours, every figure     {1000 * ours:10.2f} ms        1x  {memory:7.1f} MB   {options.dtype}")
    print(f"ours, PQ alone         {1000 * pq_alone:10.2f} ms  (first call {1000 * first[our_pq]:.2f} ms)")
    print(f"AJI from dense masks   {1000 * dense:10.0f} ms {dense / ours:8.0f}x  {dense_memory:7.1f} MB")
    print(f"PQ of MONAI            {1000 * monai:10.0f} ms {monai / pq_alone:8.0f}x our PQ alone")
    cold = first[monai_pq]
    print(f"PQ of MONAI, first call{1000 * cold:10.0f} ms {cold / first[our_pq]:8.0f}x our first call")
    print(f"PQ ours {figures['pq']:.7f}, MONAI {pq:.7f}, difference {abs(figures['pq'] - pq):.1e}")
    print(f"AJI ours {figures['aji']:.7f}, dense {aji:.7f}, difference {abs(figures['aji'] - aji):.1e}")


if __name__ == "__main__":
    main()
