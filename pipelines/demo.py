"""The demonstration: from no data at all to a trained, measured and used bundle, in a few minutes on two cores."""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path

from pipelines.embedded import head_cohort
from pipelines.runner import run_bundle
from pipelines.training.run_folder import new_run_name
from transforms.errors import FiducialError

logger = logging.getLogger(__name__)

BUNDLE = "brain_lesion_mri_segmentation"
SUBJECTS, SPACING_MM, SEED = 14, (2.0, 2.0, 2.0), 0
EXPECTED_DICE = 0.70  # of the validation subjects; below it the demonstration has failed, and says so
# what fits a 2 mm cohort and two cores; everything else is the bundle's default
TRAINING = {"spacing": list(SPACING_MM), "patch_size": [48, 48, 48], "max_epochs": 24, "steps_per_epoch": 30}


def demo(folder: Path) -> None:
    """Generate the cohort, train, evaluate on the test subjects, predict one of them as a user would; print all.

    Raises:
        FiducialError: the network did not learn (validation Dice below ``EXPECTED_DICE``).
    """
    started = time.monotonic()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    folder = folder.resolve()
    cohort = head_cohort(folder / "head_phantoms", SUBJECTS, SPACING_MM, SEED, ("flair", "t1", "t2"))
    runs, name = folder / "runs", new_run_name()
    common = {"manifest": str(cohort.path), "runs_dir": str(runs), "run_name": name}
    run_bundle(BUNDLE, "train", {**common, **TRAINING, "cache_dir": str(folder / "cache")})
    run_bundle(BUNDLE, "evaluate", common)
    run = runs / BUNDLE / name
    case = next(case for case in cohort.cases if case.split == "test")
    scans = folder / "new_scan" / case.id
    scans.mkdir(parents=True, exist_ok=True)
    for modality, entry in case.images.items():
        shutil.copyfile(cohort.root / entry.path, scans / f"{modality}.nii.gz")
    shutil.copyfile(cohort.root / case.masks["brain"].path, scans / "brain.nii.gz")
    run_bundle(
        BUNDLE,
        "inference",
        {"runs_dir": str(runs), "run_name": name, "input": str(scans), "output_dir": str(folder / "masks")},
    )
    _report(run, folder, time.monotonic() - started)


def _report(run: Path, folder: Path, seconds: float) -> None:
    outcome = json.loads((run / "record.json").read_text())["outcome"]
    print(
        f"\nvalidation Dice {outcome['best_metric']:.3f} (epoch {outcome['best_epoch']}), {seconds / 60:.1f} min in all"
    )
    print(f"run folder   {run}")
    print(f"results      {run / 'metrics' / 'per_case.csv'}")
    print(f"report       {run / 'report' / 'index.html'}")
    print(f"pictures     {run / 'metrics' / 'overlays'}")
    print(f"new masks    {folder / 'masks'}")
    print(f"TensorBoard  .venv/bin/tensorboard --logdir {run / 'tensorboard'}")
    if outcome["best_metric"] < EXPECTED_DICE:
        raise FiducialError(
            f"the demonstration did not learn: validation Dice {outcome['best_metric']:.3f}",
            f"at least {EXPECTED_DICE} expected on this cohort",
            "look at the curves in TensorBoard, and report it",
        )
