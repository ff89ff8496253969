"""A run's folder belongs to one run; its weights are found again; its record says what a reader needs."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
import yaml

from pipelines.bundles import machine
from pipelines.training import run_folder as module
from pipelines.training.run_folder import (
    code_digest,
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
    write_record(folder, {"spacing": (1.0, 1.0), "max_epochs": 3}, {**environment(), "seed": 7})
    extend_record(folder, {"outcome": {"best_metric": 0.5}})
    record = json.loads((folder / "record.json").read_text())
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"spacing": [1.0, 1.0], "max_epochs": 3}
    assert record["seed"] == 7
    assert record["outcome"] == {"best_metric": 0.5}
    expected = {"command", "python", "platform", "versions", "commit", "code_digest", "gpus", "started"}
    assert expected <= set(record)
    assert record["versions"]["monai"].startswith("1.6")


def test_the_machine_is_on_record_with_all_that_decides_the_last_bits() -> None:
    found = machine(torch.device("cpu"), "fp32")
    assert found == {"device": "cpu", "precision": "fp32", "processes": 1, "threads": torch.get_num_threads()}


def test_the_digest_of_the_code_changes_with_any_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in ("pipelines/training/run_folder.py", "pipelines/a.py", "transforms/b.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x = 1\n")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "pipelines/training/run_folder.py"))
    digests = [code_digest()]
    (tmp_path / "pipelines" / "notes.txt").write_text("no code")
    assert code_digest() == digests[0]
    (tmp_path / "transforms" / "b.py").write_text("x = 2\n")
    digests.append(code_digest())
    (tmp_path / "transforms" / "b.py").rename(tmp_path / "transforms" / "c.py")
    digests.append(code_digest())
    (tmp_path / "pipelines" / "new.py").write_text("")
    digests.append(code_digest())
    assert len(set(digests)) == 4


def test_a_resumed_run_may_have_a_name_that_is_taken(tmp_path: Path) -> None:
    create_run(tmp_path, "b", "first")
    for resume in (True, "auto"):
        refuse_existing_run(tmp_path, "b", "first", resume)
        with pytest.raises(UsageError, match="run_name"):
            refuse_existing_run(tmp_path, "b", "../first", resume)
    with pytest.raises(UsageError, match="first exists already"):
        refuse_existing_run(tmp_path, "b", "first", False)


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
