"""A run's folder belongs to one run; its weights are found again; its record says what a reader needs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from pipelines.training import run_folder as module
from pipelines.training.run_folder import (
    create_run,
    environment,
    extend_record,
    refuse_existing_run,
    write_record,
)
from transforms.errors import ResourceError, UsageError


def test_a_new_run_has_its_parts(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "b", "first")
    assert folder == tmp_path / "b" / "first"
    assert sorted(part.name for part in folder.iterdir()) == ["checkpoints", "metrics", "tensorboard"]


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    create_run(tmp_path, "b", "first")
    for refuse in (refuse_existing_run, create_run):
        with pytest.raises(UsageError, match="first exists already"):
            refuse(tmp_path, "b", "first")
    assert create_run(tmp_path, "other", "first").is_dir()


def test_two_processes_with_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_run(tmp_path, "b", "first")
    calls: list[str] = []
    real = module.refuse_existing_run

    def late(*arguments: str) -> None:  # the check ran before the other process made the folder
        calls.append("")
        if len(calls) > 1:
            real(*arguments)

    monkeypatch.setattr(module, "refuse_existing_run", late)
    with pytest.raises(UsageError, match="first exists already"):
        create_run(tmp_path, "b", "first")


def test_runs_without_a_name_get_one_each_even_in_the_same_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "new_run_name", lambda: "20260101-000000")
    names = [create_run(tmp_path, "b").name for _ in range(3)]
    assert names == ["20260101-000000", "20260101-000000-2", "20260101-000000-3"]


def test_an_empty_folder_of_that_name_is_taken(tmp_path: Path) -> None:
    (tmp_path / "b" / "first").mkdir(parents=True)
    assert (create_run(tmp_path, "b", "first") / "checkpoints").is_dir()


@pytest.mark.parametrize("name", ["../other", "a/b", ".hidden", ".."])
def test_names_that_lead_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="run_name"):
        create_run(tmp_path, "b", name)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_three_lines(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot be made"):
        create_run(tmp_path / "runs", "b")


def test_the_record_is_complete_and_grows(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "b", "first")
    write_record(folder, {"spacing": (1.0, 1.0), "max_epochs": 3}, {"seed": 7})
    extend_record(folder, {"outcome": {"best_metric": 0.5}})
    record = json.loads((folder / "record.json").read_text())
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"spacing": [1.0, 1.0], "max_epochs": 3}
    assert record["seed"] == 7
    assert record["outcome"] == {"best_metric": 0.5}
    assert {"command", "python", "platform", "versions", "commit", "threads", "gpus", "started"} <= set(record)
    assert record["versions"]["monai"].startswith("1.6")


def test_the_commit_is_that_of_this_code_and_of_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    installed = tmp_path / ".venv" / "run_folder.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(module, "__file__", str(installed))
    assert environment()["commit"] is None
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    subprocess.run(["git", "-C", str(tmp_path), *identity, "commit", "-q", "-m", "y"], check=True)
    commit = environment()["commit"]
    assert commit is not None
    assert len(commit) == 40
    installed.write_text("changed")
    assert environment()["commit"] == f"{commit} with local changes"
