"""The runs of a cross-validation: what they are called, which are finished, and where what they share is written.

Fold k of cross-validation ``cv`` is the plain run ``cv_fold<k>``, so that each can be trained on a machine of its own.
``cv_folds/folds.json`` appears when all are finished and belong together; only then are they an ensemble.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from pipelines.files import write_json
from pipelines.manifests import Manifest
from transforms.errors import BundleError

_FOLD_RUN = re.compile(r"(?P<name>.+)_fold\d+")


def fold_run(name: str, fold: int) -> str:
    """Return the name of the run of one fold."""
    return f"{name}_fold{fold}"


def cross_validation_of(run: str) -> str | None:
    """Return the cross-validation that a run belongs to by its name, or None."""
    match = _FOLD_RUN.fullmatch(run)
    return match["name"] if match else None


def folds_folder(runs: Path, name: str) -> Path:
    """Return the folder of what the folds have in common, beside theirs."""
    return runs / f"{name}_folds"


def outcome_of(run: Path) -> dict[str, Any] | None:
    """Return what came out of a run, or None while it is not finished."""
    path = run / "record.json"
    return json.loads(path.read_text()).get("outcome") if path.is_file() else None


def recorded_config(run: Path) -> dict[str, Any]:
    """Return the configuration with which a run was trained."""
    return yaml.safe_load((run / "config.yaml").read_text())


def refuse_other_run(run: Path, fold: int, cohort: Manifest) -> None:
    """Refuse a run that was trained on another version of the cohort, or with other cases held out.

    Raises:
        BundleError: see above; out-of-fold results of it would be results on training cases.
    """
    record, config = json.loads((run / "record.json").read_text()), recorded_config(run)
    fix = "train the folds under another --run_name"
    if record.get("manifest_digest") != cohort.digest:
        raise BundleError(
            f"run {run}: trained on another cohort",
            f"manifest digest {record.get('manifest_digest')}, expected {cohort.digest} of {cohort.path}",
            fix,
        )
    if config.get("fold") != fold:
        raise BundleError(f"run {run}: held out fold {config.get('fold')}", f"expected fold {fold} by its name", fix)


def write_folds(runs: Path, name: str, folds: int, cohort: Manifest) -> Path:
    """Write ``folds.json`` once every fold's run is finished and of this cohort; return its folder.

    Raises:
        BundleError: a fold is not trained to its end, or its run is of another cohort or fold.
    """
    members = [runs / fold_run(name, fold) for fold in range(folds)]
    unfinished = [run.name for run in members if outcome_of(run) is None]
    if unfinished:
        raise BundleError(
            f"cross-validation {name} in {runs}: {', '.join(unfinished)} not finished",
            f"{folds - len(unfinished)} of {folds} folds are trained",
            f"finish it: fiducial train ... --folds {folds} --run_name {name}",
        )
    for fold, run in enumerate(members):
        refuse_other_run(run, fold, cohort)
    about = {"name": name, "folds": folds, "cohort": cohort.name, "manifest_digest": cohort.digest}
    write_json(folds_folder(runs, name) / "folds.json", {**about, "runs": [run.name for run in members]})
    return folds_folder(runs, name)


def fold_runs(runs: Path, name: str) -> Sequence[Path]:
    """Return the runs of a finished cross-validation in the order of the folds.

    Raises:
        BundleError: there is none of this name.
    """
    path = folds_folder(runs, name) / "folds.json"
    if not path.is_file():
        known = sorted(file.parent.name.removesuffix("_folds") for file in runs.glob("*_folds/folds.json"))
        raise BundleError(
            f"ensemble {name!r}: no finished cross-validation of this name in {runs}",
            f"finished: {', '.join(known) or 'none'}",
            f"train one: fiducial train ... --folds 5 --run_name {name}",
        )
    return [runs / run for run in json.loads(path.read_text())["runs"]]
