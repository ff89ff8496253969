"""The bundle under ``torchrun`` as users start it: to its end, interrupted and resumed, refused where it must be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from bundle_runs import BUNDLE, QUICK, monai_bundle

from pipelines.training import open_run
from pipelines.training.resume import release

pytestmark = pytest.mark.slow

SEVERAL = "['configs/train.yaml','configs/multi_gpu_train.yaml']"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "monai.bundle"]
LENGTH = ["--max_epochs", "4", "--steps_per_epoch", "16", "--workers", "1"]
Ask = Callable[[subprocess.Popen[str]], None]


def arguments(data: Path, name: str) -> list[str]:
    where = ["--runs_dir", str(data.parent / "runs"), "--cache_dir", str(data.parent / "cache"), "--run_name", name]
    return ["--manifest", str(data / "manifest.json"), *where, *QUICK, *LENGTH]


def run_of(data: Path, name: str) -> Path:
    return data.parent / "runs" / BUNDLE.name / name


def started(config: str, *words: str) -> subprocess.Popen[str]:
    command = [*TORCHRUN, "run", "--config_file", config, *words]
    return subprocess.Popen(command, cwd=BUNDLE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def ended(config: str, *words: str) -> tuple[int, str]:
    """Run to the end; return exit code and messages."""
    process = started(config, *words)
    messages = process.communicate(timeout=300)[1]
    return process.returncode, messages


def ask_torchrun(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)


def ask_its_workers(process: subprocess.Popen[str]) -> None:
    subprocess.run(["pkill", "-USR1", "-P", str(process.pid)], check=True)


def interrupted(ask: Ask, run: Path, *words: str) -> str:
    """Start, ask to stop when an epoch more is saved, wait for the end; return the messages."""
    process = started(SEVERAL, *words)
    before, until = newest(run), time.monotonic() + 200
    while newest(run) == before:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)
    ask(process)
    messages = process.communicate(timeout=100)[1]
    assert process.returncode != 0
    return messages


def newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/state-*")), default="")


def weights(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("checkpoints/[bl]*st.safetensors")}


def test_to_its_end_and_interrupted_and_resumed(data: Path) -> None:
    code, messages = ended(SEVERAL, *arguments(data, "whole"))
    assert code == 0, messages
    whole = run_of(data, "whole")
    outcome = json.loads((whole / "record.json").read_text())["outcome"]
    assert (outcome["epochs"], outcome["steps"]) == (4, 64)
    assert json.loads((whole / "record.json").read_text())["machine"]["processes"] == 2
    alone = monai_bundle("configs/train.yaml", *arguments(data, "alone"))
    assert alone.returncode == 0, alone.stderr
    expected = json.loads((run_of(data, "alone") / "record.json").read_text())["outcome"]["history"]
    for entry, one in zip(outcome["history"], expected, strict=True):
        assert entry["loss"] == pytest.approx(one["loss"], abs=1e-2)  # AdamW makes more of a last bit than SGD
        counts = {key: value for key, value in one.items() if key.startswith("n_")}
        assert {key: entry[key] for key in counts} == counts  # the validation case counts once

    cut = run_of(data, "cut")
    states = []
    for ask, resume in ((ask_its_workers, []), (ask_torchrun, ["--resume", "True"])):
        messages = interrupted(ask, cut, *arguments(data, "cut"), *resume)
        assert "error: run cut: asked to stop (SIG" in messages
        assert "error: a worker process" not in messages
        states.append(int(newest(cut)[-21:-12]))
        assert "outcome" not in json.loads((cut / "record.json").read_text())
    assert states[0] < states[1] < 64
    code, messages = ended(SEVERAL, *arguments(data, "cut"), "--resume", "True")
    assert code == 0, messages
    assert set(weights(cut)) == {"best.safetensors", "last.safetensors"}
    for name, content in weights(whole).items():
        assert tensors(content) == tensors(weights(cut)[name])


def tensors(content: bytes) -> bytes:
    """Return what comes after the header of a safetensors file, which names the run."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_without_the_configuration_for_several_processes_it_is_refused(data: Path) -> None:
    code, messages = ended("configs/train.yaml", *arguments(data, "r"))
    assert code != 0
    assert "exitcode  : 4" in messages
    assert not run_of(data, "r").exists()
    alone = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml", *arguments(data, "r")],
        cwd=BUNDLE,
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert alone.returncode == 4
    what, why, fix = alone.stderr.splitlines()[-3:]
    for line in (what, why, fix):
        assert line in messages
    assert what == "error: 2 processes were started for a configuration of one"
    assert "'configs/multi_gpu_train.yaml'" in fix


def test_a_second_process_in_a_run_is_refused(data: Path) -> None:
    folder = open_run(data.parent / "runs", BUNDLE.name, "r")
    try:
        done = monai_bundle("configs/train.yaml", *arguments(data, "r"), "--resume", "True")
    finally:
        release(folder)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-3] == f"error: run {folder} is being trained by another process"
