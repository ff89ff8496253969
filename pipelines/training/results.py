"""Which weights to use, and where results of them go: never over the results of something else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.manifests import Manifest
from pipelines.manifests.digest import file_digest
from transforms.errors import BundleError, UsageError


def find_checkpoint(runs_dir: str | Path, bundle: str, name: str = "", checkpoint: str = "") -> Path:
    """Return the weights to use: ``checkpoint`` if given, else the best of run ``name``, else of the newest run.

    Where a run had no validation cases there is no best, and its last weights are taken. The newest run is the one that
    wrote weights last; evaluating an old run does not make it new.

    Raises:
        BundleError: there is no such file, run or checkpoint.
    """
    if checkpoint:
        if not Path(checkpoint).is_file():
            raise BundleError(f"checkpoint {checkpoint}: no such file", "no weights there", "check --checkpoint")
        return Path(checkpoint).resolve()
    folder = Path(runs_dir).resolve() / bundle
    name = str(name)
    newest = sorted(folder.glob("*/checkpoints/*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for run in [folder / name] if name else [weights.parent.parent for weights in newest]:
        for kind in ("best", "last"):
            weights = run / "checkpoints" / f"{kind}.safetensors"
            if weights.is_file():
                return weights
    raise BundleError(
        f"no trained weights in {folder / name if name else folder}",
        "looked for checkpoints/best.safetensors and last.safetensors",
        "train first, or name the weights with --checkpoint",
    )


def source_of(cohort: Manifest, split: str, fold: int | None, weights: str | Path) -> dict[str, Any]:
    """Return what results are results of: cohort, its digest, split and fold, and the digest of the weights."""
    digests = {"manifest_digest": cohort.digest, "weights_sha256": file_digest(Path(weights))}
    return {"cohort": cohort.name, "split": split, "fold": fold, **digests}


def results_folder(weights: Path, output_dir: str, source: Mapping[str, Any]) -> Path:
    """Return the folder ``metrics`` for results of these weights, sure that no result of another source is lost.

    Raises:
        UsageError: there are results of another cohort, split or network; or the weights belong to no run and no
            folder was given.
    """
    folder = run_of(weights, output_dir) / "metrics"
    summary = folder / "summary.json"
    earlier = json.loads(summary.read_text()).get("source") if summary.is_file() else None
    if earlier is not None and earlier != dict(source):
        raise UsageError(
            f"{folder} holds results of another cohort, split or network",
            f"there: {earlier}, now: {dict(source)}",
            "name another folder with --output_dir",
        )
    return folder


def prediction_folder(weights: Path, output_dir: str) -> Path:
    """Return where new masks go: ``output_dir``, or ``predictions`` in the run's own folder."""
    return Path(output_dir).resolve() if output_dir else run_of(weights) / "predictions"


def run_of(checkpoint: str | Path, output_dir: str | Path = "") -> Path:
    """Return where results belong: ``output_dir`` if given, else the folder of the run that the weights belong to.

    Raises:
        UsageError: the weights do not lie in a run's folder and no ``output_dir`` was given.
    """
    if output_dir:
        return Path(output_dir).resolve()
    folder = Path(checkpoint).resolve().parent
    if folder.name != "checkpoints":
        raise UsageError(
            f"{checkpoint} does not belong to a run", "results need a folder", "name one with --output_dir"
        )
    return folder.parent
