"""The ten failures of ``replays.py``, each stopped by its rule, with its exit code and in three lines."""

from __future__ import annotations

from pathlib import Path

import pytest
from proof_network import lesion_manifest
from replays import LESION, REPLAYS, Replay, laid_over, play


@pytest.mark.slow
@pytest.mark.parametrize("replay", REPLAYS, ids=lambda replay: replay.name)
def test_a_replay_is_stopped(replay: Replay, tmp_path: Path) -> None:
    played = play(replay, tmp_path)
    assert played.code == replay.code, (played.errors, played.said)
    (error,) = [line for line in played.said.splitlines() if line.startswith("error: ")]
    if replay.rule.startswith("R"):
        assert replay.rule in {rule for rule, _ in played.errors}, played.errors
        assert error.startswith("error: R")
    else:
        assert replay.rule.strip("'") in error
    assert "fix:" in played.said
    if replay.command == "check":
        assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_bundle_as_it_is_passes(tmp_path: Path) -> None:
    healthy = Replay("healthy", "nothing", "", 0, lambda where: laid_over(where, LESION, lesion_manifest(), {}))
    played = play(healthy, tmp_path)
    assert (played.code, played.errors) == (0, [])


@pytest.mark.slow
def test_a_warm_up_longer_than_the_run_is_refused_before_there_is_a_run(tmp_path: Path) -> None:
    longer = {"max_epochs": 3, "warmup_epochs": 5}
    words = Replay("", "", "R41", 4, lambda where: laid_over(where, LESION, lesion_manifest(), {}, **longer), "train")
    played = play(words, tmp_path)
    assert played.code == 4
    assert "error: R41: phase train" in played.said
    assert not (tmp_path / "runs").exists()
