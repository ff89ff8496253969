"""A whole run, killed and resumed: what comes out is, bit for bit, what an undisturbed run gives.

Killed means here: an exception that nobody catches, at a random one of all moments of a run (every event of training
and validation, every write to the disk). The slow test at the end does it with processes and ``kill -9``.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.engines.utils import IterationEvents
from monai.utils import set_determinism
from small_runs import small_run, validation_cases
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

from pipelines.training import TrainingRun
from pipelines.training.state import newest_state, split_tensors, state_files

EVENTS = [*Events.__members__.values(), *IterationEvents.__members__.values()]
MOMENTS = [event for event in EVENTS if event not in (Events.EXCEPTION_RAISED, Events.TERMINATE)]
ADAMW = {"optimizer": torch.optim.AdamW}
PLAN = {"rates": {".*": 0.02}, "max_epochs": 3, "steps_per_epoch": 5, "batch_size": 2}
# the first phase trains the last convolution alone, the second everything; each setting is a run of its own kind
SETTINGS: dict[str, dict[str, Any]] = {
    "one phase": {"plan": {**PLAN, "warmup_epochs": 1}, **ADAMW},
    "accumulation": {"plan": {**PLAN, "accumulation_steps": 2}, "state_interval": 1, **ADAMW},
    "two phases": {
        "plan": {**PLAN, "max_epochs": 2},
        "phases": [{"name": "head", "rates": {"^3": 0.02}}, {"name": "all", "loss": "dice_focal"}],
        "state_interval": 3,
        **ADAMW,
    },
    "no validation": {"plan": {**PLAN, "max_epochs": 2}, "cases": [], **ADAMW},
    "workers": {"plan": {**PLAN, "max_epochs": 2}, "state_interval": 2, "workers": 2, **ADAMW},
}


class Killed(BaseException):
    """Nothing in the code catches it."""


class Moments:
    """Counts the moments of one life of a run, and ends it at the ``fatal`` one."""

    def __init__(self, fatal: int = 0) -> None:
        self.fatal, self.count, self.seen = fatal, 0, Counter[str]()

    def attach(self, engine: Any) -> None:
        for event in MOMENTS:
            engine.add_event_handler(event, self.__call__, event.name)

    def __call__(self, *arguments: Any) -> None:
        self.count += 1
        self.seen[str(arguments[-1])] += 1
        if self.count == self.fatal:
            raise Killed


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Leave no seeds to the tests of other files."""
    yield
    set_determinism(None)


def build(folder: Path, moments: Moments | None = None, **changes: Any) -> TrainingRun:
    """Return a run with dropout (a witness for random states), average, and two validation cases."""
    options = {"dropout": 0.5, "cases": validation_cases(2), "handlers": [moments] if moments else [], **changes}
    run = small_run(folder, **options)
    if moments is not None and run.validator is not None:
        moments.attach(run.validator)
    return run


def live(folder: Path, moments: Moments, **changes: Any) -> bool:
    """Train in ``folder`` until the end or the fatal moment; return whether the end was reached."""
    run = build(folder, moments, **changes)
    if state_files(folder / "checkpoints"):  # else the run starts from its seed
        torch.manual_seed(77)
        np.random.seed(77)
        random.seed(77)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", moments)
        try:
            run.run()
        except Killed:
            return False
    return True


@dataclass
class Outcome:
    """All that a run leaves, as values that can be compared."""

    weights: dict[str, bytes]
    record: dict[str, Any]
    events: list[tuple[str, str, int, bytes]]
    values: Any
    tensors: dict[str, torch.Tensor]


def events_of(folder: Path) -> list[tuple[str, str, int, bytes]]:
    """Return (log, tag, step, value) of everything that stands in any file of TensorBoard, sorted."""
    found = []
    for path in folder.rglob("events*"):
        for event in LegacyEventFileLoader(str(path)).Load():
            for v in event.summary.value:
                value = b"" if v.tag == "final/minutes" else v.SerializeToString()
                found.append((path.parent.name, v.tag, event.step, value))
    return sorted(found)


def outcome_of(folder: Path) -> Outcome:
    record = json.loads((folder / "record.json").read_text())["outcome"]
    for each in (record, *record.get("phases", [])):
        each.pop("minutes", None)
    found = newest_state(folder / "checkpoints")
    assert found is not None
    tree = dict(found[1])
    del tree["minutes"]
    del tree["parts"]["board"]  # names and sizes of files; their content is compared
    values, tensors = split_tensors(tree)  # with the random generators, and so what would be drawn next
    files = [*folder.rglob("last.safetensors"), *folder.rglob("best.safetensors")]
    weights = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return Outcome(weights, record, events_of(folder / "tensorboard"), values, tensors)


def assert_same(one: Outcome, two: Outcome) -> None:
    assert set(one.weights) == set(two.weights)
    assert [name for name in one.weights if one.weights[name] != two.weights[name]] == []
    assert one.record == two.record
    places = Counter((log, tag, step) for log, tag, step, _ in two.events)
    assert [place for place, number in places.items() if number > 1] == []  # nothing twice
    assert one.events == two.events  # nothing missing, nothing else
    assert one.values == two.values
    assert set(one.tensors) == set(two.tensors)
    assert [name for name in one.tensors if not torch.equal(one.tensors[name], two.tensors[name])] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Outcome, int]]:
    """Return what the run of a setting gives when nothing happens, and how many moments it has; each made once."""
    known: dict[str, tuple[Outcome, int]] = {}

    def get(name: str) -> tuple[Outcome, int]:
        if name not in known:
            moments = Moments()
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert live(folder, moments, **SETTINGS[name])
            known[name] = outcome_of(folder), moments.count
        return known[name]

    return get


POINTS = [("one phase", 8), ("accumulation", 8), ("two phases", 10), ("no validation", 2), ("workers", 4)]


@pytest.mark.parametrize(("setting", "seed"), [(name, seed) for name, number in POINTS for seed in range(number)])
def test_killed_at_random_moments_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, undisturbed: Callable[[str], tuple[Outcome, int]], setting: str, seed: int
) -> None:
    expected, number = undisturbed(setting)
    draw = np.random.default_rng([seed, len(setting)])
    for life in range(1, int(draw.integers(2, 4))):  # killed once or twice; the second life may reach the end
        if live(tmp_path / "run", Moments(int(draw.integers(1, number + 1)) // life), **SETTINGS[setting]):
            break
    else:
        assert not (tmp_path / "run" / "record.json").exists()
        assert live(tmp_path / "run", Moments(), **SETTINGS[setting])
    assert_same(expected, outcome_of(tmp_path / "run"))


@pytest.mark.slow
def test_two_hundred_kills_never_cost_more_than_a_moment(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed_run.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path), "200"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kills"] == 200
    assert report["problems"] == []
    assert report["while_writing"] >= 5  # the kills came where it matters: a half-written file lay beside
    expected = outcome_of(tmp_path / "undisturbed" / "run")
    for number in range(report["runs"]):
        assert_same(expected, outcome_of(tmp_path / str(number) / "run"))
