"""Kill a training run with ``kill -9`` again and again, and look at its folder every time.

Arguments: folder, number of kills. Each life is a fork of this process, which has everything imported and never trains
itself. Runs go to ``<folder>/<number>/run`` until they are finished, one that nobody kills to ``undisturbed/run``.
Prints a report as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from small_runs import small_run, validation_cases

from pipelines import tensorfile
from pipelines.training.state import newest_state, state_files
from transforms.errors import BundleError

PLAN = {"rates": {".*": 0.02}, "max_epochs": 20, "steps_per_epoch": 2, "batch_size": 1}


def live(folder: Path) -> int:
    """Start a process that trains in ``folder``; return its number."""
    child = os.fork()
    if child:
        return child
    try:
        small_run(
            folder,
            dropout=0.5,
            cases=validation_cases(1),
            plan=PLAN,
            state_interval=1,
            optimizer=torch.optim.AdamW,
        ).run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait_for_writes(child: int, folder: Path, number: int) -> None:
    """Wait until ``folder`` has changed so often, or the process has ended."""
    before = last_change(folder)
    while number and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        now = last_change(folder)
        number -= now != before
        before = now
        time.sleep(0.002)


def last_change(folder: Path) -> int:
    return folder.stat().st_mtime_ns if folder.exists() else 0


def problems_of(folder: Path, steps_before: int) -> tuple[list[str], int]:
    """Return what is wrong with the folder of a run that was just killed, and the steps that it has done."""
    problems = []
    last = folder / "checkpoints" / "last.safetensors"
    for path in [*([last] if last.exists() or steps_before else []), *state_files(folder / "checkpoints")]:
        try:
            tensorfile.read_tensors(path)
        except BundleError as damage:
            problems.append(str(damage))
    found = newest_state(folder / "checkpoints")
    steps = 0 if found is None else int(found[1]["iteration"])
    if steps < steps_before:
        problems.append(f"{steps} steps are left of {steps_before}")
    if steps > 1 and len(state_files(folder / "checkpoints")) < 2:
        problems.append("a single state")
    return problems, steps


def main(folder: Path, kills: int) -> None:
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))]).step()  # what is imported here is not in every life
    draw = random.Random(0)
    report = {"kills": 0, "runs": 0, "while_writing": 0}
    problems: list[str] = []
    steps = 0
    while report["kills"] < kills:
        run = folder / str(report["runs"]) / "run"
        child = live(run)
        wait_for_writes(child, run / "checkpoints", draw.randrange(12))  # none: it may die before it does anything
        time.sleep(draw.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        report["while_writing"] += bool(list(run.rglob(".*.tmp")))
        found, steps = problems_of(run, steps)
        problems += found
        if os.WIFSIGNALED(status):
            report["kills"] += 1
        elif os.WEXITSTATUS(status):
            sys.exit("a life ended with an error")
        else:
            report["runs"] += 1
            steps = 0
    for run in (folder / str(report["runs"]) / "run", folder / "undisturbed" / "run"):
        if os.waitstatus_to_exitcode(os.waitpid(live(run), 0)[1]):
            sys.exit("the last life ended with an error")
    print(json.dumps({**report, "runs": report["runs"] + 1, "problems": problems}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
