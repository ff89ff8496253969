"""Weights are found again, and results of one thing never replace those of another."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pipelines.manifests import Manifest
from pipelines.training.results import find_checkpoint, prediction_folder, results_folder, run_of, source_of
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


def test_results_of_another_cohort_split_or_network_are_not_overwritten(tmp_path: Path, tiny_cohort: Manifest) -> None:
    path = weights(tmp_path, "first", "best") / "checkpoints" / "best.safetensors"
    source = source_of(tiny_cohort, "test", None, path)
    folder = results_folder(path, "", source)
    assert folder == tmp_path / "b" / "first" / "metrics"
    (folder / "summary.json").write_text(json.dumps({"source": source}))
    assert results_folder(path, "", source) == folder  # the same again
    for other in ({"split": "validation"}, {"fold": 1}, {"manifest_digest": "other"}, {"weights_sha256": "other"}):
        with pytest.raises(UsageError, match="another cohort, split or network"):
            results_folder(path, "", {**source, **other})
    path.write_bytes(b"other weights")
    assert source_of(tiny_cohort, "test", None, path)["weights_sha256"] != source["weights_sha256"]
    assert results_folder(path, str(tmp_path / "elsewhere"), {**source, "split": "train"}).parent.name == "elsewhere"


def test_results_lie_in_the_run_of_their_weights(tmp_path: Path) -> None:
    path = weights(tmp_path, "first", "best") / "checkpoints" / "best.safetensors"
    assert run_of(path) == tmp_path / "b" / "first"
    assert prediction_folder(path, "") == tmp_path / "b" / "first" / "predictions"
    assert prediction_folder(path, str(tmp_path / "masks")) == tmp_path / "masks"
    loose = tmp_path / "loose.safetensors"
    with pytest.raises(UsageError, match="does not belong to a run"):
        run_of(loose)
    assert run_of(loose, tmp_path / "masks") == tmp_path / "masks"
