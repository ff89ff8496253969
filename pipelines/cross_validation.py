"""Cross-validation: every fold a run of its own, and one table of cases measured by networks that never saw them.

The folds stand in the manifest, so that they are the same for every machine and every repetition. A fold that is
finished is not trained again: the command is repeated after an interruption, and goes on where it stopped.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.manifests import Manifest, load_manifest
from pipelines.metrics import summarise
from pipelines.reports import report_or_warn
from pipelines.reports.tables import format_table, read_per_case_csv, write_per_case_csv, write_summary_json
from pipelines.runner import bundle_parser, run_bundle
from pipelines.training.distributed import place_in
from pipelines.training.folds import fold_run, outcome_of, recorded_config, refuse_other_run, write_folds
from pipelines.training.results import find_checkpoint, refuse_other_results, source_of
from pipelines.training.resume import MAY_DIFFER
from pipelines.training.run_folder import new_run_name
from transforms.errors import DataError, UsageError

SET_HERE = ("fold", "resume", "split", "checkpoint", "ensemble", "output_dir")
# options of training that evaluation has too, with the same meaning
SHARED = ("manifest", "data_root", "check_files", "runs_dir", "run_name", "device_name", "precision")


@dataclass(frozen=True)
class CrossValidation:
    """What all folds have in common.

    Attributes:
        name: of the cross-validation; fold k is the run ``<name>_fold<k>``.
        runs: the folder of the bundle's runs.
        cohort: its manifest, which stores the folds.
        config: the bundle's configuration, macros and overrides resolved.
    """

    name: str
    runs: Path
    cohort: Manifest
    config: Mapping[str, Any]

    @property
    def folds(self) -> int:
        """Number of folds."""
        return self.cohort.splits.folds or 0

    def run(self, fold: int) -> Path:
        """Return the folder of a fold's run."""
        return self.runs / fold_run(self.name, fold)


def train_folds(bundle: str, folds: int, overrides: Mapping[str, Any], variants: Sequence[str] = ()) -> Path:
    """Train a bundle once per fold, each time without that fold, then evaluate out of fold.

    Args:
        bundle: path or name.
        folds: number of folds; the manifest must store as many.
        overrides: hyper-parameters of ``train.yaml``; ``run_name`` names the cross-validation.
        variants: further configuration files, laid over ``train.yaml``.

    Returns:
        The folder ``<run_name>_folds`` with the out-of-fold results.

    Raises:
        UsageError: another number of folds, a fold that was trained with other hyper-parameters, or several processes.
        BundleError: a fold that was trained on another cohort.
    """
    overrides = {**overrides, "run_name": overrides.get("run_name") or new_run_name()}
    cross = _cross_validation(bundle, "train", folds, overrides, variants)
    print(f"cross-validation {cross.name}: {folds} folds in {cross.runs}", flush=True)
    for fold in range(folds):
        if outcome_of(cross.run(fold)) is not None:
            refuse_other_run(cross.run(fold), fold, cross.cohort)
            _refuse_other_settings(cross.run(fold), {**cross.config, "fold": fold})
            print(f"fold {fold}: run {cross.run(fold).name} is finished, nothing to do", flush=True)
            continue
        print(f"fold {fold}: training run {cross.run(fold).name}", flush=True)
        run = {**overrides, "run_name": cross.run(fold).name, "fold": fold, "resume": "auto"}
        run_bundle(bundle, "train", run, variants)
        gc.collect()  # a configuration's parts refer to one another in circles, and hold the network
    shared = {key: value for key, value in overrides.items() if key in SHARED}
    return evaluate_folds(bundle, folds, shared)


def evaluate_folds(bundle: str, folds: int, overrides: Mapping[str, Any], variants: Sequence[str] = ()) -> Path:
    """Evaluate every fold by its own network, and merge: each case outside test once, by a network that never saw it.

    Args:
        bundle: path or name.
        folds: number of folds; the manifest must store as many.
        overrides: hyper-parameters of ``evaluate.yaml``; ``run_name`` names the cross-validation.
        variants: further configuration files, laid over ``evaluate.yaml``.

    Returns:
        The folder ``<run_name>_folds``: ``metrics/per_case.csv`` and ``metrics/summary.json``; metrics, overlays and
        predictions of each fold in ``fold<k>/`` (the folds' own runs stay as they are).

    Raises:
        UsageError: no name, another number of folds, or results of another source in that folder.
        BundleError: a fold is not trained to its end, or on another cohort.
        DataError: a case in two folds or in none.
    """
    cross = _cross_validation(bundle, "evaluate", folds, overrides, variants)
    folder = write_folds(cross.runs, cross.name, folds, cross.cohort)
    weights = [find_checkpoint(cross.runs.parent, cross.runs.name, cross.run(fold).name) for fold in range(folds)]
    source = {**source_of(cross.cohort, "out of fold", None, weights), "folds": folds}
    refuse_other_results(folder / "metrics", source)
    tables = {}
    for fold in range(folds):
        print(f"fold {fold}: evaluating run {cross.run(fold).name}", flush=True)
        own = {"run_name": cross.run(fold).name, "split": "validation", "fold": fold}
        run_bundle(bundle, "evaluate", {**overrides, **own, "output_dir": str(folder / f"fold{fold}")}, variants)
        tables[fold] = read_per_case_csv(folder / f"fold{fold}" / "metrics" / "per_case.csv")
        gc.collect()
    rows = merge_folds(tables, {case.id: case.fold for case in cross.cohort.cases if case.split != "test"})
    write_per_case_csv(rows, folder / "metrics" / "per_case.csv")
    summary = {"source": source, **summarise([row for table in tables.values() for row in table])}
    write_summary_json(summary, folder / "metrics" / "summary.json")
    print(
        f"out of fold: {summary['n_cases']} cases, results in {folder / 'metrics'}\n{format_table(summary)}", flush=True
    )
    report_or_warn(folder)
    return folder


def merge_folds(
    tables: Mapping[int, Sequence[Mapping[str, Any]]], expected: Mapping[str, int | None]
) -> list[dict[str, Any]]:
    """Return the rows of all folds as one table with a column ``fold``, sure that each case was measured once.

    Args:
        tables: rows per case and label by fold.
        expected: stored fold by case.

    Raises:
        DataError: a case in two folds, in none, in another than the manifest's, or one that is not expected.
    """
    found: dict[str, int] = {}
    for fold, case in _cases(tables):
        if case in found:
            raise _misplaced(case, f"it was measured in folds {found[case]} and {fold}")
        if case not in expected or expected[case] != fold:
            raise _misplaced(case, f"it was measured in fold {fold}, the manifest says {expected.get(case, 'none')}")
        found[case] = fold
    for case, stored in expected.items():
        if case not in found:
            raise _misplaced(case, f"it was measured in no fold, the manifest says {stored}")
    first = ("case", "subject")
    return [
        {**{key: row[key] for key in first}, "fold": fold, **{key: row[key] for key in row if key not in first}}
        for fold, rows in sorted(tables.items())
        for row in rows
    ]


def _cross_validation(
    bundle: str, config: str, folds: int, overrides: Mapping[str, Any], variants: Sequence[str]
) -> CrossValidation:
    for key in SET_HERE:
        if key in overrides:
            raise UsageError(f"--{key} with --folds", "every fold has its own", f"leave out --{key}")
    place = place_in(os.environ)
    if place is not None and place.world_size > 1:
        raise UsageError(
            f"--folds in {place.world_size} processes",
            "the folds are trained one after another, in one process",
            "train each fold by itself, --fold 0 --run_name NAME_fold0 and so on, then: fiducial evaluate ... --folds",
        )
    with bundle_parser(bundle, config, overrides, variants) as parser:
        name = str(parser.get("run_name"))
        if not name or Path(name).name != name:
            raise UsageError(f"run_name {name!r}", "the folds' runs need a plain common name", "give it as --run_name")
        cohort = load_manifest(parser.get("manifest"), root=parser.get("data_root") or None)
        runs = Path(parser.get("runs_dir")).resolve() / parser.get("bundle_name")
        plain = yaml.safe_load(yaml.safe_dump(dict(parser.get())))
    stored = cohort.splits.folds
    if stored != folds:
        raise UsageError(
            f"folds {folds}: manifest {cohort.path} stores {stored or 'no folds'}",
            "the folds are drawn once, by subject, when a cohort is imported",
            f"import it with --folds {folds}" + (f", or use --folds {stored}" if stored else ""),
        )
    return CrossValidation(name, runs, cohort, plain)


def _refuse_other_settings(run: Path, config: Mapping[str, Any]) -> None:
    """Refuse to count a finished run as a fold of a cross-validation that is trained differently."""
    recorded = recorded_config(run)
    for key in sorted({*recorded, *config} - MAY_DIFFER - {"_meta_"}):
        if recorded.get(key) != config.get(key):
            raise UsageError(
                f"run {run.name} is finished, but was trained with another {key}",
                f"there: {recorded.get(key)}, now: {config.get(key)}",
                "train all folds alike: give the same options, or another --run_name",
            )


def _cases(tables: Mapping[int, Iterable[Mapping[str, Any]]]) -> Iterator[tuple[int, str]]:
    """Yield (fold, case), each case once per fold: a case has a row per label."""
    for fold, rows in tables.items():
        for case in dict.fromkeys(str(row["case"]) for row in rows):
            yield fold, case


def _misplaced(case: str, why: str) -> DataError:
    return DataError(f"case {case} out of fold", why, "import the cohort with --folds, and train every fold on it")
