"""How long does it take to read one random patch of a preprocessed case?

Ours (a window of a memory-mapped ``.npy``) beside MONAI's ``PersistentDataset`` and beside the NIfTI file read again,
in one process, interleaved. Prints medians in milliseconds, ratios, and the size on disk.

    .venv/bin/python benchmarks/patch_reading.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

import nibabel as nib
import numpy as np
from monai.data import PersistentDataset
from monai.transforms import Compose, RandSpatialCropd

from pipelines.manifests.cache import CaseCache
from pipelines.manifests.digest import file_digest
from pipelines.training.datasets import crop_window
from transforms import LoadCased, ToRASd

SHAPE, CHANNELS, PATCH, ROUNDS = (182, 218, 182), 3, (96, 96, 96), 30


def write_case(folder: Path) -> dict[str, object]:
    """Write a head-sized case of smooth noise (it compresses like an image) and return its item."""
    rng = np.random.default_rng(0)
    paths = []
    for channel in range(CHANNELS):
        coarse = rng.normal(100, 30, (23, 28, 23)).astype(np.float32)
        voxels = np.kron(coarse, np.ones((8, 8, 8), np.float32))[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
        path = folder / f"m{channel}.nii.gz"
        nib.save(nib.Nifti1Image((voxels + rng.normal(0, 3, SHAPE)).astype(np.int16), np.eye(4)), path)
        paths.append(str(path))
    return {"case": "a", "image": paths, "digests": {"image": [file_digest(Path(path)) for path in paths]}}


def size_mb(folder: Path) -> float:
    """Return the size of everything in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def main() -> None:
    """Run the comparison and print it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        item = write_case(folder)
        chain = Compose([LoadCased(), ToRASd("image")])
        case = CaseCache(folder / "ours", chain).get(item)
        persistent = PersistentDataset([item], chain, cache_dir=folder / "monai")
        crop = RandSpatialCropd("image", roi_size=PATCH, random_size=False)
        persistent[0]
        rng = np.random.default_rng(1)

        def ours() -> np.ndarray:
            centre = rng.integers(0, SHAPE)
            return np.asarray(case.crop("image", crop_window(centre, PATCH, SHAPE)))

        readers = {
            "memory-mapped npy (ours)": ours,
            "MONAI PersistentDataset": lambda: np.asarray(crop(persistent[0])["image"]),
            "NIfTI read again": lambda: np.asarray(crop(chain(item))["image"]),
        }
        times: dict[str, list[float]] = {reader: [] for reader in readers}
        for _ in range(ROUNDS):
            for reader, read in readers.items():
                start = time.perf_counter()
                assert read().shape == (CHANNELS, *PATCH)
                times[reader].append(1000 * (time.perf_counter() - start))
        best = median(times["memory-mapped npy (ours)"])
        for reader, values in times.items():
            print(f"{reader:28s} {median(values):8.1f} ms   {median(values) / best:6.1f}x")
        print(f"on disk: ours {size_mb(folder / 'ours'):.0f} MB, MONAI {size_mb(folder / 'monai'):.0f} MB")


if __name__ == "__main__":
    main()
