"""One run on several processes is the run of one: the same weights, figures and files, and the same answer to a kill.

The processes are real ones: ``distributed_worker.py`` is started two and three times, and joined by gloo.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_worker import PLAN
from distributed_worker import validation as validate_alone
from monai.utils import set_determinism
from safetensors.torch import load_file
from small_runs import small_run, validation_cases, weights_of
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from pipelines.manifests import Manifest
from pipelines.training import TrainingRun
from pipelines.training.distributed import (
    Place,
    first_node,
    from_every_process,
    from_main_process,
    is_main_process,
    join_processes,
    place_in,
    refuse_unjoined_processes,
    share,
)
from transforms.errors import BundleError

HERE = Path(__file__).parent
LAUNCHERS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def results_of(processes: int, folder: Path, manifest: Path) -> Path:
    """Start the workers as ``torchrun`` would; return the folder with what they found out."""
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(HERE / "distributed_worker.py"), str(folder), str(manifest)]
    workers = [
        subprocess.Popen(
            command,
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    until = time.monotonic() + 120
    while any(worker.poll() is None for worker in workers) and time.monotonic() < until:
        time.sleep(0.1)
        if any(worker.poll() for worker in workers):
            break  # the others would wait for it
    for worker in workers:
        worker.kill()
    errors = [worker.communicate()[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(errors)
    return folder


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def several(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_cohort: Manifest) -> Path:
    assert tiny_cohort.path is not None
    return results_of(request.param, tmp_path_factory.mktemp(f"of{request.param}"), tiny_cohort.path)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """The training of the scenario ``train`` in this process alone."""
    run = small_run(tmp_path_factory.mktemp("of1"), cases=validation_cases(2), plan=PLAN)
    run.run()
    set_determinism(None)
    return run


def told(folder: Path, scenario: str) -> list[dict[str, Any]]:
    """Return what every process says of a scenario, in the order of ranks."""
    return [json.loads(path.read_text()) for path in sorted((folder / scenario).glob("rank*.json"))]


def trained(folder: Path, scenario: str) -> list[dict[str, torch.Tensor]]:
    return [load_file(path) for path in sorted((folder / scenario).glob("rank*.safetensors"))]


def steps_in(board: Path) -> list[int]:
    """Return the steps of ``loss/step`` as they stand in the event files: TensorBoard itself hides doubled ones."""
    events = [event for file in sorted(board.iterdir()) for event in EventFileLoader(str(file)).Load()]
    return sorted(event.step for event in events for value in event.summary.value if value.tag == "loss/step")


def test_the_weights_are_those_of_one_process(several: Path, single: TrainingRun) -> None:
    expected = weights_of(single)
    start = small_run(several / "never").network.state_dict()
    set_determinism(None)
    assert max(float((expected[name] - start[name]).abs().max()) for name in expected) > 0.1  # it moved
    for weights in trained(several, "train"):
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_the_figures_of_every_epoch_are_those_of_one_process(several: Path, single: TrainingRun) -> None:
    expected = single.outcomes[-1]["history"]
    assert 0.5 < expected[-1]["mean_dice"] < 1  # says something about every voxel
    for result in told(several, "train"):
        for entry, alone in zip(result["outcome"]["history"], expected, strict=True):
            assert entry == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("number", [5, 1])
def test_each_case_is_validated_once_wherever_it_lies(
    several: Path, tiny_cohort: Manifest, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["", "", str(tiny_cohort.path)])
    alone = validate_alone(tmp_path)[str(number)]
    assert 0 < alone["metrics"]["mean_dice"] < 1
    results = [result[str(number)] for result in told(several, "validation")]
    assert sorted(case for result in results for case in result["cases"]) == sorted(alone["cases"])
    assert len(alone["cases"]) == number
    for result in results:
        assert result["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
        assert result["all"] == number
    if number < len(results):
        assert [] in [result["cases"] for result in results]  # a process without a case has the figures all the same


def test_only_the_main_process_writes(several: Path, single: TrainingRun) -> None:
    def names(folder: Path) -> list[str]:
        files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        return sorted(name for name in files if "events" not in name)

    assert names(several / "train" / "run") == names(single.run_dir)
    for folder in (several / "train").glob("elsewhere*"):
        assert list(folder.iterdir()) == []
    assert steps_in(several / "train" / "run" / "tensorboard") == list(range(1, 17))
    record = json.loads((several / "train" / "run" / "record.json").read_text())
    assert record["outcome"]["steps"] == 16


def test_one_process_is_asked_to_stop_and_all_save_and_go_on_bit_for_bit(several: Path) -> None:
    results = told(several, "interrupted")
    *others, asked = [result["message"] for result in results]
    assert "asked to stop (SIGTERM)" in asked
    for message in [*others, asked]:
        assert "its state is saved, in epoch 2, after 6 steps" in message
    for other in others:
        assert "asked to stop (another process)" in other
    assert all(
        result["states"] == ["state-00-000000004.safetensors", "state-00-000000006.safetensors"] for result in results
    )
    assert all(result["difference"] == 0 for result in results)
    assert steps_in(several / "interrupted" / "run" / "tensorboard") == list(range(1, 17))


def test_a_loss_that_is_not_finite_in_one_process_is_left_out_by_all(several: Path) -> None:
    results = told(several, "nan")
    assert [result["outcome"]["skipped_steps"] for result in results] == [1] * len(results)
    assert [result["moved"] for result in results] == [[False, True]] * len(results)  # steps 2 and 3
    (kept,) = (several / "nan" / "run" / "batches").iterdir()  # only where it happened
    assert kept.name == f"batch-0001-000000002-{len(results) - 1}.safetensors"
    first, *others = trained(several, "nan")
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_batch_that_cannot_be_shared_is_refused(several: Path) -> None:
    results = told(several, "uneven")
    for result in results:
        assert f"batch_size 5 on {len(results)} processes" in result["message"]
        assert f"take a multiple of {len(results)}" in result["message"]


# --- where a process stands

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"}
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9],x1",
}


def test_without_a_launcher_there_is_no_place() -> None:
    assert place_in({}) is None
    # the batch script of a SLURM job is no task of a step: training in it alone is training alone
    assert place_in({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}) is None


def test_the_place_under_torchrun() -> None:
    assert place_in(TORCHRUN) == Place(rank=3, world_size=4, local_rank=1, address="10.0.0.7", port=4711)


def test_the_place_under_srun() -> None:
    assert place_in(SRUN) == Place(rank=5, world_size=8, local_rank=1, address="gpu03", port=24567)
    assert place_in({**SRUN, "MASTER_ADDR": "login1", "MASTER_PORT": "1"}) == Place(5, 8, 1, "login1", 1)
    other_job = place_in({**SRUN, "SLURM_JOB_ID": "1234568"})
    assert other_job is not None
    assert other_job.port == 24568


def test_torchrun_inside_of_srun_counts() -> None:
    assert place_in({**SRUN, **TORCHRUN}) == place_in(TORCHRUN)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-05,9],x1", "gpu03"),
        ("node7,node9", "node7"),
        ("node7", "node7"),
        ("node[12]", "node12"),
        ("a[1,3-5],b[2-4]", "a1"),
        ("rack[01-02]n[7-9]", "rack01n7"),  # several ranges in one name
        ("gpu[03-05]-ib,x1", "gpu03-ib"),
        ("n-1.cluster.org,n-2.cluster.org", "n-1.cluster.org"),
        ("a,b[1,2]", "a"),
    ],
)
def test_the_first_node_of_a_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("started", [TORCHRUN, SRUN])
def test_processes_that_do_not_know_of_one_another_are_refused(
    no_launcher: pytest.MonkeyPatch, started: dict[str, str]
) -> None:
    refuse_unjoined_processes()
    for name, value in started.items():
        no_launcher.setenv(name, value)
    with pytest.raises(BundleError) as refusal:
        refuse_unjoined_processes()
    assert refusal.value.what.startswith(f"{4 if started is TORCHRUN else 8} processes were started")
    assert "configs/multi_gpu_train.yaml" in refusal.value.fix
    no_launcher.setenv("WORLD_SIZE" if started is TORCHRUN else "SLURM_STEP_NUM_TASKS", "1")
    refuse_unjoined_processes()


def test_joining_needs_a_launcher(no_launcher: pytest.MonkeyPatch) -> None:
    with pytest.raises(BundleError, match="neither torchrun nor srun") as refusal:
        join_processes("cpu")
    assert "torchrun --standalone" in refusal.value.fix


def test_a_meeting_point_that_is_taken_is_named(no_launcher: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name, value in alone.items():
            no_launcher.setenv(name, value)
        with pytest.raises(BundleError, match=f"process 0 of 1 cannot join the others at 127.0.0.1:{port}"):
            join_processes("cpu")


def test_a_single_process_has_everything() -> None:
    assert is_main_process()
    assert list(share([1, 2, 3])) == [1, 2, 3]
    assert from_main_process("a") == "a"
    assert from_every_process("a") == ["a"]


# --- the SLURM templates, with commands that behave as torchrun, srun and scontrol do

WORKER = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5)  # longer than the shell needs to notice
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
open(f"up.{os.getpid()}", "w").close()
time.sleep(float(os.environ["SECONDS_TO_TRAIN"]))
sys.exit(int(os.environ["EXIT_CODE"]))
"""
START_TWO = f"""#!{sys.executable}
import signal, subprocess, sys
started = [subprocess.Popen([sys.executable, "worker.py"], start_new_session=True) for _ in range(2)]
"""
FAKES = {
    "torchrun": START_TWO + "sys.exit(1 if any([each.wait() for each in started]) else 0)",  # dies of SIGUSR1
    "srun": START_TWO
    + "signal.signal(signal.SIGUSR1, lambda *_: [each.send_signal(signal.SIGUSR1) for each in started])\n"
    + "sys.exit(max(each.wait() for each in started))",
    "scontrol": "#!/bin/sh\necho scontrol $*",
}


@pytest.mark.parametrize("template", ["one_node", "several_nodes"])
@pytest.mark.parametrize(
    ("seconds", "code", "asked", "ends_with", "requeued"),
    [(60, 0, True, 75, True), (0, 0, False, 0, False), (0, 5, False, 5, False)],
)
def test_slurm_templates(
    tmp_path: Path, template: str, seconds: int, code: int, asked: bool, ends_with: int, requeued: bool
) -> None:
    bundle = tmp_path / "bundles" / "brain_lesion_mri_segmentation"
    bundle.mkdir(parents=True)
    (bundle / "worker.py").write_text(WORKER)
    commands = tmp_path / ".venv" / "bin"
    commands.mkdir(parents=True)
    (commands / "activate").write_text(f"PATH={commands}:$PATH\n")
    for name, text in FAKES.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    settings = {
        "SECONDS_TO_TRAIN": str(seconds),
        "EXIT_CODE": str(code),
        "SLURM_JOB_ID": "42",
        "SLURM_GPUS_ON_NODE": "2",
    }
    script = HERE.parents[1] / "docs" / "slurm" / f"{template}.sbatch"
    job = subprocess.Popen(
        ["bash", str(script), "cohort.json", "r"],
        cwd=tmp_path,
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 30
    while len(list(bundle.glob("up.*"))) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    if asked:
        job.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B: does
    output = job.communicate(timeout=30)[0]
    # torchrun hides the code of what fails under it
    assert job.returncode == (1 if template == "one_node" and ends_with == 5 else ends_with)
    assert ("scontrol requeue 42" in output) == requeued
