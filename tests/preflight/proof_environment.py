"""A folder that cannot be written, planted in both bundles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from planted import Proof
from proof_network import folder, found, fusion, lesion

from pipelines.preflight import Inspection
from pipelines.preflight.environment import RULES


def below_a_file() -> Inspection:
    """Return a run whose folder would stand below a file."""
    blocker = folder() / "blocker"
    blocker.write_text("no folder")
    return replace(lesion(), config={**lesion().config, "runs_dir": str(blocker / "runs")})


def with_damaged_weights(path: Path) -> Inspection:
    path.write_bytes(b"\x08\0\0\0\0\0\0\0no json!")
    return replace(lesion(), config={**lesion().config, "initial_weights": str(path)})


PROOFS = [
    Proof(
        rule="R45",
        check="packages, device, processes, weights and folders are as the run needs them",
        origin="a night's training that could not write its first checkpoint",
        planted=lambda: found(RULES, "R45", below_a_file()),
        healthy=lambda: found(RULES, "R45", lesion()) + found(RULES, "R45", fusion()),
    ),
    Proof(
        rule="R45",
        check="weights that the configuration names can be read",
        origin="weights behind a login that nobody had",
        planted=lambda: found(RULES, "R45", with_damaged_weights(folder() / "damaged.safetensors")),
        healthy=lambda: found(RULES, "R45", lesion()),
    ),
]
