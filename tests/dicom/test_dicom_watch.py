"""A watched folder: every study is done once, failures are kept with their reasons, and no result appears by halves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from generated_series import NAMES, write_series

from pipelines.dicom.cases import as_case_folders
from pipelines.dicom.privacy import names_found
from pipelines.dicom.watch import FolderWatcher, Patience, content_key
from transforms.errors import DataError, ResourceError, UsageError

QUICK = Patience(settle_s=0.0, poll_s=0.01, attempts=3, retry_s=0.01)


def gate(study: Path, out: Path) -> None:
    """What stands for a bundle: read the study, write what was found."""
    cases = as_case_folders(study, ["ct"], out / ".work")
    (out / "cases.txt").write_text("\n".join(cases.lines))


def log_of(results: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (results / "watch.jsonl").read_text().splitlines()]


def test_studies_are_done_or_failed_and_nobody_is_named(tmp_path: Path) -> None:
    incoming, results = tmp_path / "in", tmp_path / "out"
    write_series(incoming / "GRIMSBY Aurelia")
    spoiled = write_series(tmp_path / "spoiled")
    sorted(spoiled.iterdir())[2].unlink()  # a slice is lost
    with zipfile.ZipFile(incoming / "Dunnock.zip", "w") as archive:
        for path in spoiled.iterdir():
            archive.write(path, path.name)
    watcher = FolderWatcher(incoming, results, gate, QUICK)
    assert watcher.run(once=True) == 2
    (done,) = (incoming / "done").iterdir()
    assert sorted(path.name for path in (results / done.name).iterdir() if path.is_file()) == ["cases.txt"]
    failed = sorted(path.name for path in (incoming / "failed").iterdir())
    assert sorted(Path(name).suffix for name in failed) == [".txt", ".zip"]
    reason = next((incoming / "failed").glob("*.txt")).read_text()
    assert len(reason.strip().splitlines()) == 3
    assert "missing slice" in reason
    events = [line["event"] for line in log_of(results)]
    assert sorted(events) == ["done", "failed", "taken", "taken"]
    assert next(line for line in log_of(results) if line["event"] == "failed")["exit_code"] == 3
    said = (
        reason + (results / "watch.jsonl").read_text() + " ".join(p.name for p in results.rglob("*")) + " ".join(failed)
    )
    assert names_found(said, NAMES) == []
    assert not list((incoming / ".working").iterdir())


def test_bad_data_fail_at_once_and_a_full_disk_is_tried_again(tmp_path: Path) -> None:
    tried: list[str] = []

    def process(study: Path, out: Path) -> None:
        kind = next(study.iterdir()).read_text()
        tried.append(kind)
        (out / "half").write_text("half a result")
        if kind == "bad":
            raise DataError("a", "b", "c")
        if kind == "full" or tried.count(kind) < 3:
            raise ResourceError("disk", "full", "free space")

    for kind in ("bad", "full", "flaky"):
        (tmp_path / "in" / kind).mkdir(parents=True)
        (tmp_path / "in" / kind / "file").write_text(kind)
    keys = {kind: content_key(tmp_path / "in" / kind) for kind in ("bad", "full", "flaky")}
    assert FolderWatcher(tmp_path / "in", tmp_path / "out", process, QUICK).run(once=True) == 3
    assert {kind: tried.count(kind) for kind in keys} == {"bad": 1, "full": 3, "flaky": 3}
    assert (tmp_path / "in" / "done" / keys["flaky"]).is_dir()
    assert (tmp_path / "in" / "failed" / keys["full"]).is_dir()
    # no half of a result is left under any name
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([keys["flaky"], "watch.jsonl"])


def test_the_same_study_again_is_not_done_again(tmp_path: Path) -> None:
    calls: list[Path] = []

    def process(study: Path, out: Path) -> None:
        calls.append(study)
        (out / "result").write_text("made")

    for name in ("first", "again"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / f"{name}.dcm").write_text("the same content")
        FolderWatcher(tmp_path / "in", tmp_path / "out", process, QUICK).run(once=True)
    assert len(calls) == 1
    assert [line["event"] for line in log_of(tmp_path / "out")] == ["taken", "done", "taken", "again"]
    assert len(list((tmp_path / "in" / "done").iterdir())) == 2  # nothing of a patient is thrown away


def test_results_of_another_bundle_do_not_count_as_done(tmp_path: Path) -> None:
    def watcher(**maker: object) -> FolderWatcher:
        return FolderWatcher(tmp_path / "in", tmp_path / "out", gate, QUICK, maker)

    watcher(bundle="a", weights=["12"])
    watcher(bundle="a", weights=["12"])  # the same again
    with pytest.raises(UsageError, match="with another weights") as refused:
        watcher(bundle="a", weights=["34"])
    assert "['12'] before, now ['34']" in refused.value.why


def test_links_in_a_study_are_not_followed(tmp_path: Path) -> None:
    study = write_series(tmp_path / "study")
    before = content_key(study)
    (tmp_path / "elsewhere").write_text("not of this study")
    (study / "link").symlink_to(tmp_path / "elsewhere")
    (study / "loop").symlink_to(study)
    assert content_key(study) == before


def test_a_study_is_left_alone_while_it_grows_or_is_marked_as_unfinished(tmp_path: Path) -> None:
    incoming = tmp_path / "in"
    patience = Patience(settle_s=0.6, poll_s=0.05, attempts=1)
    seen: list[int] = []
    watcher = FolderWatcher(
        incoming, tmp_path / "out", lambda study, out: seen.append(len(list(study.iterdir()))), patience
    )
    for name in ("a.part", ".hidden", "empty"):
        (incoming / name).mkdir()
    (incoming / "a.part" / "x").write_text("x")
    (incoming / "study").mkdir()
    stop = threading.Event()
    thread = threading.Thread(target=watcher.run, kwargs={"stop": stop})
    thread.start()
    for number in range(8):  # a slow copy: a file each 0.15 s, longer in all than it takes to settle
        (incoming / "study" / str(number)).write_text(str(number))
        time.sleep(0.15)
    deadline = time.monotonic() + 15
    while not seen and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    thread.join()
    assert seen == [8]
    assert {path.name for path in incoming.iterdir()} >= {"a.part", ".hidden", "empty"}


def test_one_folder_has_one_watcher(tmp_path: Path) -> None:
    watcher = FolderWatcher(tmp_path / "in", tmp_path / "out", gate, QUICK)
    with FileLock(tmp_path / "in" / ".watch.lock"), pytest.raises(ResourceError, match="watched already"):
        watcher.run(once=True)
    with pytest.raises(UsageError, match="in one another"):
        FolderWatcher(tmp_path / "in", tmp_path / "in" / "out", gate, QUICK)


def test_an_unexpected_error_says_its_kind_and_not_what_it_quotes(tmp_path: Path) -> None:
    def process(study: Path, out: Path) -> None:
        raise RuntimeError("cannot process Grimsby")

    write_series(tmp_path / "in" / "study")
    FolderWatcher(tmp_path / "in", tmp_path / "out", process, Patience(0, 0.01, 1)).run(once=True)
    reason = next((tmp_path / "in" / "failed").glob("*.txt")).read_text()
    assert "RuntimeError" in reason
    assert names_found(reason + (tmp_path / "out" / "watch.jsonl").read_text(), NAMES) == []


KILLED = """
import os, sys
from pathlib import Path
from pipelines.dicom.watch import FolderWatcher, Patience
def process(study, out):
    (out / "half").write_text("half")
    if (study / "poison").exists():
        os._exit(9)  # as the system does to a process without memory left
    (out / "half").rename(out / "whole")
FolderWatcher(sys.argv[1], sys.argv[2], process, Patience(0, 0.01, 2, 0.01)).run(once=True)
"""


@pytest.mark.slow
def test_a_study_that_kills_the_process_ends_as_failed_and_the_others_are_done(tmp_path: Path) -> None:
    for name in ("poison", "sound"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / name).write_text(name)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "in"), str(tmp_path / "out")]
    codes = [
        subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode for _ in range(3)
    ]
    assert codes == [9, 9, 0]  # two attempts, then it is given up
    (done,) = (tmp_path / "in" / "done").iterdir()
    assert [path.name for path in done.iterdir()] == ["sound"]
    assert len(list((tmp_path / "in" / "failed").glob("*.txt"))) == 1
    assert [path.name for path in (tmp_path / "out" / done.name).iterdir()] == ["whole"]
    assert not list((tmp_path / "out").glob(".*.tmp"))
