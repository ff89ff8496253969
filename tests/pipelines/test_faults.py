"""What can go wrong in the middle of a run, planted: it is named, nothing is spoilt by it, and the exit code tells."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.transforms import Compose, RandFlipd
from monai.utils import set_determinism
from small_runs import Boxes, small_run, validation_cases, weights_of
from torch import nn

from pipelines import tensorfile
from pipelines.explain import report
from pipelines.losses import supervised_loss
from pipelines.manifests import Manifest, case_items
from pipelines.training import PatchDataset, open_run, resume
from pipelines.training.datasets import ATTEMPTS
from pipelines.training.faults import explained
from pipelines.training.loaders import patch_loader
from pipelines.training.replay import replay
from pipelines.training.resume import release
from pipelines.training.state import newest_state, state_files
from transforms import ForegroundMaskd, LoadCased, ToRASd
from transforms.errors import DataError, FiducialError, ResourceError, UsageError, find_error

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def undetermined() -> Iterator[None]:
    """Leave no seeds to the tests of other files."""
    yield
    set_determinism(None)


class At:
    """Call ``action`` after the given iteration."""

    def __init__(self, iteration: int, action: Callable[[], Any]) -> None:
        self.iteration, self.action = iteration, action

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED(once=self.iteration), lambda _: self.action())


class Weights:
    """Keeps the weights before the first step and after every one."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def attach(self, engine: Any) -> None:
        for event in (Events.STARTED, Events.ITERATION_COMPLETED):
            engine.add_event_handler(event, self._keep)

    def _keep(self, engine: Any) -> None:
        self.kept.append(torch.cat([p.detach().flatten().clone() for p in engine.network.parameters()]))

    @property
    def moved(self) -> list[bool]:
        """Per step."""
        assert all(bool(torch.isfinite(weights).all()) for weights in self.kept)
        return [not torch.equal(one, two) for one, two in zip(self.kept, self.kept[1:], strict=False)]


def with_nan(*names: str) -> Boxes:
    """Samples of which those called ``names`` have one voxel that is NaN."""

    def spoil(sample: dict[str, Any]) -> None:
        if sample["case"] in names:
            sample["image"][0, 1, 2, 3] = float("nan")

    return Boxes(spoil)


def outcome(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "record.json").read_text())["outcome"]


# --- a loss or a gradient that is not finite

FOUR = {"steps_per_epoch": 4, "batch_size": 2, "max_epochs": 1}  # samples 0 and 1 are the first batch, and so on


def test_two_steps_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    watch, optimizers = Weights(), []

    def optimizer(groups: Any) -> torch.optim.Optimizer:
        optimizers.append(torch.optim.SGD(groups))
        return optimizers[-1]

    run = small_run(
        tmp_path,
        data=with_nan("epoch1_sample0", "epoch1_sample5"),
        plan=FOUR,
        handlers=[watch],
        optimizer=optimizer,
    )
    with caplog.at_level(logging.WARNING, logger="pipelines.training.faults"):
        run.run()
    assert watch.moved == [False, True, False, True]
    assert int(run.average.n_averaged) == 4  # schedule and average go on
    assert optimizers[-1].param_groups[0]["lr"] == 0.0
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("term ce, dice, loss, main_head/ce, main_head/dice of the loss is not finite at epoch 1, ")
    assert "iteration 1, cases epoch1_sample0, epoch1_sample1: this step is left out (1 of 2 allowed)" in first
    assert "iteration 3, cases epoch1_sample4, epoch1_sample5: this step is left out (2 of 2 allowed)" in second
    assert f"fiducial replay {tmp_path}/batches/batch-0001-000000003-0.safetensors" in second
    result = outcome(tmp_path)
    assert result["skipped_steps"] == 2
    assert np.isfinite(result["history"][0]["loss"])


def test_a_step_left_out_leaves_no_trace_in_running_statistics(tmp_path: Path) -> None:
    """The batch passes the network before its loss is known: statistics of NaN would spoil every later validation."""
    network = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Conv3d(4, 2, 3, padding=1))
    run = small_run(tmp_path, data=with_nan("epoch1_sample3"), plan=FOUR, network=network)
    run.run()
    for normalisation in (run.network[1], run.average.module[1]):
        assert int(normalisation.num_batches_tracked) == 3
        assert bool(torch.isfinite(normalisation.running_mean).all())
        assert bool(torch.isfinite(normalisation.running_var).all())


def test_the_mean_of_the_epoch_is_that_of_the_steps_that_were_taken(tmp_path: Path) -> None:
    losses: list[float] = []

    class Note:
        def attach(self, engine: Any) -> None:
            engine.add_event_handler(Events.ITERATION_COMPLETED, lambda e: losses.append(float(e.state.output["loss"])))

    small_run(tmp_path, data=with_nan("epoch1_sample3"), plan=FOUR, handlers=[Note()]).run()
    assert np.isnan(losses[1])
    assert outcome(tmp_path)["history"][0]["loss"] == pytest.approx(np.nanmean(losses))


def test_the_third_ends_the_run(tmp_path: Path) -> None:
    watch = Weights()
    names = [f"epoch1_sample{index}" for index in (0, 3, 5)]
    with pytest.raises(DataError) as caught:
        small_run(tmp_path, data=with_nan(*names), plan=FOUR, handlers=[watch]).run()
    error = caught.value
    assert error.exit_code == 3
    assert "not finite at epoch 1, iteration 3, cases epoch1_sample4, epoch1_sample5, for the third time" in error.what
    assert "loss nan" in error.why
    assert f"fiducial replay {tmp_path}/batches/batch-0001-000000003-0.safetensors" in error.fix
    assert watch.moved == [False, False]
    assert not (tmp_path / "record.json").exists()
    assert len(list((tmp_path / "batches").iterdir())) == 3


REPLAYED = """
imports: ["$from small_runs import small_network"]
network_def: "$small_network()"
loss: {_target_: pipelines.losses.supervised_loss, _mode_: callable}
plan: "$__import__('pipelines.training').training.plan_phases([], 0.5, loss='dice_ce', max_epochs=1, \
steps_per_epoch=4, batch_size=2)"
"""


def test_the_batch_is_kept_and_can_be_replayed(tmp_path: Path) -> None:
    watch = Weights()
    (tmp_path / "config.yaml").write_text(REPLAYED)
    small_run(tmp_path, data=with_nan("epoch1_sample3"), plan=FOUR, handlers=[watch]).run()
    (path,) = (tmp_path / "batches").iterdir()
    tensors, header = tensorfile.read_tensors(path)
    data = Boxes()
    data.set_epoch(1)
    assert torch.equal(tensors["batch/label"][1], data[3]["label"])
    assert bool(torch.isnan(tensors["batch/image"][1, 0, 1, 2, 3]))
    assert header["cases"] == ["epoch1_sample2", "epoch1_sample3"]
    assert (header["epoch"], header["iteration"], header["phase"], header["run"]) == (1, 2, "train", tmp_path.name)
    kept = torch.cat([tensors[f"network/{name}"].flatten() for name in ("0.weight", "0.bias", "3.weight", "3.bias")])
    assert torch.equal(kept, watch.kept[1])  # as they were before the step
    verdict = replay(path).verdict
    assert verdict == "the data are at fault: image of case epoch1_sample3, channel 0 has 1 values not finite"


def test_the_count_survives_a_resumption(tmp_path: Path) -> None:
    class Killed(BaseException):
        """Nothing in the code catches it."""

    def kill() -> None:
        raise Killed

    names = ("epoch1_sample0", "epoch1_sample3", "epoch2_sample4")
    plan = {**FOUR, "max_epochs": 2}
    with pytest.raises(Killed):
        small_run(tmp_path, data=with_nan(*names), plan=plan, handlers=[At(5, kill)]).run()
    with pytest.raises(DataError, match=r"epoch 2, iteration 7, cases epoch2_sample4, .* for the third time"):
        small_run(tmp_path, data=with_nan(*names), plan=plan).run()


class Exploding(nn.Module):
    """The loss of the bundle, whose gradient is infinite at the given call."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.loss, self.left = supervised_loss("dice_ce"), call

    @property
    def last_terms(self) -> dict[str, torch.Tensor]:
        return self.loss.last_terms

    def forward(self, outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left == 0:
            outputs.register_hook(lambda gradient: gradient * float("inf"))
        return self.loss(outputs, target)


@pytest.mark.parametrize("clip_norm", [12.0, float("inf")])
def test_an_infinite_gradient_of_a_finite_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, clip_norm: float
) -> None:
    watch = Weights()
    small_run(tmp_path, loss=lambda name: Exploding(2), plan=FOUR, handlers=[watch], clip_norm=clip_norm).run()
    assert watch.moved == [True, False, True, True]
    message = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING][-1]
    assert message.startswith("the gradient's norm is not finite at epoch 1, iteration 2, cases epoch1_sample2")
    assert outcome(tmp_path)["skipped_steps"] == 1


@pytest.mark.parametrize(
    ("bad", "moved"),
    [
        # two batches make an optimiser step: (0 1)(2 3) and (4 5)(6 7)
        ("epoch1_sample2", [False, False, False, True]),  # the step is given up with its last batch
        ("epoch1_sample4", [False, True, False, True]),  # what comes after the bad batch still counts
    ],
)
def test_with_accumulation(tmp_path: Path, bad: str, moved: list[bool]) -> None:
    watch = Weights()
    small_run(tmp_path, data=with_nan(bad), plan={**FOUR, "accumulation_steps": 2}, handlers=[watch]).run()
    assert watch.moved == moved


# --- a case that is bad on disk


def patches(cohort: Manifest, cache: Path, **changes: Any) -> PatchDataset:
    chain = Compose(
        [LoadCased(modalities=("flair", "t1")), ToRASd(["image", "label", "mask"]), ForegroundMaskd("image")]
    )
    random = Compose([RandFlipd(["image", "label"], prob=0.5)])
    return PatchDataset(case_items(cohort, "train"), chain, random, str(cache), [1], [8, 8, 8], 0.5, **changes)


def network() -> nn.Module:
    return nn.Conv3d(2, 2, 3, padding=1)


ONES = {"steps_per_epoch": 8, "batch_size": 1, "max_epochs": 2, "rates": {".*": 1e-4}}


def image_of(data: PatchDataset, name: str) -> Path:
    (case,) = [case for case in data.cases if case.values["case"] == name]
    return case.folder / "image.npy"


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def test_nan_in_the_data_of_a_case_names_the_case(tmp_path: Path, tiny_cohort: Manifest) -> None:
    data = patches(tiny_cohort, tmp_path / "cache")
    image = np.load(image_of(data, "s1"), mmap_mode="r+")
    image[1] = np.nan
    image.flush()
    with pytest.raises(DataError, match="cases s1, for the third time in this run"):
        small_run(tmp_path / "run", network=network(), data=data, plan=ONES).run()
    kept = sorted((tmp_path / "run" / "batches").iterdir())
    assert [tensorfile.read_header(path)["cases"] for path in kept] == [["s1"]] * 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_case_that_breaks_in_the_middle_of_an_epoch_ends_the_run(
    tmp_path: Path, tiny_cohort: Manifest, workers: int
) -> None:
    data = patches(tiny_cohort, tmp_path / "cache")
    watch = Weights()
    handlers = [watch, At(2, lambda: truncate(image_of(data, "s1")))]
    with pytest.raises((DataError, RuntimeError)) as caught:
        small_run(tmp_path / "run", network=network(), data=data, plan=ONES, workers=workers, handlers=handlers).run()
    error = find_error(caught.value)
    assert isinstance(error, DataError)
    assert error.what == "case s1: no patch can be made of it"
    assert "on_bad_case" in error.fix
    assert len(watch.kept) > 2


def test_a_case_that_breaks_is_skipped_and_counted(
    tmp_path: Path, tiny_cohort: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    counts = []
    for workers in (0, 2):
        data = patches(tiny_cohort, tmp_path / f"cache{workers}", on_bad_case="skip")
        drawn = []
        for epoch in (1, 2):
            data.set_epoch(epoch)
            drawn += [data[index]["case"] for index in range(8)]
        truncate(image_of(data, "s1"))
        folder = tmp_path / f"run{workers}"
        caplog.clear()
        small_run(folder, network=network(), data=data, plan=ONES, workers=workers).run()
        result = outcome(folder)
        assert result["steps"] == 16  # every step had its patch
        assert set(result["bad_cases"]) == {"s1"}
        assert result["bad_cases"]["s1"] >= drawn.count("s1") > 0  # in its place it may be drawn again
        counts.append(result["bad_cases"]["s1"])
        said = [r.getMessage() for r in caplog.records if "is skipped and counted" in r.getMessage()]
        assert len(said) == 1  # once, not at every patch
        assert said[0].startswith("case s1 is skipped and counted: ValueError")
    assert counts[0] == counts[1]


def test_the_count_of_bad_cases_survives_a_resumption(tmp_path: Path, tiny_cohort: Manifest) -> None:
    data = patches(tiny_cohort, tmp_path / "cache", on_bad_case="skip")
    truncate(image_of(data, "s1"))
    small_run(tmp_path / "whole", network=network(), data=data, plan=ONES).run()
    handlers = [At(11, lambda: 1 / 0)]
    with pytest.raises(ZeroDivisionError):
        small_run(tmp_path / "cut", network=network(), data=data, plan=ONES, handlers=handlers, state_interval=2).run()
    small_run(tmp_path / "cut", network=network(), data=data, plan=ONES).run()
    assert outcome(tmp_path / "cut")["bad_cases"] == outcome(tmp_path / "whole")["bad_cases"]


def test_nobody_goes_on_without_any_case(
    tmp_path: Path, tiny_cohort: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = patches(tiny_cohort, tmp_path / "cache", on_bad_case="skip")
    for name in ("s0", "s1", "s2"):
        truncate(image_of(data, name))
    tries = []
    real = PatchDataset._sample
    monkeypatch.setattr(PatchDataset, "_sample", lambda *given: (tries.append(1), real(*given))[1])
    with pytest.raises(DataError, match=r"case s\d: no patch can be made of it") as caught:
        data[0]
    assert len(tries) == ATTEMPTS + 1
    assert caught.value.exit_code == 3


def test_the_cache_is_mended_when_a_run_starts(
    tmp_path: Path, tiny_cohort: Manifest, caplog: pytest.LogCaptureFixture
) -> None:
    data = patches(tiny_cohort, tmp_path / "cache")
    before = image_of(data, "s1").read_bytes()
    truncate(image_of(data, "s1"))
    again = patches(tiny_cohort, tmp_path / "cache")
    assert image_of(again, "s1").read_bytes() == before
    assert "case s1 is made again, image.npy has" in caplog.text


# --- memory and workers


def test_memory_that_a_gpu_does_not_have(tmp_path: Path) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    with pytest.raises(ResourceError) as caught:
        small_run(tmp_path, handlers=[At(2, full)], sizes={"patch_size": [96, 96, 96]}).run()
    error = caught.value
    assert error.exit_code == 5
    assert error.what == "out of memory with batch_size 2, patch_size [96, 96, 96]"
    assert error.why == "CUDA out of memory. Tried to allocate 2.00 GiB."
    assert error.fix.startswith("take a smaller batch_size, then a smaller patch_size")


def test_memory_that_this_machine_does_not_have(tmp_path: Path) -> None:
    def ask_for_too_much() -> None:
        torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(ResourceError, match="out of memory with batch_size 2") as caught:
        small_run(tmp_path, handlers=[At(1, ask_for_too_much)]).run()
    assert str(2**60) in caught.value.why
    with pytest.raises(ResourceError, match="out of memory with patch 8"), explained({"patch": 8}, "less"):
        np.empty(2**60, dtype=np.uint8)  # MemoryError


def test_other_errors_are_left_alone() -> None:
    refusal, missing = DataError("what", "why", "fix"), FileNotFoundError(errno.ENOENT, "no such file")
    for problem in (RuntimeError("size mismatch"), ValueError("out of memory"), missing, refusal):
        with pytest.raises(type(problem)) as caught, explained({}, ""):
            raise problem
        assert caught.value is problem
    with pytest.raises(RuntimeError) as wrapped, explained({}, ""):
        raise RuntimeError("out of memory") from DataError("what", "why", "fix")
    assert isinstance(find_error(wrapped.value), DataError)  # what stands at its root is what the user gets to see


def test_a_worker_that_is_killed(tmp_path: Path) -> None:
    here = os.getpid()

    def die(sample: dict[str, Any]) -> None:
        if sample["case"] == "epoch1_sample4" and os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ResourceError, match="a worker process that prepares patches died") as caught:
        small_run(tmp_path, data=Boxes(die), workers=2).run()
    assert caught.value.exit_code == 5
    assert "--workers" in caught.value.fix


# --- the disk


def in_a_process(work: Callable[[], Any]) -> int:
    """Run ``work`` in a fork of this process; return the exit code that a user would see."""

    def end_with_its_code() -> None:
        try:
            work()
        except Exception as problem:
            os._exit(report(problem))

    process = FORK.Process(target=end_with_its_code)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def forbid_files_larger_than(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize("file", ["checkpoints/state-00-000000003.safetensors", "tensorboard/events"])
def test_a_disk_that_is_full_in_the_middle_of_a_run(tmp_path: Path, file: str) -> None:
    plan = {"steps_per_epoch": 3, "max_epochs": 3}

    def fill() -> None:
        (written,) = tmp_path.glob(f"{file}*")
        forbid_files_larger_than(written.stat().st_size - (10 if "state" in file else 0))

    code = in_a_process(lambda: small_run(tmp_path, plan=plan, dropout=0.5, handlers=[At(5, fill)]).run())
    assert code == 5
    found = newest_state(tmp_path / "checkpoints")
    assert found is not None
    assert found[1]["iteration"] == 3
    assert not list(tmp_path.rglob(".*.tmp"))
    for path in (tmp_path / "checkpoints").glob("*.safetensors"):
        tensorfile.read_tensors(path)
    # with space again, it goes on as if nothing had happened
    resumed, whole = (small_run(folder, plan=plan, dropout=0.5) for folder in (tmp_path, tmp_path / "whole"))
    for run in (resumed, whole):
        set_determinism(0)
        run.run()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed).values(), weights_of(whole).values(), strict=True))


@pytest.mark.parametrize("part", ["checkpoints", "tensorboard"])
def test_a_folder_that_cannot_be_written(tmp_path: Path, part: str) -> None:
    # also root cannot make a folder where a file stands
    (tmp_path / part).write_text("in the way")
    with pytest.raises(ResourceError) as caught:
        small_run(tmp_path).run()
    assert str(tmp_path / part) in str(caught.value)
    assert caught.value.exit_code == 5


def test_a_read_only_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run(tmp_path, plan={"max_epochs": 1}).run()
    before = {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()}
    real = Path.open

    def refuse(path: Path, mode: str = "r", *given: Any, **more: Any) -> Any:
        if "w" in mode and tmp_path in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, mode, *given, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match="cannot be written") as caught:
        small_run(tmp_path, plan={"max_epochs": 2}).run()
    assert "Read-only file system" in caught.value.why
    assert {path: path.read_bytes() for path in (tmp_path / "checkpoints").iterdir()} == before


def test_runs_dir_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(ResourceError, match=r"run .* cannot be made"):
        open_run(tmp_path / "runs", "bundle", "r")


def test_two_processes_never_train_in_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "WORKERS_END_S", 0.5)  # each refusal below waits for that long
    inside, leave = FORK.Event(), FORK.Event()

    def train() -> None:
        open_run(tmp_path, "bundle", "r")
        assert len(list(patch_loader(Boxes(), 2, 1, workers=2))) == 2  # which come and go, and must not let others in
        inside.set()
        leave.wait(60)

    first = FORK.Process(target=train)
    first.start()
    assert inside.wait(60)
    with pytest.raises(UsageError, match="exists already") as caught:
        open_run(tmp_path, "bundle", "r")
    assert caught.value.exit_code == 2
    for again in (True, "auto"):
        with pytest.raises(UsageError, match="is being trained by another process") as caught:
            open_run(tmp_path, "bundle", "r", resume=again)
        assert caught.value.exit_code == 2
    leave.set()
    first.join(60)
    assert first.exitcode == 0
    folder = open_run(tmp_path, "bundle", "r", resume=True)  # its lock has gone with it
    release(folder)


def test_of_two_that_start_at_once_one_trains(tmp_path: Path) -> None:
    gate = FORK.Barrier(2)

    def start() -> None:
        gate.wait()
        try:
            open_run(tmp_path, "bundle", "r")
        except FiducialError as problem:
            os._exit(problem.exit_code)

    processes = [FORK.Process(target=start) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert sorted(process.exitcode or 0 for process in processes) == [0, 2]


def test_a_state_cut_by_one_byte(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = {"steps_per_epoch": 3, "max_epochs": 4}
    whole = small_run(tmp_path / "whole", plan=plan, dropout=0.5, cases=validation_cases(1))
    whole.run()
    handlers = [At(8, lambda: 1 / 0)]
    with pytest.raises(ZeroDivisionError):
        small_run(tmp_path / "cut", plan=plan, dropout=0.5, cases=validation_cases(1), handlers=handlers).run()
    newest, before = state_files(tmp_path / "cut" / "checkpoints")
    os.truncate(newest, newest.stat().st_size - 1)
    resumed = small_run(tmp_path / "cut", plan=plan, dropout=0.5, cases=validation_cases(1))
    with caplog.at_level(logging.INFO):
        resumed.run()
    assert f"{newest}: unreadable" in caplog.text
    assert "falling back to the state before it" in caplog.text
    assert "resuming cut after 3 steps" in caplog.text
    assert before.name == "state-00-000000003.safetensors"
    assert all(torch.equal(a, b) for a, b in zip(weights_of(resumed).values(), weights_of(whole).values(), strict=True))
