"""What do two processes bring over one, on a machine of two cores without GPU?

The lesion bundle on a small head cohort, the same global batch: one process with one thread, one with two threads, and
two processes (gloo) with one thread each by ``torchrun``. Prints minutes of training and the final metric of each.

    .venv/bin/python benchmarks/several_processes.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from pipelines.embedded import head_cohort
from pipelines.runner import BUNDLES

BUNDLE = "brain_lesion_mri_segmentation"
OVERRIDES = {
    "spacing": [2, 2, 2],
    "patch_size": [48, 48, 48],
    "max_epochs": 3,
    "steps_per_epoch": 20,
    "warmup_epochs": 1,
}
ARGUMENTS = [word for key, value in OVERRIDES.items() for word in (f"--{key}", str(value))]
ALONE = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml"]
TOGETHER = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle", "run"),
    *("--config_file", "['configs/train.yaml','configs/multi_gpu_train.yaml']"),
]
SETTINGS = {"one process, 1 thread": (ALONE, 1), "one process, 2 threads": (ALONE, 2), "two processes": (TOGETHER, 1)}


def main() -> None:
    """Run the comparison and print it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = head_cohort(folder / "heads", 8, (2.0, 2.0, 2.0), 0, ("flair", "t1", "t2"))
        where = ["--manifest", str(cohort.path), "--runs_dir", str(folder), "--cache_dir", str(folder / "cache")]
        for number, (label, (command, threads)) in enumerate(SETTINGS.items()):
            given = [*command, *where, *ARGUMENTS, "--run_name", f"run{number}"]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
            subprocess.run(given, cwd=BUNDLES / BUNDLE, env=environment, check=True, capture_output=True)
            outcome = json.loads((folder / BUNDLE / f"run{number}" / "record.json").read_text())["outcome"]
            print(
                f"{label:24s} {60 * outcome['minutes']:6.1f} s   best mean Dice {outcome['best_metric']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
