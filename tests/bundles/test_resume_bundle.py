"""The bundle, interrupted and resumed as on a cluster: real processes, real signals, MONAI's own command and ours."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bundle_runs import BUNDLE, QUICK, monai_bundle, train

from pipelines.cli import main

# some seconds of training, with dropout of samples and every augmentation; states in the middle of epochs as well
LENGTH = ["--max_epochs", "4", "--steps_per_epoch", "20", "--state_interval", "7", "--accumulation_steps", "2"]


def arguments(data: Path, runs: str, name: str = "r") -> list[str]:
    """What comes after the command and the configuration."""
    where = ["--runs_dir", str(data.parent / runs), "--cache_dir", str(data.parent / "cache"), "--run_name", name]
    return ["--manifest", str(data / "manifest.json"), *where, *QUICK, *LENGTH]


def folder_of(data: Path, runs: str) -> Path:
    return data.parent / runs / BUNDLE.name / "r"


def interrupted(command: list[str], run: Path, number: int) -> subprocess.CompletedProcess[str]:
    """Start a training, wait until the first epoch is saved, send the signal, and wait for the end."""
    process = subprocess.Popen(command, cwd=BUNDLE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(run.glob("checkpoints/last.safetensors")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.slow
def test_asked_to_stop_it_exits_with_75_and_goes_on_to_the_same_weights(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = [sys.executable, "-c", "import sys; from pipelines.cli import main; sys.exit(main())", "train", str(BUNDLE)]
    theirs = [sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/train.yaml"]
    assert main(["train", str(BUNDLE), *arguments(data, "whole")]) == 0
    expected = {path.name: path.read_bytes() for path in folder_of(data, "whole").glob("checkpoints/[bl]*st.*")}
    assert set(expected) == {"best.safetensors", "last.safetensors"}
    for command, number, runs in ((ours, signal.SIGTERM, "term"), (theirs, signal.SIGUSR1, "usr1")):
        run = folder_of(data, runs)
        done = interrupted([*command, *arguments(data, runs)], run, number)
        assert done.returncode == 75, done.stderr
        what, why, fix = done.stderr.splitlines()[-3:]
        assert what == f"error: run r: asked to stop ({number.name})"
        assert why.startswith("  why: its state is saved, in epoch ")
        assert "outcome" not in json.loads((run / "record.json").read_text())
        # on with what the message says; here and under the other command
        words = fix.removeprefix("  fix: go on with: ").split()
        assert words == ["--resume", "True", "--run_name", "r"]
        if command is ours:
            resumed = monai_bundle("configs/train.yaml", *arguments(data, runs), *words)
            assert resumed.returncode == 0, resumed.stderr
        else:
            assert main(["train", str(BUNDLE), *arguments(data, runs), *words]) == 0
        found = {path.name: path.read_bytes() for path in run.glob("checkpoints/[bl]*st.*")}
        assert [name for name in expected if found[name] != expected[name]] == []
        record = json.loads((run / "record.json").read_text())
        assert record["outcome"]["epochs"] == 4
        assert record["outcome"]["steps"] == 80
        assert [entry["despite"] for entry in record["resumed"]] == [{}]
        assert record["manifest_digest"]
        assert record["machine"]["device"] == "cpu"
    assert main(["train", str(BUNDLE), *arguments(data, "term"), "--resume", "True"]) == 2
    assert "is finished" in capsys.readouterr().err


def die_before_the_outcome(data: Path) -> Path:
    """Leave a run as a kill after its last epoch leaves it."""
    assert train(data) == 0
    run = folder_of(data, "runs")
    record = json.loads((run / "record.json").read_text())
    del record["outcome"]
    (run / "record.json").write_text(json.dumps(record))
    return run


def test_another_setup_is_refused_by_name_unless_acknowledged(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = die_before_the_outcome(data)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    # max_epochs stands in the configuration, the label's file in the manifest
    assert train(data, "--resume", "True", "--max_epochs", "3") == 4
    error = capsys.readouterr().err
    assert "its config is another one" in error
    assert "max_epochs was 1, now 3" in error
    path = data / "manifest.json"
    manifest = path.read_text()
    content = json.loads(manifest)
    content["cases"][2]["split"] = "train"
    path.write_text(json.dumps(content))
    assert train(data, "--resume", "True") == 4
    assert "its manifest is another one" in capsys.readouterr().err
    path.write_text(manifest)
    assert {path: path.read_bytes() for path in before} == before
    assert train(data, "--resume", "True", "--max_epochs", "3", "--resume_despite", "['config']") == 0
    record = json.loads((run / "record.json").read_text())
    assert record["outcome"]["epochs"] == 3
    assert record["resumed"][0]["despite"] == {"config": ["max_epochs was 1, now 3"]}


def test_resume_auto_starts_goes_on_and_knows_the_end(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(data, "--resume", "True") == 2
    assert "nothing to resume" in capsys.readouterr().err
    assert train(data, "--resume", "auto") == 0
    run = folder_of(data, "runs")
    assert train(data, "--resume", "auto") == 2
    assert "is finished" in capsys.readouterr().err
    record = json.loads((run / "record.json").read_text())
    assert "resumed" not in record
    del record["outcome"]
    (run / "record.json").write_text(json.dumps(record))
    newest = max(run.glob("checkpoints/state-*"))
    assert train(data, "--resume", "auto") == 0
    assert max(run.glob("checkpoints/state-*")) == newest
    assert len(json.loads((run / "record.json").read_text())["resumed"]) == 1


def test_phases_through_the_bundle(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = "[{'name': 'head', 'rates': {'output_block': 0.01}}, {'name': 'all', 'learning_rate': 0.001}]"
    assert train(data, "--phases", phases) == 0
    outcome = json.loads((folder_of(data, "runs") / "record.json").read_text())["outcome"]
    assert (outcome["phase"], outcome["phases"][0]["phase"]) == ("all", "head")
    wrong = "[{'name': 'head', 'rate': {'output_block': 0.01}}]"
    assert train(data, "--phases", wrong, "--run_name", "wrong") == 4
    assert "unknown key 'rate'" in capsys.readouterr().err
    assert not folder_of(data, "runs").with_name("wrong").exists()
