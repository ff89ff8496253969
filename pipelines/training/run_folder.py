"""The folder of one run, which explains itself: what ran, on which data, with which versions, and what came out.

``runs/<bundle>/<name>/`` holds ``config.yaml`` (macros and overrides resolved), ``record.json``, ``tensorboard/``,
``checkpoints/``, ``metrics/`` and ``predictions/``. A new run never enters the folder of another.
"""

from __future__ import annotations

import hashlib
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
from transforms.errors import ResourceError, UsageError

_RECORDED = ("fiducial", "monai", "torch", "pytorch-ignite", "numpy", "scipy", "nibabel", "SimpleITK", "scikit-image")


def new_run_name() -> str:
    """Return a name for a run that was given none: the local date and time, sortable."""
    return time.strftime("%Y%m%d-%H%M%S")


def refuse_existing_run(runs_dir: str | Path, bundle: str, name: str, resume: bool | str = False) -> None:
    """Without ``resume``, refuse a run name that is taken or is not a plain folder name, before any work is done.

    Raises:
        UsageError: see above.
    """
    name = str(name)
    if name and (Path(name).name != name or name.startswith(".")):
        raise UsageError(f"run_name {name!r}", "expected a plain folder name", "leave out slashes and leading dots")
    folder = Path(runs_dir).resolve() / bundle / name
    if name and not resume and folder.exists() and any(folder.iterdir()):
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


def environment() -> dict[str, Any]:
    """Return what a reader needs to repeat a run: versions, commit, hardware and the command."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: _version(name) for name in _RECORDED},
        "commit": _commit(),
        "code_digest": code_digest(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def write_record(folder: Path, config: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write ``config.yaml`` and ``record.json`` of a run."""
    write_atomically(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
    write_json(folder / "record.json", record)


def extend_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Add to ``record.json`` of a run."""
    path = folder / "record.json"
    written = json.loads(path.read_text()) if path.is_file() else {}
    write_json(path, {**written, **record})


def code_digest() -> str:
    """Return the SHA-256 of the sources of ``pipelines`` and ``transforms`` as they are now, committed or not."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("pipelines", "transforms"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()


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
