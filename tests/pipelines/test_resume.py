"""Opening a run: the right one, by one process at a time, and only if what goes on is what was interrupted."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipelines.training import resume as module
from pipelines.training.resume import (
    KINDS,
    interrupted_run,
    lock,
    open_run,
    refuse_other_setup,
    release,
    setup_differences,
)
from pipelines.training.run_folder import create_run, extend_record, write_record
from pipelines.training.state import write_state
from transforms.errors import BundleError, UsageError

CONFIG = {"max_epochs": 3, "learning_rate": 0.1, "spacing": [1.0, 1.0], "workers": 0, "run_name": "a", "resume": False}
RECORD = {
    "manifest_digest": "m1",
    "code_digest": "c1",
    "versions": {"monai": "1.6.1", "torch": "2.13"},
    "machine": {"device": "cpu", "threads": 1},
    "command": ["train"],
}


@pytest.fixture(autouse=True)
def unlocked() -> Iterator[None]:
    """Leave no lock behind."""
    yield
    for folder in list(module._LOCKS):
        release(folder)


def interrupted(runs: Path, name: str, at: float | None = None) -> Path:
    """A run with a record and no outcome, last written ``at`` seconds after 2000 s of the epoch."""
    folder = create_run(runs, "b", name)
    write_record(folder, CONFIG, RECORD)
    if at is not None:
        os.utime(folder / "record.json", (2000 + at, 2000 + at))
    return folder


def finished(runs: Path, name: str) -> Path:
    folder = interrupted(runs, name)
    extend_record(folder, {"outcome": {"epochs": 3}})
    return folder


# ------------------------------------------------------------------------------------------------------- which run


def test_without_resume_a_run_is_new(tmp_path: Path) -> None:
    interrupted(tmp_path, "a")
    assert open_run(tmp_path, "b", "c") == tmp_path / "b" / "c"
    with pytest.raises(UsageError, match="a exists already"):
        open_run(tmp_path, "b", "a")


@pytest.mark.parametrize("resume", [True, "auto"])
def test_resume_finds_the_newest_run_that_is_not_finished(tmp_path: Path, resume: bool | str) -> None:
    interrupted(tmp_path, "z_older", 100)
    expected = interrupted(tmp_path, "a_newer", 200)
    finished(tmp_path, "done")
    (tmp_path / "b" / "empty").mkdir()
    assert open_run(tmp_path, "b", resume=resume) == expected


def test_newest_is_what_was_trained_last_not_what_was_started_last(tmp_path: Path) -> None:
    expected = interrupted(tmp_path, "started_first", 100)
    interrupted(tmp_path, "started_last", 200)
    state = write_state(expected / "checkpoints", 0, 1, {"x": torch.ones(1)})
    os.utime(state, (2300, 2300))
    assert interrupted_run(tmp_path, "b") == expected


def test_a_named_run_is_taken_even_where_another_is_newer(tmp_path: Path) -> None:
    expected = interrupted(tmp_path, "a", 100)
    interrupted(tmp_path, "c", 200)
    assert open_run(tmp_path, "b", "a", resume=True) == expected


def test_a_named_run_that_died_before_its_record_is_taken(tmp_path: Path) -> None:
    folder = create_run(tmp_path, "b", "a")
    assert open_run(tmp_path, "b", "a", resume=True) == folder
    assert interrupted_run(tmp_path, "b") is None  # without its name it is not looked for


def test_nothing_to_resume_says_why_or_starts(tmp_path: Path) -> None:
    finished(tmp_path, "done")
    with pytest.raises(UsageError, match=r"nothing to resume in .*b") as caught:
        open_run(tmp_path, "b", resume=True)
    assert "--resume" in caught.value.fix
    with pytest.raises(UsageError, match=r"nothing to resume in .*absent"):
        open_run(tmp_path, "b", "absent", resume=True)
    assert open_run(tmp_path, "b", "absent", resume="auto") == tmp_path / "b" / "absent"
    assert open_run(tmp_path, "other", resume="auto").parent == tmp_path / "other"


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_is_not_resumed(tmp_path: Path, resume: bool | str) -> None:
    finished(tmp_path, "done")
    with pytest.raises(UsageError, match="done is finished") as caught:
        open_run(tmp_path, "b", "done", resume=resume)
    assert "3 epochs" in caught.value.why
    assert "--initial_weights" in caught.value.fix


@pytest.mark.parametrize("resume", ["yes", "True", None, 2])
def test_resume_is_true_false_or_auto(tmp_path: Path, resume: Any) -> None:
    with pytest.raises(UsageError, match="expected True, False or auto"):
        open_run(tmp_path, "b", resume=resume)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------- one process


class Other:
    """Another process that is in a run until it is killed."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("fork")
        self.held = context.Event()
        self.process = context.Process(target=self._hold, args=(folder,), daemon=True)
        self.process.start()
        assert self.held.wait(timeout=20)

    def _hold(self, folder: Path) -> None:
        lock(folder)
        self.held.set()
        time.sleep(60)

    def kill(self) -> None:
        """As by `kill -9`: the lock must not outlive the process."""
        self.process.kill()
        self.process.join()


def test_two_processes_never_train_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WORKERS_END_S", 0.5)  # each refusal below waits for that long
    folder = interrupted(tmp_path, "a")
    other = Other(folder)
    for name in ("a", ""):
        with pytest.raises(UsageError, match=r"a is being trained by another process"):
            open_run(tmp_path, "b", name, resume=True)
    other.kill()
    assert open_run(tmp_path, "b", "a", resume=True) == folder


def test_a_released_run_is_open_to_others(tmp_path: Path) -> None:
    folder = open_run(tmp_path, "b", "a")
    assert open_run(tmp_path, "b", "a", resume=True) == folder  # the same process may come again
    release(folder)
    release(folder)
    other = Other(folder)
    with pytest.raises(UsageError, match="another process"):
        lock(folder)
    other.kill()
    lock(folder)


# ------------------------------------------------------------------------------------------------------- same setup


def test_what_may_differ_does_not_count() -> None:
    now = {**CONFIG, "workers": 8, "resume": True, "run_name": "", "runs_dir": "/elsewhere", "state_interval": 5}
    record = {**RECORD, "command": ["other"], "started": "later", "commit": "other", "platform": "other"}
    assert setup_differences(CONFIG, now, RECORD, record) == {}


@pytest.mark.parametrize(
    ("config", "record", "expected"),
    [
        ({"learning_rate": 0.2}, {}, {"config": ["learning_rate was 0.1, now 0.2"]}),
        ({"spacing": [1.0, 2.0]}, {}, {"config": ["spacing was [1.0, 1.0], now [1.0, 2.0]"]}),
        ({"decay": 1}, {}, {"config": ["decay was None, now 1"]}),
        ({}, {"manifest_digest": "m2"}, {"manifest": ["digest was m1, now m2"]}),
        ({}, {"code_digest": "c2"}, {"code": ["digest was c1, now c2"]}),
        ({}, {"versions": {"monai": "1.6.1", "torch": "2.14"}}, {"versions": ["torch was 2.13, now 2.14"]}),
        ({}, {"machine": {"device": "H200", "threads": 1}}, {"machine": ["device was cpu, now H200"]}),
    ],
)
def test_each_kind_of_difference_is_named(
    config: dict[str, Any], record: dict[str, Any], expected: dict[str, list[str]]
) -> None:
    assert setup_differences(CONFIG, {**CONFIG, **config}, RECORD, {**RECORD, **record}) == expected


def test_a_difference_deep_inside_is_named_where_it_is() -> None:
    before = {"train": {"trainer": {"clip_norm": 12.0, "metrics": {}}, "handlers": []}}
    now = {"train": {"trainer": {"clip_norm": 1.0, "metrics": {"x": 1}}, "handlers": []}}
    expected = ["train#trainer#clip_norm was 12.0, now 1.0", "train#trainer#metrics was {}, now None"]
    expected += ["train#trainer#metrics#x was None, now 1"]
    assert setup_differences(before, now, RECORD, RECORD) == {"config": expected}


def test_a_key_that_is_gone_counts() -> None:
    now = {key: value for key, value in CONFIG.items() if key != "max_epochs"}
    assert setup_differences(CONFIG, now, RECORD, RECORD) == {"config": ["max_epochs was 3, now None"]}


def test_the_same_setup_goes_on_and_says_so_in_the_record(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, "a")
    config = (folder / "config.yaml").read_bytes()
    for _ in range(2):
        refuse_other_setup(folder, {**CONFIG, "resume": True, "spacing": (1.0, 1.0)}, {**RECORD, "command": ["again"]})
    record = json.loads((folder / "record.json").read_text())
    assert [(entry["command"], entry["despite"]) for entry in record["resumed"]] == [(["again"], {})] * 2
    assert time.strftime("%Y") in record["resumed"][0]["at"]
    assert record["command"] == ["train"]  # that of the start stays
    assert (folder / "config.yaml").read_bytes() == config


CHANGES = {
    "config": ({"learning_rate": 0.2}, {}),
    "manifest": ({}, {"manifest_digest": "m2"}),
    "code": ({}, {"code_digest": "c2"}),
    "versions": ({}, {"versions": {"monai": "1.7"}}),
    "machine": ({}, {"machine": {"device": "H200"}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_another_setup_is_refused_unless_acknowledged_by_name(tmp_path: Path, kind: str) -> None:
    folder = interrupted(tmp_path, "a")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    config, record = {**CONFIG, **CHANGES[kind][0]}, {**RECORD, **CHANGES[kind][1]}
    others = [other for other in KINDS if other != kind]
    for acknowledged in ([], others):
        with pytest.raises(BundleError, match=f"its {kind} is another one") as caught:
            refuse_other_setup(folder, config, record, acknowledged)
        assert f"--resume_despite \"['{kind}']\"" in caught.value.fix
        assert "now" in caught.value.why
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    refuse_other_setup(folder, config, record, [kind])
    (entry,) = json.loads((folder / "record.json").read_text())["resumed"]
    assert list(entry["despite"]) == [kind]
    assert yaml.safe_load((folder / "config.yaml").read_text()) == config
    refuse_other_setup(folder, config, record)  # accepted once is accepted: the next interruption needs no word
    entries = json.loads((folder / "record.json").read_text())["resumed"]
    assert [list(entry["despite"]) for entry in entries] == [[kind], []]


def test_several_differences_need_several_acknowledgements(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, "a")
    config, record = {**CONFIG, "max_epochs": 9}, {**RECORD, "code_digest": "c2"}
    with pytest.raises(BundleError, match="its code is another one"):
        refuse_other_setup(folder, config, record, ["config"])
    refuse_other_setup(folder, config, record, ["config", "code"])
    (entry,) = json.loads((folder / "record.json").read_text())["resumed"]
    assert entry["despite"] == {"config": ["max_epochs was 3, now 9"], "code": ["digest was c1, now c2"]}


def test_an_acknowledgement_of_nothing_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resume_despite \['konfig'\]"):
        refuse_other_setup(interrupted(tmp_path, "a"), CONFIG, RECORD, ["konfig"])


def test_many_differences_are_counted(tmp_path: Path) -> None:
    folder = interrupted(tmp_path, "a")
    config = {**CONFIG, **{f"key{number}": "x" * 100 for number in range(8)}}
    with pytest.raises(BundleError) as caught:
        refuse_other_setup(folder, config, RECORD)
    assert caught.value.why.endswith("and 3 more")
    assert "x" * 61 not in caught.value.why  # long values are cut


def test_of_a_long_list_the_entry_that_differs_is_named(tmp_path: Path) -> None:
    before = [{"name": f"phase{number}", "rates": {".*": 0.1}} for number in range(4)]
    now = [*before[:3], {"name": "phase3", "rates": {".*": 0.2}}]
    differences = setup_differences({"phases": before}, {"phases": now}, {}, {})
    assert differences == {"config": ["phases#3#rates#.* was 0.1, now 0.2"]}
