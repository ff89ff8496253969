"""Being asked to stop is noted, and only while a run listens; everything is as before afterwards."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from small_runs import Boxes, small_run

from pipelines.training.signals import ASK_TO_STOP, heed_the_parent_alone, stop_signals
from pipelines.training.state import newest_state
from transforms.errors import FiducialError


def handlers() -> list[object]:
    return [signal.getsignal(getattr(signal, name)) for name in ASK_TO_STOP]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_is_noted_by_name(name: str) -> None:
    with stop_signals() as asked:
        assert asked.name is None
        os.kill(os.getpid(), getattr(signal, name))
        assert asked.name == name


def test_the_handlers_of_before_come_back() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        mine = handlers()
        with stop_signals() as asked:
            assert not set(handlers()) & set(mine)
        assert handlers() == mine
        os.kill(os.getpid(), signal.SIGTERM)
        assert (heard, asked.name) == ([signal.SIGTERM], None)
        with pytest.raises(KeyboardInterrupt), stop_signals():
            raise KeyboardInterrupt
        assert handlers() == mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_interruption_by_keyboard_is_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_signals():
        assert signal.getsignal(signal.SIGINT) is before


def test_in_a_thread_nothing_changes() -> None:
    before, during = handlers(), []

    def work() -> None:
        with stop_signals() as asked:  # Python refuses a handler here: it must not come to that
            during.append((handlers() == before, asked.name))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert during == [(True, None)]


def test_a_process_that_prepares_samples_heeds_its_parent_alone() -> None:
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()

    def work() -> None:
        heed_the_parent_alone()
        ready.set()
        time.sleep(60)

    process = fork.Process(target=work)
    process.start()
    assert ready.wait(30)
    for name in ASK_TO_STOP:
        subprocess.run(["kill", f"-{name.removeprefix('SIG')}", str(process.pid)], check=True)
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join(30)
    assert process.exitcode == 0


def train_slowly(folder: Path, workers: int) -> None:
    """Train in a group of processes of its own, which ``under_way`` tells of; end with the error's exit code."""

    class Slow(Boxes):
        def __getitem__(self, index: int) -> dict[str, Any]:
            time.sleep(0.05)
            if index == 4:
                (folder / "under_way").touch()
            return super().__getitem__(index)

    os.setsid()
    try:
        small_run(folder, data=Slow(), plan={"steps_per_epoch": 500, "max_epochs": 1}, workers=workers).run()
    except FiducialError as problem:
        os._exit(problem.exit_code)


@pytest.mark.parametrize(("workers", "name"), [(0, "SIGTERM"), (2, "SIGTERM"), (2, "SIGUSR1")])
def test_a_signal_to_all_processes_of_a_run_saves_and_ends_it(tmp_path: Path, workers: int, name: str) -> None:
    # torchrun and SLURM signal a whole group of processes: also those that prepare patches
    run = multiprocessing.get_context("fork").Process(target=train_slowly, args=(tmp_path, workers))
    run.start()
    until = time.monotonic() + 30
    while not (tmp_path / "under_way").exists() and time.monotonic() < until:
        time.sleep(0.02)
    assert run.pid is not None
    os.killpg(run.pid, getattr(signal, name))
    run.join(30)
    assert run.exitcode == 75
    found = newest_state(tmp_path / "checkpoints")
    assert found is not None
    assert 0 < found[1]["iteration"] < 500
    with contextlib.suppress(ProcessLookupError):
        for _ in range(100):  # the workers go with it
            os.killpg(run.pid, 0)
            time.sleep(0.1)
        pytest.fail("a worker has outlived its run")
