"""A run from its first phase to its last: what starts from what, what stands still, what ends it, what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock, Timeout
from ignite.engine import Events
from monai.utils import set_determinism
from safetensors.torch import load_file
from small_runs import small_network, small_run, validation_cases, weights_of

from pipelines import tensorfile
from pipelines.training import TrainingRun, open_run, read_header
from pipelines.training import run as module
from pipelines.training.state import newest_state
from transforms.errors import BundleError

TWO_PHASES: list[dict[str, Any]] = [
    {"name": "head", "rates": {"^3": 0.1}, "max_epochs": 3},
    {"name": "all", "learning_rate": 0.01, "loss": "dice_focal"},
]
ADAMW = {"optimizer": torch.optim.AdamW}


class Killed(BaseException):
    """Nothing in the code catches it."""


class Watch:
    """Notes per phase with what weights it starts, and how many steps are trained."""

    def __init__(self) -> None:
        self.starts: list[dict[str, torch.Tensor]] = []
        self.steps = 0

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)

    def _start(self, engine: Any) -> None:
        self.starts.append({name: tensor.clone() for name, tensor in engine.network.state_dict().items()})

    def _step(self, engine: Any) -> None:
        self.steps += 1


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Leave no seeds to the tests of other files."""
    yield
    set_determinism(None)


def validated(run: TrainingRun, values: list[float]) -> TrainingRun:
    """Let the validation of epoch k give ``values[k - 1]``."""

    def give(validator: Any) -> None:
        validator.state.metrics["mean_dice"] = values[validator.state.epoch - 1]

    assert run.validator is not None
    run.validator.add_event_handler(Events.EPOCH_COMPLETED, give)
    return run


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], part: str = "") -> bool:
    names = [name for name in one if name.startswith(part)]
    assert names
    return all(torch.equal(one[name], two[name]) for name in names)


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())["outcome"]


@pytest.fixture(scope="module")
def two_phases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watch, TrainingRun]:
    folder, watch = tmp_path_factory.mktemp("runs") / "r", Watch()
    run = small_run(folder, phases=TWO_PHASES, cases=validation_cases(2), handlers=[watch], **ADAMW)
    validated(run, [0.1, 0.9, 0.3]).run()
    return folder, watch, run


def test_a_phase_starts_from_the_best_of_the_one_before_not_from_its_last(
    two_phases: tuple[Path, Watch, TrainingRun],
) -> None:
    folder, watch, _ = two_phases
    checkpoints = folder / "phases" / "0_head" / "checkpoints"
    best, last = load_file(checkpoints / "best.safetensors"), load_file(checkpoints / "last.safetensors")
    assert read_header(checkpoints / "best.safetensors")["epoch"] == 2
    assert equal(watch.starts[1], best)
    assert not equal(watch.starts[1], last, "3")


def test_the_average_starts_anew_with_the_phase(two_phases: tuple[Path, Watch, TrainingRun]) -> None:
    _, _, run = two_phases
    assert int(run.average.n_averaged) == 2 * 3  # the optimiser steps of the second phase alone


def test_what_is_frozen_does_not_move_by_a_bit(two_phases: tuple[Path, Watch, TrainingRun]) -> None:
    folder, watch, run = two_phases
    first, second = watch.starts
    for name in ("best", "last"):  # nor in the averaged weights
        saved = load_file(folder / "phases" / "0_head" / "checkpoints" / f"{name}.safetensors")
        assert equal(first, saved, "0")
        assert not equal(first, saved, "3")
    assert not equal(second, weights_of(run), "0")  # it learns in the second phase


def test_every_phase_leaves_its_outcome_log_and_header(two_phases: tuple[Path, Watch, TrainingRun]) -> None:
    folder, _, _ = two_phases
    found = outcome(folder)
    assert (found["phase"], found["epochs"], found["steps"], found["best_epoch"]) == ("all", 2, 6, 2)
    (before,) = found["phases"]
    assert (before["phase"], before["epochs"], before["best_epoch"], before["best_metric"]) == ("head", 3, 2, 0.9)
    assert [entry["epoch"] for entry in before["history"]] == [1, 2, 3]
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == ["0_head", "1_all"]
    assert {read_header(path)["phase"] for path in (folder / "checkpoints").glob("*st.safetensors")} == {"all"}
    assert all(read_header(path)["run"] == "r" for path in folder.rglob("best.safetensors"))


def test_the_network_is_never_copied(two_phases: tuple[Path, Watch, TrainingRun]) -> None:
    folder = two_phases[0].with_name("again")
    network = small_network()
    own = [id(parameter) for parameter in network.parameters()]
    run = small_run(folder, network=network, phases=TWO_PHASES, cases=validation_cases(1), **ADAMW)
    run.run()
    assert run.network is network
    assert [id(parameter) for parameter in network.parameters()] == own


def killed_between_phases(folder: Path) -> None:
    class KillAtTheEnd:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.COMPLETED, self)

        def __call__(self, engine: Any) -> None:
            raise Killed

    run = small_run(folder, phases=TWO_PHASES, cases=validation_cases(1), handlers=[KillAtTheEnd()], **ADAMW)
    with pytest.raises(Killed):
        validated(run, [0.1, 0.9, 0.3]).run()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epoch": 0}, "not the result of phase head"),
        ({"phase": "all"}, "not the result of phase head"),
        ({"phase": None}, "not the result of phase head"),
        ("flip", "damaged"),
        ("gone", "no such file"),
    ],
)
def test_a_parent_that_is_absent_untrained_or_changed_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    folder = tmp_path / "r"
    killed_between_phases(folder)
    best = folder / "phases" / "0_head" / "checkpoints" / "best.safetensors"
    if isinstance(change, dict):
        tensors, header = tensorfile.read_tensors(best)
        tensorfile.write_tensors(best, tensors, {**header, **change})
    elif change == "flip":
        content = bytearray(best.read_bytes())
        content[-5] ^= 1
        best.write_bytes(bytes(content))
    else:
        best.unlink()
    watch = Watch()
    run = small_run(folder, phases=TWO_PHASES, cases=validation_cases(1), handlers=[watch], **ADAMW)
    with pytest.raises(BundleError, match=words):
        run.run()
    assert watch.steps == 0
    assert not (folder / "record.json").exists()


def test_without_validation_a_phase_starts_from_the_last_of_the_one_before(tmp_path: Path) -> None:
    watch = Watch()
    small_run(tmp_path / "r", phases=TWO_PHASES, handlers=[watch], **ADAMW).run()
    assert equal(watch.starts[1], load_file(tmp_path / "r" / "phases" / "0_head" / "checkpoints" / "last.safetensors"))
    assert not list(tmp_path.rglob("best.safetensors"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rates": {"^7": 0.1}}, "phase all: no parameter's name matches"),
        ({"rates": {"weight": 0.1, "^3": 0.2}}, "phase all: parameter 3.weight has 2 rates"),
        ({"loss": "dice_ca"}, "dice_ca"),
        ({"warmup_epochs": 2}, "warm-up"),
    ],
)
def test_a_mistake_in_the_last_phase_shows_before_the_first_is_trained(
    tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    watch = Watch()
    run = small_run(tmp_path / "r", phases=[TWO_PHASES[0], {**TWO_PHASES[1], **wrong}], handlers=[watch], **ADAMW)
    with pytest.raises(BundleError, match=words):
        run.run()
    assert watch.steps == 0


def killed_before_the_outcome(run: TrainingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(module, "extend_record", die)
    with pytest.raises(Killed):
        run.run()
    monkeypatch.undo()


def test_a_run_that_had_stopped_early_does_not_train_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # best in epoch 1; counted from epoch 12 / 4 = 3 on, a patience of 2 ends in epoch 5
    options: dict[str, Any] = {"cases": validation_cases(1), "plan": {"max_epochs": 12, "patience": 2}}
    run = validated(small_run(tmp_path / "r", **options), [0.5] * 12)
    killed_before_the_outcome(run, monkeypatch)
    watch = Watch()
    small_run(tmp_path / "r", handlers=[watch], **options).run()
    assert watch.steps == 0
    assert outcome(tmp_path / "r")["epochs"] == 5
    assert [entry["mean_dice"] for entry in outcome(tmp_path / "r")["history"]] == [0.5] * 5


def test_a_run_killed_after_its_last_epoch_only_writes_its_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_before_the_outcome(small_run(tmp_path / "r", cases=validation_cases(1)), monkeypatch)
    best = (tmp_path / "r" / "checkpoints" / "best.safetensors").read_bytes()
    watch = Watch()
    small_run(tmp_path / "r", cases=validation_cases(1), handlers=[watch]).run()
    assert watch.steps == 0
    assert outcome(tmp_path / "r")["steps"] == 6
    assert (tmp_path / "r" / "checkpoints" / "best.safetensors").read_bytes() == best


def test_last_and_state_every_so_many_steps(tmp_path: Path) -> None:
    folder, seen = tmp_path / "r", []

    class Look:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_STARTED, self)

        def __call__(self, engine: Any) -> None:
            path = folder / "checkpoints" / "last.safetensors"
            found = newest_state(folder / "checkpoints")
            if path.exists() and found is not None:
                average = {k: v for k, v in found[1]["parts"]["average"].items() if k.startswith("module.")}
                same = all(torch.equal(v, average[f"module.{k}"]) for k, v in load_file(path).items())
                seen.append((engine.state.iteration, found[1]["iteration"], same))

    plan = {"max_epochs": 2, "steps_per_epoch": 5}
    small_run(folder, plan=plan, state_interval=2, handlers=[Look()], **ADAMW).run()
    # before step 3 those of step 2 are there, then of step 4, at the epoch's end of step 5, of 7 and of 9
    states = {3: 2, 4: 2, 5: 4, 6: 5, 7: 5, 8: 7, 9: 7, 10: 9}
    assert seen == [(step, state, True) for step, state in states.items()]


def test_a_state_that_falls_back_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_run(tmp_path / "r").run()
    newest = max((tmp_path / "r" / "checkpoints").glob("state-*"))
    newest.write_bytes(newest.read_bytes()[:-1])
    (tmp_path / "r" / "record.json").unlink()
    watch = Watch()
    with caplog.at_level(logging.WARNING):
        small_run(tmp_path / "r", handlers=[watch]).run()
    assert watch.steps == 3  # the second of its two epochs, again
    assert any(newest.name in record.getMessage() for record in caplog.records)


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    stale = [folder / part / ".x.safetensors.0.tmp" for part in ("checkpoints", "phases/0_head/checkpoints", ".")]
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    small_run(folder).run()
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("ending", ["finished", "failed"])
def test_a_run_that_has_ended_is_open_to_others(tmp_path: Path, ending: str) -> None:
    folder = open_run(tmp_path, "b", "r")
    elsewhere = FileLock(folder / ".lock")
    with pytest.raises(Timeout):
        elsewhere.acquire(timeout=0)
    if ending == "finished":
        small_run(folder).run()
    else:
        with pytest.raises(BundleError):
            small_run(folder, clip_norm=0.0).run()
    elsewhere.acquire(timeout=0)
    elsewhere.release()


def test_a_phase_without_a_step_is_refused(tmp_path: Path) -> None:
    class EndAtOnce:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.STARTED, lambda e: e.terminate())

    with pytest.raises(BundleError, match="phase train took no step"):
        small_run(tmp_path / "r", handlers=[EndAtOnce()]).run()
    assert not (tmp_path / "r" / "record.json").exists()


@pytest.mark.parametrize("changes", [{}, {"validation_interval": 3}])
def test_a_run_whose_validation_never_gave_a_number_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = small_run(tmp_path / "r", cases=validation_cases(1), **changes)
    with pytest.raises(BundleError, match="no validation was worth keeping"):
        validated(run, [float("nan")] * 2).run()
    assert not (tmp_path / "r" / "record.json").exists()
    assert (tmp_path / "r" / "checkpoints" / "last.safetensors").is_file()
