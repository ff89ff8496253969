"""How long does SSIM of a volume take, whole and in a region, beside MONAI, scikit-image and plain SciPy?

All tools interleaved in one process on the same pair of float32 volumes; the region is an ellipsoid of a fifth of the
voxels, about what a brain fills. Prints medians, ratios to MONAI with as many threads, the peak of memory beyond the
images (each tool in a process of its own) and the distance from the value of the float64 SciPy filter. Run it on an
idle machine.

    .venv/bin/python benchmarks/metrics_image.py [--shape 128 256 256] [--rounds 3] [--threads 1 2]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from monai.metrics import SSIMMetric
from scipy import ndimage
from skimage.metrics import structural_similarity

from pipelines.metrics.image_quality import IMAGE_METRICS, image_quality, image_quality_in_rois

Tool = Callable[[np.ndarray, np.ndarray, np.ndarray, int], float]


def pair_and_region(shape: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a smooth volume in [0, 1] with noise, the volume, and an ellipsoid."""
    random = np.random.default_rng(0)
    reference = ndimage.gaussian_filter(random.normal(size=shape), 2)
    reference = (reference - reference.min()) / np.ptp(reference)
    image = np.clip(reference + 0.05 * random.normal(size=shape), 0, 1)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    region = sum((axis / half) ** 2 for axis, half in zip(axes, (0.8, 0.75, 0.62), strict=True)) < 1
    return image.astype(np.float32), reference.astype(np.float32), region


def monai_ssim(image: np.ndarray, reference: np.ndarray, region: np.ndarray, threads: int) -> float:
    """MONAI's metric; it has no region."""
    torch.set_num_threads(threads)
    return float(SSIMMetric(3, data_range=1.0)(*(torch.from_numpy(a)[None, None] for a in (image, reference))))


def skimage_ssim(image: np.ndarray, reference: np.ndarray, region: np.ndarray, threads: int) -> float:
    """The function of scikit-image with the published window; no region, one thread."""
    return structural_similarity(reference, image, data_range=1.0, gaussian_weights=True, use_sample_covariance=False)


def scipy_map(image: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The map in float64, by separable filters of SciPy, where the window lies within the volume."""
    x, y = image.astype(np.float64), reference.astype(np.float64)
    mean_x, mean_y, xx, yy, xy = (ndimage.gaussian_filter(v, 1.5, radius=5) for v in (x, y, x * x, y * y, x * y))
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    return (luminance * structure)[5:-5, 5:-5, 5:-5]


TOOLS: dict[str, Tool] = {
    "MONAI SSIMMetric, whole": monai_ssim,
    "scikit-image, whole": skimage_ssim,
    "SciPy float64, whole": lambda image, reference, region, threads: scipy_map(image, reference).mean(),
    "ours, whole": lambda image, reference, region, threads: image_quality(
        image, reference, 1.0, metrics=("ssim",), threads=threads
    )["ssim"],
    "ours, region": lambda image, reference, region, threads: image_quality(
        image, reference, 1.0, region, metrics=("ssim",), threads=threads
    )["ssim"],
    "ours, region and its two halves": lambda image, reference, region, threads: image_quality_in_rois(
        image, reference, 1.0, halves(region), metrics=("ssim",), threads=threads
    )[0]["ssim"],
    "ours, region, all nine figures": lambda image, reference, region, threads: image_quality(
        image, reference, 1.0, region, metrics=IMAGE_METRICS, threads=threads
    )["ssim"],
}
ONE_THREAD = ("scikit-image, whole", "SciPy float64, whole")


def halves(region: np.ndarray) -> dict[str, np.ndarray]:
    """Return the region and its parts on either side of the middle of the last axis."""
    left = region.copy()
    left[..., region.shape[-1] // 2 :] = False
    return {"all": region, "left": left, "right": region & ~left}


def extra_memory_mb(tool: str, threads: int, folder: Path) -> float:
    """Return the peak of memory of one call beyond what the process held before it, in MB."""
    command = [sys.executable, __file__, "--child", tool, str(threads), str(folder)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(tool: str, threads: int, folder: Path) -> None:
    """Print by how much one call raises the peak of this process's memory, after a first call on a corner."""
    arrays = [np.load(folder / f"{name}.npy") for name in ("image", "reference", "region")]
    TOOLS[tool](*(np.ascontiguousarray(a[32:64, 64:96, 64:96]) for a in arrays), threads)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak_mb()
    TOOLS[tool](*arrays, threads)
    print(peak_mb() - before)


def peak_mb() -> float:
    """Return the peak of resident memory of this process, in MB (Linux)."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[128, 256, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), Path(options.child[2]))
        return
    arrays = pair_and_region(options.shape)
    local, region = scipy_map(*arrays[:2]), arrays[2][5:-5, 5:-5, 5:-5]
    truth = {True: local[region].mean(), False: local.mean()}
    runs = [(t, n) for n in options.threads for t in TOOLS if n == options.threads[0] or t not in ONE_THREAD]
    values = {run: TOOLS[run[0]](*arrays, run[1]) for run in runs}
    times: dict[tuple[str, int], list[float]] = {run: [] for run in runs}
    for _ in range(options.rounds):
        for tool, threads in runs:
            repeats = 5 if tool.startswith("ours") else 1  # the others take so long that they shut out our cache anyway
            for _ in range(repeats):
                start = time.perf_counter()
                TOOLS[tool](*arrays, threads)
                times[tool, threads].append(1000 * (time.perf_counter() - start))
    print(f"{' x '.join(map(str, options.shape))}, region of {arrays[2].mean():.0%} of the voxels")
    with tempfile.TemporaryDirectory() as folder:
        for name, array in zip(("image", "reference", "region"), arrays, strict=True):
            np.save(Path(folder) / f"{name}.npy", array)
        for tool, threads in runs:
            ratio = median(times[next(iter(TOOLS)), threads]) / median(times[tool, threads])
            error = abs(values[tool, threads] - truth["region" in tool])
            memory = extra_memory_mb(tool, threads, Path(folder))
            print(
                f"{tool:34s} {threads} thread{'s' * (threads > 1):1s} {median(times[tool, threads]):9.1f} ms "
                f"{ratio:7.1f}x {memory:7.0f} MB   off by {error:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    main()
