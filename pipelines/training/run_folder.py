"""The folder of one run, which explains itself: what ran, on which data, with which versions, and what came out.

``runs/<bundle>/<name>/`` holds ``config.yaml`` (macros and overrides resolved), ``record.json``, ``tensorboard/``,
``checkpoints/``, ``metrics/`` and ``predictions/``. A new run never enters the folder of another.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from pipelines.files import write_atomically, write_json
from pipelines.manifests import Manifest
from pipelines.manifests.digest import file_digest
from transforms.errors import BundleError, ResourceError, UsageError

_RECORDED = ("fiducial", "monai", "torch", "pytorch-ignite", "numpy", "scipy", "nibabel", "SimpleITK", "scikit-image")


def new_run_name() -> str:
    """Return a name for a run that was given none: the local date and time, sortable."""
    return time.strftime("%Y%m%d-%H%M%S")


def refuse_existing_run(runs_dir: str | Path, bundle: str, name: str) -> None:
    """Refuse a run name that is taken or is not a plain folder name, before any work is done.

    Raises:
        UsageError: see above.
    """
    name = str(name)
    if name and (Path(name).name != name or name.startswith(".")):
        raise UsageError(f"run_name {name!r}", "expected a plain folder name", "leave out slashes and leading dots")
    folder = Path(runs_dir).resolve() / bundle / name
    if name and folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"run {folder} exists already",
            "a run never writes into another run's folder",
            "choose another --run_name, or leave it out to get one",
        )


def create_run(runs_dir: str | Path, bundle: str, name: str = "", ready: Sequence[Any] = ()) -> Path:
    """Create and return the folder of a new run.

    Args:
        ready: what must have been built before; its only use is the order in which a configuration is resolved.

    Raises:
        UsageError: a run of this name exists already, or the name is not a plain folder name.
        ResourceError: the folder cannot be made.
    """
    refuse_existing_run(runs_dir, bundle, name)
    folder = Path(runs_dir).resolve() / bundle / (str(name) or new_run_name())
    try:
        folder = folder if name else _free_folder(folder)
        for part in ("checkpoints", "tensorboard", "metrics"):
            (folder / part).mkdir(parents=True)
    except FileExistsError:  # another process was quicker by a moment
        refuse_existing_run(runs_dir, bundle, folder.name)
        raise
    except OSError as problem:
        raise ResourceError(
            f"run {folder} cannot be made",
            str(problem),
            "free space, fix the permissions, or choose another --runs_dir",
        ) from problem
    return folder


def _free_folder(folder: Path) -> Path:
    """Make and return ``folder``, or the first of ``folder-2``, ``folder-3``, ... that is not there yet."""
    candidate, number = folder, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            number += 1
            candidate = folder.with_name(f"{folder.name}-{number}")


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


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a run: versions, commit, hardware and the command."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _RECORDED},
        "commit": _commit(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_record(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` and ``record.json`` of a run."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
    write_json(folder / "record.json", {**environment(), **record})


def extend_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add to ``record.json`` of a run."""
    path = folder / "record.json"
    written = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {**written, **record})


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the git commit of the code, marked where files differ from it, or None outside a repository."""
    here = Path(__file__).resolve().parent
    try:
        # where the package is installed inside someone else's repository, that one's commit says nothing about it
        tracked = ["git", "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, cwd=here, capture_output=True, check=True)
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + (" with local changes" if changed.stdout.strip() else "")
