"""Cross-validation without training: the folds of the manifest, the merged table, and what must not be mixed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import cross_validation
from pipelines.cli import main
from pipelines.cross_validation import evaluate_folds, merge_folds, train_folds
from pipelines.manifests import Manifest, assign_folds, write_manifest
from pipelines.reports.tables import read_per_case_csv, write_per_case_csv
from pipelines.runner import bundle_parser
from pipelines.training.folds import fold_run
from transforms.errors import DataError, UsageError

BUNDLE = "brain_lesion_mri_segmentation"
EXPECTED = {"a": 0, "b": 1, "c": 0}


def row(case: str, label: str = "lesion", dice: float | None = 0.5) -> dict[str, Any]:
    return {"case": case, "subject": f"s{case}", "label": label, "status": "both", "dice": dice, "lesions": 2}


def test_the_tables_of_the_folds_become_one() -> None:
    rows = merge_folds({1: [row("b")], 0: [row("a"), row("a", "edema"), row("c")]}, EXPECTED)
    assert [(r["case"], r["label"], r["fold"]) for r in rows] == [
        ("a", "lesion", 0),
        ("a", "edema", 0),
        ("c", "lesion", 0),
        ("b", "lesion", 1),
    ]
    assert list(rows[0]) == ["case", "subject", "fold", "label", "status", "dice", "lesions"]


@pytest.mark.parametrize(
    ("tables", "why"),
    [
        ({0: [row("a"), row("c")], 1: [row("b"), row("a")]}, "folds 0 and 1"),
        ({0: [row("a")], 1: [row("b")]}, "in no fold, the manifest says 0"),
        ({0: [row("a"), row("b"), row("c")], 1: []}, "in fold 0, the manifest says 1"),
        ({0: [row("a"), row("c")], 1: [row("b"), row("t")]}, "in fold 1, the manifest says none"),
    ],
)
def test_a_case_in_two_folds_or_in_none_is_refused(tables: dict[int, list[dict[str, Any]]], why: str) -> None:
    with pytest.raises(DataError) as refusal:
        merge_folds(tables, EXPECTED)
    assert why in refusal.value.why


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [row("7", dice=0.1 + 0.2), row("8", dice=None), row("9", dice=1e-300)]
    write_per_case_csv(rows, tmp_path / "t.csv")
    assert read_per_case_csv(tmp_path / "t.csv") == rows
    (tmp_path / "t.csv").write_text((tmp_path / "t.csv").read_text().replace("both,,", "both,nothing,"))
    with pytest.raises(DataError, match="dice is 'nothing'"):
        read_per_case_csv(tmp_path / "t.csv")
    with pytest.raises(DataError, match="no such file"):
        read_per_case_csv(tmp_path / "none.csv")


@pytest.fixture
def cohort(tiny_cohort: Manifest, tmp_path: Path) -> Manifest:
    """The tiny cohort with two folds: subjects s0 to s3, and s4 for the test."""
    folds = assign_folds({f"s{number}": "" for number in range(4)}, 2)
    cases = tuple(replace(case, fold=folds.get(case.subject)) for case in tiny_cohort.cases)
    manifest = replace(tiny_cohort, name="folded", cases=cases, splits=replace(tiny_cohort.splits, folds=2))
    return write_manifest(manifest, tmp_path / "folded.json")


class Trainings:
    """Takes the place of MONAI's run: leaves what a training and an evaluation leave."""

    def __init__(self, cohort: Manifest) -> None:
        self.cohort, self.done = cohort, []  # type: ignore[var-annotated]

    def __call__(self, bundle: str, config: str, overrides: dict[str, Any], variants: list[str]) -> None:
        self.done.append((config, overrides["run_name"], overrides["fold"], overrides.get("resume")))
        with bundle_parser(bundle, config, {k: v for k, v in overrides.items() if k != "resume"}) as parser:
            resolved = dict(parser.get())
        run = Path(overrides["runs_dir"]) / BUNDLE / overrides["run_name"]
        if config == "evaluate":
            cases = [case.id for case in self.cohort.cases if case.fold == overrides["fold"]]
            write_per_case_csv(
                [row(case) for case in cases], Path(overrides["output_dir"]) / "metrics" / "per_case.csv"
            )
            return
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / "best.safetensors").write_bytes(overrides["run_name"].encode())
        (run / "config.yaml").write_text(json.dumps({key: resolved[key] for key in resolved if key != "_meta_"}))
        (run / "record.json").write_text(json.dumps({"manifest_digest": self.cohort.digest, "outcome": {}}))


@pytest.fixture
def trainings(cohort: Manifest, monkeypatch: pytest.MonkeyPatch) -> Trainings:
    stand_in = Trainings(cohort)
    monkeypatch.setattr(cross_validation, "run_bundle", stand_in)
    return stand_in


def options(cohort: Manifest, tmp_path: Path, **more: Any) -> dict[str, Any]:
    return {"manifest": str(cohort.path), "runs_dir": str(tmp_path / "runs"), "run_name": "cv", **more}


def test_every_fold_is_a_run_and_the_command_can_be_repeated(
    cohort: Manifest, tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    given = options(cohort, tmp_path, max_epochs=3)
    folder = train_folds(BUNDLE, 2, given)
    assert trainings.done == [
        ("train", "cv_fold0", 0, "auto"),
        ("train", "cv_fold1", 1, "auto"),
        ("evaluate", "cv_fold0", 0, None),
        ("evaluate", "cv_fold1", 1, None),
    ]
    assert {row["case"]: row["fold"] for row in read_per_case_csv(folder / "metrics" / "per_case.csv")} == {
        case.id: case.fold for case in cohort.cases if case.split != "test"
    }
    summary = json.loads((folder / "metrics" / "summary.json").read_text())
    assert (summary["n_cases"], summary["source"]["folds"], summary["source"]["split"]) == (4, 2, "out of fold")
    assert summary["source"]["manifest_digest"] == cohort.digest
    assert len(set(summary["source"]["weights_sha256"])) == 2
    assert "fold" not in summary["labels"]["lesion"]
    record = json.loads((folder / "folds.json").read_text())
    assert record["runs"] == ["cv_fold0", "cv_fold1"]
    # an interruption in the second fold: only that one is trained again
    (tmp_path / "runs" / BUNDLE / "cv_fold1" / "record.json").unlink()
    trainings.done.clear()
    assert train_folds(BUNDLE, 2, given) == folder
    assert [done[:2] for done in trainings.done if done[0] == "train"] == [("train", "cv_fold1")]
    assert "run cv_fold0 is finished, nothing to do" in capsys.readouterr().out


def test_a_finished_fold_with_other_options_is_no_fold_of_this(
    cohort: Manifest, tmp_path: Path, trainings: Trainings
) -> None:
    train_folds(BUNDLE, 2, options(cohort, tmp_path, max_epochs=3))
    with pytest.raises(UsageError, match="cv_fold0 is finished, but was trained with another max_epochs"):
        train_folds(BUNDLE, 2, options(cohort, tmp_path, max_epochs=4))
    train_folds(BUNDLE, 2, options(cohort, tmp_path, max_epochs=3, workers=2))  # learns the same


def test_results_of_other_weights_are_not_overwritten(cohort: Manifest, tmp_path: Path, trainings: Trainings) -> None:
    given = options(cohort, tmp_path)
    folder = train_folds(BUNDLE, 2, given)
    weights = tmp_path / "runs" / BUNDLE / fold_run("cv", 1) / "checkpoints" / "best.safetensors"
    weights.write_bytes(b"others")
    with pytest.raises(UsageError, match=f"{folder.name}/metrics holds results of another"):
        evaluate_folds(BUNDLE, 2, given)


@pytest.mark.parametrize(("folds", "fix"), [(5, "--folds 5, or use --folds 2"), (0, "use --folds 2")])
def test_another_number_of_folds_is_refused(cohort: Manifest, tmp_path: Path, folds: int, fix: str) -> None:
    with pytest.raises(UsageError, match="stores 2") as refusal:
        train_folds(BUNDLE, folds, options(cohort, tmp_path))
    assert fix in refusal.value.fix
    assert not (tmp_path / "runs").exists()


def test_a_manifest_without_folds_is_refused(tiny_cohort: Manifest, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="stores no folds") as refusal:
        train_folds(BUNDLE, 5, options(tiny_cohort, tmp_path))
    assert refusal.value.fix == "import it with --folds 5"


@pytest.mark.parametrize("key", ["fold", "resume", "split", "checkpoint", "ensemble", "output_dir"])
def test_what_every_fold_has_of_its_own_cannot_be_given(cohort: Manifest, tmp_path: Path, key: str) -> None:
    with pytest.raises(UsageError, match=f"--{key} with --folds"):
        evaluate_folds(BUNDLE, 2, options(cohort, tmp_path, **{key: "x"}))


def test_several_processes_are_refused(cohort: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="--folds in 2 processes"):
        train_folds(BUNDLE, 2, options(cohort, tmp_path))


def test_evaluation_needs_a_name_and_training_makes_one(
    cohort: Manifest, tmp_path: Path, trainings: Trainings, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--manifest", str(cohort.path), "--runs_dir", str(tmp_path / "runs"), "--folds", "2"]
    assert main(["evaluate", BUNDLE, *given]) == 2
    assert main(["evaluate", BUNDLE, *given, "--run_name", "a/b"]) == 2
    assert capsys.readouterr().err.count("plain common name") == 2
    assert main(["train", BUNDLE, *given]) == 0
    name = next((tmp_path / "runs" / BUNDLE).glob("*_folds")).name.removesuffix("_folds")
    assert f"cross-validation {name}: 2 folds" in capsys.readouterr().out
    assert main(["train", BUNDLE, *given, "--max_epoch", "2"]) == 2  # misspelt: before anything is trained
    assert "did you mean --max_epochs" in capsys.readouterr().err


def test_an_unfinished_cross_validation_is_not_evaluated(cohort: Manifest, tmp_path: Path) -> None:
    given = ["--manifest", str(cohort.path), "--runs_dir", str(tmp_path / "runs"), "--folds", "2", "--run_name", "cv"]
    assert main(["evaluate", BUNDLE, *given]) == 4
    assert not (tmp_path / "runs").exists()
