"""Which weights to use, and where results of them go: never over the results of something else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.manifests import Manifest
from pipelines.manifests.digest import file_digest
from pipelines.training.checkpoints import read_contract
from pipelines.training.folds import cross_validation_of, fold_runs
from transforms.errors import BundleError, UsageError


def find_checkpoint(runs_dir: str | Path, bundle: str, name: str = "", checkpoint: str = "", network: str = "") -> Path:
    """Return the weights to use: ``checkpoint`` if given, else the best of run ``name``, else of the newest run.

    Where a run had no validation cases there is no best, and its last weights are taken. The newest run is the one that
    wrote weights last; evaluating an old run does not make it new.

    Args:
        network: what the weights' contract has to say, in a bundle that trains networks of several kinds; runs of
            another kind are passed over. Empty = any.

    Raises:
        BundleError: there is no such file, run or checkpoint, or the weights are of another kind.
    """
    if checkpoint:
        if not Path(checkpoint).is_file():
            raise BundleError(f"checkpoint {checkpoint}: no such file", "no weights there", "check --checkpoint")
        return _of_network(Path(checkpoint).resolve(), network)
    folder = Path(runs_dir).resolve() / bundle
    name = str(name)
    newest = sorted(folder.glob("*/checkpoints/*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
    for run in [folder / name] if name else [weights.parent.parent for weights in newest]:
        for kind in ("best", "last"):
            weights = run / "checkpoints" / f"{kind}.safetensors"
            if weights.is_file() and (name or not network or read_contract(weights).get("network") == network):
                return _of_network(weights, network)
    raise BundleError(
        f"no trained weights in {folder / name if name else folder}",
        "looked for checkpoints/best.safetensors and last.safetensors",
        "train first, or name the weights with --checkpoint",
    )


def _of_network(weights: Path, network: str) -> Path:
    found = read_contract(weights).get("network") if network else network
    if found != network:
        raise BundleError(
            f"checkpoint {weights}: weights of another network",
            f"its contract says {found!r}, expected {network!r}",
            "name another run with --run_name, or other weights with --checkpoint",
        )
    return weights


def find_weights(
    runs_dir: str | Path, bundle: str, name: str = "", checkpoint: str | Sequence[str] = "", ensemble: str = ""
) -> list[Path]:
    """Return the weights to use, several for an ensemble.

    Args:
        runs_dir, bundle, name: as ``find_checkpoint``.
        checkpoint: weights by path; several are an ensemble.
        ensemble: a finished cross-validation, instead of the two before: the best weights of each of its folds.

    Raises:
        BundleError: there is no such file, run, checkpoint or cross-validation.
        UsageError: contradictory options, or a file named twice.
    """
    ensemble = str(ensemble)
    if ensemble:
        for option, value in (("run_name", name), ("checkpoint", checkpoint)):
            if value:
                raise UsageError(f"--ensemble with --{option}", "both say whose weights", "name one of them")
        runs = Path(runs_dir).resolve() / bundle
        return [find_checkpoint(runs_dir, bundle, run.name) for run in fold_runs(runs, ensemble)]
    if isinstance(checkpoint, (str, Path)):
        return [find_checkpoint(runs_dir, bundle, name, checkpoint)]
    files = [find_checkpoint(runs_dir, bundle, "", file) for file in checkpoint if file]
    if len(set(files)) < max(len(checkpoint), 1):
        raise UsageError(f"checkpoint {list(checkpoint)}", "expected files, each once", "correct --checkpoint")
    return files


def source_of(cohort: Manifest, split: str, fold: int | None, weights: Sequence[str | Path]) -> dict[str, Any]:
    """Return what results are results of: cohort, its digest, split and fold, and the weights' digest (or digests)."""
    digests = [file_digest(Path(file)) for file in weights]
    about = {"cohort": cohort.name, "split": split, "fold": fold, "manifest_digest": cohort.digest}
    return {**about, "weights_sha256": digests if len(digests) > 1 else digests[0]}


def results_folder(weights: Sequence[str | Path], output_dir: str, source: Mapping[str, Any]) -> Path:
    """Return the folder ``metrics`` for results of these weights, sure that no result of another source is lost.

    Raises:
        UsageError: there are results of another cohort, split or network; or the weights belong to no run and no
            folder was given.
    """
    folder = run_of(weights, output_dir) / "metrics"
    refuse_other_results(folder, source)
    return folder


def refuse_other_results(folder: Path, source: Mapping[str, Any]) -> None:
    """Refuse a folder with results of another source.

    Raises:
        UsageError: see above.
    """
    summary = folder / "summary.json"
    earlier = json.loads(summary.read_text()).get("source") if summary.is_file() else None
    if earlier is not None and earlier != dict(source):
        raise UsageError(
            f"{folder} holds results of another cohort, split or network",
            f"there: {earlier}, now: {dict(source)}",
            "name another folder with --output_dir, or remove the old results",
        )


def prediction_folder(weights: Sequence[str | Path], output_dir: str) -> Path:
    """Return where new masks go: ``output_dir``, or ``predictions`` in the run's own folder."""
    return Path(output_dir).resolve() if output_dir else run_of(weights) / "predictions"


def run_of(weights: Sequence[str | Path], output_dir: str | Path = "") -> Path:
    """Return where results belong: ``output_dir`` if given, else the folder of the run that the weights belong to.

    Of an ensemble of the folds of ``cv`` it is ``cv_ensemble``, beside the folds' runs.

    Raises:
        UsageError: no ``output_dir``, and the weights do not lie in a run's folder, or are no folds of one
            cross-validation.
    """
    if output_dir:
        return Path(output_dir).resolve()
    folders = [Path(file).resolve().parent for file in weights]
    for file, folder in zip(weights, folders, strict=True):
        if folder.name != "checkpoints":
            raise UsageError(f"{file} does not belong to a run", "results need a folder", "name one with --output_dir")
    runs = [folder.parent for folder in folders]
    if len(runs) == 1:
        return runs[0]
    names = {cross_validation_of(run.name) for run in runs}
    if len(names) > 1 or None in names or len({run.parent for run in runs}) > 1:
        raise UsageError(
            f"the weights of {', '.join(run.name for run in runs)} belong to no common run",
            "results need a folder",
            "name one with --output_dir",
        )
    return runs[0].with_name(f"{names.pop()}_ensemble")
