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
    assert replay.rule in {rule for rule, _ in played.errors}, played.errors
    (error,) = [line for line in played.said.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: R")
    assert "fix:" in played.said
    if replay.command == "check":
        assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_bundle_as_it_is_passes(tmp_path: Path) -> None:
    healthy = Replay("healthy", "nothing", "", 0, lambda where: laid_over(where, LESION, lesion_manifest(), {}))
    played = play(healthy, tmp_path)
    assert (played.code, played.errors) == (0, [])
