"""How fast are the segmentation metrics, how much memory do they take, and how far are they from the truth?

Speed: Dice, HD95 and NSD beside MONAI's on 192x512x512, interleaved in one process, for five organs and for forty
lesions of one class; "by area" is the definition "surface". Truth: errors against analytic surfaces, beside MeshMetrics
and DeepMind's surface-distance where they are installed (``pip install --no-deps pymeshmetrics surface-distance vtk``).

    .venv/bin/python benchmarks/metrics_segmentation.py [speed] [truth] [SEED ...]

A number is the seed of the places and rotations of ``truth`` (0 without one): a change of the surface is to be tried on
seeds that it was not designed on.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from analytic_shapes import Shape, pairs, rasterise
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

from pipelines.metrics import segmentation_metrics

SHAPE, SPACING = (192, 512, 512), (3.0, 0.8, 0.8)
ROUNDS, MONAI_ROUNDS = 7, 2
Figures = dict[str, float]


def paint(label_map: np.ndarray, centre: np.ndarray, radii: np.ndarray, value: int) -> None:
    """Set an ellipsoid, in voxels."""
    low, high = np.maximum(np.floor(centre - radii), 0).astype(int), np.ceil(centre + radii).astype(int) + 1
    window = label_map[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    grid = np.ogrid[tuple(slice(a, a + n) for a, n in zip(low, window.shape, strict=True))]
    window[sum(((g - c) / r) ** 2 for g, c, r in zip(grid, centre, radii, strict=True)) <= 1] = value


def organs() -> tuple[np.ndarray, np.ndarray]:
    """Five large ellipsoids, and the same a voxel or two away."""
    maps = np.zeros((2, *SHAPE), np.uint8)
    places = [(60, 150, 150), (60, 350, 150), (130, 150, 350), (130, 350, 350), (96, 256, 256)]
    sizes = [(35, 80, 70), (40, 60, 80), (30, 75, 75), (40, 70, 60), (25, 45, 55)]
    for value, (place, size) in enumerate(zip(places, sizes, strict=True), start=1):
        for label_map, shift in zip(maps, ((1, 2, -2), (0, 0, 0)), strict=True):
            paint(label_map, np.add(place, shift), np.array(size), value)
    return maps[0], maps[1]


def lesions() -> tuple[np.ndarray, np.ndarray]:
    """Forty small ellipsoids; the prediction has each at another place within a voxel or two, and misses a few."""
    maps = np.zeros((2, *SHAPE), np.uint8)
    rng = np.random.default_rng(99)
    for _ in range(40):
        centre, radius = rng.uniform([20, 60, 60], [170, 450, 450]), rng.uniform(1, 8)
        radii = np.array([radius * 0.8 / 3 + 0.6, radius, radius])
        paint(maps[1], centre, radii, 1)
        if rng.random() > 0.1:
            paint(maps[0], centre + 0.7 * rng.normal(size=3), radii, 1)
    return maps[0], maps[1]


def monai_metrics(prediction: np.ndarray, reference: np.ndarray, n_labels: int) -> list[tuple[float, ...]]:
    """Return Dice, HD95 and NSD of every label by MONAI's functions."""
    y_pred, y = (
        torch.from_numpy(np.stack([m == k for k in range(1, n_labels + 1)]))[None] for m in (prediction, reference)
    )
    options: dict[str, Any] = {"include_background": True, "spacing": SPACING}
    return list(
        zip(
            compute_dice(y_pred, y)[0].tolist(),
            compute_hausdorff_distance(y_pred, y, percentile=95, **options)[0].tolist(),
            compute_surface_dice(y_pred, y, [1.0] * n_labels, use_subvoxels=True, **options)[0].tolist(),
            strict=True,
        )
    )


def timed(task: Callable[[], Any]) -> float:
    """Return seconds."""
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def extra_memory(task: Callable[[], Any]) -> float:
    """Return by how many MiB the resident memory of the process rises at most, sampled every millisecond."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) / 256

    ctypes.CDLL(None).malloc_trim(0)
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    task()
    done.set()
    watcher.join()
    return max(peak[0] - before, 0.0)


def speed() -> None:
    """Print times, ratios and memory beside MONAI."""
    print(
        f"{'192x512x512':16s} {'threads':>7s} {'MONAI':>9s} {'ours':>9s} {'ratio':>6s} {'everything':>11s} {'MiB':>16s}"
    )
    for name, make, n_labels in (("5 organs", organs, 5), ("1 lesion class", lesions, 1)):
        prediction, reference = make()
        labels = {k: str(k) for k in range(1, n_labels + 1)}
        for threads in (1, 2):
            torch.set_num_threads(threads)
            comparison = (prediction, reference, SPACING, labels)

            tasks = {
                "ours": partial(segmentation_metrics, *comparison, groups=("distance", "nsd"), threads=threads),
                "everything": partial(segmentation_metrics, *comparison, threads=threads),
                "MONAI": partial(monai_metrics, prediction, reference, n_labels),
            }
            tasks["everything"]()
            seconds: dict[str, list[float]] = {name: [] for name in tasks}
            for round_ in range(ROUNDS):
                for task in tasks if round_ < MONAI_ROUNDS else ("ours", "everything"):
                    seconds[task].append(timed(tasks[task]))
            expected = tasks["MONAI"]()
            for row, values in zip(tasks["ours"](), expected, strict=True):
                np.testing.assert_allclose((row["dice"], row["hd95_mm"], row["nsd"]), values, rtol=1e-6)
            theirs, ours, everything = (median(seconds[task]) for task in ("MONAI", "ours", "everything"))
            memory = f"{extra_memory(tasks['MONAI']):.0f} / {extra_memory(tasks['everything']):.0f}"
            print(
                f"{name:16s} {threads:7d} {theirs:7.2f} s {1000 * ours:6.0f} ms {theirs / ours:5.0f}x"
                f" {1000 * everything:8.0f} ms {memory:>17s}",
                flush=True,
            )
            by_area = partial(tasks["ours"], definition="surface")
            by_area()
            seconds_by_area, mib = median(timed(by_area) for _ in range(3)), extra_memory(by_area)
            print(f"{'  by area':16s} {threads:7d} {'':9s} {seconds_by_area:7.2f} s {'':23s} {mib:12.0f}", flush=True)


def summary(elements: Sequence[np.ndarray], tolerances: Sequence[float]) -> Figures:
    """Return HD, HD95, ASSD and the NSDs from areas and distances in both directions."""
    areas, distances = elements[0::2], elements[1::2]

    def percentile(a: np.ndarray, d: np.ndarray, q: float) -> float:
        order = np.argsort(d)
        covered = np.cumsum(a[order])
        return float(d[order][np.searchsorted(covered, q * covered[-1])])

    both = list(zip(areas, distances, strict=True))
    total = sum(a.sum() for a in areas)
    values = {
        "HD": max(d.max() for d in distances),
        "HD95": max(percentile(a, d, 0.95) for a, d in both),
        "ASSD": sum(a @ d for a, d in both) / total,
    }
    return values | {f"NSD {t}": sum(a[d <= t].sum() for a, d in both) / total for t in tolerances}


def truth(first: Shape, second: Shape) -> tuple[np.ndarray, ...]:
    """Return areas and distances of points on the analytic surfaces."""
    (points_a, area_a), (points_b, area_b) = first.surface(), second.surface()
    return area_a, second.distance(points_a), area_b, first.distance(points_b)


def ours(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerances: Sequence[float]
) -> Figures:
    """Return the figures of the definition "surface" as a user gets them."""
    maps = (prediction.astype(np.uint8), reference.astype(np.uint8))
    (row,) = segmentation_metrics(
        *maps, spacing, {1: "it"}, tolerances, definition="surface", groups=("distance", "nsd"), threads=1
    )
    nsd = [row["nsd"], *(row[f"nsd_{t:g}mm"] for t in tolerances[1:])]
    return {"HD": row["hd_mm"], "HD95": row["hd95_mm"], "ASSD": row["assd_mm"]} | {
        f"NSD {t}": value for t, value in zip(tolerances, nsd, strict=True)
    }


def mesh_metrics(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerances: Sequence[float]
) -> Figures:
    """Return the figures of the surface elements of MeshMetrics."""
    from meshmetrics import DistanceMetrics

    metrics = DistanceMetrics(verbose=False)
    metrics.set_input(ref=reference, pred=prediction, spacing=spacing)
    from_reference, area_reference, from_prediction, area_prediction = metrics.distances
    elements = (area_prediction, np.abs(from_prediction), area_reference, np.abs(from_reference))
    return summary(elements, tolerances)


def deepmind(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], tolerances: Sequence[float]
) -> Figures:
    """Return the figures of the surface elements of surface-distance."""
    from surface_distance import compute_surface_distances

    found = compute_surface_distances(reference, prediction, spacing)
    keys = ("surfel_areas_pred", "distances_pred_to_gt", "surfel_areas_gt", "distances_gt_to_pred")
    return summary([found[key] for key in keys], tolerances)


def errors(seeds: list[int]) -> None:
    """Print the mean absolute error of every tool for every family of shapes, over the pairs of all seeds."""
    tools: dict[str, Callable[..., Figures]] = {"surface (ours)": ours}
    if importlib.util.find_spec("meshmetrics") and importlib.util.find_spec("vtk"):
        tools["MeshMetrics"] = mesh_metrics
    if importlib.util.find_spec("surface_distance"):
        tools["surface-distance"] = deepmind
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for family, spacing, first, second, tolerances in (pair for seed in seeds for pair in pairs(seed)):
        expected = summary(truth(first, second), tolerances)
        masks = rasterise(first, second, spacing)
        for name, tool in tools.items():
            cell = found.setdefault((family, name), {})
            for key, value in tool(*masks, spacing, tolerances).items():
                cell.setdefault(key.split()[0], []).append(abs(value - expected[key]))
    print(f"mean error {'':18s} {'HD mm':>8s} {'HD95 mm':>8s} {'ASSD mm':>8s} {'NSD':>8s}")
    for (family, name), cell in found.items():
        print(f"{family:12s} {name:17s}" + "".join(f" {np.mean(cell[k]):8.3f}" for k in ("HD", "HD95", "ASSD", "NSD")))


def main() -> None:
    """Run what the arguments name, or both."""
    seeds = [int(part) for part in sys.argv[1:] if part.isdigit()]
    parts = [part for part in sys.argv[1:] if not part.isdigit()] or (["truth"] if seeds else ["speed", "truth"])
    if "speed" in parts:
        speed()
    if "truth" in parts:
        errors(seeds or [0])


if __name__ == "__main__":
    main()
