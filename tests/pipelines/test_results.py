"""Weights are found again, and results of one thing never replace those of another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from pipelines.manifests import Manifest
from pipelines.training.checkpoints import save_weights
from pipelines.training.folds import cross_validation_of, fold_run, write_folds
from pipelines.training.results import (
    find_checkpoint,
    find_weights,
    prediction_folder,
    results_folder,
    run_of,
    source_of,
)
from pipelines.training.run_folder import create_run
from transforms.errors import BundleError, UsageError


def weights(runs: Path, run: str, *kinds: str, age: float = 0.0) -> Path:
    folder = create_run(runs, "b", run)
    for kind in kinds:
        path = folder / "checkpoints" / f"{kind}.safetensors"
        path.write_bytes(b"weights")
        os.utime(path, (1e9 - age, 1e9 - age))
    return folder


def test_the_best_weights_then_the_last(tmp_path: Path) -> None:
    weights(tmp_path, "both", "best", "last")
    weights(tmp_path, "7", "last")
    assert find_checkpoint(tmp_path, "b", "both").name == "best.safetensors"
    assert find_checkpoint(tmp_path, "b", 7).name == "last.safetensors"  # type: ignore[arg-type]  # as typed: --run_name 7


def test_the_newest_run_is_the_one_that_trained_last(tmp_path: Path) -> None:
    old, new = weights(tmp_path, "old", "best", "last", age=100), weights(tmp_path, "new", "best", "last")
    create_run(tmp_path, "b", "running")  # no weights yet
    (old / "predictions").mkdir()  # evaluated a moment ago
    (tmp_path / "b" / "notes.txt").write_text("")
    assert find_checkpoint(tmp_path, "b") == new / "checkpoints" / "best.safetensors"


def test_weights_by_path(tmp_path: Path) -> None:
    path = weights(tmp_path, "first", "last") / "checkpoints" / "last.safetensors"
    assert find_checkpoint("nowhere", "b", "", str(path)) == path
    with pytest.raises(BundleError, match="no such file"):
        find_checkpoint(tmp_path, "b", "", str(tmp_path / "none.safetensors"))


@pytest.mark.parametrize("name", ["", "none"])
def test_no_weights_at_all(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="no trained weights"):
        find_checkpoint(tmp_path, "b", name)


def trained(runs: Path, run: str, network: str, age: float) -> Path:
    """Real weights whose contract says which network they are of."""
    path = create_run(runs, "b", run) / "checkpoints" / "best.safetensors"
    save_weights(torch.nn.Linear(1, 1), {"contract": {"network": network}}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_a_bundle_with_two_trainings_finds_the_weights_of_each(tmp_path: Path) -> None:
    old, fusion = trained(tmp_path, "old", "denoiser", 20), trained(tmp_path, "fusion", "denoiser", 10)
    head = trained(tmp_path, "head", "lesion head", 0)  # trained last
    assert find_checkpoint(tmp_path, "b") == head
    assert find_checkpoint(tmp_path, "b", network="denoiser") == fusion
    assert find_checkpoint(tmp_path, "b", "old", network="denoiser") == old
    assert find_checkpoint(tmp_path, "b", "", str(old), "denoiser") == old
    for named in ({"name": "head"}, {"checkpoint": str(head)}):
        with pytest.raises(BundleError, match="weights of another network") as caught:
            find_checkpoint(tmp_path, "b", network="denoiser", **named)
        assert caught.value.why == "its contract says 'lesion head', expected 'denoiser'"
    with pytest.raises(BundleError, match="no trained weights"):
        find_checkpoint(tmp_path, "b", network="segmentation")


def cross_validation(runs: Path, cohort: Manifest, folds: int = 3, name: str = "cv") -> list[Path]:
    """Write the runs of a finished cross-validation; return their best weights."""
    folders = [weights(runs, fold_run(name, fold), "best", "last") for fold in range(folds)]
    for fold, folder in enumerate(folders):
        (folder / "checkpoints" / "best.safetensors").write_bytes(bytes([fold]))
        (folder / "record.json").write_text(json.dumps({"manifest_digest": cohort.digest, "outcome": {"epochs": 1}}))
        (folder / "config.yaml").write_text(f"fold: {fold}\n")
    write_folds(runs / "b", name, folds, cohort)
    return [folder / "checkpoints" / "best.safetensors" for folder in folders]


def test_an_ensemble_is_every_fold(tmp_path: Path, tiny_cohort: Manifest) -> None:
    best = cross_validation(tmp_path, tiny_cohort)
    weights(tmp_path, "cv_fold7", "best")  # somebody else's run: no fold of it
    assert find_weights(tmp_path, "b", ensemble="cv") == best
    assert find_weights(tmp_path, "b", checkpoint=[str(path) for path in best[1:]]) == best[1:]
    assert find_weights(tmp_path, "b", "cv_fold1") == find_weights(tmp_path, "b", "", str(best[1])) == [best[1]]


def test_an_ensemble_that_is_not_there(tmp_path: Path, tiny_cohort: Manifest) -> None:
    cross_validation(tmp_path, tiny_cohort)
    weights(tmp_path, "half_fold0", "best")
    for name in ("half", "none"):
        with pytest.raises(BundleError, match=f"{name}.*no finished cross-validation") as refusal:
            find_weights(tmp_path, "b", ensemble=name)
        assert refusal.value.why == "finished: cv"


def test_contradictory_weights_are_refused(tmp_path: Path, tiny_cohort: Manifest) -> None:
    best = [str(path) for path in cross_validation(tmp_path, tiny_cohort)]
    with pytest.raises(UsageError, match="--ensemble with --run_name"):
        find_weights(tmp_path, "b", "cv_fold1", ensemble="cv")
    with pytest.raises(UsageError, match="--ensemble with --checkpoint"):
        find_weights(tmp_path, "b", checkpoint=best[0], ensemble="cv")
    for files in ([], [best[0], best[0]], [best[0], ""]):
        with pytest.raises(UsageError, match="each once"):
            find_weights(tmp_path, "b", checkpoint=files)


@pytest.mark.parametrize("fault", ["unfinished", "cohort", "fold", "absent"])
def test_folds_that_do_not_belong_together_are_refused(tmp_path: Path, tiny_cohort: Manifest, fault: str) -> None:
    cross_validation(tmp_path, tiny_cohort)
    run = tmp_path / "b" / "cv_fold1"
    record = json.loads((run / "record.json").read_text())
    if fault == "unfinished":
        del record["outcome"]
    if fault == "cohort":
        record["manifest_digest"] = "another"
    (run / "record.json").write_text(json.dumps(record))
    if fault == "fold":
        (run / "config.yaml").write_text("fold: 0\n")
    message = {"unfinished": "cv_fold1 not finished", "cohort": "cv_fold1: trained on another cohort"}
    message |= {"fold": "cv_fold1: held out fold 0", "absent": "cv_fold3 not finished"}
    with pytest.raises(BundleError, match=message[fault]):
        write_folds(tmp_path / "b", "cv", 4 if fault == "absent" else 3, tiny_cohort)


def test_results_of_an_ensemble_lie_beside_its_folds(tmp_path: Path, tiny_cohort: Manifest) -> None:
    best = cross_validation(tmp_path, tiny_cohort)
    assert run_of(best) == tmp_path / "b" / "cv_ensemble"
    assert prediction_folder(best, "") == tmp_path / "b" / "cv_ensemble" / "predictions"
    source = source_of(tiny_cohort, "test", None, best)
    assert len(set(source["weights_sha256"])) == 3
    assert results_folder(best, "", source) == tmp_path / "b" / "cv_ensemble" / "metrics"
    for other in (weights(tmp_path, "x_fold0", "best"), weights(tmp_path, "plain", "best")):
        mixed = [best[0], other / "checkpoints" / "best.safetensors"]
        with pytest.raises(UsageError, match="belong to no common run"):
            run_of(mixed)
        assert run_of(mixed, tmp_path / "masks") == tmp_path / "masks"


def test_names_of_folds() -> None:
    assert cross_validation_of(fold_run("cv_fold1_again", 12)) == "cv_fold1_again"
    assert cross_validation_of("cv") is None
    assert cross_validation_of("_fold1") is None


def test_results_of_another_cohort_split_or_network_are_not_overwritten(tmp_path: Path, tiny_cohort: Manifest) -> None:
    path = weights(tmp_path, "first", "best") / "checkpoints" / "best.safetensors"
    source = source_of(tiny_cohort, "test", None, [path])
    folder = results_folder([path], "", source)
    assert folder == tmp_path / "b" / "first" / "metrics"
    (folder / "summary.json").write_text(json.dumps({"source": source}))
    assert results_folder([path], "", source) == folder  # the same again
    for other in ({"split": "validation"}, {"fold": 1}, {"manifest_digest": "other"}, {"weights_sha256": "other"}):
        with pytest.raises(UsageError, match="another cohort, split or network"):
            results_folder([path], "", {**source, **other})
    path.write_bytes(b"other weights")
    assert source_of(tiny_cohort, "test", None, [path])["weights_sha256"] != source["weights_sha256"]
    assert results_folder([path], str(tmp_path / "elsewhere"), {**source, "split": "train"}).parent.name == "elsewhere"


def test_results_lie_in_the_run_of_their_weights(tmp_path: Path) -> None:
    path = weights(tmp_path, "first", "best") / "checkpoints" / "best.safetensors"
    assert run_of([path]) == tmp_path / "b" / "first"
    assert prediction_folder([path], "") == tmp_path / "b" / "first" / "predictions"
    assert prediction_folder([path], str(tmp_path / "masks")) == tmp_path / "masks"
    loose = tmp_path / "loose.safetensors"
    with pytest.raises(UsageError, match="does not belong to a run"):
        run_of([loose])
    assert run_of([loose], tmp_path / "masks") == tmp_path / "masks"
