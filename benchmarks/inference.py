r"""How long does a whole volume take, and how much memory, by MONAI on the weights and by exported networks?

One case goes through the bundle's preprocessing once. Then every variant runs in a process of its own, round by round
in turn: MONAI's ``SlidingWindowInferer`` with the network in float32 on the whole scan at overlap .5, and on the
foreground's box the same windows, fewer overlaps, or no windows at all, and other backends. Prints medians of CPU time
and wall time, the ratio of CPU times to the first, the peak of resident memory, and the label maps' Dice difference to
the first.
Export first: `write_formats_of(bundle, weights)` of `pipelines.export.formats`.

    .venv/bin/python benchmarks/inference.py --weights models/model.safetensors --scan CASE \
        [--truth lesion.nii.gz] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import torch

BUNDLE = "brain_lesion_mri_segmentation"
VARIANTS = {  # region, overlap (None = no windows, the region at once), backend
    "MONAI eager, whole scan, overlap .5": ("whole", 0.5, "eager"),
    "openvino bf16, box, overlap .25": ("box", 0.25, "openvino:bf16"),
    "openvino, box, overlap .25": ("box", 0.25, "openvino"),
    "onnxruntime, box, overlap .25": ("box", 0.25, "onnxruntime"),
    "eager, box, overlap .25": ("box", 0.25, "eager"),
    "eager bf16, box, overlap .25": ("box", 0.25, "bf16"),
    "openvino bf16, box, overlap .5": ("box", 0.5, "openvino:bf16"),
    "openvino, box, overlap .5": ("box", 0.5, "openvino"),
    "eager, box, overlap .5": ("box", 0.5, "eager"),
    "eager, box at once": ("box", None, "eager"),
    "openvino, box at once": ("box", None, "openvino"),
    "openvino bf16, box at once": ("box", None, "openvino:bf16"),
    # where the windows go as they overlap more
    **{
        f"openvino bf16, box, overlap {overlap}": ("box", overlap, "openvino:bf16")
        for overlap in (0.35, 0.4, 0.6, 0.75)
    },
}


def prepare(weights: Path, scan: Path, folder: Path) -> dict[str, Any]:
    """Write ``box.npy`` and ``whole.npy``, what the network sees of a case; return where the box lies in the whole."""
    from pipelines.runner import bundle_parser

    options = {"checkpoint": str(weights), "input": str(scan), "backend": "torch", "precision": "fp32"}
    with bundle_parser(BUNDLE, "inference", options) as parser:
        image = parser.get_parsed_content("dataset")[0]["image"]
        contract = parser.get_parsed_content("contract")
    grid = nib.as_closest_canonical(nib.load(image.meta["filename_or_obj"]))
    offset = np.linalg.inv(grid.affine) @ np.asarray(image.affine)
    if not np.allclose(offset[:3, :3], np.eye(3), atol=1e-3):
        raise SystemExit("the scan must have the spacing that the weights were trained at: this compares windows only")
    start = np.rint(offset[:3, 3]).astype(int)
    box = np.asarray(image.as_tensor())
    whole = np.zeros((box.shape[0], *grid.shape[:3]), np.float32)  # 0 = background, after the normalisation
    place = tuple(slice(int(a), int(a) + n) for a, n in zip(start, box.shape[1:], strict=True))
    whole[(slice(None), *place)] = box
    np.save(folder / "box.npy", box.astype(np.float32))
    np.save(folder / "whole.npy", whole)
    return {"place": [[part.start, part.stop] for part in place], "patch": contract["patch_size"]}


def network_of(weights: Path) -> torch.nn.Module:
    """Return the network with its weights."""
    from pipelines.runner import bundle_parser

    with bundle_parser(BUNDLE, "inference", {"checkpoint": str(weights), "backend": "torch"}) as parser:
        return parser.get_parsed_content("network").eval()


def measure(name: str, weights: Path, folder: Path, patch: list[int]) -> None:
    """Run one variant once and print its figures; the label map goes to ``mask.npy``."""
    from pipelines.inference import AutocastInferer, open_backend, windows_or_whole

    region, overlap, backend = VARIANTS[name]
    plain = network_of(weights)
    network = plain if backend in ("eager", "bf16") else open_backend(backend, weights.parent)
    windows = windows_or_whole("whole" if overlap is None else "patch", patch, overlap or 0.0, plain)
    inferer = AutocastInferer("bf16" if backend == "bf16" else "fp32", windows)
    image = torch.from_numpy(np.load(folder / f"{region}.npy"))[None]
    with torch.no_grad():
        inferer(image[:, :, : patch[0], : patch[1], : patch[2]], network)  # compiles, where the backend does
        cpu, wall = time.process_time(), time.perf_counter()
        logits = inferer(image, network)
        figures = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    np.save(folder / "mask.npy", logits[0].argmax(0).numpy().astype(np.uint8))
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(figures))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Return Dice of everything that is not background; 1 where both are empty."""
    size = int((a > 0).sum() + (b > 0).sum())
    return 2 * int(((a > 0) & (b > 0)).sum()) / size if size else 1.0


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--scan", type=Path, required=True)
    parser.add_argument("--truth", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=[], help="these, beside the first")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--patch", type=int, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    weights, scan = options.weights.resolve(), options.scan.resolve()
    if options.one:
        measure(options.one, weights, options.folder, options.patch)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        about = prepare(weights, scan, folder)
        place = tuple(slice(*ends) for ends in about["place"])
        truth = None
        if options.truth:
            truth = np.asarray(nib.as_closest_canonical(nib.load(options.truth)).dataobj)[place]
        first, *others = VARIANTS
        found: dict[str, list[dict[str, float]]] = {name: [] for name in (first, *(options.only or others))}
        masks: dict[str, np.ndarray] = {}
        for number in range(options.rounds):
            for name in found:
                command = [sys.executable, __file__, "--weights", str(weights), "--scan", str(scan), "--one", name]
                command += ["--folder", scratch, "--patch", *map(str, about["patch"])]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                mask = np.load(folder / "mask.npy")
                masks[name] = mask[place] if VARIANTS[name][0] == "whole" else mask
                print(f"round {number + 1}: {name}: {found[name][-1]}", file=sys.stderr, flush=True)
        plain = median(each["cpu"] for each in found[first])
        print(f"{torch.get_num_threads()} threads, windows {about['patch']}, box {masks[first].shape}")
        for name, rounds in found.items():
            cpu, wall, peak = (median(each[key] for each in rounds) for key in ("cpu", "wall", "peak_mb"))
            line = f"{name:38s} {cpu:7.1f} s CPU {wall:7.1f} s {plain / cpu:6.1f}x {peak:6.0f} MB"
            line += f"  1 - Dice {1 - dice(masks[first], masks[name]):.2e}"
            if truth is not None:
                line += f"  Dice to the truth {dice(truth, masks[name]):.4f}"
            print(line)


if __name__ == "__main__":
    main()
