"""A folder that is watched: what is put into it is processed once, and its result appears complete or not at all.

A study (folder, zip file) is taken when it has stopped changing, by a rename, so that no two watchers have it. From
then on it is called by a digest of its content: what somebody called it may be a name. The result is made in a hidden
folder and renamed into place; the study goes to ``done``, or to ``failed`` with the three lines of the reason. Bad
data fail at once; a full disk is tried again later. Attempts are counted before they begin, so a study that kills the
process ends as failed. Hidden entries, links and names that end in ``.tmp`` or ``.part`` are not looked at.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from pipelines.files import write_atomically, write_json
from pipelines.manifests.digest import file_digest
from transforms.errors import FiducialError, InterruptedRun, ResourceError, UsageError, find_error

_LOG = logging.getLogger(__name__)
_UNFINISHED = (".tmp", ".part", ".partial", ".crdownload", ".filepart")
Process = Callable[[Path, Path], object]


@dataclass(frozen=True)
class Patience:
    """How long to wait.

    Attributes:
        settle_s: without a change before a study counts as complete.
        poll_s: between two looks at the folder.
        attempts: at a study, before it has failed.
        retry_s: before the second attempt; doubled for each further one.
    """

    settle_s: float = 10.0
    poll_s: float = 2.0
    attempts: int = 3
    retry_s: float = 60.0


class FolderWatcher:
    """Take studies from ``incoming`` and leave results in ``results/<job>/``.

    Args:
        incoming: where studies are put; ``done``, ``failed`` and the hidden ``.working`` are made in it (a rename must
            not leave the disk).
        results: where results appear; ``watch.jsonl`` in it is the log.
        process: called with the study and an empty folder for its results.
        patience: how long to wait.
        maker: what results depend on beside the study, kept in ``results/maker.json``; None is not compared.

    Raises:
        UsageError: the two folders are the same, or one lies in the other; the results are of another maker.
    """

    def __init__(
        self,
        incoming: str | Path,
        results: str | Path,
        process: Process,
        patience: Patience | None = None,
        maker: Mapping[str, Any] | None = None,
    ) -> None:
        self.incoming, self.results = Path(incoming).resolve(), Path(results).resolve()
        if self.incoming.is_relative_to(self.results) or self.results.is_relative_to(self.incoming):
            raise UsageError(
                "watch: the folders lie in one another", "results would be taken for studies", "use two folders"
            )
        self.process, self.patience = process, patience or Patience()
        self.working, self.done, self.failed = (self.incoming / name for name in (".working", "done", "failed"))
        self._seen: dict[str, tuple[str, float]] = {}
        for folder in (self.working, self.done, self.failed, self.results):
            folder.mkdir(parents=True, exist_ok=True)
        if maker is not None:
            self._refuse_other_maker(maker)

    def run(self, once: bool = False, stop: threading.Event | None = None) -> int:
        """Watch until ``stop`` is set; return how many studies were finished (done or failed).

        Args:
            once: return when nothing is left to do or to wait for.
            stop: set by another thread or a signal handler.

        Raises:
            ResourceError: another watcher has the folder.
        """
        stop = stop or threading.Event()
        lock = FileLock(self.incoming / ".watch.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResourceError(
                "watch: the folder is watched already", "another process has its lock", "stop that one first"
            ) from None
        finished = 0
        try:
            self._sweep()
            while not stop.is_set():
                self._take_settled()
                due, waiting = self._jobs()
                for job in due:
                    if stop.is_set():
                        break
                    finished += self._attempt(job)
                if once and not waiting and not due and not any(look for look, _ in self._seen.values()):
                    break
                stop.wait(self.patience.poll_s)
        finally:
            lock.release()
        return finished

    def _refuse_other_maker(self, maker: Mapping[str, Any]) -> None:
        """A study whose result is there is not processed again: so all results must have been made the same way."""
        path = self.results / "maker.json"
        if not path.is_file():
            write_json(path, maker)
            return
        before = json.loads(path.read_text())
        for key in sorted({*before, *maker}):
            if before.get(key) != maker.get(key):
                raise UsageError(
                    f"watch: the results in this folder were made with another {key}",
                    f"{before.get(key)} before, now {maker.get(key)}",
                    "use another folder for results",
                )

    def _sweep(self) -> None:
        """Remove what a killed watcher left half-made among the results."""
        for folder in self.results.glob(".*.tmp"):
            shutil.rmtree(folder, ignore_errors=True)

    def _entries(self) -> Iterator[Path]:
        for path in sorted(self.incoming.iterdir()):
            reserved = path.name.startswith(".") or path in (self.done, self.failed)
            if not reserved and not path.name.lower().endswith(_UNFINISHED) and not path.is_symlink():
                yield path

    def _take_settled(self) -> None:
        """Take every entry that looks as it did ``settle_s`` ago."""
        now, seen = time.monotonic(), self._seen
        self._seen = {}
        for entry in self._entries():
            try:
                look = snapshot(entry)
                before, since = seen.get(entry.name, (look, now))
                since = since if before == look else now
                self._seen[entry.name] = (look, since)
                if look and now - since >= self.patience.settle_s:
                    self._take(entry, look)
            except OSError as problem:  # moved or removed by its owner while we looked
                _LOG.info("watch: an entry could not be read (%s)", type(problem).__name__)

    def _take(self, entry: Path, look: str) -> None:
        job = content_key(entry)
        if snapshot(entry) != look:
            return  # changed meanwhile: wait until it settles again
        target = self.working / job
        if target.exists():
            entry.rename(_free(self.done / job))
            self._log("again", job, note="the same study is being worked on")
            return
        entry.rename(target)
        self._seen.pop(entry.name, None)
        write_json(self._state_file(job), {"attempts": 0, "not_before": 0.0})
        self._log("taken", job)

    def _jobs(self) -> tuple[list[str], list[str]]:
        """Return the jobs whose time has come, and those that wait for another attempt."""
        jobs = sorted(path.name for path in self.working.iterdir() if not path.name.startswith("."))
        due = [job for job in jobs if self._state(job)["not_before"] <= time.time()]
        return due, [job for job in jobs if job not in due]

    def _attempt(self, job: str) -> int:
        """Process a study once; return 1 if that was the end of it."""
        state, study, result = self._state(job), self.working / job, self.results / job
        if result.is_dir():
            return self._finish(job, self.done, "again", note="its result is there already")
        if state["attempts"] >= self.patience.attempts:
            reason = ResourceError(
                "watch: given up", f"{state['attempts']} attempts", "look at the log, put it in again"
            )
            return self._fail(job, reason)
        attempts = int(state["attempts"]) + 1
        write_json(self._state_file(job), {**state, "attempts": attempts})
        making, began = self.results / f".{job}.tmp", time.monotonic()
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        try:
            self.process(study, making)
            making.rename(result)
        except (KeyboardInterrupt, SystemExit, InterruptedRun):
            write_json(self._state_file(job), state)  # asked to stop: not the study's fault
            raise
        except Exception as problem:
            return self._after(job, attempts, problem)
        finally:
            shutil.rmtree(making, ignore_errors=True)
        return self._finish(job, self.done, "done", seconds=round(time.monotonic() - began, 1), attempts=attempts)

    def _after(self, job: str, attempts: int, problem: Exception) -> int:
        reason = find_error(problem)
        passing = isinstance(reason, ResourceError) or reason is None
        if reason is None:  # its text may quote the study: the kind says enough
            reason = ResourceError(
                "watch: an unexpected error", type(problem).__name__, "run predict on the study by hand"
            )
        if passing and attempts < self.patience.attempts:
            wait = self.patience.retry_s * 2 ** (attempts - 1)
            write_json(self._state_file(job), {"attempts": attempts, "not_before": time.time() + wait})
            self._log("retry", job, attempts=attempts, wait_s=wait, what=reason.what, why=reason.why)
            return 0
        return self._fail(job, reason)

    def _fail(self, job: str, reason: FiducialError) -> int:
        write_atomically(self.failed / f"{job}.txt", f"{reason}\n".encode())
        return self._finish(job, self.failed, "failed", what=reason.what, why=reason.why, exit_code=reason.exit_code)

    def _finish(self, job: str, folder: Path, event: str, **about: Any) -> int:
        (self.working / job).rename(_free(folder / job))
        self._state_file(job).unlink(missing_ok=True)
        self._log(event, job, **about)
        return 1

    def _state_file(self, job: str) -> Path:
        return self.working / f".{job}.json"

    def _state(self, job: str) -> dict[str, Any]:
        try:
            return dict(json.loads(self._state_file(job).read_text()))
        except (OSError, ValueError):
            return {"attempts": 0, "not_before": 0.0}

    def _log(self, event: str, job: str, **about: Any) -> None:
        line = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "event": event, "job": job}
        with (self.results / "watch.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **about}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _LOG.info("watch: %s %s", event, job)


def snapshot(entry: Path) -> str:
    """Return a digest of the names, sizes and times of the files of an entry; empty where it has no file."""
    files = sorted(_files(entry))
    digest = hashlib.sha256()
    for path in files:
        status = path.stat()
        digest.update(f"{path.relative_to(entry).as_posix()}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest() if files else ""


def content_key(entry: Path) -> str:
    """Return what a study is called: a digest of its files' contents, whatever they are called, in 16 hex digits."""
    digests = sorted(file_digest(path) for path in _files(entry))
    # the ending tells a zip file from a folder when it is read
    ending = ".zip" if entry.is_file() and entry.suffix.lower() == ".zip" else ""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] + ending


def _files(entry: Path) -> list[Path]:
    """Return the files of an entry; links are not followed."""
    found = [entry] if entry.is_file() else entry.rglob("*")
    return [path for path in found if path.is_file() and not path.is_symlink()]


def _free(path: Path) -> Path:
    number, free = 1, path
    while free.exists():
        number, free = number + 1, path.with_name(f"{path.name}.{number}")
    return free
