"""The trained run that an export starts from, read and found to belong together: record, weights, cohort, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.manifests import Manifest, load_manifest
from pipelines.manifests.digest import file_digest
from pipelines.reports.tables import read_per_case_csv
from pipelines.training.checkpoints import read_header
from transforms.errors import BundleError, UsageError


@dataclass(frozen=True)
class TrainedRun:
    """A run as it lies on the disk.

    Attributes:
        folder: of the run.
        record: of ``record.json``.
        config: of ``config.yaml``, resolved.
        weights: the best of the run, or its last where it had no validation.
        header: of the weights; holds the contract.
        cohort: that it was trained on.
        summary: of ``metrics/summary.json``; None = not evaluated.
        rows: of ``metrics/per_case.csv``.
    """

    folder: Path
    record: Mapping[str, Any]
    config: Mapping[str, Any]
    weights: Path
    header: Mapping[str, Any]
    cohort: Manifest
    summary: Mapping[str, Any] | None
    rows: Sequence[Mapping[str, Any]]

    @property
    def contract(self) -> Mapping[str, Any]:
        """With which alone the weights are valid."""
        return self.header["contract"]

    @property
    def weights_sha256(self) -> str:
        """Digest of the weights file."""
        return file_digest(self.weights)


def read_run(folder: str | Path, manifest: str | Path = "") -> TrainedRun:
    """Return a trained run.

    Args:
        folder: of the run.
        manifest: of its cohort, if it is no longer where the run's record says; its images are not needed.

    Raises:
        UsageError: no such folder, or a manifest of another cohort.
        BundleError: the run is not finished, a file is missing or damaged, or its files do not belong together.
    """
    folder = Path(folder).resolve()
    if not folder.is_dir():
        raise UsageError(f"run {folder}: no such folder", "nothing to export", "name runs/<bundle>/<run>")
    record = _json(folder, "record.json")
    if not record.get("outcome"):
        raise BundleError(
            f"run {folder.name}: not finished", "record.json has no outcome", "train it to its end: --resume True"
        )
    weights = next((path for kind in ("best", "last") if (path := _weights(folder, kind)).is_file()), None)
    if weights is None:
        raise BundleError(f"run {folder.name}: no weights", "checkpoints/ has neither best nor last", "train again")
    header = read_header(weights)
    cohort = _cohort(folder, record, manifest)
    summary_there = (folder / "metrics" / "summary.json").is_file()
    return TrainedRun(
        folder=folder,
        record=record,
        config=_config(folder),
        weights=weights,
        header=header,
        cohort=cohort,
        summary=_json(folder, "metrics/summary.json") if summary_there else None,
        rows=read_per_case_csv(folder / "metrics" / "per_case.csv") if summary_there else [],
    )


def bundle_of(folder: str | Path) -> str:
    """Return the name of the bundle that a run belongs to.

    Raises:
        BundleError: the record is missing or does not say.
    """
    contract = _json(Path(folder), "record.json").get("contract", {})
    if not contract.get("bundle"):
        raise BundleError(f"run {folder}: of no bundle", "its contract names none", "name a run's folder")
    return str(contract["bundle"])


def _weights(folder: Path, kind: str) -> Path:
    return folder / "checkpoints" / f"{kind}.safetensors"


def _cohort(folder: Path, record: Mapping[str, Any], manifest: str | Path) -> Manifest:
    path = Path(manifest or str(record.get("manifest", "")))
    if not path.is_file():
        raise UsageError(
            f"run {folder.name}: its manifest {path} is not there",
            "the export names split and licence of the cohort",
            "give it with --manifest FILE; the images are not needed",
        )
    cohort = load_manifest(path, check="none")
    if cohort.digest != record.get("manifest_digest"):
        raise UsageError(
            f"manifest {path}: another cohort than run {folder.name} was trained on",
            f"its digest is {cohort.digest[:12]}, the run's {str(record.get('manifest_digest'))[:12]}",
            "give the manifest of the training with --manifest",
        )
    return cohort


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / name).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as problem:
        raise BundleError(
            f"run {folder.name}: {name} cannot be read", str(problem), "name a finished run; restore the file"
        ) from problem


def _config(folder: Path) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as problem:
        raise BundleError(
            f"run {folder.name}: config.yaml cannot be read", str(problem)[:200], "name a finished run"
        ) from problem
